"""`h2o(kv_sparsity= | heavy=, recent=, normalise="none" | "age")`: heavy hitters and the most recent tokens, per kv head.

H2O (NeurIPS 2023, arXiv 2306.14048). A token's score is the attention that it has received since it came, summed over
queries and over the query heads of its kv head; for a prompt, over all of its queries. Each kv head keeps the last `recent`
tokens and, of those before, the `heavy` ones with the highest scores. What is evicted is gone: its slot is used again, and
no later attention can bring it back. One token comes in a step, so one goes at most: an argmin, and no sort.

Of the variants in the authors' repository this is the causal one that really drops tokens (their streaming code), with true
positions; the one behind their accuracy tables sums the whole matrix, future rows included. With kv_sparsity 1 - r the
budget round(n r) is split evenly as there, the odd token recent, and grows with the context. Sum and mean over the heads of
a group rank alike. `normalise="age"` divides a score by the steps it has had, which a plain sum rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.policies import base, budget, swap


@dataclass(frozen=True)
class H2O(base.Policy):
    """Scores are kept per slot, [B, K, M] float32; ties keep the earlier token."""

    kv_sparsity: float | None = None
    heavy: int | None = None
    recent: int | None = None
    normalise: str = "none"

    seed_kind: ClassVar[str] = "sum"
    routes: ClassVar[tuple[str, ...]] = ("working_set", "masked")  # what goes depends on all that went before

    def __post_init__(self):
        counts = self.heavy, self.recent
        if (self.kv_sparsity is None) == (counts == (None, None)) or (None in counts and counts != (None, None)):
            raise ValueError(
                f"give either kv_sparsity, or heavy and recent; got kv_sparsity={self.kv_sparsity}, heavy={self.heavy} and "
                f"recent={self.recent}"
            )
        if self.kv_sparsity is not None:
            budget.check(self.kv_sparsity, None)
        elif min(counts) < 0 or sum(counts) < 1:
            raise ValueError(
                f"heavy and recent are at least 0 and one of them more; got heavy={self.heavy} and recent={self.recent}"
            )
        if self.normalise not in ("none", "age"):
            raise ValueError(f'normalise must be "none" or "age"; got {self.normalise!r}')

    def counts(self, S: int) -> tuple[np.ndarray, np.ndarray]:
        """([S + 1], [S + 1]) int32: heavy and recent tokens when n tokens are past."""
        n = np.arange(S + 1)
        if self.kv_sparsity is None:
            recent = np.minimum(n, self.recent)
            return np.minimum(n - recent, self.heavy).astype(np.int32), recent.astype(np.int32)
        kept = budget.at_least_one(budget.round_half_up(budget.amounts(self.kv_sparsity, None, S)))
        return kept // 2, kept - kept // 2

    def selection_heads(self, K: int) -> int:
        return K

    def capacity(self, S: int) -> int:
        return int(sum(self.counts(S)).max()) + 1

    def init(self, dims):
        return jnp.zeros((dims.B, dims.K, dims.M), jnp.float32)

    def grow(self, stats, S, M):
        return jnp.pad(stats, ((0, 0), (0, 0), (0, M - stats.shape[-1])))

    def seed(self, stats, rows, length, dims):
        heavy, first = self._borders(length, dims.S)
        p, n = base.positions(dims.S), base.column(length)
        rows = jnp.where(jnp.isnan(rows), jnp.float32(0.0), rows)
        old = jnp.where(p < first, self._rank(rows, p, n), -jnp.inf)
        pos = base.settle(swap.top_mask(old, heavy) | ((p >= first) & (p < n)), dims.M)
        return jnp.where(pos >= 0, swap.take(rows, jnp.maximum(pos, 0)), jnp.float32(0.0)), pos

    def observe(self, stats, mass, pos, slot, length, dense=None):
        new = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2) == slot[:, :, None]
        return jnp.where(new, jnp.float32(0.0), stats) + jnp.where(jnp.isnan(mass), jnp.float32(0.0), mass)

    def exchange(self, stats, pos, bias, length, S):
        heavy, first = self._borders(length, S)
        old = (pos >= 0) & (pos < first)
        score = jnp.where(old, -self._rank(stats, pos, base.column(length)), -jnp.inf)
        _, last, _ = swap.best(score, S - pos, 2 * S)  # of equal scores the latest goes
        crowded = jnp.sum(old, axis=-1, keepdims=True, dtype=jnp.int32) > heavy
        return stats, base.evicted(pos, bias, crowded & old & (S - pos == last[..., None]))

    def _borders(self, length, S: int):
        """[B, 1, 1] each: the number of heavy hitters, and where the recent tokens begin."""
        heavy, recent = (base.column(budget.lookup(table, length)) for table in self.counts(S))
        return heavy, base.column(length) - recent

    def _rank(self, score, pos, length):
        """What tokens `pos` are compared by before the query at `length`."""
        if self.normalise == "none":
            return score
        return score / jnp.maximum(length - pos, 1).astype(jnp.float32)
