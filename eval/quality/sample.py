"""What `eval.compare` scores: text and generated tasks, each a prompt and a few tokens that are decoded after it.

    text      windows of P + N tokens; the last N are decoded
    needle    `eval/text/planted.py`, at each depth; the question ends the prompt, of P tokens
    after     the same needles, and the question comes behind the prompt
    recall    `recall` of `eval/text/planted.py`, P + N tokens; the answers among the last N count
    shift     `shift` of `eval/text/planted.py`, with the same lengths; the answers among the last N count
    steady    such sequences up to their change: what is asked for has been asked for again and again

P and N are the same for all, so under any method a cache is as large in one as in another. A part of a record is a place
where a method can differ from another: the text, a task, a needle at one depth.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum
from typing import NamedTuple

import numpy as np

from eval.quality.paired import Difference
from eval.script import common, inputs, measure
from eval.script.common import UserError
from eval.text import planted, windows

TASKS = ("needle", "after", "recall", "shift", "steady")
LABELS = ("needle", "needle asked for after the prompt", "recall", "shift", "steady")
LEAST_FRAC = 0.2  # a task of which dense attention gets less right cannot tell methods apart
LEAST_NATS = 1e-5  # smaller differences are rounding


@dataclass(frozen=True)
class Sizes:
    """How much is measured of each method."""

    prompt_tokens: int
    new_tokens: int
    windows: int
    items: int  # needles at each depth; as many sequences of the other tasks as there are needles
    depths: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_tokens + self.new_tokens


class Task(NamedTuple):
    """`last[i]` tokens of sequence i are decoded, of which those at answers[i] [last[i]] bool count; `together` neighbours
    are one draw."""

    name: str
    sequences: Sequence[Sequence[int]]
    last: Sequence[int]
    answers: Sequence[np.ndarray]
    together: int


@dataclass(frozen=True, eq=False)
class Sample:
    """The windows of `plan` in `text` as sequences, and the tasks."""

    text: windows.Text
    plan: Sequence[windows.Window]
    sequences: Sequence[Sequence[int]]
    tasks: Sequence[Task]

    @property
    def sha256(self) -> str:
        """Of all tokens, as little-endian int32."""
        every = (self.sequences, *(task.sequences for task in self.tasks))
        return hashlib.sha256(
            np.concatenate([ids for some in every for ids in some]).astype("<i4").tobytes()
        ).hexdigest()


def draw(model, source: windows.Source, sizes: Sizes, names: Sequence[str], seed: int) -> Sample:
    """The sample; a task that cannot be drawn is left out, and that is said. Raises UserError for too short a text."""
    bos = model.bos_id is not None
    text, plan = windows.sample(source, inputs.tokenizer(model), sizes.tokens, sizes.tokens - 1, sizes.windows, bos)
    sequences = [windows.sequence(text, window, model.bos_id) for window in plan]
    plan = [replace(window, score=window.stop - sizes.new_tokens) for window in plan]
    tasks = []
    for name in names:
        try:
            tasks.append(_task(model, source, sizes, name, seed))
        except UserError as error:
            common.say(f"{name} is left out: {str(error).split(': ', 1)[-1]}")
    return Sample(text, plan, sequences, tasks)


def _task(model, source, sizes: Sizes, name: str, seed: int) -> Task:
    if name == "steady":
        return _steady(model, sizes, seed)
    if name in ("needle", "after"):
        length = sizes.prompt_tokens + planted.VALUE_TOKENS
        made = planted.needles(model, source, (length,), sizes.depths, sizes.items, seed)
        last = made.ends("prompt" if name == "needle" else "after")
    else:
        made = planted.draw(name, model, (sizes.tokens,), sizes.items * len(sizes.depths), seed)
        last = [sizes.new_tokens] * len(made.drawn)
    answers = [e.answers[len(e.answers) - n :] for e, n in zip(made.drawn, last, strict=True)]
    return Task(name, made.sequences, last, answers, made.together)


def _steady(model, sizes: Sizes, seed: int) -> Task:
    """Sequences of `shift`, of the length at which what comes before the change has P + N tokens."""
    for length in range(sizes.tokens, 2 * sizes.tokens):
        (one,) = planted.draw("shift", model, (length,), 1, seed).drawn
        if int(np.argmax(one.answers)) - 1 == sizes.tokens:  # the other half begins with a question
            break
    count = sizes.items * len(sizes.depths)
    drawn = planted.draw("shift", model, (length,), count, seed).drawn
    sequences = [e.tokens[: sizes.tokens].tolist() for e in drawn]
    answers = np.arange(sizes.new_tokens) % 2 != sizes.new_tokens % 2  # keys and values in turn, a value at the end
    return Task("steady", sequences, [sizes.new_tokens] * count, [answers] * count, 1)


def text_values(sample: Sample, logprobs: Sequence[np.ndarray]) -> dict:
    """Values of a record; `logprobs` of the last tokens of each window."""
    nll, scored = measure.per_window(sample.plan, logprobs)
    values = measure.perplexities(sample.text, sample.plan, logprobs)
    return {**values, "nll_nats_per_window": nll, "scored_tokens_per_window": scored}


def task_values(task: Task, correct: Sequence[np.ndarray]) -> dict:
    """Values of a record; `correct` as `Engine.score` gives it for the last tokens."""
    hits = [int((np.asarray(c) & a).sum()) for c, a in zip(correct, task.answers, strict=True)]
    asked = [int(a.sum()) for a in task.answers]
    by_draw = (np.reshape(x, (-1, task.together)).sum(1).tolist() for x in (hits, asked))
    return {
        f"{task.name}_accuracy_frac": sum(hits) / sum(asked),
        f"{task.name}_accuracy_frac_stderr": common.ratio_stderr(*by_draw),
        f"{task.name}_hits_per_sequence": hits,
        f"{task.name}_answers_per_sequence": asked,
    }


def parts(record: Mapping, whole: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(totals [n], counts [n]) of each part over its n windows or draws; whole: a needle at all depths is one part.

    Totals are right answers, of "text" -nats, so that more is better everywhere.
    """
    found = {"text": (-np.asarray(record["nll_nats_per_window"]), np.asarray(record["scored_tokens_per_window"]))}
    depths = record["depths_frac"]
    for name, label in zip(TASKS, LABELS, strict=True):
        if name not in record["tasks"]:
            continue
        hits, asked = (np.asarray(record[f"{name}_{what}_per_sequence"]) for what in ("hits", "answers"))
        if name in ("needle", "after"):
            hits, asked = (x.reshape(-1, len(depths)) for x in (hits, asked))
            if not whole:
                found |= {f"{label} at {d:g}": (hits[:, i], asked[:, i]) for i, d in enumerate(depths)}
                continue
            hits, asked = hits.sum(1), asked.sum(1)
        found[name if whole else label] = hits, asked
    return found


