"""Where policy, codec and state meet: attention of new tokens over what is stored.

One decode step of one layer, on each of the three routes that give equal results:

    working_set   append -> attend the working set -> observe -> exchange (the set for the next step)
    indexed       append -> select -> read those rows of the store -> attend -> observe
    masked        append -> attend every token under the boolean mask of `select` -> observe: the reference

A prompt is attended densely (`prefill`); the policy is seeded from its last rows. `score_masked` runs a whole text in one
pass as if it were decoded token by token, row i under the selection that its own earlier rows lead to.

Shapes: q [B, N, H] or [B, T, N, H], unscaled; query head i reads kv head i // G, G = N / K. Logits, softmax statistics and
attention mass are float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax import attend
from alisa_jax.attend import Partial
from alisa_jax.kv.ring import Due, Ring
from alisa_jax.kv.state import LayerState, Store, WorkingSet, bias_of
from alisa_jax.policies.base import Dims, Policy, column, positions, settle

ROUTES = ("working_set", "indexed", "masked")


class Taps(NamedTuple):
    """What a decode step looked at, for analysis; unused leaves cost nothing under jit."""

    mass: jax.Array  # [B, P, M] float32: attention paid to each slot, summed over the heads that share it
    pos: jax.Array  # [B, P, M] int32: the token in each slot, -1 where none was attended
    attended: jax.Array  # [B] float32: attended tokens, itself included, mean over selection heads
    loads: jax.Array  # [B] int32: rows copied from the store for the next step
    clipped: jax.Array  # [B] int32: elements of the new K and V that the codec had to clip


def check(policy: Policy, codec, route: str, context: int, n_heads: int, n_kv_heads: int) -> None:
    """Refuse in one sentence what cannot run together, before anything is loaded. Raises ValueError."""
    del codec  # every codec serves every policy and route
    if route not in ROUTES:
        raise ValueError(f"route must be auto or one of {', '.join(ROUTES)}; got {route!r}")
    if route not in policy.routes:
        raise ValueError(f"{policy} runs on {', '.join(policy.routes)}; got route {route!r}")
    if n_heads % n_kv_heads:
        raise ValueError(f"query heads must be a multiple of kv heads; got {n_heads} and {n_kv_heads}")
    policy.validate(context)


def dims_of(policy: Policy, route: str, B: int, N: int, K: int, S: int) -> Dims:
    """Sizes of the state of one layer for a context bucket of S tokens."""
    return Dims(B, N, K, S, policy.capacity(S) if route == "working_set" else S)


def init(policy: Policy, codec, route: str, dims: Dims, H: int, impl: str = "xla") -> LayerState:
    """The state of a layer that has seen nothing; impl: what attends, see `attend`."""
    B, _, K, S, M = dims
    P = policy.selection_heads(K)
    ws = None if route == "indexed" else WorkingSet.empty(codec, B, K, M, H, P)
    keeps_store = route == "indexed" or (route == "working_set" and not policy.evicts)
    store = Store.empty(codec, B, S, K, H) if keeps_store else None
    length = jnp.zeros((B,), jnp.int32)
    return LayerState(ws, store, policy.init(dims), length, policy, codec, route, S, impl)


def grow(state: LayerState, S: int) -> LayerState:
    """The same state with room for S tokens."""
    M = state.policy.capacity(S) if state.route == "working_set" else S
    return state.replace(
        ws=None if state.ws is None else state.ws.grow(state.codec, M),
        store=None if state.store is None else state.store.grow(state.codec, S),
        stats=state.policy.grow(state.stats, S, M),
        context=S,
    )


def freeze(state: LayerState) -> LayerState:
    """The same state with all tokens encoded, for a codec that has now seen the `frozen_after` tokens it waits for."""
    ws, store = (None if home is None else home.freeze(state.codec) for home in (state.ws, state.store))
    return state.replace(ws=ws, store=store)


def decode(state: LayerState, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerState, Taps]:
    """One new token per sequence: q [B, N, H], k and v [B, K, H]. Returns out [B, N, H] in q's dtype."""
    step = {"working_set": _decode_working_set, "indexed": _decode_indexed, "masked": _decode_masked}[state.route]
    q_heads = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # [B, K, G, H]
    home, codec = state.store if state.ws is None else state.ws, state.codec
    clipped = codec.clipped(home.k, k) + codec.clipped(home.v, v)
    part, state, taps = step(state, q_heads, k, v)
    taps = taps._replace(clipped=clipped)
    return part.out.reshape(q.shape).astype(q.dtype), state.replace(length=state.length + 1), taps


