"""The figure of `eval.compare`: quality against the share of the bytes, a line a method."""

from collections.abc import Mapping
from pathlib import Path

from eval.drawing import style
from eval.quality import sample
from eval.quality.rows import Entry

MARKERS = "os^Dv<>Pph8X"


def plot(rows: Mapping[float, Mapping[Entry, dict]], dense: Mapping, path: Path) -> str:
    """Loss on text and accuracy in each task against bytes held, of methods that hold all tokens bytes read, as a PNG;
    returns a sentence on what was done. Raises UserError where `path` cannot be written.

    Bars are one standard error of the paired difference from dense attention. Dotted: a policy with a codec.
    """
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    lines: dict[tuple[str, str], list[dict]] = {}
    for mine in rows.values():
        for entry, record in mine.items():
            line = lines.setdefault((entry.method, entry.codec), [])
            if record is not dense and record not in line:
                line.append(record)
    names = ["text", *dense["told_apart"]]
    with pyplot.rc_context(style.RECIPE):
        colours = pyplot.get_cmap("tab10").colors
        methods = list(dict.fromkeys(key if key[0] == "dense" else key[0] for key in lines))
        size = (2.9 * len(names) + 1.6, 3.6)
        figure, axes = pyplot.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            full = 0.0 if name == "text" else 100 * dense[f"{name}_accuracy_frac"]
            axis.axhline(full, color="#000000", linestyle="--", linewidth=1)
            for (method, codec), found in lines.items():
                if not found:  # dense attention itself
                    continue
                at = methods.index((method, codec) if method == "dense" else method)
                found = sorted(found, key=lambda r: r["budget_frac"])
                changes = [sample.differences(r, dense, whole=True)[name] for r in found]
                axis.errorbar(
                    [100 * r["budget_frac"] for r in found],
                    [-d.value if name == "text" else full + 100 * d.value for d in changes],
                    yerr=[(1 if name == "text" else 100) * (d.stderr or 0.0) for d in changes],
                    label=codec if method == "dense" else method if codec == "raw" else f"{method}, {codec}",
                    color=colours[at % len(colours)],
                    marker=MARKERS[at % len(MARKERS)],
                    linestyle="-" if codec == "raw" else ":",
                    markersize=4,
                    capsize=2,
                    linewidth=1.2,
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks([100 * share for share in rows], [f"{100 * share:g}" for share in rows])
            axis.set_xlabel("bytes, % of dense")
            axis.set_ylabel("nats a token above dense" if name == "text" else f"{name}, % of the answers")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        what = f"prompts of {dense['prompt_tokens']} tokens, {dense['new_tokens']} decoded"
        figure.suptitle(
            f"{dense['model']} on {dense['data']}: {what}. Bytes held at the end, or read at a step where all are held."
            "\nDashed: dense; bars: one standard error of the paired difference from it",
            fontsize=8,
        )
        return style.save(figure, path)
