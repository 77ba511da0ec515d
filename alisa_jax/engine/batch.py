"""Ragged batches: sequences of different lengths, aligned at position 0 and padded behind.

Position p of a sequence is its p-th token, whatever its neighbours are, so a batch gives what its
sequences give one by one. Padding is never attended and never counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """B sequences: `tokens` [B, T] int32, 0 behind `length` [B] int32, where 1 <= length <= T."""

    tokens: np.ndarray
    length: np.ndarray

    @staticmethod
    def from_lists(sequences: Sequence[Sequence[int]]) -> Batch:
        """A batch of lists of token ids.

        Raises ValueError for no sequence, an empty one, or one that is not a list of ids.
        """
        rows = [np.asarray(s) for s in sequences]
        if not rows:
            raise ValueError("a batch needs at least one sequence; got none")
        for i, row in enumerate(rows):
            if row.shape == (0,):
                raise ValueError(f"every sequence needs at least one token; number {i} has none")
            if row.ndim != 1 or row.dtype.kind not in "iu":
                raise ValueError(
                    f"a sequence is a list of token ids (whole numbers); number {i} is "
                    f"{sequences[i]!r:.60}"
                )
            wrong = row[(row < 0) | (row >= 2**31)]
            if wrong.size:
                raise ValueError(f"token ids must be in [0, 2**31); number {i} has {wrong[0]}")
        length = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), int(length.max())), np.int32)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        return Batch(tokens, length)

    @staticmethod
    def from_padded(tokens: np.ndarray, mask: np.ndarray) -> Batch:
        """A batch from `tokens` [B, T] whose padding, left or right, is where `mask` [B, T] is 0.

        Raises ValueError where the shapes differ or a row's tokens are not in one piece.
        """
        tokens, mask = np.asarray(tokens), np.asarray(mask).astype(bool)
        if tokens.ndim != 2 or tokens.shape != mask.shape:
            raise ValueError(
                f"tokens and mask must have one shape [B, T]; got {tokens.shape} and {mask.shape}"
            )
        pieces = (np.diff(mask.astype(np.int8), axis=1, prepend=0) == 1).sum(axis=1)
        if (pieces > 1).any():
            raise ValueError(
                f"padding must be at one side; row {int((pieces > 1).argmax())} has gaps"
            )
        return Batch.from_lists(
            [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
        )

    def padded(self, T: int) -> np.ndarray:
        """`tokens` with T columns in all."""
        return np.pad(self.tokens, ((0, 0), (0, T - self.tokens.shape[1])))