def _taps(mass, pos, bias) -> Taps:
    active = bias > -jnp.inf
    attended = jnp.mean(jnp.sum(active, axis=-1, dtype=jnp.float32), axis=-1)
    zero = jnp.zeros(pos.shape[:1], jnp.int32)
    return Taps(mass, jnp.where(active, pos, -1), attended, zero, zero)


def _decode_working_set(state: LayerState, q, k, v):
    policy, codec, S, length = state.policy, state.codec, state.context, state.length
    store = None if state.store is None else state.store.append(codec, k, v, length)
    ws, slot = state.ws.append(codec, k, v, length)
    due = getattr(store, "due", None)
    bias = ws.bias if due is None else due.hide(ws.bias)
    part, mass = attend.slots(codec, q, ws.k, ws.v, bias, state.impl)
    taps, dense = _taps(mass, ws.pos, bias), None
    which = policy.refresh(length)
    if which is not None:
        part, row = _refreshed(store, codec, q, length, which, part, ws.pos.shape[1], S, state.impl)
        dense = (which, row)
        taps = taps._replace(attended=jnp.where(which, (length + 1).astype(jnp.float32), taps.attended))
    stats = policy.observe(state.stats, mass, ws.pos, slot, length, dense)
    stats, ws, store, loads = exchange(policy, codec, store, stats, ws, length + 1, S, after=part.out)
    return part, state.replace(ws=ws, store=store, stats=stats), taps._replace(loads=loads)


def exchange(policy, codec, store, stats, ws: WorkingSet, length, S, after):
    """Let the policy change the working set and copy in the rows it asks for, until it asks for no more.

    Returns statistics, working set, store and loads [B]. Rows that a `Ring` does not hold become due there; where it can
    note no more of them the exchange breaks off, to be called again.

    The loop overwrites slots, so it must come after the last read of them. XLA copies the values whole unless it can prove
    that; the loop's first condition therefore reads the attention output `after` (true unless all of it is NaN).
    """
    ring = isinstance(store, Ring)

    def once(stats, ws, due, loads, _):
        stats, ex = policy.exchange(stats, ws.pos, ws.bias, length, S)
        ws, more = ws.replace(pos=ex.pos, bias=ex.bias), ex.more
        if E := ex.load_pos.shape[-1]:
            slot = ex.load_slot
            if ring:
                absent = (ex.load_pos >= 0) & (ex.load_pos < column(store.host))
                due = due.note(slot, ex.load_pos, absent)
                due = due.replace(more=more & ~due.room(E))
                slot, more = jnp.where(absent, -1, slot), more & ~due.more
            ws = ws.load(codec, store, slot, ex.load_pos)
            loads = loads + jnp.sum(ex.load_pos >= 0, axis=(1, 2), dtype=jnp.int32)
        return stats, ws, due, loads, more

    due = Due.empty(*ws.pos.shape[:2]) if ring else ()
    start = (stats, ws, due, jnp.zeros(length.shape, jnp.int32), jnp.any(after == after))
    if policy.evicts:
        stats, ws, _, loads, _ = once(*start)
        return stats, ws, store, loads
    stats, ws, due, loads, _ = jax.lax.while_loop(lambda c: c[4], lambda c: once(*c), start)
    return stats, ws, store.replace(due=due) if ring else store, loads


