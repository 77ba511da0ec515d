"""Modelled beside published: ALISA's Figures 9 and 12, with the error of every cell, and which of their trends come out.

    python -m eval.plan_tables
    python -m eval.plan_tables --figure=12b --json
    python -m eval.plan_tables --figure=9 --plot=figure_9.png

Every number of ours is modelled; nothing here has run on those GPUs. `eval/modelled/paper_system.py` is the model, a step
time that is common to all systems, and how ALISA is read; `eval/modelled/paper_fits.py` says what is fitted on which
published number. A cell marked `=` is fitted on, and has the error that is left; the others are predictions. The tables
of `traffic=delta` have no published number beside them: they are what ALISA could have been, had it sent only what enters
the selection.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from eval.drawing import plots
from eval.modelled import paper_cells, paper_fits, paper_system
from eval.modelled.paper_cells import pick
from eval.modelled.paper_system import Fits
from eval.modelled.paper_trends import Trend, trends
from eval.script import common
from eval.script.common import UserError

PAPER = Path(__file__).resolve().parent / "paper" / "alisa_throughput.json"
FIGURES = ("9", "12a", "12b", "12c")


def main(argv: Sequence[str]) -> None:
    """flags -> fits -> cells -> tables and trends."""
    values = flags.FlagValues()
    where = {"flag_values": values}
    flags.DEFINE_enum("figure", None, FIGURES, "One figure; default: all.", **where)
    flags.DEFINE_string("plot", None, "PNG of Figure 9, modelled beside published.", **where)
    flags.DEFINE_bool("json", False, "One record a cell on stdout; the tables on stderr.", **where)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", **where)
    common.parse(values, argv, __doc__)
    if values.plot and values.figure not in (None, "9"):
        raise UserError(f"--plot draws Figure 9; --figure={values.figure} leaves it out")
    published = json.loads(PAPER.read_text())
    fits = paper_fits.fit(published)
    found = {name: figure(name)(published, fits) for name in ([values.figure] if values.figure else FIGURES)}
    cells = [one for some in found.values() for one in some]
    said = trends(cells)
    parts = [fitted(fits)]
    for name, some in found.items():
        parts.append("\n".join([*TABLES[FIGURES.index(name)](some), *_lines(t for t in said if t.figure == name)]))
    common.emit(cells, "\n\n".join(parts), values.json)
    if values.plot:
        common.say(plots.throughput(pick(cells, figure="9", quantity="tokens_per_s"), Path(values.plot)))


def figure(name: str) -> Callable[[dict, Fits], list[dict]]:
    """The function that makes a figure's cells."""
    return getattr(paper_cells, f"figure_{name}")


def fitted(fits: Fits) -> str:
    """The fitted numbers as a table."""
    rows = []
    for gpu in ("h100", "v100"):
        rows.append((f"link of the {gpu.upper()}", f"{fits.link_bytes_per_s[gpu] / 1e9:.1f} GB/s"))
        rows.append((f"c of the {gpu.upper()}: weight operations at", f"{fits.flops_per_s[gpu] / 1e12:.1f} TFLOP/s"))
    rows += [(f"a, a layer of {name}", f"{1e3 * one:.2f} ms") for name, one in fits.layer_s.items()]
    for place in paper_system.MODELS:
        a, c = paper_system.step_s(place, fits)
        rows.append((f"  so a + c b of {place.model}", f"{1e3 * a:.1f} + {1e3 * c:.2f} b ms"))
    rows += [
        ("alpha", f"{fits.alpha:.3f}"),
        ("beta", f"{fits.beta:.3f}"),
        ("INT8 rows with their codec", f"{fits.row_bytes_per_s / 1e9:.1f} GB/s"),
        ("T, passes of a token a sequence", f"{fits.recompute_passes:.1f}"),
        ("hooks of Accelerate, a layer", f"{1e3 * fits.accelerate_layer_s:.2f} ms"),
        *((f"vLLM's sequences on the {gpu.upper()}", str(one)) for gpu, one in fits.vllm_sequences.items()),
    ]
    return f"Fitted (on what: eval/modelled/paper_fits.py)\n{common.table(('number', 'value'), rows)}"


