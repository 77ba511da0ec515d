"""Codes: rounding to int8, and products of codes with float queries and weights without a float copy of all codes.

    logits   z_m = sum_h q_h c_mh          mix   o_h = sum_m p_m c_mh

A GPU compiler turns the conversion into a part of the product. XLA:CPU does not: it would write the whole array out as
float32 and read it back, which costs more memory and time than a cache that was never quantised. There the products go
tile by tile, and one tile of floats (256 KiB) stays in a core's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

LEVELS = 255.0  # steps between the least and the greatest code, -128 and 127
TINY = 2.0**-100  # the smallest step: that of a group of zeros
TILE_ELEMENTS = 65536


def nearest(x: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """The whole number that stands for `x`, float32, wherever it lies."""
    return jnp.round(x / scale + zero)


def clamp(code: jax.Array) -> jax.Array:
    """`code` brought into the range of int8."""
    return jnp.clip(code, -128, 127)


def encode(x: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """Codes of `x`, int8; scale and zero are float32 of the same rank."""
    return clamp(nearest(x, scale, zero)).astype(jnp.int8)


def logits(q: jax.Array, codes: jax.Array) -> jax.Array:
    """q [B, K, G, H] float32, codes [B, K, M, H] int8 -> [B, K, G, M] float32."""
    return logits_of(q, (codes,), _plain)


def mix(p: jax.Array, codes: jax.Array) -> jax.Array:
    """p [B, K, G, M] float32, codes [B, K, M, H] int8 -> [B, K, G, H] float32."""
    return mix_of(p, (codes,), codes.shape[-1], _plain)


def logits_of(q: jax.Array, rows: tuple[jax.Array, ...], values: Callable, whole_tokens: bool = False) -> jax.Array:
    """As `logits`, of arrays [B, K, M, *] for which `values(*rows)` is [B, K, M, H] float32.

    `values` is asked of tiles: arrays [heads, tokens, *] of one sequence; with `whole_tokens` a tile has all heads of its
    tokens. The first array has all of B, K and M; in others an axis may be 1 instead, where sequences, heads or tokens
    share what it holds, and is 1 in their tiles.
    """
    by_tiles = functools.partial(_logits_by_tiles, values=values, whole_tokens=whole_tokens)
    return jax.lax.platform_dependent(q, rows, cpu=by_tiles, default=functools.partial(_logits, values=values))


def mix_of(
    p: jax.Array, rows: tuple[jax.Array, ...], H: int, values: Callable, whole_tokens: bool = False
) -> jax.Array:
    """As `mix`, of arrays [B, K, M, *]; see `logits_of`."""
    by_tiles = functools.partial(_mix_by_tiles, H=H, values=values, whole_tokens=whole_tokens)
    return jax.lax.platform_dependent(p, rows, cpu=by_tiles, default=functools.partial(_mix, values=values))


def _plain(codes):
    return codes.astype(jnp.float32)


def _logits(q, rows, values):
    return jnp.einsum("bkgh,bkmh->bkgm", q, values(*rows), preferred_element_type=jnp.float32)


def _mix(p, rows, values):
    return jnp.einsum("bkgm,bkmh->bkgh", p, values(*rows), preferred_element_type=jnp.float32)


def _tiling(B, K, M, H, whole_tokens: bool = False) -> tuple[int, int, int]:
    """Rows of (B, K) in a tile, tokens in a tile, tiles along the tokens."""
    if whole_tokens:
        tokens = max(1, min(M, TILE_ELEMENTS // (K * H)))
        return K, tokens, -(-M // tokens)
    tokens = max(1, min(M, TILE_ELEMENTS // H))
    heads = max(n for n in range(1, K + 1) if K % n == 0 and (n == 1 or (tokens == M and n * M * H <= TILE_ELEMENTS)))
    return heads, tokens, -(-M // tokens)


def _tile(rows, i, heads, tokens, across, values):
    """Tile number i of `rows`, float32, with its first row of (B, K) and token; the last begins early enough to be whole."""
    _, K, M, _ = rows[0].shape
    row, first = (i // across) * heads, jnp.minimum((i % across) * tokens, M - tokens)

    def cut(x):
        at = [start if n > 1 else 0 for n, start in zip(x.shape, (row // K, row % K, first))]
        size = [min(n, wanted) for n, wanted in zip(x.shape, (1, heads, tokens))]
        return jax.lax.dynamic_slice(x, (*at, 0), (*size, x.shape[3]))[0]

    return row, first, values(*map(cut, rows))


def _logits_by_tiles(q, rows, values, whole_tokens):
    B, K, G, H = q.shape
    M = rows[0].shape[2]
    heads, tokens, across = _tiling(B, K, M, H, whole_tokens)
    queries = q.reshape(B * K, G, H)

    def body(i, z):
        row, first, tile = _tile(rows, i, heads, tokens, across, values)
        here = jax.lax.dynamic_slice_in_dim(queries, row, heads, 0)
        part = jnp.einsum("rgh,rth->rgt", here, tile, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice(z, part, (row, 0, first))

    z = jax.lax.fori_loop(0, B * K // heads * across, body, jnp.zeros((B * K, G, M), jnp.float32))
    return z.reshape(B, K, G, M)


def _mix_by_tiles(p, rows, H, values, whole_tokens):
    B, K, G, M = p.shape
    heads, tokens, across = _tiling(B, K, M, H, whole_tokens)
    weights = p.reshape(B * K, G, M)

    def body(i, o):
        row, first, tile = _tile(rows, i, heads, tokens, across, values)
        here = jax.lax.dynamic_slice(weights, (row, 0, first), (heads, G, tokens))
        if across > 1:  # the last tile may overlap the one before it: each token counts once
            at = first + jax.lax.broadcasted_iota(jnp.int32, here.shape, 2)
            here = jnp.where(at >= (i % across) * tokens, here, jnp.float32(0.0))
        part = jnp.einsum("rgt,rth->rgh", here, tile, preferred_element_type=jnp.float32)
        part = part + jax.lax.dynamic_slice_in_dim(o, row, heads, 0)
        return jax.lax.dynamic_update_slice_in_dim(o, part, row, 0)

    o = jax.lax.fori_loop(0, B * K // heads * across, body, jnp.zeros((B * K, G, H), jnp.float32))
    return o.reshape(B, K, G, H)