def _refreshed(store: Store, codec, q, length, which, part: Partial, P: int, S: int, impl: str):
    """Replace `part` by dense attention over the store where `which` [B]; also the dense row [B, P, S]."""

    def dense(part):
        seen = positions(S) <= column(length)
        bias = jnp.broadcast_to(jnp.where(seen, jnp.float32(0.0), -jnp.inf), (q.shape[0], P, S))
        full, row = attend.store(codec, q, store.k, store.v, bias, impl)
        chosen = jax.tree.map(lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), full, part)
        return chosen, row

    def skip(part):
        return part, jnp.zeros((q.shape[0], P, S), jnp.float32)

    return jax.lax.cond(jnp.any(which), dense, skip, part)


def _decode_indexed(state: LayerState, q, k, v):
    policy, codec, S, length = state.policy, state.codec, state.context, state.length
    store = state.store.append(codec, k, v, length)
    keep = _kept(policy, state.stats, length, S, q)
    M = S if policy.refresh(length) is not None else min(S, policy.capacity(S))
    pos = settle(keep, M)
    part, mass = attend.rows(codec, q, store.k, store.v, pos, bias_of(pos), state.impl)
    at = jnp.where(pos >= 0, pos, S)
    b, p = (jax.lax.broadcasted_iota(jnp.int32, at.shape, i) for i in (0, 1))
    row = jnp.zeros(keep.shape, jnp.float32).at[b, p, at].set(mass, mode="drop")
    seen = jnp.where(positions(S) <= column(length), positions(S), -1)
    stats = _observe_row(policy, state.stats, row, jnp.broadcast_to(seen, keep.shape), length)
    return part, state.replace(store=store, stats=stats), _taps(mass, pos, bias_of(pos))


def _decode_masked(state: LayerState, q, k, v):
    policy, codec, ws, length = state.policy, state.codec, state.ws, state.length
    slot = jnp.broadcast_to(length[:, None], ws.pos.shape[:2])
    k, v = codec.write_slot(ws.k, k, slot), codec.write_slot(ws.v, v, slot)
    part, stats, pos, taps = _masked_row(
        policy, state.stats, ws.pos, q, lambda bias: attend.slots(codec, q, k, v, bias, state.impl), length
    )
    return part, state.replace(ws=WorkingSet(k, v, pos, bias_of(pos)), stats=stats), taps


def _masked_row(policy: Policy, stats, pos, q, attend_all, length):
    """One query of the reference: slot = position, every token's K and V at hand, the selection as a mask.

    pos [B, P, S]: -1 for tokens that are still to come or that an evicting policy has dropped. `attend_all(bias)` attends
    every token under a bias.
    """
    S = pos.shape[-1]
    pos = jnp.where(positions(S) == column(length), positions(S), pos)
    keep = pos >= 0 if policy.evicts else _kept(policy, stats, length, S, q)
    bias = jnp.where(keep, jnp.float32(0.0), -jnp.inf)
    part, mass = attend_all(bias)
    stats = _observe_row(policy, stats, mass, pos, length)
    taps = _taps(mass, pos, bias)
    if policy.evicts:
        stats, ex = policy.exchange(stats, pos, bias, length + 1, S)
        pos = ex.pos
    return part, stats, pos, taps


def _observe_row(policy: Policy, stats, row, pos, length):
    """`observe` on the routes where slot = position."""
    slot = jnp.broadcast_to(length[:, None], row.shape[:2])
    return policy.observe(stats, row, pos, slot, length, (jnp.ones(length.shape, jnp.bool_), row))


def _kept(policy: Policy, stats, length, S: int, q):
    """[B, P, S] bool: what the query at `length` attends, itself included."""
    keep = policy.select(stats, length, S, q if policy.needs_query else None)
    which = policy.refresh(length)
    if which is not None:
        keep = keep | (column(which) & (positions(S) < column(length)))
    keep = keep | (positions(S) == column(length))
    return jnp.broadcast_to(keep, (length.shape[0], *keep.shape[1:]))


