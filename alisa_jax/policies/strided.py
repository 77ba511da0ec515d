"""`strided(kv_sparsity=, anchor="position" | "query")`: evenly spaced tokens.

The baseline "Strided" of Figure 4 (arXiv 2403.17312; Sparse Transformer's pattern, arXiv
1904.10509): one token in every 1/r. For any r the kept indices are those where floor(i r) steps up:
exactly evenly spaced where 1/r is whole.

    anchor="position"   i = position + 1: a token is kept for good or dropped after its own step
    anchor="query"      i = distance to the query: the whole comb moves with the query, so the
                        selection turns over entirely at every step, and only the routes that read
                        by index or by mask serve it
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.policies import base, budget


@dataclass(frozen=True)
class Strided(base.Policy):
    """One past token in every 1/r; the current token is always attended."""

    kv_sparsity: float = 0.0
    anchor: str = "position"

    def __post_init__(self):
        budget.check(self.kv_sparsity, None)
        if self.anchor not in ("position", "query"):
            raise ValueError(f'anchor must be "position" or "query"; got {self.anchor!r}')

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        return self.anchor == "position"

    @property
    def routes(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.anchor == "query":
            return ("indexed", "masked")
        return ("working_set", "indexed", "masked")

    def _comb(self, S: int) -> np.ndarray:
        """[S + 1] bool: which i in 0 .. S are kept (i = 0 never is)."""
        steps = np.floor(np.arange(S + 1) * budget.kept_frac(self.kv_sparsity) + 1e-9)
        return np.diff(steps, prepend=0.0) > 0

    def capacity(self, S: int) -> int:
        return int(self._comb(S).sum()) + 1

    def exchange(self, stats, pos, bias, length, S):
        kept = jnp.asarray(self._comb(S))[jnp.clip(pos, 0, S - 1) + 1]
        return stats, base.evicted(pos, bias, (pos >= 0) & ~kept)

    def select(self, stats, length, S, q=None) -> jax.Array:
        p, n = base.positions(S), base.column(length)
        comb = jnp.asarray(self._comb(S))
        if self.anchor == "position":
            return comb[1:][None, None] & (p < n)
        return comb[jnp.clip(n - p, 0, S)] & (p < n)
