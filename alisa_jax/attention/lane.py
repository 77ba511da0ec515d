"""A lane: prompts on their way through one layer, read densely, whole or in chunks.

    lane = begin(spec, dims, room=T)          nothing has been read
    out, lane = extend(lane, q, k, v, n)      n more tokens of each prompt
    state = finish(lane, state)               the prompts are read: the policy's set, encoded

A lane keeps the keys and values of what was read, as projected or rotated, and what the policy's
hook after a prompt (`Policy.seed`) wants to see: for sums of attention the sums so far, for rows of
attention the queries that will have paid them. Prompts are read densely and cut at their end,
decoding attends the policy's set; the two are one for dense attention alone.

`prefill` is an empty lane, one `extend` and `finish`. A lane of room 0 takes the arrays of its one
chunk as they are, so this copies nothing.
"""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp

from alisa_jax.attention import compute
from alisa_jax.kv.state import LayerSpec, LayerState, Store, WorkingSet, bias_of
from alisa_jax.ops.rope import Rotation, rotate
from alisa_jax.ops.writes import put
from alisa_jax.policies.base import Dims, column, positions


@flax.struct.dataclass
class Lane:
    """B prompts in one layer, from position 0 on."""

    k: jax.Array  # [B, T, K, H], as projected where the layer has a `rotation`; else rotated
    v: jax.Array  # [B, T, K, H]
    length: jax.Array  # [B] int32, tokens read
    mass: jax.Array | None  # [B, P, T] float32: attention that each token got, `seed_kind` "sum"
    # `seed_kind` "rows": the last queries, rotated, and the log of the sum of their weights
    queries: jax.Array | None  # [B, W, N, H]
    lse: jax.Array | None  # [B, W, N] float32
    first: jax.Array | None  # [B] int32, position of the first query, below 0 for none; None: 0
    spec: LayerSpec = flax.struct.field(pytree_node=False)
    heads: int = flax.struct.field(pytree_node=False)  # N


def begin(spec: LayerSpec, dims: Dims, dtype, room: int = 0) -> Lane:
    """A lane that has read nothing of `dims.B` prompts of up to `room` tokens.

    dims: of the state that `finish` fills, with H. room: 0 for prompts that one `extend` brings.
    """
    B, N, K, S, _, H = dims
    policy = spec.policy
    kv = jnp.zeros((B, room, K, H), dtype)
    kind = policy.seed_kind if room else "none"
    W = policy.seed_rows(S) if kind == "rows" else 0
    P = policy.mass_heads(N, K)
    return Lane(
        k=kv,
        v=jnp.zeros_like(kv),
        length=jnp.zeros((B,), jnp.int32),
        mass=jnp.zeros((B, P, room), jnp.float32) if kind == "sum" else None,
        queries=jnp.zeros((B, W, N, H), dtype) if kind == "rows" else None,
        lse=jnp.zeros((B, W, N), jnp.float32) if kind == "rows" else None,
        first=jnp.full((B,), -W, jnp.int32) if kind == "rows" else None,
        spec=spec,
        heads=N,
    )


def extend(lane: Lane, q, k, v, n) -> tuple[jax.Array, Lane]:
    """Read `n` [B] more tokens of each prompt: out [B, C, N, H] and the lane.

    q [B, C, N, H], k and v [B, C, K, H] of the positions lane.length .. lane.length + C - 1; what
    lies from `n` on is padding, whose rows of out are garbage. All of `n` must find room.
    """
    spec = lane.spec
    policy = spec.policy
    whole = lane.k.shape[1] == 0
    first = None if whole else lane.length
    N, K = q.shape[2], k.shape[2]
    lane = lane.replace(
        k=k if whole else written(lane.k, k, lane.length, n),
        v=v if whole else written(lane.v, v, lane.length, n),
        length=lane.length + n,
    )
    seen_q = turned_prompt(q, spec.rotation, first)
    seen_k = turned_prompt(lane.k, spec.rotation)
    part = compute.prompt(seen_q, seen_k, lane.v, lane.length, spec.impl, first)
    if policy.seed_kind == "sum":
        heads = policy.mass_heads(N, K)
        mass = compute.mass(
            seen_q, seen_k, part.lse, lane.length, heads, "sum", None, spec.impl, first
        )
        lane = lane.replace(mass=mass if whole else lane.mass + mass)
    elif policy.seed_kind == "rows" and whole:
        lane = lane.replace(queries=seen_q, lse=part.lse)
    elif policy.seed_kind == "rows":
        lane = lane.replace(
            queries=_newest(lane.queries, seen_q, n),
            lse=_newest(lane.lse, part.lse, n),
            first=lane.length - lane.queries.shape[1],
        )
    return part.out, lane


def finish(lane: Lane, state: LayerState) -> LayerState:
    """The state after the prompts of `lane`; `state` is that of a layer that has seen no token."""
    state, rows = finish_rows(lane, state)
    return _stored(state, rows)


