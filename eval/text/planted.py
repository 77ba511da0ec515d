"""Generated tasks: a sequence shows something and asks for it later. The only input is the haystack text.

    recall   key value key value ...  then keys again: their values            (`lookup` of `eval/text/episodes.py`)
    copy     a segment, and later the same segment again                       (`copy` of `eval/text/episodes.py`)
    needle   text, a key of 2 tokens and its value of 4 planted at a depth of it, and at the end the key: its value
    shift    pairs of key and value; half of them asked for again and again, then each of the others once: their values

`needle` runs over a grid: sequences of each length, the needle at each depth, 0 being before the text and 1 just before
the question. One haystack and one needle are drawn and moved through all depths, so depths are compared on equal terms.
Keys and values are ids that their haystack does not hold.

In `shift` the end of the sequence asks for the half that was not asked for before. A method that keeps the most attended
tokens has evicted that half by then. Only the answers of that half count.

Answers are scored with teacher forcing: a token is right if it is the model's first choice after all correct tokens before
it. `acc` is right answer tokens over answer tokens; `exact_match` is the share of items whose answer tokens are all right.
Standard errors are over draws: a needle at all its depths is one draw. A policy that no longer attends to the planted place
cannot know the answer; the model's own limit is its accuracy under `dense`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from typing import ClassVar

import numpy as np

from eval.script.common import UserError
from eval.text import recall, windows
from eval.text.tasks import share

KEY_TOKENS, VALUE_TOKENS = 2, 4
QUESTION_TOKENS = 2  # before an answer that tell which one is wanted, at most
SHIFT_ROUNDS = 4  # times that each pair of the first half is asked for
SHORTEST = 32  # tokens of a sequence
NAMES = ("recall", "copy", "needle", "shift")


@dataclass(frozen=True, eq=False)
class Planted:
    """Sequences with answers to find: `drawn` [n], of which `depths` [n] says where the needle is (None: no needle).

    Each `together` neighbours are one draw.
    """

    task: str
    data: str
    settings: dict
    drawn: Sequence[recall.Episode]
    depths: Sequence[float | None]
    together: int = 1

    @property
    def fields(self) -> dict:
        """What identifies the task in a record; the hash is over tokens and answers."""
        digest = hashlib.sha256()
        for e in self.drawn:
            digest.update(e.tokens.astype("<i4").tobytes() + e.answers.tobytes())
        return {"task": self.task, "data": self.data, "data_sha256": digest.hexdigest(), **self.settings}

    @property
    def sequences(self) -> list[list[int]]:
        """Token ids."""
        return [e.tokens.tolist() for e in self.drawn]

    last: ClassVar[None] = None  # every token is scored

    def ends(self, question: str) -> list[int]:
        """Tokens of each sequence behind its prompt: from the first answer on, for "after" from the question on."""
        more = QUESTION_TOKENS if question == "after" else 0
        return [len(e.tokens) - int(np.argmax(e.answers)) + more for e in self.drawn]

    @property
    def alike(self) -> list[list[int]]:
        """Every sequence for itself."""
        return [[i] for i in range(len(self.drawn))]

    @property
    def names(self) -> list[str]:
        """What each sequence is called in a message."""
        return [f"item {i} of {self.task}" for i in range(len(self.drawn))]

    def judge(self, logprobs: Sequence[np.ndarray], correct: Sequence[np.ndarray]) -> tuple[dict, list[dict]]:
        """The values of a record, and a sample for each item; both arguments hold the last tokens of each sequence, at most
        all but the first."""
        logprobs, correct = (_whole(self.drawn, rows) for rows in (logprobs, correct))
        hits, answers = recall.per_episode(self.drawn, correct)
        samples = []
        for i, (e, depth) in enumerate(zip(self.drawn, self.depths, strict=True)):
            asked = np.flatnonzero(e.answers)
            loglikelihood = fsum(np.asarray(logprobs[i], np.float64)[asked - 1])
            if not isfinite(loglikelihood):
                raise UserError(f"item {i} of {self.task}: the model gave a log-likelihood that is not finite")
            samples.append(
                {
                    "where": f"item {i} of {self.task}",
                    "tokens": e.tokens.tolist(),
                    "depth": depth,
                    "answer_positions": asked.tolist(),
                    "right": np.asarray(correct[i])[asked - 1].tolist(),
                    "loglikelihood": loglikelihood,
                }
            )
        exact = [h == a for h, a in zip(hits, answers, strict=True)]
        right, asked, whole, items = (
            np.reshape(x, (-1, self.together)).sum(1).tolist() for x in (hits, answers, exact, [1] * len(exact))
        )
        values = {
            **share("acc", right, asked),
            **share("exact_match", whole, items),
            "n": sum(answers),
            "items": len(self.drawn),
        }
        cells: dict[str, dict[str, tuple[int, int]]] = {}
        for e, depth, h, a in zip(self.drawn, self.depths, hits, answers, strict=True):
            row = cells.setdefault(str(len(e.tokens)), {})
            before = row.get(_depth(depth), (0, 0))
            row[_depth(depth)] = (before[0] + h, before[1] + a)
        by_cell = {length: {d: h / a for d, (h, a) in row.items()} for length, row in cells.items()}
        if self.task == "needle":
            values["acc_by_length_and_depth"] = by_cell
        else:
            values["acc_by_length"] = {length: row[""] for length, row in by_cell.items()}
        return values, samples


def _whole(drawn: Sequence[recall.Episode], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rows of all tokens but the first, with zeros where there was none."""
    rows = [np.asarray(row) for row in rows]
    return [np.pad(row, (len(e.tokens) - 1 - len(row), 0)) for e, row in zip(drawn, rows, strict=True)]


