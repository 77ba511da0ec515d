"""Figures. matplotlib is an extra: where it is not installed, a script says so and goes on."""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from eval.quality.paired import METRICS, difference
from eval.script.common import UserError

# Okabe and Ito's colours, which stay apart for colour-blind readers; the markers do without colour.
STYLES = MappingProxyType(
    {
        "dense": ("dense", "#000000", "--", ""),
        "local": ("local", "#E69F00", "-", "s"),
        "strided": ("strided", "#56B4E9", "-", "^"),
        "swa": ("SWA", "#D55E00", "-", "o"),
        "swa+int8": ("SWA, INT8", "#0072B2", ":", "D"),
    }
)
SERIES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
SYSTEMS = MappingProxyType(
    {"hf_accelerate": "Accelerate", "vllm": "vLLM", "flexgen": "FlexGen", "alisa": "ALISA"}
)  # in the order of SERIES
RECIPE = MappingProxyType({"font.family": "serif", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
WITHOUT = "no figure: matplotlib is not installed (it comes with the extra 'plots')"

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
    pyplot = _pyplot()
    if pyplot is None:
        return WITHOUT
    dense = records["dense", 0.0]
    panels = [(records, *panel) for panel in PANELS if panel[1] in dense]
    panels += [(found, name, "acc", 100, f"{name}, accuracy in %") for name, found in tasks.items()]
    with pyplot.rc_context(RECIPE):
        size = (3.6 * max(2, len(panels)), 3.4)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for axis, (found, metric, key, scale, label) in zip(axes[0], panels, strict=True):
            full = found["dense", 0.0]
            axis.axhline(scale * full[key], **_style("dense"))
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
                    **_style(method),
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
        return _save(figure, path)


def ablations(panels: Mapping[float, Sequence], dense: Mapping, path: Path) -> str:
    """What the variants of each group change in perplexity (above) and recall (below), as a PNG; returns a sentence on what
    was done.

    `panels` are those of `eval.ablations`: for each sparsity (variant, record, record of the default). Points are paired
    differences from the default, filled where they are above two standard errors; bars are one. Each panel has a scale of
    its own. Raises UserError where `path` cannot be written.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return WITHOUT
    variants = [variant for variant, _, _ in next(iter(panels.values()))]
    groups = {v.group: [w.label for w in variants if w.group == v.group] for v in variants}
    with pyplot.rc_context(RECIPE):
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
                    _changes(axis, mine, shift, *SERIES[at % len(SERIES)], f"SWA at {100 * sparsity:g} % ({values})")
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
        return _save(figure, path)


def training(record: Mapping, path: Path) -> str:
    """Loss and accuracy over the steps of a training run, two panels, as a PNG; returns a sentence on what was done.

    `record` is the `training.json` of `eval.train`. Raises UserError where `path` cannot be written.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return WITHOUT
    history, steps = record["history"], [point["step"] for point in record["history"]]
    with pyplot.rc_context(RECIPE):
        figure, axes = pyplot.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
        for key, label, colour in (("text_nats", "text", "#0072B2"), ("answer_nats", "recall answers", "#D55E00")):
            axes[0].plot(steps, [point[key] for point in history], label=label, color=colour, linewidth=1.2)
        axes[0].set_ylabel("training loss, nats per token")
        axes[0].set_ylim(bottom=0)
        axes[0].legend(frameon=False)
        axes[1].plot(steps, [100 * point["answer_accuracy"] for point in history], color="#D55E00", linewidth=1.2)
        axes[1].set_ylabel("recall answers right, %")
        before = None
        for point in history:  # where the curriculum goes on to longer sequences
            if point["length"] != before:
                for axis in axes:
                    axis.axvline(point["step"], color="#000000", linewidth=0.5, alpha=0.4)
                axes[1].annotate(f" {point['length']}", (point["step"], 2), fontsize=6)
            before = point["length"]
        for axis in axes:
            axis.set_xlabel("step (lines: a new length of sequences, tokens)")
        last = record["evaluation"][-1]
        figure.suptitle(
            f"{record['non_embedding_params'] / 1e6:.2f} M parameters, {record['trained_tokens'] / 1e6:.1f} M tokens; "
            f"held out at {last['length']} tokens: {last['heldout_nats_per_token']:.2f} nats per token",
            fontsize=8,
        )
        return _save(figure, path)


def throughput(cells: Sequence[Mapping], path: Path) -> str:
    """Modelled beside published tokens per second by batch, a panel a model, as a PNG; returns a sentence on what was done.

    `cells` are those of `eval.modelled.paper_cells.figure_9`. Raises UserError where `path` cannot be written.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return WITHOUT
    cells = [cell for cell in cells if cell["published"] is not None and cell["system"] in SYSTEMS]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    columns = min(3, len(models))
    with pyplot.rc_context(RECIPE):
        figure, grid = pyplot.subplots(
            -(-len(models) // columns),
            columns,
            figsize=(2.6 * columns + 0.6, 2.4 * -(-len(models) // columns) + 0.8),
            layout="constrained",
            squeeze=False,
        )
        for axis, model in zip(grid.flat, models):
            for (system, label), (colour, marker) in zip(SYSTEMS.items(), SERIES, strict=True):
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
        return _save(figure, path)


def systems(records: Sequence[Mapping], path: Path) -> str:
    """Tokens per second of each system, with the range of its runs, as a PNG; returns a sentence on what was done.

    `records` are those of `eval.throughput`. Raises UserError where `path` cannot be written.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return WITHOUT
    first, names = records[0], [" | ".join(r[key] for key in ("placement", "policy", "codec")) for r in records]
    with pyplot.rc_context(RECIPE):
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
        return _save(figure, path)


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


def _pyplot():
    """matplotlib.pyplot without a screen, or None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


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


def _save(figure, path: Path) -> str:
    from matplotlib import pyplot

    part = path.with_name(path.name + ".part")
    try:
        figure.savefig(part, dpi=200, format="png")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write the figure {path.name!r}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
        part.unlink(missing_ok=True)
    return f"figure: {path}"


def _style(method: str) -> dict:
    return dict(zip(("label", "color", "linestyle", "marker"), STYLES[method], strict=True))
