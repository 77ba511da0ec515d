"""Figures of `eval.sparsity` and of the paper's Figures 3, 4, 5 and 10.

Every function takes records of `eval.sparsity` and the path of a PNG, and returns a sentence on what was done; they raise
UserError where the path cannot be written.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eval.drawing import style
from eval.quality import attention_measures

GREY = "#666666"


def overview(records: Sequence[Mapping], path: Path) -> str:
    """Sparsity by step and by layer, the mass missed by layer, and perplexity against the mass missed."""
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    layers = range(len(records[0]["sparsity_frac_by_layer"]))
    with pyplot.rc_context(style.RECIPE):
        figure, ((step, layer), (missed, cost)) = pyplot.subplots(2, 2, figsize=(7.6, 5.8), layout="constrained")
        for at, r in enumerate(records):
            points = dict(zip(("color", "marker"), colour(at), strict=True))
            y = smooth(r["sparsity_frac_by_step"])
            step.plot(np.arange(1, len(y) + 1), y, color=points["color"], linewidth=1.0, label=r["policy"])
            by_layer(layer, r, "sparsity_frac", **points)
            if r["policy"] != "dense":
                by_layer(missed, r, "missed_frac", **points)
            x, y = 100 * r["missed_frac"], r["token_perplexity"]
            errors = dict(xerr=100 * (r["missed_frac_stderr"] or 0), yerr=r["stderr"] or 0)
            cost.errorbar(x, y, **errors, **points, markersize=4, capsize=2, linestyle="none")
        step.set(xlabel=f"step (after {records[0]['skip_tokens']} tokens)", ylabel="sparsity, %")
        layer.set(xlabel="layer", ylabel="sparsity, %", xticks=layers[:: -(-len(layers) // 8)])
        missed.set(xlabel="layer", ylabel="missed mass, %", xticks=layers[:: -(-len(layers) // 8)])
        cost.set(xlabel="missed mass, %", ylabel="token perplexity", yscale="log")
        figure.legend(*step.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=7)
        figure.suptitle(sample(records[0]), fontsize=8)
        return style.save(figure, path)


def sparsity(records: Sequence[Mapping], paper: Mapping, path: Path) -> str:
    """Figure 3: sparsity of dense attention by step and by layer, ours and the paper's; layers by their depth."""
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    dense = records[0]
    with pyplot.rc_context(style.RECIPE):
        figure, (step, layer) = pyplot.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained", sharey=True)
        y, bar = (np.array(dense[f"sparsity_frac_by_step{end}"] or 0) for end in ("", "_stderr"))
        x = np.arange(1, len(y) + 1)
        step.fill_between(x, 100 * (y - bar), 100 * (y + bar), color="#000000", alpha=0.15, linewidth=0)
        step.plot(x, 100 * y, color="#000000", linewidth=0.8, label=dense["model"])
        by_layer(layer, dense, "sparsity_frac", color="#000000", marker="o", relative=True)
        for at, (name, values) in enumerate(paper["by_step"]["percent"].items()):
            shade, marker = style.SERIES[at]
            theirs = dict(color=shade, linestyle="--", marker=marker, markersize=3)
            step.plot(paper["by_step"]["step"], values, label=f"{name} (paper)", **theirs)
            points = [
                (i / (paper["layers"][name] - 1), v)
                for i, v in zip(paper["by_layer"]["layer"], paper["by_layer"]["percent"][name], strict=True)
                if v is not None
            ]
            layer.plot(*zip(*points, strict=True), **theirs)
        step.set(xlabel=f"step (ours after {dense['skip_tokens']} tokens)", ylabel="sparsity, %")
        layer.set(xlabel="layer (0 first, 1 last)")
        figure.legend(*step.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(sample(dense), fontsize=8)
        return style.save(figure, path)


def under_policies(records: Sequence[Mapping], names: Sequence[str], paper: Mapping, path: Path) -> str:
    """Figure 10: sparsity by step, of all entries, of the kept ones, and the paper's; `names` label `records`."""
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    (model, published), *_ = paper["percent"].items()
    panels = (("sparsity_frac", "of all entries"), ("sparsity_kept_frac", "of kept entries"),
              ("sparsity_pooled_frac", "of all, rows averaged over heads"))  # fmt: skip
    with pyplot.rc_context(style.RECIPE):
        figure, axes = pyplot.subplots(1, 4, figsize=(9.6, 3.2), layout="constrained", sharey=True)
        shades = pyplot.get_cmap("viridis")(np.linspace(0.9, 0.1, len(records) - 1))
        for at, (r, name) in enumerate(zip(records, names, strict=True)):
            line = dict(color=GREY, linestyle="--") if r["policy"] == "dense" else dict(color=shades[at - 1])
            for axis, (key, _) in zip(axes, panels, strict=False):
                y = smooth(r[f"{key}_by_step"])
                axis.plot(np.arange(1, len(y) + 1), y, linewidth=1.0, label=name, **line)
            if name in published:
                axes[-1].plot(paper["step"], published[name], marker="o", markersize=3, **line)
        y = smooth(records[0]["sparsity_frac_by_step"])  # what the paper's dense curve is
        (line,) = axes[2].plot(np.arange(1, len(y) + 1), y, color="#000000", linestyle=":", linewidth=1.0)
        axes[2].legend([line], ["dense, by head"], loc="lower right", frameon=False)
        for axis, title in zip(axes, (*(title for _, title in panels), f"paper, {model}"), strict=True):
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("step")
        axes[0].set_ylabel("sparsity, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False,
                      title="KV sparsity of SWA, %")  # fmt: skip
        figure.suptitle(f"{sample(records[0])}; mean of 9 steps", fontsize=8)
        return style.save(figure, path)


def scores(records: Sequence[Mapping], paper: Mapping, path: Path) -> str:
    """Figure 4: accumulated scores by vocabulary id, in the order of dense's, a panel a policy."""
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    tokens = np.array(records[0]["tokens"])
    _, dense, _ = attention_measures.by_id(np.array(records[0]["received"]), tokens)
    order = np.argsort(-dense, kind="stable")
    with pyplot.rc_context(style.RECIPE):
        figure, axes = pyplot.subplots(1, len(records) - 1, figsize=(8.4, 3.0), layout="constrained", sharey=True)
        for axis, r in zip(np.atleast_1d(axes), records[1:], strict=True):
            method = r["policy"].split("(")[0]
            _, mine, _ = attention_measures.by_id(np.array(r["received"]), tokens)
            x = np.arange(1, len(order) + 1)
            axis.plot(x, mine[order], ".", markersize=2, color=style.STYLES[method][1])
            axis.plot(x, dense[order], color="#000000", linewidth=1.0, label="dense")
            axis.set(xscale="log", yscale="log", xlabel="vocabulary id, by dense's score")
            axis.set_title(
                f"{style.STYLES[method][0]}: rho {r['rho_by_id']:.3f} (paper {paper['rho'][method]})", fontsize=9
            )
        np.atleast_1d(axes)[0].set_ylabel("accumulated attention")
        np.atleast_1d(axes)[0].legend(frameon=False)
        figure.suptitle(f"{sample(records[0])}, {records[1]['policy'].split('(')[1].rstrip(')')}", fontsize=8)
        return style.save(figure, path)


def first_maps(record: Mapping, layers: Sequence[int], path: Path) -> str:
    """Figure 5: the maps of the first tokens of the first window in some layers, mean over heads."""
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    names = [" ".join(repr(text)[1:-1].split()) or "space" for text in record["first_texts"]]
    with pyplot.rc_context(style.RECIPE | {"axes.grid": False}):
        figure, axes = pyplot.subplots(1, len(layers), figsize=(2.4 * len(layers) + 0.8, 3.0), layout="constrained")
        for axis, layer in zip(np.atleast_1d(axes), layers, strict=True):
            picture = axis.imshow(square(record["first_map"][layer]), cmap="viridis", vmin=0, vmax=1)
            axis.set_title(f"layer {layer}", fontsize=9)
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=5)
            axis.set_yticks(range(len(names)), names if layer == layers[0] else [], fontsize=5)
        figure.colorbar(picture, ax=axes, shrink=0.7, label="attention, mean over heads")
        figure.suptitle(
            f"{record['model']} on {record['data']}: the first tokens of a window, {record['policy']}", fontsize=8
        )
        return style.save(figure, path)


