"""Runs a controller step by step and prices its plans; every number it gives is modelled.

What is wanted comes from a trace: a recorded one, or `swa_trace`, which selects as SWA does on
trained models: the last k tokens, k others spread over the rest, and a few new ones at each step.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from alisa_jax.placement.modelled.cost import Cost, Price
from alisa_jax.placement.modelled.residency import PlanError, Residency
from alisa_jax.placement.moves import device_bytes, host_bytes
from alisa_jax.placement.plan import (
    ALL,
    Controller,
    Plan,
    Positions,
    Setting,
    Span,
    View,
    count_rows,
    views,
)

# (step, lengths) to what is wanted; None: everything
Trace = Callable[[int, tuple[int, ...]], Positions | None]

# per step, layer and sequence; trained models: 0.16 - 0.19 at 80 % sparsity, 0.24 - 0.28 at 60 %
ENTERING_TOKENS = 0.2
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
# phases of layers; multiples of a square root fall into step with those of _GOLDEN
_APART = math.e - 2.0
_OWN_PHASES = 64


@dataclass(frozen=True)
class Simulated:
    """A modelled run.

    p1, p2: the first steps that keep something off the device, and delete something; new_tokens
    where none does. Peaks are of the cache alone; the device's is that of the layout, the same at
    every step. off_device_frac, deleted_frac: shares of the tokens at the end.
    """

    new_tokens: int
    batch: int
    prefill_s: float
    total_s: float
    compute_s: float
    load_s: float
    store_s: float
    recompute_s: float
    load_bytes: float
    store_bytes: float
    loaded_rows: int
    recomputed_rows: int
    device_peak_bytes: float
    host_peak_bytes: float
    p1: int
    p2: int
    off_device_frac: float
    deleted_frac: float
    groups: int
    notes: tuple[str, ...]
    steps_s: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        """b n / time, prefill included."""
        return self.batch * self.new_tokens / self.total_s


def simulate(
    controller: Controller,
    setting: Setting,
    cost: Cost,
    trace: Trace | None = None,
    strict: int = 0,
) -> Simulated:
    """Price every step of `setting` under `controller`.

    strict: carry out every plan on masks with this many layers (1 where all layers are alike) and
    check what `Residency` checks: slow, for tests. Raises ValueError if `controller` refuses it.
    """
    controller.check(setting)
    runs = [_run(controller, part, cost, trace, strict) for part in controller.groups(setting)]
    add = lambda name: sum(getattr(run, name) for run in runs)
    top = lambda name: max(getattr(run, name) for run in runs)
    return Simulated(
        new_tokens=setting.new_tokens,
        batch=setting.batch,
        prefill_s=add("prefill_s"),
        total_s=add("total_s"),
        compute_s=add("compute_s"),
        load_s=add("load_s"),
        store_s=add("store_s"),
        recompute_s=add("recompute_s"),
        load_bytes=add("load_bytes"),
        store_bytes=add("store_bytes"),
        loaded_rows=add("loaded_rows"),
        recomputed_rows=add("recomputed_rows"),
        device_peak_bytes=top("device_peak_bytes"),
        host_peak_bytes=top("host_peak_bytes"),
        p1=min(run.p1 for run in runs),
        p2=min(run.p2 for run in runs),
        off_device_frac=top("off_device_frac"),
        deleted_frac=top("deleted_frac"),
        groups=len(runs),
        notes=tuple(dict.fromkeys(note for run in runs for note in run.notes)),
        steps_s=tuple(s for run in runs for s in run.steps_s),
    )


def walk(controller: Controller, setting: Setting, trace: Trace | None = None):
    """(view, plan, spans after it) of every step: what a driver does, without arrays."""
    spans, held = (Span(),) * setting.batch, None
    for step, lengths, new in views(setting):
        wanted = None if trace is None or step == 0 else trace(step, lengths)
        entering = None if wanted is None else _entering(wanted, wanted if step == 1 else held)
        view = View(setting, step, lengths, new, spans, wanted, entering)
        plan = controller.decide(view)
        spans, held = controller.spans(view), wanted
        yield view, plan, spans


def brought_rows(
    controller: Controller, view: View, plan: Plan, spans: Sequence[Span]
) -> tuple[int, int]:
    """Rows that one step of `walk` loads, and rows that it recomputes, as a run counts them.

    A plan names the prefixes that are recomputed; the rows are those of them that are asked for.
    """
    setting = view.setting
    loaded = count_rows(plan.load, setting, view.lengths)
    if view.wanted is None or not plan.recompute:
        return loaded, count_rows(plan.recompute, setting, view.lengths)
    recomputed = 0
    asked = view.wanted if controller.reads_wanted else view.entering
    for (layer, sequence), positions in asked.items():
        some = spans if sequence == ALL else (spans[sequence],)
        rows = sum(bisect_left(positions, span.dropped) for span in some)
        recomputed += rows * (setting.layers if layer == ALL else 1)
    return loaded, recomputed


def _run(
    controller: Controller, setting: Setting, cost: Cost, trace: Trace | None, strict: int
) -> Simulated:
    trace = trace if setting.selects else None
    prices: list[Price] = []
    loaded = recomputed = 0
    device = host = 0.0
    room = functools.cache(lambda ahead: device_bytes(setting, layout, ahead))
    p1 = p2 = setting.new_tokens
    notes: list[str] = []
    layout = controller.layout(setting)
    rows = Residency(setting, layout, strict) if strict else None
    for view, plan, spans in walk(controller, setting, trace):
        prices.append(cost.price(plan, view))
        more, again = brought_rows(controller, view, plan, spans)
        loaded += more
        recomputed += again
        here = room(plan.ahead)
        if rows is not None:
            if view.step == 1:
                rows.seed(view.wanted)
            moved = rows.step(view, plan)
            if (moved.load_bytes, moved.store_bytes) != (
                prices[-1].load_bytes,
                prices[-1].store_bytes,
            ):
                raise PlanError(f"step {view.step}: priced {prices[-1]}, moved {moved}")
            if moved.device_bytes > here:
                raise PlanError(
                    f"step {view.step}: {moved.device_bytes} bytes on the device, predicted were "
                    f"{here}"
                )
        device = max(device, here)
        host = max(host, host_bytes(setting, spans))
        if any(span.host for span in spans):
            p1 = min(p1, view.step)
        if any(span.dropped for span in spans):
            p2 = min(p2, view.step)
        notes += plan.notes[: 1 - len(notes)]
    total = sum(setting.final_tokens)
    return Simulated(
        setting.new_tokens,
        setting.batch,
        prices[0].total_s,
        *(math.fsum(getattr(price, name) for price in prices) for name in _SUMMED),
        loaded,
        recomputed,
        device,
        host,
        p1,
        p2,
        sum(span.host for span in spans) / total,
        sum(span.dropped for span in spans) / total,
        1,
        tuple(notes),
        tuple(price.total_s for price in prices),
    )


_SUMMED = ("total_s", "compute_s", "load_s", "store_s", "recompute_s", "load_bytes", "store_bytes")


def swa_trace(
    local: Callable[[int], int],
    top: Callable[[int], int],
    entering: float = ENTERING_TOKENS,
    layers: int = 1,
) -> Trace:
    """Selections of `local(n)` recent and `top(n)` other tokens of n past ones.

    The others are those with the highest frac(p g + t), g the golden section: evenly spread, and
    stable but for the phase t, which moves so that about `entering` tokens enter per step besides
    those that leave the local part.

    layers: 1 selects the same for all layers and sequences (of one length). More gives each layer a
    phase of its own, and each sequence too where layers times sequences are at most 64: tokens then
    enter at steps of their own, and a deleted one is wanted as soon as any layer wants it. That
    takes as many times longer.
    """

    def wanted(step: int, lengths: tuple[int, ...]) -> Positions:
        own = 1 < layers and layers * len(lengths) <= _OWN_PHASES
        alike = len(set(lengths)) == 1 and not own
        found = {}
        for sequence, n in enumerate(lengths[:1] if alike else lengths):
            older = n - local(n)
            spread = np.arange(older) * _GOLDEN + entering * step / n
            for layer in range(layers):
                phase = (layer + layers * sequence * own) * _APART
                chosen = np.sort(np.argsort(-((spread + phase) % 1.0), kind="stable")[: top(n)])
                key = ALL if layers == 1 else layer, ALL if alike else sequence
                found[key] = (*chosen.tolist(), *range(older, n))
        return found

    return wanted


def _entering(wanted: Positions, held: Positions) -> Positions:
    found = {}
    for key, positions in wanted.items():
        had = set(held.get(key, ()))
        found[key] = tuple(p for p in positions if p not in had)
    return found
