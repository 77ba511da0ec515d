"""`streaming(sinks=4, kv_sparsity= | tokens=)`: the first tokens and the most recent ones.

StreamingLLM (ICLR 2024, arXiv 2309.17453): softmax must put its mass somewhere, models learn to put it on the first tokens,
and a sliding window that lets these go breaks. So `sinks` tokens are never evicted, and the rest of the budget slides.
The budget counts both: with `tokens` the window has tokens - sinks, with kv_sparsity 1 - r the two together have
round(n r). The sinks are there from the beginning, and one recent token at least: while a share of a short context is less
than that, more than the share is kept.

Positions are true: a key keeps the rotation of the place where the token stood. The authors' code rotates by the place in
the cache instead, which lets a stream run beyond the longest position that a model knows; that needs keys that are stored
before their rotation.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.policies import base, budget


@dataclass(frozen=True)
class Streaming(base.Policy):
    """Attention sinks and a sliding window; what is in neither is evicted."""

    sinks: int = 4
    kv_sparsity: float | None = None
    tokens: int | None = None

    def __post_init__(self):
        budget.check(self.kv_sparsity, self.tokens)
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0; got {self.sinks}")
        if self.tokens is not None and self.tokens <= self.sinks:
            raise ValueError(f"tokens counts the sinks and must be more than sinks={self.sinks}; got {self.tokens}")

    def recent(self, S: int) -> np.ndarray:
        """[S + 1] int32: tokens of the sliding window when n tokens are past, the sinks not counted."""
        n = np.arange(S + 1)
        kept = budget.round_half_up(budget.amounts(self.kv_sparsity, self.tokens, S))
        return np.minimum(np.maximum(kept - self.sinks, 1), np.maximum(n - self.sinks, 0)).astype(np.int32)

    def capacity(self, S: int) -> int:
        return min(S, self.sinks + int(self.recent(S).max())) + 1

    def _first(self, length, S: int):
        """[B, 1, 1]: where the sliding window begins."""
        return base.column(length - budget.lookup(self.recent(S), length))

    def exchange(self, stats, pos, bias, length, S):
        return stats, base.evicted(pos, bias, (pos >= self.sinks) & (pos < self._first(length, S)))

    def select(self, stats, length, S, q=None) -> jax.Array:
        p = base.positions(S)
        return ((p < jnp.int32(self.sinks)) | (p >= self._first(length, S))) & (p < base.column(length))
