"""A model for dry runs: narrow layers with random weights and the tokenizer of the bundled model."""

import dataclasses
from pathlib import Path

import jax

import alisa_jax
from alisa_jax.models import checkpoint
from alisa_jax.models.decoder import Decoder


def write(folder: Path, layers: int = 2) -> str:
    """Write the model's folder and return its name for `--model` and `load`."""
    like = alisa_jax.load("bundled")
    sizes = dict(n_layers=layers, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=32)
    config = dataclasses.replace(like.decoder.config, **sizes)
    params = Decoder(config).init(jax.random.key(0))
    checkpoint.save(config, params, folder, tokenizer=like.tokenizer, bos_id=like.bos_id, eos_ids=like.eos_ids)
    return str(folder)
