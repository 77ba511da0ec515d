"""The exchange: policies change working sets, and requested rows are copied from the store.

`exchange_layer` serves one layer. `exchange_layers` serves all layers with the same `joint` key at
once, at the end of a step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from alisa_jax.kv.pending import Pending
from alisa_jax.kv.ring import Ring
from alisa_jax.kv.state import LayerState, WorkingSet
from alisa_jax.kv.store import Store
from alisa_jax.policies.base import column


def exchange_layer(policy, codec, store, stats, ws: WorkingSet, length, S, after):
    """Let the policy change the working set and copy in the rows that it requests, until it stops.

    Returns statistics, working set, store and loads [B]. Rows that a `Ring` does not hold become
    pending there; once no more of them fit, the exchange stops and must be called again.

    The loop overwrites slots, so it must run after their last read. XLA copies the values whole
    unless it can prove that order; the loop's first condition therefore reads the attention output
    `after` (it is true unless all of the output is NaN).
    """
    ring = isinstance(store, Ring)

    def once(stats, ws, pending, loads, _):
        stats, ex = policy.exchange(stats, ws.pos, ws.bias, length, S)
        ws, more = ws.replace(pos=ex.pos, bias=ex.bias), ex.more
        if E := ex.load_pos.shape[-1]:
            slot = ex.load_slot
            if ring:
                absent = (ex.load_pos >= 0) & (ex.load_pos < column(store.host))
                pending = pending.note(slot, ex.load_pos, absent)
                pending = pending.replace(more=more & ~pending.room(E))
                slot, more = jnp.where(absent, -1, slot), more & ~pending.more
            ws = ws.load(codec, store, slot, ex.load_pos)
            loads = loads + jnp.sum(ex.load_pos >= 0, axis=(1, 2), dtype=jnp.int32)
        return stats, ws, pending, loads, more

    pending = Pending.empty(*ws.pos.shape[:2]) if ring else ()
    start = (stats, ws, pending, jnp.zeros(length.shape, jnp.int32), jnp.any(after == after))
    if policy.evicts:
        stats, ws, _, loads, _ = once(*start)
        return stats, ws, store, loads
    stats, ws, pending, loads, _ = jax.lax.while_loop(lambda c: c[4], lambda c: once(*c), start)
    return stats, ws, store.replace(pending=pending) if ring else store, loads


def joint(state: LayerState) -> Hashable | None:
    """Grouping key: layers with equal keys are exchanged in one batch; None means alone."""
    key = state.policy.joint()
    if key is None or state.route != "working_set" or type(state.store) is not Store:
        return None
    return key, state.codec, state.context, state.ws.pos.shape


def exchange_layers(
    states: Sequence[LayerState], after: Sequence[jax.Array]
) -> tuple[list[LayerState], list[jax.Array]]:
    """`exchange_layer` for layers with the same `joint` key: one loop, after all have attended.

    Returns the states and the loads [B] of each layer. after: the attention output of each layer,
    see `exchange_layer`.
    """
    policies, codec = [state.policy for state in states], states[0].codec
    length, S = states[0].length, states[0].context

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
