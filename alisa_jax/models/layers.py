"""Pieces that the families are made of: linear maps, norms, token tables and the output head.

Matrices are stored as [out, in], as in the folders of Hugging Face. Statistics of norms and the
logits are float32 whatever the type of the weights; everything else stays in the type of the
weights, and nothing is promoted silently. Initial values: every matrix has standard deviation
fan_in ** -0.5, and the two that write to the residual stream a further (2 L) ** -0.5, so that the
stream keeps its size at any depth.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from alisa_jax.ops import products

DType = Any


def activation(name: str):
    """The elementwise function "silu", "relu", "gelu" (exact, with erf) or "gelu_tanh"."""
    return {
        "silu": jax.nn.silu,
        "relu": jax.nn.relu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        # arXiv 1606.08415, section 2
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    }[name]


def matrix_init(deviation: float):
    """Initial values of a matrix [out, in]: those that Flax draws for the matrix [in, out]."""
    init = nn.initializers.normal(deviation)
    return lambda key, shape, dtype: init(key, shape[::-1], dtype).T


class Linear(nn.Module):
    """y = x W^T (+ b), x [B, T, in] -> [B, T, out], W [out, in]."""

    features: int
    bias: bool = False
    scale: float = 1.0  # factor on the initial standard deviation
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in = x.shape[-1]
        init = matrix_init(self.scale * fan_in**-0.5)
        y = products.times(x, self.param("weight", init, (self.features, fan_in), self.param_dtype))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias[None, None, :]
        return y


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; x [..., D]."""

    eps: float
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32; x [B, T, D]."""

    eps: float
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        wide = (
            wide * scale.astype(jnp.float32)[None, None, :]
            + bias.astype(jnp.float32)[None, None, :]
        )
        return wide.astype(x.dtype)


class Table(nn.Module):
    """Rows looked up by index: [B, T] int32 -> [B, T, D].

    An index outside the table is clipped to its ends, so that padding cannot bring NaN into a
    batch. Whether real tokens and positions are in range is for the caller to check, outside jit.
    """

    rows: int
    features: int
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, index: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.features**-0.5)
        table = self.param("table", init, (self.rows, self.features), self.param_dtype)
        return jnp.take(table, index, axis=0, mode="clip")


class Head(nn.Module):
    """Float32 logits, x [B, T, D] -> [B, T, V], by the token table or its own matrix [V, D]."""

    vocab_size: int
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array | None) -> jax.Array:
        if table is None:
            fan_in = x.shape[-1]
            table = self.param(
                "weight", matrix_init(fan_in**-0.5), (self.vocab_size, fan_in), self.param_dtype
            )
        return products.times(x, table, jnp.float32)
