"""KVMerger against a brute-force scan and float64 NumPy: sets, pivots, weights, budgets, and the attention that follows."""

import functools
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import attention
from alisa_jax.kv.state import LayerSpec
from alisa_jax.policies import Dense, Dims, Merge, merging, parse
from tests import oracle, replay

JIT = functools.partial(jax.jit, compiler_options=dict(replay.QUICK))


@functools.partial(JIT, static_argnums=(0, 5))
def compact(policy, k, v, mass, length, dims):
    """What the slots hold, and of each token its set and its weight there, [B, K, T]."""
    keys, rows = jnp.swapaxes(k, 1, 2), mass[..., : k.shape[1]]
    ids = policy.sets(keys, rows, length)
    w = merging.weights(keys, merging.pivots(rows, ids), ids, policy.sigma)
    return policy.compact(k, v, mass, length, dims), ids, w


def compacted(policy, k, v, mass, length, M=None, S=None):
    """As `compact`, k, v [B, T, K, H], in NumPy: packed slots, or slot = position with M = S."""
    B, T, K, H = k.shape
    S = S or T
    mass = np.pad(mass, ((0, 0), (0, 0), (0, S - T)))
    dims = Dims(B, K, K, S, M or S + 1, H)
    return jax.tree.map(np.asarray, compact(policy, k, v, mass, np.array(length, np.int32), dims))


def packed(*args, **more):
    return compacted(*args, **more)[0]


# The oracle: one sequence and head in Python and float64, written from the paper's steps.


