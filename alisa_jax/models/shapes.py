"""Named shapes of published models, for `load("random:NAME")`: real sizes with random weights.

Memory, time and transfers of a cache depend on the shape alone, so they can be measured without the weights.
Sources: OPT, arXiv 2205.01068, table 1; LLaMA, arXiv 2302.13971, table 2; Llama 3, arXiv 2407.21783, table 3,
for the 8,192-token model without rotary scaling. `configs/models` has one page per shape.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

from alisa_jax.models.config import ModelConfig


def _opt(d_model: int, n_layers: int, n_heads: int) -> ModelConfig:
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


SHAPES: Mapping[str, ModelConfig] = types.MappingProxyType(
    {
        "opt_125m": _opt(768, 12, 12),
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
    }
)
