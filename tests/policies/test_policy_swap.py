"""The repair of a top-k set by swaps, against sorting in plain Python."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alisa_jax.policies import base, swap

S, M = 19, 13
improve = jax.jit(swap.improve)


def listing(rows):
    """`improve` with room for `rows` loads in a call."""

    def f(*args):
        with mock.patch.object(swap, "LOADS", (rows, rows)):
            return swap.improve(*args)

    return jax.jit(f)


LISTING = {rows: listing(rows) for rows in (1, 2, 7, S)}


def ranking(score, below):
    """Positions below `below`, best first, ties to the lowest."""
    return sorted(range(below), key=lambda i: (-score[i], i))


class Case:
    """A starting set: `length` past tokens, of which those from `first_local` on are active."""

    def __init__(self, rng, ties, S=S, M=M):
        self.length = int(rng.integers(1, S + 1))
        local = int(rng.integers(0, min(self.length, M // 2) + 1))
        self.first_local = self.length - local
        self.want = int(rng.integers(0, M - local))  # locals + want + one free slot fit
        self.score = rng.integers(0, 4, S) / 4 if ties else rng.random(S)
        self.score = np.where(np.arange(S) < self.length, self.score, 0).astype(np.float32)
        others = rng.permutation(self.first_local)[: rng.integers(0, M - local + 1)]
        resident = np.concatenate([np.arange(self.first_local, self.length), others])
        slots = rng.permutation(M)[: len(resident)]
        self.pos = np.full(M, -1, np.int32)
        self.pos[slots] = resident
        parked = (rng.random(M) < rng.random()) & (self.pos < self.first_local)
        self.bias = np.where((self.pos >= 0) & ~parked, 0.0, -np.inf).astype(np.float32)
        self.slot_of = inverse(self.pos, self.bias, S)

    @property
    def best(self):
        return set(ranking(self.score, self.first_local)[: self.want]) | set(range(self.first_local, self.length))


def inverse(pos, bias, S=S):
    slot_of = np.full(S, swap.ABSENT, np.int32)
    for slot, token in enumerate(pos):
        if token >= 0:
            slot_of[token] = slot if bias[slot] == 0 else swap.PARKED - slot
    return slot_of


def finished(cases, improve=improve, most_calls=9):
    """Run `improve` until it asks for no more, doing its loads; checks what holds after every call."""
    stack = lambda name: np.stack([getattr(c, name) for c in cases])[:, None]
    slot_of, pos, bias = stack("slot_of"), stack("pos"), stack("bias")
    first = np.array([[c.first_local] for c in cases], np.int32)
    want = np.array([[c.want] for c in cases], np.int32)
    content, calls = pos.copy(), 0  # whose K and V lie in each slot
    more = True
    while more:
        resident = [set(p[0][p[0] >= 0].tolist()) for p in pos]
        slot_of, ex = improve(stack("score"), slot_of, pos, bias, first, want)
        slot_of, pos, bias, loads_to, loads = (np.asarray(x) for x in (slot_of, *ex[:4]))
        more, calls = bool(ex.more), calls + 1
        for i in range(len(cases)):
            now = pos[i, 0][pos[i, 0] >= 0].tolist()
            asked = loads[i, 0][loads[i, 0] >= 0].tolist()
            slots = loads_to[i, 0][loads[i, 0] >= 0].tolist()
            assert len(set(now)) == len(now), "a token lies in two slots"
            assert len(set(slots)) == len(slots), "two loads into one slot of one call"
            assert set(now) - resident[i] <= set(asked) <= set(now), "loads are the newly resident tokens"
            content[i, 0][slots] = asked
            held = pos[i, 0] >= 0
            np.testing.assert_array_equal(content[i, 0][held], pos[i, 0][held], "a slot holds another token's rows")
            again = inverse(pos[i, 0], bias[i, 0], slot_of.shape[-1])
            np.testing.assert_array_equal(slot_of[i, 0], again, "slot_of is not the inverse")
        assert calls <= most_calls
    return pos[:, 0], bias[:, 0], calls


@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
@example(seed=0, ties=True)
def test_any_starting_set_ends_in_exactly_the_best_tokens(seed, ties):
    rng = np.random.default_rng(seed)
    cases = [Case(rng, ties) for _ in range(16)]
    pos, bias, _ = finished(cases)
    for case, p, b in zip(cases, pos, bias):
        assert set(p[b == 0].tolist()) == case.best
        assert (p == -1).any(), "no slot is left for the next token"


@pytest.mark.parametrize("rows", [1, 2, 7, S])
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
@settings(max_examples=20)
def test_lists_of_any_length_end_in_the_same_set(rows, seed, ties):
    rng = np.random.default_rng(seed)
    cases = [Case(rng, ties) for _ in range(16)]
    pos, bias, _ = finished(cases, LISTING[rows], most_calls=M + 1)
    for case, p, b in zip(cases, pos, bias):
        assert set(p[b == 0].tolist()) == case.best and (p == -1).any()


@pytest.mark.parametrize("ties", [False, True])
def test_a_long_context_lists_more_and_looks_for_them_in_blocks(ties):
    S, M = 7 * 1024 + 5, 1500
    assert swap.loads(S) > swap.LOADS[0] and -(-S // swap.BLOCK) > 2 * (swap.loads(S) + 1)
    rng = np.random.default_rng(6)
    cases = [Case(rng, ties, S, M) for _ in range(6)]
    for case in cases:  # from a set that is nearly right, as after a step
        order = ranking(case.score, case.first_local)
        held = np.concatenate([np.arange(case.first_local, case.length), order[: case.want]]).astype(np.int32)
        case.pos, case.bias = np.full(M, -1, np.int32), np.full(M, -np.inf, np.float32)
        case.pos[: len(held)], case.bias[: len(held)] = held, 0.0
        case.slot_of = inverse(case.pos, case.bias, S)
        moved = rng.integers(0, case.length, 40)
        case.score[moved] = rng.random(40).astype(np.float32)
    pos, bias, calls = finished(cases)
    for case, p, b in zip(cases, pos, bias):
        assert set(p[b == 0].tolist()) == case.best and (p == -1).any()
    assert calls > 1


def holding(tokens, score, want, M=M):
    """All S tokens are past; `tokens` are active, in the first slots."""
    case = Case(np.random.default_rng(1), ties=False)
    case.length, case.first_local, case.want, case.score = S, S, want, np.asarray(score, np.float32)
    case.pos, case.bias = np.full(M, -1, np.int32), np.full(M, -np.inf, np.float32)
    case.pos[: len(tokens)], case.bias[: len(tokens)] = tokens, 0.0
    case.slot_of = inverse(case.pos, case.bias)
    return case


def test_more_loads_than_one_call_can_list_are_asked_for_in_further_calls():
    pos, bias, calls = finished([holding([], range(S), M - 1)])
    assert calls == -(-(M - 1) // swap.loads(S))
    assert sorted(pos[0][bias[0] == 0].tolist()) == list(range(S - M + 1, S))


@given(seed=st.integers(0, 2**32 - 1))
def test_a_score_that_is_not_a_number_loses_to_every_other_and_the_repair_still_ends(seed):
    rng = np.random.default_rng(seed)
    cases = [Case(rng, ties=False) for _ in range(16)]
    for case in cases:
        case.score[rng.random(S) < 0.3] = np.nan
        numbers = [i for i in range(case.first_local) if not np.isnan(case.score[i])]
        case.want = min(case.want, len(numbers))
        case.chosen = set(sorted(numbers, key=lambda i: -case.score[i])[: case.want])
    pos, bias, _ = finished(cases)
    for case, p, b in zip(cases, pos, bias):
        assert set(p[b == 0].tolist()) == case.chosen | set(range(case.first_local, case.length))


@pytest.mark.parametrize("rows", [1, 7])
def test_a_set_that_is_far_too_large_shrinks(rows):
    pos, bias, calls = finished([holding(range(S - M, S), range(S), 2)], LISTING[rows])
    assert set(pos[0][bias[0] == 0].tolist()) == {S - 1, S - 2} and calls == -(-(M - 2) // (rows + 1))


def test_a_set_of_all_tokens_shrinks_though_none_is_outside():
    pos, bias, _ = finished([holding(range(S), range(S), 2, M=S + 1)], LISTING[1])
    assert set(pos[0][bias[0] == 0].tolist()) == {S - 1, S - 2}


def test_an_infinite_score_replaces_no_member_where_there_is_none():
    _, bias, calls = finished([holding([], np.full(S, np.inf), 0)])
    assert (bias == -np.inf).all() and calls == 1


def test_a_set_that_is_one_too_large_is_right_after_one_call():
    pos, bias, calls = finished([holding(range(S - M, S), range(S), M - 1)])
    assert set(pos[0][bias[0] == 0].tolist()) == set(range(S - M + 1, S)) and calls == 1


def test_a_set_that_fills_all_slots_is_repaired_too():
    pos, bias, _ = finished([holding(range(M), range(S), M)])
    assert set(pos[0].tolist()) == set(range(S - M, S)) and (bias == 0).all()


def test_a_parked_token_returns_without_a_copy():
    pos = jnp.array([[[0, 1, -1]]], jnp.int32)
    bias = jnp.array([[[0.0, -jnp.inf, -jnp.inf]]])
    slot_of = jnp.array([[[0, swap.PARKED - 1, swap.ABSENT]]], jnp.int32)
    score = jnp.array([[[1.0, 2.0, 0.0]]])
    new, ex = improve(score, slot_of, pos, bias, jnp.array([[2]]), jnp.array([[1]]))
    assert np.asarray(ex.load_pos).max() == -1
    assert np.asarray(ex.bias)[0, 0].tolist() == [-np.inf, 0, -np.inf] and np.asarray(new)[0, 0, :2].tolist() == [-2, 1]


def test_when_room_is_short_the_worst_parked_token_gives_up_its_slot():
    pos = jnp.array([[[0, 1, 2]]], jnp.int32)
    bias = jnp.array([[[0.0, -jnp.inf, -jnp.inf]]])
    slot_of = jnp.array([[[0, swap.PARKED - 1, swap.PARKED - 2, swap.ABSENT]]], jnp.int32)
    score = jnp.array([[[3.0, 1.0, 2.0, 0.0]]])
    new, ex = improve(score, slot_of, pos, bias, jnp.array([[4]]), jnp.array([[1]]))
    assert np.asarray(ex.pos)[0, 0].tolist() == [0, -1, 2]
    assert np.asarray(new)[0, 0].tolist() == [0, swap.ABSENT, swap.PARKED - 2, swap.ABSENT]


def test_a_set_that_is_right_and_has_room_is_left_alone():
    case = Case(np.random.default_rng(4), ties=False)
    pos, bias, _ = finished([case])
    case.pos, case.bias, case.slot_of = pos[0], bias[0], inverse(pos[0], bias[0])
    again, bias_again, calls = finished([case])
    np.testing.assert_array_equal(again, pos)
    np.testing.assert_array_equal(bias_again, bias)
    assert calls == 1


top_mask = jax.jit(swap.top_mask)
foremost = jax.jit(swap.foremost, static_argnums=1)
best = jax.jit(swap.best, static_argnums=2)
SCORES = st.lists(
    st.one_of(
        st.sampled_from([0.0, 1.0, 2.0, float("-inf"), float("nan")]), st.floats(-4, 4, width=32, allow_subnormal=False)
    ),
    min_size=S,
    max_size=S,
)


@given(SCORES, st.integers(-1, S + 1))
@settings(max_examples=200)
def test_top_mask_is_the_sorted_prefix_without_minus_infinity_and_nan(scores, k):
    got = np.asarray(top_mask(jnp.asarray(scores, jnp.float32)[None, None], jnp.full((1, 1, 1), k, jnp.int32)))[0, 0]
    eligible = [i for i in range(S) if not np.isnan(scores[i]) and scores[i] != -np.inf]
    want = sorted(eligible, key=lambda i: (-np.float32(scores[i]), i))[: max(k, 0)]
    assert set(np.flatnonzero(got).tolist()) == set(want)


def test_top_mask_takes_another_k_for_each_sequence_and_head():
    score = jnp.asarray(np.random.default_rng(2).random((2, 3, S)), jnp.float32)
    got = np.asarray(top_mask(score, jnp.array([[[2]], [[5]]], jnp.int32)))
    for b, k in enumerate([2, 5]):
        for p in range(3):
            assert set(np.flatnonzero(got[b, p])) == set(ranking(np.asarray(score)[b, p], S)[:k])


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([9, 64, 65, 320, 1030]), k=st.sampled_from([1, 4, 9]))
@example(seed=0, size=1030, k=9)
def test_foremost_is_the_sorted_prefix_and_where_it_was(seed, size, k):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, rng.choice([2, 9, 4000]), (2, 3, size)).astype(np.float32)
    x[rng.random(x.shape) < rng.choice([0.0, 0.5, 0.99])] = -np.inf
    value, at = (np.asarray(a) for a in foremost(jnp.asarray(x), k))
    want = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(at, want)
    np.testing.assert_array_equal(value, np.take_along_axis(x, want, -1))


@given(st.lists(st.sampled_from([-2.0, 0.0, 1.0, 3.0, float("-inf")]), min_size=S, max_size=S))
def test_best_is_the_highest_score_and_the_lowest_order_among_equals(scores):
    order = np.random.default_rng(0).permutation(S).astype(np.int32)
    value, first, exists = best(np.float32([[scores]]), order[None, None], S)
    assert bool(exists[0, 0]) == (max(scores) > -np.inf)
    if exists[0, 0]:
        want = min((-s, int(o)) for s, o in zip(scores, order))
        assert (-float(value[0, 0]), int(first[0, 0])) == want


@pytest.mark.parametrize("size", [5, S, S + 4])
def test_settle_packs_kept_positions_in_order_and_is_the_identity_for_equal_sizes(size):
    keep = np.random.default_rng(3).random((2, 3, S)) < 0.25
    keep[0, 0] = False
    got = np.asarray(jax.jit(base.slots_of, static_argnums=1)(keep, size))
    for b in range(2):
        for p in range(3):
            kept = np.flatnonzero(keep[b, p]).tolist()
            if size == S:
                want = [i if i in kept else -1 for i in range(S)]
            else:
                want = (kept + [-1] * size)[:size]
            assert got[b, p].tolist() == want


def test_index_slots_is_the_inverse_of_pos():
    pos = np.array([[[4, -1, 0, 7]], [[-1, -1, -1, 18]]], np.int32)
    got = np.asarray(jax.jit(swap.index_slots, static_argnums=1)(pos, S))
    for b in range(2):
        np.testing.assert_array_equal(got[b, 0], inverse(pos[b, 0], np.zeros(4)))


def test_put_writes_nothing_out_of_range_or_switched_off():
    x = jnp.arange(6, dtype=jnp.int32).reshape(1, 2, 3)
    for index, on in (([[3, -1]], True), ([[99, -99]], True), ([[0, 1]], False)):
        np.testing.assert_array_equal(swap.put(x, jnp.array(index, jnp.int32), 77, on), x)
    assert np.asarray(swap.put(x, jnp.array([[2, 0]], jnp.int32), 77)).tolist() == [[[0, 1, 77], [77, 4, 5]]]
