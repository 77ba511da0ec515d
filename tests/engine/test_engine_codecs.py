"""The engine with int8: both protocols, batches, buckets, bytes, refusals, and the price in perplexity."""

import functools

import numpy as np
import pytest

import alisa_jax
from alisa_jax.kv.buckets import bucket

pytestmark = pytest.mark.slow

CODECS = ("int8(calibration_tokens=6)", "int8(axis=token)")
LENGTHS = (41, 17, 29)


@pytest.fixture(scope="module")
def make(random_model):
    engines = {}

    def make(policy, codec):
        if (policy, codec) not in engines:
            engines[policy, codec] = alisa_jax.Engine(random_model(), policy, codec)
        return engines[policy, codec]

    return make


def sequences(seed=0, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 37, n).tolist() for n in lengths]


@pytest.mark.parametrize("policy, codec", [("dense", CODECS[1]), ("swa(kv_sparsity=0.6)", CODECS[0])])
def test_both_protocols_agree_and_a_batch_gives_what_its_sequences_give(make, policy, codec):
    """Codes may differ by one step where a value lies on the border between two: hence the mean."""
    engine, batch = make(policy, codec), sequences()
    decoded, masked = (engine.score(batch, protocol=p) for p in ("decode", "prefill_mask"))
    for a, b in zip(decoded.logprobs, masked.logprobs):
        assert np.abs(a - b).mean() < 1e-4
    np.testing.assert_allclose(decoded.clipped_frac, masked.clipped_frac, atol=2e-3)
    np.testing.assert_allclose(decoded.attended_frac, masked.attended_frac, rtol=1e-5)
    for i in (1, 2):
        alone = engine.score([batch[i]], protocol="decode")
        np.testing.assert_allclose(alone.logprobs[0], decoded.logprobs[i], atol=1e-4)


@pytest.mark.parametrize("codec", CODECS)
def test_codes_cost_little_and_not_nothing(make, codec):
    raw, coded = (make("dense", c).score(sequences(3)) for c in ("raw", codec))
    error = np.abs(np.concatenate(raw.logprobs) - np.concatenate(coded.logprobs))
    assert 1e-6 < error.mean() < 0.1  # a range from 6 tokens is not much


def test_generation_across_a_bucket_border_gives_batch_and_single_the_same(make):
    engine, prompts = make("swa(kv_sparsity=0.6)", CODECS[0]), sequences(5, (30, 6, 17))
    together = engine.generate(prompts, 12)
    assert bucket(30) < 30 + 12
    for i, prompt in enumerate(prompts):
        alone = engine.generate([prompt], 12)
        assert alone.tokens[0] == together.tokens[i]
        np.testing.assert_allclose(alone.margins[0], together.margins[i], atol=1e-3)


def test_bytes_are_those_of_the_codes_once_the_range_is_frozen(make):
    B, T, layers, K, H = 3, 41, 1, 2, 6
    for codec, by_token, by_sequence in [(CODECS[0], 2 * K * H, 16 * K * H), (CODECS[1], 2 * K * (H + 3), 0)]:
        engine = make("dense", codec)
        content, other = engine.state_bytes(B, T)
        assert content == B * layers * (bucket(T) * by_token + by_sequence)
        assert content == B * layers * (bucket(T) * engine.codec.token_bytes(K, H) + engine.codec.sequence_bytes(K, H))
        assert engine.score(sequences()).kv_bytes_per_token == content / (B * bucket(T))
        assert other == B * layers * (bucket(T) * 8 + 4)  # positions, biases and the length


def test_sequences_shorter_than_the_calibration_are_refused(make):
    engine = make("dense", CODECS[0])
    with pytest.raises(
        ValueError, match=r"first 6 tokens of each sequence; sequence 1 has 5: give calibration_tokens=5"
    ):
        engine.generate(sequences(0, (8, 5)), 4)
    with pytest.raises(ValueError, match="first 6 tokens of each sequence; sequence 0 has 5"):
        engine.score(sequences(0, (6, 9)))  # 5 tokens are fed: the last one is only scored
    assert make("dense", CODECS[1]).generate(sequences(0, (1, 5)), 2).tokens


@pytest.fixture(scope="module")
def scored(trained, story_ids):
    """`scored(policy, codec)`: all stories under the trained model."""

    @functools.cache
    def score(policy, codec):
        return alisa_jax.Engine(trained, policy, codec).score(story_ids, protocol="prefill_mask")

    return score


def perplexity(logprobs):
    return float(np.exp(-np.concatenate(logprobs).mean()))


@pytest.mark.usefixtures("optimised")
@pytest.mark.full(sample=1)
@pytest.mark.parametrize("policy, axes", [("dense", ("int8", "int8(axis=token)")), ("swa(kv_sparsity=0.8)", ("int8",))])
def test_int8_costs_less_than_half_a_percent_of_perplexity_on_a_trained_model(scored, policy, axes):
    raw = perplexity(scored(policy, "raw").logprobs)
    for codec in axes:
        assert abs(perplexity(scored(policy, codec).logprobs) / raw - 1) < 0.005


@pytest.mark.usefixtures("optimised")
def test_ranges_of_rotated_keys_must_hold_their_rotations(trained, story_ids, scored):
    """Why `key_range=rotary` is the default: the range that the first keys happen to fill does not last."""
    ours = scored("dense", "int8")
    literal = alisa_jax.Engine(trained, "dense", "int8(key_range=minmax)").score(story_ids[:8], protocol="prefill_mask")
    assert perplexity(literal.logprobs) > 1.5 * perplexity(ours.logprobs[:8])
    assert literal.clipped_frac.mean() > 0.03 > 0.001 > ours.clipped_frac.mean()
