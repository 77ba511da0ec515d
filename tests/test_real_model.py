"""SmolLM2-135M-Instruct, a real model in 4 bits: its numbers are those that transformers has from the same file.

`make real-model` fetches the model; without it these tests are skipped. The numbers of transformers (5.23, torch on a CPU,
float32) were read once: `AutoModelForCausalLM.from_pretrained(folder, gguf_file=...)` on the windows below.
"""

import math

import jax
import numpy as np
import pytest

import alisa_jax
from alisa_jax.models import smollm2

pytestmark = pytest.mark.slow

WINDOWS, CONTEXT, STRIDE = 8, 512, 511
SHORT = 97  # tokens of a window that is decoded step by step; int8(axis=channel) keeps the first 64 raw
TRANSFORMERS = 19.5119
OF_WINDOWS = [15.659, 16.875, 19.922, 22.465, 16.409, 19.414, 26.123, 21.346]
FIRST_IDS = [3717, 446, 12928, 21777, 310, 2078, 21777, 446, 3717, 3717]


@pytest.fixture(scope="module")
def model():
    if not smollm2.path().is_file():
        pytest.skip(f"{smollm2.NAME} is not on this machine: `make real-model` fetches it")
    return alisa_jax.load(smollm2.NAME)


@pytest.fixture(scope="module")
def windows(model, test_data):
    """As `eval.perplexity` cuts a text: each window begins with the last token of the one before, and has no BOS."""
    path = test_data / "text" / "wikitext2_valid.txt"
    if not path.is_file():
        pytest.skip("the test data holds no wikitext2_valid.txt")
    ids = model.encode(path.read_bytes().decode()[:30_000])
    return [ids[i * STRIDE : i * STRIDE + CONTEXT] for i in range(WINDOWS)]


@pytest.fixture(scope="module")
def reference(model, windows):
    """Log-probabilities of one pass per layer over the windows, nothing quantised: [8, 511]."""
    jax.config.update("jax_disable_most_optimizations", False)  # this runs long enough to need them
    try:
        return scored(model, windows, protocol="prefill_mask")
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def scored(model, sequences, codec="raw", protocol="decode"):
    return np.stack(alisa_jax.Engine(model, codec=codec).score(sequences, protocol).logprobs).astype(np.float64)


def perplexity(logprobs):
    return math.exp(-logprobs.mean())


def test_a_text_has_the_ids_of_the_model_and_no_bos(model, windows):
    assert windows[0][:10] == FIRST_IDS
    assert model.encode("2024 is<|im_end|>\r\n") == [34, 32, 34, 36, 314, 2, 2738]
    assert model.bos_id is None and model.eos_ids == (2,)


def test_the_capital_of_france(model):
    made = alisa_jax.Engine(model).generate(["The capital of France is"], max_new_tokens=2)
    assert made.completions == [" Paris."]


def test_the_perplexity_is_that_of_transformers(reference):
    assert perplexity(reference) == pytest.approx(TRANSFORMERS, abs=1e-3)
    assert [perplexity(window) for window in reference] == pytest.approx(OF_WINDOWS, abs=2e-3)


def test_decoding_gives_what_one_pass_gives(model, windows, reference):
    """A token's log-probability hangs on what stands before it alone, so windows may be cut short."""
    decoded = scored(model, [window[:SHORT] for window in windows])
    assert np.abs(decoded - reference[:, : SHORT - 1]).max() < 1e-3


@pytest.mark.full(sample=1)
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_int8_is_within_half_a_percent(axis, model, windows, reference):
    found = scored(model, [window[:SHORT] for window in windows], f"int8(axis={axis})")
    raw = reference[:, : SHORT - 1]
    assert perplexity(found) == pytest.approx(perplexity(raw), rel=0.005)
    assert np.abs(found - raw)[:, 64:].mean() > 1e-3  # it was quantised


@pytest.mark.full(sample=0)
@pytest.mark.parametrize("codec", ["raw", "int8(axis=channel)", "int8(axis=token)"])
def test_decoding_every_window_is_within_half_a_percent(codec, model, windows):
    bound = 0.01 / TRANSFORMERS if codec == "raw" else 0.005
    assert perplexity(scored(model, windows, codec)) == pytest.approx(TRANSFORMERS, rel=bound)
