"""`h2o(kv_sparsity= | heavy=, recent=, gqa="sum", normalise="none")`: heavy hitters by kv head.

H2O (NeurIPS 2023, arXiv 2306.14048). A token's score is the attention that it has received since it
came, summed over queries and over the query heads of its kv head; for a prompt, over all of its
queries. Each kv head keeps the last `recent` tokens and, of those before, the `heavy` ones with the
highest scores. An evicted token is gone: its slot is used again, and no later attention can bring
it back. One token comes in a step, so at most one goes: an argmin, and no sort.

Of the variants in the authors' repository this is the causal one that really drops tokens
(their streaming code), with true positions; the one behind their accuracy tables sums the whole
matrix, future rows included. The one in their FlexGen has room for n heavy tokens and n recent
ones, the query's own counted, and puts the oldest recent token into the place of the worst heavy
one without comparing the two: that is h2o(heavy=n-1, recent=n). With kv_sparsity 1 - r the budget
round(n r) is split evenly as there, the odd token recent, and grows with the context.
`normalise="age"` divides a score by the steps it has had, which a plain sum rewards.

The paper's models have a kv head for every query head. Where G of them share one, `gqa` combines
the attention that a token got from them:

    "sum"     their sum
    "mean"    ranks like "sum", and runs the same
    "max"     each query head keeps its own account from the token's first step to its last, and the
              largest of the G accounts counts. A token that one head lives on then outranks one
              that all heads look at in passing; scores take G times the memory
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
    """Scores per slot, [B, K, M] float32, [B, N, M] if gqa="max"; ties keep the earlier token."""

    kv_sparsity: float | None = None
    heavy: int | None = None
    recent: int | None = None
    gqa: str = "sum"
    normalise: str = "none"

    seed_kind: ClassVar[str] = "sum"
    # an eviction depends on all earlier ones
    routes: ClassVar[tuple[str, ...]] = ("working_set", "masked")

    def __post_init__(self):
        counts = self.heavy, self.recent
        if (self.kv_sparsity is None) == (counts == (None, None)) or (
            None in counts and counts != (None, None)
        ):
            raise ValueError(
                "give either kv_sparsity, or heavy and recent; got "
                f"kv_sparsity={self.kv_sparsity}, heavy={self.heavy} and "
                f"recent={self.recent}"
            )
        if self.kv_sparsity is not None:
            budget.check(self.kv_sparsity, None)
        elif min(counts) < 0 or sum(counts) < 1:
            raise ValueError(
                f"heavy and recent are at least 0 and one of them more; got heavy={self.heavy} "
                f"and recent={self.recent}"
            )
        if self.gqa not in ("sum", "mean", "max"):
            raise ValueError(f'gqa must be "sum", "mean" or "max"; got {self.gqa!r}')
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

    def mass_heads(self, N: int, K: int) -> int:
        return N if self.gqa == "max" else K

    def capacity(self, S: int) -> int:
        return int(sum(self.counts(S)).max()) + 1

    def init(self, dims):
        return jnp.zeros((dims.B, self.mass_heads(dims.N, dims.K), dims.M), jnp.float32)

    def grow(self, stats, S, M):
        return jnp.pad(stats, ((0, 0), (0, 0), (0, M - stats.shape[-1])))

    def seed(self, stats, rows, length, dims):
        heavy, first = self._borders(length, dims.S)
        p, n = base.positions(dims.S), base.column(length)
        rows = jnp.where(jnp.isnan(rows), jnp.float32(0.0), rows)
        old = jnp.where(p < first, self._rank(rows, p, n, dims.K), -jnp.inf)
        pos = base.slots_of(swap.top_mask(old, heavy) | ((p >= first) & (p < n)), dims.M)
        at = _for_each(pos, rows.shape[1])
        return jnp.where(at >= 0, swap.take(rows, jnp.maximum(at, 0)), jnp.float32(0.0)), pos

    def observe(self, stats, mass, pos, slot, length, dense=None):
        at = jax.lax.broadcasted_iota(jnp.int32, mass.shape, 2)
        new = at == _for_each(slot[:, :, None], mass.shape[1])
        old = jnp.where(new, jnp.float32(0.0), stats)
        return old + jnp.where(jnp.isnan(mass), jnp.float32(0.0), mass)

    def exchange(self, stats, pos, bias, length, S):
        heavy, first = self._borders(length, S)
        old = (pos >= 0) & (pos < first)
        score = jnp.where(old, -self._rank(stats, pos, base.column(length), pos.shape[1]), -jnp.inf)
        _, last, _ = swap.best(score, S - pos, 2 * S)  # ties evict the latest
        crowded = jnp.sum(old, axis=-1, keepdims=True, dtype=jnp.int32) > heavy
        return stats, base.evicted(pos, bias, crowded & old & (S - pos == last[..., None]))

    def _borders(self, length, S: int):
        """[B, 1, 1] each: the number of heavy hitters, and where the recent tokens begin."""
        heavy_counts, recent_counts = self.counts(S)
        heavy = base.column(budget.lookup(heavy_counts, length))
        recent = base.column(budget.lookup(recent_counts, length))
        return heavy, base.column(length) - recent

    def _rank(self, score, pos, length, K: int):
        """[B, K, X]: the ranking scores of tokens `pos` [B, K or 1, X] for the query at `length`.

        score [B, mass_heads, X]: the accounts of the tokens; length [B, 1, 1].
        """
        B, heads, X = score.shape
        score = score if heads == K else jnp.max(score.reshape(B, K, heads // K, X), axis=2)
        if self.normalise == "none":
            return score
        return score / jnp.maximum(length - pos, 1).astype(jnp.float32)


def _for_each(x, heads: int):
    """x [B, K, X] of each kv head, repeated for each of its accounts: [B, heads, X]."""
    return jnp.repeat(x, heads // x.shape[1], axis=1)
