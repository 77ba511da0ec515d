"""Placed runs beside Belady's oracle: with as many rows on the device, none brings fewer than it loads."""

import dataclasses
import functools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax import placement
from alisa_jax.placement.controllers.alisa import least_device_bytes
from alisa_jax.placement.modelled.belady import held_rows, least_rows
from alisa_jax.placement.modelled.simulate import brought_rows, walk
from alisa_jax.policies import Swa
from alisa_jax.policies.base import column, positions

PROMPTS = (48, 48)  # of one length: one group of pages, fewer programs
NEW = 30


@dataclass(frozen=True)
class Drifting(Swa):
    """Ranks tokens by a score that drifts, in each head from elsewhere: whoever runs, a step wants the same tokens."""

    def ranking(self, stats, length):
        P, S = stats.slot_of.shape[1:]
        head = jnp.arange(P, dtype=jnp.int32)[None, :, None]
        return jnp.mod(positions(S) * 37 + column(length) * 7 + head * 11, 101).astype(jnp.float32)


def watched(spec, views):
    """The controller that `spec` names; it notes what it was asked."""
    one = placement.parse(spec)
    kind = type(one)

    def decide(self, view):
        views.append(view)
        return kind.decide(self, view)

    fields = {field.name: getattr(one, field.name) for field in dataclasses.fields(kind)}
    return type(kind.__name__, (kind,), {"decide": decide})(**fields)


@pytest.fixture(scope="module")
def runs(random_model):
    """`runs(spec)`: (views, setting, layout, run) with all sequences away, at the least budget of `alisa`."""
    policy = Drifting(kv_sparsity=0.8, spare_slots=0, shared_heads=False)
    engine = alisa_jax.Engine(random_model(n_layers=2, max_positions=256), policy, placement="waves")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 37, n).tolist() for n in PROMPTS]
    least = least_device_bytes(engine.placement.setting(PROMPTS, NEW))

    @functools.cache
    def run(spec):
        views = []
        one = engine.under(watched(spec, views), least)
        setting = one.placement.setting(PROMPTS, NEW)
        return views, setting, one.placement.controller.layout(setting), one.generate(prompts, NEW, ()).placement

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    ["accelerate", "flexgen(cache_device_frac=0.0)", "alisa(p1=0,p2=12,beta=0.3)"]
    + ["alisa(p1=0,p2=12,beta=0.3,traffic=paper)"],
)
def test_no_placed_run_brings_fewer_rows_than_the_oracle_loads(runs, spec):
    selected = [view.wanted for view in runs("accelerate")[0][1:]]  # at every step
    assert len(selected) == NEW - 1
    views, setting, layout, run = runs(spec)
    assert layout == placement.Layout(0, 1)
    controller = placement.parse(spec)
    if controller.reads_wanted:
        assert [view.wanted for view in views[1:]] == selected
        walked = walk(controller, setting, lambda step, lengths: selected[step - 1])
        brought = np.sum([brought_rows(controller, *step) for step in walked], axis=0)
        assert brought.tolist() == [run.loaded_rows, run.recomputed_rows], "the simulator counts as the run does"
    room = held_rows(setting, layout, heads=2)
    least = sum(
        least_rows([wanted[layer, b] for wanted in selected], n, room)
        for layer in range(setting.layers)
        for b, n in enumerate(PROMPTS)
    )
    assert 0 < least <= run.loaded_rows + run.recomputed_rows
    assert (run.recomputed_rows > 0) == ("beta" in spec)
