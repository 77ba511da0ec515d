"""`Engine.score` on a trained model: decoding, one masked pass and every route give one set of numbers."""

import functools

import numpy as np
import pytest

from alisa_jax.kv.buckets import bucket

pytestmark = pytest.mark.slow

LENGTHS = (151, 130, 77, 23)
SWA = "swa(kv_sparsity=0.6)"
# Dropped tokens come back through the store, a few of them at once.
RETURNING = "swa(tokens=21,shared_heads=false,local_frac=0.25,window=4,refresh_every=7,spare_slots=0)"
POLICIES = {  # policy: how many of the model's 5 layers it is tried on
    "dense": 5,
    "local(kv_sparsity=0.6)": 2,
    "strided(kv_sparsity=0.6)": 2,
    "strided(kv_sparsity=0.6,anchor=query)": 2,
    SWA: 2,
    "swa(kv_sparsity=0.6,window=2k,dense_layers=1)": 2,
    RETURNING: 2,
    "swa(kv_sparsity=0.6,decay=0.9)": 2,
    "swa(kv_sparsity=0.6,refresh_every=7)": 2,
}


@pytest.fixture(scope="module")
def windows(story_ids):
    """A ragged batch of texts."""
    return [s[:n] for s, n in zip(story_ids, LENGTHS)]


@pytest.fixture(scope="module")
def score(engine, windows):
    """`score(policy, route="auto", layers=5)`: the windows decoded token by token."""

    @functools.cache
    def get(policy, route, layers):
        return engine(policy, route, layers).score(windows, "decode")

    return lambda policy, route="auto", layers=5: get(policy, route, layers)


def mean_difference(a, b):
    """Mean absolute difference of log-probabilities in nats per token."""
    return float(np.abs(np.concatenate(a.logprobs) - np.concatenate(b.logprobs)).mean())


@pytest.mark.full(sample=4)
@pytest.mark.parametrize("policy, layers", POLICIES.items())
def test_decode_and_prefill_mask_give_the_same_logprobs(score, engine, windows, policy, layers):
    decoded = score(policy, layers=layers)
    masked = engine(policy, layers=layers).score(windows, "prefill_mask")
    assert [len(row) for row in decoded.logprobs] == [n - 1 for n in LENGTHS]
    assert mean_difference(decoded, masked) <= 1e-4
    assert max(np.abs(a - b).max() for a, b in zip(decoded.logprobs, masked.logprobs)) <= 1e-3
    np.testing.assert_allclose(decoded.attended_frac, masked.attended_frac, rtol=1e-5)
    agree = np.concatenate(decoded.correct) == np.concatenate(masked.correct)
    assert agree.mean() > 0.99  # near-ties may fall either way


@pytest.mark.full(sample=4)
@pytest.mark.parametrize("policy, layers", list(POLICIES.items())[1:])
def test_a_sparse_policy_is_not_dense(score, policy, layers):
    assert mean_difference(score(policy, layers=layers), score("dense", layers=layers)) > 1e-3


def test_tokens_return_from_the_store(score):
    loads = score(RETURNING, layers=2).loads_per_token
    assert (loads > 0.1).all()  # rows per token, over 4 kv heads
    np.testing.assert_array_equal(score("dense").loads_per_token, np.zeros(5))


@pytest.mark.parametrize("policy", [SWA, "local(kv_sparsity=0.6)"])
@pytest.mark.parametrize("route", ["indexed", "masked"])
def test_every_route_gives_the_logprobs_of_the_working_set(score, policy, route):
    fast, other = (score(policy, r, layers=2) for r in ("auto", route))
    assert fast.implementation == "xla:working_set"
    assert other.implementation == f"xla:{route}"
    assert mean_difference(fast, other) <= 1e-4
    np.testing.assert_allclose(fast.attended_frac, other.attended_frac, rtol=1e-5)


