"""Mistakes are told in one sentence that names what was given and what is allowed; texts go in and come out."""

import numpy as np
import pytest

import alisa_jax
from alisa_jax import Batch


@pytest.fixture(scope="module")
def engine(random_model):
    return alisa_jax.Engine(random_model(max_positions=64), "dense")


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and 20 < len(text) < 400
    return text


def refused(call, *parts):
    """`call` raises ValueError, in one sentence that holds all of `parts`."""
    with pytest.raises(ValueError) as error:
        call()
    text = one_sentence(error)
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize(
    "prompts, parts",
    [
        ([], ("at least one sequence", "none")),
        ([[1, 2], []], ("at least one token", "number 1")),
        ([[1, 2], [3, 37]], ("[0, 37)", "sequence 1 has 37 at position 1")),
        ([[1, -1]], ("[0, ", "-1")),
        ([[1, 2**40]], ("[0, ", str(2**40))),
        ([1, 2], ("list of token ids", "number 0 is 1")),
        ([[1.5, 2.0]], ("whole numbers", "[1.5, 2.0]")),
        ("a text", ("list of sequences", "'a text'")),
        (["a text"], ("no tokenizer", "random", "token ids")),
        ([[1] * 60], ("64", "65")),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(engine, prompts, parts):
    before = engine.compiles
    refused(lambda: engine.generate(prompts, 5), *parts)
    refused(lambda: engine.score([[1] * 65] if prompts == [[1] * 60] else prompts), *parts)
    assert engine.compiles == before


def test_padding_of_a_batch_need_not_be_in_the_vocabulary(engine):
    batch = Batch.from_padded(np.array([[-100, 5, 6], [7, 8, 9]]), np.array([[0, 1, 1], [1, 1, 1]]))
    assert engine.batch(batch).tokens.tolist() == [[5, 6, 0], [7, 8, 9]]


@pytest.mark.parametrize(
    "mask, parts",
    [
        ([[1, 0, 1]], ("one side", "row 0")),
        ([[0, 0, 0]], ("at least one token", "number 0")),
        ([[1, 1]], ("[B, T]", "(1, 3)", "(1, 2)")),
    ],
)
def test_bad_padding_is_refused(mask, parts):
    refused(lambda: Batch.from_padded(np.array([[1, 2, 3]]), np.array(mask)), *parts)


def test_a_number_of_new_tokens_below_one_is_refused(engine):
    refused(lambda: engine.generate([[1]], 0), "max_new_tokens", "at least 1", "got 0")


def test_a_score_of_one_token_is_refused(engine):
    refused(lambda: engine.score([[1, 2], [3]]), "at least 2 tokens", "number 1 has 1")


def test_an_unknown_protocol_is_refused(engine):
    refused(lambda: engine.score([[1, 2]], "guess"), "decode, prefill_mask", "'guess'")


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (dict(policy="dens"), ("dens", "dense", "local", "strided", "swa")),
        (dict(policy="swa(kv_sparsity=1.0)"), ("kv_sparsity", "[0, 1)", "1.0")),
        (dict(policy="swa(sparsity=0.5)"), ("sparsity", "kv_sparsity")),
        (dict(policy="swa(kv_sparsity=0.5,dense_layers=2)"), ("dense_layers", "at most 1", "got 2")),
        (dict(codec="zip"), ("zip", "raw")),
        (dict(codec="raw(dtype=int3)"), ("dtype", "int3", "float32")),
        (dict(route="fast"), ("route", "'fast'", "working_set", "indexed", "masked")),
        (dict(policy="strided(kv_sparsity=0.5,anchor=query)", route="working_set"), ("working_set", "indexed, masked")),
    ],
)
def test_settings_that_do_not_go_together_are_refused(random_model, arguments, parts):
    model = random_model()
    refused(lambda: alisa_jax.Engine(model, **arguments), *parts)


def test_a_window_that_grows_with_the_context_is_refused_beyond_its_limit(random_model):
    model = random_model(max_positions=20_000)
    engine = alisa_jax.Engine(model, "swa(kv_sparsity=0.8)")
    engine.validate(16_384)
    refused(lambda: engine.generate([[1] * 385], 16_000), "16384", "got a context of 16385", "window=<rows>")
    assert engine.compiles == 0
    alisa_jax.Engine(model, "swa(kv_sparsity=0.8,window=64)").validate(20_000)


def test_encode_starts_with_the_bos_and_decode_brings_the_text_back(trained):
    text = 'Lily saw a big, red ball.\nShe said: "naïve 日本".'
    ids = trained.encode(text)
    assert ids[0] == trained.bos_id and ids.count(trained.bos_id) == 1
    assert ids == trained.tokenizer.encode(text).ids  # the tokenizer's own template says the same
    assert trained.decode(ids) == text
    assert trained.encode("") == [trained.bos_id]


def test_text_without_a_tokenizer_is_refused(random_model):
    model = random_model()
    refused(lambda: model.encode("a"), "random", "no tokenizer")
    refused(lambda: model.decode([1]), "random", "no tokenizer")
