"""Prefill: dense causal attention over a batch of prompts, and the layer state that they leave."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alisa_jax.attention import compute
from alisa_jax.kv.state import LayerState, WorkingSet, bias_of
from alisa_jax.kv.store import Store
from alisa_jax.ops.rope import Rotation, turned
from alisa_jax.policies.base import Dims, column, positions


def prefill(state: LayerState, q, k, v, length) -> tuple[jax.Array, LayerState]:
    """Dense causal attention over a batch of prompts, from an empty `state`.

    q [B, T, N, H], k and v [B, T, K, H], T <= context. Prompts start at position 0, and tokens from
    `length` [B] on are padding. Returns out [B, T, N, H] (rows of padding hold garbage) and the
    state after the prompts.
    """
    out, state, rows = prefill_rows(state, q, k, v, length)
    store = None if state.store is None else rows.grow(state.codec, state.context)
    return out, state.replace(store=store)


def prefill_rows(state: LayerState, q, k, v, length) -> tuple[jax.Array, LayerState, Store]:
    """As `prefill`, but also returns the rows, as a `Store` of T tokens.

    The store of the returned state is unchanged.
    """
    policy = state.policy
    codec = state.codec
    S = state.context
    B, T, N, H = q.shape
    K = k.shape[2]
    dims = Dims(B, N, K, S, S if state.ws is None else state.ws.pos.shape[-1], H)
    W = policy.seed_rows(S) if policy.seed_kind == "rows" else None
    seen_q = turned_prompt(q, state.turning)
    seen_k = turned_prompt(k, state.turning)
    out, rows = compute.prompt(
        seen_q, seen_k, v, length, policy.mass_heads(N, K), policy.seed_kind, W, state.impl
    )
    if rows is not None:
        rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, S - T)])
    stats, pos = policy.seed(state.stats, rows, length, dims)
    if policy.takes_keys:
        stats = policy.note(stats, seen_k, jnp.zeros_like(length))

    def stored(home, x):
        return codec.upto(codec.fill(home, x, "tokens"), x, length, "tokens")

    def encoded(home, x):  # in the ranges of the prompt before it was compacted
        return codec.rebuild(home, codec.encode(home, x, "slots"))

    empty = Store.empty(codec, B, T, K, H)
    store = Store(stored(empty.k, k), stored(empty.v, v))
    ws = state.ws
    if policy.compacts:
        made = policy.compact(k, v, rows, length, dims)
        ws = WorkingSet(encoded(store.k, made.k), encoded(store.v, made.v), made.pos, made.bias)
    elif ws is not None:
        if state.route == "masked" and not policy.evicts:
            pos = jnp.where(positions(S) < column(length), positions(S), -1)
            pos = jnp.broadcast_to(pos, ws.pos.shape)
        slot = jnp.where(pos >= 0, jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2), -1)
        ws = ws.freeze(codec).load(codec, store, slot, pos).replace(pos=pos, bias=bias_of(pos))
    return out, state.replace(ws=ws, stats=stats, length=length), store


def turned_prompt(x, turning: Rotation | None):
    """x [B, T, *, H] at positions 0 .. T - 1, rotated if `turning` asks for it."""
    if turning is None:
        return x
    at = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :, None]
    return turned(x, jnp.broadcast_to(at, x.shape[:3]), turning)