def prefill(state: LayerState, q, k, v, length) -> tuple[jax.Array, LayerState]:
    """Dense causal attention over a batch of prompts; `state` is empty and `length` [B] tells how much of T is prompt.

    q [B, T, N, H], k and v [B, T, K, H], T <= context; prompts are aligned at position 0 and padded behind. Returns
    out [B, T, N, H] (padding rows hold nothing of use) and the state after the prompts.
    """
    out, state, rows = prefill_rows(state, q, k, v, length)
    store = None if state.store is None else rows.grow(state.codec, state.context)
    return out, state.replace(store=store)


def prefill_rows(state: LayerState, q, k, v, length) -> tuple[jax.Array, LayerState, Store]:
    """As `prefill`, with what a store of T tokens would hold beside the state, whose own store is as it was."""
    policy, codec, S = state.policy, state.codec, state.context
    B, T, N, H = q.shape
    K = k.shape[2]
    dims = dims_of(policy, state.route, B, N, K, S)
    P, W = policy.selection_heads(K), policy.seed_rows(S) if policy.seed_kind == "rows" else None
    out, rows = attend.prompt(q, k, v, length, P, policy.seed_kind, W, state.impl)
    if rows is not None:
        rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, S - T)])
    stats, pos = policy.seed(state.stats, rows, length, dims)
    empty = Store.empty(codec, B, T, K, H)
    store = Store(codec.fill(empty.k, k, "tokens"), codec.fill(empty.v, v, "tokens"))
    ws = state.ws
    if ws is not None:
        if state.route == "masked" and not policy.evicts:
            pos = jnp.where(positions(S) < column(length), positions(S), -1)
            pos = jnp.broadcast_to(pos, ws.pos.shape)
        slot = jnp.where(pos >= 0, jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2), -1)
        ws = ws.freeze(codec).load(codec, store, slot, pos).replace(pos=pos, bias=bias_of(pos))
    return out, state.replace(ws=ws, stats=stats, length=length), store


def score_masked(
    policy: Policy, codec, q, k, v, look=lambda taps: taps.attended
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whole texts in one pass, row i under the mask that decoding token by token would have had.

    q [B, T, N, H], k and v [B, T, K, H]. Returns out [B, T, N, H]; what `look` takes from the taps of each row, [B, T, ...],
    here the number of attended tokens, float32; and the number of elements of K and V that the codec clipped [B, T] int32.
    """
    B, T, N, H = q.shape
    K, raw_tokens = k.shape[2], codec.frozen_after
    P = policy.selection_heads(K)
    stats = policy.init(dims_of(policy, "masked", B, N, K, T))
    raw = [jnp.swapaxes(x, 1, 2) for x in (k, v)]  # [B, K, T, H]
    packed = [codec.fill(codec.empty(x.shape, "slots", part), x, "slots") for x, part in zip(raw, "kv", strict=True)]
    held = [x.astype(codec.raw.dtype) for x in raw] if raw_tokens else None  # what the first rows attend
    by_step = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 0)

    def row(carry, item):
        stats, pos = carry
        q_row, n = item

        def attend_all(bias):
            coded = functools.partial(attend.slots, codec, q_row, *packed, bias)
            if not raw_tokens:
                return coded()
            return jax.lax.cond(n < raw_tokens, lambda: attend.slots(codec.raw, q_row, *held, bias), coded)

        length = jnp.full((B,), n, jnp.int32)
        part, stats, pos, taps = _masked_row(policy, stats, pos, q_row, attend_all, length)
        return (stats, pos), (part.out.reshape(B, N, H).astype(q.dtype), look(taps))

    start = (stats, jnp.full((B, P, T), -1, jnp.int32))
    _, (out, seen) = jax.lax.scan(row, start, (by_step, jnp.arange(T, dtype=jnp.int32)))
    late = (jnp.arange(T) >= raw_tokens)[None].astype(jnp.int32)
    clipped = late * sum(codec.clipped(home, x) for home, x in zip(packed, raw, strict=True))
    return jnp.moveaxis(out, 0, 1), jnp.moveaxis(seen, 0, 1), clipped
