"""Codes: rounding to int8, and products of codes with floats that make no float copy of all codes.

    logits   z_m = sum_h q_h c_mh          mix   o_h = sum_m p_m c_mh

A GPU compiler fuses the conversion into the product. XLA:CPU does not: it would write the whole
array out as float32 and read it back, which costs more memory and time than a cache that was never
quantised. So on a CPU the products go tile by tile. A tile of floats (at most 4 MiB) stays in the
cache that the cores share, and is large enough for XLA to give each core a part of it; the loop
over tiles runs on one core.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.ops import products

LEVELS = 255.0  # steps between the least and the greatest code, -128 and 127
TINY = 2.0**-100  # the smallest step: that of a group of zeros
LARGE_TILE, SMALL_TILE = 2**20, 2**16  # elements
ZERO = np.int32(0)  # a Python 0 is int64 where JAX_ENABLE_X64 is set, and indices are of one type
SHARE = 32  # a tile has one in so many of all elements, within the bounds above


def nearest(x: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """The whole number nearest to x / scale + zero, float32, not clamped."""
    return jnp.round(x / scale + zero)


def clamp(code: jax.Array) -> jax.Array:
    """`code` brought into the range of int8."""
    return jnp.clip(code, -128, 127)


def encode(x: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """Codes of `x`, int8; scale and zero are float32 of the same rank."""
    return clamp(nearest(x, scale, zero)).astype(jnp.int8)


def logits(q: jax.Array, codes: jax.Array, share: int = SHARE) -> jax.Array:
    """q [B, K, G, H] float32, codes [B, K, M, H] int8 -> [B, K, G, M] float32.

    A larger `share` makes smaller tiles.
    """
    return logits_of(q, (codes,), _plain, share=share)


def mix(p: jax.Array, codes: jax.Array, share: int = SHARE) -> jax.Array:
    """p [B, K, G, M] float32, codes [B, K, M, H] int8 -> [B, K, G, H] float32; see `logits`."""
    return mix_of(p, (codes,), codes.shape[-1], _plain, share=share)


def logits_of(
    q: jax.Array,
    rows: tuple[jax.Array, ...],
    values: Callable,
    whole_tokens: bool = False,
    share: int = SHARE,
) -> jax.Array:
    """As `logits`, of arrays [B, K, M, *] for which `values(*rows)` is [B, K, M, H] float32.

    `values` is called on tiles: arrays [heads, tokens, *] of one sequence; with `whole_tokens` a
    tile has all heads of its tokens. The first array has all of B, K and M. In others an axis may
    be 1, if sequences, heads or tokens share the content, and is 1 in their tiles.
    """
    by_tiles = functools.partial(
        _logits_by_tiles, values=values, whole_tokens=whole_tokens, share=share
    )
    return jax.lax.platform_dependent(
        q, rows, cpu=by_tiles, default=functools.partial(_logits, values=values)
    )


def mix_of(
    p: jax.Array,
    rows: tuple[jax.Array, ...],
    H: int,
    values: Callable,
    whole_tokens: bool = False,
    share: int = SHARE,
) -> jax.Array:
    """As `mix`, of arrays [B, K, M, *]; see `logits_of`."""
    by_tiles = functools.partial(
        _mix_by_tiles, H=H, values=values, whole_tokens=whole_tokens, share=share
    )
    return jax.lax.platform_dependent(
        p, rows, cpu=by_tiles, default=functools.partial(_mix, values=values)
    )


def _plain(codes):
    return codes.astype(jnp.float32)


def _logits(q, rows, values):
    return products.logits(q, values(*rows))


def _mix(p, rows, values):
    return products.mix(p, values(*rows))


def _tiling(B, K, M, H, whole_tokens: bool = False, share: int = SHARE) -> tuple[int, int, int]:
    """Heads in a tile, tokens in a tile, tiles along the tokens.

    A tile has all tokens of two or more heads. With `whole_tokens`, or if two heads have too many
    tokens, it has all heads of some tokens. Neighbouring tiles overlap by less than a token each.

    A tile is a small share of the whole, so that its float copies, one per operation of `values`,
    need less memory than the codes. A caller with a single copy can make `share` as small as 8.
    """
    elements = max(SMALL_TILE, min(LARGE_TILE, B * K * M * H // share))
    heads = max(n for n in range(1, K + 1) if K % n == 0 and (n == 1 or n * M * H <= elements))
    if not whole_tokens and heads * M * H <= elements and heads >= min(K, 2):
        return heads, M, 1
    across = -(-M // max(1, min(M, elements // (K * H))))
    return K, -(-M // across), across


def _tile(rows, b, k, first, heads, tokens, values):
    """The tile of `rows` at sequence b, head k and token `first`: float32 [heads, tokens, H]."""

    def cut(x):
        at = [start if n > 1 else ZERO for n, start in zip(x.shape, (b, k, first))]
        size = [min(n, wanted) for n, wanted in zip(x.shape, (1, heads, tokens))]
        return jax.lax.dynamic_slice(x, (*at, ZERO), (*size, x.shape[3]))[0]

    return values(*map(cut, rows))


def _by_tiles(rows, whole_tokens, share, H: int, made: jax.Array, body: Callable) -> jax.Array:
    """`made = body(made, (b, k), t, first, heads, tokens)` for every tile, t along the tokens.

    Each loop has one index, so no tile needs a division.
    """
    B, K, M, _ = rows[0].shape
    heads, tokens, across = _tiling(B, K, M, H, whole_tokens, share)

    def of_sequence(b, made):
        def of_heads(k, made):
            def tile(t, made):
                first = jnp.minimum(t * tokens, M - tokens) if across > 1 else ZERO
                return body(made, (b, k * heads), t, first, heads, tokens)

            return _loop(across, tile, made)

        return _loop(K // heads, of_heads, made)

    return _loop(B, of_sequence, made)


def _loop(count: int, body: Callable, made: jax.Array) -> jax.Array:
    """`made = body(i, made)` for i from 0 to `count` - 1, int32 under any setting of JAX."""
    return jax.lax.fori_loop(0, count, lambda i, made: body(i.astype(jnp.int32), made), made)


def _logits_by_tiles(q, rows, values, whole_tokens, share):
    B, K, G, H = q.shape
    M = rows[0].shape[2]

    def body(z, at, t, first, heads, tokens):
        tile = _tile(rows, *at, first, heads, tokens, values)
        queries = jax.lax.dynamic_slice(q, (*at, ZERO, ZERO), (1, heads, G, H))[0]
        part = products.logits(queries, tile)
        return jax.lax.dynamic_update_slice(z, part[None], (*at, ZERO, first))

    return _by_tiles(rows, whole_tokens, share, H, jnp.zeros((B, K, G, M), jnp.float32), body)


def _mix_by_tiles(p, rows, H, values, whole_tokens, share):
    B, K, G, M = p.shape

    def body(o, at, t, first, heads, tokens):
        tile = _tile(rows, *at, first, heads, tokens, values)
        weights = jax.lax.dynamic_slice(p, (*at, ZERO, first), (1, heads, G, tokens))[0]
        if M % tokens:  # the last tile overlaps the one before it: each token counts once
            seen = first + jax.lax.broadcasted_iota(jnp.int32, weights.shape, 2)
            weights = jnp.where(seen >= t * tokens, weights, jnp.float32(0.0))
        part = jnp.einsum("rgt,rth->rgh", weights, tile, preferred_element_type=jnp.float32)
        if M > tokens:
            part = part + jax.lax.dynamic_slice(o, (*at, ZERO, ZERO), (1, heads, G, H))[0]
        return jax.lax.dynamic_update_slice(o, part[None], (*at, ZERO, ZERO))

    return _by_tiles(rows, whole_tokens, share, H, jnp.zeros((B, K, G, H), jnp.float32), body)
