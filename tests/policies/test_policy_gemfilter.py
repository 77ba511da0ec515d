"""GemFilter's choice against float64 NumPy: scores, pooling, ties, ragged prompts, what is not a number; and its options."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.models import ModelConfig
from alisa_jax.policies import Dense, GemFilter, gemfilter, parse
from tests import replay

T, TOKENS = 31, 7
LENGTHS = (31, 20, 8, 7, 3)
CASES = [(4, 1, "avg"), (1, 5, "avg"), (4, 5, "avg"), (4, 3, "max"), (4, 9, "avg")]  # G, pool, pooling


@functools.partial(jax.jit, static_argnums=0, compiler_options=dict(replay.QUICK))
def both(policy, q, k, length):
    return policy.scores(q, k, length), policy.choose(q, k, length)


def run(policy, q, k, length):
    """Scores [B, T] and chosen positions [B, n] of q [B, N, H] and k [B, T, K, H]."""
    q, k = (jnp.asarray(x, jnp.float32) for x in (q, k))
    return tuple(map(np.asarray, both(policy, q, k, jnp.asarray(length, jnp.int32))))


def line(*raw):
    """Queries and keys of one prompt and one head whose raw scores are `raw`."""
    return np.ones((1, 1, 1)), np.array(raw, np.float64)[None, :, None, None], [len(raw)]


# The oracle: one prompt, one token and one head after the other.


def raw_scores(q, k):
    """q [N, H], k [n, K, H] -> [n]."""
    G = len(q) // k.shape[1]
    return np.array([sum(float(q[i] @ key[i // G]) for i in range(len(q))) for key in k])


def pooled(raw, pool, pooling):
    """[n]: the mean, places outside counting 0, or the maximum of those inside."""
    found = []
    for i in range(len(raw)):
        near = [raw[j] for j in range(i - pool // 2, i + pool // 2 + 1) if 0 <= j < len(raw)]
        found.append(max(near) if pooling == "max" else sum(near) / pool)
    return np.array(found)


def best(scores, tokens):
    """Ascending positions of the best; Python's sort is stable, so ties go to the lowest position."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:tokens])


def draw(seed, G, K=3, H=5):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((len(LENGTHS), G * K, H)), rng.standard_normal((len(LENGTHS), T, K, H))


def kept(chosen):
    """The chosen positions of one prompt, of which those that are none are last."""
    real = chosen[chosen >= 0]
    assert (chosen[len(real) :] == -1).all()
    return real.tolist()


@pytest.mark.parametrize("G, pool, pooling", CASES)
def test_scores_are_raw_dot_products_summed_over_heads_and_pooled(G, pool, pooling):
    q, k = draw(G, G)
    scores, _ = run(GemFilter(tokens=TOKENS, pool=pool, pooling=pooling), q, k, LENGTHS)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(
            scores[b, :n], pooled(raw_scores(q[b], k[b, :n]), pool, pooling), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("G, pool, pooling", CASES)
def test_the_best_tokens_are_chosen_in_their_order(G, pool, pooling):
    q, k = draw(10 + G, G)
    q, k = np.round(4 * q), np.round(4 * k)  # whole numbers: every sum is exact, and ties are ties
    _, chosen = run(GemFilter(tokens=TOKENS, pool=pool, pooling=pooling), q, k, LENGTHS)
    assert chosen.shape == (len(LENGTHS), TOKENS) and chosen.dtype == np.int32
    for b, n in enumerate(LENGTHS):
        # The mean is the sum here, which pools the same and does not round.
        wanted = best(pooled(raw_scores(q[b], k[b, :n]), pool, pooling) * (pool if pooling == "avg" else 1), TOKENS)
        assert kept(chosen[b]) == wanted


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(st.integers(-2, 2), min_size=9, max_size=9), st.integers(1, 9))
def test_chosen_positions_are_sorted_unique_and_in_range_and_ties_go_to_the_lowest(raw, length):
    q, k, _ = line(*raw)
    _, chosen = run(GemFilter(tokens=4, pool=1), q, k, [length])
    found = kept(chosen[0])
    assert found == best(raw[:length], 4)
    assert len(set(found)) == min(4, length) and set(found) <= set(range(length)) and found == sorted(found)


def test_a_prompt_of_no_more_than_tokens_is_kept_whole():
    q, k = draw(3, 2)
    for tokens in (TOKENS, T + 5):
        _, chosen = run(GemFilter(tokens=tokens), q, k, LENGTHS)
        assert chosen.shape[1] == min(tokens, T)
        for row, n in zip(chosen, LENGTHS, strict=True):
            assert len(kept(row)) == min(n, tokens)
            assert n > tokens or kept(row) == list(range(n))


def test_a_mean_over_neighbours_keeps_a_neighbourhood_and_single_scores_do_not():
    q, k, length = line(*[0] * 8, 9, *[0] * 8, 5, 0, 5, 0)
    (_, wide), (_, single) = (run(GemFilter(tokens=3, pool=pool), q, k, length) for pool in (5, 1))
    assert kept(single[0]) == [8, 17, 19]
    assert kept(wide[0]) == [17, 18, 19], "two scores of 5 near each other are a mean of 2, one of 9 a mean of 1.8"


