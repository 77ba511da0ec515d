"""What `flash_prefill` and `prompt_mass` share: arguments, and logits of their references.

Query row i of sequence b stands at position first[b] + i; first None: at i. In a reference, a block
of queries is gathered once (`gathered`) and meets the keys all at once, or a block of keys after
the other up to the last that a query may see (`over_keys`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.tilings import PrefillTiling, tiling_for

QUERY_BLOCK = 128
KEY_BLOCK = 256  # where blocks of keys are skipped


class Queries(NamedTuple):
    """A block of Q queries of each sequence."""

    rows: jax.Array  # [B, K, G * Q, H], in the type of the keys
    at: jax.Array  # [B, Q] positions
    real: jax.Array  # [B, Q] bool: there is such a query
    lse: jax.Array | None  # [B, K, G, Q, 1]


def gathered(q, at, length, K: int, dtype, first=None, lse=None) -> Queries:
    """The queries at positions `at` [B, Q] of q [B, C, N, H], and their rows of `lse` [B, C, N]."""
    _, C, N, H = q.shape
    B, Q = at.shape
    G = N // K
    real = (at >= 0) & (at < length[:, None])
    row = at
    if first is not None:
        row = at - first[:, None]
        real &= (row >= 0) & (row < C)
    b, row = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0), jnp.clip(row, 0, C - 1)
    rows = jnp.moveaxis(q[b, row].astype(dtype), 1, 2).reshape(B, K, G * Q, H)
    if lse is not None:
        lse = jnp.moveaxis(lse[b, row].reshape(B, Q, K, G, 1), 1, 3)
    return Queries(rows, at, real, lse)


def logits(queries: Queries, keys, key=None) -> jax.Array:
    """[B, K, G, Q, t] float32 for the keys [B, K, t, H] at positions `key` [t]; None: 0 .. t - 1.

    -inf where the key comes after the query, and where there is no such query.
    """
    B, K, T, H = keys.shape
    Q = queries.at.shape[1]
    key = jnp.arange(T, dtype=jnp.int32) if key is None else key
    z = jnp.einsum(
        "bkqh,bkth->bkqt", queries.rows, keys, preferred_element_type=jnp.float32
    ) * jnp.float32(H**-0.5)
    seen = queries.real[..., None] & (key[None, None] <= queries.at[..., None])
    return jnp.where(seen[:, None, None], z.reshape(B, K, -1, Q, T), -jnp.inf)


def over_keys(queries: Queries, T: int, visit: Callable, carry):
    """`carry = visit(carry, start, key)` for each block of keys that one of the queries may see.

    A block holds the keys start .. start + size - 1 of T, size = len(key). key [size]: their
    positions, or one behind all queries for keys that the block before has shown.
    """
    size = min(T, KEY_BLOCK)
    end = jnp.max(jnp.where(queries.real, queries.at, -1)) + 1

    def block(j, carry):
        start = jnp.minimum(j * size, T - size)
        key = start + jnp.arange(size, dtype=jnp.int32)
        return visit(carry, start, jnp.where(key >= j * size, key, T))

    return jax.lax.fori_loop(0, (end + size - 1) // size, block, carry)


def key_block(x, start, size: int):
    """Rows start .. start + size - 1 of x [B, T, K, H] as [B, K, size, H]."""
    return jnp.swapaxes(jax.lax.dynamic_slice_in_dim(x, start, size, 1), 1, 2)


def lengths(k, length) -> jax.Array:
    """[B] int32 within [0, T]."""
    B, T = k.shape[:2]
    return (
        jnp.full((B,), T, jnp.int32) if length is None else jnp.clip(length.astype(jnp.int32), 0, T)
    )


def firsts(q, k, first) -> jax.Array | None:
    """[B] int32; None where the queries are those of the whole prompts."""
    if first is None and q.shape[1] < k.shape[1]:
        return jnp.zeros((q.shape[0],), jnp.int32)
    return None if first is None else first.astype(jnp.int32)


def tiling_of(q, k, tiling: PrefillTiling | None) -> PrefillTiling:
    """`tiling`, or the table's, an eighth of its size or less in float32.

    Its products use registers: 32 queries and 32 rows of 128 channels do not fit in 255 a thread.
    """
    H = q.shape[-1]
    if tiling is not None:
        return tiling
    found = tiling_for("flash_prefill", backend.chip(), H)
    if k.dtype == jnp.float32:
        rows = min(found.rows // 2, 2048 // backend.power_of_two(H))
        return found._replace(queries=found.queries // 4, rows=rows)
    return found


def check(q, k, v, length, first) -> None:
    """Raise ValueError, naming what was given, where shapes do not go together."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q is [B, C, N, H] and k is [B, T, K, H]; got {q.shape} and {k.shape}")
    if v is not None and k.shape != v.shape:
        raise ValueError(f"k and v have one shape; got {k.shape} and {v.shape}")
    B, C, N, H = q.shape
    T, K = k.shape[1:3]
    if k.shape != (B, T, K, H) or C < 1 or T < 1 or K < 1 or N % K:
        raise ValueError(
            f"q [B, C, N, H] and k [B, T, K, H] share B and H, and K divides N; got {q.shape} "
            f"and {k.shape}"
        )
    if first is None and C > T:
        raise ValueError(f"without first there are at most T = {T} queries; got {C}")
    for name, x in (("length", length), ("first", first)):
        if x is not None and (x.shape != (B,) or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(f"{name} is [B] = {(B,)} whole numbers; got {x.dtype.name} {x.shape}")
