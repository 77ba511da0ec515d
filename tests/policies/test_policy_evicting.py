"""The seams for policies that evict per head: P = K, slots used again, statistics that start anew."""

import functools

import numpy as np
import pytest

from tests import oracle, replay
from tests.policies.evicting import HeavyHitters

B, N, K, H, T = 2, 6, 3, 5, 64
POLICY = HeavyHitters()
STREAM = replay.stream(41, B, T, N, K, H)
STARTS = {"empty": None, "prompt": (5, 31)}


@functools.cache
def expected(start):
    """H2O in NumPy: per sequence and kv head the alive tokens and their sums of attention."""
    outs, sets = [], []
    for b in range(B):
        q, k, v = (x[b] for x in STREAM)
        first = STARTS[start][b] if STARTS[start] else 0
        dense = oracle.causal(q[: first or 1], k[: first or 1], v[: first or 1])[1]
        mass = [dict(enumerate(oracle.shared(dense.sum(axis=0), K)[p][:first])) for p in range(K)]
        alive = [set(range(first)) for _ in range(K)]
        outs.append([]), sets.append([])
        for n in range(first, T):
            for p in range(K):  # the set for the query at n
                old = [i for i in alive[p] if i < n - POLICY.recent]
                alive[p] -= set(sorted(old, key=lambda i: (-mass[p][i], i))[POLICY.heavy :])
                alive[p].add(n)
                mass[p][n] = 0.0
            allowed = np.array([[i in alive[head * K // N] for i in range(T)] for head in range(N)])
            out, weights = oracle.attention(q[n], k, v, allowed)
            for p in range(K):
                for i in alive[p]:
                    mass[p][i] += oracle.shared(weights, K)[p, i]
            outs[-1].append(out)
            sets[-1].append([set(a) for a in alive])
    return outs, sets


@functools.cache
def run(route, start, policy=POLICY):
    buckets = (32, 64)  # on the masked route slots and sums grow with the context, in the working set they do not
    return replay.run(policy, route, STREAM, buckets, STARTS[start], padded=32)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("route", POLICY.routes)
def test_each_head_keeps_and_attends_what_h2o_keeps(route, start):
    got = run(route, start)
    outs, sets = expected(start)
    for b in range(B):
        steps = len(got.sets[b])
        assert got.sets[b] == sets[b][:steps]
        np.testing.assert_allclose(got.out[b], np.stack(outs[b])[:steps], atol=1e-5)
    heads = [frozenset(map(frozenset, s)) for s in got.sets[0][-10:]]
    assert any(len(h) > 1 for h in heads), "the heads must differ for P = K to be proved"


@pytest.mark.parametrize("start", STARTS)
def test_the_working_set_equals_the_masked_reference(start):
    a, b = run("working_set", start), run("masked", start)
    assert a.sets == b.sets
    np.testing.assert_allclose(a.out, b.out, atol=1e-5)


def test_slots_are_used_again_and_the_budget_is_never_exceeded():
    state = run("working_set", "empty").state
    assert state.store is None, "nothing that was evicted is kept anywhere"
    assert state.ws.pos.shape == (B, K, POLICY.heavy + POLICY.recent + 1)
    held = (np.asarray(state.ws.pos) >= 0).sum(-1)
    assert (held == POLICY.heavy + POLICY.recent).all(), "one slot is free for the next token"
    sizes = {len(s) for per_step in run("working_set", "empty").sets for step in per_step[20:] for s in step}
    assert sizes == {POLICY.heavy + POLICY.recent + 1}


def test_without_a_reset_the_sums_of_evicted_tokens_would_change_the_sets():
    wrong = run("working_set", "empty", HeavyHitters(resets=False))
    assert wrong.sets[0] != expected("empty")[1][0], "the test could not see a missing reset"
    right = run("masked", "empty", HeavyHitters(resets=False))
    assert right.sets == expected("empty")[1], "slot = position never meets an old sum"
