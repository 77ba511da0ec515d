"""What the simulator selects where no trace was recorded: evenly spread, slowly changing, and by layer where asked."""

import dataclasses
import math

import pytest

from alisa_jax import placement
from alisa_jax.placement import ALL, Rows, Setting, Span, Tier, View
from alisa_jax.placement.controllers.alisa import least_device_bytes
from alisa_jax.placement.modelled.cost import Cost, Hardware, Shape
from alisa_jax.placement.modelled.simulate import simulate, swa_trace, walk

pytestmark = pytest.mark.slow

COST = Cost(
    Hardware("toy", 1e9, 1e9, 1e12, 1e11, 1e10, 2e10),
    Shape(1e6, 2e6, 1e3, layers=6, d_model=8, d_ff=32, vocab_size=11, kv_token_bytes=1.0),
)
SIZES = (lambda n: min(6, n), lambda n: min(12, max(0, n - 6)))


def deleting(layers=6, batch=2):
    """One page of each sequence on the device, three on the host: from step 17 on a page of the prompt is deleted."""
    run = Setting(layers, (48,) * batch, 60, 1.0, device_kv_bytes=0.0, slots=20, selects=True)
    return dataclasses.replace(
        run,
        device_kv_bytes=least_device_bytes(run),
        host_kv_bytes=3 * layers * batch * run.page_bytes,
    )


def entering(trace, steps, batch=1):
    """Tokens that enter at each step, by layer and sequence, besides the newest one."""
    found, held = [], {}
    for step in range(1, steps):
        wanted = trace(step, (800 + step,) * batch)
        if step > 1:
            found.append({key: set(now) - set(held[key]) - {799 + step} for key, now in wanted.items()})
        held = wanted
    return found


def test_one_layer_selects_the_tokens_of_highest_phase():
    local, top = SIZES
    for step, n in ((1, 40), (2, 41), (30, 69)):
        older = sorted(range(n - 6), key=lambda p: -((p * (math.sqrt(5) - 1) / 2 + 0.3 * step / n) % 1.0))
        expected = (*sorted(older[:12]), *range(n - 6, n))
        assert swa_trace(local, top, 0.3)(step, (n, n)) == {(ALL, ALL): expected}
        ragged = swa_trace(local, top, 0.3)(step, (n, 3))
        assert ragged == {(ALL, 0): expected, (ALL, 1): (0, 1, 2)}


def test_layers_and_few_sequences_have_selections_of_their_own():
    found = swa_trace(*SIZES, layers=5)(7, (90, 90))
    assert set(found) == {(l, b) for l in range(5) for b in range(2)}
    assert len(set(found.values())) == 10
    for positions in found.values():
        assert len(positions) == 18 and positions[-6:] == tuple(range(84, 90)) and list(positions) == sorted(positions)
    many = swa_trace(*SIZES, layers=5)(7, (90,) * 13)
    assert set(many) == {(l, ALL) for l in range(5)} and len(set(many.values())) == 5
    ragged = swa_trace(*SIZES, layers=5)(7, (90,) * 13 + (80,))
    assert (
        set(ragged) == {(l, b) for l in range(5) for b in range(14)} and ragged[2, 0] == ragged[2, 12] == many[2, ALL]
    )


@pytest.mark.parametrize("rate", [0.1, 0.2])
def test_as_many_tokens_enter_each_layer_but_not_at_the_same_steps(rate):
    folded, layered = (entering(swa_trace(*SIZES, rate, layers=layers), 160) for layers in (1, 24))
    mean = lambda steps: sum(len(new) for step in steps for new in step.values()) / len(steps)
    assert mean(layered) / 24 == pytest.approx(mean(folded), rel=0.2) == pytest.approx(rate, rel=0.2)
    busy = lambda steps: sum(any(step.values()) for step in steps) / len(steps)
    independent = 1 - (1 - busy(folded)) ** 24  # steps at which some layer of 24 has an entering token
    assert busy(folded) < 0.4 and busy(layered) > 0.9 * independent


def test_a_deleted_token_that_one_layer_wants_is_recomputed_in_all():
    setting = deleting()
    spans = (Span(16, 48), Span(16, 48))
    found = {(l, b): (60,) for l in range(6) for b in range(2)}
    found |= {(1, 0): (2, 60), (3, 0): (9, 20, 60), (4, 1): (5,)}
    view = View(setting, 20, (67, 67), (1, 1), spans, wanted=found, entering=found)
    plan = placement.Alisa().decide(view)
    assert set(plan.recompute) == {
        Rows(0, 10, Tier.NOWHERE, Tier.WORKING, sequence=0),
        Rows(0, 6, Tier.NOWHERE, Tier.WORKING, sequence=1),
    }
    assert COST.price(plan, view).recompute_s == COST.prefill_s((10, 6)) > COST.prefill_s((10, 0))
    assert Rows(20, 21, Tier.HOST, Tier.WORKING, 3, 0) in plan.load


def test_layers_of_their_own_recompute_more_often():
    setting = deleting(batch=3)
    folded, layered = (swa_trace(*SIZES, 1.0, layers=layers) for layers in (1, 6))
    runs = [simulate(placement.Alisa(), setting, COST, trace, strict=6) for trace in (folded, layered)]
    assert (runs[0].p1, runs[0].p2) == (runs[1].p1, runs[1].p2) == (0, 17)
    often = [
        sum(bool(plan.recompute) for _, plan, _ in walk(placement.Alisa(), setting, trace))
        for trace in (folded, layered)
    ]
    assert often[1] > 3 * often[0] > 0 and runs[1].recompute_s > runs[0].recompute_s
    assert runs[0].compute_s == pytest.approx(runs[1].compute_s)  # as many tokens are attended
