"""Moving rows of tokens in and out of arrays, in the two layouts that the library knows.

    head-major   x [B, K, M, *]   the working set: slot m of sequence b and head k
    token-major  x [B, S, K, *]   the store: one token is one contiguous row

Indices have a selection axis P: 1 if all heads share the index, K if each kv head has its own. An
index that is negative or not below the size of its axis writes nothing, and reads row 0 (callers
mask what they request with -1): no index wraps around or clamps onto a neighbour.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alisa_jax.ops.writes import put


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _read_index(index: jax.Array, size: int) -> jax.Array:
    return jnp.where((index >= 0) & (index < size), index, 0)


def put_slots(x: jax.Array, rows: jax.Array, slot: jax.Array) -> jax.Array:
    """Head-major write of `rows` [B, K, E, *] into `x` [B, K, M, *] at `slot` [B, P, E].

    Slots are distinct per (b, p).
    """
    if slot.shape[1] == 1:
        shape = (slot.shape[0], slot.shape[2])
        return put(x, (_iota(shape, 0), slice(None), slot[:, 0]), jnp.swapaxes(rows, 1, 2))
    return put(x, (_iota(slot.shape, 0), _iota(slot.shape, 1), slot), rows)


def take_slots(x: jax.Array, slot: jax.Array) -> jax.Array:
    """Head-major read: rows [B, K, E, *] of `x` [B, K, M, *] at `slot` [B, P, E]."""
    slot = _read_index(slot, x.shape[2])
    if slot.shape[1] == 1:
        shape = (slot.shape[0], slot.shape[2])
        return jnp.swapaxes(x[_iota(shape, 0), :, slot[:, 0]], 1, 2)
    return x[_iota(slot.shape, 0), _iota(slot.shape, 1), slot]


def put_tokens(x: jax.Array, rows: jax.Array, pos: jax.Array) -> jax.Array:
    """Token-major write of one token per sequence, `rows` [B, K, *], at `pos` [B] of `x`.

    x [B, S, K, *].
    """
    return put(x, (_iota(pos.shape, 0), pos), rows)


def take_tokens(x: jax.Array, pos: jax.Array) -> jax.Array:
    """Token-major read: head-major rows [B, K, E, *] of `x` [B, S, K, *] at `pos` [B, P, E]."""
    pos = _read_index(pos, x.shape[1])
    if pos.shape[1] == 1:
        shape = (pos.shape[0], pos.shape[2])
        return jnp.swapaxes(x[_iota(shape, 0), pos[:, 0]], 1, 2)
    return x[_iota(pos.shape, 0), pos, _iota(pos.shape, 1)]


def slice_tokens(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Token-major read of the tokens start .. start+size-1 of `x` [B, S, K, *].

    Returns head-major rows [B, K, size, *].
    """
    return jnp.swapaxes(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), 1, 2)


def put_rows(x: jax.Array, rows: jax.Array, sequence: jax.Array, slot: jax.Array) -> jax.Array:
    """Head-major write of single tokens `rows` [R, K, *] into `x` [B, K, M, *].

    They go to `slot` [R, P] of `sequence` [R]. Places are distinct; a sequence or slot out of range
    writes nothing.
    """
    slot = jnp.broadcast_to(slot, (slot.shape[0], x.shape[1]))
    sequence = jnp.broadcast_to(sequence[:, None], slot.shape)
    return put(x, (sequence, _iota(slot.shape, 1), slot), rows)


def slice_rows(
    x: jax.Array, sequences: jax.Array, start: jax.Array, size: int, axis: int
) -> jax.Array:
    """`size` tokens from `start` on, along `axis`, of the `sequences` [n] of `x`: [n, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)[sequences]


def pad_axis(x: jax.Array, axis: int, size: int, value) -> jax.Array:
    """`x` with `axis` extended to `size` by `value` (never shortened)."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, width, constant_values=jnp.asarray(value, x.dtype))
