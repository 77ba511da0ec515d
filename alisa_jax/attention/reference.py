"""A whole text in one pass, row i under the selection that its own earlier rows lead to.

This is the reference for decoding, and the protocol `prefill_mask`: all keys and values are at
hand, stored as the codec stores them, and each row of attention is masked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alisa_jax import attention
from alisa_jax.attention import compute
from alisa_jax.kv.state import LayerSpec
from alisa_jax.ops.rope import rotate
from alisa_jax.policies.base import Dims, column, positions


def attended(taps) -> jax.Array:
    """[B] float32: the number of tokens that a row attended."""
    return taps.attended


def score(spec: LayerSpec, q, k, v, look=attended) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whole texts in one pass, row i under the mask that decoding token by token would have had.

    q [B, T, N, H], k and v [B, T, K, H]. Returns

        out [B, T, N, H]
        `look(taps)` of each row, [B, T, ...]; by default the number of attended tokens, float32
        the number of elements of K and V that the codec clipped, [B, T] int32

    If every row attends all tokens as they are, rows are independent and computed together.
    """
    policy = spec.policy
    codec = spec.codec
    rotation = spec.rotation
    B, T, N, H = q.shape
    K, raw_tokens = k.shape[2], codec.frozen_after
    P = policy.selection_heads(K)
    heads = policy.mass_heads(N, K)
    stats = policy.init(Dims(B, N, K, T, T, H))
    if policy.takes_keys:
        stats = policy.note(stats, attention.turned_prompt(k, rotation), jnp.zeros((B,), jnp.int32))
    raw = [jnp.swapaxes(x, 1, 2) for x in (k, v)]  # [B, K, T, H]
    packed = [
        codec.fill(codec.empty(x.shape, "slots", side), x, "slots")
        for x, side in zip(raw, "kv", strict=True)
    ]
    contents = [codec.content(x) for x in packed]
    plain = all(content is not None and content.axis is None for content in contents)
    if plain and look is attended and not policy.selects and rotation is None:
        keys = jnp.swapaxes(contents[0].codes, 1, 2)
        values = jnp.swapaxes(contents[1].codes, 1, 2)
        seen = jnp.broadcast_to(jnp.arange(1, T + 1, dtype=jnp.float32)[None], (B, T))
        out = compute.causal(q, keys, values, jnp.full((B,), T, jnp.int32))
        return out, seen, jnp.zeros((B, T), jnp.int32)
    # the first rows attend raw tokens
    held = [x.astype(codec.raw.dtype) for x in raw] if raw_tokens else None
    by_step = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 0)

    def row(carry, item):
        stats, pos, bias = carry
        q_row, n = item
        length = jnp.full((B,), n, jnp.int32)
        if rotation is not None:
            q_row = rotate(q_row, policy.place(length)[:, None, None], rotation)
        own = positions(T) == column(length)
        pos = jnp.where(own, positions(T), pos)
        bias = jnp.where(own, jnp.float32(0.0), bias)
        now = [
            codec.upto(home, x, length + 1, "slots") for home, x in zip(packed, raw, strict=True)
        ]

        def attend_all(bias):
            turn = attention.turn_of(policy, rotation, pos, length)

            def over(codec, packed):
                return compute.slots(codec, q_row, *packed, bias, turn=turn, heads=heads)

            if not raw_tokens:
                return over(codec, now)
            return jax.lax.cond(
                n < raw_tokens, lambda: over(codec.raw, held), lambda: over(codec, now)
            )

        piece, stats, taps = attention.masked_row(
            policy, stats, pos, bias, q_row, attend_all, length
        )
        if policy.evicts:
            stats, ex = policy.exchange(stats, pos, bias, length + 1, T)
            pos, bias = ex.pos, ex.bias
        return (stats, pos, bias), (piece.out.reshape(B, N, H).astype(q.dtype), look(taps))

    start = (stats, jnp.full((B, P, T), -1, jnp.int32), jnp.full((B, P, T), -jnp.inf, jnp.float32))
    _, (out, seen) = jax.lax.scan(row, start, (by_step, jnp.arange(T, dtype=jnp.int32)))
    late = (jnp.arange(T) >= raw_tokens)[None].astype(jnp.int32)
    clipped = late * sum(codec.clipped(home, x) for home, x in zip(packed, raw, strict=True))
    return jnp.moveaxis(out, 0, 1), jnp.moveaxis(seen, 0, 1), clipped
