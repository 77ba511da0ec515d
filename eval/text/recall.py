"""Recall accuracy: is the token that an earlier part of the sequence decides the model's first choice?

Episodes come from `eval/text/episodes.py`: copies of an earlier segment, and lookups of values under keys. The
accuracy of a set of episodes is right answers over answer tokens, its standard error is taken over episodes.
A policy that no longer attends to the earlier part cannot know the answer; the model's own limit is its
accuracy under `dense`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.script import common
from eval.text import episodes


@dataclass(frozen=True, eq=False)
class Episode:
    """`answers[t]` is true where token t is decided by an earlier part of the episode."""

    kind: str
    tokens: np.ndarray  # [length] int32
    answers: np.ndarray  # [length] bool


def draw(model, kinds: Sequence[str], lengths: Sequence[int], count: int, seed: int) -> list[Episode]:
    """`count` episodes of every kind and length; they hold no special tokens but BOS; the same for a seed."""
    special = {model.bos_id, *model.eos_ids, *model.tokenizer.get_added_tokens_decoder()}
    ids = [i for i in range(model.decoder.config.vocab_size) if i not in special]
    drawn = []
    for kind_at, kind in enumerate(kinds):
        for length in lengths:
            for index in range(count):
                rng = np.random.default_rng([seed, kind_at, length, index])
                pair = episodes.recall_episode(rng, ids, length, kind, bos_id=model.bos_id)
                drawn.append(Episode(kind, *pair))
    return drawn


def per_episode(drawn: Sequence[Episode], correct: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Right answers and answers of each episode.

    `correct[i]` [length - 1] bool: whether token t + 1 of episode i was the first choice after tokens 0 .. t.
    """
    right = [int(np.asarray(row)[e.answers[1:]].sum()) for e, row in zip(drawn, correct, strict=True)]
    return right, [int(e.answers[1:].sum()) for e in drawn]


def accuracies(drawn: Sequence[Episode], correct: Sequence[np.ndarray]) -> dict:
    """Accuracy over all episodes, of each kind, and of each kind and length; `correct` as in `per_episode`."""
    right, answers = per_episode(drawn, correct)

    def over(which: Sequence[int]) -> tuple[float, int, float | None]:
        hits, n = [right[i] for i in which], [answers[i] for i in which]
        return math.fsum(hits) / sum(n), sum(n), common.ratio_stderr(hits, n)

    accuracy, n, stderr = over(range(len(drawn)))
    values = {"recall_accuracy_frac": accuracy, "recall_n": n, "recall_accuracy_frac_stderr": stderr}
    values["recall_episodes"] = len(drawn)
    for kind in dict.fromkeys(e.kind for e in drawn):
        mine = [i for i, e in enumerate(drawn) if e.kind == kind]
        values[f"recall_{kind}_accuracy_frac"], values[f"recall_{kind}_n"], error = over(mine)
        values[f"recall_{kind}_accuracy_frac_stderr"] = error
        lengths = dict.fromkeys(len(drawn[i].tokens) for i in mine)
        values[f"recall_{kind}_accuracy_frac_by_length"] = {
            str(length): over([i for i in mine if len(drawn[i].tokens) == length])[0] for length in lengths
        }
    return values
