"""Placed runs of a small random model: every controller gives the tokens of one run on the device, moves what its plans
say, and stays within its budgets."""

import dataclasses
import functools
import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import alisa_jax
from alisa_jax import placement
from alisa_jax.engine.offload import by_rows
from alisa_jax.placement import mover
from alisa_jax.placement.plan import Controller, moved_bytes
from alisa_jax.policies import Swa, budget, swap
from alisa_jax.policies.base import column, positions

PROMPTS = ((20, 33, 33), (40, 40, 40), (7, 50, 50))  # of one size and, at first, one bucket: programs are shared
SYSTEMS = (
    ("accelerate", "dense", "raw"),
    ("flexgen(cache_device_frac=0.4)", "dense", "int8(axis=token)"),
    ("alisa(p1=0,beta=0.3,p2=4)", "dense", "raw"),
    ("alisa", "swa(kv_sparsity=0.6,spare_slots=0)", "int8(axis=token)"),
    ("flexgen(cache_device_frac=0.5)", "swa(kv_sparsity=0.3,local_frac=0.0,dense_layers=1)", "raw"),
    ("alisa(traffic=paper,beta=0.4,p2=2)", "swa(kv_sparsity=0.6,shared_heads=false)", "raw"),
    ("accelerate", "double_sparsity(kv_sparsity=0.6,channels=1,dense_layers=1)", "int8(axis=token)"),
)


@pytest.fixture(scope="module")
def placed(random_model):
    """`placed(policy, codec)`: under the controller waves without budgets, so in one run that keeps all on the device."""
    model = random_model(n_layers=2, max_positions=256)

    @functools.cache
    def make(policy, codec):
        return alisa_jax.Engine(model, policy, codec, "waves")

    return make


@pytest.fixture(scope="module")
def resident(placed):
    @functools.cache
    def make(policy, codec, prompts, new_tokens):
        return placed(policy, codec).generate(texts(prompts), new_tokens, ())

    return make


def texts(prompts):
    rng = np.random.default_rng(sum(prompts))
    return [rng.integers(0, 37, n).tolist() for n in prompts]


@dataclasses.dataclass(frozen=True)
class Watched(Controller):
    """Another controller, with the bytes that its plans say and those that are live on the device noted."""

    inner: Controller
    moved: list
    baseline: int

    def __getattr__(self, name):
        return getattr(self.inner, name)

    offloads = property(lambda self: self.inner.offloads)
    reads_wanted = property(lambda self: self.inner.reads_wanted)
    check = lambda self, setting: self.inner.check(setting)
    groups = lambda self, setting: self.inner.groups(setting)
    layout = lambda self, setting: self.inner.layout(setting)
    spans = lambda self, view: self.inner.spans(view)

    def decide(self, view):
        plan = self.inner.decide(view)
        load, store = (
            moved_bytes(plan.load, view.setting, view.lengths),
            moved_bytes(plan.store, view.setting, view.after),
        )
        self.moved.append((load, store, device_bytes() - self.baseline))
        return plan


def device_bytes():
    return sum(a.nbytes for a in jax.live_arrays() if a.sharding.memory_kind == "device")


def fitting(one, lengths, new_tokens):
    """`one` with the smallest budgets and values that its refusals name."""
    for _ in range(8):
        try:
            one.placement.check(lengths, new_tokens)
            return one
        except ValueError as error:
            text = str(error)
        budget = re.search(r"needs (device_kv_bytes|host_kv_bytes) of at least (\d+)", text)
        alpha = re.search(r"alpha must be at least ([0-9.]+)", text)
        if budget:
            both = {name: getattr(one.placement, name) for name in ("device_kv_bytes", "host_kv_bytes")}
            one = one.under(one.placement.controller, **both | {budget[1]: float(budget[2])})
        elif alpha and float(alpha[1]) < 1:
            controller = dataclasses.replace(one.placement.controller, alpha=float(alpha[1]))
            one = one.under(controller, one.placement.device_kv_bytes, one.placement.host_kv_bytes)
        else:
            return None
    raise AssertionError(f"{one.placement.controller} still refuses: {text}")


