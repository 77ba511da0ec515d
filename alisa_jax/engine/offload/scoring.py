"""Scores under a placement: prompts are read densely, then given tokens are fed one by one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from alisa_jax.engine.batch import Batch
from alisa_jax.engine.feed import Found
from alisa_jax.engine.offload.tokens import Forced
from alisa_jax.engine.progress import progress_bar
from alisa_jax.engine.report import report


class Asked(NamedTuple):
    """What a placed run is given to score sequences."""

    heads: Batch  # the dense prompts
    forced: np.ndarray  # [B, new_tokens] int32: what follows them, 0 behind the end

    @property
    def new_tokens(self) -> int:
        return self.forced.shape[1]


def prompts_of(engine, batch: Batch, last: np.ndarray | None) -> Asked:
    """Prompts are all but the last `last` [B] tokens.

    None: the first token alone, or those that the codec calibrates on.
    """
    if last is None:
        last = batch.length - max(1, engine.codec.frozen_after)
    first = batch.length - np.asarray(last)
    rows = [row[:n] for row, n in zip(batch.tokens, first, strict=True)]
    at = first[:, None] + np.arange(int(np.max(last)))[None]
    padded = np.pad(batch.tokens, ((0, 0), (0, 1)))
    forced = np.take_along_axis(padded, np.minimum(at, batch.tokens.shape[1]), 1)
    return Asked(Batch.from_lists(rows), np.where(at < batch.length[:, None], forced, 0))


def score(engine, batch: Batch, last: np.ndarray | None, progress: bool) -> Found:
    """Log-probabilities and hits of the last `last` [B] tokens; None: of all but the first.

    The first new token of "prompt" is judged by the prompt, so its step is not counted. A text
    without a prompt counts all of its steps; the prompt's attend everything.
    """
    asked = prompts_of(engine, batch, last)
    L = len(engine.layers)
    n, first = asked.new_tokens, asked.heads.length
    valid = (np.arange(n)[None] < (batch.length - first)[:, None]) & (np.arange(n)[None] > 0)
    runs = engine.placement.split(
        asked.heads, n, lambda rows: Forced(asked.forced[rows], valid[rows], L)
    )
    rows = []
    content = other = 0
    with progress_bar(progress, n * len(runs), "score") as bar:
        for run in runs:
            columns = [run.begin_judged() if last is None else run.begin()]
            bar.update(1)
            while run.made < n:
                columns.append(run.step())
                bar.update(columns[-1][0].shape[1])
            held = run.kv.bytes
            run.end()
            content += held[0]
            other += held[1]
            rows.append([np.concatenate(x, axis=1) for x in zip(*columns, strict=True)])
    columns = [np.concatenate(x) for x in zip(*rows, strict=True)]
    dense = 0 if last is not None else int(first.sum())
    counted = int(valid.sum())
    return Found(
        logprobs=columns[0],
        correct=columns[1],
        attended=dense + sum(run.new.attended for run in runs),
        loads=np.full(L, np.nan),
        clipped=sum(run.new.clipped for run in runs),
        counted=counted + dense,
        coded=counted + (0 if engine.codec.frozen_after else dense),
        bytes=(content, other),
        placement=report(runs),
    )