def _depth(depth: float | None) -> str:
    return "" if depth is None else f"{depth:g}"


def draw(task: str, model, lengths: Sequence[int], count: int, seed: int) -> Planted:
    """`recall`, `copy` or `shift`: `count` items of each length. Raises UserError where the vocabulary is too small."""
    if task == "shift":
        drawn = [
            _shift(model, length, np.random.default_rng([seed, length, i])) for length in lengths for i in range(count)
        ]
        settings = {"lengths_tokens": list(lengths), "items_each": count}
        return Planted(task, "generated", settings, drawn, [None] * len(drawn))
    kind = {"recall": "lookup", "copy": "copy"}[task]
    try:
        drawn = recall.draw(model, (kind,), lengths, count, seed)
    except ValueError as error:
        raise UserError(f"--lengths: {error}") from None
    settings = {"lengths_tokens": list(lengths), "items_each": count}
    return Planted(task, "generated", settings, drawn, [None] * len(drawn))


def _shift(model, length: int, rng: np.random.Generator) -> recall.Episode:
    """One item of `length` tokens: n pairs to ask for often and n others, 2 n (3 + SHIFT_ROUNDS) tokens behind BOS; what is
    left over lies between the pairs and the questions."""
    ids = _plain_ids(model)
    head = [] if model.bos_id is None else [model.bos_id]
    n = (length - len(head)) // (2 * (3 + SHIFT_ROUNDS))
    gap = length - len(head) - 2 * n * (3 + SHIFT_ROUNDS)
    if n < 1 or len(ids) < 4 * n + gap:
        raise UserError(
            f"--lengths: a shift needs {2 * (3 + SHIFT_ROUNDS) + 1} tokens and {4 * n + gap} ids; got {length}"
        )
    fresh = rng.permutation(ids)[: 4 * n + gap]
    pairs, middle = fresh[: 4 * n].reshape(2 * n, 2), fresh[4 * n :]
    often, others = pairs[:n], pairs[n:]
    table = rng.permutation(pairs)
    asked = [rng.permutation(often) for _ in range(SHIFT_ROUNDS)]
    tokens = np.concatenate(
        [head, table.ravel(), middle, *(part.ravel() for part in asked), rng.permutation(others).ravel()]
    )
    answers = np.zeros(length, bool)
    answers[length - 2 * n :].reshape(n, 2)[:, 1] = True
    return recall.Episode("shift", tokens.astype(np.int32), answers)


def _plain_ids(model) -> np.ndarray:
    special = {model.bos_id, *model.eos_ids, *model.tokenizer.get_added_tokens_decoder()}
    return np.array([i for i in range(model.decoder.config.vocab_size) if i not in special], np.int32)


def needles(model, source: windows.Source, lengths, depths, count: int, seed: int) -> Planted:
    """`count` needles of each length, at each depth. Raises UserError where text or vocabulary does not suffice."""
    text = windows.tokenize(source.characters, model.tokenizer).tokens
    ids = _plain_ids(model)
    head = np.array([] if model.bos_id is None else [model.bos_id], np.int32)
    width = KEY_TOKENS + VALUE_TOKENS
    drawn, at = [], []
    for length in lengths:
        hay_tokens = length - len(head) - 2 * width
        if hay_tokens > len(text):
            raise UserError(f"--text: a needle in {length} tokens needs a text of {hay_tokens} tokens, got {len(text)}")
        for index in range(count):
            rng = np.random.default_rng([seed, length, index])
            start = int(rng.integers(0, len(text) - hay_tokens + 1))
            hay = text[start : start + hay_tokens]
            fresh = rng.permutation(np.setdiff1d(ids, hay))[:width]
            if len(fresh) < width:
                raise UserError(f"--lengths: {length} tokens of the text leave less than {width} ids for a needle")
            for depth in depths:
                cut = round(depth * hay_tokens)
                tokens = np.concatenate([head, hay[:cut], fresh, hay[cut:], fresh]).astype(np.int32)
                answers = np.arange(length) >= length - VALUE_TOKENS
                drawn.append(recall.Episode("needle", tokens, answers))
                at.append(depth)
    settings = {
        "lengths_tokens": list(lengths),
        "depths_frac": list(depths),
        "items_each": count,
        "text_sha256": source.sha256,
    }
    return Planted("needle", source.name, settings, drawn, at, together=len(depths))


def grid(cells: dict[str, dict[str, float]], title: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of `acc_by_length_and_depth`, in per cent."""
    depths = list(dict.fromkeys(d for row in cells.values() for d in row))
    rows = [[length, *(f"{100 * row[d]:.1f} %" for d in depths)] for length, row in cells.items()]
    return [title, *(f"depth {d}" for d in depths)], rows


def check_lengths(lengths: Sequence[int], depths: Sequence[float], longest: int, model: str) -> None:
    """Raise UserError for lengths that the model's context `longest` or a task cannot hold, and depths outside 0..1."""
    for length in lengths:
        if not SHORTEST <= length <= longest:
            raise UserError(f"--lengths must be in {SHORTEST}..{longest}, the context of {model}, got {length}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise UserError(f"--depths must be in 0..1, got {depth:g}")
