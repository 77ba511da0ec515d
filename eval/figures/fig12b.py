"""Figure 12b: the whole run with and without recomputation, by KV sparsity.

OPT-30B, batch 64, 128 + 512 tokens on an H100; all modelled (`eval/modelled/paper_system.py`).
"""

from collections.abc import Sequence
from pathlib import Path

from eval.drawing import systems
from eval.figures import base, modelled
from eval.modelled.paper_cells import pick
from eval.modelled.paper_trends import trends
from eval.script import common
from eval.script.resume import Found, Setup
from eval.script.tables import Table

TITLE = "Effect of recomputation"
KEYS = ("with_recompute_s", "without_recompute_s", "recompute_gain")


def check(setup: Setup) -> None:
    """Nothing runs that could fail."""


def records(setup: Setup) -> Found:
    """One record."""
    run = lambda part: [one for one in modelled.figure_12b() if "step" not in one]
    return modelled.collect(setup, "fig12b", ["seconds"], run)


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """Seconds of the whole run, and the gain."""
    cells = modelled.cells(records)
    mine, rows = [one for one in cells if "traffic" not in one], []
    printed = base.paper("alisa_fig12")["fig12b_printed_gain"]
    for name, times in modelled.published()["fig12b_s"].items():
        at = dict(kv_sparsity=int(name) / 100)
        theirs = {f"{key}_s": one["total_s"] for key, one in times.items()}
        theirs["recompute_gain"] = round(theirs["without_recompute_s"] / theirs["with_recompute_s"], 3)
        texts = [
            modelled.beside(theirs[key], pick(mine, quantity=key, **at), ".2f" if "gain" in key else ".1f")
            for key in KEYS
        ]
        split = [f"{one['mha_s']:g} and {one['ffn_s']:g}" for one in times.values()]
        delta = modelled.beside(None, pick(cells, traffic="delta", **at), ".1f")
        rows.append((f"{name} %", *texts, common.number(printed[name], ".1f"), *split, delta))
    caption = (
        f"Figure 12b, seconds of the whole run, {modelled.NOTE}; modelled for OPT-30B, batch 64, 128 + 512 tokens on "
        "an H100. The copies "
        "without recomputation are fitted on at 80 and 20 %, and at 80 % the seconds of a recomputation on the "
        "compute with it. The model "
        "does not split compute: the paper's MHA and FFN stand apart. delta: this project's controller."
    )
    head = (
        "KV sparsity",
        "with, s",
        "without, s",
        "gain",
        "gain printed",
        "paper's MHA and FFN with, s",
        "without, s",
        "delta, s",
    )
    name = lambda one: f"{one['quantity'].removesuffix('_s').replace('_', ' ')} at {one['kv_sparsity']:.0%}"
    said = trends(mine)
    found = [Table(caption, head, rows, versus=modelled.versus(mine, name), why=modelled.why(said))]
    return [*found, modelled.trends("Figure 12b", said)] if mine else found


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """Seconds by sparsity, with and without."""
    cells = [one for one in modelled.cells(records) if "traffic" not in one]
    paper, series = modelled.published()["fig12b_s"], []
    names = sorted(paper, key=int)
    for key in KEYS[:2]:
        found = [pick(cells, quantity=key, kv_sparsity=int(name) / 100) for name in names]
        ours = [one[0]["modelled"] if one else None for one in found]
        theirs = [paper[name][key.removesuffix("_s")]["total_s"] for name in names]
        series.append(
            (
                key.removesuffix("_s").replace("_recompute", " recomputation"),
                [int(name) for name in names],
                theirs,
                ours,
            )
        )
    panel = systems.Panel("seconds of the run", "KV sparsity, %", series)
    return systems.curves([panel], "ALISA's Figure 12b: OPT-30B, batch 64, H100", path)
