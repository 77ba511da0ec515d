"""Sampling: distributions against float64 NumPy, what filters keep, keys, and the engine's use of both."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

import alisa_jax
from alisa_jax.engine import Sampling, sampling, sequence_keys

V = 13
LOGITS = np.random.default_rng(7).normal(0, 1.5, V).astype(np.float32)
DRAWS = 20_000
SIGNIFICANCE = 1e-3  # a correct sampler with another seed is rejected once in a thousand times
FILTERS = {
    "all": Sampling(1.0),
    "cool": Sampling(0.6),
    "hot": Sampling(2.5),
    "top_k": Sampling(1.0, top_k=4),
    "top_p": Sampling(1.0, top_p=0.7),
    "all of them": Sampling(1.7, top_k=9, top_p=0.8),
    "top_k above V": Sampling(1.3, top_k=V + 5, top_p=0.95),
}


def kept(logits, temperature, top_k, top_p):
    """Probabilities before top-p of what top-k keeps, and the ids that are left, most probable first; float64."""
    x = np.asarray(logits, np.float64) / temperature
    order = sorted(range(len(x)), key=lambda v: (-x[v], v))[: top_k or None]
    p = np.exp(x[order] - x[order].max())
    p /= p.sum()
    n, reached = 0, 0.0
    while n < len(order) and (n == 0 or reached < top_p):
        reached += p[n]
        n += 1
    return p, order[:n]


def probabilities(logits, s):
    p, ids = kept(logits, s.temperature, s.top_k, s.top_p)
    exact = np.zeros(len(logits))
    exact[ids] = p[: len(ids)] / p[: len(ids)].sum()
    return exact


def sample(logits, keys, s):
    """`sampling.sample`, compiled once for all settings that are not greedy."""
    if s.greedy:
        return sampling.sample(logits, keys, s)
    return jitted(sampling.pick)(jitted(sampling.scores)(sampling.clean(logits), keys, s.settings()))[0]


@functools.cache
def jitted(function):
    return jax.jit(function)


def test_sample_picks_the_best_score():
    rows, keys = jnp.asarray([LOGITS] * 50), jax.random.split(jax.random.key(2), 50)
    for s in (Sampling(), FILTERS["all of them"]):
        assert sampling.sample(rows, keys, s).tolist() == sample(rows, keys, s).tolist()


def drawn(s, seed, logits=LOGITS, draws=DRAWS):
    keys = jax.random.split(jax.random.key(seed), draws)
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits)))
    return np.bincount(np.asarray(sample(rows, keys, s)), minlength=len(logits))


@pytest.mark.parametrize("name", FILTERS)
def test_tokens_are_drawn_with_their_exact_probabilities(name):
    s = FILTERS[name]
    exact, counts = probabilities(LOGITS, s), drawn(s, seed=11)
    assert counts[exact == 0].sum() == 0
    possible = exact > 0
    assert scipy.stats.chisquare(counts[possible], exact[possible] * DRAWS).pvalue > SIGNIFICANCE


def test_the_test_of_distributions_sees_a_temperature_that_is_five_percent_off():
    exact = probabilities(LOGITS, Sampling(1.0)) * DRAWS
    assert scipy.stats.chisquare(drawn(Sampling(1.05), seed=11), exact).pvalue < SIGNIFICANCE


@hypothesis.given(
    logits=st.lists(st.integers(-3, 3), min_size=7, max_size=7),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.01, 1.0),
)
def test_what_is_kept_is_what_the_definition_keeps(logits, temperature, top_k, top_p):
    p, ids = kept(logits, temperature, top_k, top_p)
    hypothesis.assume(
        top_p == 1 or np.abs(np.cumsum(p) - top_p).min() > 1e-5
    )  # float32 and float64 agree on the border
    settings = Sampling(temperature, top_k, top_p).settings()
    scores = jitted(sampling.scores)(
        jnp.asarray([logits], jnp.float32), jax.random.split(jax.random.key(0), 1), settings
    )
    assert np.flatnonzero(np.isfinite(scores[0])).tolist() == sorted(ids)


@pytest.mark.parametrize(
    "s, ids",
    [
        (Sampling(1.0, top_k=3), {0, 1, 2}),
        (Sampling(1.0, top_p=0.5), {0, 1}),  # two of four reach a half
        (Sampling(1.0, top_p=0.51), {0, 1, 2}),  # the token that crosses it is kept
        (Sampling(1.0, top_k=2, top_p=0.6), {0, 1}),  # the share is of what top_k left
        (Sampling(1.0, top_p=1e-9), {0}),
    ],
)
def test_equal_tokens_are_kept_lowest_id_first(s, ids):
    counts = drawn(s, seed=3, logits=np.full(4, 1.5, np.float32), draws=400)
    assert set(np.flatnonzero(counts)) == ids


@pytest.mark.parametrize("s", [Sampling(), Sampling(0.0, top_k=3, top_p=0.2), Sampling(1e-40), Sampling(1.0, top_k=1)])
def test_greedy_and_its_limits_take_the_best_token_and_the_lowest_of_equal_ones(s):
    logits = np.array([[0.0, 5.0, 2.0, 5.0 - 1e-5], [-1.0, -3.0, -1.5, -1.1], [2.0, 2.5, 2.5, 2.5]], np.float32)
    keys = jax.random.split(jax.random.key(1), 3)
    best = [1, 0] if s == Sampling(1e-40) else [1, 0, 1]  # a temperature, however low, draws among equal tokens
    assert sample(jnp.asarray(logits), keys, s).tolist()[: len(best)] == best


@pytest.mark.parametrize("s", [Sampling(), Sampling(1.0), Sampling(1e30, top_k=3, top_p=0.9)])
def test_logits_that_are_not_numbers_never_win(s):
    nan, inf = np.nan, np.inf
    rows = np.array([[nan, 1, nan, 2, -inf], [nan] * 5, [-inf] * 5, [0, inf, nan, 1, 2], [nan, -inf, -3e38, nan, nan]])
    allowed = [{1, 3}, {0}, {0}, {0, 1, 3, 4} if s.temperature == 1e30 else {1}, {2}]
    for seed in range(8):
        tokens = sample(jnp.asarray(rows, jnp.float32), jax.random.split(jax.random.key(seed), 5), s)
        assert all(int(t) in a for t, a in zip(tokens, allowed, strict=True))


def test_the_margin_is_that_of_the_numbers_compared_and_the_log_probability_that_of_the_model():
    logits, keys = jnp.asarray([LOGITS]), sequence_keys(5, [2])
    exact = np.log(probabilities(LOGITS, Sampling(1.0)))
    next_token = jitted(sampling.next_token)
    token, margin, logprob = next_token(logits, None, jnp.int32(4))
    best = np.sort(LOGITS)[::-1]
    assert int(token[0]) == LOGITS.argmax() and float(margin[0]) == best[0] - best[1]
    assert math.isclose(logprob[0], exact[token[0]], rel_tol=1e-5)
    s = Sampling(2.0, top_k=5)
    token, margin, logprob = next_token(logits, sampling.Draw(keys, jnp.int32(3), s.settings()), jnp.int32(4))
    noise = np.asarray(jax.random.gumbel(jax.random.fold_in(keys[0], 7), (V,)), np.float64)
    ids = kept(LOGITS, 2.0, 5, 1.0)[1]
    ranked = sorted(ids, key=lambda v: -(LOGITS[v] / 2 + noise[v]))
    assert int(token[0]) == ranked[0]
    gap = (LOGITS[ranked[0]] - LOGITS[ranked[1]]) / 2 + noise[ranked[0]] - noise[ranked[1]]
    assert math.isclose(margin[0], gap, abs_tol=1e-5)
    assert math.isclose(logprob[0], exact[token[0]], rel_tol=1e-5)


def one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text and 20 < len(text) < 300 and all(p in text for p in parts), text


@pytest.mark.parametrize(
    "arguments, parts",
    [
        *(
            (dict(temperature=t), ("temperature", "0 (greedy)", repr(t)))
            for t in (-0.1, math.nan, math.inf, 1e39, "hot")
        ),
        *((dict(top_k=k), ("top_k", "0 (off)", repr(k))) for k in (-1, 1.5, math.nan, True, 2**31)),
        *((dict(top_p=p), ("top_p", "above 0", repr(p))) for p in (0.0, -0.5, 1.01, math.nan, None)),
    ],
)
def test_settings_out_of_range_are_refused(arguments, parts):
    with pytest.raises(ValueError) as error:
        Sampling(**arguments)
    one_sentence(error, *parts)


@pytest.fixture(scope="module")
def drawing(random_model):
    return alisa_jax.Engine(random_model(), "dense")


# Together these prompts cross the border of the bucket of 32 tokens after one step; alone, some do later and some never.
PROMPTS = [np.random.default_rng(n).integers(0, 37, n).tolist() for n in (3, 17, 26, 31)]
NEW = 16
WARM = Sampling(0.9, top_k=20, top_p=0.95)


@pytest.fixture(scope="module")
def together(drawing):
    return drawing.generate(PROMPTS, NEW, sampling=WARM, seed=9)


def test_the_same_key_gives_the_same_tokens_and_another_seed_others(drawing, together):
    again = drawing.generate(PROMPTS, NEW, sampling=WARM, seed=9)
    assert again.tokens == together.tokens and again.compiles == 0
    by_key = drawing.generate(PROMPTS, NEW, sampling=WARM, key=jax.random.key(9))
    assert by_key.tokens == together.tokens and by_key.compiles == 0
    other = drawing.generate(PROMPTS, NEW, sampling=WARM, seed=10)
    assert all(a != b for a, b in zip(other.tokens, together.tokens, strict=True))


def test_settings_and_seeds_share_their_programs(drawing, together):
    for s in (Sampling(1.3), Sampling(0.2, top_k=3), Sampling(1.0, top_p=0.1)):
        assert drawing.generate(PROMPTS, NEW, sampling=s).compiles == 0


def test_a_ragged_batch_that_is_sampled_gives_what_its_prompts_give_one_by_one(drawing, together):
    for i in (0, 1):
        alone = drawing.generate([PROMPTS[i]], NEW, sampling=WARM, key=sequence_keys(9, [i]))
        close = np.minimum(alone.margins[0], together.margins[i]) <= 1e-5
        n = int(close.argmax()) if close.any() else NEW
        assert n > NEW // 2 and alone.tokens[0][:n] == together.tokens[i][:n]
    turned = drawing.generate(PROMPTS[::-1], NEW, sampling=WARM, key=sequence_keys(9, [3, 2, 1, 0]))
    assert turned.tokens == together.tokens[::-1]


def test_every_token_is_the_sample_of_the_logits_and_the_key_of_its_step(drawing, together):
    model, keys = drawing.model, sequence_keys(9, range(4))
    for j in (0, 1, 2, 9, 15):
        rows = alisa_jax.Batch.from_lists([p + t[:j] for p, t in zip(PROMPTS, together.tokens, strict=True)])
        logits, _ = drawing.programs.prefill(model.params, jnp.asarray(rows.padded(64)), jnp.asarray(rows.length))
        step_keys = jax.vmap(lambda key, j=j: jax.random.fold_in(key, j))(keys)
        expected = sample(logits, step_keys, WARM).tolist()
        assert [t[j] for t in together.tokens] == expected


def test_log_probabilities_are_those_of_scoring_the_same_tokens(drawing, together):
    scores = drawing.score([p + t for p, t in zip(PROMPTS, together.tokens, strict=True)], protocol="prefill_mask")
    for made, scored in zip(together.logprobs, scores.logprobs, strict=True):
        np.testing.assert_allclose(made, scored[-NEW:], atol=1e-4)
    assert together.prefill_s > 0 and together.decode_s > 0
    assert together.prefill_s + together.decode_s <= together.wall_s


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (dict(seed=-1), ("[0, 2**32)", "-1")),
        (dict(seed=0.5), ("[0, 2**32)", "0.5")),
        (dict(key=7), ("typed key", "one per prompt", "7")),
        (dict(key=jax.random.split(jax.random.key(0), 3)), ("typed key", "4 of them")),
        (dict(key=jax.random.key(0, impl="rbg")), ("threefry2x32", "rbg")),
        (dict(key=jax.random.PRNGKey(0)), ("typed key",)),
    ],
)
def test_keys_that_cannot_serve_are_refused_before_anything_runs(drawing, arguments, parts):
    before = drawing.compiles
    with pytest.raises(ValueError) as error:
        drawing.generate(PROMPTS, 2, sampling=Sampling(1.0), **arguments)
    one_sentence(error, *parts)
    assert drawing.compiles == before
