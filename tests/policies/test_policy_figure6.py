"""The worked example of the paper's Figure 6 (arXiv 2403.17312): five tokens, 40 % kept, so k = 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.policies import Dims, Swa
from tests import oracle

ROWS = np.zeros((5, 5))
ROWS[0, :1] = [1]
ROWS[1, :2] = [0.4, 0.6]
ROWS[2, :3] = [0.5, 0.3, 0.2]
ROWS[3, :4] = [0.2, 0.4, 0.1, 0.3]
ROWS[4, :5] = [0.05, 0.15, 0.25, 0.15, 0.4]
S, M = 7, 6
DIMS = Dims(B=1, N=1, K=1, S=S, M=M)
LENGTH = jnp.array([5], jnp.int32)
CASES = {"2k": {1, 4}, "k": {2, 4}}


def policy(window):
    return Swa(kv_sparsity=0.6, window=window, spare_slots=2)


@functools.cache
def observed(swa):
    return jax.jit(functools.partial(observe, swa))()


def observe(swa):
    """All five rows through `observe`, as dense rows: nothing is left out before the end. Slots run backwards."""
    stats = swa.init(DIMS)
    pos = jnp.full((1, 1, M), -1, jnp.int32)
    for n, row in enumerate(ROWS):
        slot = M - 1 - n
        pos = pos.at[0, 0, slot].set(n)
        padded = jnp.asarray(np.pad(row, (0, S - 5)), jnp.float32)[None, None]
        at = jnp.array([[slot]], jnp.int32)
        mass = jnp.where(pos >= 0, padded[0, 0][jnp.maximum(pos, 0)], jnp.float32(0))
        stats = swa.observe(stats, mass, pos, at, jnp.array([n], jnp.int32), None if n % 2 else (LENGTH > 0, padded))
    return stats, pos


def kept(mask):
    return set(np.flatnonzero(np.asarray(mask)[0, 0]).tolist())


@pytest.mark.parametrize("window", CASES)
def test_the_sums_are_the_printed_ones(window):
    stats, _ = observed(policy(window))
    want = {"2k": [0.25, 0.55, 0.35, 0.45, 0.4], "k": ROWS[4]}[window]
    np.testing.assert_allclose(stats.sums.hi[0, 0, :5], want, rtol=1e-6)


@pytest.mark.parametrize("window", CASES)
def test_select_keeps_the_printed_tokens(window):
    swa = policy(window)
    assert kept(jax.jit(swa.select, static_argnums=2)(observed(swa)[0], LENGTH, S)) == CASES[window]


@pytest.mark.parametrize("window", CASES)
def test_exchange_keeps_the_printed_tokens(window):
    swa = policy(window)
    stats, pos = observed(swa)
    bias = np.where(np.asarray(pos) >= 0, np.float32(0), np.float32(-np.inf))
    _, ex = jax.jit(swa.exchange, static_argnums=4)(stats, pos, bias, LENGTH, S)
    active = np.asarray(ex.bias)[0, 0] == 0
    assert set(np.asarray(ex.pos)[0, 0][active].tolist()) == CASES[window]
    assert not bool(ex.more)
    assert (np.asarray(ex.load_pos) == -1).all(), "all five tokens were resident"


@pytest.mark.parametrize("window", CASES)
def test_seeding_with_the_rows_keeps_the_printed_tokens(window):
    swa = policy(window)
    W = swa.seed_rows(S)
    rows = np.zeros((1, 1, W, S), np.float32)
    newest = ROWS[-min(W, 5) :]
    rows[0, 0, W - len(newest) :, :5] = newest
    _, pos = jax.jit(lambda rows: swa.seed(swa.init(DIMS), rows, LENGTH, DIMS))(rows)
    assert set(np.asarray(pos)[0, 0].tolist()) - {-1} == CASES[window]


@pytest.mark.parametrize("window", CASES)
def test_the_oracle_agrees_with_the_figure(window):
    assert oracle.Swa(kv_sparsity=0.6, window=window).keep(5, [row[None] for row in ROWS], 0) == CASES[window]
