"""What a figure of the paper is to `eval.reproduce`.

A figure is a module of `eval/figures/` with

    TITLE                       what the paper shows, in a few words
    check(setup)                raises UserError for a setup that cannot run, before anything is loaded
    records(setup) -> Found     every cell, those on file taken from there and the others run and kept one by one
    tables(setup, records)      -> list[Table]: our numbers beside the paper's
    draw(setup, records, path)  -> a sentence on the PNG that was written

`records` are plain records (`alisa_jax/records.py`), in an order that does not depend on which were on file; tables and
picture need their values and the published numbers in `eval/paper/` alone. `configs/tables/<name>.py` sets how much runs:
it defines QUICK and FULL.
"""

import json
from pathlib import Path

from eval.script.tables import Versus

PAPER = Path(__file__).resolve().parents[1] / "paper"


def density(what: str, ours: float | None, theirs: float | None) -> Versus:
    """Compares densities, 100 - sparsity in %: 94 % against 96 % is a ratio of 1.5."""
    left = [None if sparsity is None else 100 - sparsity for sparsity in (ours, theirs)]
    return Versus(what, "%", *left, "measured")


def paper(name: str) -> dict:
    """The published numbers in eval/paper/<name>.json."""
    return json.loads((PAPER / f"{name}.json").read_text(encoding="utf-8"))
