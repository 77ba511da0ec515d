"""Layers whose tokens are not all on the device: their decode steps, prompts and deliveries.

A batch is cut into parts of neighbouring sequences: `whole` ones keep all tokens, the others
(`away`) a ring of the newest. A layer is then a tuple of `LayerState`s, one per part. Only the away
ones are special:

    the policy selects    the usual working set, with a `Ring` as its store; rows that the ring does
                          not hold become pending
    the policy is dense   a working set of C slots that is itself the ring; older rows are streamed,
                          and joined by `merge`

All functions are pure. Shapes: q [B, N, H], k and v [B, K, H], in a prompt with T behind B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax import attention
from alisa_jax.attention import compute, exchange
from alisa_jax.kv import ring, rows
from alisa_jax.kv.pending import Pending
from alisa_jax.kv.ring import Ring
from alisa_jax.kv.state import LayerState, bias_of

Parts = tuple[LayerState, ...]
Leaves = tuple[jax.Array, ...]  # of K, then of V


class Part(NamedTuple):
    """Sequences first .. stop - 1 with a context of `context` tokens.

    ring_tokens: rows of the ring; 0 keeps all tokens on the device.
    """

    first: int
    stop: int
    context: int
    ring_tokens: int = 0


class Kind(NamedTuple):
    """How one layer keeps its past (also `engine.step.Layer`)."""

    policy: Any
    codec: Any
    route: str
    impl: str = "xla"  # see `compute`
    turning: Any = None  # see `layer`

    @property
    def layout(self) -> str:
        """Layout of pages: "tokens" to read single rows, else "slots", as attention reads them."""
        return "tokens" if self.policy.selects else "slots"


def init(kind: Kind, part: Part, N: int, K: int, H: int) -> LayerState:
    """The state of one part of a layer that has seen no token."""
    policy, codec, route, impl, _ = kind
    B = part.stop - part.first
    S = part.context
    C = part.ring_tokens
    dims = attention.dims_of(policy, route, B, N, K, S)
    if C and not policy.selects:
        return attention.init(policy, codec, route, dims._replace(M=C), H, impl)
    state = attention.init(policy, codec, route, dims, H, impl)
    if not C:
        return state
    return state.replace(store=Ring.empty(codec, B, C, K, H, policy.selection_heads(K)))


def decode(parts: Parts, q, k, v) -> tuple[jax.Array, Parts, tuple]:
    """One new token per sequence, with everything that it attends on the device.

    Returns out [B, N, H], the parts, and the taps of each part.
    """
    done = [
        attention.decode(state, *mine)
        for state, mine in zip(parts, _cut(parts, q, k, v), strict=True)
    ]
    return (
        jnp.concatenate([d[0] for d in done]),
        tuple(d[1] for d in done),
        tuple(d[2] for d in done),
    )


class Streamed(NamedTuple):
    """K and V of an away part, brought for one step: T positions from `first` on."""

    leaves: Leaves  # [B, K, T, *]
    first: jax.Array  # [B] int32


def decode_streamed(
    parts: Parts, q, k, v, host, dropped, pieces: tuple[Streamed, ...]
) -> tuple[jax.Array, Parts]:
    """As `decode`, for a dense layer whose last part is away.

    pieces[0], streamed, covers positions [dropped, host); further pieces, recomputed, cover
    [0, dropped); the ring covers the rest. host, dropped [B].
    """
    *whole, away = parts
    *mine, last = _cut(parts, q, k, v)
    outs, states = [], []
    for state, some in zip(whole, mine, strict=True):
        out, state, _ = attention.decode(state, *some)
        outs, states = [*outs, out], [*states, state]
    q, k, v = last
    codec, ws = away.codec, away.ws
    heads = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    pos = jnp.where(ws.pos < host[:, None, None], -1, ws.pos)
    slot = jnp.mod(away.length, pos.shape[-1])[:, None]
    here = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2) == slot[:, :, None]
    pos = jnp.where(here, away.length[:, None, None], pos)
    k, v = codec.write_slot(ws.k, k, slot), codec.write_slot(ws.v, v, slot)
    ws = ws.replace(k=k, v=v, pos=pos, bias=bias_of(pos))
    joined, _ = compute.slots(codec, heads, ws.k, ws.v, ws.bias, away.impl)
    for i, piece in enumerate(pieces):
        k_leaves, v_leaves = halves(piece.leaves)
        at = piece.first[:, None] + jnp.arange(k_leaves[0].shape[2], dtype=jnp.int32)[None]
        low, high = (dropped, host) if i == 0 else (jnp.zeros_like(dropped), dropped)
        seen = (at >= low[:, None]) & (at < high[:, None])
        bias = jnp.where(seen, jnp.float32(0.0), -jnp.inf)[:, None]
        rows_k, rows_v = codec.rebuild(ws.k, k_leaves), codec.rebuild(ws.v, v_leaves)
        piece, _ = compute.slots(codec, heads, rows_k, rows_v, bias, away.impl)
        joined = compute.merge(joined, piece)
    outs.append(joined.out.reshape(q.shape).astype(q.dtype))
    return jnp.concatenate(outs), (*states, away.replace(ws=ws, length=away.length + 1))


def prefill(
    kind: Kind, layout: tuple[Part, ...], q, k, v, length, host
) -> tuple[jax.Array, Parts, Any]:
    """Read a prompt; rows below `host` [B] do not stay on the device.

    Returns out [B, T, N, H], the parts, and the rows of the last part, away or not, as a `Store` of
    T tokens.
    """
    outs = []
    parts = []
    kept = None
    _, T, N, H = q.shape
    K = k.shape[2]
    for part in layout:
        some, t = slice(part.first, part.stop), min(T, part.context)
        n = length[some]
        empty = init(kind, part, N, K, H)
        out, state, kept = attention.prefill_rows(empty, q[some, :t], k[some, :t], v[some, :t], n)
        if part.ring_tokens:
            state = _ringed(kind, state, kept, n, host[some], part.ring_tokens)
        elif state.store is not None:
            state = state.replace(store=kept.grow(kind.codec, part.context))
        outs.append(jnp.pad(out, ((0, 0), (0, T - t), (0, 0), (0, 0))))
        parts.append(state)
    return jnp.concatenate(outs), tuple(parts), kept


def _ringed(kind: Kind, state: LayerState, kept, length, host, C: int) -> LayerState:
    codec = kind.codec
    pos = ring.newest(length, host, C)
    k_leaves = ring.fill(codec, kept.k, pos, kind.layout)
    v_leaves = ring.fill(codec, kept.v, pos, kind.layout)
    if kind.policy.selects:
        k = codec.rebuild(kept.k, k_leaves)
        v = codec.rebuild(kept.v, v_leaves)
        pending = Pending.empty(*state.store.pending.pos.shape[:2])
        return state.replace(store=Ring(k, v, host, pending))
    ws = state.ws
    pos = pos[:, None]
    k = codec.rebuild(ws.k, k_leaves)
    v = codec.rebuild(ws.v, v_leaves)
    return state.replace(ws=ws.replace(k=k, v=v, pos=pos, bias=bias_of(pos)))


def prompt_page(
    kind: Kind, kept, sequences: tuple[int, ...], page: int, page_tokens: int
) -> Leaves:
    """One page of the rows that `prefill` returned, for some sequences of the part."""
    found = []
    for leaf in (*kind.codec.leaves(kept.k), *kind.codec.leaves(kept.v)):
        some = leaf[:, page * page_tokens : (page + 1) * page_tokens]
        some = some if len(sequences) == len(leaf) else some[jnp.asarray(sequences)]
        found.append(jnp.swapaxes(some, 1, 2) if kind.layout == "slots" else some)
    return tuple(found)


def ring_page(state: LayerState, sequences: jax.Array, page: jax.Array, page_tokens: int) -> Leaves:
    """One page from the ring of an away part, for `sequences` [n]."""
    home, axis = (state.store, 1) if state.policy.selects else (state.ws, 2)
    leaves = (*state.codec.leaves(home.k), *state.codec.leaves(home.v))
    start = jnp.mod(page * page_tokens, leaves[0].shape[axis])
    return tuple(rows.slice_rows(leaf, sequences, start, page_tokens, axis) for leaf in leaves)


def moved(state: LayerState, host: jax.Array) -> LayerState:
    """An away part of a selecting layer whose ring now begins at `host` [B]."""
    return state.replace(store=state.store.replace(host=host))


def deliver(state: LayerState, leaves: Leaves, sequence, pos, slot, clear: bool) -> LayerState:
    """Write rows `leaves` [R, K, *] of tokens `pos` [R] into slots [R, P] of an away part.

    sequence [R]: -1 for none. A slot that no longer waits for its token stays as it is. clear:
    nothing is pending any more.
    """
    ws, P = state.ws, state.ws.pos.shape[1]
    b = jnp.clip(sequence, 0, ws.pos.shape[0] - 1)[:, None]
    heads = jnp.arange(P, dtype=jnp.int32)[None]
    held = ws.pos[b, heads, jnp.clip(slot, 0, ws.pos.shape[2] - 1)]
    slot = jnp.where((held == pos[:, None]) & (sequence >= 0)[:, None], slot, -1)
    k_leaves, v_leaves = halves(leaves)
    k = ring.put(state.codec, ws.k, k_leaves, sequence, slot)
    v = ring.put(state.codec, ws.v, v_leaves, sequence, slot)
    store = state.store
    if clear:
        store = store.replace(pending=Pending.empty(*store.pending.pos.shape[:2]))
    return state.replace(ws=ws.replace(k=k, v=v), store=store)


def encoded(state: LayerState, k, v, sequences, pos) -> Leaves:
    """Encode recomputed tokens: leaves [n * E, K, *].

    k, v [n, T, K, H] of `sequences` [n]; pos [n, E]: the positions to encode.
    """
    b = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    found = []
    for x, packed in ((k, state.ws.k), (v, state.ws.v)):
        some = jax.tree.map(lambda leaf: leaf[sequences], packed)
        leaves = state.codec.encode(some, x[b, jnp.maximum(pos, 0)], "tokens")
        found += [leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves]
    return tuple(found)


def resume(state: LayerState) -> LayerState:
    """Continue an exchange that stopped, once its pending rows are delivered."""
    stats, ws, store, _ = exchange.exchange_layer(
        state.policy,
        state.codec,
        state.store,
        state.stats,
        state.ws,
        state.length,
        state.context,
        state.ws.bias,
    )
    return state.replace(stats=stats, ws=ws, store=store)


def halves(leaves: Leaves) -> tuple[Leaves, Leaves]:
    """The leaves of K and those of V."""
    half = len(leaves) // 2
    return tuple(leaves[:half]), tuple(leaves[half:])


def _cut(parts: Parts, *arrays):
    first = 0
    for state in parts:
        stop = first + state.length.shape[0]
        yield tuple(x[first:stop] for x in arrays)
        first = stop
