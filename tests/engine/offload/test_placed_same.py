"""Generation and scores under every controller are those of a resident cache: greedy, drawn, with stops, streamed."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

import alisa_jax
from alisa_jax.models import Decoder
from tests.alike import same_tokens
from tests.engine.offload.test_placed_runs import fitting, texts

pytestmark = pytest.mark.slow

LENGTHS, NEW = (40, 23, 40), 24
SELECTING = ("dense", "swa(kv_sparsity=0.6,spare_slots=0)", "swa(kv_sparsity=0.5,shared_heads=false,dense_layers=1)")
EVICTING = ("h2o(kv_sparsity=0.6)", "local(kv_sparsity=0.5)", "streaming(kv_sparsity=0.5)")
CODECS = ("raw", "int8(calibration_tokens=16)", "int8(axis=token)", "int4")
OFFLOADING = ("accelerate", "flexgen(cache_device_frac=0.4)", "alisa(p1=0)", "alisa(p1=0,traffic=paper,beta=0.4,p2=2)")
CASES = [
    *itertools.product(SELECTING, CODECS, (*OFFLOADING, "waves")),
    *itertools.product(EVICTING, CODECS, ("waves",)),
    ("gemfilter(layer=1,tokens=20)", "raw", "accelerate"),
]
DRAWN = alisa_jax.Sampling(0.8, top_k=12)
CODES = 5e-3  # nats: where programs differ in shape, rounding can turn a code by one step


@pytest.fixture(scope="module")
def resident(random_model):
    @functools.cache
    def make(policy, codec):
        return alisa_jax.Engine(random_model(n_layers=2, max_positions=256), policy, codec)

    return make


def placed(engine, controller, lengths=LENGTHS, new=NEW):
    """`engine` at the smallest budgets that the controller accepts."""
    fed = [int(engine.policy.feeds(n)) for n in lengths]
    one = fitting(engine.under(controller, 1.0, 1.0 if controller != "waves" else "inf"), fed, new)
    assert one is not None
    return one


@pytest.mark.full(sample=1)
@pytest.mark.parametrize("policy, codec, controller", CASES, ids=map(" | ".join, CASES))
def test_tokens_are_those_of_a_resident_cache(resident, policy, codec, controller):
    engine, prompts = resident(policy, codec), texts(LENGTHS)
    one = placed(engine, controller)
    greedy, drawn = engine.generate(prompts, NEW, ()), engine.generate(prompts, NEW, (), sampling=DRAWN, seed=3)
    same_tokens(one.generate(prompts, NEW, ()), greedy, close(codec))
    moved = one.generate(prompts, NEW, (), sampling=DRAWN, seed=3)
    same_tokens(moved, drawn, close(codec))
    assert drawn.tokens != greedy.tokens
    assert moved.placement.device_peak_bytes <= one.placement.device_kv_bytes
    assert moved.placement.groups > 1 if controller == "waves" else moved.placement.store_bytes > 0
    eos = [drawn.tokens[0][3], drawn.tokens[1][9]]
    stopped = one.generate(prompts, NEW, eos, sampling=DRAWN, seed=3)
    for tokens, whole, reason in zip(stopped.tokens, moved.tokens, stopped.finish_reasons, strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if token in eos), NEW)
        assert tokens == whole[:end] and reason == ("length" if end == NEW else "stop_token")
    assert stopped.placement.load_bytes <= moved.placement.load_bytes


@pytest.mark.full(sample=1)
@pytest.mark.parametrize("policy, codec, controller", CASES, ids=map(" | ".join, CASES))
def test_scores_are_those_of_a_resident_cache(resident, policy, codec, controller):
    engine, last = resident(policy, codec), (9, 24, 1)
    sequences = texts((52, 47, 40))
    heads = [len(ids) - n for ids, n in zip(sequences, last, strict=True)]
    here = engine.score(sequences, "prompt", last=last)
    there = placed(engine, controller, heads, max(last)).score(sequences, "prompt", last=last)
    agree(there, here, last, close(codec))
    if engine.codec.frozen_after:  # then the first tokens are read as a prompt
        return
    here = engine.score(sequences)
    there = placed(engine, controller, (1, 1, 1), 51).score(sequences)
    agree(there, here, [len(ids) - 1 for ids in sequences], close(codec))
    ends = placed(engine, controller, (1, 1, 1), 51).score(sequences, last=last)
    for row, whole, n in zip(ends.logprobs, there.logprobs, last, strict=True):
        np.testing.assert_array_equal(row, whole[-n:])


def close(codec):
    """By how much log-probabilities may differ."""
    return 1e-4 if codec == "raw" else CODES


def agree(there, here, counts, atol):
    assert [len(row) for row in there.logprobs] == list(counts)
    for name in ("logprobs", "correct"):
        for a, b in zip(getattr(there, name), getattr(here, name), strict=True):
            np.testing.assert_allclose(a, b, atol=atol)
    np.testing.assert_allclose(there.attended_frac, here.attended_frac, atol=1e-6)
    np.testing.assert_allclose(there.clipped_frac, here.clipped_frac, atol=1e-6)
    assert there.decoded_tokens == here.decoded_tokens and here.placement is None
    assert there.placement.device_peak_bytes > 0 and np.isnan(there.loads_per_token).all()


def test_a_codec_that_calibrates_reads_its_first_tokens_as_a_prompt(resident):
    engine = resident("dense", "int8(calibration_tokens=16)")
    sequences = texts((40, 33))
    here, there = engine.score(sequences), engine.under("waves").score(sequences)
    raw = resident("dense", "raw").score(sequences)
    for a, b, c in zip(here.logprobs, there.logprobs, raw.logprobs, strict=True):
        np.testing.assert_allclose(b[:16], c[:16], atol=1e-5)  # until then nothing is encoded
        np.testing.assert_allclose(b, a, atol=CODES)
    with pytest.raises(
        ValueError, match="prefill_mask .* keeps no cache that could be placed: give placement=resident"
    ):
        engine.under("waves").score(sequences, "prefill_mask")


def test_where_nothing_has_to_leave_the_bits_are_those_of_one_run_on_the_device(resident):
    engine, prompts = resident("swa(kv_sparsity=0.6,spare_slots=0)", "raw"), texts(LENGTHS)
    waves, alisa = (engine.under(name).generate(prompts, NEW, ()) for name in ("waves", "alisa"))
    assert waves.tokens == alisa.tokens
    for name in ("logprobs", "margins"):
        for a, b in zip(getattr(waves, name), getattr(alisa, name), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def bundled():
    """The first two layers of the bundled model, which are quick to compile, and its tokenizer."""
    model = alisa_jax.load("bundled")
    decoder = Decoder(dataclasses.replace(model.decoder.config, n_layers=2))
    params = model.params | {"blocks": model.params["blocks"][:2]}
    return alisa_jax.Engine(dataclasses.replace(model, decoder=decoder, params=params), "swa(kv_sparsity=0.6)")


@pytest.mark.full(sample=1)
@pytest.mark.parametrize("controller", ["alisa(p1=0)", "flexgen(cache_device_frac=0.4)", "waves"])
def test_stop_strings_and_streamed_text_are_those_of_a_resident_cache(bundled, controller):
    prompts = ["def fibonacci(n):\n    if n <", "import os\nimport sys\nimport", "class Foo:\n    def __init__"]
    lengths = [len(bundled.model.encode(text)) for text in prompts]
    one = placed(bundled, controller, lengths, 24)
    free = bundled.generate(prompts, 24, ())
    stop = free.completions[0][len(free.completions[0]) // 2 :][:2]
    results = []
    for engine in (bundled, one):
        pieces = [[], [], []]
        made = engine.generate(prompts, 24, (), stop=stop, on_text=lambda i, piece, p=pieces: p[i].append(piece))
        assert ["".join(some) for some in pieces] == made.completions
        results.append(made)
    here, there = results
    if not same_tokens(there, here):
        assert (there.completions, there.texts, there.finish_reasons) == (
            here.completions,
            here.texts,
            here.finish_reasons,
        )
    assert here.finish_reasons[0] == "stop_string" and here.placement.load_bytes == 0


def test_budgets_are_numbers_or_texts(resident):
    engine = resident("dense", "raw")
    dense = 2 * 2 * 2 * 6 * 4 * 2 * (40 + 24 - 1)  # K and V, layers, kv heads, H, float32, batch, longest at the end
    setting = engine.under("waves", "0.5x", 1e6).placement.setting((40, 12), 24)
    assert (setting.device_kv_bytes, setting.host_kv_bytes) == (dense / 2, 1e6)
    assert engine.under("resident").placement is None
    budgeted = engine.under("resident", "64KiB")
    assert budgeted.placement.setting((40, 12), 24).device_kv_bytes == 65536
    same_tokens(budgeted.generate(texts((40, 12)), 9, ()), engine.generate(texts((40, 12)), 9, ()))
    with pytest.raises(ValueError, match="resident needs device_kv_bytes of at least [0-9]+ here; got 10"):
        engine.under("resident", 10).generate(texts((40, 12)), 9)
    for wrong, says in (
        ("2 gigs", "device_kv_bytes: '2 gigs' is no size"),
        (-1, "at least 0; got -1"),
        ([1], "got \\[1\\]"),
    ):
        with pytest.raises(ValueError, match=says):
            engine.under("waves", wrong)
    assert engine.compiles == engine.under("alisa").compiles


def test_a_resident_cache_reports_the_bytes_that_it_held(random_model):
    engine = alisa_jax.Engine(random_model(max_positions=256))
    short, long = (engine.generate(texts((20, 9)), new, ()).placement for new in (4, 40))
    held = [sum(engine.state_bytes(2, tokens)) for tokens in (32, 64)]
    assert short.device_peak_bytes == held[0]
    assert long.device_peak_bytes == sum(held)  # the one layer, while it grew
    assert (long.p1, long.p2, long.groups, long.effective_batch, long.host_reads) == (40, 40, 1, 2, "")
