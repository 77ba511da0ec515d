"""StreamingLLM and H2O against NumPy over 300 steps, and what their papers promise of them."""

import functools

import jax
import numpy as np
import pytest

from alisa_jax.kv.state import tree_bytes
from alisa_jax.policies import H2O, Local, Streaming, parse
from tests import oracle, replay

H, T = 5, 320
GROUPS = {1: (2, 2), 4: (4, 1)}  # G: query heads, kv heads
STARTS = {"empty": None, "prompt": (17,)}


@functools.cache
def tokens(G):
    return replay.stream(50 + G, 1, T, *GROUPS[G], H)


@functools.cache
def run(policy, G, start="empty", route="working_set"):
    return replay.run(policy, route, tokens(G), (T,), STARTS[start], padded=32)


def streaming_keeps(policy, n):
    """Positions below n that the query at n attends; r of it as a decimal fraction, halves up."""
    kept = policy.tokens or oracle.nearest(n * (1 - oracle.exact(policy.kv_sparsity)))
    window = max(1, kept - policy.sinks)
    return set(range(min(policy.sinks, n))) | set(range(max(0, n - window), n))


def h2o_counts(policy, n):
    if policy.kv_sparsity is None:
        return policy.heavy, policy.recent
    kept = max(1, oracle.nearest(n * (1 - oracle.exact(policy.kv_sparsity))))
    return kept // 2, (kept + 1) // 2


