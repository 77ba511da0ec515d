"""Many policies and codecs on one sample: perplexity and recall of each, and paired differences.

The sample is one ragged batch: windows of a text, spread evenly over it, and generated recall episodes, each
sequence alone from an empty cache. Every cell runs the same batch, so two cells differ only in what policy and
codec do to the same tokens. The standard error of a difference is therefore that of the differences of windows
or episodes (`difference`), which is far smaller than those of the two values: most of their spread is text that
is hard under any policy.

Cells run `jobs` at a time. One decode step of a small model on a CPU keeps one core busy and no more, so two
cells side by side take little longer than one; `wall_s` of a record is then the time beside another cell.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from math import fsum
from types import MappingProxyType
from typing import NamedTuple

from absl import flags
from tqdm import tqdm

from eval.script import common, hashes, inputs, measure
from eval.text import episodes, recall, windows


@dataclass(frozen=True)
class Sizes:
    """How much is measured in each cell."""

    context_tokens: int = 1024
    windows: int = 8
    episode_lengths: tuple[int, ...] = (256, 512, 1024)
    episodes: int = 3  # of every kind and length, each of a seed of its own

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence."""
        return min((self.context_tokens, *(self.episode_lengths if self.episodes else ())))


@dataclass(frozen=True, eq=False)
class Sample:
    """A model and the batch that every cell scores: the windows of `plan` in `text`, then the episodes `drawn`."""

    model: object
    text: windows.Text
    plan: Sequence[windows.Window]
    drawn: Sequence[recall.Episode]
    batch: Sequence[Sequence[int]]
    fields: Mapping[str, object]  # what identifies all this in a record


def draw(load: Callable, name: str, card: inputs.Card, source: windows.Source, sizes: Sizes, seed: int) -> Sample:
    """Load the model `name`, which `card` describes, and draw the sample; raises UserError."""
    context, stride = inputs.window(sizes.context_tokens, None, card, sizes.context_tokens)
    model = inputs.model(load, name)
    bos = model.bos_id is not None
    text, plan = windows.sample(source, inputs.tokenizer(model), context, stride, sizes.windows, bos)
    drawn = recall.draw(model, episodes.KINDS, sizes.episode_lengths, sizes.episodes, seed)
    batch = [windows.sequence(text, w, model.bos_id) for w in plan] + [e.tokens.tolist() for e in drawn]
    fields = {
        **card.fields(),
        **source.fields,
        "ids_sha256": hashes.of_ids(batch),
        "placement": "resident",
        "window_tokens": context,
        "stride_tokens": stride,
        "windows_asked": sizes.windows,
        "episode_lengths": sizes.episode_lengths,
        "episodes_each": sizes.episodes,
        "seed": seed,
    }
    return Sample(model, text, plan, drawn, batch, MappingProxyType(fields))


def values(sample: Sample, scores) -> dict:
    """The values of a cell's record, those of single windows and episodes included."""
    n = len(sample.plan)
    nll, scored = measure.per_window(sample.plan, scores.logprobs[:n])
    hits, answers = recall.per_episode(sample.drawn, scores.correct[n:])
    return {
        **measure.perplexities(sample.text, sample.plan, scores.logprobs[:n]),
        **(recall.accuracies(sample.drawn, scores.correct[n:]) if sample.drawn else {}),
        **measure.footprint([scores]),
        "nll_nats_per_window": nll,
        "scored_tokens_per_window": scored,
        "hits_per_episode": hits,
        "answers_per_episode": answers,
    }


def jobs_flag(into: flags.FlagValues) -> None:
    """`--jobs`, by default 2."""
    flags.DEFINE_integer("jobs", 2, "Cells that run at a time; no result depends on it.", 1, flag_values=into)


def run(
    cells: Sequence[dict], sample: Sample, make_engine: Callable, results, *, rerun: bool, jobs: int
) -> tuple[list[dict | None], int, bool]:
    """Measure `cells`; returns their records (None: not finished), how many were on file, and whether it was interrupted.

    A cell holds `policy`, `codec` and `protocol` and what else identifies its record. After an interrupt no cell is
    begun; those that are running are finished and kept.
    """
    records = [None if results is None or rerun else _on_file(results, cell) for cell in cells]
    reused = sum(record is not None for record in records)

    def measured(cell: dict):
        began = time.perf_counter()
        engine = inputs.engine(make_engine, sample.model, cell["policy"], cell["codec"])
        scores = engine.score(sample.batch, protocol=cell["protocol"])
        return values(sample, scores), time.perf_counter() - began, {**measure.how([scores]), "jobs": jobs}

    def keep(future) -> None:
        index = waiting.pop(future)
        result, wall_s, how = future.result()
        records[index] = inputs.record(results, cells[index], result, wall_s, how)

    pool, interrupted = ThreadPoolExecutor(jobs), False
    waiting = {pool.submit(measured, cell): i for i, cell in enumerate(cells) if records[i] is None}
    bar = tqdm(total=len(cells), initial=reused, desc="cells", disable=None, leave=False)
    try:
        for future in as_completed(list(waiting)):
            keep(future)
            bar.update()
    except KeyboardInterrupt:
        interrupted = True
        common.say("interrupted: the cells that are running are finished first")
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
        for future in [f for f in waiting if not f.cancelled() and f.exception() is None]:
            keep(future)
    return records, reused, interrupted


def _on_file(results, cell: dict) -> dict | None:
    """The newest record of `cell`, unless it lacks the values of single windows and episodes."""
    record = results.find(cell)
    return record if record is not None and {"nll_nats_per_window", "hits_per_episode"} <= record.keys() else None


class Difference(NamedTuple):
    """Value of one record minus that of another, and the standard error over the differences of their parts."""

    value: float
    stderr: float | None  # None: there is but one part
    least: float  # smaller differences are rounding

    @property
    def shown(self) -> bool:
        """Whether it is above two standard errors, and above rounding."""
        return self.stderr is not None and abs(self.value) > max(2 * self.stderr, self.least)


class Metric(NamedTuple):
    """A ratio of sums over windows or episodes: which fields of a record hold its parts."""

    total: str
    count: str
    least: float


METRICS = MappingProxyType(
    {
        "perplexity": Metric("nll_nats_per_window", "scored_tokens_per_window", 1e-5),  # nats per token
        "recall": Metric("hits_per_episode", "answers_per_episode", 0.0),  # share of answers
    }
)


def difference(record: Mapping, reference: Mapping, metric: str) -> Difference:
    """`record` minus `reference`, by `metric`.

    "perplexity": nats per token, which is the logarithm of the ratio of perplexities; "recall": share of the answers.
    The standard error is the clustered one of a ratio (`common.ratio_stderr`) over the differences of windows or
    episodes. Raises ValueError for records of different samples.
    """
    total, count, least = METRICS[metric]
    counts = record[count]
    if counts != reference[count]:
        raise ValueError(f"the two records were measured on different samples: their {count} differ")
    paired = [a - b for a, b in zip(record[total], reference[total], strict=True)]
    return Difference(fsum(paired) / sum(counts), common.ratio_stderr(paired, counts), least)


def show(d: Difference | None, form: str, scale: float = 1.0) -> str:
    """A difference in a table, marked with `*` where it is above two standard errors."""
    if d is None:
        return "-"
    return common.number(d.value, "+" + form, scale) + (
        "" if d.stderr is None else f" ±{scale * d.stderr:{form}}" + ("*" if d.shown else " ")
    )