def test_places_outside_the_prompt_count_in_the_mean():
    policy = GemFilter(tokens=2, pool=5)
    q, k, length = line(*[5.0] * 9)
    scores, chosen = run(policy, q, k, length)
    np.testing.assert_allclose(scores[0], [3, 4, 5, 5, 5, 5, 5, 4, 3])
    assert kept(chosen[0]) == [2, 3]
    _, chosen = run(policy, q, -k, length)
    assert kept(chosen[0]) == [0, 8], "of negative scores the ends have the largest means"
    scores, chosen = run(GemFilter(tokens=2, pool=5, pooling="max"), q, -k, length)
    assert (scores == -5).all() and kept(chosen[0]) == [0, 1], "a maximum takes no place outside"


@pytest.mark.parametrize("pooling", gemfilter.POOLINGS)
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 1e38])
def test_what_lies_behind_a_prompt_changes_nothing(pooling, rubbish):
    q, k = draw(4, 2)
    policy = GemFilter(tokens=TOKENS, pooling=pooling)
    _, clean = run(policy, q, k, LENGTHS)
    for b, n in enumerate(LENGTHS):
        k[b, n:] = rubbish
    _, found = run(policy, q, k, LENGTHS)
    np.testing.assert_array_equal(found, clean)


@pytest.mark.parametrize("pooling", gemfilter.POOLINGS)
def test_a_score_that_is_not_a_number_never_wins_and_spoils_no_neighbour(pooling):
    q, k, length = line(1, 7, np.nan, 6, 5, np.inf, -np.inf, 2)
    for tokens, wanted in ((1, [5]), (5, [1, 3, 4, 5, 7]), (7, [0, 1, 2, 3, 4, 5, 7])):  # no more numbers: the lowest
        _, chosen = run(GemFilter(tokens=tokens, pool=1, pooling=pooling), q, k, length)
        assert kept(chosen[0]) == wanted
    q, k, length = line(1, 7, np.nan, 6, 5, 0, 0, 2)
    scores, _ = run(GemFilter(tokens=2, pool=3, pooling=pooling), q, k, length)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores[0, [1, 3]], [8 / 3, 11 / 3] if pooling == "avg" else [7, 6], rtol=1e-6)
    _, chosen = run(GemFilter(tokens=2, pool=3, pooling=pooling), q, k * np.nan, length)
    assert kept(chosen[0]) == [0, 1], "a model that gives no number still has a prompt"


def test_halves_of_precision_are_scored_in_float32():
    q, k = draw(5, 4)
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in (q, k))
    scores, _ = both(GemFilter(tokens=TOKENS), q, k, jnp.asarray(LENGTHS, jnp.int32))
    q, k = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores[0], pooled(raw_scores(q[0], k[0]), 5, "avg"), rtol=1e-4, atol=1e-4)


def test_last_kept_tells_whose_last_token_is_chosen():
    chosen = jnp.array([[0, 3, 5], [1, 2, 4], [0, 1, -1], [2, 5, 8]])
    assert gemfilter.last_kept(chosen, jnp.array([6, 6, 2, 8])).tolist() == [True, False, True, False]


# Options.


def shaped(n_layers):
    return ModelConfig("llama", 50, 16, n_layers, 4, 2, 8, 24, 64)


def test_a_layer_that_is_not_given_is_two_fifths_of_the_model():
    found = {L: parse("gemfilter").resolve(shaped(L)).layer for L in (1, 2, 4, 5, 12, 32, 40)}
    assert found == {1: 0, 2: 1, 4: 2, 5: 2, 12: 5, 32: 13, 40: 16}  # 13 of 32 is the authors' for Llama-3.1-8B


def test_a_layer_that_is_given_stays_and_one_that_the_model_lacks_is_refused():
    policy = parse("gemfilter(layer=3,tokens=9,pool=3,pooling=max)")
    assert policy.resolve(shaped(4)) == policy == GemFilter(3, 9, 3, "max")
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.2, the layers of the model; got 3"):
        policy.resolve(shaped(3))


def test_a_layer_is_read_only_for_prompts_of_more_than_tokens():
    policy = GemFilter(layer=2, tokens=10)
    assert [policy.reads_layer(n) for n in (1, 10, 11, 5000)] == [None, None, 2, 2]
    assert GemFilter(tokens=10).reads_layer(11) is None, "without a model there is no layer to read"


def test_every_layer_attends_densely():
    policy = GemFilter(layer=1).resolve(shaped(3))
    assert [policy.for_layer(i) for i in range(3)] == [Dense()] * 3


@pytest.mark.parametrize(
    "text, why",
    [
        ("gemfilter(layer=-1)", "layer counts from 0; got -1"),
        ("gemfilter(tokens=0)", "tokens must be at least 1; got 0"),
        ("gemfilter(pool=4)", "pool must be odd, a token and as many on both sides; got 4"),
        ("gemfilter(pool=-1)", "pool must be odd"),
        ("gemfilter(pooling=mean)", "pooling must be one of avg, max; got 'mean'"),
    ],
)
def test_options_outside_their_range_are_refused_in_one_sentence(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)
