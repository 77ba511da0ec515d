"""Keeping a top-k set up to date by swaps instead of sorting.

A set of slots holds the best tokens of a growing sequence. Between two steps little changes, so the set is repaired: while
it is too large its worst member goes, while it is too small the best outsider comes, and then "best outside against worst
inside" is swapped until nothing improves. That ends in exactly the set that a full sort would give, for any starting set,
after one or two rounds as a rule. Higher score wins, and among equal scores the lower position.

`slot_of` [B, P, S] is the inverse of `pos` [B, P, M]: the slot of an active token, ABSENT, or PARKED - slot for a token
that is resident and not active.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax.policies.base import Exchange
from alisa_jax.writes import put as put_at

ABSENT = -1
PARKED = -2
LOADS = 4  # rows that one call may ask for; a call that needs more says so and is called again


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def put(x: jax.Array, index: jax.Array, value, on=True) -> jax.Array:
    """x[b, p, index[b, p]] = value[b, p] where `on` and the index is in range; x [B, P, S], index [B, P]."""
    index = jnp.where(on, index, -1)
    value = jnp.broadcast_to(jnp.asarray(value, x.dtype), index.shape)
    return put_at(x, (_iota(index.shape, 0), _iota(index.shape, 1), index), value)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, p, index[b, p, e]] for indices in range; x [B, P, S], index [B, P, E]."""
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")


