"""The OPT family (arXiv 2205.01068).

    x = tokens[t] + positions[p + 2]
    x = x + o(attend(q(n), k(n), v(n)))                        n = LayerNorm(x)
    x = x + down(act(up(n)))                                   n = LayerNorm(x)

opt-350m differs twice. With `norm_before=False` each half ends with its norm instead,
x = LayerNorm(x + half(x)), and there is no final norm. With `embed_dim` x begins as
project_in(tokens[t]) + positions[p + 2], and the head reads project_out(x).

Three modules that hold parameters and nothing else. The block hands q, k and v to `attend` and
knows nothing of caches; q is not scaled.
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
        x = Table(c.vocab_size, c.table_dim, dtype, name="tokens")(tokens)
        if c.embed_dim is not None:
            x = Linear(c.d_model, param_dtype=dtype, name="project_in")(x)
        rows = c.max_positions + POSITION_OFFSET
        return x + Table(rows, c.d_model, dtype, name="positions")(positions + POSITION_OFFSET)


class Block(nn.Module):
    """One layer: x [B, T, D] -> ([B, T, D], aux of attend); x has positions, nothing is rotated."""

    config: ModelConfig
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, rotate, attend):
        c, dtype = self.config, self.param_dtype
        B, T, D = x.shape
        residual = (2 * c.n_layers) ** -0.5

        def linear(name, features, bias, scale=1.0):
            return Linear(features, bias, scale, dtype, name=name)

        def heads(name):
            return linear(name, D, c.attention_bias)(n).reshape(B, T, c.n_heads, c.head_dim)

        norm = LayerNorm(c.norm_eps, dtype, name="attn_norm")
        n = norm(x) if c.norm_before else x
        q = heads("q")
        k = heads("k")
        v = heads("v")
        out, aux = attend(q, k, v)
        x = x + linear("o", D, c.attention_bias, residual)(out.reshape(B, T, D))
        x = x if c.norm_before else norm(x)

        norm = LayerNorm(c.norm_eps, dtype, name="mlp_norm")
        n = norm(x) if c.norm_before else x
        hidden = activation(c.act)(linear("up", c.d_ff, c.mlp_bias)(n))
        x = x + linear("down", D, c.mlp_bias, residual)(hidden)
        return x if c.norm_before else norm(x), aux


class Unembed(nn.Module):
    """Final norm and head: x [B, T, D] -> logits [B, T, V] float32; `table`: a tied token table."""

    config: ModelConfig
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array | None) -> jax.Array:
        c, dtype = self.config, self.param_dtype
        if c.norm_before:
            x = LayerNorm(c.norm_eps, dtype, name="norm")(x)
        if c.embed_dim is not None:
            x = Linear(c.embed_dim, param_dtype=dtype, name="project_out")(x)
        return Head(c.vocab_size, dtype, name="head")(x, table)