@functools.cache
def h2o(policy, G, start):
    """Sets of each step and head, outputs, and the sums that the last step left, by kv head and position."""
    (N, K), (q, k, v) = GROUPS[G], (x[0] for x in tokens(G))
    first = STARTS[start][0] if STARTS[start] else 0
    mass, alive = [{} for _ in range(K)], [set(range(first)) for _ in range(K)]
    if first:
        paid = oracle.causal(q[:first], k[:first], v[:first])[1].sum(axis=0)  # [N, first]
        mass = [dict(enumerate(oracle.shared(paid, K)[p])) for p in range(K)]
    outs, sets = [], []
    for n in range(first, T):
        heavy, recent = h2o_counts(policy, n)
        for p in range(K):
            rank = lambda i, n=n, p=p: mass[p][i] / (max(n - i, 1) if policy.normalise == "age" else 1)
            old = sorted((i for i in alive[p] if i < n - recent), key=lambda i: (-rank(i), i))
            alive[p] -= set(old[heavy:])
            alive[p].add(n)
            mass[p][n] = 0.0
        allowed = np.array([[i in alive[head * K // N] for i in range(T)] for head in range(N)])
        out, weights = oracle.attention(q[n], k, v, allowed)
        for p in range(K):
            for i in alive[p]:
                mass[p][i] += oracle.shared(weights, K)[p, i]
        outs.append(out)
        sets.append([set(a) for a in alive])
    return sets, np.stack(outs), mass


STREAMING = ("streaming(sinks=4,tokens=19)", "streaming(sinks=3,kv_sparsity=0.8)")
HEAVY = ("h2o(heavy=6,recent=5)", "h2o(kv_sparsity=0.8)", "h2o(heavy=4,recent=3,normalise=age)")


@pytest.mark.parametrize("G", GROUPS)
@pytest.mark.parametrize("text", STREAMING)
def test_streaming_keeps_sinks_and_window_over_300_steps(text, G):
    policy = parse(text)
    got = run(policy, G)
    assert [step[0] for step in got.sets[0]] == [streaming_keeps(policy, n) | {n} for n in range(T)]
    K, (q, k, v) = GROUPS[G][1], (x[0] for x in tokens(G))
    for n in range(0, T, 13):
        allowed = np.isin(np.arange(T), list(got.sets[0][n][0]))
        want, _ = oracle.attention(q[n], k, v, np.broadcast_to(allowed, (GROUPS[G][0], T)))
        np.testing.assert_allclose(got.out[0, n], want, atol=1e-5)
    assert K == got.state.ws.k.shape[1]


@pytest.mark.parametrize("G, start", [(1, "prompt"), (4, "empty"), (4, "prompt")])
@pytest.mark.parametrize("text", HEAVY)
def test_h2o_keeps_what_numpy_keeps_over_300_steps(text, G, start):
    policy = parse(text)
    got, (sets, outs, mass) = run(policy, G, start), h2o(policy, G, start)
    steps = len(got.sets[0])
    assert steps >= 300 and got.sets[0] == sets[:steps]
    np.testing.assert_allclose(got.out[0], outs[:steps], atol=1e-5)
    # Conservation: what a slot has summed is the attention that its token got since it came.
    pos, stats = np.asarray(got.state.ws.pos)[0], np.asarray(got.state.stats)[0]
    assert all(len(set(p[p >= 0])) == (p >= 0).sum() for p in pos)
    for p, m in np.argwhere(pos >= 0):
        np.testing.assert_allclose(stats[p, m], mass[p][pos[p, m]], rtol=1e-4)


def test_without_heavy_hitters_h2o_is_a_local_window_and_without_a_window_it_still_runs():
    window, local = run(H2O(heavy=0, recent=9), 4), run(Local(tokens=9), 4)
    assert window.sets == local.sets
    np.testing.assert_array_equal(window.out, local.out)
    only = run(H2O(heavy=9, recent=0), 4)
    assert {len(step[0]) for step in only.sets[0][20:]} == {10}


def test_without_sinks_streaming_is_a_local_window():
    ours, local = run(Streaming(sinks=0, tokens=9), 4), run(Local(tokens=9), 4)
    assert ours.sets == local.sets
    np.testing.assert_array_equal(ours.out, local.out)


@pytest.mark.parametrize("policy", [H2O(heavy=200, recent=120), Streaming(tokens=320)])
def test_a_budget_that_holds_everything_is_dense(policy):
    got = run(policy, 4)
    assert all(step[0] == set(range(n + 1)) for n, step in enumerate(got.sets[0]))


def test_memory_does_not_grow_with_the_stream():
    for policy in (parse(STREAMING[0]), parse(HEAVY[0])):
        sizes = {S: tree_bytes(jax.eval_shape(lambda S=S, policy=policy: _empty(policy, S))) for S in (64, 320, 4096)}
        assert len(set(sizes.values())) == 1, sizes


def _empty(policy, S):
    from alisa_jax import attention

    dims = attention.dims_of(policy, "working_set", 1, 4, 2, S)
    return attention.init(policy, replay.CODEC, "working_set", dims, H)


def test_a_planted_heavy_hitter_stays_and_a_local_window_loses_it():
    """One key that every query is aligned with, at position 3."""
    q, k, v = (x.copy() for x in tokens(4))
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, 3, :, 0] = 6.0
    for policy, stays in ((H2O(heavy=4, recent=4), True), (Local(tokens=8), False)):
        got = replay.run(policy, "working_set", (q, k, v), (64,), None, padded=32)
        assert (3 in got.sets[0][63][0]) == stays


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("h2o(heavy=3)", "give either kv_sparsity, or heavy and recent; got kv_sparsity=None, heavy=3 and recent=None"),
        ("h2o(kv_sparsity=0.5,recent=3)", "got kv_sparsity=0.5, heavy=None and recent=3"),
        ("h2o(heavy=0,recent=0)", "one of them more; got heavy=0 and recent=0"),
        ("h2o(kv_sparsity=0.5,normalise=mean)", 'normalise must be "none" or "age"; got \'mean\''),
        ("streaming(tokens=4)", "tokens counts the sinks and must be more than sinks=4; got 4"),
        ("streaming(sinks=-1,tokens=9)", "sinks must be at least 0; got -1"),
        ("streaming()", "give either kv_sparsity or tokens"),
    ],
)
def test_a_wrong_budget_is_told_in_one_sentence(text, sentence):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert sentence in str(error.value) and "\n" not in str(error.value)
