"""The figures of the paper that can be made without its checkpoints, each beside the paper's own numbers.

    python -m eval.reproduce                     --quick: all figures on the bundled model, under 10 minutes on 2 CPU cores
    python -m eval.reproduce --only=fig8 --full  one of them with all its cells
    python -m eval.reproduce --full --model=meta-llama/Llama-2-7b-hf --text=wikitext2.txt --task=piqa --task=copa

    fig1    dense inference with the cache on the CPU, half and half, on the GPU    modelled, and a stand-in measured
    fig2c   a step with and without KV caching                                      measured
    fig3    sparsity of dense attention by step and layer                           measured
    fig4    accumulated attention of local, strided, SWA against dense              measured
    fig5    attention maps                                                          measured
    fig8    quality against KV sparsity                                             measured
    fig9    throughput of Accelerate, FlexGen, vLLM, ALISA                          modelled, and a stand-in measured
    fig10   sparsity under SWA                                                      measured
    fig11   one attention module, operation by operation                            measured
    fig12a, fig12b, fig12c    phases, recomputation, ablation                       modelled

Figures 6 and 7 are worked examples and are tests. Measured cells run on this device with the given model, and the caption
names the model that stands in for the paper's; modelled cells are marked. Figure 9's page holds the fitted numbers of the
modelled figures. `configs/tables/` sets how much each figure runs under --quick and --full.

The folder --out gets `records.jsonl`, a page of tables and a PNG for each figure (needs matplotlib), `manifest.json` and
MANIFEST.md, which lists what was reproduced, how far it is from the paper, and why it differs. A cell that is finished in
`records.jsonl` is not run again, so an interrupted run continues; a page is written when its figure is complete.
"""

import importlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from eval.quality import paired
from eval.script import common, inputs, resume, tables
from eval.script.common import UserError
from eval.text import tasks, windows

RESULTS = Path(__file__).parent / "results" / "reproduce"
NAMES = ("fig1", "fig2c", "fig3", "fig4", "fig5", "fig8", "fig9", "fig10", "fig11", "fig12a", "fig12b", "fig12c")


def main(
    argv: Sequence[str],
    load: Callable = inputs.load,
    make_engine: Callable = inputs.make_engine,
    sizes: dict | None = None,
) -> None:
    """flags -> checks of all figures -> records, page and picture of each -> manifest. Beside `argv` all is for tests."""
    values = common.shared_flags("bundled", windows.BUNDLED, str(RESULTS))
    where = {"flag_values": values}
    values[
        "out"
    ].help = "Folder of records, tables, pictures and the manifest; what is finished there is not run again."
    flags.DEFINE_list("only", [], f"Figures, comma-separated, of {', '.join(NAMES)}. Default: all.", **where)
    flags.DEFINE_bool("quick", False, "Few cells; the default.", **where)
    flags.DEFINE_bool("full", False, "All cells of configs/tables.", **where)
    flags.DEFINE_multi_string("task", [], f"Accuracy panels of fig8, of {', '.join(tasks.NAMES)}; repeatable.", **where)
    flags.DEFINE_multi_string("task_file", [], "JSON lines, one file for each --task. Default: the hub's.", **where)
    paired.jobs_flag(values)
    common.dtype_flag(values)
    common.parse(values, argv, __doc__)
    names = _names(values.only)
    if values.quick and values.full:
        raise UserError("--quick and --full are two sizes: give one of them")
    folder = Path(values.out)
    if folder.is_file():
        raise UserError(f"--out: {values.out!r} is a file, and a folder is needed")
    setup = resume.Setup(
        model=values.model,
        text=values.text,
        size="full" if values.full else "quick",
        seed=values.seed,
        jobs=values.jobs,
        rerun=values.rerun,
        results=inputs.results(str(folder / "records.jsonl")),
        load=inputs.loading(load, values.dtype),
        make_engine=make_engine,
        sizes=sizes,
        dtype=values.dtype,
        tasks=_tasks(values.task, values.task_file),
    )
    setup.card()
    windows.read(values.text)
    figures = {name: importlib.import_module(f"eval.figures.{name}") for name in names}
    for figure in figures.values():
        figure.check(setup)
    for name, figure in figures.items():
        found = figure.records(setup)
        if found.interrupted:
            raise KeyboardInterrupt
        if found.reused:
            common.say(
                f"{name}: {found.reused} of {len(found.records)} cells were already in {folder / 'records.jsonl'}"
            )
        shown = figure.tables(setup, found.records)
        title = f"Figure {name.removeprefix('fig')}: {figure.TITLE}"
        common.emit(found.records, "\n\n".join([title, *map(tables.text, shown)]) + "\n", values.json)
        common.write(folder / f"{name}.md", tables.page(title, shown))
        common.say(figure.draw(setup, found.records, folder / f"{name}.png"))
        _manifest(folder, name, entry(title, setup, found.records, shown))
    common.say(f"manifest: {folder / 'MANIFEST.md'}")


