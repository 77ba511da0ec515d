"""Kinds of caches under placement: each gives the tokens of the cache that grows, within its budgets.

Keys that are stored before their rotation, tokens that are kept raw beside their codes, sets that grow after a prompt, steps
that attend everything, and the routes without a working set.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import alisa_jax
from alisa_jax.codecs import Raw
from tests.engine.offload.test_placed_runs import fitting, placed, run_and_compare, texts

pytestmark = pytest.mark.slow
__all__ = ["placed"]


@dataclass(frozen=True)
class Unturned(Raw):
    """K before its rotation, and V."""

    raw_keys: ClassVar[bool] = True


PROMPTS = (7, 33, 33)  # with 15 new tokens, stores of 48 tokens: no multiple of 32
LONGER = (7, 50, 50)  # with 20 new tokens, what is away is wanted again
SKVQ = "skvq(group=3,window=20,sinks=3,reorder=false)"  # the window is longer than a page
HEADS = "skvq(k_bits=3,group=3,window=20,sinks=3,reorder=false,span=head)"
STAYING = (
    ("streaming(kv_sparsity=0.5,positions=cache)", "raw"),
    ("dense", SKVQ),
    ("swa(kv_sparsity=0.6,shared_heads=false)", HEADS),
    ("swa(kv_sparsity=0.5,refresh_every=3)", "raw"),
    ("snapkv(capacity=16,window=4)", "raw"),
    ("merge(share=0.5,dense_layers=1)", "raw"),
    ("double_sparsity(kv_sparsity=0.5,channels=1,dense_layers=1)", "raw"),
    ("strided(kv_sparsity=0.5,anchor=query)", "raw"),
)
LEAVING = (
    ("alisa(p1=0,beta=0.4,p2=4)", "dense", SKVQ, "rows"),
    ("flexgen(cache_device_frac=0.4)", "dense", HEADS, "pages"),
    ("alisa(p1=0,beta=0.4,p2=2)", "swa(kv_sparsity=0.6,local_frac=0.2,spare_slots=0)", SKVQ, "rows"),
    ("accelerate", "swa(kv_sparsity=0.6,local_frac=0.2,shared_heads=false)", HEADS, "pages"),
    ("alisa(p1=0,beta=0.4,p2=4)", "dense", Unturned(), "rows"),
    ("alisa(p1=0,beta=0.4,p2=2)", "swa(kv_sparsity=0.6,spare_slots=0)", Unturned(), "rows"),
    ("alisa(p1=0,recompute=false)", "swa(kv_sparsity=0.6,refresh_every=3,spare_slots=0)", "raw", "rows"),
    ("flexgen(cache_device_frac=0.4)", "swa(kv_sparsity=0.6,refresh_every=4,dense_layers=1)", "raw", "pages"),
    ("accelerate", "swa(kv_sparsity=0.6,refresh_every=4)", SKVQ, "rows"),
)


@pytest.fixture(scope="module")
def resident(placed):
    """The cache that grows."""

    @functools.cache
    def make(policy, codec, prompts, new_tokens):
        return placed(policy, codec).under("resident").generate(texts(prompts), new_tokens, ())

    return make


@pytest.mark.full(sample=1)
@pytest.mark.parametrize("policy, codec", STAYING, ids=[" | ".join(pair) for pair in STAYING])
def test_what_stays_on_the_device_gives_the_tokens_of_resident_within_its_budgets(placed, resident, policy, codec):
    """Sequence by sequence, in the least that each needs."""
    run = run_and_compare(placed, resident, ("waves", policy, codec), PROMPTS, 15, None, float("inf"), "rows")
    assert run.groups == 3 and run.load_bytes == run.store_bytes == 0


def test_a_resident_cache_of_a_known_size_gives_the_tokens_of_one_that_grows(placed, resident):
    system = ("resident", *STAYING[0])
    assert run_and_compare(placed, resident, system, PROMPTS, 15, None, float("inf"), "rows").groups == 1


@pytest.mark.full(sample=1)
@pytest.mark.parametrize("system", LEAVING, ids=lambda s: " | ".join(map(str, s)))
def test_what_leaves_the_device_gives_the_tokens_of_resident_within_its_budgets(placed, resident, system):
    *names, reads = system
    run = run_and_compare(placed, resident, tuple(names), LONGER, 20, 0.0, float("inf"), reads)
    assert run.store_bytes > 0 and run.load_bytes > 0 and run.p1 < 20
    if "beta" in system[0]:
        assert run.p2 < 20 and run.recomputed_rows > 0


@pytest.mark.full(sample=1)
@pytest.mark.parametrize("policy", ["dense", "swa(kv_sparsity=0.5)", "snapkv(capacity=16,window=4)"])
def test_the_masked_reference_runs_where_nothing_leaves_the_device(random_model, policy):
    base = alisa_jax.Engine(random_model(n_layers=2, max_positions=256), policy, placement="waves", route="masked")
    expected = base.under("resident").generate(texts(PROMPTS), 15, ())
    made = fitting(base.under("waves", 1.0), PROMPTS, 15).generate(texts(PROMPTS), 15, ())
    assert made.tokens == expected.tokens and made.placement.groups == 3
    np.testing.assert_allclose(np.concatenate(made.logprobs), np.concatenate(expected.logprobs), atol=2e-5)


@pytest.mark.full
@pytest.mark.parametrize("spec", ["alisa(p1=0,recompute=false)", "alisa(p1=0,recompute=false,lag=1)"])
def test_scores_of_steps_that_attend_everything_are_those_of_resident(placed, spec):
    """Where every step does, what came a step late is not missed."""
    base = placed(f"swa(kv_sparsity=0.6,refresh_every={1 if 'lag' in spec else 3},shared_heads=false)", "raw")
    sequences, last = texts((52, 41)), [19, 10]
    expected = base.under("resident").score(sequences, "prompt", last=last)
    one = fitting(base.under(spec, 1.0), tuple(n - k for n, k in zip((52, 41), last)), max(last))
    made = one.score(sequences, "prompt", last=last)
    assert made.placement.load_bytes > 0
    np.testing.assert_allclose(np.concatenate(made.logprobs), np.concatenate(expected.logprobs), atol=2e-5)
    np.testing.assert_allclose(made.attended_frac, expected.attended_frac, rtol=1e-5)
