"""SnapKV against NumPy over 300 steps, its pooling against torch, and what its paper promises of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import spec, testing
from alisa_jax.policies import POLICIES, Dense, Dims, SnapKV, parse
from tests import oracle, replay
from tests.policies.snapkv_oracle import chosen

H = 5
GROUPS = {1: (2, 2), 4: (8, 2)}  # G: query heads, kv heads
PROMPTS, PADDED, BUCKETS = (47, 21, 3), 64, (64, 352)  # one cut to less than half, one by a token, one below the window
POLICY = parse("snapkv(capacity=20,window=6,kernel=3)")
ROUTES = ("working_set", "masked")


@functools.cache
def tokens(G):
    return replay.stream(70 + G, len(PROMPTS), BUCKETS[-1], *GROUPS[G], H)


@functools.cache
def run(policy, G, route="working_set"):
    return replay.run(policy, route, tokens(G), BUCKETS, PROMPTS, PADDED)


@functools.cache
def choices(policy, G):
    """The kept sets of each prompt of `tokens`."""
    heads = [oracle.causal(*(x[b, :n] for x in tokens(G)))[1] for b, n in enumerate(PROMPTS)]
    return [chosen(policy, weights, GROUPS[G][1]) for weights in heads]


@functools.partial(jax.jit, static_argnums=0, compiler_options=dict(replay.QUICK))
def first_set(policy, rows, length):
    dims = Dims(*rows.shape[:2], rows.shape[1], rows.shape[-1], rows.shape[-1])
    return policy.seed((), rows, length, dims)[1]


def kept(policy, rows, length):
    """Sets [b][p] that rows [B, K, W, S] leave of prompts of `length` [B] tokens."""
    pos = np.asarray(first_set(policy, jnp.asarray(rows, jnp.float32), jnp.asarray(length, jnp.int32)))
    return [[set(head[head >= 0].tolist()) for head in heads] for heads in pos]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("G", GROUPS)
def test_what_numpy_keeps_of_a_prompt_is_attended_for_300_steps_with_all_that_follows(G, route):
    """A step is attention in float64 over the kept tokens, whose keys and queries carry their true positions."""
    got, (N, K) = run(POLICY, G, route), GROUPS[G]
    steps, q, attended = got.out.shape[1], tokens(G).q, got.sets
    assert steps >= 300
    for b, (n, sets) in enumerate(zip(PROMPTS, choices(POLICY, G), strict=True)):
        assert attended[b] == [[head | set(range(n, n + i + 1)) for head in sets] for i in range(steps)]
        k, v = (x[b] for x in tokens(G)[1:])
        for i in (0, 1, *range(7, steps, 41), steps - 1):
            allowed = np.array([np.isin(np.arange(len(k)), [*attended[b][i][h * K // N]]) for h in range(N)])
            want, _ = oracle.attention(q[b, n + i], k, v, allowed)
            np.testing.assert_allclose(got.out[b, i], want, atol=1e-5)


def test_of_a_longer_prompt_exactly_the_capacity_is_kept_and_the_window_always():
    for G in GROUPS:
        first = [[head - {n} for head in sets[0]] for n, sets in zip(PROMPTS, run(POLICY, G).sets, strict=True)]
        sizes = [{len(head) for head in sets} for sets in first]
        assert sizes == [{20}, {20}, {3}]
        assert all(head >= set(range(41, 47)) for head in first[0])
    assert first[0][0] != first[0][1], "kv heads choose for themselves"


def test_the_working_set_has_the_capacity_and_room_for_what_follows():
    """47 + 17 tokens fill the first bucket, whose slots are 20 + 17; the next bucket brings its 288 more."""
    got = run(POLICY, 4)
    assert got.state.ws.k.shape == (3, 2, 20 + (64 - 47) + (352 - 64), H) and got.state.store is None
    assert POLICY.prompt_capacity(64) == POLICY.prompt_capacity(10**6) == 20 and POLICY.prompt_capacity(16) == 16
    taken = (np.asarray(got.state.ws.pos) >= 0).sum(axis=-1)
    made = 352 - 47
    np.testing.assert_array_equal(taken, np.array([[20, 20], [20, 20], [3, 3]]) + made)


def test_a_capacity_that_holds_the_prompts_is_dense():
    got, dense = (replay.run(p, "masked", tokens(4), (64,), PROMPTS, PADDED) for p in (SnapKV(tokens=47), Dense()))
    full = [[set(range(n + i + 1)) for i in range(17)] for n in PROMPTS]
    assert [[step[0] for step in b] for b in got.sets] == [[step[1] for step in b] for b in got.sets] == full
    np.testing.assert_array_equal(got.out, dense.out)
    np.testing.assert_array_equal(got.prompt, dense.prompt)


def test_the_prompt_itself_is_attended_densely():
    want, _ = oracle.causal(*(x[0, :47] for x in tokens(4)))
    np.testing.assert_allclose(run(POLICY, 4).prompt[0, :47], want, atol=1e-5)


def test_from_an_empty_cache_nothing_is_dropped():
    got = replay.run(POLICY, "working_set", tokens(4), (64,))
    assert all(step == [set(range(n + 1))] * 2 for n, step in enumerate(got.sets[0]))


def test_a_cut_prompt_keeps_the_contract():
    """The registry's example keeps whole prompts of the size that the contract tests have."""
    report = testing.check_policy(SnapKV(tokens=9, window=4, kernel=3), starts=("full_bucket",), driver=replay.DRIVER)
    assert {"gone", "content", "routes", "once"} <= set(report.rules) and report.attended_frac < 0.9


