"""Where policy, codec and state meet: attention of new tokens over what is stored.

One decode step of one layer, on each of the three routes that give equal results:

    working_set   append -> attend the working set -> observe -> exchange (the next step's set)
    indexed       append -> select -> read those rows of the store -> attend -> observe
    masked        append -> attend all tokens under the mask of `select` -> observe: the reference

A prompt is attended densely (`prefill`), and its last rows seed the policy. `reference.score` runs
a whole text in one pass.

Shapes: q [B, N, H] or [B, T, N, H], unscaled; query head i reads kv head i // G, G = N / K. Logits,
softmax statistics and attention mass are float32. Queries and keys come rotated. If `turning` is a
`Rotation`, they come as projected: keys are stored so, and both are rotated here to the places that
the policy gives them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax.attention import compute
from alisa_jax.attention.compute import Partial
from alisa_jax.attention.exchange import exchange_layer, joint
from alisa_jax.codecs.base import Turn
from alisa_jax.kv.state import LayerState, WorkingSet, bias_of
from alisa_jax.kv.store import Store
from alisa_jax.ops.rope import Rotation, turned
from alisa_jax.policies.base import Dims, Policy, column, positions, slots_of

ROUTES = ("working_set", "indexed", "masked")


class Taps(NamedTuple):
    """What a decode step attended, for analysis; unused leaves cost nothing under jit."""

    mass: jax.Array  # [B, P, M] float32: attention paid to each slot, summed over its heads
    pos: jax.Array  # [B, P, M] int32: the token in each slot, -1 where none was attended
    attended: jax.Array  # [B] float32: attended tokens, itself included, mean over selection heads
    loads: jax.Array  # [B] int32: rows copied from the store for the next step
    clipped: jax.Array  # [B] int32: elements of the new K and V that the codec clipped


def check(policy: Policy, codec, route: str, context: int, n_heads: int, n_kv_heads: int) -> None:
    """Raise ValueError, in one sentence and before any work, for parts that cannot run together."""
    if route not in ROUTES:
        raise ValueError(f"route must be auto or one of {', '.join(ROUTES)}; got {route!r}")
    if route not in policy.routes:
        raise ValueError(f"{policy} runs on {', '.join(policy.routes)}; got route {route!r}")
    if n_heads % n_kv_heads:
        raise ValueError(
            f"query heads must be a multiple of kv heads; got {n_heads} and {n_kv_heads}"
        )
    if policy.compacts and (policy.raw_keys or codec.raw_keys):
        raise ValueError(
            f"{policy} works on keys that carry their positions; {codec} keeps them as they were "
            "projected"
        )
    if (refused := codec.refuses(policy, route)) is not None:
        raise ValueError(refused)
    policy.validate(context)


def dims_of(policy: Policy, route: str, B: int, N: int, K: int, S: int, H: int = 0) -> Dims:
    """Sizes of the state of one layer for a context bucket of S tokens."""
    return Dims(B, N, K, S, policy.capacity(S) if route == "working_set" else S, H)


def prompt_dims(dims: Dims, policy: Policy, route: str, room: int) -> Dims:
    """`dims` of a state that starts with a prompt and has room for `room` further tokens."""
    if route != "working_set" or not policy.appends:
        return dims
    return dims._replace(M=min(dims.M, policy.prompt_capacity(dims.S) + room))


def init(
    policy: Policy,
    codec,
    route: str,
    dims: Dims,
    H: int,
    impl: str = "xla",
    turning: Rotation | None = None,
) -> LayerState:
    """The state of a layer that has seen no token.

    impl: the implementation of attention (`compute.choose`). turning: the rotation of keys that are
    stored before it.
    """
    B, _, K, S, M, _ = dims = dims._replace(H=H)
    P = policy.selection_heads(K)
    ws = None if route == "indexed" else WorkingSet.empty(codec, B, K, M, H, P)
    keeps_store = route == "indexed" or (route == "working_set" and not policy.evicts)
    store = Store.empty(codec, B, S, K, H) if keeps_store else None
    length = jnp.zeros((B,), jnp.int32)
    return LayerState(ws, store, policy.init(dims), length, policy, codec, route, S, impl, turning)


def grow(state: LayerState, S: int, room: int | None = None) -> LayerState:
    """The same state for a context of S tokens.

    room: the most tokens that may follow, where a set grows by each of them; None: up to S.
    """
    M = state.policy.capacity(S) if state.route == "working_set" else S
    if state.policy.appends and state.route == "working_set":
        M = state.ws.pos.shape[-1] + min(S - state.context, S if room is None else room)
    return state.replace(
        ws=None if state.ws is None else state.ws.grow(state.codec, M),
        store=None if state.store is None else state.store.grow(state.codec, S),
        stats=state.policy.grow(state.stats, S, M),
        context=S,
    )


def freeze(state: LayerState) -> LayerState:
    """The same state with all tokens encoded, once the codec has seen its `frozen_after` tokens."""

    def frozen(home):
        return None if home is None else home.freeze(state.codec)

    return state.replace(ws=frozen(state.ws), store=frozen(state.store))


def decode(
    state: LayerState, q: jax.Array, k: jax.Array, v: jax.Array, exchange: bool = True
) -> tuple[jax.Array, LayerState, Taps]:
    """One new token per sequence: q [B, N, H], k and v [B, K, H] -> out [B, N, H] in q's dtype.

    exchange: False keeps the set of a state with a `joint` key, for `exchange_layers`. Returns out,
    state and taps.
    """
    if not exchange and joint(state) is None:
        raise ValueError(f"{state.policy} on the route {state.route} exchanges layer by layer")
    step = {
        "working_set": _decode_working_set,
        "indexed": _decode_indexed,
        "masked": _decode_masked,
    }[state.route]
    policy = state.policy
    codec = state.codec
    length = state.length
    home = state.store if state.ws is None else state.ws
    clipped = codec.clipped(home.k, k) + codec.clipped(home.v, v)
    if policy.takes_keys:
        keys = k if state.turning is None else turned(k, _wide(length, k), state.turning)
        state = state.replace(stats=policy.note(state.stats, keys[:, None], length))
    if state.turning is not None:
        q = turned(q, _wide(policy.place(length), q), state.turning)
    q_heads = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # [B, K, G, H]
    options = {} if exchange else {"exchange": False}
    piece, state, taps = step(state, q_heads, k, v, **options)
    taps = taps._replace(clipped=clipped)
    return piece.out.reshape(q.shape).astype(q.dtype), state.replace(length=state.length + 1), taps


def _wide(at, x):
    """`at` [B] repeated for each head of x [B, heads, H]: [B, heads]."""
    return jnp.broadcast_to(at[:, None], x.shape[:2])


def turn_of(policy: Policy, turning: Rotation | None, pos, length) -> Turn | None:
    """The rotation of the keys of tokens `pos` for the query at `length`."""
    return None if turning is None else Turn(policy.places(pos, length), turning)


def _taps(mass, pos, bias) -> Taps:
    active = bias > -jnp.inf
    attended = jnp.mean(jnp.sum(active, axis=-1, dtype=jnp.float32), axis=-1)
    zero = jnp.zeros(pos.shape[:1], jnp.int32)
    return Taps(mass, jnp.where(active, pos, -1), attended, zero, zero)


def _decode_working_set(state: LayerState, q, k, v, exchange: bool = True):
    policy = state.policy
    codec = state.codec
    S = state.context
    length = state.length
    store = None if state.store is None else state.store.append(codec, k, v, length)
    ws, slot = state.ws.append(codec, k, v, length)
    pending = getattr(store, "pending", None)
    bias = ws.bias if pending is None else pending.hide(ws.bias)
    turn = turn_of(policy, state.turning, ws.pos, length)
    heads = policy.mass_heads(q.shape[1] * q.shape[2], q.shape[1])
    piece, mass = compute.slots(codec, q, ws.k, ws.v, bias, state.impl, turn, heads)
    taps = _taps(mass, ws.pos, bias)
    dense = None
    which = policy.refresh(length)
    if which is not None:
        piece, row = _refreshed(state, store, q, which, piece)
        dense = (which, row)
        taps = taps._replace(
            attended=jnp.where(which, (length + 1).astype(jnp.float32), taps.attended)
        )
    stats = policy.observe(state.stats, mass, ws.pos, slot, length, dense)
    if exchange:
        stats, ws, store, loads = exchange_layer(
            policy, codec, store, stats, ws, length + 1, S, after=piece.out
        )
        taps = taps._replace(loads=loads)
    return piece, state.replace(ws=ws, store=store, stats=stats), taps


def _refreshed(state: LayerState, store: Store, q, which, piece: Partial):
    """Replace `piece` by dense attention over the store for the sequences `which` [B].

    Also returns the dense row of attention [B, P, S].
    """
    length = state.length
    S = state.context
    P = state.ws.pos.shape[1]

    def dense(piece):
        seen = positions(S) <= column(length)
        bias = jnp.broadcast_to(jnp.where(seen, jnp.float32(0.0), -jnp.inf), (q.shape[0], P, S))
        turn = turn_of(
            state.policy, state.turning, jnp.broadcast_to(positions(S), bias.shape), length
        )
        full, row = compute.store(state.codec, q, store.k, store.v, bias, state.impl, turn)
        chosen = jax.tree.map(
            lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), full, piece
        )
        return chosen, row

    def skip(piece):
        return piece, jnp.zeros((q.shape[0], P, S), jnp.float32)

    return jax.lax.cond(jnp.any(which), dense, skip, piece)


def _decode_indexed(state: LayerState, q, k, v):
    policy = state.policy
    codec = state.codec
    S = state.context
    length = state.length
    store = state.store.append(codec, k, v, length)
    keep = _kept(policy, state.stats, length, S, q)
    M = S if policy.refresh(length) is not None else min(S, policy.capacity(S))
    pos = slots_of(keep, M)
    turn = turn_of(policy, state.turning, pos, length)
    piece, mass = compute.by_index(codec, q, store.k, store.v, pos, bias_of(pos), state.impl, turn)
    at = jnp.where(pos >= 0, pos, S)
    b = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
    p = jax.lax.broadcasted_iota(jnp.int32, at.shape, 1)
    row = jnp.zeros(keep.shape, jnp.float32).at[b, p, at].set(mass, mode="drop")
    seen = jnp.where(positions(S) <= column(length), positions(S), -1)
    stats = _observe_row(policy, state.stats, row, jnp.broadcast_to(seen, keep.shape), length)
    return piece, state.replace(store=store, stats=stats), _taps(mass, pos, bias_of(pos))


def _decode_masked(state: LayerState, q, k, v):
    policy = state.policy
    codec = state.codec
    ws = state.ws
    length = state.length
    slot = jnp.broadcast_to(length[:, None], ws.pos.shape[:2])
    k = codec.write_slot(ws.k, k, slot)
    v = codec.write_slot(ws.v, v, slot)
    heads = policy.mass_heads(q.shape[1] * q.shape[2], q.shape[1])

    def attend_all(bias, pos):
        return compute.slots(
            codec, q, k, v, bias, state.impl, turn_of(policy, state.turning, pos, length), heads
        )

    piece, stats, pos, bias, taps = masked_row(
        policy, state.stats, ws.pos, ws.bias, q, attend_all, length
    )
    return piece, state.replace(ws=WorkingSet(k, v, pos, bias), stats=stats), taps


def masked_row(policy: Policy, stats, pos, bias, q, attend_all, length):
    """One query of the reference: slot = position, and the selection is a mask.

    pos [B, P, S]: -1 for tokens that are still to come or that an evicting policy dropped. bias
    [B, P, S]: of the tokens that an evicting policy keeps. `attend_all(bias, pos)` attends every
    token under a bias. Returns the piece, statistics, pos, bias and taps.
    """
    S = pos.shape[-1]
    own = positions(S) == column(length)
    pos = jnp.where(own, positions(S), pos)
    if policy.evicts:
        bias = jnp.where(own, jnp.float32(0.0), bias)
    else:
        bias = jnp.where(_kept(policy, stats, length, S, q), jnp.float32(0.0), -jnp.inf)
    piece, mass = attend_all(bias, pos)
    stats = _observe_row(policy, stats, mass, pos, length)
    taps = _taps(mass, pos, bias)
    if policy.evicts:
        stats, ex = policy.exchange(stats, pos, bias, length + 1, S)
        pos, bias = ex.pos, ex.bias
    else:
        bias = bias_of(pos)
    return piece, stats, pos, bias, taps


def _observe_row(policy: Policy, stats, row, pos, length):
    """`observe` on the routes where slot = position."""
    slot = jnp.broadcast_to(length[:, None], pos.shape[:2])
    return policy.observe(stats, row, pos, slot, length, (jnp.ones(length.shape, jnp.bool_), row))


def _kept(policy: Policy, stats, length, S: int, q):
    """[B, P, S] bool: the tokens that the query at `length` attends, itself included."""
    keep = policy.select(stats, length, S, q if policy.needs_query else None)
    which = policy.refresh(length)
    if which is not None:
        keep = keep | (column(which) & (positions(S) < column(length)))
    keep = keep | (positions(S) == column(length))
    return jnp.broadcast_to(keep, (length.shape[0], *keep.shape[1:]))
