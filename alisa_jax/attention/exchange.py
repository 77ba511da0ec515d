"""The exchange: after layers have attended, policies change their sets for the next query.

A policy that selects evicts tokens, or requests rows, which are copied from the store. Layers with
the same key (`joint_key`) are served by one loop. Dense layers, and routes whose set is a mask that
`select` makes anew, exchange nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from alisa_jax.kv.cache import Layer
from alisa_jax.kv.state import LayerSpec, LayerState


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
