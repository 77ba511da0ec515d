"""The LLaMA family (arXiv 2302.13971; grouped-query attention: arXiv 2307.09288, section 2.2).

Mistral (arXiv 2310.06825) is this within its window. Qwen2 (arXiv 2407.10671) has biases on q, k
and v alone; Qwen3 (arXiv 2505.09388) normalises q and k, each head by itself, before they are
rotated.

    x = x + o(attend(rotate(q(n)), rotate(k(n)), v(n)))        n = RMSNorm(x)
    x = x + down(act(gate(n)) * up(n))                         n = RMSNorm(x)

Three modules that hold parameters and nothing else. The block is given `rotate` and `attend` and
knows neither positions nor caches; q is not scaled.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from alisa_jax.models.config import ModelConfig
from alisa_jax.models.layers import DType, Head, Linear, RMSNorm, Table, activation


class Embed(nn.Module):
    """Token table: tokens [B, T] int32 -> [B, T, D]; positions enter in the blocks."""

    config: ModelConfig
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        c = self.config
        return Table(c.vocab_size, c.d_model, self.param_dtype, name="tokens")(tokens)


class Block(nn.Module):
    """One layer: x [B, T, D] -> ([B, T, D], aux of attend)."""

    config: ModelConfig
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, rotate, attend):
        c, dtype = self.config, self.param_dtype
        B, T, _ = x.shape
        residual = (2 * c.n_layers) ** -0.5

        def linear(name, features, bias, scale=1.0):
            return Linear(features, bias, scale, dtype, name=name)

        def heads(name, count):
            y = linear(name, count * c.head_dim, c.attention_bias or c.qkv_bias)(n)
            return y.reshape(B, T, count, c.head_dim)

        def placed(name, count):
            y = heads(name, count)
            if c.qk_norm:
                y = RMSNorm(c.norm_eps, dtype, name=f"{name}_norm")(y)
            return rotate(y)

        n = RMSNorm(c.norm_eps, dtype, name="attn_norm")(x)
        q = placed("q", c.n_heads)
        k = placed("k", c.n_kv_heads)
        v = heads("v", c.n_kv_heads)
        out, aux = attend(q, k, v)
        out = out.reshape(B, T, c.n_heads * c.head_dim)
        x = x + linear("o", c.d_model, c.attention_bias, residual)(out)

        n = RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x)
        gate = activation(c.act)(linear("gate", c.d_ff, c.mlp_bias)(n))
        up = linear("up", c.d_ff, c.mlp_bias)(n)
        x = x + linear("down", c.d_model, c.mlp_bias, residual)(gate * up)
        return x, aux


class Unembed(nn.Module):
    """Final norm and head: x [B, T, D] -> logits [B, T, V] float32; `table`: a tied token table."""

    config: ModelConfig
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array | None) -> jax.Array:
        x = RMSNorm(self.config.norm_eps, self.param_dtype, name="norm")(x)
        return Head(self.config.vocab_size, self.param_dtype, name="head")(x, table)