def _table_9(cells: list[dict]) -> list[str]:
    batches = dict.fromkeys(f"batch {one['batch']}" for one in cells)
    mine = [one for one in cells if "traffic" not in one]
    shown = [one for one in mine if one["quantity"] == "tokens_per_s"]
    return [
        "Figure 9, tokens/s: modelled / published (error in %; = is fitted on); vllm_by_memory is vLLM without its fit",
        common.table(("model", "system", *batches), _rows(shown, ("model", "system"), ".0f"), left=2),
        "\nFigure 9, ratios of ALISA",
        common.table(
            ("model", "ratio", *batches), _rows(pick(mine, quantity="ratio"), ("model", "system"), ".2f"), left=2
        ),
        "\nWhat ALISA could have been: traffic=delta, tokens/s, modelled (nothing is published)",
        common.table(("model", *batches), _rows(pick(cells, traffic="delta"), ("model",), ".0f")),
        "",
    ]


def _table_12a(cells: list[dict]) -> list[str]:
    title = "Figure 12a, steps at which Phases II and III begin: modelled / published (error in %)"
    head = ("sparsity", "p1, GPU full", "p2, for the published p1", "p1, traffic=delta", "p2, traffic=delta")
    mine, other = [one for one in cells if "traffic" not in one], pick(cells, traffic="delta")
    rows = [
        (*a, *b[1:]) for a, b in zip(*(_rows(some, ("kv_sparsity",), ".0f") for some in (mine, other)), strict=True)
    ]
    return [title, common.table(head, rows), "Modelled steps of 512: never.", ""]


def _table_12b(cells: list[dict]) -> list[str]:
    marks = [one for one in cells if "step" in one]
    whole = [one for one in cells if "step" not in one and "traffic" not in one]
    other = {one["kv_sparsity"]: one["modelled"] for one in pick(cells, traffic="delta")}
    keys = ("system", "kv_sparsity")
    rows = [
        (*row, common.number(other[one["kv_sparsity"]], ".0f"))
        for row, one in zip(_rows(whole, keys, None), pick(whole, quantity="recompute_gain"), strict=True)
    ]
    return [
        "Figure 12b, seconds up to the steps that Figure 12a marks: modelled / published (error in %; = is fitted on)",
        common.table(
            ("system", "sparsity", "step", "MHA and FFN", "copies", "total"),
            _rows(marks, (*keys, "step"), ".1f"),
            left=2,
        ),
        "\nFigure 12b, seconds of the whole run (=: its copies are fitted on, and at 80 % T on the compute)",
        common.table(("system", "sparsity", "with recomputation", "without", "gain", "traffic=delta"), rows, left=2),
        "",
    ]


def _table_12c(cells: list[dict]) -> list[str]:
    mine, other = [one for one in cells if "traffic" not in one], pick(cells, traffic="delta")
    rows = [
        (*a, *b[1:]) for a, b in zip(*(_rows(some, ("kv_sparsity",), ".0f") for some in (mine, other)), strict=True)
    ]
    head = (
        "sparsity",
        "FlexGen",
        "+ SWA",
        "+ dynamic scheduling",
        "+ compression",
        "scheduling, delta",
        "compression, delta",
    )
    title = "Figure 12c, tokens/s: modelled / published (error in %; = is fitted on)"
    note = "+ SWA: as FlexGen's sparse attention sends it, all keys and the wanted values."
    return [title, common.table(head, rows), note, ""]


TABLES = (_table_9, _table_12a, _table_12b, _table_12c)


def _rows(cells: Sequence[dict], keys: Sequence[str], form: str | None) -> list[tuple[str, ...]]:
    """Lines of a table: cells with the same `keys` side by side."""
    lines: dict[tuple, list[str]] = {}
    for one in cells:
        name = tuple(f"{one[key]:.0%}" if key == "kv_sparsity" else str(one[key]) for key in keys)
        lines.setdefault(name, []).append(_text(one, form or (".2f" if one["quantity"] == "recompute_gain" else ".0f")))
    return [(*name, *texts) for name, texts in lines.items()]


def _text(one: dict, form: str) -> str:
    ours = common.number(one["modelled"], form)
    if "traffic" in one:
        return ours
    mark = "=" * one["fitted"] + common.number(one["error_frac"], "+.0f", 100)
    return f"{ours} / {common.number(one['published'], form)} ({mark})"


def _lines(said: Sequence[Trend]) -> list[str]:
    names = {True: "holds         ", False: "does not hold ", None: ""}
    return [f"{names[one.holds]}{one.text}" for one in said]


if __name__ == "__main__":
    sys.exit(common.run(main))
