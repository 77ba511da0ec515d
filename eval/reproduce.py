"""Quality against KV sparsity: the methods on the bundled model, as tables, a figure and records.

    python -m eval.reproduce      under 8 minutes on 2 CPU cores; an interrupted run goes on where it stopped

One cell is a method at a sparsity: dense, local, strided, SWA, and SWA with the K and V in INT8. Each cell scores one
ragged batch, token by token through the decode path: windows of held-out standard library text, spread evenly
over it (perplexity), and generated recall episodes, each of its own seed (accuracy), each sequence alone from an empty
cache. Attended and clipped fractions and bytes per token are those of the whole batch. At 0 % every method but
INT8 selects all tokens: of these only SWA is run, as a check of its whole path against dense.

Differences from dense, from local and of INT8 are taken window by window and episode by episode; what is above two
standard errors of such a paired difference is said below the tables, and nothing is said of the rest. With this
many comparisons at so few windows, some will be above by chance.

Writes eval/results/reproduce.jsonl (records) and eval/results/reproduce.png (needs matplotlib). The paper's Figure 8
shows for LLaMA-7B that local and strided lose with growing sparsity what SWA keeps; its numbers stand beside ours
and are of another model and text.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from absl import flags

from eval import common, episodes, inputs, plots, quality, windows

RESULTS = Path(__file__).parent / "results"
METHODS = MappingProxyType({"local": "raw", "strided": "raw", "swa": "raw", "swa+int8": "int8"})  # and their codecs

# Paper (arXiv 2403.17312v1), Figure 8, LLaMA-7B on WikiText-2: perplexity, read off the figure to about 3 %.
# ALISA (SWA with INT8) lies on SWA there.
PAPER_SPARSITIES = (0.2, 0.4, 0.6, 0.8, 0.9)
PAPER_DENSE = 5.65
PAPER = MappingProxyType(
    {
        "local": (10.8, 24, 49, 87, 186),
        "strided": (8.4, 24, 115, 385, 762),
        "swa": (5.7, 5.7, 5.8, 6.0, 6.3),
        "swa+int8": (5.7, 5.7, 5.8, 6.0, 6.3),
    }
)
CLAIM = (
    "paper: Figure 8, LLaMA-7B on WikiText-2, another model and text. Its claim: SWA stays close to dense\n"
    "up to 80 % (6.0 against 5.6-5.7), INT8 or not, while local and strided collapse from 20 % on (87 and 385 at 80 %)."
)


@dataclass(frozen=True)
class Sizes(quality.Sizes):
    """How much is measured; the run time grows with the number of cells times `context_tokens`."""

    sparsities: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)

    def cells(self) -> list[tuple[str, float, str, str]]:
        """(method, sparsity, policy, codec) of every cell, dense first."""
        grid = [
            (method, s, f"{method.removesuffix('+int8')}(kv_sparsity={s:g})", codec)
            for method, codec in METHODS.items()
            for s in self.sparsities
            if s > 0 or method.startswith("swa")
        ]
        return [("dense", 0.0, "dense", "raw"), *grid]


SIZES = Sizes()


def main(
    argv: Sequence[str],
    load: Callable = inputs.load,
    make_engine: Callable = inputs.make_engine,
    sizes: Sizes = SIZES,
) -> None:
    """flags -> config -> load -> loop -> records. The arguments beside `argv` are for tests."""
    setup = common.shared_flags("bundled", windows.BUNDLED, str(RESULTS / "reproduce.jsonl"))
    flags.DEFINE_string("figure", None, "PNG file. Default: --out with the ending .png.", flag_values=setup)
    quality.jobs_flag(setup)
    common.parse(setup, argv, __doc__)
    grid = [(m, s, inputs.policy(policy), inputs.codec(codec)) for m, s, policy, codec in sizes.cells()]
    source = windows.read(setup.text)
    card = inputs.card(setup.model)
    results = inputs.results(setup.out)
    sample = quality.draw(load, setup.model, card, source, sizes, setup.seed)
    cells = [
        {
            "script": "eval.reproduce",
            "method": method,
            "kv_sparsity": sparsity,
            "policy": policy,
            "codec": codec,
            "protocol": "decode",
            **sample.fields,
        }
        for method, sparsity, policy, codec in grid
    ]
    found, reused, interrupted = quality.run(cells, sample, make_engine, results, rerun=setup.rerun, jobs=setup.jobs)
    records = {(r["method"], r["kv_sparsity"]): r for r in found if r is not None}
    if reused:
        common.say(f"{reused} of {len(records)} cells were already in {setup.out}; --rerun measures them again")
    text = report(records, [cell[:2] for cell in grid]) if records else "no cell was finished"
    common.emit(records.values(), text, setup.json)
    if interrupted:
        raise KeyboardInterrupt
    figure = Path(setup.figure) if setup.figure else Path(setup.out).with_suffix(".png")
    common.say(plots.quality(records, tuple(METHODS), figure))


def report(records: Mapping[tuple[str, float], dict], cells: Sequence[tuple[str, float]]) -> str:
    """The tables and sentences for people; a cell that is missing is `-`."""
    first = next(iter(records.values()))
    kinds = episodes.KINDS
    head = ["method", "sparsity", "token ppl", "bits/byte", "recall", *kinds]
    head += ["attended", "KV B/tok", "stats B/tok", "clipped", "paper"]
    rows = []
    for method, sparsity in cells:
        r = records.get((method, sparsity), {})

        def show(key: str, form: str, scale: float = 1.0, stderr: str | None = None, r: dict = r) -> str:
            return common.number(r.get(key), form, scale, r.get(stderr) if stderr else None)

        rows.append(
            [
                method,
                f"{100 * sparsity:.0f} %",
                show("token_perplexity", ".3f", 1, "stderr"),
                show("bits_per_byte", ".3f"),
                show("recall_accuracy_frac", ".1f", 100, "recall_accuracy_frac_stderr"),
                *(show(f"recall_{kind}_accuracy_frac", ".1f", 100) for kind in kinds),
                show("attended_frac", ".1f", 100),
                show("kv_bytes_per_token", ".0f"),
                show("stats_bytes_per_token", ".0f"),
                show("clipped_frac", ".3f", 100) if METHODS.get(method) == "int8" else "-",
                common.number(_paper(method, sparsity), "g"),
            ]
        )
    above = (
        f"{first['model']} on {first['data']} ({first['data_sha256'][:12]}), decode protocol, "
        f"K and V raw but for swa+int8.\n"
        f"Perplexity: {first['windows']} windows of {first['window_tokens']} tokens, n = {first['n']}.\n"
        f"Recall: {first['recall_episodes']} episodes of {', '.join(map(str, first['episode_lengths']))} "
        f"tokens, n = {first['recall_n']} answers.\n"
        "Recall, attended and clipped in %; ± is one standard error (over windows, over episodes)."
    )
    parts = [f"{above}\n\n{common.table(head, rows)}", paired(records, cells), claims(records, cells), CLAIM]
    return "\n\n".join(parts)


def references(records: Mapping[tuple[str, float], dict], method: str, sparsity: float) -> dict[str, dict]:
    """The records that a cell is compared with, by name."""
    named = {"dense": ("dense", 0.0)} if method != "dense" else {}
    if method.startswith("swa"):
        named["local"] = ("local", sparsity) if sparsity else ("dense", 0.0)
    if method == "swa+int8":
        named["swa"] = ("swa", sparsity)
    return {name: records[key] for name, key in named.items() if key in records}


def paired(records: Mapping[tuple[str, float], dict], cells: Sequence[tuple[str, float]]) -> str:
    """The table of differences."""
    names = ("dense", "local", "swa")
    head = ["method", "sparsity", *(f"nats/token from {n}" for n in names), *(f"recall from {n}" for n in names)]
    rows = []
    for method, sparsity in cells:
        if method == "dense" or (method, sparsity) not in records:
            continue
        others, row = references(records, method, sparsity), [method, f"{100 * sparsity:.0f} %"]
        for metric, form, scale in (("perplexity", ".4f", 1), ("recall", ".1f", 100)):
            for name in names:
                d = quality.difference(records[method, sparsity], others[name], metric) if name in others else None
                row.append(quality.show(d, form, scale))
        rows.append(row)
    text = (
        "Paired differences, ± one standard error: ln of the ratio of perplexities, and recall in points.\n"
        "* is above two standard errors."
    )
    return f"{text}\n\n{common.table(head, rows)}"


def claims(records: Mapping[tuple[str, float], dict], cells: Sequence[tuple[str, float]]) -> str:
    """Which differences are above two standard errors, one line for each method, reference and metric."""
    lines = ["Above two standard errors of the paired difference (all else is left open by this sample):"]
    for metric in quality.METRICS:
        for name in ("dense", "local", "swa"):
            for method in METHODS:
                higher, lower = [], []
                for sparsity in [s for m, s in cells if m == method and (m, s) in records]:
                    other = references(records, method, sparsity).get(name)
                    d = None if other is None else quality.difference(records[method, sparsity], other, metric)
                    if d is not None and d.shown:
                        (higher if d.value > 0 else lower).append(f"{100 * sparsity:.0f}")
                found = [f"{word} at {', '.join(at)} %" for word, at in (("higher", higher), ("lower", lower)) if at]
                if found:
                    lines.append(f"  {metric}: {method} is {' and '.join(found)} than {name}")
    return "\n".join(lines if len(lines) > 1 else [lines[0], "  no difference"])


def _paper(method: str, sparsity: float) -> float | None:
    """The paper's value for this row, None where it has none."""
    if sparsity == 0:
        return PAPER_DENSE
    return dict(zip(PAPER_SPARSITIES, PAPER.get(method, ()))).get(sparsity)


if __name__ == "__main__":
    sys.exit(common.run(main))
