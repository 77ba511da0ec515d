"""Generation: the loop over chunks of steps, and what it hands back.

The loop drives runs, one after the other: one `ResidentRun`, or the `PlacedRun`s of the groups that
a controller splits the batch into. A chunk runs without looking at text. A sequence that ends
inside it, by a stop token or a stop string, is cut behind it and marked done, so no result depends
on how many steps a chunk has; what a sequence that is done still computes is thrown away, and no
other sequence sees it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from alisa_jax.engine import finite, step, stops
from alisa_jax.engine.batch import Batch
from alisa_jax.engine.progress import progress_bar
from alisa_jax.engine.report import PlacementReport, report
from alisa_jax.engine.sampling import Draw

LISTENING_STEPS = 8  # of a chunk, while stop strings are searched for or text is shown


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What `Engine.generate` returns; one entry per prompt in every list."""

    tokens: list[list[int]]  # new tokens, up to and including the one that ended the sequence
    texts: list[str] | None  # of prompt and new tokens; None for a model without a tokenizer
    margins: list[np.ndarray]  # by how much each new token was chosen: see `sampling.next_token`
    compiles: int  # programs traced during the call
    wall_s: float  # all of the call
    completions: list[str] | None  # text of the new tokens, cut before the stop string; or None
    finish_reasons: list[str]  # "stop_token", "stop_string" or "length"
    logprobs: list[np.ndarray]  # nats, of each new token under the model's own distribution
    prefill_s: float  # until the first new tokens are known, compilation included
    decode_s: float  # from there to the last new token, compilation included
    placement: PlacementReport  # bytes held and moved

    @property
    def tokens_per_s(self) -> float:
        """New tokens over all of the time, prompts included."""
        return sum(map(len, self.tokens)) / (self.prefill_s + self.decode_s)


class Running:
    """One sequence as it is generated: its new tokens, and their text where it is needed."""

    def __init__(self, eos: frozenset[int], text: stops.Completion | None):
        self.eos, self.text = eos, text
        self.tokens = []
        self.margins = []
        self.logprobs = []
        self.reason = None

    def take(
        self, tokens: np.ndarray, margins: np.ndarray, logprobs: np.ndarray, room: int
    ) -> None:
        """Append the tokens [n] of a chunk until the sequence ends; `room`: most tokens in all."""
        for i, token in enumerate(tokens.tolist()):
            if self.reason is not None:
                return
            self.tokens.append(token)
            self.margins.append(margins[i])
            self.logprobs.append(logprobs[i])
            if self.text is not None and self.text.push(token):
                self.reason = "stop_string"
            elif token in self.eos:
                self.reason = "stop_token"
            elif len(self.tokens) == room:
                self.reason = "length"
            if self.text is not None and self.reason is not None:
                self.text.end()


def run(
    engine,
    batch: Batch,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    drawn: Draw | None,
    stop: tuple[str, ...],
    on_text: Callable[[int, str], None] | None,
    progress: bool,
) -> Generated:
    """Continue `batch`; arguments as of `Engine.generate`, checked.

    drawn: of all sequences, before the first new token; None: greedy.
    """
    start, compiles = time.perf_counter(), engine.compiles
    model = engine.model
    given = [row[:n].tolist() for row, n in zip(batch.tokens, batch.length, strict=True)]
    listening = bool(stop) or on_text is not None
    texts = [None] * len(given)
    if listening:
        bytes_run = stops.byte_runs(model.tokenizer)
        special = stops.special_in(model.tokenizer, stop)
        texts = [stops.Completion(model.decode, ids, stop, bytes_run, special) for ids in given]
    running = [Running(eos_ids, text) for text in texts]

    def took(first: int, columns) -> np.ndarray:
        """Append tokens, margins and log-probabilities [B, n] of the sequences from `first` on.

        Returns [B] bool: done.
        """
        mine = running[first : first + len(columns[0])]
        for i, sequence in enumerate(mine):
            made = len(sequence.tokens)
            sequence.take(*(c[i] for c in columns), max_new_tokens)
            finite.check([sequence.logprobs[made:]], model, finite.NEW, [made], first + i)
            if on_text is not None and (piece := sequence.text.show()):
                on_text(first + i, piece)
        return np.array([s.reason is not None for s in mine])

    eos = jnp.asarray(sorted(eos_ids) or [-1], jnp.int32)
    most = LISTENING_STEPS if listening else step.CHUNK_STEPS
    runs = engine.runs(batch, max_new_tokens, eos, drawn)
    prefill_s = time.perf_counter() - start  # prompts may have been filtered
    decode_s = 0.0
    with progress_bar(progress, max_new_tokens * len(runs), "generate") as shown:
        for run in runs:
            began = time.perf_counter()
            done = took(run.first, run.begin())
            shown.update(1)
            read = time.perf_counter()
            while not done.all():
                columns = run.step(done, most)
                done = took(run.first, columns)
                shown.update(columns[0].shape[1])
            run.end()
            prefill_s += read - began
            decode_s += time.perf_counter() - read
    whole, new = _texts(model, given, running) if model.tokenizer is not None else (None, None)
    return Generated(
        tokens=[s.tokens for s in running],
        texts=whole,
        margins=[np.array(s.margins, np.float32) for s in running],
        compiles=engine.compiles - compiles,
        wall_s=time.perf_counter() - start,
        completions=new,
        finish_reasons=[s.reason for s in running],
        logprobs=[np.array(s.logprobs, np.float32) for s in running],
        prefill_s=prefill_s,
        decode_s=decode_s,
        placement=report(runs),
    )


def _texts(model, given: list[list[int]], running: list[Running]) -> tuple[list[str], list[str]]:
    """Text of prompts with new tokens, and of new tokens alone; both end before the stop string."""
    whole, new = [], []
    for ids, s in zip(given, running, strict=True):
        text = model.decode(ids + s.tokens)
        after = stops.behind(model.decode(ids), text)
        new.append(after if s.text is None else s.text.end())
        whole.append(text[: len(text) - len(after) + len(new[-1])])
    return whole, new
