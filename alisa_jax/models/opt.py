"""The OPT family (arXiv 2205.01068), in the sizes that normalise before each half.

    x = tokens[t] + positions[p + 2]
    x = x + o(attend(q(n), k(n), v(n)))                        n = LayerNorm(x)
    x = x + down(act(up(n)))                                   n = LayerNorm(x)

Three modules that hold parameters and nothing else. The block hands q, k and v to `attend` and knows nothing
of caches; q is not scaled.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from alisa_jax.models.config import ModelConfig
from alisa_jax.models.layers import DType, Head, LayerNorm, Linear, Table, activation

POSITION_OFFSET = 2  # the first two rows of the published position tables belong to padding


class Embed(nn.Module):
    """Token and position tables: tokens [B, T], positions [B, T], both int32 -> [B, T, D]."""

    config: ModelConfig
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        c, dtype = self.config, self.param_dtype
        x = Table(c.vocab_size, c.d_model, dtype, name="tokens")(tokens)
        rows = c.max_positions + POSITION_OFFSET
        return x + Table(rows, c.d_model, dtype, name="positions")(positions + POSITION_OFFSET)


class Block(nn.Module):
    """One layer: x [B, T, D] -> ([B, T, D], aux of attend); positions are in x already."""

    config: ModelConfig
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, attend):
        c, dtype = self.config, self.param_dtype
        B, T, D = x.shape
        residual = (2 * c.n_layers) ** -0.5

        def linear(name, features, bias, scale=1.0):
            return Linear(features, bias, scale, dtype, name=name)

        n = LayerNorm(c.norm_eps, dtype, name="attn_norm")(x)
        q, k, v = (
            linear(name, D, c.attention_bias)(n).reshape(B, T, c.n_heads, c.head_dim) for name in ("q", "k", "v")
        )
        out, aux = attend(q, k, v)
        x = x + linear("o", D, c.attention_bias, residual)(out.reshape(B, T, D))

        n = LayerNorm(c.norm_eps, dtype, name="mlp_norm")(x)
        hidden = activation(c.act)(linear("up", c.d_ff, c.mlp_bias)(n))
        return x + linear("down", D, c.mlp_bias, residual)(hidden), aux


class Unembed(nn.Module):
    """Final norm and head: x [B, T, D] -> logits [B, T, V] float32; `table`: the token table if tied."""

    config: ModelConfig
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array | None) -> jax.Array:
        x = LayerNorm(self.config.norm_eps, self.param_dtype, name="norm")(x)
        return Head(self.config.vocab_size, self.param_dtype, name="head")(x, table)
