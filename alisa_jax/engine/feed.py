"""Teacher-forced decoding: given tokens are fed one by one, and each next token is judged."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.engine import step
from alisa_jax.engine.report import PlacementReport
from alisa_jax.kv.cache import KVState


class Found(NamedTuple):
    """What a protocol of scoring measured."""

    logprobs: np.ndarray  # [B, n] float32
    correct: np.ndarray  # [B, n] bool
    attended: np.ndarray  # [L], sums over `counted` tokens
    loads: np.ndarray  # [L]
    clipped: np.ndarray  # [L], sum over `coded` tokens
    counted: int  # tokens that were decoded
    coded: int  # of these, tokens that were encoded
    bytes: tuple[float, float]  # of K and V on the device, and of all else
    placement: PlacementReport | None = None


class Feed:
    """Steps over tokens, targets and `valid` (what is counted), all [B, T]; keeps the results."""

    def __init__(self, engine, tokens, targets, valid):
        self.engine = engine
        self.out: list[tuple[int, step.Scored]] = []
        self.padded = [
            jnp.asarray(np.pad(x, ((0, 0), (0, step.CHUNK_STEPS))))
            for x in (tokens, targets, valid)
        ]

    def __call__(self, kv: KVState, first: int, end: int, bar) -> KVState:
        """The states after the tokens `first` .. `end` - 1."""
        params = self.engine.model.params
        for at in range(first, end, step.CHUNK_STEPS):
            n = min(step.CHUNK_STEPS, end - at)
            piece = [x[:, at : at + step.CHUNK_STEPS] for x in self.padded]
            out, kv = self.engine.programs.score(params, kv, *piece, jnp.int32(n))
            self.out.append((n, jax.tree.map(np.asarray, out)))
            bar.update(n)
        return kv

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities and hits [B, T] of all steps so far."""
        return self._joined("logprobs"), self._joined("correct")

    def sums(self) -> tuple[np.ndarray, ...]:
        """Attended shares, loads and clipped elements [L] of all steps so far."""
        return tuple(
            sum(getattr(o, f).astype(np.float64) for _, o in self.out)
            for f in ("attended", "loads", "clipped")
        )

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(o, name)[:, :n] for n, o in self.out], 1)
