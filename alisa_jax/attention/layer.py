"""Where policy, codec and state meet: attention of new tokens over what is stored.

One decode step of one layer, on each of the three routes that give equal results:

    working_set   append -> attend the working set -> observe
    indexed       append -> select -> read those rows of the store -> attend -> observe
    masked        append -> attend all tokens under the mask of `select` -> observe: the reference

Layers attend (`decode`); afterwards sets change for the next query (`exchange_sets`), of one layer
or of many: a policy that selects evicts tokens, or requests rows, which are copied from the store.
Dense layers, and routes whose set is a mask that `select` makes anew, exchange nothing. A layer is
a tuple of parts, `LayerState`s of neighbouring sequences; one where all of them are resident.

A prompt is attended densely (`lane`), and what its queries attended seeds the policy.
`reference.score` runs a whole text in one pass.

Shapes: q [B, N, H] or [B, T, N, H], unscaled; query head i reads kv head i // G, G = N / K. Logits,
softmax statistics and attention mass are float32. Queries and keys come rotated, or as projected
where the layer has a `rotation`: keys are stored so, and both are rotated here to the places that
the policy gives them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax.attention import compute
from alisa_jax.attention.compute import Partial
from alisa_jax.codecs.base import Turn
from alisa_jax.kv.cache import Layer
from alisa_jax.kv.state import LayerSpec, LayerState, Store, bias_of
from alisa_jax.ops.rope import Rotation, rotate
from alisa_jax.policies.base import Policy, column, positions, slots_of


class Taps(NamedTuple):
    """What a decode step attended, for analysis; unused leaves cost nothing under jit."""

    mass: jax.Array  # [B, P, M] float32: attention paid to each slot, summed over its heads
    pos: jax.Array  # [B, P, M] int32: the token in each slot, -1 where none was attended
    attended: jax.Array  # [B] float32: attended tokens, itself included, mean over selection heads
    loads: jax.Array  # [B] int32: rows copied from the store for the next step
    clipped: jax.Array  # [B] int32: elements of the new K and V that the codec clipped


def decode(
    layer: Layer, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, Layer, tuple[Taps, ...]]:
    """One new token per sequence: q [B, N, H], k and v [B, K, H] -> out [B, N, H] in q's dtype.

    Returns out, the layer, whose sets hold what the query attended and its own token
    (`exchange_sets` comes next), and the taps of each part.
    """
    done = [decode_part(part, *mine) for part, mine in zip(layer, cut(layer, q, k, v), strict=True)]
    outs, parts, taps = zip(*done, strict=True)
    return jnp.concatenate(outs), parts, taps


def step(state: LayerState, q, k, v) -> tuple[jax.Array, LayerState, Taps]:
    """`decode` and `exchange_sets` of one layer by itself, in one part: out, its state and taps."""
    out, layer, (taps,) = decode((state,), q, k, v)
    ((state,),), ((loads,),) = exchange_sets([layer], [out])
    return out, state, taps._replace(loads=loads)


def cut(layer: Layer, *arrays):
    """Of each part of a layer: its sequences of `arrays` [B, ...]."""
    first = 0
    for part in layer:
        stop = first + part.length.shape[0]
        yield tuple(x[first:stop] for x in arrays)
        first = stop


def decode_part(state: LayerState, q, k, v, attend=None):
    """`decode` of one part: out, its state and taps.

    attend(state, q [B, K, G, H], codes of k, codes of v) -> (piece, state, taps), in place of what
    the route does.
    """
    routes = {
        "working_set": _attend_working_set,
        "indexed": _attend_indexed,
        "masked": _attend_masked,
    }
    attend = attend or routes[state.spec.route]
    policy = state.spec.policy
    codec = state.spec.codec
    rotation = state.spec.rotation
    length = state.length
    home = state.home
    clipped = codec.clipped(home.k, k) + codec.clipped(home.v, v)
    if policy.takes_keys:
        keys = k if rotation is None else rotate(k, length[:, None], rotation)
        state = state.replace(stats=policy.note(state.stats, keys[:, None], length))
    if rotation is not None:
        q = rotate(q, policy.place(length)[:, None], rotation)
    q_heads = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # [B, K, G, H]
    codes = codec.encode_token(home.k, k), codec.encode_token(home.v, v)
    piece, state, taps = attend(state, q_heads, *codes)
    out = piece.out.reshape(q.shape).astype(q.dtype)
    return out, state.replace(length=length + 1), taps._replace(clipped=clipped)


def turn_of(policy: Policy, rotation: Rotation | None, pos, length) -> Turn | None:
    """The rotation of the keys of tokens `pos` for the query at `length`."""
    return None if rotation is None else Turn(policy.places(pos, length), rotation)


def taps_of(mass, pos, bias) -> Taps:
    """What a query attended: `mass` in slots `pos` under `bias`."""
    active = bias > -jnp.inf
    attended = jnp.mean(jnp.sum(active, axis=-1, dtype=jnp.float32), axis=-1)
    zero = jnp.zeros(pos.shape[:1], jnp.int32)
    return Taps(mass, jnp.where(active, pos, -1), attended, zero, zero)


def _attend_working_set(state: LayerState, q, k, v):
    spec = state.spec
    policy = spec.policy
    length = state.length
    store = None if state.store is None else state.store.append(spec.codec, k, v, length)
    ws, slot = state.ws.append(spec.codec, k, v, length)
    bias = ws.bias if store is None else store.hide(ws.bias)
    turn = turn_of(policy, spec.rotation, ws.pos, length)
    heads = policy.mass_heads(q.shape[1] * q.shape[2], q.shape[1])
    piece, mass = compute.slots(spec.codec, q, ws.k, ws.v, bias, spec.impl, turn, heads)
    taps = taps_of(mass, ws.pos, bias)
    dense = None
    which = policy.refresh(length)
    if which is not None:
        piece, row = _refreshed(state, store, q, which, piece)
        dense = (which, row)
        taps = taps._replace(
            attended=jnp.where(which, (length + 1).astype(jnp.float32), taps.attended)
        )
    stats = policy.observe(state.stats, mass, ws.pos, slot, length, dense)
    return piece, state.replace(ws=ws, store=store, stats=stats), taps


def _refreshed(state: LayerState, store: Store, q, which, piece: Partial):
    """Replace `piece` by dense attention over the store for the sequences `which` [B].

    Also returns the dense row of attention [B, P, S].
    """
    spec = state.spec
    length = state.length
    S = state.context
    P = state.ws.pos.shape[1]

    def dense(piece):
        seen = positions(S) <= column(length)
        bias = jnp.broadcast_to(jnp.where(seen, jnp.float32(0.0), -jnp.inf), (q.shape[0], P, S))
        every = jnp.broadcast_to(positions(S), bias.shape)
        turn = turn_of(spec.policy, spec.rotation, every, length)
        full, row = compute.store(spec.codec, q, store.k, store.v, bias, spec.impl, turn)
        chosen = jax.tree.map(
            lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), full, piece
        )
        return chosen, row

    def skip(piece):
        return piece, jnp.zeros((q.shape[0], P, S), jnp.float32)

    return jax.lax.cond(jnp.any(which), dense, skip, piece)


def _attend_indexed(state: LayerState, q, k, v):
    spec = state.spec
    policy = spec.policy
    S = state.context
    length = state.length
    store = state.store.append(spec.codec, k, v, length)
    pos = chosen(state, q)
    turn = turn_of(policy, spec.rotation, pos, length)
    piece, mass = compute.by_index(
        spec.codec, q, store.k, store.v, pos, bias_of(pos), spec.impl, turn
    )
    at = jnp.where(pos >= 0, pos, S)
    b = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
    p = jax.lax.broadcasted_iota(jnp.int32, at.shape, 1)
    row = jnp.zeros((*pos.shape[:2], S), jnp.float32).at[b, p, at].set(mass, mode="drop")
    seen = jnp.where(positions(S) <= column(length), positions(S), -1)
    stats = _observe_row(policy, state.stats, row, jnp.broadcast_to(seen, row.shape), length)
    return piece, state.replace(store=store, stats=stats), taps_of(mass, pos, bias_of(pos))


def chosen(state: LayerState, q) -> jax.Array:
    """[B, P, M] int32: the tokens that the query q [B, K, G, H] attends, its own too; -1: none."""
    policy = state.spec.policy
    S = state.context
    keep = kept(policy, state.stats, state.length, S, q)
    every = policy.refresh(state.length) is not None
    return slots_of(keep, S if every else min(S, policy.capacity(S)))


def _attend_masked(state: LayerState, q, k, v):
    spec = state.spec
    policy = spec.policy
    length = state.length
    slot = jnp.broadcast_to(length[:, None], state.ws.pos.shape[:2])
    ws = state.ws.put(spec.codec, k, v, slot, length)
    heads = policy.mass_heads(q.shape[1] * q.shape[2], q.shape[1])

    def attend_all(bias):
        turn = turn_of(policy, spec.rotation, ws.pos, length)
        return compute.slots(spec.codec, q, ws.k, ws.v, bias, spec.impl, turn, heads)

    piece, stats, taps = masked_row(policy, state.stats, ws.pos, ws.bias, q, attend_all, length)
    return piece, state.replace(ws=ws, stats=stats), taps


def masked_row(policy: Policy, stats, pos, bias, q, attend_all, length):
    """One query of the reference: slot = position, and the selection is a mask.

    pos [B, P, S]: the query's own token, and -1 for tokens that are still to come or that an
    evicting policy dropped. bias [B, P, S]: of the tokens that an evicting policy keeps.
    `attend_all(bias)` attends every token under a bias. Returns the piece, statistics and taps.
    """
    if not policy.evicts:
        keep = kept(policy, stats, length, pos.shape[-1], q)
        bias = jnp.where(keep, jnp.float32(0.0), -jnp.inf)
    piece, mass = attend_all(bias)
    return piece, _observe_row(policy, stats, mass, pos, length), taps_of(mass, pos, bias)


def _observe_row(policy: Policy, stats, row, pos, length):
    """`observe` on the routes where slot = position."""
    slot = jnp.broadcast_to(length[:, None], pos.shape[:2])
    return policy.observe(stats, row, pos, slot, length, (jnp.ones(length.shape, jnp.bool_), row))


def kept(policy: Policy, stats, length, S: int, q):
    """[B, P, S] bool: the tokens that the query at `length` attends, itself included."""
    keep = policy.select(stats, length, S, q if policy.needs_query else None)
    which = policy.refresh(length)
    if which is not None:
        keep = keep | (column(which) & (positions(S) < column(length)))
    keep = keep | (positions(S) == column(length))
    return jnp.broadcast_to(keep, (length.shape[0], *keep.shape[1:]))


# ---- sets change


def exchange_sets(
    layers: Sequence[Layer], after: Sequence[jax.Array]
) -> tuple[list[Layer], list[tuple[jax.Array, ...]]]:
    """The layers with the sets of their next queries, and the rows that each part copied [B] int32.

    after: what each layer's attention returned. The loops overwrite slots, so they must run after
    the last read of these. XLA copies the values whole unless it can prove that order; the first
    condition of a loop therefore reads `after` (it is true unless all of it is NaN). Rows that a
    store does not have become pending there; once no more of them fit, the exchange of that layer
    stops, and must be called again.
    """
    found = [list(layer) for layer in layers]
    loads = [[jnp.zeros(part.length.shape, jnp.int32) for part in layer] for layer in layers]
    together: dict[Hashable, list[tuple[int, int]]] = {}
    for i, layer in enumerate(layers):
        for j, part in enumerate(layer):
            if not _exchanges(part.spec):
                continue
            if (key := joint_key(part)) is not None:
                together.setdefault((j, key), []).append((i, j))
            else:
                found[i][j], loads[i][j] = _alone(part, after[i])
    for places in together.values():
        parts, counts = _together([found[i][j] for i, j in places], [after[i] for i, _ in places])
        for (i, j), part, count in zip(places, parts, counts, strict=True):
            found[i][j], loads[i][j] = part, count
    return [tuple(layer) for layer in found], [tuple(counts) for counts in loads]


def _exchanges(spec: LayerSpec) -> bool:
    """Whether the set of such a layer changes between two queries."""
    in_set = spec.route == "working_set" or (spec.route == "masked" and spec.policy.evicts)
    return in_set and spec.policy.selects


def joint_key(state: LayerState) -> Hashable | None:
    """Grouping key: layers with equal keys are exchanged in one batch; None means alone.

    A layer whose rows may be pending stops by itself, so it is alone.
    """
    key = state.spec.policy.joint()
    if key is None or state.spec.route != "working_set" or jax.tree.leaves(state.store.pending):
        return None
    return key, state.spec.codec, state.context, state.ws.pos.shape


def _alone(state: LayerState, after: jax.Array) -> tuple[LayerState, jax.Array]:
    """One layer: its state and the loads [B]."""
    policy = state.spec.policy
    store = state.store

    def once(stats, ws, pending, loads, _):
        stats, ex = policy.exchange(stats, ws.pos, ws.bias, state.length, state.context)
        ws, more = ws.replace(pos=ex.pos, bias=ex.bias), ex.more
        if ex.load_pos.shape[-1]:
            slot, pending, more = store.request(pending, ex.load_slot, ex.load_pos, more)
            ws = ws.load(state.spec.codec, store, slot, ex.load_pos)
            loads = loads + jnp.sum(ex.load_pos >= 0, axis=(1, 2), dtype=jnp.int32)
        return stats, ws, pending, loads, more

    pending = () if store is None else store.delivered().pending
    loads = jnp.zeros(state.length.shape, jnp.int32)
    start = (state.stats, state.ws, pending, loads, jnp.any(after == after))
    if policy.evicts:
        stats, ws, _, loads, _ = once(*start)
        return state.replace(ws=ws, stats=stats), loads
    stats, ws, pending, loads, _ = jax.lax.while_loop(lambda c: c[4], lambda c: once(*c), start)
    return state.replace(ws=ws, stats=stats, store=store.waiting(pending)), loads


def _together(
    states: Sequence[LayerState], after: Sequence[jax.Array]
) -> tuple[list[LayerState], list[jax.Array]]:
    """Layers with the same key: one loop, after all have attended."""
    policies = [state.spec.policy for state in states]
    codec = states[0].spec.codec
    length = states[0].length
    S = states[0].context

    def once(carry):
        stats, sets, loads, _ = carry
        stats, found = policies[0].exchange_layers(
            policies, stats, [ws.pos for ws in sets], [ws.bias for ws in sets], length, S
        )
        for i, ex in enumerate(found):
            ws = sets[i].replace(pos=ex.pos, bias=ex.bias)
            sets[i] = ws.load(codec, states[i].store, ex.load_slot, ex.load_pos)
            loads[i] = loads[i] + jnp.sum(ex.load_pos >= 0, axis=(1, 2), dtype=jnp.int32)
        return stats, sets, loads, found[0].more

    go = jnp.any(jnp.stack([jnp.any(out == out) for out in after]))
    start = (
        [s.stats for s in states],
        [s.ws for s in states],
        [jnp.zeros(length.shape, jnp.int32)] * len(states),
        go,
    )
    stats, sets, loads, _ = jax.lax.while_loop(lambda c: c[3], once, start)
    return [s.replace(ws=w, stats=t) for s, w, t in zip(states, sets, stats, strict=True)], loads
