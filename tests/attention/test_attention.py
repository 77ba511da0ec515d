"""One layer's decode on its three routes, and the dense prompt, against float64 oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import attention
from alisa_jax.attention import compute, reference
from alisa_jax.kv.state import LayerSpec
from alisa_jax.ops.rope import Rotation, Turn
from alisa_jax.policies import parse
from tests import oracle, replay
from tests.replay import BUCKETS, STARTS, STREAM, B, K

TOLERANCE = 1e-5

POLICIES = {
    "dense": oracle.Dense(),
    "local(kv_sparsity=0.6)": oracle.Local(0.6),
    "local(tokens=9)": oracle.Local(tokens=9),
    "strided(kv_sparsity=0.6)": oracle.Strided(0.6),
    "strided(kv_sparsity=0.7,anchor=query)": oracle.Strided(0.7, "query"),
    "swa(kv_sparsity=0.6)": oracle.Swa(0.6),
    "swa(kv_sparsity=0.4,window=2k,spare_slots=2)": oracle.Swa(0.4, window="2k"),
    "swa(kv_sparsity=0.6,window=5,shared_heads=false)": oracle.Swa(0.6, window=5, heads_share=False),
    "swa(tokens=12,decay=0.8)": oracle.Swa(tokens=12, decay=0.8),
    "swa(kv_sparsity=0.7,refresh_every=7,spare_slots=0)": oracle.Swa(0.7, refresh_every=7),
    "swa(kv_sparsity=0.6,local_frac=0.0,dense_layers=1)": oracle.Swa(0.6, local_frac=0.0),
    "swa(kv_sparsity=0.6,window=3,local_frac=1.0)": oracle.Swa(0.6, window=3, local_frac=1.0),
    "swa(kv_sparsity=0.0)": oracle.Dense(),
    "swa(kv_sparsity=0.0,window=2k,spare_slots=0)": oracle.Dense(),
    "local(kv_sparsity=0.0)": oracle.Dense(),
    "strided(kv_sparsity=0.0)": oracle.Dense(),
}
# Also from prompts, on these routes; the others begin with nothing.
LONG = {
    "dense": ("working_set", "masked"),
    "local(kv_sparsity=0.6)": ("working_set", "indexed", "masked"),
    "strided(kv_sparsity=0.6)": ("working_set", "indexed", "masked"),
    "strided(kv_sparsity=0.7,anchor=query)": ("indexed", "masked"),
    "swa(kv_sparsity=0.6)": ("working_set", "indexed", "masked"),
    "swa(kv_sparsity=0.4,window=2k,spare_slots=2)": ("working_set", "masked"),
    "swa(kv_sparsity=0.6,window=5,shared_heads=false)": ("working_set", "indexed", "masked"),
    "swa(tokens=12,decay=0.8)": ("working_set", "masked"),
    "swa(kv_sparsity=0.7,refresh_every=7,spare_slots=0)": ("working_set", "masked"),
}
# These begin in the smaller bucket and grow.
GROWING = [text for text in LONG if not ("decay" in text or "refresh" in text or "query" in text)]
CASES = [(text, start) for text in POLICIES for start in (STARTS if text in LONG else ("empty",))]


def policy_of(text):
    return parse(text).for_layer(1)


def routes_of(text, start):
    if "kv_sparsity=0.0" in text:
        return policy_of(text).routes[:1]
    return policy_of(text).routes if start == "empty" else LONG[text]


def buckets_of(text):
    return BUCKETS if text in GROWING else BUCKETS[-1:]


def run(text, route, start):
    return replay.shared_run(policy_of(text), route, start, buckets_of(text))


@functools.cache
def expected(text, start):
    prompt = STARTS[start] or (0,) * B
    return [oracle.decode(POLICIES[text], *(x[b] for x in STREAM), prompt[b]) for b in range(B)]


def comparable(text, route, sets, first):
    """The sets without those of refreshed steps: a working set does not hold what such a step attends beside it."""
    every = policy_of(text).refresh_every if "refresh_every" in text and route == "working_set" else 0
    return [None if every and (first + i + 1) % every == 0 else kept for i, kept in enumerate(sets)]


@pytest.mark.parametrize("text, start", CASES)
def test_every_route_attends_the_oracles_tokens_and_gives_its_outputs(text, start):
    prompt = STARTS[start] or (0,) * B
    for route in routes_of(text, start):
        got = run(text, route, start)
        for b, first in enumerate(prompt):
            outs, sets = expected(text, start)[b]
            last = first + len(got.sets[b])
            want = comparable(text, route, sets[first:last], first)
            assert comparable(text, route, got.sets[b], first) == want, route
            np.testing.assert_allclose(got.out[b], outs[first:last], atol=TOLERANCE, err_msg=route)
            counts = [np.mean([len(kept) for kept in step]) for step in sets[first:last]]
            np.testing.assert_allclose(got.attended[b], counts, rtol=1e-6, err_msg=route)
            if first:
                np.testing.assert_allclose(got.prompt[b, :first], outs[:first], atol=TOLERANCE)


@pytest.mark.parametrize("text, start", CASES)
def test_the_routes_agree(text, start):
    runs = [run(text, route, start) for route in routes_of(text, start)]
    for other in runs[:-1]:
        np.testing.assert_allclose(other.out, runs[-1].out, atol=TOLERANCE)
        np.testing.assert_array_equal(other.attended, runs[-1].attended)


@pytest.mark.parametrize("text", POLICIES)
def test_a_decode_step_is_traced_once_per_bucket_however_often_and_from_where_it_runs(text):
    for start in STARTS if text in LONG else ("empty",):
        for route in routes_of(text, start):
            run(text, route, start)
            assert [replay.traces[policy_of(text), route, S] for S in buckets_of(text)] == [1] * len(buckets_of(text))


def test_the_query_attends_itself_and_nothing_later():
    for text in POLICIES:
        for step, sets in enumerate(run(text, policy_of(text).routes[0], "empty").sets[0]):
            assert all(step in kept and max(kept) == step for kept in sets)


def test_the_streams_make_tokens_return():
    """Else no load, no parked token and no swap would have been tested."""
    texts = [text for text in LONG if text.startswith("swa") and "decay" not in text]
    loads = {(text, start): run(text, "working_set", start).loads.sum() for text in texts for start in STARTS}
    assert sum(count > 0 for count in loads.values()) >= 6, loads
    assert run("dense", "working_set", "prompt").loads.sum() == 0


MASKED = (
    "strided(kv_sparsity=0.7,anchor=query)",
    "local(tokens=9)",
    "swa(kv_sparsity=0.6)",
    "swa(kv_sparsity=0.6,window=5,shared_heads=false)",
    "swa(kv_sparsity=0.7,refresh_every=7,spare_slots=0)",
)


@pytest.mark.parametrize("text", MASKED)
def test_scoring_a_whole_text_under_the_mask_equals_decoding_it(text):
    policy = parse(text)
    score = jax.jit(functools.partial(reference.score, LayerSpec(policy, replay.CODEC, "masked")))
    out, attended, clipped = score(*(jnp.asarray(x) for x in STREAM))
    assert not np.asarray(clipped).any()
    decoded = run(text, policy.routes[0], "empty")
    np.testing.assert_allclose(out, decoded.out, atol=TOLERANCE)
    np.testing.assert_allclose(attended, decoded.attended, rtol=1e-6)


# ---- the prompt


@pytest.mark.parametrize("P", [1, K])
def test_prompt_outputs_last_rows_and_sums_equal_the_oracle(P):
    T, W, length = 37, 11, (37, 6, 1)
    q, k, v = (jnp.asarray(x[:, :T]) for x in STREAM)
    out, lse = compute.prompt(q, k, v, jnp.array(length))
    total = compute.mass(q, k, lse, jnp.array(length), P, "sum")
    rows = compute.mass(q, k, lse, jnp.array(length), P, "rows", W)
    assert rows.shape == (B, P, W, T)
    for b, n in enumerate(length):
        want_out, weights = oracle.causal(*(x[b, :n] for x in STREAM))
        per_query = np.stack([oracle.shared(w, P) for w in weights])  # [n, P, n]
        np.testing.assert_allclose(out[b, :n], want_out, atol=TOLERANCE)
        np.testing.assert_allclose(total[b, :, :n], per_query.sum(axis=0), atol=TOLERANCE)
        assert (np.asarray(total)[b, :, n:] == 0).all()
        want = np.zeros((W, P, T))
        want[max(0, W - n) :, :, :n] = per_query[-W:]
        np.testing.assert_allclose(rows[b], np.moveaxis(want, 0, 1), atol=TOLERANCE)


def test_a_prompt_longer_than_a_block_of_queries_equals_the_oracle():
    T, W = 256, 150
    tokens = replay.stream(3, 1, T, 2, 1, 3)
    q, k, v = (jnp.asarray(x) for x in tokens)
    out, lse = compute.prompt(q, k, v, jnp.array([T - 3]))
    total = compute.mass(q, k, lse, jnp.array([T - 3]), 1, "sum")
    want, weights = oracle.causal(*(x[0] for x in tokens))
    np.testing.assert_allclose(out[0, : T - 3], want[: T - 3], atol=TOLERANCE)
    np.testing.assert_allclose(total[0, 0], weights[: T - 3].sum(axis=(0, 1)), atol=1e-4)
    rows = compute.mass(q, k, lse, jnp.array([T - 3]), 1, "rows", W)
    np.testing.assert_allclose(rows[0, 0], weights[T - 3 - W : T - 3].sum(axis=1), atol=TOLERANCE)


# ---- what cannot run together


def test_check_names_what_does_not_fit():
    dense, query = parse("dense"), parse("strided(kv_sparsity=0.5,anchor=query)")
    check = lambda policy, route, *sizes: attention.check(LayerSpec(policy, replay.CODEC, route), *sizes)
    check(dense, "masked", 64, 6, 3)
    with pytest.raises(ValueError, match="route must be auto or one of working_set, indexed, masked; got 'gather'"):
        check(dense, "gather", 64, 6, 3)
    with pytest.raises(ValueError, match="runs on indexed, masked; got route 'working_set'"):
        check(query, "working_set", 64, 6, 3)
    with pytest.raises(ValueError, match="query heads must be a multiple of kv heads; got 6 and 4"):
        check(dense, "masked", 64, 6, 4)
    with pytest.raises(ValueError, match="serves at most 16384 tokens"):
        check(parse("swa(kv_sparsity=0.8)"), "masked", 32768, 6, 3)


def test_what_no_kernel_does_is_refused_and_not_left_out():
    q, k, bias = jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 1, 3))
    turn = Turn(jnp.zeros((1, 1, 3), jnp.int32), Rotation((0.5, 0.1), 8))
    for more in ({"turn": turn}, {"heads": 4}):
        with pytest.raises(ValueError, match="by xla alone; got impl='interpret'"):
            compute.slots(replay.CODEC, q, k, k, bias, "interpret", **more)
    with pytest.raises(ValueError, match="turned by xla alone"):
        compute.by_index(replay.CODEC, q, k, k, jnp.zeros((1, 1, 3), jnp.int32), bias, "interpret", turn)
