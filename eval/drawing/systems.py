"""Charts of Figures 1 and 12: published and modelled curves side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.drawing import plots
from eval.drawing.plots import RECIPE, SERIES, WITHOUT

COLOURS = (*SERIES, ("#000000", "v"))


class Panel(NamedTuple):
    """`series`: (label, x, published, ours); numbers, or None and texts such as OOM, which have no point."""

    ylabel: str
    xlabel: str
    series: Sequence[tuple[str, Sequence, Sequence, Sequence]]


def curves(panels: Sequence[Panel], title: str, path: Path) -> str:
    """Published (filled, solid) beside modelled (open, dashed), as a PNG; returns a sentence on what was done.

    Raises UserError where `path` cannot be written.
    """
    pyplot = plots._pyplot()
    if pyplot is None:
        return WITHOUT
    with pyplot.rc_context(RECIPE):
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
        return plots._save(figure, path)


def _points(values: Sequence) -> list[float]:
    return [float(value) if isinstance(value, int | float) else float("nan") for value in values]