def best(score: jax.Array, order: jax.Array, limit: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Highest finite `score` [B, P, X], ties to the lowest `order` (< limit): (score, order, exists), each [B, P]."""
    top = jnp.max(score, axis=-1)
    first = jnp.min(jnp.where(score == top[..., None], order, limit), axis=-1)
    return top, first, top > -jnp.inf


def top_mask(score: jax.Array, k: jax.Array) -> jax.Array:
    """[B, P, S] bool: the `k` [B, 1, 1] best entries of `score` [B, P, S]; -inf and NaN never, ties to the lowest index."""
    S = score.shape[-1]
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    ranked = -jnp.sort(-score, axis=-1)
    border = jnp.take_along_axis(ranked, jnp.broadcast_to(jnp.clip(k - 1, 0, S - 1), (*score.shape[:2], 1)), axis=-1)
    above = score > border
    tied = (score == border) & (score > -jnp.inf)
    room = k - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return (above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= room))) & (k > 0)


def index_slots(pos: jax.Array, S: int) -> jax.Array:
    """`slot_of` for a working set whose resident tokens `pos` [B, P, M] are all active."""
    at = jnp.where(pos >= 0, pos, S)
    absent = jnp.full((*pos.shape[:2], S), ABSENT, jnp.int32)
    return absent.at[_iota(pos.shape, 0), _iota(pos.shape, 1), at].set(_iota(pos.shape, 2), mode="drop")


class _Set(NamedTuple):
    slot_of: jax.Array  # [B, P, S]
    pos: jax.Array  # [B, P, M]
    bias: jax.Array  # [B, P, M]
    score: jax.Array  # [B, P, M] score of the token in each slot
    load_slot: jax.Array  # [B, P, LOADS]
    load_pos: jax.Array  # [B, P, LOADS]
    loads: jax.Array  # [B, P]
    go: jax.Array  # [] bool
    more: jax.Array  # [] bool


def improve(score, slot_of, pos, bias, first_local, want) -> tuple[jax.Array, Exchange]:
    """Make the active tokens below `first_local` the `want` best of all tokens below `first_local`.

    score, slot_of [B, P, S], NaN being worse than any score; pos, bias [B, P, M]; first_local [B, 1]: tokens from here on
    stay as they are; want [B, 1]. Leaves an empty slot where the set does not fill all slots. Returns the new `slot_of` and
    the exchange.
    """
    S = score.shape[-1]
    below = _iota(score.shape, 2) < first_local[..., None]
    candidates = jnp.where(below & ~jnp.isnan(score), score, -jnp.inf)
    held = take(score, jnp.maximum(pos, 0))
    held = jnp.where(jnp.isnan(held), -jnp.inf, held)
    none = jnp.full((*pos.shape[:2], LOADS), -1, jnp.int32)
    zero, true, false = jnp.zeros(pos.shape[:2], jnp.int32), jnp.ones((), jnp.bool_), jnp.zeros((), jnp.bool_)
    start = _Set(slot_of, pos, bias, held, none, none, zero, true, false)

    def inside(s: _Set):
        return (s.bias > -jnp.inf) & (s.pos < first_local[..., None])

    def worst(s: _Set):
        low, negative, exists = best(jnp.where(inside(s), -s.score, -jnp.inf), -s.pos, S)
        return -low, -negative, exists

    def drop(s: _Set, p, on) -> _Set:
        slot = take(s.slot_of, jnp.clip(p, 0, S - 1)[..., None])[..., 0]
        return s._replace(slot_of=put(s.slot_of, p, PARKED - slot, on), bias=put(s.bias, slot, -jnp.inf, on))

    def round_(s: _Set) -> _Set:
        over = jnp.sum(inside(s), axis=-1, dtype=jnp.int32) - want
        _, p, _ = worst(s)
        s = drop(s, p, over > 0)
        over_after = jnp.where(over > 0, over - 1, over)
        out_score, out_pos, out = best(jnp.where(s.slot_of < 0, candidates, -jnp.inf), _iota(score.shape, 2), S)
        in_score, in_pos, is_in = worst(s)
        better = out & is_in & ((out_score > in_score) | ((out_score == in_score) & (out_pos < in_pos)))
        add = out & ((over_after < 0) | ((over_after == 0) & better))
        where = take(s.slot_of, jnp.clip(out_pos, 0, S - 1)[..., None])[..., 0]
        absent = where == ABSENT
        full = add & absent & (s.loads >= LOADS)
        add = add & ~full
        s = drop(s, in_pos, add & (over_after == 0))
        free, old = _free_slot(s, S)
        slot = jnp.where(absent, free, PARKED - where)
        s = s._replace(slot_of=put(s.slot_of, old, ABSENT, add & absent))
        turn = (_iota(none.shape, 2) == s.loads[..., None]) & (add & absent)[..., None]
        return _Set(
            slot_of=put(s.slot_of, out_pos, slot, add),
            pos=put(s.pos, slot, out_pos, add),
            bias=put(s.bias, slot, 0.0, add),
            score=put(s.score, slot, out_score, add),
            load_slot=jnp.where(turn, slot[..., None], s.load_slot),
            load_pos=jnp.where(turn, out_pos[..., None], s.load_pos),
            loads=s.loads + (add & absent).astype(jnp.int32),
            go=jnp.any(add | (over > 1)),
            more=s.more | jnp.any(full),
        )

    s = jax.lax.while_loop(lambda s: s.go, round_, start)
    free, old = _free_slot(s, S)
    parked = old >= 0
    ex = Exchange(put(s.pos, free, ABSENT, parked), s.bias, s.load_slot, s.load_pos, s.more)
    return put(s.slot_of, old, ABSENT, parked), ex


def _free_slot(s: _Set, S: int) -> tuple[jax.Array, jax.Array]:
    """A slot to use, and the parked token to give up for it (-1: the slot is empty). M when all slots are active."""
    M = s.pos.shape[-1]
    idle = s.bias == -jnp.inf
    key = jnp.where(s.pos < 0, jnp.inf, -s.score)
    _, slot, exists = best(jnp.where(idle, key, -jnp.inf), _iota(s.pos.shape, 2), M)
    old = take(s.pos, jnp.clip(slot, 0, M - 1)[..., None])[..., 0]
    return jnp.where(exists, slot, M), jnp.where(exists, old, -1)
