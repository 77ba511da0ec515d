"""Window sums against explicit float64 sums of explicit rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.policies import Swa, window_sum
from tests import replay

HEADS, B, P, LONGEST = 5, 2, 2, 288
push = jax.jit(window_sum.push, static_argnums=3, donate_argnums=0, compiler_options=replay.QUICK)
seed = jax.jit(window_sum.seed)
grow = jax.jit(window_sum.grow, static_argnums=(1, 2))
empty = jax.jit(window_sum.empty, static_argnums=range(5))


class Table(tuple):
    """A hashable table of widths, for a static argument."""

    def __array__(self, dtype=None, copy=None):
        return np.array(tuple(self), dtype)


def widths_of(window, r, S):
    return Table(Swa(kv_sparsity=round(1 - r, 12), window=window).counts(S).width.tolist())


def attention_rows(rng, length):
    """[B, P, LONGEST] float64 holding float32 values: causal rows of very different sizes, many entries exactly 0."""
    row = rng.random((B, P, LONGEST)) ** rng.choice([1, 8, 40])
    row *= rng.random((B, P, LONGEST)) < rng.choice([0.3, 1.0])
    row *= np.arange(LONGEST) <= np.asarray(length)[:, None, None]
    row[:, :, 0] += 1e-3
    return (row * HEADS / row.sum(-1, keepdims=True)).astype(np.float32).astype(np.float64)


def check(sums, rows, widths, length):
    """Compare with sums over the last rows: `rows` [steps, B, P, LONGEST], newest last; `length` past tokens."""
    S = sums.hi.shape[-1]
    for b, n in enumerate(length):
        want = rows[len(rows) - widths[n] :, b, :, :S].sum(axis=0)
        step = 2.0 ** (np.ceil(np.log2(HEADS * (max(widths) + 2))) - 47)  # the grid that rows are rounded to
        pair = np.asarray(sums.hi[b], np.float64) + np.asarray(sums.lo[b], np.float64)
        np.testing.assert_allclose(pair, want, rtol=0, atol=step / 2 * widths[n])
        np.testing.assert_allclose(sums.hi[b], want, rtol=2**-24, atol=step / 2 * widths[n])
        assert (np.asarray(sums.hi[b])[want == 0] == 0).all(), "rows that have left must leave exactly 0"
        assert (np.asarray(sums.lo[b])[want == 0] == 0).all(), "rows that have left must leave exactly 0"


@pytest.mark.parametrize("window, r", [("k", 0.4), ("2k", 0.9), ("2k", 1.0), (7, 0.5)])
def test_sums_equal_explicit_windows_for_hundreds_of_ragged_steps_through_growing_buckets(window, r):
    rng, before = np.random.default_rng(7), 11  # the second sequence is 11 tokens ahead, with rows of zeros
    S = 32
    widths = widths_of(window, r, S)
    sums = empty(B, P, S, max(widths) + 2, HEADS)
    rows = np.zeros((before + LONGEST, B, P, LONGEST))
    for step in range(LONGEST - before):
        length = np.array([step, step + before])
        if length.max() == S:
            S *= 3
            widths = widths_of(window, r, S)
            sums = grow(sums, S, max(widths) + 2)
        row = rows[before + step] = attention_rows(rng, length)
        sums = push(sums, jnp.asarray(row[..., :S], jnp.float32), jnp.asarray(length, jnp.int32), widths)
        if step % 5 == 0 or length.max() % 32 < 3 or length.max() % 32 > 29:
            check(sums, rows[: before + step + 1], widths, length + 1)
    assert length.max() + 1 == S == LONGEST


@pytest.mark.parametrize("window, r", [("k", 0.4), ("2k", 0.9), (7, 0.5)])
@pytest.mark.parametrize("prompt", [(1, 2), (5, 31), (32, 17)])
def test_seeding_with_the_last_rows_equals_pushing_all_rows(window, r, prompt):
    rng, S = np.random.default_rng(11), 32
    prompt = np.array(prompt)
    widths = widths_of(window, r, S)
    R = max(widths) + 2
    steps = prompt.max()
    rows = np.stack([attention_rows(rng, prompt - steps + i) for i in range(steps)])
    rows *= (prompt[None] - steps + np.arange(steps)[:, None] >= 0)[:, :, None, None]  # the shorter one starts later
    last = np.concatenate([np.zeros((R, B, P, LONGEST)), rows])[-(R - 1) :, ..., :S]
    began = empty(B, P, S, R, HEADS)
    sums = seed(
        began, jnp.asarray(np.moveaxis(last, 0, 2), jnp.float32), jnp.asarray(np.array(widths)[prompt], jnp.int32)
    )
    rows = np.concatenate([np.zeros((S, B, P, LONGEST)), rows])
    check(sums, rows, widths, prompt)
    S = 96  # and on from there, in the next bucket: rows of the prompt leave, or return
    widths = widths_of(window, r, S)
    sums = grow(sums, S, max(widths) + 2)
    for length in (prompt + i for i in range(40)):
        row = attention_rows(rng, length)
        rows = np.concatenate([rows, row[None]])
        sums = push(sums, jnp.asarray(row[..., :S], jnp.float32), jnp.asarray(length, jnp.int32), widths)
        check(sums, rows, widths, length + 1)


def test_a_token_that_had_all_the_attention_is_back_at_exactly_zero_when_its_rows_have_left():
    widths = Table([min(n, 3) for n in range(98)])
    sums = window_sum.empty(1, 1, 97, 5, heads=12)
    rng = np.random.default_rng(3)
    for n in range(60):
        row = np.zeros((1, 1, 97), np.float32)
        row[0, 0, 5] = 12 * rng.random() if n < 50 else 0
        row[0, 0, 6] = rng.random() * 1e-7
        sums = push(sums, jnp.asarray(row), jnp.array([n], jnp.int32), widths)
        if n == 49:
            assert sums.hi[0, 0, 5] > 0
    assert sums.hi[0, 0, 5] == 0 and sums.lo[0, 0, 5] == 0 and sums.hi[0, 0, 6] > 0


@pytest.mark.parametrize("decay", [0.5, 0.97])
def test_decayed_sums_weigh_a_row_by_its_age(decay):
    rng = np.random.default_rng(5)
    sums = window_sum.empty(B, P, 37, 0, HEADS)
    rows = rng.random((50, B, P, 37)).astype(np.float32)
    for row in rows:
        sums = window_sum.push_decayed(sums, jnp.asarray(row), decay)
    want = sum(row.astype(np.float64) * decay**age for age, row in enumerate(rows[::-1]))
    np.testing.assert_allclose(sums.hi, want, rtol=1e-5)
    assert sums.ring.size == 0 and sums.lo.size == 0


def test_seeding_decayed_sums_equals_pushing_the_same_rows():
    rng = np.random.default_rng(6)
    rows = rng.random((20, B, P, 37)).astype(np.float32)
    pushed = empty = window_sum.empty(B, P, 37, 0, HEADS)
    for row in rows:
        pushed = window_sum.push_decayed(pushed, jnp.asarray(row), 0.9)
    seeded = window_sum.seed(empty, jnp.asarray(np.moveaxis(rows, 0, 2)), jnp.zeros((B,), jnp.int32), 0.9)
    np.testing.assert_allclose(seeded.hi, pushed.hi, rtol=1e-6)


def test_growing_decayed_sums_keeps_them():
    sums = window_sum.push_decayed(window_sum.empty(1, 1, 3, 0, 1), jnp.ones((1, 1, 3)), 0.9)
    assert np.asarray(window_sum.grow(sums, 5, 0).hi).tolist() == [[[1, 1, 1, 0, 0]]]


def test_the_correction_row_is_the_one_that_enters_or_leaves():
    age, sign = window_sum.correction(np.array([0, 1, 2, 2, 2, 4, 4, 6]))
    # window starts at rows 0 0 0 1 2 1 2 1 for n = 0 .. 7: for each n, what must happen when row n is added
    assert sign.tolist() == [0, 0, -1, -1, 1, -1, 1]
    leaving = [n - int(a) for n, a in enumerate(age)]
    assert [leaving[n] for n in range(7) if sign[n]] == [0, 1, 1, 1, 1]


def test_a_window_that_grows_by_three_rows_a_step_is_refused():
    with pytest.raises(ValueError, match="at most two rows a step"):
        window_sum.correction(np.array([0, 0, 0, 3]))


def test_rows_are_rounded_to_a_grid_far_below_float32_attention():
    row = np.random.default_rng(8).random((1, 1, 1000)).astype(np.float32)
    kept = window_sum.on_grid(jnp.asarray(row), heads=12, rows=1000)
    np.testing.assert_array_equal(kept[row >= 2.0**-8], row[row >= 2.0**-8])
    np.testing.assert_allclose(kept, row, rtol=0, atol=2.0**-34)
