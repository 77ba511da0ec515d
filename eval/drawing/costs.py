"""Figures of what decoding costs: operations of one attention module, and steps with and without a cache."""

from collections.abc import Mapping
from pathlib import Path

from eval.drawing import style

COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7")  # Okabe and Ito's
OWN = "#000000"


def breakdown(panels: Mapping[str, tuple[Mapping, Mapping]], names: Mapping[str, str], path: Path) -> str:
    """Stacked bars of operations as shares of the dense time, the paper's way here (left) beside the paper (right, hatched),
    and our whole step over the dense step as a mark; a panel a shape. Returns a sentence on what was done.

    panels: {shape: (records by KV sparsity, published bars by KV sparsity)}; names: of the operations, in their order.
    Raises UserError where `path` cannot be written.
    """
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    with pyplot.rc_context(style.RECIPE):
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(3.6 * len(panels) + 1.2, 3.8), layout="constrained", squeeze=False
        )
        for axis, (shape, (mine, bars)) in zip(axes[0], panels.items(), strict=True):
            dense, published = mine.get("dense"), bars["dense"]["total_us"]
            for at, (key, bar) in enumerate(bars.items()):
                parts = [bar[f"{op}_us"] or 0.0 for op in names]
                _stack(axis, at + 0.2, [x / published for x in parts], hatch="///")
                if dense is None or key not in mine:
                    continue
                _stack(axis, at - 0.2, [mine[key].get(f"{op}_s", 0.0) / dense["paper_way_s"] for op in names])
                axis.plot(at, mine[key]["step_s"] / dense["step_s"], "D", color=OWN, markersize=5, zorder=3)
            axis.set_xticks(range(len(bars)), [key if key == "dense" else f"{key} %" for key in bars])
            axis.set_title(shape, fontsize=9)
            axis.set_xlabel("KV sparsity (left: here, hatched: paper)")
            axis.grid(visible=False, axis="x")
        axes[0][0].set_ylabel("time / time of dense attention")
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour, _ in zip(COLOURS, names)]
        handles.append(pyplot.Line2D([], [], marker="D", color=OWN, linestyle=""))
        figure.legend(
            handles,
            [*names.values(), "our whole step"],
            loc="outside lower center",
            ncols=3 * min(2, len(panels)),
            frameon=False,
        )
        return style.save(figure, path)


def caching(ours: Mapping[str, Mapping], paper: Mapping[str, Mapping], title: str, path: Path) -> str:
    """Seconds and bytes of decode steps over those of step 0, two panels, as a PNG; returns a sentence on what was done.

    ours, paper: {series: {"time": (steps, values), "memory": (steps, values)}}, values over those of step 0. Raises
    UserError where `path` cannot be written.
    """
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    with pyplot.rc_context(style.RECIPE):
        figure, axes = pyplot.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
        for axis, quantity in zip(axes, ("time", "memory"), strict=True):
            for (colour, marker), name in zip(style.SERIES, ours, strict=False):
                steps, values = ours[name][quantity]
                axis.plot(steps, values, color=colour, linewidth=1.2, label=f"{name}, here")
                steps, values = paper[name][quantity]
                points = dict(color=colour, marker=marker, markersize=4, linestyle="--", linewidth=0.8)
                axis.plot(steps, values, label=f"{name}, paper", **points)
            axis.set_xlabel("decode step")
            axis.set_ylim(bottom=0)
        axes[0].set_ylabel("seconds per step / those of step 0")
        axes[1].set_ylabel("memory / memory at step 0")
        axes[0].legend(frameon=False, fontsize=7)
        figure.suptitle(title, fontsize=8)
        return style.save(figure, path)


def _stack(axis, at: float, parts, hatch: str | None = None) -> None:
    bottom = 0.0
    for colour, height in zip(COLOURS, parts):
        axis.bar(at, height, 0.36, bottom, color=colour, hatch=hatch, edgecolor="#FFFFFF", linewidth=0.4)
        bottom += height
