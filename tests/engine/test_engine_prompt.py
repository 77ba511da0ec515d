"""Protocol `prompt`: the last tokens after a dense prompt; and keys that are stored before their rotation."""

import dataclasses

import numpy as np
import pytest

import alisa_jax
from alisa_jax.engine import prompts
from alisa_jax.engine.batch import Batch
from alisa_jax.policies import Dense

LENGTHS = (21, 9, 24)  # of prompts; with what follows they fill a context bucket
NEW = 8


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(4)
    return [rng.integers(0, 37, n).tolist() for n in LENGTHS]


@pytest.mark.slow
def test_tokens_after_a_prompt_score_as_they_were_generated(random_model, texts):
    engine = alisa_jax.Engine(random_model(), "swa(kv_sparsity=0.6)", "int8(calibration_tokens=9)")
    made = engine.generate(texts, NEW)
    whole = [a + b for a, b in zip(texts, made.tokens, strict=True)]
    found = engine.score(whole, "prompt", last=[NEW] * 3)
    np.testing.assert_allclose(found.logprobs, made.logprobs, atol=2e-5)
    assert all(row.all() for row in found.correct) and found.decoded_tokens == 3 * (NEW - 1)


def test_where_attention_is_dense_a_prompt_gives_what_decoding_gives(random_model, texts):
    engine = alisa_jax.Engine(random_model(), "dense")
    last = [3, 5, 1]
    found, decoded = engine.score(texts, "prompt", last=last), engine.score(texts, last=last)
    for a, b, n in zip(found.logprobs, decoded.logprobs, last, strict=True):
        assert len(a) == n
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_choices_share_the_prompt_that_they_have_in_common(random_model, texts):
    engine = alisa_jax.Engine(random_model(), "swa(kv_sparsity=0.6)")
    rng = np.random.default_rng(5)
    items = [(0, 3), (2, 1), (1, 4), (0, 2), (2, 5)]
    sequences = [texts[i] + rng.integers(0, 37, n).tolist() for i, n in items]
    last = [n for _, n in items]
    together = engine.score(sequences, "prompt", last=last)
    apart = engine.score([sequences[i] for i in (0, 1, 4)], "prompt", last=[3, 1, 5]).logprobs
    for i, row in zip((0, 1, 4), apart, strict=True):
        np.testing.assert_allclose(together.logprobs[i], row, atol=2e-5)


def test_equal_prompts_are_read_once(random_model, texts, monkeypatch):
    engine, read = alisa_jax.Engine(random_model(), "dense"), []
    begin = prompts.begin
    monkeypatch.setattr(prompts, "begin", lambda e, batch, n: read.append(batch.length.tolist()) or begin(e, batch, n))
    engine.score([texts[0] + [1], texts[0] + [2], texts[1] + [1]], "prompt", last=[1, 1, 1])
    assert read == [[21, 9]]


@pytest.mark.parametrize(
    "last, codec, says",
    [
        (None, "raw", "needs last="),
        ([1, 9, 1], "raw", "1..8 for sequence 1; got 9"),
        ([1, 5, 1], "int8(calibration_tokens=9)", "sequence 1 has 4"),
    ],
)
def test_what_a_prompt_needs_is_told_before_anything_runs(random_model, texts, last, codec, says):
    engine = alisa_jax.Engine(random_model(), "dense", codec)
    with pytest.raises(ValueError, match=says.replace("(", r"\(").replace("..", r"\.\.")):
        engine.score(texts, "prompt", last=last)
    assert engine.compiles == 0


@dataclasses.dataclass(frozen=True)
class RawDense(Dense):
    """Dense, with keys stored before their rotation."""

    raw_keys = True


@pytest.mark.slow
def test_keys_that_are_turned_when_they_are_read_give_the_same_numbers(random_model, texts):
    model, last = random_model(), [3] * 3
    exact, engine = alisa_jax.Engine(model, "dense"), alisa_jax.Engine(model, RawDense())
    assert engine.attention_choice.reason == "keys that are stored before their rotation are turned by XLA"
    for protocol in ("decode", "prompt", "prefill_mask"):
        found, wanted = (e.score(texts, protocol, last=last).logprobs for e in (engine, exact))
        np.testing.assert_allclose(found, wanted, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8(calibration_tokens=8)", "int4(group=2)"])
def test_every_codec_takes_keys_before_their_rotation(random_model, texts, codec):
    """What attention is made of is then the decoded key, turned: the same numbers by a route of its own."""
    model = random_model()
    engine = alisa_jax.Engine(model, RawDense(), codec)
    decoded, masked = (engine.score(texts, p) for p in ("decode", "prefill_mask"))
    for a, b in zip(decoded.logprobs, masked.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    exact = alisa_jax.Engine(model, "dense").score(texts, "prefill_mask")
    error = max(np.abs(a - b).mean() for a, b in zip(decoded.logprobs, exact.logprobs, strict=True))
    assert 1e-6 < error < 0.2


def test_a_batch_of_prompts_is_fed_as_it_is_unless_a_layer_chooses(random_model, texts):
    engine, batch = alisa_jax.Engine(random_model(), "dense"), Batch.from_lists(texts)
    assert prompts.condensed(engine, batch) is batch
