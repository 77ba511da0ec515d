"""Modelled cells of a figure: computed once a process, kept as records, shown beside the paper's numbers.

A cell is that of `eval.modelled.paper_cells`. A record holds those of a part of a figure under `cells`; its cell names
the published numbers by their hash, because fits and errors hang on them.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from types import MappingProxyType

from eval.figures import base
from eval.modelled import paper_cells, paper_fits
from eval.modelled.paper_system import MODELS, Fits, step_s
from eval.modelled.paper_trends import Trend
from eval.script import common, resume, tables
from eval.script.resume import Found, Setup
from eval.script.tables import Table, Versus

PAPER = "alisa_throughput"
NOTE = "paper / ours (our error in %; =: fitted on, no prediction)"
UNITS = MappingProxyType({"tokens_per_s": "tokens/s", "ratio": "x", "recompute_gain": "x", "p1": "step", "p2": "step"})


@functools.cache
def published() -> dict:
    """The numbers that the model is fitted on and compared with; only to be read."""
    return base.paper(PAPER)


@functools.cache
def fits() -> Fits:
    """The fitted numbers, which all figures share."""
    return paper_fits.fit(published())


@functools.cache
def figure_12b() -> tuple[dict, ...]:
    """Cells that Figures 12a (those with a step) and 12b share."""
    return tuple(paper_cells.figure_12b(published(), fits()))


def collect(
    setup: Setup, figure: str, parts: Sequence[str], run: Callable[[str], Iterable[dict]], *papers: str
) -> Found:
    """A record for every part of a figure, with the cells that `run(part)` gives; `papers`: further files of eval/paper."""
    text = json.dumps([published(), *map(base.paper, papers)], sort_keys=True)
    digest = {"published_sha256": hashlib.sha256(text.encode()).hexdigest()}
    cells = [{"script": "eval.reproduce", "figure": figure, "part": f"modelled {part}", **digest} for part in parts]
    names = dict(zip((cell["part"] for cell in cells), parts, strict=True))
    made = lambda cell: ({"cells": list(run(names[cell["part"]]))}, {"measured": False})
    return resume.collect(setup, cells, made, f"{figure}, modelled")


def cells(records: Iterable[dict]) -> list[dict]:
    """All modelled cells of the records of a figure."""
    return [one for record in records for one in record.get("cells", ())]


def beside(number, found: Sequence[dict], form: str) -> str:
    """'paper / ours (error)' with the mark of what is modelled, ours as `form`; `found` has the cell, or nothing."""
    theirs = common.number(number, "g")
    if not found:
        return f"{theirs} / -"
    (one,) = found
    ours = "=" * one["fitted"] + common.number(one["modelled"], form)
    if one["error_frac"] is not None:
        ours += f" ({100 * one['error_frac']:+.0f})"
    return tables.value(f"{theirs} / {ours}", basis="modelled")


def versus(found: Iterable[dict], name: Callable[[dict], str]) -> list[Versus]:
    """What the manifest compares: cells with a published number that are not fitted on."""
    return [
        Versus(name(one), unit(one["quantity"]), one["modelled"], one["published"], "modelled")
        for one in found
        if one["published"] is not None and not one["fitted"]
    ]


def unit(quantity: str) -> str:
    """The unit of a quantity."""
    ending = {"s": "s", "gib": "GiB"}.get(quantity.rsplit("_", 1)[-1], "")
    return UNITS.get(quantity, ending)


def fitted() -> Table:
    """The fitted numbers that all figures share, and the step time a + c b of each model that follows from them."""
    found, rows = fits(), []
    for gpu in ("h100", "v100"):
        rows.append((f"link of the {gpu.upper()}", f"{found.link_bytes_per_s[gpu] / 1e9:.1f} GB/s"))
        rows.append((f"c of the {gpu.upper()}: weight operations at", f"{found.flops_per_s[gpu] / 1e12:.1f} TFLOP/s"))
    rows += [(f"a, a layer of {family}", f"{1e3 * one:.2f} ms") for family, one in found.layer_s.items()]
    for place in MODELS:
        a, c = step_s(place, found)
        rows.append((f"a + c b of {place.model}", f"{1e3 * a:.1f} + {1e3 * c:.2f} b ms"))
    rows += [
        ("alpha", f"{found.alpha:.3f}"),
        ("beta", f"{found.beta:.3f}"),
        ("INT8 rows with their codec", f"{found.row_bytes_per_s / 1e9:.1f} GB/s"),
        ("T, passes of a token a sequence", f"{found.recompute_passes:.1f}"),
        ("hooks of Accelerate, a layer", f"{1e3 * found.accelerate_layer_s:.2f} ms"),
        *((f"vLLM's sequences on the {gpu.upper()}", str(one)) for gpu, one in found.vllm_sequences.items()),
    ]
    caption = (
        "The fitted numbers of the modelled figures. A step of b sequences takes a + c b; `eval/modelled/paper_fits.py` "
        "names the published number that each is fitted on."
    )
    return Table(caption, ("number", "value"), [(name, tables.value(one, basis="modelled")) for name, one in rows])


def why(said: Iterable[Trend]) -> list[str]:
    """How far the predictions of each column are off and why."""
    return [one.text for one in said if one.holds is None]


def trends(figure: str, said: Iterable[Trend]) -> Table:
    """What the figure says beyond its numbers, and whether the modelled cells agree."""
    words = {True: "yes", False: "no"}
    rows = [(one.text, tables.value(words[one.holds], basis="modelled")) for one in said if one.holds is not None]
    return Table(
        f"{figure}, what it shows beyond its numbers: does it hold for the modelled ones?", ("trend", "holds"), rows
    )
