"""Keeping a top-k set up to date by swaps instead of sorting.

A set of slots holds the best tokens of a growing sequence. Between two steps little changes, so the
set is repaired: while it is too large its worst member goes, while it is too small the best
outsider comes, and then "best outside against worst inside" is swapped until nothing improves. That
ends in exactly the set that a full sort would give, for any starting set. Higher score wins, and
among equal scores the lower position. The few best outsiders and the few worst members are listed
first. The nth of one list can only replace the nth of the other, so all swaps are found at once.

`slot_of` [B, P, S] is the inverse of `pos` [B, P, M]: the slot of an active token, ABSENT, or
PARKED - slot for a token that is resident and not active.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alisa_jax.ops.writes import put as put_at
from alisa_jax.policies.base import Exchange

ABSENT = -1
PARKED = -2
# rows that one call may request in a short and in a long context; if more are due, `more` is true
LOADS = 4, 16
BLOCK = 32


def loads(S: int) -> int:
    """Rows that a call may request in a context of S tokens; in longer ones more change places."""
    return min(LOADS[1], max(LOADS[0], S // 1024))


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def put(x: jax.Array, index: jax.Array, value, on=True) -> jax.Array:
    """x[b, p, index[b, p, ...]] = value[b, p, ...] where `on` and the index is in range.

    x [B, P, S]; index [B, P] or [B, P, E], distinct for each (b, p) where it is on.
    """
    index = jnp.where(on, index, -1)
    value = jnp.broadcast_to(jnp.asarray(value, x.dtype), index.shape)
    return put_at(x, (_iota(index.shape, 0), _iota(index.shape, 1), index), value)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, p, index[b, p, e]] for indices in range; x [B, P, S], index [B, P, E]."""
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")


