"""The figure of `eval.growth`: seconds against context of steps, decisions and searches, and what sparse costs of dense."""

from collections.abc import Sequence
from pathlib import Path

from eval.drawing import style
from eval.speed import fits

STYLES = (("#000000", "o"), ("#D55E00", "s"), ("#0072B2", "^"), ("#CC79A7", "D"), ("#009E73", "v"))


def plot(records: Sequence[dict], chosen, path: Path) -> str:
    """Four panels as a PNG; returns a sentence on what was done. chosen: the `Cast` of `eval.growth`.

    Dotted: a + b n as fitted. Raises UserError where `path` cannot be written.
    """
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    found, weights_s = fits.series(records)
    first = records[0]
    names = [f"{s.controller} | {s.policy}" for s in chosen.steps]
    panels = (
        ("resident", names[:2]),
        (f"offloaded, {first['device_kv_frac']:g} of the dense KV on the device", names[2:]),
        ("decisions and searches", [one.name for one in found.values() if one.part != "step"]),
    )
    with pyplot.rc_context(style.RECIPE | {"lines.markersize": 4}):
        figure, axes = pyplot.subplots(1, 4, figsize=(14.4, 3.8), layout="constrained")
        for axis, (title, members) in zip(axes, panels):
            for (colour, marker), name in zip(STYLES, members):
                seconds = found[name].seconds
                if not seconds:
                    continue
                label = name.replace(chosen.sparse.policy, "sparse")
                axis.plot(list(seconds), [1e3 * s for s in seconds.values()], marker, color=colour, label=label)
                if len(seconds) > 1 and found[name].part == "step":
                    a, b = fits.line(seconds)
                    fitted = [1e3 * (a + b * n) for n in seconds]
                    axis.plot(list(seconds), fitted, ":", color=colour, linewidth=1)
            if title != panels[-1][0]:
                axis.axhline(1e3 * weights_s, color="#777777", linestyle="--", linewidth=0.8, label="weights only")
            axis.set_yscale("log")
            axis.set_title(title, fontsize=9)
            low, high = axis.get_ylim()
            axis.set_ylim(low, high * (high / low) ** (0.4 if title == panels[-1][0] else 0.1))  # room for the legend
            axis.legend(frameon=False, fontsize=7, loc="upper left")
        axes[0].set_ylabel("ms a step")
        axes[2].set_ylabel("ms")
        _shares(axes[3], found, names, weights_s, records)
        contexts = sorted({n for one in found.values() for n in one.seconds})
        for axis in axes:
            axis.set_xscale("log", base=2)
            axis.set_xticks(contexts, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in contexts])
            axis.set_xlabel("tokens of context")
        figure.suptitle(
            f"{first['model']}, {first['n_layers']} layers, B = {first['batch']}, {first['dtype']}, {first['device_kind']}; "
            f"sparse: {chosen.sparse.policy}. Dotted: a + b n",
            fontsize=8,
        )
        return style.save(figure, path)


def _shares(axis, found, names: Sequence[str], weights_s: float, records: Sequence[dict]) -> None:
    """Sparse over dense, resident, beside the share of the tokens that is attended."""
    dense, sparse = (found[name].seconds for name in names[:2])
    both = [n for n in dense if n in sparse]
    pairs = [fits.ratios(sparse[n], dense[n], weights_s) for n in both]
    shares = {
        r["context_tokens"]: r["attended_frac"] for r in records if r.get("policy") != "dense" and "attended_frac" in r
    }
    axis.plot(both, [whole for whole, _ in pairs], "o-", color=STYLES[1][0], label="seconds a step")
    above = [(n, x) for n, (_, x) in zip(both, pairs, strict=True) if x is not None]
    axis.plot(*zip(*above) if above else ((), ()), "s--", color=STYLES[2][0], label="less weights only")
    axis.plot(both, [shares[n] for n in both], color="#777777", linewidth=1, label="attended share")
    axis.set_title("sparse / dense, resident", fontsize=9)
    axis.set_ylim(0, None)
    axis.legend(frameon=False, fontsize=7)
