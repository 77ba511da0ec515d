"""Figure 12c: throughput as SWA, dynamic scheduling and compression are added to FlexGen, by KV sparsity.

OPT-30B, batch 64, 128 + 512 tokens on an H100; all modelled (`eval/modelled/paper_system.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from eval.drawing import systems
from eval.figures import modelled
from eval.modelled import paper_cells
from eval.modelled.paper_cells import pick
from eval.modelled.paper_trends import STAGES, trends
from eval.script.resume import Found, Setup
from eval.script.tables import Table

TITLE = "Ablation of SWA, dynamic scheduling and compression"
NAMES = MappingProxyType(dict(zip(STAGES, ("FlexGen", "+ SWA", "+ dynamic scheduling", "+ compression"), strict=True)))


def check(setup: Setup) -> None:
    """Nothing runs that could fail."""


def records(setup: Setup) -> Found:
    """One record."""
    return modelled.collect(
        setup, "fig12c", ["tokens_per_s"], lambda part: paper_cells.figure_12c(modelled.published(), modelled.fits())
    )


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """Tokens per second of every stage."""
    cells, rows = modelled.cells(records), []
    mine = [one for one in cells if "traffic" not in one]
    for name, bars in modelled.published()["fig12c_tokens_per_s"].items():
        at = dict(kv_sparsity=int(name) / 100)
        texts = [modelled.beside(bars[stage], pick(mine, system=stage, **at), ".0f") for stage in STAGES]
        delta = [modelled.beside(None, pick(cells, traffic="delta", system=one, **at), ".0f") for one in STAGES[2:]]
        rows.append((f"{name} %", *texts, *delta))
    caption = (
        f"Figure 12c, tokens/s, {modelled.NOTE}; modelled for OPT-30B, batch 64, 128 + 512 tokens on an H100. + SWA: "
        "as FlexGen's sparse "
        "attention sends it, all keys and the wanted values; delta: this project's controller, without and with INT8."
    )
    head = ("KV sparsity", *NAMES.values(), "scheduling, delta", "compression, delta")
    said = trends(mine)
    versus = modelled.versus(mine, lambda one: f"{NAMES[one['system']]} at {one['kv_sparsity']:.0%}")
    found = [Table(caption, head, rows, versus=versus, why=modelled.why(said))]
    return [*found, modelled.trends("Figure 12c", said)] if mine else found


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """Tokens per second by stage, a line a sparsity."""
    cells, series = [one for one in modelled.cells(records) if "traffic" not in one], []
    for name, bars in modelled.published()["fig12c_tokens_per_s"].items():
        found = [pick(cells, system=stage, kv_sparsity=int(name) / 100) for stage in STAGES]
        ours = [one[0]["modelled"] if one else None for one in found]
        series.append((f"{name} %", list(NAMES.values()), [bars[stage] for stage in STAGES], ours))
    panel = systems.Panel("tokens/s", "", series)
    return systems.curves([panel], "ALISA's Figure 12c: OPT-30B, batch 64, H100", path)
