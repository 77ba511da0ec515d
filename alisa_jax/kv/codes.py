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


def logits_of(q: jax.Array, rows: tuple[jax.Array, ...], values: Callable) -> jax.Array:
    """As `logits`, of arrays [B, K, M, *] for which `values(*rows)` is [B, K, M, H] float32; it is asked of tiles."""
    by_tiles = functools.partial(_logits_by_tiles, values=values)
    return jax.lax.platform_dependent(q, rows, cpu=by_tiles, default=functools.partial(_logits, values=values))


def mix_of(p: jax.Array, rows: tuple[jax.Array, ...], H: int, values: Callable) -> jax.Array:
    """As `mix`, of arrays [B, K, M, *] for which `values(*rows)` is [B, K, M, H] float32; it is asked of tiles."""
    by_tiles = functools.partial(_mix_by_tiles, H=H, values=values)
    return jax.lax.platform_dependent(p, rows, cpu=by_tiles, default=functools.partial(_mix, values=values))


def _plain(codes):
    return codes.astype(jnp.float32)


def _logits(q, rows, values):
    return jnp.einsum("bkgh,bkmh->bkgm", q, values(*rows), preferred_element_type=jnp.float32)


def _mix(p, rows, values):
    return jnp.einsum("bkgm,bkmh->bkgh", p, values(*rows), preferred_element_type=jnp.float32)


def _tiling(B, K, M, H) -> tuple[int, int, int]:
    """Rows of (B, K) in a tile, tokens in a tile, tiles along the tokens."""
    tokens = max(1, min(M, TILE_ELEMENTS // H))
    heads = max(n for n in range(1, K + 1) if K % n == 0 and (n == 1 or (tokens == M and n * M * H <= TILE_ELEMENTS)))
    return heads, tokens, -(-M // tokens)


def _tile(flat, i, heads, tokens, across, values):
    """Tile number i of rows [B K, M, *] as float32; the last one of a row begins early enough to be whole."""
    row, first = (i // across) * heads, jnp.minimum((i % across) * tokens, flat[0].shape[1] - tokens)
    cut = [jax.lax.dynamic_slice(x, (row, first, 0), (heads, tokens, x.shape[2])) for x in flat]
    return row, first, values(*cut)


def _flat(rows):
    return [x.reshape(-1, *x.shape[2:]) for x in rows]


def _logits_by_tiles(q, rows, values):
    B, K, G, H = q.shape
    M = rows[0].shape[2]
    heads, tokens, across = _tiling(B, K, M, H)
    flat, queries = _flat(rows), q.reshape(B * K, G, H)

    def body(i, z):
        row, first, tile = _tile(flat, i, heads, tokens, across, values)
        here = jax.lax.dynamic_slice_in_dim(queries, row, heads, 0)
        part = jnp.einsum("rgh,rth->rgt", here, tile, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice(z, part, (row, 0, first))

    z = jax.lax.fori_loop(0, B * K // heads * across, body, jnp.zeros((B * K, G, M), jnp.float32))
    return z.reshape(B, K, G, M)


def _mix_by_tiles(p, rows, H, values):
    B, K, G, M = p.shape
    heads, tokens, across = _tiling(B, K, M, H)
    flat, weights = _flat(rows), p.reshape(B * K, G, M)

    def body(i, o):
        row, first, tile = _tile(flat, i, heads, tokens, across, values)
        here = jax.lax.dynamic_slice(weights, (row, 0, first), (heads, G, tokens))
        if across > 1:  # the last tile may overlap the one before it: each token counts once
            at = first + jax.lax.broadcasted_iota(jnp.int32, here.shape, 2)
            here = jnp.where(at >= (i % across) * tokens, here, jnp.float32(0.0))
        part = jnp.einsum("rgt,rth->rgh", here, tile, preferred_element_type=jnp.float32)
        part = part + jax.lax.dynamic_slice_in_dim(o, row, heads, 0)
        return jax.lax.dynamic_update_slice_in_dim(o, part, row, 0)

    o = jax.lax.fori_loop(0, B * K // heads * across, body, jnp.zeros((B * K, G, H), jnp.float32))
    return o.reshape(B, K, G, H)
