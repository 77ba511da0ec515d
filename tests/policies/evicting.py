"""A per-head policy that evicts, of the shape of H2O (arXiv 2306.14048): the smallest policy that uses every seam.

Each kv head keeps the last `recent` tokens and the `heavy` tokens with the most attention since they came. The sums lie
in slot space: the slot of an evicted token is used again, and must not hand its sum on to the new token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from alisa_jax.policies import base, swap


@dataclass(frozen=True)
class HeavyHitters(base.Policy):
    heavy: int = 6
    recent: int = 4
    resets: bool = True  # False is wrong, and exists to show that a test would notice

    seed_kind: ClassVar[str] = "sum"
    routes: ClassVar[tuple[str, ...]] = ("working_set", "masked")

    def selection_heads(self, K):
        return K

    def capacity(self, S):
        return self.heavy + self.recent + 1

    def init(self, dims):
        return jnp.zeros((dims.B, dims.K, dims.M), jnp.float32)

    def grow(self, stats, S, M):
        return jnp.pad(stats, ((0, 0), (0, 0), (0, M - stats.shape[-1])))

    def seed(self, stats, rows, length, dims):
        p, old = base.positions(dims.S), base.column(length) - self.recent
        keep = swap.top_mask(jnp.where(p < old, rows, -jnp.inf), jnp.full((1, 1, 1), self.heavy, jnp.int32))
        pos = base.slots_of(keep | ((p >= old) & (p < base.column(length))), dims.M)
        return jnp.where(pos >= 0, swap.take(rows, jnp.maximum(pos, 0)), jnp.float32(0)), pos

    def observe(self, stats, mass, pos, slot, length, dense=None):
        new = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2) == slot[:, :, None]
        return jnp.where(new & self.resets, jnp.float32(0), stats) + mass

    def exchange(self, stats, pos, bias, length, S):
        old = (pos >= 0) & (pos < base.column(length) - self.recent)
        least = jnp.argmin(jnp.where(old, stats, jnp.inf), axis=-1, keepdims=True)
        crowded = jnp.sum(old, axis=-1, keepdims=True) > self.heavy
        gone = crowded & (jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2) == least)
        return stats, base.evicted(pos, bias, gone)
