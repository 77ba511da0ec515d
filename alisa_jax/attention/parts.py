"""Layers whose tokens are not all on the device: their prompts, streamed steps and deliveries.

A batch is cut into parts of neighbouring sequences: `whole` ones keep all tokens, the others
(`away`) a ring of the newest. Only the away ones are special:

    the policy selects    the usual working set, with a `Ring` as its store; rows that the ring does
                          not hold become pending; all are brought where a query attends
                          everything (`refresh`)
    the policy is dense   a working set of C slots that is itself the ring; older rows are streamed,
                          and joined by `merge`

All functions are pure. Shapes: q [B, N, H], k and v [B, K, H], in a prompt with T behind B.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax import attention
from alisa_jax.attention import compute
from alisa_jax.kv import ring
from alisa_jax.kv.cache import Layer
from alisa_jax.kv.ring import Ring
from alisa_jax.kv.state import LayerSpec, LayerState, Store, bias_of
from alisa_jax.ops import rows
from alisa_jax.ops.rope import rotate
from alisa_jax.ops.writes import put

Leaves = tuple[jax.Array, ...]  # of K, then of V


class Part(NamedTuple):
    """Sequences first .. stop - 1 with a context of `context` tokens.

    ring_tokens: rows of the ring; 0 keeps all tokens on the device. slots: at most so many in a
    working set; 0 for as many as the policy has.
    """

    first: int
    stop: int
    context: int
    ring_tokens: int = 0
    slots: int = 0


def page_layout(spec: LayerSpec) -> str:
    """Layout of pages: "tokens" to read single rows, else "slots", as attention reads them."""
    return "tokens" if spec.policy.selects else "slots"


def init(spec: LayerSpec, part: Part, N: int, K: int, H: int) -> LayerState:
    """The state of one part of a layer that has seen no token."""
    B = part.stop - part.first
    C = part.ring_tokens
    dims = attention.dims_of(spec, B, N, K, part.context)
    dims = dims._replace(M=min(dims.M, part.slots or dims.M))
    if C and not spec.policy.selects:
        return attention.init(spec, dims._replace(M=C), H)
    state = attention.init(spec, dims, H)
    if not C:
        return state
    store = Ring.empty(spec.codec, B, C, K, H, spec.policy.selection_heads(K))
    # a ring does not hold what a refresh attends: `decode_full` does that
    return state.replace(
        store=store, spec=dataclasses.replace(spec, policy=spec.policy.without_refresh())
    )


class Streamed(NamedTuple):
    """K and V of an away part, brought for one step: T positions from `first` on."""

    leaves: Leaves  # [B, K, T, *]
    first: jax.Array  # [B] int32


def decode_streamed(
    parts: Layer, q, k, v, host, dropped, pieces: tuple[Streamed, ...]
) -> tuple[jax.Array, Layer, jax.Array]:
    """As `attention.decode`, for a dense layer whose last part is away; clipped elements [B] last.

    pieces[0], streamed, covers positions [dropped, host); further pieces, recomputed, cover
    [0, dropped); the ring covers the rest. host, dropped [B].
    """
    *whole, away = parts
    *mine, last = attention.cut(parts, q, k, v)
    outs = []
    states = []
    clipped = []
    for state, some in zip(whole, mine, strict=True):
        out, (state,), (taps,) = attention.decode((state,), *some)
        outs.append(out)
        states.append(state)
        clipped.append(taps.clipped)
    q, k, v = last
    spec = away.spec
    codec = spec.codec
    length = away.length
    ws = away.ws
    turn = functools.partial(attention.turn_of, spec.policy, spec.rotation, length=length)
    if spec.rotation is not None:
        q = rotate(q, spec.policy.place(length)[:, None], spec.rotation)
    heads = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    slot = jnp.mod(length, ws.pos.shape[-1])[:, None]
    clipped.append(codec.clipped(ws.k, k) + codec.clipped(ws.v, v))
    codes = codec.encode_token(ws.k, k), codec.encode_token(ws.v, v)
    ws = ws.replace(pos=jnp.where(ws.pos < host[:, None, None], -1, ws.pos))
    ws = ws.put(codec, *codes, slot, length)
    ws = ws.replace(bias=bias_of(ws.pos))
    joined, _ = compute.slots(codec, heads, ws.k, ws.v, ws.bias, spec.impl, turn(ws.pos))
    for i, piece in enumerate(pieces):
        k_leaves, v_leaves = halves(piece.leaves)
        at = piece.first[:, None] + jnp.arange(k_leaves[0].shape[2], dtype=jnp.int32)[None]
        low, high = (dropped, host) if i == 0 else (jnp.zeros_like(dropped), dropped)
        seen = (at >= low[:, None]) & (at < high[:, None])
        bias = jnp.where(seen, jnp.float32(0.0), -jnp.inf)[:, None]
        at = at[:, None]
        rows_k = codec.seated(codec.rebuild(ws.k, k_leaves), ws.k, at)
        rows_v = codec.seated(codec.rebuild(ws.v, v_leaves), ws.v, at)
        piece, _ = compute.slots(codec, heads, rows_k, rows_v, bias, spec.impl, turn(at))
        joined = compute.merge(joined, piece)
    outs.append(joined.out.reshape(q.shape).astype(q.dtype))
    parts = *states, away.replace(ws=ws, length=length + 1)
    return jnp.concatenate(outs), parts, jnp.concatenate(clipped)


def unrolled(state: LayerState) -> Leaves:
    """The rows of an away part's ring at their positions, zeros elsewhere: leaves [B, S, K, *]."""
    codec = state.spec.codec
    home = state.store
    pos = ring.newest(state.length, home.host, home.rows(codec))
    b = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 0)
    at = jnp.where(pos >= 0, pos, state.context)
    found = []
    for leaf in (*codec.leaves(home.k), *codec.leaves(home.v)):
        zeros = jnp.zeros((len(leaf), state.context, *leaf.shape[2:]), leaf.dtype)
        found.append(put(zeros, (b, at), leaf))
    return tuple(found)