def counts(policy, n):
    """Recent tokens, heavy tokens and the budget of a prompt of n tokens."""
    share = lambda x: oracle.nearest(n * oracle.exact(x))
    recent, allowed = min(share(policy.recent), n), n
    heavy = share(policy.heavy)
    if policy.share is not None:
        allowed = max(1, share(policy.share))
        recent = min(recent, allowed - 1)
        heavy = min(heavy, (allowed - recent - 1) // 2)
    return recent, min(heavy, n - recent), allowed


def guarded(policy, mass, n):
    recent, heavy, _ = counts(policy, n)
    ranked = sorted((i for i in range(n - recent) if not np.isnan(mass[i])), key=lambda i: (-mass[i], i))
    return {*ranked[:heavy], *range(n - recent, n)}


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return round(float(a @ b / size), 12) if size else 0.0


def scan(policy, k, mass, n):
    """The sets of k [T, H], ascending lists of positions, by the scan from the last token to the first."""
    kept, closed, current = guarded(policy, mass, n), [], [n - 1]
    pairs = {i: cosine(k[i], k[i + 1]) for i in range(n - 1) if i not in kept and i + 1 not in kept}
    threshold = policy.threshold
    if policy.share is not None:
        allowed = counts(policy, n)[2]
        levels = sorted(set(pairs.values()), reverse=True)
        few = lambda level: n - sum(c >= level - 1e-9 for c in pairs.values()) <= allowed
        threshold = next((level - 1e-9 for level in [2.0, *levels] if few(level)), None)
    for i in range(n - 2, -1, -1):
        if i in pairs and pairs[i] > threshold:
            current.append(i)
        else:
            closed.append(current)
            current = [i]
    return [sorted(one) for one in [*closed, current]][::-1]


def first_of_largest(mass, members):
    return max(members, key=lambda i: (-np.inf if np.isnan(mass[i]) else mass[i], -i))


def width(sigma, far):
    """sigma of a set whose members lie `far` from the pivot, a list in which the pivot's 0 is too."""
    if sigma == "mean_dist":
        return sum(far) / len(far) / math.sqrt(2)
    if sigma != "literal":
        return sigma
    x = 0.7
    for _ in range(2000):
        x = sum(math.exp(-d * d / (2 * x * x)) for d in far) / (math.sqrt(2) * len(far))
    return x


def merged(policy, k, v, mass, n):
    """[(position, key, value, bias)] of what remains of one head's prompt."""
    k, v, kept = np.asarray(k, np.float64), np.asarray(v, np.float64), []
    for members in scan(policy, k, mass, n):
        p, size = first_of_largest(mass, members), len(members)
        far = [float(np.linalg.norm(k[p] - k[i])) for i in members]
        sigma = width(policy.sigma, far)
        g = np.array([math.exp(-d * d / (2 * sigma * sigma)) if d else 1.0 for d in far])
        w = g / g.sum()
        value = w @ v[members] * (size if policy.value_mode == "paper" else 1)
        kept.append((p, w @ k[members], value, math.log(size) if policy.value_mode == "mean+logn" else 0.0))
    return kept


def drifting(seed, B, T, N, K, H):
    """As `replay.stream`, with keys that drift, so that neighbours are alike for a while and then are not."""
    rng = np.random.default_rng(seed)
    q, _, v = replay.stream(seed, B, T, N, K, H)
    k, new = rng.normal(size=(B, T, K, H)), rng.random((B, T, K, 1)) < 0.2
    for t in range(1, T):
        k[:, t] = np.where(new[:, t], 2 * k[:, t], k[:, t - 1] + 0.4 * k[:, t])
    return replay.Stream(q, k.astype(np.float32), v)


# Sets.

SMALL = (4, 23, 2, 3)  # B, T, K, H
POLICIES = tuple(
    parse(text)
    for text in (
        "merge",
        "merge(threshold=0.3,recent=0,heavy=0.3,sigma=mean_dist)",
        "merge(threshold=-1.5,recent=0.2,heavy=0.1)",
        "merge(share=0.3,recent=0.3,heavy=0.2)",
    )
)


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.sampled_from(POLICIES), st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 23)] * 4))
def test_sets_are_those_of_a_scan_from_the_last_token(policy, seed, length):
    """Keys of small whole numbers: many are equal, opposite or of length 0. Mass has ties, and some is not a number."""
    B, T, K, H = SMALL
    rng = np.random.default_rng(seed)
    k = rng.integers(-1, 2, SMALL).astype(np.float32)
    k = np.where(rng.random((B, T, K, 1)) < 0.4, np.roll(k, 1, axis=1), k)
    mass = rng.integers(0, 6, (B, K, T)).astype(np.float32)
    mass[rng.random((B, K, T)) < 0.1] = np.nan
    got, ids, w = compacted(policy, k, k, mass, length)
    for b, p in np.ndindex(B, K):
        n = length[b]
        sets = [np.flatnonzero(ids[b, p, :n] == i).tolist() for i in np.unique(ids[b, p, :n])]
        assert sets == scan(policy, k[b, :, p], mass[b, p], n)
        # What follows from the scan, by itself: a partition into runs, and protected tokens are alone.
        assert [i for s in sets for i in s] == list(range(n)) and all(s == list(range(s[0], s[-1] + 1)) for s in sets)
        assert all([i] in sets for i in guarded(policy, mass[b, p], n))
        there = got.pos[b, p] >= 0
        assert there.sum() == len(sets) and there[: len(sets)].all() and len(sets) <= counts(policy, n)[2]
        assert got.pos[b, p, there].tolist() == [first_of_largest(mass[b, p], s) for s in sets]
        np.testing.assert_allclose(np.exp(got.bias[b, p, there]), [len(s) for s in sets], rtol=1e-6)
        assert (got.bias[b, p, ~there] == -np.inf).all() and (got.pos[b, p, ~there] == -1).all()
        np.testing.assert_allclose([w[b, p, s].sum() for s in sets], 1, atol=1e-6)


def random_prompt(seed, B=3, T=64, K=2, H=5):
    _, k, v = drifting(seed, B, T, K, K, H)
    return k, v, np.random.default_rng(seed).random((B, K, T)).astype(np.float32)


def sets_of(policies, k, mass, length):
    """The sets [B, K, T] of k [B, T, K, H] under each policy."""
    run = JIT(lambda *args: [policy.sets(*args) for policy in policies])
    return [np.asarray(ids) for ids in run(np.swapaxes(k, 1, 2), mass, np.array(length, np.int32))]


def remaining(ids, length):
    """[B][K]: the number of sets of each prompt."""
    return [[len(np.unique(head[:n])) for head in ids[b]] for b, n in enumerate(length)]


