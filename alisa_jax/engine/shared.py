"""Scoring the last tokens of sequences that begin alike: what they share is decoded once.

The choices of a multiple-choice item are sequences with a common context. Their contexts are
decoded as a batch of their own, ragged like any other; at the step where a context ends, its state
is adopted by every sequence that goes on from it, and then all sequences decode their last tokens
together. The numbers are those of the sequences scored one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.engine import step
from alisa_jax.engine.batch import Batch
from alisa_jax.engine.progress import progress_bar
from alisa_jax.kv.buckets import bucket


def check(batch: Batch, last: Sequence[int]) -> np.ndarray:
    """`last` as an array [B]. Raises ValueError unless every entry is in 1 .. length - 1."""
    found = np.asarray(last)
    if found.shape != batch.length.shape or found.dtype.kind not in "iu":
        raise ValueError(
            f"last must be a whole number for each of the {len(batch.length)} sequences; got "
            f"{last!r:.60}"
        )
    wrong = (found < 1) | (found >= batch.length)
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"last must be in 1..{batch.length[i] - 1} for sequence {i}; got {found[i]}"
        )
    return found


def contexts(batch: Batch, last: np.ndarray, least: int) -> tuple[Batch, np.ndarray] | None:
    """The distinct contexts, and which of them [B] each sequence continues; None if none is shared.

    A sequence decodes all its tokens but the last one. Its context is the length - last - 1 tokens
    before the ones that are wanted. least: tokens that every context needs, those that the codec
    keeps raw.
    """
    heads = [
        tuple(row[: n - k - 1].tolist())
        for row, n, k in zip(batch.tokens, batch.length, last, strict=True)
    ]
    if len(set(heads)) == len(heads) or min(map(len, heads)) < max(1, least):
        return None
    return distinct(heads)


def distinct(heads: Sequence[tuple[int, ...]]) -> tuple[Batch, np.ndarray]:
    """Each of `heads` once, as a batch, and the index [B] of every one in it."""
    number = {head: i for i, head in enumerate(dict.fromkeys(heads))}
    return Batch.from_lists(number), np.array([number[head] for head in heads], np.int32)


def score(engine, batch: Batch, last: np.ndarray, common: Batch, of: np.ndarray, progress: bool):
    """Decode `common`, then the last tokens of `batch`; sequence i continues sequence of[i].

    Returns log-probabilities and hits [B, max(last)] of the last tokens, and three sums [L] over
    the tokens that were decoded (see `step.Scored`).
    """
    S, raw_tokens = bucket(batch.tokens.shape[1]), engine.codec.frozen_after
    decoded = common.length
    ends = sorted(set(decoded.tolist()))
    valid = np.arange(common.tokens.shape[1])[None] < decoded[:, None]
    feed = Feed(engine, common.tokens, np.zeros_like(common.tokens), valid)
    kv = engine.init(len(decoded), raw_tokens or S)
    new = engine.init(len(of), raw_tokens or S)
    with progress_bar(progress, int(ends[-1] + last.max()), "score") as bar:
        if raw_tokens:
            kv = feed(kv, 0, raw_tokens, bar)
            kv = tuple(engine._freeze(state, S) for state in kv)
            new = tuple(engine._freeze(state, S) for state in new)
        for first, end in itertools.pairwise([raw_tokens, *ends]):
            kv = feed(kv, first, end, bar)
            new = engine._adopt(new, kv, jnp.asarray(of), jnp.asarray(decoded[of] == end))
        del kv
        rows = np.arange(last.max())[None]
        at = np.minimum((batch.length - last - 1)[:, None] + rows, batch.tokens.shape[1] - 1)
        padded = np.pad(batch.tokens, ((0, 0), (0, 1)))
        tokens = np.take_along_axis(padded, at, 1)
        targets = np.take_along_axis(padded, at + 1, 1)
        end = Feed(engine, tokens, targets, rows < last[:, None])
        end(new, 0, int(last.max()), bar)
    sums = [a + b for a, b in zip(feed.sums(), end.sums(), strict=True)]
    return *end.rows(), *sums


class Feed:
    """Teacher-forced steps over tokens, targets and `valid` (what is counted), all [B, T].

    `out` collects the results.
    """

    def __init__(self, engine, tokens, targets, valid):
        self.engine, self.out = engine, []
        self.padded = [
            jnp.asarray(np.pad(x, ((0, 0), (0, step.CHUNK_STEPS))))
            for x in (tokens, targets, valid)
        ]

    def __call__(self, kv, first: int, end: int, bar):
        """The states after the tokens `first` .. `end` - 1."""
        for at in range(first, end, step.CHUNK_STEPS):
            n = min(step.CHUNK_STEPS, end - at)
            piece = [x[:, at : at + step.CHUNK_STEPS] for x in self.padded]
            out, kv = self.engine._score(self.engine.model.params, kv, *piece, jnp.int32(n))
            self.out.append((n, jax.tree.map(np.asarray, out)))
            bar.update(n)
        return kv

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities and hits [B, T] of all steps so far."""
        return tuple(
            np.concatenate([getattr(o, f)[:, :n] for n, o in self.out], 1)
            for f in ("logprobs", "correct")
        )

    def sums(self) -> tuple[np.ndarray, ...]:
        """Attended shares, loads and clipped elements [L] of all steps so far."""
        return tuple(
            sum(getattr(o, f).astype(np.float64) for _, o in self.out)
            for f in ("attended", "loads", "clipped")
        )
