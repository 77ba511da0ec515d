"""Generation through the kernels, interpreted, gives the tokens that XLA gives: every policy, codec and route."""

import functools

import numpy as np
import pytest

import alisa_jax
from alisa_jax.policies import POLICIES, parse
from tests.policies.test_policy_contract import example, label

pytestmark = pytest.mark.slow

CODECS = ("int8(calibration_tokens=5)", "int8(axis=token)")
# Beside the example of every policy: one that has no working set, and a selection per kv head with dense steps between.
MORE = ("strided(kv_sparsity=0.6,anchor=query)", "swa(kv_sparsity=0.6,shared_heads=false,refresh_every=5)")
PROMPTS = [np.random.default_rng(7).integers(0, 37, n).tolist() for n in (11, 5)]


@functools.cache
def _tokens(model, policy, codec, route, impl):
    engine = alisa_jax.Engine(model, policy, codec, route=route, attention_impl=impl)
    return engine.implementation, engine.generate(PROMPTS, 9)


def same(model, policy, codec, route="auto"):
    (ran, want), (kernels, got) = (_tokens(model, policy, codec, route, impl) for impl in ("xla", "interpret"))
    assert ran.startswith("xla:") and kernels == ran.replace("xla:", "interpret:")
    assert got.tokens == want.tokens
    np.testing.assert_allclose(got.logprobs[0], want.logprobs[0], atol=1e-4)
    assert min(want.margins[0]) > 1e-4  # no token of this test hangs on rounding


@pytest.mark.parametrize(
    "policy",
    [*(pytest.param(example(name), marks=pytest.mark.full(sample=3)) for name in POLICIES), *map(parse, MORE)],
    ids=label,
)
def test_every_policy_gives_the_same_tokens(random_model, policy):
    same(random_model(), policy, "raw")


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_gives_the_same_tokens(random_model, codec):
    same(random_model(), example("swa"), codec)


@pytest.mark.parametrize("codec", ("raw", *CODECS))
def test_reading_by_index_gives_the_same_tokens(random_model, codec):
    same(random_model(), "strided(kv_sparsity=0.6)", codec, "indexed")


@pytest.mark.slow
def test_layers_that_are_streamed_from_the_host_give_the_same_tokens(random_model):
    engine = alisa_jax.Engine(random_model(), placement="accelerate", attention_impl="interpret")
    run = engine.generate(PROMPTS, 9)
    assert (
        run.placement.load_bytes > 0
        and run.tokens == _tokens(random_model(), parse("dense"), "raw", "auto", "xla")[1].tokens
    )


def test_auto_says_why_it_is_xla(random_model):
    engine = alisa_jax.Engine(random_model())
    assert engine.implementation == "xla:working_set"
    assert engine.implementation_reason == "it needs a GPU, and the device is cpu"


def test_kernels_that_cannot_run_are_refused_before_anything_runs(random_model):
    with pytest.raises(
        ValueError, match=r"impl=pallas cannot run: it needs a GPU, and the device is cpu; give impl=auto"
    ):
        alisa_jax.Engine(random_model(), attention_impl="pallas")
    with pytest.raises(ValueError, match=r"impl must be one of auto, xla, pallas, interpret; got 'triton'"):
        alisa_jax.Engine(random_model(), attention_impl="triton")
