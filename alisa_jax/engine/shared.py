"""Sequences that begin alike, such as the choices of a multiple-choice item: what they share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alisa_jax.engine.batch import Batch


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