def square(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows 0 .. i of a causal map as a square array; what is still to come is nan."""
    return np.array([[*row, *[np.nan] * (len(rows) - len(row))] for row in rows])


def by_layer(axis, record: Mapping, name: str, relative: bool = False, **look) -> None:
    """A measure by layer with its standard errors, %; relative: layers by their place in the model, 0 .. 1."""
    y, bar = (record[f"{name}_by_layer{end}"] for end in ("", "_stderr"))
    x = np.linspace(0, 1, len(y)) if relative else range(len(y))
    axis.errorbar(
        x, 100 * np.array(y), yerr=None if bar is None else 100 * np.array(bar), markersize=4, capsize=2, **look
    )


def smooth(y: Sequence[float], over: int = 9) -> np.ndarray:
    """A measure by step, %, mean over `over` neighbouring steps (fewer at the ends)."""
    y, one = 100 * np.array(y), np.ones(min(over, len(y)))
    return np.convolve(y, one, "same") / np.convolve(np.ones(len(y)), one, "same")


def colour(at: int) -> tuple[str, str]:
    """Colour and marker of the line number `at`; dense is the first, in black."""
    return ("#000000", "x") if at == 0 else (f"C{at - 1}", "osD^vP*"[(at - 1) % 7])


def sample(record: Mapping) -> str:
    """What was looked at, for the head of a figure."""
    return f"{record['model']} on {record['data']}: {record['windows']} windows of {record['window_tokens']} tokens"