def finish_rows(lane: Lane, state: LayerState) -> tuple[LayerState, Store]:
    """As `finish`, but the store of the state is unchanged; also returns the rows of all tokens."""
    seen_k = turned_prompt(lane.k, state.spec.rotation)
    rows = _rows_seen(lane, seen_k, state.context)
    return _filled(state, lane.k, lane.v, seen_k, lane.length, rows, lane.heads)


def fill(state: LayerState, k, v, length, rows, heads: int) -> LayerState:
    """The state after prompts whose keys and values are given, and the attention that they got.

    state: of a layer that has seen no token. k, v [B, T, K, H] as projected or rotated, padding
    from `length` [B] on. rows: what `Policy.seed` reads, see there. heads: N.
    """
    return _stored(*fill_rows(state, k, v, length, rows, heads))


def fill_rows(state: LayerState, k, v, length, rows, heads: int) -> tuple[LayerState, Store]:
    """As `fill`, but the store of the state is unchanged; also returns the rows of all tokens."""
    return _filled(state, k, v, turned_prompt(k, state.spec.rotation), length, rows, heads)


def _stored(state: LayerState, rows: Store) -> LayerState:
    store = None if state.store is None else rows.grow(state.spec.codec, state.context)
    return state.replace(store=store)


def _filled(state: LayerState, k, v, seen_k, length, rows, heads: int) -> tuple[LayerState, Store]:
    """The hook, the codec, the sets; seen_k: k, rotated."""
    policy = state.spec.policy
    codec = state.spec.codec
    S = state.context
    B, T, K, H = k.shape
    M = S if state.ws is None else state.ws.pos.shape[-1]
    dims = Dims(B, heads, K, S, M, H)
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
        if state.spec.route == "masked" and not policy.evicts:
            pos = jnp.where(positions(S) < column(length), positions(S), -1)
            pos = jnp.broadcast_to(pos, ws.pos.shape)
        slot = jnp.where(pos >= 0, jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2), -1)
        ws = ws.freeze(codec).load(codec, store, slot, pos).replace(pos=pos, bias=bias_of(pos))
    return state.replace(ws=ws, stats=stats, length=length), store


def prefill(state: LayerState, q, k, v, length) -> tuple[jax.Array, LayerState]:
    """Dense causal attention over a batch of prompts, from an empty `state`.

    q [B, T, N, H], k and v [B, T, K, H], T <= context. Prompts start at position 0, and tokens from
    `length` [B] on are padding. Returns out [B, T, N, H] (rows of padding hold garbage) and the
    state after the prompts.
    """
    out, lane = extend(begin(state.spec, _dims(state, q, k), k.dtype), q, k, v, length)
    return out, finish(lane, state)


def prefill_rows(state: LayerState, q, k, v, length) -> tuple[jax.Array, LayerState, Store]:
    """As `prefill`, but also returns the rows, as a `Store` of T tokens.

    The store of the returned state is unchanged.
    """
    out, lane = extend(begin(state.spec, _dims(state, q, k), k.dtype), q, k, v, length)
    return out, *finish_rows(lane, state)


def _dims(state: LayerState, q, k) -> Dims:
    return Dims(q.shape[0], q.shape[2], k.shape[2], state.context, 0, q.shape[3])


def _rows_seen(lane: Lane, seen_k, S: int):
    """What `Policy.seed` reads, for each `seed_kind`; its last axis has S tokens."""
    policy = lane.spec.policy
    rows = lane.mass
    if policy.seed_kind == "rows":
        heads = policy.mass_heads(lane.heads, lane.k.shape[2])
        W = policy.seed_rows(S)
        rows = compute.mass(
            lane.queries,
            seen_k,
            lane.lse,
            lane.length,
            heads,
            "rows",
            W,
            lane.spec.impl,
            lane.first,
        )
    if rows is None:
        return None
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, S - rows.shape[-1])])


def written(x, new, first, n) -> jax.Array:
    """x [B, T, *, H] with the first `n` [B] of the rows `new` [B, C, *, H] from `first` [B] on."""
    b = jax.lax.broadcasted_iota(jnp.int32, new.shape[:2], 0)
    i = jax.lax.broadcasted_iota(jnp.int32, new.shape[:2], 1)
    at = jnp.where(i < n[:, None], first[:, None] + i, x.shape[1])
    return put(x, (b, at), new.astype(x.dtype))


def _newest(old, new, n):
    """The last W of `old` [B, W, ...] and the first `n` [B] of `new` [B, C, ...]."""
    joined = jnp.concatenate([old, new.astype(old.dtype)], axis=1)
    at = n[:, None] + jnp.arange(old.shape[1], dtype=jnp.int32)[None]
    return jnp.take_along_axis(joined, at.reshape(*at.shape, *[1] * (old.ndim - 2)), axis=1)


def turned_prompt(x, rotation: Rotation | None, first=None):
    """x [B, T, *, H] at positions first [B] .. first + T - 1, rotated if there is a `rotation`.

    first: None for 0.
    """
    if rotation is None:
        return x
    at = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :, None]
    at = at if first is None else at + first[:, None, None]
    return rotate(x, at, rotation)
