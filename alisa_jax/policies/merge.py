"""`merge(threshold=0.75, share=, ...)`: neighbours in a prompt with similar keys become one token.

KVMerger (arXiv 2407.08454), per kv head. After a dense prompt the most recent tokens, and of the
others those that drew the most attention, stay as they are. The rest is scanned from the last token
to the first: token i joins the set of token i + 1 if the cosine of their rotated keys exceeds
`threshold`, else it opens a set. The pivot p of a set is the member with the largest column sum of
attention. With g_i = exp(-|k_p - k_i|^2 / (2 sigma^2)) and w = g / sum g, a set S becomes one token
at the position of p:

    k*   = sum_i w_i k_i
    v*   = sum_i w_i v_i
    bias = log |S|, added to its logit

Later tokens are appended unchanged. Without a prompt nothing merges: this is dense attention.

The paper leaves two things that do not hold together, and both readings can be run. It prints sigma
= sum g / (sqrt 2 |S|), through g itself and never above 0.707, while its ablation names 5 as best.
`sigma` is one of

    a number       used directly
    "literal"      iterates the printed formula, and nearly evicts once keys are 1 apart
    "mean_dist"    the mean of |k_p - k_i| over sqrt 2, which it may have meant (over all |S|
                   members, p included)

And its v* is |S| sum w_i v_i with no |S| in the denominator of the softmax (`value_mode="paper"`),
which is wrong even if the merged keys are equal; the bias above ("mean+logn") is then exact. "mean"
has neither.

Readings of ours: `recent` and `heavy` are shares of the prompt's length, halves up, and heavy
tokens are not recent ones (0.17 and 0.12 are the paper's for half a cache, 0.08 and 0.02 for 35 %).
With a fixed threshold the keys decide how many tokens remain; `share` is a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.policies import base, budget, merging, swap
from alisa_jax.policies.dense import Dense

_THRESHOLD = 0.75


@dataclass(frozen=True)
class Merge(base.Policy):
    """Stateless after the prompt. Without `share` the keys decide how many tokens remain.

    share: at most round(n share) of n prompt tokens remain, at least one. `threshold` is then
    searched for each sequence and head: the highest of 20 bisections that meets the share, so fewer
    tokens remain if equal cosines join together. And fewer tokens are protected, first of the heavy
    ones, if a set between any two of them would be too many. dense_layers: the first layers, which
    do not merge; their attention is flatter.
    """

    threshold: float = _THRESHOLD
    recent: float = 0.17
    heavy: float = 0.12
    sigma: float | str = 5.0
    value_mode: str = "mean+logn"
    share: float | None = None
    dense_layers: int = 0

    seed_kind: ClassVar[str] = "sum"
    routes: ClassVar[tuple[str, ...]] = ("working_set", "masked")  # the prompt's own rows are gone
    appends: ClassVar[bool] = True
    compacts: ClassVar[bool] = True

    def __post_init__(self):
        if not -np.inf < self.threshold < np.inf:
            raise ValueError(
                f"threshold must be a finite number, 1 to merge nothing; got {self.threshold}"
            )
        if min(self.recent, self.heavy) < 0 or not self.recent + self.heavy <= 1:
            raise ValueError(
                "recent and heavy are shares of the prompt, at least 0 and at most 1 together; "
                f"got recent={self.recent} and heavy={self.heavy}"
            )
        width = (
            self.sigma in ("mean_dist", "literal")
            if isinstance(self.sigma, str)
            else 0 < self.sigma < np.inf
        )
        if not width:
            raise ValueError(
                f'sigma must be a number above 0, "mean_dist" or "literal"; got {self.sigma!r}'
            )
        if self.value_mode not in ("mean+logn", "mean", "paper"):
            raise ValueError(
                f'value_mode must be "mean+logn", "mean" or "paper"; got {self.value_mode!r}'
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1; got {self.share}")
        if self.share is not None and self.threshold != _THRESHOLD:
            raise ValueError(
                f"give either threshold or share; got threshold={self.threshold} and "
                f"share={self.share}"
            )
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers must be at least 0; got {self.dense_layers}")

    def counts(self, S: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[S + 1] int32 each: recent, heavy and at most remaining tokens of n prompt tokens."""
        n = np.arange(S + 1, dtype=np.int32)
        recent = np.minimum(budget.round_half_up(n * self.recent).astype(np.int32), n)
        heavy = budget.round_half_up(n * self.heavy).astype(np.int32)
        allowed = n
        if self.share is not None:
            allowed = budget.at_least_one(budget.round_half_up(n * self.share))
            recent = np.minimum(recent, np.maximum(allowed - 1, 0))
            # heavy + 1 sets lie around them
            heavy = np.minimum(heavy, np.maximum(allowed - recent - 1, 0) // 2)
        return recent, np.minimum(heavy, n - recent), allowed

    def for_layer(self, layer: int) -> base.Policy:
        return Dense() if layer < self.dense_layers else self

    def selection_heads(self, K: int) -> int:
        return K

    def capacity(self, S: int) -> int:
        return S

    @classmethod
    def sized(cls, kept: int, tokens: int) -> Merge:
        return cls(share=round(kept / tokens, 6))

    def prompt_capacity(self, S: int) -> int:
        return int(self.counts(S)[2].max())

    def seed(self, stats, rows, length, dims):
        pos = base.slots_of(base.positions(dims.S) < base.column(length), dims.M)
        return stats, jnp.broadcast_to(pos, (dims.B, dims.K, dims.M))

    def exchange(self, stats, pos, bias, length, S):
        return stats, base.evicted(pos, bias, jnp.zeros(pos.shape, jnp.bool_))

    def sets(self, k: jax.Array, mass: jax.Array, length: jax.Array) -> jax.Array:
        """`merging` ids [B, K, T] of the sets of a prompt.

        k [B, K, T, H], mass [B, K, T], length [B].
        """
        T = k.shape[2]
        recent_counts, heavy_counts, allowed_counts = self.counts(T)
        recent = base.column(budget.lookup(recent_counts, length))
        heavy = base.column(budget.lookup(heavy_counts, length))
        allowed = base.column(budget.lookup(allowed_counts, length))
        n, p = base.column(length), base.positions(T)
        old = p < n - recent
        free = old & ~swap.top_mask(jnp.where(old, mass, -jnp.inf), heavy)
        cos, may = merging.cosines(k), merging.pairs(free)
        threshold = self.threshold if self.share is None else merging.fitted(cos, may, n, allowed)
        return merging.numbered(may & (cos > threshold))

    def compact(self, k, v, rows, length, dims) -> base.Compacted:
        T, M = k.shape[1], dims.M
        k = jnp.swapaxes(k, 1, 2)  # [B, K, T, H]
        v = jnp.swapaxes(v, 1, 2)
        mass = rows[..., :T]
        ids = self.sets(k, mass, length)
        pivot = merging.pivots(mass, ids)
        w = merging.weights(k, pivot, ids, self.sigma)[..., None]
        slot = pivot if M == dims.S else ids  # both ascend
        slot = jnp.where(base.positions(T) < base.column(length), slot, M)
        count = merging.over(jax.ops.segment_sum, jnp.ones(w.shape[:3], jnp.float32), slot, M)
        pos = merging.over(jax.ops.segment_max, pivot, slot, M)

        def merged(x):
            return merging.over(jax.ops.segment_sum, w * x.astype(jnp.float32), slot, M)

        keys = merged(k)
        values = merged(v)
        if self.value_mode == "paper":
            values = values * count[..., None]
        bias = jnp.log(count) if self.value_mode == "mean+logn" else jnp.zeros_like(count)
        there = count > 0
        return base.Compacted(
            keys.astype(k.dtype),
            values.astype(v.dtype),
            jnp.where(there, pos, -1),
            jnp.where(there, bias, -jnp.inf),
        )
