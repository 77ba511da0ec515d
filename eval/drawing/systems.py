"""Figures of systems: `eval.throughput`, and the paper's Figures 1, 9 and 12, published and modelled side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from eval.drawing import style

COLOURS = (*style.SERIES, ("#000000", "v"))
SYSTEMS = MappingProxyType(
    {"hf_accelerate": "Accelerate", "vllm": "vLLM", "flexgen": "FlexGen", "alisa": "ALISA"}
)  # in the order of style.SERIES


class Panel(NamedTuple):
    """`series`: (label, x, published, ours); numbers, or None and texts such as OOM, which have no point."""

    ylabel: str
    xlabel: str
    series: Sequence[tuple[str, Sequence, Sequence, Sequence]]


def rates(records: Sequence[Mapping], path: Path) -> str:
    """Tokens per second of each system, with the range of its runs, as a PNG; returns a sentence on what was done.

    `records` are those of `eval.throughput`. Raises UserError where `path` cannot be written.
    """
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    first, names = records[0], [" | ".join(r[key] for key in ("placement", "policy", "codec")) for r in records]
    with pyplot.rc_context(style.RECIPE):
        figure, axis = pyplot.subplots(figsize=(7.2, 0.32 * len(records) + 1.2), layout="constrained")
        for at, record in enumerate(records):
            rate = record["tokens_per_s"]
            if rate == "OOM":
                axis.text(0, at, " OOM", va="center")
                continue
            least, most = (record.get(f"tokens_per_s_{end}", rate) for end in ("min", "max"))
            axis.barh(at, rate, xerr=[[rate - least], [most - rate]], color="#0072B2", height=0.6, capsize=2)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlim(left=0)
        axis.set_xlabel(f"tokens/s, {first['basis']} on {first['hardware'] or first['device_kind']}")
        axis.set_title(
            f"{first['model']}: {first['batch']} sequences, {first['prompt_tokens']} + {first['new_tokens']} tokens",
            fontsize=9,
        )
        return style.save(figure, path)


def throughput(cells: Sequence[Mapping], path: Path) -> str:
    """Modelled beside published tokens per second by batch, a panel a model, as a PNG; returns a sentence on what was done.

    `cells` are those of `eval.modelled.paper_cells.figure_9`. Raises UserError where `path` cannot be written.
    """
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    cells = [cell for cell in cells if cell["published"] is not None and cell["system"] in SYSTEMS]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    columns = min(3, len(models))
    with pyplot.rc_context(style.RECIPE):
        figure, grid = pyplot.subplots(
            -(-len(models) // columns),
            columns,
            figsize=(2.6 * columns + 0.6, 2.4 * -(-len(models) // columns) + 0.8),
            layout="constrained",
            squeeze=False,
        )
        for axis, model in zip(grid.flat, models):
            for (system, label), (colour, marker) in zip(SYSTEMS.items(), style.SERIES, strict=True):
                mine = [cell for cell in cells if (cell["model"], cell["system"]) == (model, system)]
                known = [cell for cell in mine if not isinstance(cell["modelled"], str)]
                points = dict(color=colour, marker=marker, markersize=4, linewidth=1.2)
                axis.plot([c["batch"] for c in mine], [c["published"] for c in mine], label=label, **points)
                points |= dict(linestyle="--", markerfacecolor="none")
                axis.plot([c["batch"] for c in known], [c["modelled"] for c in known], **points)
            axis.set_xscale("log", base=2)
            axis.set_xticks(batches := sorted({c["batch"] for c in cells}), [str(batch) for batch in batches])
            axis.set_title(f"{model}, {next(c['hardware'] for c in cells if c['model'] == model)}", fontsize=9)
            axis.set_ylim(bottom=0)
        for axis in grid[:, 0]:
            axis.set_ylabel("tokens/s")
        for axis in grid[-1]:
            axis.set_xlabel("batch")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle("ALISA's Figure 9: published (filled, solid) and modelled here (open, dashed)", fontsize=9)
        return style.save(figure, path)


def curves(panels: Sequence[Panel], title: str, path: Path) -> str:
    """Published (filled, solid) beside modelled (open, dashed), as a PNG; returns a sentence on what was done.

    Raises UserError where `path` cannot be written.
    """
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    with pyplot.rc_context(style.RECIPE):
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(max(4.6, 3.6 * len(panels)), 3.6), layout="constrained", squeeze=False
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            for (label, x, published, ours), (colour, marker) in zip(panel.series, COLOURS, strict=False):
                points = dict(color=colour, marker=marker, markersize=4, linewidth=1.2)
                axis.plot(x, _points(published), label=label, **points)
                axis.plot(x, _points(ours), linestyle="--", markerfacecolor="none", **points)
            axis.set_xlabel(panel.xlabel)
            axis.set_ylabel(panel.ylabel)
            axis.set_ylim(bottom=0)
            if isinstance(panel.series[0][1][0], str):
                axis.tick_params(axis="x", rotation=20)
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(panels[0].series),
            frameon=False,
        )
        figure.suptitle(f"{title}\npublished (filled, solid) and modelled here (open, dashed)", fontsize=8)
        return style.save(figure, path)


def _points(values: Sequence) -> list[float]:
    return [float(value) if isinstance(value, int | float) else float("nan") for value in values]