def best(score: jax.Array, order: jax.Array, limit: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Highest finite `score` [B, P, X], ties to the lowest `order` (< limit).

    Returns (score, order, exists), each [B, P].
    """
    top = jnp.max(score, axis=-1)
    first = jnp.min(jnp.where(score == top[..., None], order, limit), axis=-1)
    return top, first, top > -jnp.inf


def top_mask(score: jax.Array, k: jax.Array) -> jax.Array:
    """[B, P, S] bool: the `k` [B, 1, 1] best of `score` [B, P, S], ties to the lowest index.

    -inf and NaN are never among them.
    """
    S = score.shape[-1]
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    ranked = -jnp.sort(-score, axis=-1)
    last = jnp.broadcast_to(jnp.clip(k - 1, 0, S - 1), (*score.shape[:2], 1))
    border = jnp.take_along_axis(ranked, last, axis=-1)
    above = score > border
    tied = (score == border) & (score > -jnp.inf)
    room = k - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return (above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= room))) & (k > 0)


def index_slots(pos: jax.Array, S: int) -> jax.Array:
    """`slot_of` for a working set whose resident tokens `pos` [B, P, M] are all active."""
    at = jnp.where(pos >= 0, pos, S)
    absent = jnp.full((*pos.shape[:2], S), ABSENT, jnp.int32)
    return absent.at[_iota(pos.shape, 0), _iota(pos.shape, 1), at].set(
        _iota(pos.shape, 2), mode="drop"
    )


def foremost(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The `k` largest of x [B, P, S] and their positions, both [B, P, k]; ties as in `lax.top_k`.

    They lie in the k blocks with the largest maxima: no entry of another block exceeds these.
    """
    S = x.shape[-1]
    blocks = -(-S // BLOCK)
    if blocks <= 2 * k:
        return jax.lax.top_k(x, k)
    split = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * BLOCK - S)), constant_values=-jnp.inf)
    split = split.reshape(*x.shape[:2], blocks, BLOCK)
    _, some = jax.lax.top_k(jnp.max(split, axis=-1), k)
    some = jnp.sort(some, axis=-1)  # so that the first of equals is still the first
    kept = jnp.take_along_axis(split, some[..., None], axis=2)
    value, at = jax.lax.top_k(kept.reshape(*x.shape[:2], k * BLOCK), k)
    return value, take(some, at // BLOCK) * BLOCK + at % BLOCK


def improve(score, slot_of, pos, bias, first_local, want) -> tuple[jax.Array, Exchange]:
    """Make the active tokens below `first_local` the `want` best of all tokens below `first_local`.

    score, slot_of [B, P, S], NaN being worse than any score; pos, bias [B, P, M]; first_local
    [B, 1]: tokens from here on stay; want [B, 1]. Leaves an empty slot if the set does not fill all
    slots. Returns the new `slot_of` and the exchange.
    """
    S = score.shape[-1]
    below = _iota(score.shape, 2) < first_local[..., None]
    number = ~jnp.isnan(score)
    ranked = jnp.where(number, score, -jnp.inf)
    inside = below & (slot_of >= 0)
    active = (bias > -jnp.inf) & (pos < first_local[..., None])
    over = jnp.sum(active, axis=-1, keepdims=True, dtype=jnp.int32) - want[..., None]
    most = loads(S)
    E = min(most + 1, S)
    best_out, out_pos = foremost(jnp.where(below & number & (slot_of < 0), score, -jnp.inf), E)
    # of equals the last is worst
    worst_in, back = foremost(-jnp.where(inside, ranked, jnp.inf)[..., ::-1], E)
    in_pos = S - 1 - back
    was = take(slot_of, out_pos)
    add, drop, more = _changes(
        best_out, out_pos, -worst_in, in_pos, worst_in > -jnp.inf, was == ABSENT, over, most
    )

    slot = take(slot_of, in_pos)
    slot_of = put(slot_of, in_pos, PARKED - slot, drop)
    bias = put(bias, slot, -jnp.inf, drop)
    parked = add & (was != ABSENT)
    load = add & (was == ABSENT)
    slot_of = put(slot_of, out_pos, PARKED - was, parked)
    bias = put(bias, PARKED - was, 0.0, parked)

    # empty slots come first, then those of the worst tokens
    idle = jnp.where(
        bias == -jnp.inf, jnp.where(pos < 0, jnp.inf, -take(ranked, jnp.maximum(pos, 0))), -jnp.inf
    )
    key, free = foremost(idle, min(most + 1, pos.shape[-1]))
    old = jnp.where(key > -jnp.inf, take(pos, free), ABSENT)
    turn = jnp.cumsum(load, axis=-1, dtype=jnp.int32) - 1
    to = take(free, jnp.clip(turn, 0, free.shape[-1] - 1))
    # one stays empty
    freed = _iota(free.shape, 2) <= jnp.sum(load, axis=-1, keepdims=True, dtype=jnp.int32)
    slot_of = put(slot_of, old, ABSENT, freed)
    pos = put(pos, free, ABSENT, freed & (old >= 0))
    slot_of = put(slot_of, out_pos, to, load)
    pos = put(pos, to, out_pos, load)
    bias = put(bias, to, 0.0, load)
    none = jnp.full((*pos.shape[:2], most), -1, jnp.int32)
    return slot_of, Exchange(
        pos, bias, put(none, turn, to, load), put(none, turn, out_pos, load), more
    )


def _changes(
    best_out, out_pos, worst_in, in_pos, is_in, absent, over, most
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(add, drop, more): listed outsiders that come, listed members that go, whether to call again.

    All lists are [B, P, E], best outsiders and worst members first. Outsiders that are `absent`
    need one of the `most` loads. over [B, P, 1]: by how many the set is too large.
    """
    E = out_pos.shape[-1]
    drops = jnp.clip(over, 0, E)
    fills = jnp.maximum(-over, 0)
    nth = _iota(out_pos.shape, 2)
    rival = nth - fills + drops  # the member that the nth outsider would replace
    listed = rival < E
    rival = jnp.clip(rival, 0, E - 1)
    against, against_pos = take(worst_in, rival), take(in_pos, rival)
    better = (best_out > against) | ((best_out == against) & (out_pos < against_pos))
    is_out = best_out > -jnp.inf
    add = _all_before(is_out & ((nth < fills) | (listed & take(is_in, rival) & better)))
    unlisted = _all_before(add | ~listed) & is_out & ~listed
    full = add & absent & (jnp.cumsum(add & absent, axis=-1, dtype=jnp.int32) > most)
    add = add & (jnp.cumsum(full, axis=-1, dtype=jnp.int32) == 0)
    more = jnp.any(full) | jnp.any(unlisted) | jnp.any(over > drops) | jnp.any(add[..., -1])
    fresh = jnp.sum(add & (nth >= fills), axis=-1, keepdims=True, dtype=jnp.int32)
    return add, is_in & (nth < drops + fresh), more


def _all_before(x: jax.Array) -> jax.Array:
    """[B, P, E] bool: `x` is true here and at all earlier places."""
    return jnp.cumsum(~x, axis=-1, dtype=jnp.int32) == 0