def test_above_one_nothing_merges_and_the_output_is_dense():
    tokens = drifting(34, *SIZES[4])
    merge, dense = (decoded(policy, "working_set", tokens) for policy in (Merge(threshold=1.5), Dense()))
    np.testing.assert_array_equal(merge[0], dense[0])
    for name in ("k", "v", "pos", "bias"):
        one, other = (np.asarray(getattr(run[2].ws, name)) for run in (merge, dense))
        there = np.broadcast_to(np.asarray(dense[2].ws.pos) >= 0, one.shape[:3])
        np.testing.assert_array_equal(one[there], np.broadcast_to(other, one.shape)[there])


def test_below_minus_one_every_unprotected_run_is_one_set():
    """Heavy tokens at 5, 6 and 30 of 50, 10 recent ones: runs 0-4, 7-29 and 31-39."""
    k, _, mass = random_prompt(3, B=1, T=50)
    mass[..., [5, 6, 30]] = 9
    ids = sets_of((Merge(threshold=-1.5, recent=0.2, heavy=0.06),), k, mass, (50,))[0]
    assert [np.bincount(head).tolist() for head in ids[0]] == [[5, 1, 1, 23, 1, 9, *[1] * 10]] * 2


def test_fewer_tokens_remain_as_the_threshold_falls():
    k, _, mass = random_prompt(4)
    policies, length = [Merge(threshold=x) for x in (1.0, 0.95, 0.75, 0.5, 0.2, -0.3, -1.5)], (64, 50, 33)
    kept = [remaining(ids, length) for ids in sets_of(policies, k, mass, length)]
    assert (np.diff(kept, axis=0) <= 0).all() and (np.array(kept[0]) == np.array(length)[:, None]).all()
    assert (np.array(kept[2]) < kept[0]).all() and (np.array(kept[-1]) < kept[2]).all()


def test_a_budget_is_met_and_never_exceeded():
    """Prompts of 1 to 64 tokens whose cosines all differ: exactly round(n share) remain."""
    shares, length = ("0.05", "0.35", "0.5", "1"), np.arange(1, 65)
    policies = [parse(f"merge(share={share})") for share in shares]
    k, _, mass = random_prompt(5, B=64, K=1)
    want = [[max(1, oracle.nearest(Fraction(share) * int(n))) for n in length] for share in shares]
    for policy, ids, count in zip(policies, sets_of(policies, k, mass, length), want, strict=True):
        assert np.array(remaining(ids, length))[:, 0].tolist() == count
        assert policy.prompt_capacity(64) == count[-1] == max(count)


def test_slots_for_a_budget_hold_every_token():
    """Where all keys are equal a set is a run between protected tokens: as near as the sets allow, from below."""
    policy, length = Merge(share=0.35), np.arange(1, 65)
    k, v, mass = random_prompt(5, B=64, K=1)
    for keys in (k, np.ones_like(k)):
        out = packed(policy, keys, v, mass, length, M=policy.prompt_capacity(64), S=65)
        assert ((out.pos >= 0).sum(-1)[:, 0] <= policy.counts(64)[2][length]).all()
        np.testing.assert_allclose(np.exp(out.bias).sum(-1)[:, 0], length, rtol=1e-5)


def test_without_a_budget_a_prompt_may_keep_every_slot():
    assert (Merge().prompt_capacity(96), Merge().capacity(96), Merge(share=0.25).capacity(96)) == (96, 96, 96)


# Pivots, weights and values.