def attention_of_a_span(S=64, n=60, peak=20, window=8):
    """Rows [1, 1, W, S] that pay most to one token, some to five others and little to the rest; and [n]."""
    rows = np.full((1, 1, window, S), 1e-4)
    rows[..., peak] = 0.3
    rows[..., [3, 9, 30, 36, 45]] = 0.05
    rows[..., n:] = 0
    return rows, [n]


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_pooling_keeps_the_neighbours_of_a_planted_span_and_kernel_1_does_not(kernel, pool):
    rows, length = attention_of_a_span()
    reach = kernel // 2
    policy = SnapKV(tokens=8 + 1 + 2 * reach, window=8, kernel=kernel, pool=pool)
    assert kept(policy, rows, length) == [[set(range(20 - reach, 21 + reach)) | set(range(52, 60))]]
    alone = SnapKV(tokens=policy.tokens, window=8, kernel=1)
    assert kept(alone, rows, length)[0][0] & {18, 19, 21, 22} == set()


def test_what_is_appended_after_the_selection_does_not_change_it():
    """Keys that are alike to all queries come after the prompt: not one of its tokens comes or goes."""
    q, k, v = (x.copy() for x in tokens(4))
    for b, n in enumerate(PROMPTS):
        k[b, n:] = 9 * np.sign(k[b, n:])
        v[b, n:] = 100.0
    junk, clean = replay.run(POLICY, "working_set", (q, k, v), (64,), PROMPTS, PADDED), run(POLICY, 4)
    assert junk.sets == [b[: junk.out.shape[1]] for b in clean.sets]
    assert not np.allclose(junk.out, clean.out[:, : junk.out.shape[1]], atol=1.0), "the junk was attended"


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_the_kept_tokens_are_those_that_torch_ranks_first(kernel, pool):
    """Whole numbers, so that sums are exact, in ragged prompts that fill their bucket or not."""
    torch = pytest.importorskip("torch")
    rng, W, lengths = np.random.default_rng(8), 5, [32, 31, 19, 12, 6, 5, 2]
    policy = SnapKV(tokens=11, window=W, kernel=kernel, pool=pool)
    rows = rng.integers(0, 1000, (len(lengths), 2, W, 32)).astype(np.float32)
    got = kept(policy, rows, lengths)
    pools = {"max": torch.nn.functional.max_pool1d, "avg": torch.nn.functional.avg_pool1d}
    for b, n in enumerate(lengths):
        if n <= 11:
            assert got[b] == [set(range(n))] * 2
            continue
        paid = torch.tensor(rows[b, :, :, : n - W].sum(axis=1, dtype=np.float64))
        pooled = pools[pool](paid, kernel, stride=1, padding=kernel // 2)
        for head, found in zip(pooled, got[b], strict=True):
            assert len(found) == 11 and found >= set(range(n - W, n))
            border = head.sort(descending=True).values[11 - W - 1]
            assert set(torch.where(head > border)[0].tolist()) <= found  # equal scores are another test's
            assert found - set(range(n - W, n)) <= set(torch.where(head >= border)[0].tolist())


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_neither_the_window_nor_padding_lends_its_attention_to_neighbours(pool):
    """All attention lies in the window and behind the prompt; the tokens beside it are no better than others."""
    rows = np.zeros((1, 1, 4, 32))
    rows[..., 16:] = 1.0
    rows[..., 1] = 1e-3
    policy = SnapKV(tokens=7, window=4, kernel=5, pool=pool)
    assert kept(policy, rows, [20]) == [[{0, 1, 2, 16, 17, 18, 19}]]


def test_ties_go_to_the_lowest_position():
    rows = np.zeros((2, 2, 3, 32))
    rows[1, 1, :, 9] = 0.5  # pooled it is a plateau of three, of which two are wanted
    for pool in ("max", "avg"):
        policy = SnapKV(tokens=5, window=3, kernel=3, pool=pool)
        flat = {0, 1, 17, 18, 19}
        assert kept(policy, rows, [20, 20]) == [[flat, flat], [flat, {8, 9, 17, 18, 19}]]


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_attention_that_is_not_a_number_counts_as_none(pool):
    rng = np.random.default_rng(4)
    none = rng.random((1, 2, 4, 32))
    none[:, :, 2] = 0
    none[..., 5] = 0
    nan = none.copy()
    nan[:, :, 2] = np.nan  # a whole query
    nan[..., 5] = np.nan  # a token of every query
    policy = SnapKV(tokens=12, window=4, kernel=3, pool=pool)
    assert kept(policy, nan, [27]) == kept(policy, none, [27]) and len(kept(policy, nan, [27])[0][0]) == 12
    nan[:] = np.nan
    assert kept(policy, nan, [27]) == [[set(range(8)) | set(range(23, 27))] * 2]


def test_a_spec_says_capacity():
    policy = parse("snapkv(capacity=64,kernel=5,pool=avg)")
    assert policy == SnapKV(tokens=64, kernel=5, pool="avg")
    assert spec.to_text(policy, POLICIES) == "snapkv(capacity=64,kernel=5,pool=avg)"
    assert parse("snapkv") == SnapKV(tokens=1024, window=32, kernel=7, pool="max")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("snapkv(capacity=32)", "capacity counts the window and must be more than window=32; got 32"),
        ("snapkv(window=0)", "window must be at least 1; got 0"),
        ("snapkv(kernel=4)", "kernel must be odd and at least 1; got 4"),
        ("snapkv(kernel=-1)", "kernel must be odd and at least 1; got -1"),
        ("snapkv(pool=mean)", 'pool must be "max" or "avg"; got \'mean\''),
        ("snapkv(tokens=64)", "unknown key 'tokens'; snapkv takes capacity, window, kernel, pool"),
        ("snapkv(capacity=64,capacity=65)", "the key 'capacity' is given twice"),
    ],
)
def test_a_wrong_option_is_told_in_one_sentence(text, sentence):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert sentence in str(error.value) and "\n" not in str(error.value)
