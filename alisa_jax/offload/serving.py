"""`Serving`: one face for an engine whose cache stays on the device and for a placed one.

Callers bring batches of token ids and need not know where the cache lives. Under a controller the
first tokens of a sequence to score are a dense prompt: one, or those that the codec calibrates on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alisa_jax.engine.engine import Engine
from alisa_jax.engine.sampling import Sampling
from alisa_jax.offload.engine import Placed


class Serving:
    """Scores and continues batches with `engine`, or with `placed` where that is given.

    protocol: of scores, as of `Engine.score`; under a controller tokens are always decoded.
    """

    def __init__(self, engine: Engine, placed: Placed | None = None, protocol: str = "decode"):
        self.engine = engine
        self.placed = placed
        self.protocol = protocol
        # tokens of the prompt of a sequence scored under a controller
        self.first = max(1, engine.codec.frozen_after)
        self.ran: dict[str, str] = {}  # what ran, and why it was that

    def check_scores(self, sequences: Sequence[list[int]], last: Sequence[int]) -> None:
        """Raise ValueError where `score` would, before anything runs."""
        whole = self.placed is None and self.protocol != "prompt"
        before = [len(ids) - (1 if whole else n) for ids, n in zip(sequences, last, strict=True)]
        self.engine.check_calibration(np.array(before))
        if self.placed is not None:
            self.placed.check([self.first] * len(before), max(map(len, sequences)) - self.first)

    def score(
        self, sequences: Sequence[list[int]], last: Sequence[int]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Log-probabilities, and greedy hits, of the last `last[i]` tokens of each sequence i."""
        if self.placed is None:
            scores = self.engine.score(sequences, self.protocol, last=last)
            self.ran[scores.implementation] = scores.implementation_reason
            return list(zip(scores.logprobs, scores.correct, strict=True))
        self.ran[self.engine.implementation] = self.engine.implementation_reason
        longest = max(map(len, sequences))  # padding comes after all that is read
        run = self.placed.score(
            [[*ids, *ids[-1:] * (longest - len(ids))] for ids in sequences], self.first
        )
        ends = [len(ids) - self.first for ids in sequences]
        spans = [slice(end - n, end) for end, n in zip(ends, last, strict=True)]
        return [
            (row[span], lead[span] >= 0)
            for row, lead, span in zip(run.logprobs, run.margins, spans, strict=True)
        ]

    def check_prompts(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        """Raise ValueError where `generate` would, before anything runs."""
        self.engine.check_calibration(np.array([len(ids) for ids in prompts]))
        if self.placed is not None:
            self.placed.check([len(ids) for ids in prompts], new_tokens)

    def generate(
        self,
        prompts: Sequence[list[int]],
        new_tokens: int,
        sampling: Sampling,
        key=None,
        stop: Sequence[str] = (),
    ) -> list[list[int]]:
        """New tokens of each prompt, before its first EOS; arguments as of `Engine.generate`.

        Under a controller tokens are greedy, and `sampling`, `key` and `stop` are ignored.
        """
        eos = self.engine.model.eos_ids
        self.ran[self.engine.implementation] = self.engine.implementation_reason
        if self.placed is None:
            made = self.engine.generate(
                prompts, new_tokens, eos, sampling=sampling, key=key, stop=stop
            )
        else:
            made = self.placed.generate(prompts, new_tokens)
        ends = [
            next((j for j, token in enumerate(row) if token in eos), len(row))
            for row in made.tokens
        ]
        return [row[:end] for row, end in zip(made.tokens, ends, strict=True)]
