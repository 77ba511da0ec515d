"""Dense causal attention over prompts, in blocks of queries so that no T x T array is ever held.

Also the two summaries of a prompt's attention that policies are seeded from: the rows of the last W queries (the window
of SWA, SnapKV) and the sum over all queries (H2O). Mass is summed over the heads that share a selection: over all heads
(P = 1) or over the query heads of each kv head (P = K).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_QUERY_BLOCK = 128


def attend(q, k, v, length, P: int, want_sum: bool) -> tuple[jax.Array, jax.Array | None]:
    """q [B, T, N, H], k and v [B, T, K, H], length [B] -> out [B, T, N, H] and, if wanted, the mass [B, P, T] that the
    queries below `length` paid to each position, float32."""
    B, T, N, H = q.shape
    size = min(T, _QUERY_BLOCK)
    count = -(-T // size)
    blocks = jnp.pad(q, ((0, 0), (0, count * size - T), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(blocks.reshape(B, count, size, N, H), 1, 0)

    def block(total, item):
        q_block, i = item
        at = i * size + jnp.arange(size, dtype=jnp.int32)
        at = jnp.broadcast_to(at[None], (B, size))
        p = _weights(q_block, k, at)
        out = jnp.einsum("bkgqt,btkh->bqkgh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        if want_sum:
            real = (at < length[:, None])[:, None, :, None]
            total = total + jnp.sum(jnp.where(real, _by_selection(p, P), jnp.float32(0.0)), axis=2)
        return total, out.reshape(B, size, N, H).astype(q.dtype)

    zero = jnp.zeros((B, P, T if want_sum else 0), jnp.float32)
    total, out = jax.lax.scan(block, zero, (blocks, jnp.arange(count, dtype=jnp.int32)))
    out = jnp.moveaxis(out, 0, 1).reshape(B, count * size, N, H)[:, :T]
    return out, total if want_sum else None


def last_rows(q, k, length, P: int, W: int, S: int) -> jax.Array:
    """Attention rows [B, P, W, S] float32 of the last W queries below `length` [B]; the last row is the last query's.

    q [B, T, N, H], k [B, T, K, H], T <= S. Rows before the first query are zero.
    """
    T = q.shape[1]
    size = min(W, _QUERY_BLOCK)
    count = -(-W // size)
    at = length[:, None] - count * size + jnp.arange(count * size, dtype=jnp.int32)[None]  # [B, count * size]

    def block(_, at_block):
        index = jnp.clip(at_block, 0, T - 1)
        q_block = jnp.take_along_axis(q, index[:, :, None, None], axis=1)
        rows = _by_selection(_weights(q_block, k, index), P)
        return None, jnp.where((at_block >= 0)[:, None, :, None], rows, jnp.float32(0.0))

    _, rows = jax.lax.scan(block, None, jnp.moveaxis(at.reshape(at.shape[0], count, size), 1, 0))
    rows = jnp.moveaxis(rows, 0, 2).reshape(q.shape[0], P, count * size, T)[:, :, count * size - W :]
    return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, S - T)))


def _weights(q, k, at) -> jax.Array:
    """Causal softmax weights [B, K, G, Q, T] float32 of queries q [B, Q, N, H] at positions `at` [B, Q]."""
    B, Q, N, H = q.shape
    K = k.shape[2]
    heads = (q.astype(jnp.float32) * jnp.float32(H**-0.5)).astype(k.dtype).reshape(B, Q, K, N // K, H)
    z = jnp.einsum("bqkgh,btkh->bkgqt", heads, k, preferred_element_type=jnp.float32)
    past = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None] <= at[:, :, None]
    return jax.nn.softmax(jnp.where(past[:, None, None], z, -jnp.inf), axis=-1)


def _by_selection(p: jax.Array, P: int) -> jax.Array:
    """[B, K, G, Q, T] -> [B, P, Q, T]."""
    return jnp.sum(p, axis=(1, 2))[:, None] if P == 1 else jnp.sum(p, axis=2)