def run_and_compare(placed, resident, system, prompts, new_tokens, device, host, reads):
    """device: of the rows, what fits beside what is fixed; None: the least that the controller takes."""
    spec, policy, codec = system
    one = placed(policy, codec).under(placement.parse(spec), 1e15)
    one.placement.host = mover.HostReport(("device", "pinned_host"), reads)
    dense = one.placement.setting(prompts, new_tokens)
    total = dense.store_bytes(dense.final_tokens)
    budgets = 1.0 if device is None else dense.fixed_bytes + device * total, max(1.0, host * total)
    one = fitting(one.under(one.placement.controller, *budgets), prompts, new_tokens)
    if one is None:
        return None
    one.placement.host = mover.HostReport(("device", "pinned_host"), reads)
    expected = resident(policy, codec, prompts, new_tokens)
    gc.collect()
    watched = Watched(one.placement.controller, [], device_bytes())
    one.placement.controller = watched
    made = one.generate(texts(prompts), new_tokens, ())
    for a, b in zip(made.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert made.tokens == expected.tokens
    run = made.placement
    assert run.load_bytes == sum(load for load, _, _ in watched.moved)
    assert run.store_bytes == sum(store for _, store, _ in watched.moved)
    assert run.device_peak_bytes <= one.placement.device_kv_bytes
    assert run.host_peak_bytes <= one.placement.host_kv_bytes
    small = 4096 + 4 * 37 * len(prompts) * 4  # tokens, flags, logits, and what a view is made of
    assert max(live for _, _, live in watched.moved) <= run.device_peak_bytes + small
    return run


@pytest.mark.parametrize(
    "system",
    [pytest.param(s, marks=[] if s == SYSTEMS[3] else pytest.mark.slow) for s in SYSTEMS],
    ids=map(" | ".join, SYSTEMS),
)
def test_every_controller_gives_the_tokens_of_resident_within_its_budgets(placed, resident, system):
    """At the smallest device budget that is accepted, which is where every phase is entered."""
    run = run_and_compare(placed, resident, system, PROMPTS[0], 24, 0.0, float("inf"), "rows")
    assert run.store_bytes > 0 and run.p1 < 24
    if "beta" in system[0]:
        assert run.p2 < 24 and run.recomputed_rows > 0


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 90)), max_size=60),
    st.integers(1, 4),
    st.booleans(),
)
def test_rounds_hold_no_more_than_staging_and_no_page_travels_twice(wanted, room, gather):
    layer, sequence, pos = (np.array(x, np.int32) for x in (zip(*sorted(set(wanted))) if wanted else ((), (), ())))
    rows = by_rows.Requests(layer, sequence, pos, np.zeros((len(pos), 1), np.int32))
    got = [list(zip(r.layer, r.sequence, r.pos)) for r in by_rows.rounds(rows, room, gather)]
    assert [row for some in got for row in some] == sorted(set(wanted)) and all(got)
    if gather:
        assert all(len(some) <= 16 * room for some in got)
    else:
        pages = [{(x, b, p // 16) for x, b, p in some} for some in got]
        assert all(len(some) <= room for some in pages)
        assert sum(map(len, pages)) == len(set().union(*pages))


@pytest.mark.slow
@settings(max_examples=1, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(system=SYSTEMS[4], prompts=(40, 40, 40), new_tokens=20, device=0.0, host=1.0, reads="pages")
@example(system=SYSTEMS[3], prompts=(40, 40, 40), new_tokens=70, device=0.0, host=0.0, reads="rows")
@given(
    system=st.sampled_from(SYSTEMS),
    prompts=st.sampled_from(PROMPTS[1:]),
    new_tokens=st.sampled_from([1, 20]),
    device=st.floats(0.0, 0.8),
    host=st.floats(0.5, 1.2),
    reads=st.sampled_from(["rows", "pages"]),
)
def test_budgets_hold_over_random_workloads(placed, resident, system, prompts, new_tokens, device, host, reads):
    run_and_compare(placed, resident, system, prompts, new_tokens, device, host, reads)


@dataclasses.dataclass(frozen=True)
class Restless(Swa):
    """Wants other tokens at every step, more than one list of rows holds."""

    def exchange(self, stats, pos, bias, length, S):
        counts = self.counts(S)
        score = jnp.mod(positions(S) * 37 + column(length) * 53, 101).astype(jnp.float32)
        first_local = column(length - budget.lookup(counts.local, length))[..., 0]
        want = budget.lookup(counts.top, length)[:, None]
        slot_of, ex = swap.improve(score, stats.slot_of, pos, bias, first_local, want)
        return stats.replace(slot_of=slot_of), ex


@pytest.mark.slow
def test_an_exchange_that_breaks_off_goes_on_when_its_rows_have_come(random_model):
    engine = alisa_jax.Engine(random_model(max_positions=256), Restless(kv_sparsity=0.5, spare_slots=0))
    base, rounds = engine.under("waves"), []
    programs = base.placement.programs
    expected, resume = base.generate(texts((90, 75)), 20, ()), programs.resume
    programs.resume = lambda kv: rounds.append(1) or resume(kv)
    for i, spec in enumerate(("alisa(p1=0)", "flexgen(cache_device_frac=0)")):
        run = fitting(base.under(spec, 1.0), (90, 75), 20).generate(texts((90, 75)), 20, ())
        assert len(rounds) > i and run.placement.load_bytes > 0
        assert run.tokens == expected.tokens
        for a, b in zip(run.logprobs, expected.logprobs, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
        del rounds[i + 1 :]


def test_while_nothing_moves_the_controller_is_not_asked(placed):
    one = placed("swa(kv_sparsity=0.6,shared_heads=false)", "raw").under("alisa")
    run = one.generate(texts(PROMPTS[1]), 20, ()).placement
    assert run.decisions == 1 and run.load_bytes == run.store_bytes == 0 and run.p1 == run.p2 == 20


def test_scoring_a_text_gives_the_log_probabilities_that_decoding_gives(placed):
    one = placed("dense", "raw")
    prompts = texts((30, 17))
    greedy = one.generate(prompts, 30, ())
    again = one.score([[*a, *b] for a, b in zip(prompts, greedy.tokens)], "prompt", last=[30, 30])
    np.testing.assert_allclose(again.logprobs, greedy.logprobs, atol=1e-6)
    assert np.concatenate(again.correct).all() and again.placement.load_bytes == 0


@pytest.mark.parametrize(
    "spec, policy, budgets, says",
    [
        ("alisa", "local(kv_sparsity=0.5)", (1e9, 1e9), "the policy evicts what it does not keep"),
        ("alisa", "dense", (1000.0, 1e9), "needs device_kv_bytes of at least [0-9]+ here; got 1000"),
        (
            "accelerate",
            "dense",
            (80000.0, 10.0),
            "needs host_kv_bytes of at least [0-9]+ here; got 10",
        ),
        ("alisa", "swa(kv_sparsity=0.5,refresh_every=4)", (1e9, 1e9), "recompute=false, or refresh_every=0"),
        ("alisa(p1=0)", "strided(kv_sparsity=0.5,anchor=query)", (1e9, 1e9), "serves the route working_set"),
        ("flexgen", "snapkv(capacity=16,window=4)", (1e9, 1e9), "the policy evicts what it does not keep"),
        ("alisa", "streaming(kv_sparsity=0.5,positions=cache)", (1e9, 1e9), "the policy evicts what it does not keep"),
    ],
)
def test_what_cannot_be_placed_is_refused_in_one_sentence(random_model, spec, policy, budgets, says):
    model = random_model(n_layers=2, max_positions=256)
    with pytest.raises(ValueError, match=says):
        alisa_jax.Engine(model, policy, "raw", spec, *budgets).generate(texts((60, 60)), 30)
