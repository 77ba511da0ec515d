"""Partial attention: what a query has seen of some tokens, and how two such pieces are joined.

For logits z_i over a set A of tokens and for disjoint A and B,

    lse(A) = log sum_{i in A} exp(z_i)
    out(A) = sum_{i in A} exp(z_i - lse(A)) v_i
    lse(A u B) = logaddexp(lse(A), lse(B))
    out(A u B) = exp(lse(A) - lse(A u B)) out(A) + exp(lse(B) - lse(A u B)) out(B)

The join is associative and commutative, with the empty set (lse = -inf, out = 0) as its identity.
Every way of cutting an attention into pieces - split-K, pages, device and host parts, chunks of a
prompt, devices of a mesh - joins here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Partial(NamedTuple):
    """Normalised attention output over some tokens and the log of its normaliser."""

    out: jax.Array  # [..., H] float32
    lse: jax.Array  # [...] float32, natural log; -inf where no token was seen


def empty(shape: tuple[int, ...], head_dim: int) -> Partial:
    """The identity of `merge`: `out` zeros [*shape, head_dim], `lse` -inf [*shape]."""
    return Partial(
        jnp.zeros((*shape, head_dim), jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)
    )


def weight(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Share of the softmax of a piece with lse `part`: exp(part - whole), 0 of an empty whole."""
    return jnp.where(
        part == -jnp.inf, 0.0, jnp.exp(part - jnp.where(whole == -jnp.inf, 0.0, whole))
    )


def softmax(z: jax.Array, axis: int = -1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax of logits z along `axis`, whose weights are `e / total`.

    Returns e like z, total with `axis` of size 1, and the lse without `axis`. Logits of -inf get
    weight 0; where there are no others, e is 0, total 1 and the lse -inf.
    """
    top = jnp.max(z, axis=axis, keepdims=True, initial=-jnp.inf)
    e = jnp.exp(z - jnp.where(top == -jnp.inf, jnp.float32(0.0), top))
    total = jnp.sum(e, axis=axis, keepdims=True)
    lse = jnp.squeeze(top + jnp.log(total), axis)
    return e, jnp.where(total == 0, jnp.float32(1.0), total), lse


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint token sets (equation above), in equal shapes."""
    lse = jnp.logaddexp(a.lse, b.lse)
    wa, wb = weight(a.lse, lse), weight(b.lse, lse)
    return Partial(wa[..., None] * a.out + wb[..., None] * b.out, lse)


def merge_axis(parts: Partial, axis: int) -> Partial:
    """`merge` over all pieces along one axis of `lse` [...].

    `out` has that axis at the same place from the left.
    """
    axis = axis % parts.lse.ndim
    e, total, lse = softmax(parts.lse, axis)
    return Partial(jnp.sum((e / total)[..., None] * parts.out, axis=axis), lse)


def mass_of(logits: jax.Array, lse: jax.Array, P: int) -> jax.Array:
    """What each token got: exp(logits - lse), summed over the heads that share a selection.

    logits [B, N, M] float32 with the bias in them, lse [B, N] of all tokens; P divides N. Returns
    [B, P, M] float32, each row of which sums to N / P where every head saw a token.
    """
    B, N, M = logits.shape
    return jnp.sum(weight(logits, lse[..., None]).reshape(B, P, N // P, M), axis=2)
