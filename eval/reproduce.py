"""Quality against KV sparsity: the four methods on the bundled model, as a table, a figure and records.

    python -m eval.reproduce      under 8 minutes on 2 CPU cores; an interrupted run goes on where it stopped

One cell is a method at a sparsity. Each cell scores one ragged batch, token by token through the decode path:
windows of held-out standard library text, spread evenly over it (perplexity), and generated recall episodes
(accuracy), each sequence alone from an empty cache. Attended fraction and bytes per token are those of the
whole batch.

Writes eval/results/reproduce.jsonl (records) and eval/results/reproduce.png (needs matplotlib). Expected: at
0 % every method is dense; with growing sparsity local and strided lose what SWA keeps. The paper's Figure 8
shows this for LLaMA-7B; its numbers stand beside ours and are of another model and text.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from absl import flags
from tqdm import tqdm

from eval import common, episodes, inputs, measure, plots, recall, windows

RESULTS = Path(__file__).parent / "results"
METHODS = ("local", "strided", "swa")  # and dense, which has no sparsity

# Paper (arXiv 2403.17312v1), Figure 8, LLaMA-7B on WikiText-2: perplexity, read off the figure to about 3 %.
PAPER_SPARSITIES = (0.2, 0.4, 0.6, 0.8, 0.9)
PAPER_DENSE = 5.65
PAPER = MappingProxyType(
    {
        "local": (10.8, 24, 49, 87, 186),
        "strided": (8.4, 24, 115, 385, 762),
        "swa": (5.7, 5.7, 5.8, 6.0, 6.3),
    }
)
CLAIM = (
    "paper: Figure 8, LLaMA-7B on WikiText-2, another model and text. Its claim: SWA stays close to dense\n"
    "up to 80 % (6.0 against 5.6-5.7), while local and strided collapse from 20 % on (87 and 385 at 80 %)."
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the run time grows with the number of cells times `context_tokens`."""

    sparsities: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
    context_tokens: int = 1024
    windows: int = 8
    episode_lengths: tuple[int, ...] = (256, 512, 1024)
    episodes: int = 3  # of every kind and length

    def cells(self) -> list[tuple[str, float, str]]:
        """(method, sparsity, policy) of every cell, dense first."""
        grid = [(m, s, f"{m}(kv_sparsity={s:g})") for m in METHODS for s in self.sparsities]
        return [("dense", 0.0, "dense"), *grid]


SIZES = Sizes()


def main(
    argv: Sequence[str],
    load: Callable = inputs.load,
    make_engine: Callable = inputs.make_engine,
    sizes: Sizes = SIZES,
) -> None:
    """flags -> config -> load -> loop -> records. The arguments beside `argv` are for tests."""
    values = common.shared_flags("bundled", windows.BUNDLED, str(RESULTS / "reproduce.jsonl"))
    flags.DEFINE_string("figure", None, "PNG file. Default: --out with the ending .png.", flag_values=values)
    common.parse(values, argv, __doc__)
    cells = [(method, sparsity, inputs.policy(text)) for method, sparsity, text in sizes.cells()]
    codec = inputs.codec("raw")
    source = windows.read(values.text)
    card = inputs.card(values.model)
    context, stride = inputs.window(sizes.context_tokens, None, card, sizes.context_tokens)
    results = inputs.results(values.out)
    model = inputs.model(load, values.model)
    text = windows.tokenize(source.characters, inputs.tokenizer(model))
    plan = windows.plan(len(text.tokens), context, stride, model.bos_id is not None)
    plan = windows.spread([w for w in plan if w.stop - w.start == plan[0].stop - plan[0].start], sizes.windows)
    drawn = recall.draw(model, episodes.KINDS, sizes.episode_lengths, sizes.episodes, values.seed)
    batch = [windows.sequence(text, w, model.bos_id) for w in plan] + [e.tokens.tolist() for e in drawn]

    records, reused, interrupted = {}, 0, False
    bar = tqdm(cells, desc="cells", disable=None, leave=False)
    try:
        for method, sparsity, policy in bar:
            cell = {
                "script": "eval.reproduce",
                **card.fields(),
                "data": source.name,
                "data_sha256": source.sha256,
                "method": method,
                "kv_sparsity": sparsity,
                "policy": policy,
                "codec": codec,
                "placement": "resident",
                "protocol": "decode",
                "window_tokens": context,
                "stride_tokens": stride,
                "windows_asked": sizes.windows,
                "episode_lengths": sizes.episode_lengths,
                "episodes_each": sizes.episodes,
                "seed": values.seed,
            }
            record = None if results is None or values.rerun else results.find(cell)
            reused += record is not None
            if record is None:
                began = time.perf_counter()
                engine = inputs.engine(make_engine, model, policy, codec)
                scores = engine.score(batch, protocol="decode")
                result = {
                    **measure.perplexities(text, plan, scores.logprobs[: len(plan)]),
                    **recall.accuracies(drawn, scores.correct[len(plan) :]),
                    **measure.footprint([scores]),
                }
                wall_s = time.perf_counter() - began
                record = inputs.record(results, cell, result, wall_s, measure.how([scores]))
            records[method, sparsity] = record
    except KeyboardInterrupt:
        interrupted = True

    made = list(records.values())
    if reused:
        common.say(f"{reused} of {len(made)} cells were already in {values.out}; --rerun measures them again")
    common.emit(made, report(records, cells) if made else "no cell was finished", values.json)
    if interrupted:
        raise KeyboardInterrupt
    figure = Path(values.figure) if values.figure else Path(values.out).with_suffix(".png")
    common.say(plots.quality(records, METHODS, figure))


def report(records: dict[tuple[str, float], dict], cells) -> str:
    """The table for people; a cell that is missing is `-`."""
    first = next(iter(records.values()))
    kinds = episodes.KINDS
    head = [
        "method",
        "sparsity",
        "token ppl",
        "bits/byte",
        "recall",
        *kinds,
        "attended",
        "KV B/tok",
        "stats B/tok",
        "paper",
    ]
    rows = []
    for method, sparsity, _ in cells:
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
                common.number(_paper(method, sparsity), "g"),
            ]
        )
    above = (
        f"{first['model']} on {first['data']} ({first['data_sha256'][:12]}), decode protocol, "
        f"codec {first['codec']}.\n"
        f"Perplexity: {first['windows']} windows of {first['window_tokens']} tokens, n = {first['n']}.\n"
        f"Recall: {first['recall_episodes']} episodes of {', '.join(map(str, first['episode_lengths']))} "
        f"tokens, n = {first['recall_n']} answers.\n"
        "Recall and attended in %; ± is one standard error (over windows, over episodes)."
    )
    return f"{above}\n\n{common.table(head, rows)}\n\n{CLAIM}"


def _paper(method: str, sparsity: float) -> float | None:
    """The paper's value for this row, None where it has none."""
    if sparsity == 0:
        return PAPER_DENSE
    return dict(zip(PAPER_SPARSITIES, PAPER.get(method, ()))).get(sparsity)


if __name__ == "__main__":
    sys.exit(common.run(main))
