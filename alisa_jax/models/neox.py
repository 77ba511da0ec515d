"""The GPT-NeoX family (arXiv 2204.06745, section 2) and Pythia (arXiv 2304.01373, section 2.2).

    a = o(attend(rotate(q(n)), rotate(k(n)), v(n)))            n = LayerNorm(x)
    x = x + a + down(act(up(m)))                               m = LayerNorm(x)

With sequential residuals m is LayerNorm(x + a). `rotate` turns the leading `rotary_dims` channels
of each head and leaves the others as they are. Checkpoints hold q, k and v as one matrix; here they
are three, as in the other families.

Three modules that hold parameters and nothing else. The block is given `rotate` and `attend` and
knows neither positions nor caches; q is not scaled.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from alisa_jax.models.config import ModelConfig
from alisa_jax.models.layers import DType, Head, LayerNorm, Linear, Table, activation


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
        B, T, D = x.shape
        residual = (2 * c.n_layers) ** -0.5

        def linear(name, features, bias, scale=1.0):
            return Linear(features, bias, scale, dtype, name=name)

        def heads(name):
            return linear(name, D, c.attention_bias)(n).reshape(B, T, c.n_heads, c.head_dim)

        n = LayerNorm(c.norm_eps, dtype, name="attn_norm")(x)
        q = rotate(heads("q"))
        k = rotate(heads("k"))
        v = heads("v")
        out, aux = attend(q, k, v)
        a = linear("o", D, c.attention_bias, residual)(out.reshape(B, T, D))

        m = LayerNorm(c.norm_eps, dtype, name="mlp_norm")(x if c.parallel_residual else x + a)
        hidden = activation(c.act)(linear("up", c.d_ff, c.mlp_bias)(m))
        return x + a + linear("down", D, c.mlp_bias, residual)(hidden), aux


class Unembed(nn.Module):
    """Final norm and head: x [B, T, D] -> logits [B, T, V] float32; `table`: a tied token table."""

    config: ModelConfig
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array | None) -> jax.Array:
        x = LayerNorm(self.config.norm_eps, self.param_dtype, name="norm")(x)
        return Head(self.config.vocab_size, self.param_dtype, name="head")(x, table)