def test_a_query_anchored_comb_gives_the_same_by_index_and_by_mask(score):
    policy = "strided(kv_sparsity=0.6,anchor=query)"
    assert mean_difference(score(policy, "indexed", 2), score(policy, "masked", 2)) <= 1e-4


def test_scoring_again_gives_the_same_bits(score, engine, windows):
    first = score(SWA, layers=2)
    again = engine(SWA, layers=2).score(windows, "decode")
    assert again.compiles == 0
    for a, b in zip(first.logprobs, again.logprobs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_swa_without_sparsity_is_dense(score):
    scores = score("swa(kv_sparsity=0)", layers=2)
    assert mean_difference(scores, score("dense", layers=2)) <= 1e-5
    np.testing.assert_array_equal(scores.attended_frac, np.ones(2, np.float32))


def half_up(x):
    return int(x + 0.5 + 1e-9)


def attended(policy, n):
    """Tokens that the query at position n attends, itself included, counted by hand from the policies' papers."""
    r = 0.4
    if policy == "dense" or ("refresh_every=7" in policy and (n + 1) % 7 == 0):
        return n + 1
    if policy.startswith("local"):
        return min(n, max(1, half_up(n * r))) + 1
    if policy == "strided(kv_sparsity=0.6)":
        return sum(int((p + 1) * 2 // 5) > int(p * 2 // 5) for p in range(n)) + 1
    if policy.startswith("strided"):
        return sum(int(d * 2 // 5) > int((d - 1) * 2 // 5) for d in range(1, n + 1)) + 1
    amounts = (min(n, 21) * 0.25, min(n, 21) * 0.75) if "tokens=21" in policy else (n * r / 2, n * r / 2)
    local = min(n, max(1, half_up(amounts[0])))
    return local + min(n - local, max(1, half_up(amounts[1]))) + 1


@pytest.mark.full(sample=4)
@pytest.mark.parametrize("policy, layers", POLICIES.items())
def test_attended_frac_is_the_hand_count(score, policy, layers):
    shares = [attended(policy, n) / (n + 1) for length in LENGTHS for n in range(length - 1)]
    want = np.full(layers, np.mean(shares))
    if "dense_layers=1" in policy:
        want[0] = 1.0
    np.testing.assert_allclose(score(policy, layers=layers).attended_frac, want, rtol=1e-5)


@pytest.mark.full(sample=4)
@pytest.mark.parametrize("policy, layers", POLICIES.items())
def test_bytes_per_token_are_those_of_the_real_arrays(score, engine, policy, layers):
    B, S = len(LENGTHS), bucket(max(LENGTHS))
    states = engine(policy, layers=layers).init(B, max(LENGTHS))
    content, other = 0, 0
    for (state,) in states.layers:
        for home in (state.ws, state.store):
            content += 0 if home is None else home.k.nbytes + home.v.nbytes
        other += state.length.nbytes + (0 if state.ws is None else state.ws.pos.nbytes + state.ws.bias.nbytes)
        if state.stats:
            sums = state.stats.sums
            other += state.stats.slot_of.nbytes + sum(x.nbytes for x in (sums.hi, sums.lo, sums.ring, sums.step))
    scores = score(policy, layers=layers)
    assert scores.kv_bytes_per_token == content / (B * S)
    assert scores.stats_bytes_per_token == other / (B * S)


def test_bytes_of_k_and_v_follow_from_the_budget(score, trained):
    S, dense = bucket(max(LENGTHS)), trained.decoder.kv_bytes_per_token(element_bytes=4)
    assert score("dense").kv_bytes_per_token == dense == 2 * 5 * 4 * 8 * 4
    slots = half_up(S * 0.4) + 1
    assert score("local(kv_sparsity=0.6)", layers=2).kv_bytes_per_token == pytest.approx(dense * 2 / 5 * slots / S)
    slots = 2 * half_up(S * 0.2) + 1 + 8  # the query's own and eight spare ones
    stored, held = dense * 2 / 5, dense * 2 / 5 * slots / S
    assert score(SWA, layers=2).kv_bytes_per_token == pytest.approx(stored + held)