def spread(full: Leaves, leaves: Leaves, sequence, pos) -> Leaves:
    """`full` [B, S, K, *] with rows `leaves` [R, K, *] of tokens `pos` [R] of `sequence` [R].

    sequence: -1 for none.
    """
    return tuple(put(x, (sequence, pos), new) for x, new in zip(full, leaves, strict=True))


def decode_full(
    spec: LayerSpec, parts: Layer, q, k, v, full: Leaves
) -> tuple[jax.Array, Layer, tuple]:
    """As `attention.decode`, for a layer of `spec` whose last part, away, has its rows in `full`.

    Sequences that do not refresh need no rows there: they attend their working sets.
    """
    *whole, away = parts
    codec = spec.codec
    ring_ = away.store
    store = Store(*(codec.rebuild(x, some) for x, some in zip((ring_.k, ring_.v), halves(full))))
    given = *whole, away.replace(store=store, spec=spec)
    out, (*whole, last), taps = attention.decode(given, q, k, v)
    *_, (_, k, v) = attention.cut(parts, q, k, v)
    codes = codec.encode_token(away.ws.k, k), codec.encode_token(away.ws.v, v)
    kept = ring_.append(codec, *codes, away.length)
    return out, (*whole, last.replace(store=kept, spec=away.spec)), taps


def prefill(
    spec: LayerSpec, layout: tuple[Part, ...], q, k, v, length, host
) -> tuple[jax.Array, Layer, Any]:
    """Read a prompt; rows below `host` [B] do not stay on the device.

    Returns out [B, T, N, H], the parts, and the rows of the last part, away or not, as a `Store` of
    T tokens.
    """
    outs = []

    def read(empty, some, t, n):
        out, state, kept = attention.prefill_rows(empty, q[some, :t], k[some, :t], v[some, :t], n)
        outs.append(jnp.pad(out, ((0, 0), (0, q.shape[1] - t), (0, 0), (0, 0))))
        return state, kept

    parts, kept = _read(spec, layout, q.shape[2], k, length, host, read)
    return jnp.concatenate(outs), parts, kept


def fill(
    spec: LayerSpec, layout: tuple[Part, ...], k, v, length, host, rows, heads: int
) -> tuple[Layer, Any]:
    """As `prefill`, of prompts whose K, V and attention are given: the parts, and the rows.

    k, v [B, T, K, H]; rows(part) gives what `Policy.seed` reads of the part's sequences; heads: N.
    """
    parts = iter(layout)

    def read(empty, some, t, n):
        return attention.fill_rows(empty, k[some, :t], v[some, :t], n, rows(next(parts)), heads)

    return _read(spec, layout, heads, k, length, host, read)


