"""What a figure of the paper is to `eval.reproduce`.

A figure is a module of `eval/figures/` with

    TITLE                       what the paper shows, in a few words
    check(setup)                raises UserError for a setup that cannot run, before anything is loaded
    records(setup) -> Found     every cell, those on file taken from there and the others run and kept one by one
    tables(setup, records)      -> list[Table]: our numbers beside the paper's
    draw(setup, records, path)  -> a sentence on the PNG that was written

`records` are plain records (`alisa_jax/records.py`), in an order that does not depend on which were on file; their values
hold all that tables and picture need. How much runs is told by `configs/tables/<name>.py`, which defines QUICK and FULL, and
the published numbers lie in `eval/paper/`.
"""

import json
import runpy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from eval.script import inputs

ROOT = Path(__file__).resolve().parents[2]
NEAR = 0.25  # what counts as close to the paper's number


@dataclass(frozen=True)
class Setup:
    """What a figure is asked for; `results` is the file of records that all figures share, None for none."""

    model: str
    text: str
    size: str  # "quick" or "full"
    seed: int
    jobs: int
    rerun: bool
    results: object
    load: Callable = inputs.load
    make_engine: Callable = inputs.make_engine
    sizes: dict | None = None  # instead of those of the config, for tests
    tasks: Sequence[tuple[str, str | None]] = ()  # multiple choice for figure 8, each with its file or None for the hub

    def config(self, name: str) -> dict:
        """The sizes of the figure `name`: QUICK or FULL of configs/tables/<name>.py."""
        if self.sizes is not None:
            return self.sizes
        return runpy.run_path(str(ROOT / "configs" / "tables" / f"{name}.py"))[self.size.upper()]


@dataclass
class Found:
    """The records of a figure, how many of them were on file, and whether an interrupt kept it from being whole."""

    records: list[dict]
    reused: int = 0
    interrupted: bool = False


@dataclass(frozen=True)
class Versus:
    """One number of ours beside the paper's; "OOM" for what did not fit, None for what is not there."""

    what: str
    unit: str
    ours: float | str | None
    paper: float | str | None
    basis: str  # "measured" | "modelled"

    @property
    def ratio(self) -> float | None:
        """Ours over the paper's, where both are numbers and the paper's is not 0; None for a correlation ("rho")."""
        return self.ours / self.paper if self._both and self.paper and self.unit != "rho" else None

    @property
    def near(self) -> bool | None:
        """Whether ours is within a quarter of the paper's, a correlation within 0.25 of it; None without two numbers."""
        if self.unit == "rho":
            return abs(self.ours - self.paper) <= NEAR if self._both else None
        return None if self.ratio is None else abs(self.ratio - 1) <= NEAR

    @property
    def _both(self) -> bool:
        return all(isinstance(x, int | float) for x in (self.ours, self.paper))


@dataclass(frozen=True)
class Table:
    """A table as texts; a cell that is modelled ends in `tables.MODELLED`, one that is missing is `-`.

    caption: what was run, on which model, data and device, and how the quantity is defined. versus: the numbers that the
    manifest compares. why: why they differ from the paper's, one sentence each.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1  # columns that are aligned left
    versus: Sequence[Versus] = ()
    why: Sequence[str] = field(default=())


def density(what: str, ours: float | None, theirs: float | None) -> Versus:
    """Two sparsities in %, compared by what they leave: of 94 and 96 % the one is half as dense again as the other."""
    left = [None if sparsity is None else 100 - sparsity for sparsity in (ours, theirs)]
    return Versus(what, "%", *left, "measured")


def paper(name: str) -> dict:
    """The published numbers in eval/paper/<name>.json."""
    return json.loads((ROOT / "eval" / "paper" / f"{name}.json").read_text(encoding="utf-8"))


def collect(setup: Setup, cells: Sequence[dict], run: Callable[[dict], tuple[dict, dict]], what: str) -> Found:
    """The record of every cell: from the file where it is finished, else of `run(cell)` -> (values, how it was got).

    `run` is called in the order of the cells, and a record is on disk before the next cell begins. `how` may hold
    `measured=False` for a number of a model.
    """
    on_file = [None if setup.results is None or setup.rerun else setup.results.find(cell) for cell in cells]
    found = Found([], sum(record is not None for record in on_file))
    for cell, record in tqdm(list(zip(cells, on_file, strict=True)), desc=what, disable=None, leave=False):
        if record is None:
            began = time.perf_counter()
            values, how = run(cell)
            record = inputs.record(setup.results, cell, values, time.perf_counter() - began, how)
        found.records.append(record)
    return found


def device(records: Iterable[dict]) -> str:
    """The devices that records were got on, for a caption."""
    kinds = dict.fromkeys(f"{r['device_kind']} ({r['cpu_count']} cores)" for r in records)
    return ", ".join(kinds)
