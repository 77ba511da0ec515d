"""`dense()`: every token attends to every token before it. The reference of all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from alisa_jax.policies import base


@dataclass(frozen=True)
class Dense(base.Policy):
    """Keeps all tokens; slot = position."""

    selects: ClassVar[bool] = False

    def capacity(self, S: int) -> int:
        return S

    def exchange(self, stats, pos, bias, length, S):
        return stats, base.evicted(pos, bias, jnp.zeros(pos.shape, jnp.bool_))

    def select(self, stats, length, S, q=None) -> jax.Array:
        return base.positions(S) < base.column(length)
