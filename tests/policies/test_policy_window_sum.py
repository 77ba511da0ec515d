"""Window sums against explicit float64 sums of explicit rows."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.policies import Swa, window_sum

HEADS = 5
push = jax.jit(window_sum.push, static_argnums=3)


class Table(tuple):
    """A hashable table of widths, for a static argument."""

    def __array__(self, dtype=None, copy=None):
        return np.array(tuple(self), dtype)


class Reference:
    """Every row of every sequence, kept; sums formed anew over the window."""

    def __init__(self, B, P):
        self.rows = [[] for _ in range(B)]
        self.P = P

    def push(self, row, on=None):
        for b, rows in enumerate(self.rows):
            rows.append(np.asarray(row[b], np.float64))

    def sums(self, b, width, S):
        rows = self.rows[b][len(self.rows[b]) - width :]
        total = np.zeros((self.P, S))
        for row in rows:
            total[:, : row.shape[-1]] += row
        return total


def some_rows(rng, B, P, S, length, sparse):
    """Attention rows summed over HEADS heads: causal, of very different sizes, most of them 0 where `sparse`."""
    row = rng.random((B, P, S)) ** rng.choice([1, 8, 40])
    if sparse:
        row *= rng.random((B, P, S)) < 0.3
    row *= np.arange(S) <= np.asarray(length)[:, None, None]
    row[:, :, 0] += 1e-3
    return (row * HEADS / row.sum(-1, keepdims=True)).astype(np.float32)


def widths_of(window, r, S):
    return Table(Swa(kv_sparsity=round(1 - r, 12), window=window).counts(S).width.tolist())


@pytest.mark.parametrize("window, r", [("k", 0.2), ("k", 1.0), ("2k", 0.2), ("2k", 0.9), ("2k", 1.0), (7, 0.5)])
def test_sums_equal_explicit_windows_for_hundreds_of_ragged_steps_and_growing_buckets(window, r):
    B, P, start = 2, 2, [0, 11]
    rng = np.random.default_rng(hash((str(window), r)) % 2**32)
    S = 32
    widths = widths_of(window, r, S)
    sums = window_sum.empty(B, P, S, max(widths) + 2, HEADS)
    reference = Reference(B, P)
    reference.rows[1] = [np.zeros((P, S))] * start[1]
    for step, buckets in zip(range(260), itertools.count()):
        length = np.array(start) + step
        if length.max() == S:
            S = {32: 96, 96: 288}[S]
            widths = widths_of(window, r, S)
            sums = window_sum.grow(sums, S, max(widths) + 2)
        row = some_rows(rng, B, P, S, length, sparse=step % 3 > 0)
        reference.push(row)
        sums = push(sums, jnp.asarray(row), jnp.asarray(length, jnp.int32), widths)
        for b in range(B):
            n = int(length[b]) + 1
            want = reference.sums(b, widths[n], S)
            got = np.asarray(sums.hi[b], np.float64) + np.asarray(sums.lo[b], np.float64)
            rounded = widths[n] * 2.0**-36 * HEADS
            np.testing.assert_allclose(got, want, rtol=0, atol=rounded)
            np.testing.assert_allclose(sums.hi[b], want, rtol=1e-7, atol=rounded)
            assert (np.asarray(sums.hi[b])[want == 0] == 0).all(), "rows that have left must leave exactly 0"
    assert S == 288
