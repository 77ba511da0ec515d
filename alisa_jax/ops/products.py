"""Products of a few rows with many, in the order of operands that XLA:CPU reads quickly.

XLA:CPU packs the second operand of a product before it uses it, for a step of decoding as for a
whole prompt; if it must transpose the operand, that is slow. No order has been measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

FEW_ROWS = 64


def times(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """x [B, T, in] times weight [out, in] -> [B, T, out], in `dtype` or that of x.

    For a few rows the matrix comes first: XLA then reads it once and in order, in 45 to 70 % of the
    time that it takes as the second operand, [in, out] or [out, in]. For many rows the order makes
    no difference.
    """
    if x.shape[0] * x.shape[1] <= FEW_ROWS:
        return jnp.moveaxis(
            jnp.einsum("oi,bti->obt", weight, x, preferred_element_type=dtype), 0, -1
        )
    return jnp.einsum("bti,oi->bto", x, weight, preferred_element_type=dtype)


def logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [..., G, H] against k [..., M, H] of the same type: [..., G, M] float32.

    For one query this is a product of a matrix and a vector. For two or more the keys come first on
    a CPU, and a barrier keeps XLA from turning that round again: over 1,216 keys it takes a third
    of the time.
    """
    if q.shape[-2] == 1:
        return _queries_first(q, k)
    return jax.lax.platform_dependent(q, k, cpu=_keys_first, default=_queries_first)


def _queries_first(q, k):
    return jnp.einsum("...gh,...mh->...gm", q, k, preferred_element_type=jnp.float32)


def _keys_first(q, k):
    columns = jnp.einsum("...mh,...gh->...mg", k, q, preferred_element_type=jnp.float32)
    return jnp.swapaxes(jax.lax.optimization_barrier(columns), -1, -2)


def mix(p: jax.Array, v: jax.Array) -> jax.Array:
    """p [..., G, M] times v [..., M, H] of the same type: [..., G, H] float32.

    On a CPU a single row of weights gets a row of zeros beside it: the product of two matrices is
    quicker than that of a row and a matrix, by a tenth to a third with jax 0.10.2, and twice as
    quick with 0.12.
    """
    if p.shape[-2] > 1:
        return _mix(p, v)
    return jax.lax.platform_dependent(p, v, cpu=_mix_two, default=_mix)


def _mix(p, v):
    return jnp.einsum("...gm,...mh->...gh", p, v, preferred_element_type=jnp.float32)


def _mix_two(p, v):
    return _mix(jnp.concatenate([p, jnp.zeros_like(p)], axis=-2), v)[..., :1, :]
