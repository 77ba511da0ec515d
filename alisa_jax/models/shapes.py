"""Named shapes of published models, for `load("random:NAME")`: real sizes with random weights.

Memory, time and transfers of a cache depend on the shape alone, so they can be measured without the
weights. Sources: OPT, arXiv 2205.01068, table 1; LLaMA, arXiv 2302.13971, table 2; Llama 3, arXiv
2407.21783, table 3, for the 8,192-token model without rotary scaling; Pythia, arXiv 2304.01373,
table 1. `configs/models.md` has a row per shape.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

from alisa_jax.models.config import ModelConfig


def _opt(d_model: int, n_layers: int, n_heads: int, embed_dim: int | None = None) -> ModelConfig:
    """With `embed_dim`: norms after each half, and a narrower token table."""
    return ModelConfig(
        arch="opt",
        vocab_size=50272,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=4 * d_model,
        max_positions=2048,
        tie_embeddings=True,
        act="relu",
        attention_bias=True,
        mlp_bias=True,
        norm_before=embed_dim is None,
        embed_dim=embed_dim,
    )


def _llama(d_model: int, n_layers: int, n_heads: int, d_ff: int) -> ModelConfig:
    return ModelConfig(
        arch="llama",
        vocab_size=32000,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=128,
        d_ff=d_ff,
        max_positions=2048,
        norm_eps=1e-6,
    )


def _pythia(d_model: int, n_layers: int, n_heads: int, vocab_size: int = 50304) -> ModelConfig:
    return ModelConfig(
        arch="gpt_neox",
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=4 * d_model,
        max_positions=2048,
        act="gelu",
        attention_bias=True,
        mlp_bias=True,
        rotary_frac=0.25,
        parallel_residual=True,
    )


SHAPES: Mapping[str, ModelConfig] = types.MappingProxyType(
    {
        "opt_125m": _opt(768, 12, 12),
        "opt_350m": _opt(1024, 24, 16, embed_dim=512),
        "opt_1.3b": _opt(2048, 24, 32),
        "opt_2.7b": _opt(2560, 32, 32),
        "opt_6.7b": _opt(4096, 32, 32),
        "opt_13b": _opt(5120, 40, 40),
        "opt_30b": _opt(7168, 48, 56),
        "llama_7b": _llama(4096, 32, 32, 11008),
        "llama_13b": _llama(5120, 40, 40, 13824),
        "llama_33b": _llama(6656, 60, 52, 17920),
        "llama3_8b": ModelConfig(
            arch="llama",
            vocab_size=128256,
            d_model=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            d_ff=14336,
            max_positions=8192,
            rope_theta=500000.0,
        ),
        "pythia_70m": _pythia(512, 6, 8),
        "pythia_160m": _pythia(768, 12, 12),
        "pythia_410m": _pythia(1024, 24, 16),
        "pythia_1b": _pythia(2048, 16, 8),
        "pythia_1.4b": _pythia(2048, 24, 16),
        "pythia_2.8b": _pythia(2560, 32, 32),
        "pythia_6.9b": _pythia(4096, 32, 32, vocab_size=50432),
        "pythia_12b": _pythia(5120, 36, 40, vocab_size=50688),
    }
)