def difference(
    part: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray], least: float
) -> Difference:
    """A part of one record minus the same part of another, with the standard error over the differences of windows or
    draws; less is worse. Raises ValueError for records of different samples."""
    if part[1].tolist() != reference[1].tolist():
        raise ValueError("the two records were measured on different samples: their counts differ")
    paired, counts = (part[0] - reference[0]).tolist(), part[1].tolist()
    return Difference(fsum(paired) / sum(counts), common.ratio_stderr(paired, counts), least)


def differences(record: Mapping, dense: Mapping, whole: bool = False) -> dict[str, Difference]:
    """Every part of `record` minus that of `dense`, but for those in which dense attention itself gets too little right."""
    mine, theirs = (parts(r, whole) for r in (record, dense))
    return {
        name: difference(part, theirs[name], LEAST_NATS if name == "text" else 0.0)
        for name, part in mine.items()
        if name == "text" or theirs[name][0].sum() >= LEAST_FRAC * theirs[name][1].sum()
    }


def modes(record: Mapping, dense: Mapping) -> tuple[dict[str, Difference], list[str]] | None:
    """The parts that a method loses, by more than two standard errors, and those that it holds; None: not both."""
    found = differences(record, dense)
    lost = {name: d for name, d in found.items() if d.shown and d.value < 0}
    held = [name for name, d in found.items() if name not in lost and d.stderr is not None]
    return (lost, held) if lost and held else None