def test_identical_keys_merge_without_error_and_only_with_the_bias():
    """32 keys, each 1 to 7 times in a row: the values of a set must count as often as its members.

    The paper's |S| in the value has nothing in the softmax to divide it: three times the output is error.
    """
    rng = np.random.default_rng(0)
    k = np.repeat(rng.normal(size=(32, 64)), rng.integers(1, 8, 32), axis=0)
    v, q = rng.normal(size=(len(k), 64)), rng.normal(size=64)
    allowed = np.ones((1, len(k)), bool)
    full, _ = oracle.attention(q[None], k[:, None], v[:, None], allowed)
    keys, values = (x[None, :, None].astype(np.float32) for x in (k, v))
    mass, length, dims = np.ones((1, 1, len(k)), np.float32), np.array([len(k)]), Dims(1, 1, 1, len(k), 40, 64)
    policies = {mode: Merge(recent=0, heavy=0, value_mode=mode) for mode in ("mean+logn", "mean", "paper")}
    run = JIT(lambda *args: {mode: policy.compact(*args, dims) for mode, policy in policies.items()})
    errors = {}
    for mode, out in run(keys, values, mass, length).items():
        out = jax.tree.map(np.asarray, out)
        assert (out.pos >= 0).sum() == 32
        z = out.k[0, 0, :32].astype(np.float64) @ q / 8 + out.bias[0, 0, :32]
        weight = np.exp(z - z.max())
        got = weight / weight.sum() @ out.v[0, 0, :32]
        errors[mode] = np.linalg.norm(got - full[0]) / np.linalg.norm(full[0])
    assert errors["mean+logn"] < 1e-5
    assert errors["mean"] == pytest.approx(0.63, abs=0.01)
    assert errors["paper"] == pytest.approx(3.0, abs=0.01)


@functools.partial(JIT, static_argnums=1)
def weights(k, sigma):
    """Of one set whose first token is the pivot; k [1, 1, T, H]."""
    ids = jnp.zeros(k.shape[:3], jnp.int32)
    return merging.weights(k, ids, ids, sigma)[0, 0]


def five(d, sigma):
    """The weights of a pivot and four tokens that are d away from it."""
    k = np.zeros((1, 1, 5, 4), np.float32)
    k[0, 0, 1:] = d * np.eye(4)
    return np.asarray(weights(k, sigma), np.float64)


@pytest.mark.parametrize("d, sigma, pivot", [(0.1, 0.701, 0.20), (0.5, 0.419, 0.34), (1, 0.141, 1.00)])
def test_the_printed_sigma_collapses_once_keys_are_one_apart(d, sigma, pivot):
    w = five(d, "literal")
    assert w[0] == pytest.approx(pivot, abs=5e-3) and w.sum() == pytest.approx(1, abs=1e-6)
    assert d / math.sqrt(-2 * math.log(w[1] / w[0])) == pytest.approx(sigma, abs=1e-3)


def test_a_sigma_of_five_still_averages_keys_five_apart():
    assert five(5, 5.0)[0] == pytest.approx(0.29, abs=5e-3) and five(10, 5.0)[0] == pytest.approx(0.65, abs=5e-3)


def test_the_mean_distance_weighs_alike_at_every_scale():
    far = 0.8 / math.sqrt(2)  # of 1: four of the five are 1 away
    want = 1 / (1 + 4 * math.exp(-1 / (2 * far**2)))
    assert [five(d, "mean_dist")[0] for d in (1e-3, 1, 1e3)] == pytest.approx([want] * 3, rel=1e-4)
    np.testing.assert_allclose(five(0, "mean_dist"), 0.2, rtol=1e-6)


def test_mass_that_is_not_a_number_makes_no_pivot():
    k, v, mass = np.ones((1, 6, 1, 2), np.float32), np.ones((1, 6, 1, 2), np.float32), np.ones((1, 1, 6), np.float32)
    mass[0, 0] = [np.nan, 1, 5, np.nan, 5, 2]
    none = dict(recent=0.0, heavy=0.0)
    assert packed(Merge(**none), k, v, mass, [6]).pos[0, 0].tolist() == [2, *[-1] * 6]
    assert packed(Merge(**none), k, v, np.full_like(mass, np.nan), [6]).pos[0, 0].tolist() == [0, *[-1] * 6]


