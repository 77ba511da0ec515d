"""Runs the cells that are not on file yet: what is finished there is not run again."""

import runpy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from eval.script import inputs

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setup:
    """What a script or a figure is asked for. results: the file of records, which all figures share; None: no file."""

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
    dtype: str = "auto"  # as --dtype says it; `load` is one of names alone

    def card(self) -> inputs.Card:
        """What is known of the model before it is loaded."""
        return inputs.card(self.model, self.dtype)

    def config(self, name: str) -> dict:
        """The sizes of the figure `name`: QUICK or FULL of configs/tables/<name>.py."""
        if self.sizes is not None:
            return self.sizes
        return runpy.run_path(str(ROOT / "configs" / "tables" / f"{name}.py"))[self.size.upper()]


@dataclass
class Found:
    """The records, how many of them were on file, and whether an interrupt kept them from being complete."""

    records: list[dict]
    reused: int = 0
    interrupted: bool = False


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
