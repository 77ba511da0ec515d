"""Figure 12a: when ALISA's phases begin, and seconds and memory up to their ends, by KV sparsity, beside FlexGen.

OPT-30B, batch 64, 128 + 512 tokens on an H100; all modelled (`eval/modelled/paper_system.py`). Memory, in GiB of 16-bit
rows as the figure labels them: weights are counted, activations are the figure's. FlexGen's cache is the one of its
controller. ALISA's is read literally: the GPU keeps as many rows as it has room for, the CPU the others, and from the
modelled p2 on beta of all are gone.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from alisa_jax.placement.modelled.cost import kv_bytes
from eval.drawing import systems
from eval.figures import base, modelled
from eval.modelled import paper_cells, paper_system
from eval.modelled.paper_cells import BATCH, GIB, cell, pick
from eval.modelled.paper_system import OPT_30B
from eval.modelled.paper_trends import near, trends
from eval.script.resume import Found, Setup
from eval.script.tables import Table

TITLE = "Phases, execution time and memory"
PAPER = "alisa_fig12"
SIZES = ("gpu_total_gib", "kv_on_gpu_gib", "kv_on_cpu_gib")
TIMES = ("compute_s", "memory_s", "total_s")
NAMES = MappingProxyType(
    {
        "gpu_total_gib": "GPU in all, GiB",
        "kv_on_gpu_gib": "KV on GPU",
        "kv_on_cpu_gib": "KV on CPU",
        "compute_s": "MHA and FFN, s",
        "memory_s": "copies, s",
        "total_s": "total, s",
    }
)


def check(setup: Setup) -> None:
    """Nothing runs that could fail."""


def records(setup: Setup) -> Found:
    """One record each for phases, seconds and memory."""
    parts = {
        "phases": lambda: paper_cells.figure_12a(modelled.published(), modelled.fits()),
        "seconds": lambda: [one for one in modelled.figure_12b() if "step" in one],
        "memory": memory,
    }
    return modelled.collect(setup, "fig12a", list(parts), lambda part: parts[part](), PAPER)


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """Phases; seconds at the marked steps; memory there."""
    cells = modelled.cells(records)
    return [_phases(cells), _marks(cells, TIMES), _marks(cells, SIZES)]


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """Seconds and KV on the CPU by step."""
    cells, paper = modelled.cells(records), base.paper(PAPER)["fig12a"]
    panels = []
    for key in ("total_s", "kv_on_cpu_gib"):
        series = []
        for name, marks in paper.items():
            found = [pick(cells, quantity=key, step=mark["step"], **_at(name)) for mark in marks]
            ours = [one[0]["modelled"] if one else None for one in found]
            series.append((_label(name), [mark["step"] for mark in marks], [mark[key] for mark in marks], ours))
        panels.append(systems.Panel(NAMES[key], "output step", series))
    return systems.curves(panels, "ALISA's Figure 12a: OPT-30B, batch 64, 128 + 512 tokens, H100", path)


def memory() -> list[dict]:
    """GiB on both sides at the marked steps."""
    published, fits, paper = modelled.published(), modelled.fits(), base.paper(PAPER)
    setting, cost = paper_system.run(OPT_30B, BATCH, published, fits)
    used = cost.shape.weight_bytes + paper["activations_gib"] * GIB
    room, cells = cost.hardware.device_bytes - used, []
    for name, marks in paper["fig12a"].items():
        p2 = None
        if name != "flexgen":
            p2 = paper_system.alisa(OPT_30B, BATCH, int(name) / 100, published, fits).p2
        for mark in marks:
            part = dataclasses.replace(setting, new_tokens=mark["step"])
            if p2 is None:
                found = paper_system.flexgen(part, cost)
                gpu, cpu = found.device_peak_bytes, found.host_peak_bytes
            else:
                whole = kv_bytes(part)
                gpu = min(room, whole)
                cpu = whole * (1.0 - fits.beta * (mark["step"] > p2)) - gpu
            at = dict(model=OPT_30B.model, hardware=OPT_30B.machine, batch=BATCH, step=mark["step"], **_at(name))
            for key, ours in zip(SIZES, (used + gpu, gpu, cpu), strict=True):
                cells.append(cell("12a", key, ours / GIB, mark.get(key), **at))
    return cells


def _at(name: str) -> dict:
    if name == "flexgen":
        return dict(system="flexgen", kv_sparsity=0.0)
    return dict(system="alisa", kv_sparsity=int(name) / 100)


def _label(name: str) -> str:
    return "FlexGen" if name == "flexgen" else f"ALISA {name} %"


def _phases(cells: Sequence[dict]) -> Table:
    mine = [one for one in cells if one["quantity"] in ("p1", "p2")]
    rows = []
    for name, steps in modelled.published()["fig12a_steps"].items():
        at = _at(name)
        plain = [[one for one in pick(mine, quantity=p, **at) if "traffic" not in one] for p in ("p1", "p2")]
        delta = [pick(mine, quantity=p, traffic="delta", **at) for p in ("p1", "p2")]
        ours = [modelled.beside(steps[p], found, ".0f") for p, found in zip(("p1", "p2"), plain, strict=True)]
        rows.append((f"{name} %", *ours, *(modelled.beside(None, found, ".0f") for found in delta)))
    said = trends(mine)
    held = [
        f"{one.text}: {'holds' if one.holds else 'does not hold'} for the modelled steps"
        for one in said
        if one.holds is not None
    ]
    caption = (
        f"Figure 12a, first steps of Phases II (p1) and III (p2) by KV sparsity, {modelled.NOTE}; modelled for "
        "OPT-30B, batch 64, 128 + "
        "512 tokens on an H100. p1: the GPU is full; p2: the least Equation 5, for the published p1; delta: this "
        "project's "
        "controller, 512: never."
    )
    versus = modelled.versus(mine, lambda one: f"{one['quantity']} at {one['kv_sparsity']:.0%}")
    return Table(
        caption,
        ("KV sparsity", "p1", "p2", "p1, delta", "p2, delta"),
        rows,
        versus=versus,
        why=modelled.why(said) + held,
    )


def _marks(cells: Sequence[dict], keys: Sequence[str]) -> Table:
    mine = [one for one in cells if one["quantity"] in keys and "step" in one]
    rows, seconds = [], keys == TIMES
    for name, marks in base.paper(PAPER)["fig12a"].items():
        for mark in marks:
            theirs = dict(mark, compute_s=round(mark["mha_s"] + mark["ffn_s"], 1))
            found = [pick(mine, quantity=key, step=mark["step"], **_at(name)) for key in keys]
            texts = [modelled.beside(theirs.get(key), one, ".1f") for key, one in zip(keys, found, strict=True)]
            split = (f"{mark['mha_s']:g} and {mark['ffn_s']:g}",) if seconds else ()
            rows.append((_label(name), str(mark["step"]), *texts, *split))
    if seconds:
        caption = (
            f"Figure 12a, seconds from the start to the steps at which a phase ends, {modelled.NOTE}; modelled. The "
            "model does not split "
            "compute, so the paper's MHA and FFN stand apart."
        )
        why = [one.text for one in near("12b", mine)] if mine else []
    else:
        caption = (
            f"Figure 12a, GiB at the same steps, {modelled.NOTE}; modelled, weights "
            f"({base.paper(PAPER)['weights_gib']} in the figure) counted "
            f"and activations the figure's {base.paper(PAPER)['activations_gib']}; the GPU has "
            f"{base.paper(PAPER)['gpu_capacity_gib']}."
        )
        why = [
            "ALISA is modelled to fill the GPU before it uses the CPU, and the figure has rows on the CPU while its "
            "GPU has room, more of "
            "them the longer it runs: no rule for that is published.",
            "What is gone at the end is fitted on the figure's own sum of both sides; it is modelled to be gone from "
            "an earlier p2 on.",
            "FlexGen's GPU holds 6 of 64 sequences and the layers that are on their way.",
        ]
    head = ("system", "step", *(NAMES[key] for key in keys), *(("paper's MHA and FFN, s",) if seconds else ()))
    label = lambda one: _label("flexgen" if one["system"] == "flexgen" else f"{100 * one['kv_sparsity']:.0f}")
    name = lambda one: f"{label(one)}, step {one['step']}, {NAMES[one['quantity']].partition(',')[0]}"
    return Table(caption, head, rows, left=1, versus=modelled.versus(mine, name), why=why)