def test_padding_never_merges_whatever_it_holds():
    k, v, mass = random_prompt(6)
    length = [40, 1, 0]
    clean = packed(Merge(), k, v, mass, length, M=80, S=80)
    for rubbish in (np.nan, np.inf, 1e30):
        dirty = [x.copy() for x in (k, v, mass)]
        for b, n in enumerate(length):
            dirty[0][b, n:], dirty[1][b, n:], dirty[2][b, :, n:] = rubbish, rubbish, rubbish
        if 0 < length[0]:
            dirty[0][0, 40:] = k[0, 39] if rubbish == np.inf else rubbish  # even the twin of the last token
        for one, other in zip(clean, packed(Merge(), *dirty, length, M=80, S=80), strict=True):
            np.testing.assert_array_equal(one, other)
    assert (clean.pos[2] == -1).all() and (clean.pos[1, :, 0] == 0).all() and (clean.pos[1, :, 1:] == -1).all()


def test_slots_are_positions_or_packed_in_the_same_order():
    k, v, mass = random_prompt(7)
    apart, together = (packed(Merge(), k, v, mass, [64, 50, 3], M, S=80) for M in (80, 66))
    for b, p in np.ndindex(3, 2):
        here = np.flatnonzero(apart.pos[b, p] >= 0)
        assert here.tolist() == apart.pos[b, p, here].tolist() and len(here) < 64
        for one, other in zip(apart, together, strict=True):
            np.testing.assert_array_equal(one[b, p, here], other[b, p, : len(here)])
        assert (together.pos[b, p, len(here) :] == -1).all()


def test_a_token_alone_keeps_its_bits_in_bfloat16():
    k, v, mass = random_prompt(8)
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in (k, v))
    out = compact(Merge(), k, v, mass, np.full(3, 64), Dims(3, 2, 2, 64, 64, 5))[0]
    assert out.k.dtype == out.v.dtype == jnp.bfloat16 and out.bias.dtype == jnp.float32
    alone = np.asarray((out.bias == 0) & (out.pos >= 0))
    for got, want in ((out.k, k), (out.v, v)):
        np.testing.assert_array_equal(np.asarray(got)[alone], np.asarray(jnp.swapaxes(want, 1, 2))[alone])
    assert 0 < alone.sum() < 3 * 2 * 64


# The attention that follows.

T, PADDED, STEPS, STARTS = 128, 64, 60, (64, 37, 8)
SIZES = {1: (3, T, 2, 2, 5), 4: (3, T, 4, 1, 5)}  # B, T, N, K, H by G


@JIT
def prompt_and_steps(state, prompt, length, later):
    """Later tokens [STEPS, B, ...] after a prompt: outputs and tokens attended by step, and the last state."""

    def step(state, token):
        out, state, taps = attention.step(state, *token)
        return state, (out, taps.attended)

    _, state = attention.prefill(state, *prompt, length)
    state, (out, attended) = jax.lax.scan(step, state, later)
    return jnp.swapaxes(out, 0, 1), jnp.swapaxes(attended, 0, 1), state


def decoded(policy, route, tokens):
    """`prompt_and_steps` on prompts of STARTS tokens, with a working set of the size that an engine gives it."""
    (B, T, N, H), K = tokens.q.shape, tokens.k.shape[2]
    spec = LayerSpec(policy, replay.CODEC, route)
    dims = attention.prompt_dims(attention.dims_of(spec, B, N, K, T, H), spec, STEPS)
    state = attention.init(spec, dims, H)
    at = np.array(STARTS)[:, None] + np.arange(STEPS)
    later = [np.swapaxes(np.take_along_axis(x, at[..., None, None], axis=1), 0, 1) for x in tokens]
    with jax.default_matmul_precision("highest"):
        out = prompt_and_steps(state, [x[:, :PADDED] for x in tokens], np.array(STARTS, np.int32), later)
    return np.asarray(out[0]), np.asarray(out[1]), out[2]