def _names(only: Sequence[str]) -> list[str]:
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise UserError(f"--only: unknown figure {unknown[0]!r}; known: {', '.join(NAMES)}")
    return [name for name in NAMES if name in only or not only]


def _tasks(names: Sequence[str], files: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    for name in names:
        if name not in tasks.NAMES:
            raise UserError(f"--task: unknown task {name!r}; known: {', '.join(tasks.NAMES)}")
    if files and len(files) != len(names):
        raise UserError(f"--task_file goes with each --task: got {len(names)} tasks and {len(files)} files")
    return tuple(zip(names, files or [None] * len(names), strict=True))


def entry(title: str, setup: resume.Setup, records: Sequence[dict], shown: Sequence[tables.Table]) -> dict:
    """What the manifest says of a figure.

    `near` of the `compared` numbers are close to the paper's (`tables.Versus`); `median_ratio` is ours over the paper's.
    """
    numbers = [versus for table in shown for versus in table.versus]
    ratios = [versus.ratio for versus in numbers if versus.ratio is not None]
    near = [versus.near for versus in numbers if versus.near is not None]
    return {
        "title": title,
        "size": setup.size,
        "model": setup.card().name,  # of a folder its name alone
        "basis": sorted({r["basis"] for r in records}),
        "device": tables.device(records),
        "git_commits": sorted({str(r["git_commit"])[:12] for r in records}),
        "cells": len(records),
        "compared": len(near),
        "near": sum(near),
        "median_ratio": statistics.median(ratios) if ratios else None,
        "why": [why for table in shown for why in table.why],
        "numbers": [
            {"what": v.what, "unit": v.unit, "ours": v.ours, "paper": v.paper, "ratio": v.ratio, "basis": v.basis}
            for v in numbers
        ],
    }


def _manifest(folder: Path, name: str, new: dict) -> None:
    """Add one figure to manifest.json and draw MANIFEST.md from it; figures of earlier runs stay."""
    path = folder / "manifest.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError):
        raise UserError(
            f"--out: {str(path)!r} cannot be read; remove it, and the figures that are asked for are listed anew"
        ) from None
    known[name] = new
    known = {figure: known[figure] for figure in NAMES if figure in known}
    common.write(path, json.dumps(known, indent=1, allow_nan=False) + "\n")
    head = ("figure", "what", "size", "model", "basis", "compared", "within 25 %", "median ours / paper")
    rows = [
        (
            f"[{figure}]({figure}.md)",
            e["title"].split(": ", 1)[1],
            e["size"],
            e["model"],
            " and ".join(e["basis"]),
            str(e["compared"]),
            str(e["near"]),
            common.number(e["median_ratio"], ".2f"),
        )
        for figure, e in known.items()
    ]
    why = "".join(
        f"\n\n**{figure}**\n" + "".join(f"\n* {w}" for w in e["why"]) for figure, e in known.items() if e["why"]
    )
    caption = (
        "Every number of ours that has one of the paper's beside it is in `manifest.json`. The paper's models and devices"
        " are not these: where a small model or a CPU stands in, the ratio says how far that is, not that either is wrong."
    )
    page = tables.markdown(tables.Table(caption, head, rows, left=5))
    common.write(
        folder / "MANIFEST.md", f"# What was reproduced\n\n{page}\n\n## Why it differs{why or ' - nothing differs'}\n"
    )


if __name__ == "__main__":
    sys.exit(common.run(main))
