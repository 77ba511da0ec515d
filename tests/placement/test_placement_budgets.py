"""Every controller on random workloads: budgets hold, nothing that is attended is missing, bytes are as priced."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_jax import placement
from alisa_jax.placement.modelled.cost import Cost, Hardware, Shape
from alisa_jax.placement.modelled.simulate import simulate, walk
from alisa_jax.placement.plan import ALL, Setting, Tier

pytestmark = pytest.mark.slow

COST = Cost(
    Hardware("toy", 1e9, 1e9, 1e12, 1e11, 1e10, 2e10, gathered_frac=0.5),
    Shape(1e6, 2e6, 1e3, layers=3, d_model=8, d_ff=32, vocab_size=11, kv_token_bytes=16.0),
)
SPECS = (
    "resident",
    "waves",
    "accelerate",
    "flexgen",
    "flexgen(cache_device_frac=0.5)",
    "alisa",
    "alisa(traffic=paper,lag=1)",
    "alisa(recompute=false)",
    "alisa(alpha=0.7,beta=0.3,p1=2,p2=9)",
    "alisa(alpha=0.4,beta=0.2)",
    "alisa(p1=0,p2=0,traffic=paper)",
    "alisa(beta=0.9,p2=1)",
)


def random_trace(setting: Setting, seed: int):
    """Selections of at most slots - 1 tokens, a few changing at each step, per layer and sequence; the newest always in."""
    rng = np.random.default_rng(seed)
    held: dict = {}

    def wanted(step, lengths):
        if step == 1:
            held.clear()
        for layer in range(setting.layers):
            for sequence, n in enumerate(lengths):
                size = min(setting.slots - 1, n)
                keep = [p for p in held.get((layer, sequence), ()) if rng.random() > 0.2][: size - 1]
                rest = sorted(set(range(n - 1)) - set(keep))
                extra = rng.permutation(rest)[: max(0, size - 1 - len(set(keep) - {n - 1}))].tolist()
                held[layer, sequence] = tuple(sorted({*keep, *extra, n - 1}))[-size:]
        return dict(held)

    return wanted


@st.composite
def workloads(draw):
    selects = draw(st.booleans())
    prompts = draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    base = dict(
        layers=3,
        prompt_tokens=tuple(prompts),
        new_tokens=draw(st.integers(1, 40)),
        token_bytes=draw(st.sampled_from([16.0, 7.5])),
        slots=draw(st.integers(3, 24)) if selects else 0,
        sequence_bytes=draw(st.sampled_from([0.0, 40.0])),
        stats_bytes=draw(st.sampled_from([0.0, 100.0])),
        selects=selects,
        evicts=draw(st.sampled_from([False] * 7 + [True])) if selects else False,
        gather=draw(st.booleans()),
    )
    dense = Setting(**base, device_kv_bytes=0.0)
    total = dense.fixed_bytes + dense.store_bytes(dense.final_tokens)
    device = total * draw(st.floats(0.02, 1.2))
    host = total * draw(st.floats(0.1, 1.5))
    return Setting(**base, device_kv_bytes=device, host_kv_bytes=host), draw(st.integers(0, 2**16))


def allowed(controller, setting):
    """Both, with each value that is refused replaced by the one that the refusal names; None where it names none.

    No value is refused twice, and a budget that is a byte smaller than the one that is named is refused too.
    """
    seen = set()
    for _ in range(5):
        try:
            controller.check(setting)
            return controller, setting
        except ValueError as error:
            text = str(error)
        budget = re.search(r"needs (device_kv_bytes|host_kv_bytes) of at least (\d+)", text)
        value = re.search(r"(p1|alpha) must be at (?:most|least) ([0-9.]+)", text)
        name = (budget or value or [None, None])[1]
        assert name is None or name not in seen, f"{controller} refuses what it asked for: {text}, {setting}"
        seen.add(name)
        if budget:
            assert int(budget[2]) > getattr(setting, budget[1])
            with pytest.raises(ValueError, match=f"{budget[1]} of at least {budget[2]}"):
                controller.check(dataclasses.replace(setting, **{budget[1]: float(budget[2]) - 1}))
            setting = dataclasses.replace(setting, **{budget[1]: float(budget[2])})
        elif value and (value[1] == "p1" or float(value[2]) < 1):
            controller = dataclasses.replace(controller, **{value[1]: (int if value[1] == "p1" else float)(value[2])})
        else:
            return None
    raise AssertionError(f"{controller} still refuses what it asked for: {setting}")


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=40)
@given(workload=workloads())
def test_budgets_hold_and_bytes_are_as_priced(spec, workload):
    setting, seed = workload
    found = allowed(placement.parse(spec), setting)
    if found is None:
        return
    controller, setting = found
    trace = random_trace(setting, seed) if setting.selects else None
    run = simulate(controller, setting, COST, trace, strict=setting.layers)  # raises where a rule is broken
    assert run.device_peak_bytes <= setting.device_kv_bytes and run.host_peak_bytes <= setting.host_kv_bytes
    assert run.device_peak_bytes == max(_laid_out(controller, part) for part in controller.groups(setting))
    assert run.total_s >= run.compute_s > 0


def _laid_out(controller, setting):
    """Bytes of rectangular arrays, by hand: fixed, whole sequences, rings, and staging where there are rings."""
    whole, kept = controller.layout(setting)
    page, prompts = 16 * setting.token_bytes, setting.prompt_tokens
    longest = lambda some, more=0: math.ceil((max(some, default=0) + more) / 16)
    found = setting.fixed_bytes
    if not setting.evicts:
        found += 3 * page * whole * longest(prompts[:whole], setting.new_tokens - 1)
    assert (whole == setting.batch) == (kept == 0)
    for _ in prompts[whole:]:
        found += 3 * page * kept
        if setting.selects:
            found += page * (3 + longest(prompts[whole:]))
        else:
            ahead = 0 if isinstance(controller, placement.Accelerate) else 1
            pages = longest(prompts[whole:], setting.new_tokens - 1)
            ahead += len(set(prompts[whole:])) > 1 or pages > 64  # streamed rows are laid out anew
            found += (ahead + 1) * page * pages
    return found


@settings(max_examples=60)
@given(workload=workloads(), spec=st.sampled_from(SPECS))
def test_dictionaries_of_rows_agree_with_the_plans(workload, spec):
    """A second reader of plans, row by row in plain sets: nothing missing, nothing deleted and loaded, the newest stay,
    and no two of them in one row of a ring."""
    setting, seed = workload
    found = allowed(placement.parse(spec), setting)
    if found is None or setting.evicts:
        return
    controller, setting = found
    for part in controller.groups(setting):
        trace = random_trace(part, seed) if part.selects else None
        _replay(controller, part, trace)


def _replay(controller, setting, trace):
    keys = [(l, b) for l in range(setting.layers) for b in range(setting.batch)]
    where = {key: {} for key in keys}  # position -> tier
    working = {key: set() for key in keys}
    whole, kept = controller.layout(setting)
    for view, plan, _ in walk(controller, setting, trace):
        if view.step == 0:
            for key in keys:
                where[key] = dict.fromkeys(range(view.new[key[1]]), Tier.DEVICE)
        brought, deleted = {key: set() for key in keys}, {key: set() for key in keys}
        for kind in ("store", "drop", "load", "recompute"):
            for row in getattr(plan, kind):
                for l, b in keys:
                    if row.layer not in (ALL, l) or row.sequence not in (ALL, b):
                        continue
                    for p in range(row.start, min(row.stop, (view.after if view.step == 0 else view.lengths)[b])):
                        if kind in ("store", "drop"):
                            assert where[l, b][p] is row.source
                            where[l, b][p] = row.target
                            deleted[l, b] |= {p} if kind == "drop" else set()
                        elif kind == "load":
                            assert where[l, b][p] is Tier.HOST and p not in deleted[l, b]
                            brought[l, b].add(p)
                        else:
                            brought[l, b].add(p)
        for key in keys:
            written = {view.lengths[key[1]]} if view.step else set()
            on_device = {p for p, tier in where[key].items() if tier is Tier.DEVICE} | written
            assert key[1] < whole or len({p % (16 * kept) for p in on_device}) == len(on_device)
        if view.step == 0:
            continue
        for key in keys:
            n = view.lengths[key[1]]
            wanted = set(range(n)) if view.wanted is None else set(view.wanted[key])
            if view.step == 1 and view.wanted is not None:
                working[key] = set(wanted)
            here = brought[key] | {p for p, tier in where[key].items() if tier is Tier.DEVICE}
            assert wanted <= here | (working[key] if setting.selects else set())
            working[key] = wanted
            where[key][n] = Tier.DEVICE
            away = [p for p, tier in where[key].items() if tier is not Tier.DEVICE]
            assert not away or max(away) < min(p for p, tier in where[key].items() if tier is Tier.DEVICE)
