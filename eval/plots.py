"""Figures. matplotlib is an extra: where it is not installed, a script says so and goes on."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from eval.common import UserError

# Okabe and Ito's colours, which stay apart for colour-blind readers; the markers do without colour.
STYLES = MappingProxyType(
    {
        "dense": ("dense", "#000000", "--", ""),
        "local": ("local", "#E69F00", "-", "s"),
        "strided": ("strided", "#56B4E9", "-", "^"),
        "swa": ("SWA", "#D55E00", "-", "o"),
    }
)
RECIPE = MappingProxyType({"font.family": "serif", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})


def quality(records: Mapping[tuple[str, float], dict], methods: Sequence[str], path: Path) -> str:
    """Perplexity and recall accuracy against KV sparsity, two panels, as a PNG; returns a sentence on what
    was done.

    `records` are those of `eval.reproduce`, by (method, kv_sparsity). Raises UserError where `path` cannot be
    written.
    """
    try:
        import matplotlib
    except ImportError:
        return "no figure: matplotlib is not installed (it comes with the extra 'plots')"
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    first = next(iter(records.values()))
    panels = (
        ("token_perplexity", "stderr", 1, "token perplexity (lower is better)"),
        ("recall_accuracy_frac", "recall_accuracy_frac_stderr", 100, "recall accuracy, % (higher is better)"),
    )
    with pyplot.rc_context(RECIPE):
        figure, axes = pyplot.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
        for axis, (key, error, scale, label) in zip(axes, panels, strict=True):
            dense = records.get(("dense", 0.0))
            if dense:
                axis.axhline(scale * dense[key], **_style("dense"))
            for method in methods:
                points = sorted((s, r) for (m, s), r in records.items() if m == method)
                axis.errorbar(
                    [100 * s for s, _ in points],
                    [scale * r[key] for _, r in points],
                    yerr=[scale * (r[error] or 0.0) for _, r in points],
                    markersize=4,
                    capsize=2,
                    linewidth=1.2,
                    **_style(method),
                )
            axis.set_xlabel("KV sparsity, %")
            axis.set_ylabel(label)
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes[0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axes[0].yaxis.set_minor_formatter(ticker.NullFormatter())
        axes[1].set_ylim(bottom=0)
        axes[0].legend(frameon=False)
        figure.suptitle(
            f"{first['model']} on {first['data']}: {first['windows']} windows of {first['window_tokens']} "
            f"tokens (n = {first['n']});\n"
            f"{first['recall_episodes']} recall episodes (n = {first['recall_n']}); "
            "decode protocol, bars: one standard error",
            fontsize=8,
        )
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