def expected(policy, tokens, b):
    """The outputs of sequence b [STEPS, N, H] and its tokens attended in each step, by the oracle."""
    q, k, v = (x[b].astype(np.float64) for x in tokens)
    (_, N, H), K, n = q.shape, k.shape[1], STARTS[b]
    mass = oracle.shared(oracle.causal(q[:n], k[:n], v[:n])[1].sum(axis=0), K)
    heads = [merged(policy, k[:, p], v[:, p], mass[p], n) for p in range(K)]
    out, attended = np.zeros((STEPS, N, H)), np.zeros(STEPS)
    for step in range(STEPS):
        at = n + step
        for p, kept in enumerate(heads):
            kept.append((at, k[at, p], v[at, p], 0.0))
            keys, values, bias = (np.array([x[i] for x in kept]) for i in (1, 2, 3))
            for head in range(p * N // K, (p + 1) * N // K):
                z = keys @ q[at, head] / math.sqrt(H) + bias
                e = np.exp(z - z.max())
                out[step, head] = e / e.sum() @ values
        attended[step] = np.mean([len(kept) for kept in heads])
    return out, attended


@pytest.mark.parametrize(
    ("text", "G", "route"),
    [
        ("merge", 1, "masked"),
        ("merge", 4, "working_set"),
        ("merge(share=0.4,sigma=mean_dist,value_mode=paper)", 1, "working_set"),
        ("merge(threshold=0.9,recent=0.08,heavy=0.02,sigma=literal,value_mode=mean)", 4, "masked"),
    ],
)
def test_60_steps_after_a_merged_prompt_are_those_of_numpy(text, G, route):
    policy, tokens = parse(text), drifting(30 + G, *SIZES[G])
    out, attended, state = decoded(policy, route, tokens)
    for b in range(3):
        want, sizes = expected(policy, tokens, b)
        np.testing.assert_allclose(attended[b], sizes, rtol=1e-6)
        np.testing.assert_allclose(out[b], want, atol=2e-5)
    assert attended[0, -1] < 0.8 * (64 + STEPS)  # much was merged
    slots = state.ws.pos.shape[-1]
    assert slots == (T if route == "masked" or policy.share is None else policy.prompt_capacity(T) + STEPS)


@pytest.mark.parametrize(("G", "route"), [(1, "masked"), (4, "working_set")])
def test_prompts_that_repeat_their_keys_are_attended_as_if_dense(G, route):
    tokens = drifting(40, *SIZES[G])
    k = tokens.k[:, ::4].copy()
    for t in range(1, k.shape[1]):  # no two different neighbours are alike
        k[:, t] *= np.where((k[:, t] * k[:, t - 1]).sum(-1, keepdims=True) > 0, -1, 1)
    tokens = tokens._replace(k=np.repeat(k, 4, axis=1))
    out, attended, _ = decoded(Merge(), route, tokens)
    for b in range(3):
        dense, all_of_them = expected(Merge(threshold=2.0), tokens, b)
        np.testing.assert_allclose(out[b], dense, atol=1e-5)
        assert (attended[b] < all_of_them).all()
    assert (attended[0] < np.arange(65, 65 + STEPS) - 20).all()


def test_from_an_empty_cache_nothing_merges():
    run = replay.shared_run(Merge(), "working_set", "empty")
    assert (run.attended == np.arange(1, replay.T + 1)).all()


def test_the_first_layers_can_stay_dense():
    policy = parse("merge(dense_layers=2,share=0.5)")
    assert [policy.for_layer(i) for i in range(4)] == [Dense(), Dense(), policy, policy]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("merge(threshold=inf)", "threshold must be a finite number, 1 to merge nothing; got inf"),
        ("merge(recent=-0.1)", "at least 0 and at most 1 together; got recent=-0.1 and heavy=0.12"),
        ("merge(recent=0.9,heavy=0.2)", "got recent=0.9 and heavy=0.2"),
        ("merge(sigma=0)", 'sigma must be a number above 0, "mean_dist" or "literal"; got 0'),
        ("merge(sigma=wide)", "got 'wide'"),
        ("merge(value_mode=sum)", 'value_mode must be "mean+logn", "mean" or "paper"; got \'sum\''),
        ("merge(share=0)", "share must be above 0 and at most 1; got 0"),
        ("merge(share=0.5,threshold=0.8)", "give either threshold or share; got threshold=0.8 and share=0.5"),
        ("merge(dense_layers=-1)", "dense_layers must be at least 0; got -1"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(text, sentence):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert sentence in str(error.value) and "\n" not in str(error.value)
