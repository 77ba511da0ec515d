"""Figures of perplexity and recall: the paper's Figure 8, and the groups of `eval.ablations`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from eval.drawing import style
from eval.quality.paired import METRICS, difference

# (metric, value, scale, label)
PANELS = (
    ("perplexity", "token_perplexity", 1, "token perplexity (lower is better)"),
    ("recall", "recall_accuracy_frac", 100, "recall accuracy, % (higher is better)"),
)
CHANGES = (
    ("perplexity", "change of perplexity, %\n(lower is better)"),
    ("recall", "change of recall, points\n(higher is better)"),
)


def quality(
    records: Mapping[tuple[str, float], dict],
    methods: Sequence[str],
    path: Path,
    tasks: Mapping[str, Mapping[tuple[str, float], dict]] = MappingProxyType({}),
) -> str:
    """Perplexity, recall and the accuracy in each task against KV sparsity, as a PNG; returns a sentence on what was done.

    `records` are those of Figure 8's sample, by (method, kv_sparsity), dense among them; bars are one standard error of the
    paired difference from dense, in the tasks of the accuracy. Raises UserError where `path` cannot be written.
    """
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    dense = records["dense", 0.0]
    panels = [(records, *panel) for panel in PANELS if panel[1] in dense]
    panels += [(found, name, "acc", 100, f"{name}, accuracy in %") for name, found in tasks.items()]
    with pyplot.rc_context(style.RECIPE):
        size = (3.6 * max(2, len(panels)), 3.4)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for axis, (found, metric, key, scale, label) in zip(axes[0], panels, strict=True):
            full = found["dense", 0.0]
            axis.axhline(scale * full[key], **style.line("dense"))
            for method in methods:
                points = {0.0: full}  # what a method without sparsity is
                points |= {s: r for (m, s), r in found.items() if m == method}
                points = sorted(points.items())
                axis.errorbar(
                    [100 * s for s, _ in points],
                    [scale * r[key] for _, r in points],
                    yerr=[_bar(r, full, metric, key, scale) for _, r in points],
                    markersize=6 if "int8" in method else 4,
                    capsize=2,
                    linewidth=1.2,
                    markerfacecolor="none" if "int8" in method else None,
                    **style.line(method),
                )
            axis.set_xlabel("KV sparsity, %")
            axis.set_ylabel(label)
            if metric == "recall":
                axis.set_ylim(bottom=-4)
        _log_scale(axes[0, 0])
        axes[0, 0].legend(frameon=False)
        figure.suptitle(
            f"{_sample(dense)};\ndecode protocol, bars: one standard error of the paired difference from dense",
            fontsize=8,
        )
        return style.save(figure, path)


def ablations(panels: Mapping[float, Sequence], dense: Mapping, path: Path) -> str:
    """What the variants of each group change in perplexity (above) and recall (below), as a PNG; returns a sentence on what
    was done.

    `panels` are those of `eval.ablations`: for each sparsity (variant, record, record of the default). Points are paired
    differences from the default, filled where they are above two standard errors; bars are one. Each panel has a scale of
    its own. Raises UserError where `path` cannot be written.
    """
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    variants = [variant for variant, _, _ in next(iter(panels.values()))]
    groups = {v.group: [w.label for w in variants if w.group == v.group] for v in variants}
    with pyplot.rc_context(style.RECIPE):
        figure, grid = pyplot.subplots(
            2,
            len(groups),
            figsize=(max(5.0, 0.7 * len(groups) + 0.28 * len(variants)), 5.6),
            layout="constrained",
            sharex="col",
            squeeze=False,
            gridspec_kw={"width_ratios": [len(labels) + 1.0 for labels in groups.values()]},
        )
        for axes, (metric, label) in zip(grid, CHANGES, strict=True):
            axes[0].set_ylabel(label)
            for axis, (group, labels) in zip(axes, groups.items(), strict=True):
                for at, (sparsity, rows) in enumerate(panels.items()):
                    default = rows[0][2]
                    values = f"{default['token_perplexity']:.2f} and {100 * default['recall_accuracy_frac']:.1f} %"
                    shift = 0.2 * (at - (len(panels) - 1) / 2)
                    mine = [(v, *_change(r, default, metric)) for v, r, _ in rows if v.group == group]
                    name = f"SWA at {100 * sparsity:g} % ({values})"
                    _changes(axis, mine, shift, *style.SERIES[at % len(style.SERIES)], name)
                low, high = axis.get_ylim()
                axis.set_ylim(min(low, -1.0), max(high, 1.0))
                axis.axhline(0, color="#000000", linewidth=0.8)
                axis.set_xlim(-0.6, len(labels) - 0.4)
                axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor")
                axis.grid(visible=False, axis="x")
        for axis, group in zip(grid[0], groups, strict=True):
            axis.set_title(group, fontsize=9)
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
        figure.suptitle(
            f"{_sample(dense)}; {dense['protocol']} protocol.\nDense: {dense['token_perplexity']:.2f} and "
            f"{100 * dense['recall_accuracy_frac']:.1f} %. Ringed: the default. Bars: one standard error of the paired "
            "difference from it; filled: above two",
            fontsize=8,
        )
        return style.save(figure, path)


def _change(record: Mapping, reference: Mapping, metric: str) -> tuple:
    """The paired difference, and it and its standard error in % of the reference's perplexity or in points of recall."""
    d = difference(record, reference, metric)
    stderr = d.stderr or 0.0
    if metric == "perplexity":  # from a logarithm
        return d, 100 * math.expm1(d.value), 100 * math.exp(d.value) * stderr
    return d, 100 * d.value, 100 * stderr


def _changes(axis, rows: Sequence, shift: float, colour: str, marker: str, label: str) -> None:
    """One sparsity's points of a panel; `rows` are (variant, difference from the default, change and its error in %)."""
    for x, (variant, d, value, bar) in enumerate(rows):
        fill = colour if d.shown else "#FFFFFF"
        axis.errorbar(
            x + shift, value, bar, fmt=marker, color=colour, markerfacecolor=fill, markersize=4, capsize=2, label=label
        )
        label = None
        if variant.is_default:
            axis.plot(x + shift, value, "o", markersize=9, color=colour, fillstyle="none")


def _bar(record: Mapping, reference: Mapping, metric: str, key: str, scale: float) -> float:
    """One standard error of the paired difference, of a task that of the value, in the panel's unit; 0 for none."""
    if metric not in METRICS:
        return scale * (record[f"{key}_stderr"] or 0.0)
    stderr = difference(record, reference, metric).stderr or 0.0
    return scale * stderr * (record[key] if metric == "perplexity" else 1)  # from that of a logarithm


def _log_scale(axis) -> None:
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _sample(record: Mapping) -> str:
    """What was measured, in one sentence for the head of a figure."""
    text = f"{record['model']} on {record['data']}: {record['windows']} windows of {record['window_tokens']} tokens"
    text += f" (n = {record['n']})"
    if "recall_n" in record:
        text += f", {record['recall_episodes']} recall episodes (n = {record['recall_n']})"
    return text
