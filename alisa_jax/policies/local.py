"""`local(kv_sparsity= | tokens=)`: the most recent tokens, a sliding window.

The baseline "Local" of Figure 4 (arXiv 2403.17312; Longformer's pattern, arXiv 2004.05150). At
kv_sparsity 1 - r the query at position n attends the round(n r) tokens before it and itself, or the
last `tokens` and itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from alisa_jax.policies import base, budget


@dataclass(frozen=True)
class Local(base.Policy):
    """The most recent tokens; a token that leaves the window is evicted."""

    kv_sparsity: float | None = None
    tokens: int | None = None

    def __post_init__(self):
        budget.check(self.kv_sparsity, self.tokens)

    def kept(self, S: int) -> np.ndarray:
        """[S + 1] int32: tokens kept when n tokens are past."""
        amounts = budget.amounts(self.kv_sparsity, self.tokens, S)
        return budget.at_least_one(budget.round_half_up(amounts))

    def capacity(self, S: int) -> int:
        return int(self.kept(S).max()) + 1

    def _first(self, length, S: int):
        return base.column(length - budget.lookup(self.kept(S), length))

    def exchange(self, stats, pos, bias, length, S):
        return stats, base.evicted(pos, bias, (pos >= 0) & (pos < self._first(length, S)))

    def select(self, stats, length, S, q=None) -> jax.Array:
        p = base.positions(S)
        return (p >= self._first(length, S)) & (p < base.column(length))
