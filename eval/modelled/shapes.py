"""The numbers of a model by name: its configuration, weights, FLOPs and the bytes of a token. No weights are read.

What is wrong raises UserError with one sentence.
"""

import json

from alisa_jax.kv import codec as codecs
from alisa_jax.models import hf, shapes
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder
from alisa_jax.placement.cost import Shape
from eval.script import inputs
from eval.script.common import UserError

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def config(name: str) -> ModelConfig:
    """The configuration behind random:NAME, NAME, bundled, a folder or a name of the hub; weights are not read."""
    if name.removeprefix("random:") in shapes.SHAPES:
        return shapes.SHAPES[name.removeprefix("random:")]
    folder, _ = inputs.locate(name)
    if not folder.is_dir():
        raise UserError(f"--model: {name!r} is no folder; known shapes: {', '.join(shapes.SHAPES)}")
    try:
        return hf.config_from_hf(json.loads((folder / "config.json").read_text()))
    except OSError as error:
        raise UserError(f"--model: {name!r} has no readable config.json: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--model: {error}") from None


def codec(text: str, dtype: str):
    """The codec that `text` names, for a model that computes in `dtype`."""
    return codecs.parse(inputs.codec(text)).resolve(dtype)


def shape(config: ModelConfig, codec, dtype: str) -> Shape:
    """The numbers of a model whose weights are `dtype` and whose cache is stored by the resolved `codec`."""
    decoder = Decoder(config)
    return Shape(
        weight_bytes=decoder.count_params() * ELEMENT_BYTES[dtype],
        weight_flops=decoder.flops_per_token(0),
        attention_flops=decoder.flops_per_token(1) - decoder.flops_per_token(0),
        layers=config.n_layers,
        d_model=config.d_model,
        d_ff=config.d_ff,
        vocab_size=config.vocab_size,
        kv_token_bytes=codec.token_bytes(config.n_kv_heads, config.head_dim),
        element_bytes=ELEMENT_BYTES[dtype],
    )