def _read(spec: LayerSpec, layout, N: int, k, length, host, read) -> tuple[Layer, Any]:
    """The parts, each as `read(empty, sequences, tokens, length)` fills it, and the last's rows."""
    _, T, K, H = k.shape
    parts = []
    kept = None
    for part in layout:
        some = slice(part.first, part.stop)
        n = length[some]
        state, kept = read(init(spec, part, N, K, H), some, min(T, part.context), n)
        if part.ring_tokens:
            state = _ringed(state, kept, n, host[some], part.ring_tokens)
        elif state.store is not None:
            state = state.replace(store=kept.grow(spec.codec, part.context))
        parts.append(state)
    return tuple(parts), kept


def _ringed(state: LayerState, kept, length, host, C: int) -> LayerState:
    codec = state.spec.codec
    layout = page_layout(state.spec)
    pos = ring.newest(length, host, C)
    k_leaves = ring.fill(codec, kept.k, pos, layout)
    v_leaves = ring.fill(codec, kept.v, pos, layout)
    if state.spec.policy.selects:
        k = codec.rebuild(kept.k, k_leaves)
        v = codec.rebuild(kept.v, v_leaves)
        return state.replace(store=state.store.replace(k=k, v=v, host=host).delivered())
    ws = state.ws
    pos = pos[:, None]
    k = codec.seated(codec.rebuild(ws.k, k_leaves), kept.k, pos)
    v = codec.seated(codec.rebuild(ws.v, v_leaves), kept.v, pos)
    return state.replace(ws=ws.replace(k=k, v=v, pos=pos, bias=bias_of(pos)))


def prompt_page(
    spec: LayerSpec, kept, sequences: tuple[int, ...], page: int, page_tokens: int
) -> Leaves:
    """One page of the rows that `prefill` returned, for some sequences of the part."""
    found = []
    for leaf in (*spec.codec.leaves(kept.k), *spec.codec.leaves(kept.v)):
        some = leaf[:, page * page_tokens : (page + 1) * page_tokens]
        some = some if len(sequences) == len(leaf) else some[jnp.asarray(sequences)]
        found.append(jnp.swapaxes(some, 1, 2) if page_layout(spec) == "slots" else some)
    return tuple(found)


def ring_page(state: LayerState, sequences: jax.Array, page: jax.Array, page_tokens: int) -> Leaves:
    """One page from the ring of an away part, for `sequences` [n]."""
    home, axis = (state.store, 1) if state.spec.policy.selects else (state.ws, 2)
    leaves = (*state.spec.codec.leaves(home.k), *state.spec.codec.leaves(home.v))
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
    ws = state.ws
    codec = state.spec.codec
    P = ws.pos.shape[1]
    b = jnp.clip(sequence, 0, ws.pos.shape[0] - 1)[:, None]
    heads = jnp.arange(P, dtype=jnp.int32)[None]
    held = ws.pos[b, heads, jnp.clip(slot, 0, ws.pos.shape[2] - 1)]
    slot = jnp.where((held == pos[:, None]) & (sequence >= 0)[:, None], slot, -1)
    k_leaves, v_leaves = halves(leaves)
    k = ring.put(codec, ws.k, k_leaves, sequence, slot)
    v = ring.put(codec, ws.v, v_leaves, sequence, slot)
    k = codec.seated(k, state.store.k, ws.pos)
    v = codec.seated(v, state.store.v, ws.pos)
    store = state.store.delivered() if clear else state.store
    return state.replace(ws=ws.replace(k=k, v=v), store=store)


def encoded(state: LayerState, k, v, sequences, pos) -> Leaves:
    """Encode recomputed tokens: leaves [n * E, K, *].

    k, v [n, T, K, H] of `sequences` [n]; pos [n, E]: the positions to encode.
    """
    b = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    found = []
    for x, packed in ((k, state.ws.k), (v, state.ws.v)):
        some = jax.tree.map(lambda leaf: leaf[sequences], packed)
        leaves = state.spec.codec.encode(some, x[b, jnp.maximum(pos, 0)], "tokens")
        found += [leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves]
    return tuple(found)


def resume(state: LayerState) -> LayerState:
    """Continue an exchange that stopped, once its pending rows are delivered."""
    ((state,),), _ = attention.exchange_sets([(state,)], [state.ws.bias])
    return state


def halves(leaves: Leaves) -> tuple[Leaves, Leaves]:
    """The leaves of K and those of V."""
    half = len(leaves) // 2
    return tuple(leaves[:half]), tuple(leaves[half:])
