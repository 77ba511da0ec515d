"""`snapkv(capacity=1024, window=32, kernel=7, pool="max")`: the tokens that a prompt's end reads.

SnapKV (NeurIPS 2024, arXiv 2404.14469). At the end of a dense prompt each kv head adds up the
attention of the last `window` queries, pools it along the positions before the window (stride 1,
same length), and keeps the window and the best capacity - window of the tokens before it. Pooling
lets a token that is looked at bring its neighbours, so that a span stays whole. A prompt of at most
`capacity` tokens is kept whole. Later tokens are appended and never evicted: the cache grows with
the generated text, not with the prompt. From an empty cache this is dense attention. Keys keep the
rotation of their true positions.

pool: "max", or "avg". Outside the pooled positions lies -inf for "max" and 0 for "avg", which
divides by `kernel` all the same; the window counts as outside too. "max" makes a peak a plateau of
equal scores; ties go to the lowest position.

The authors repeat kv heads first and choose for every query head, so with grouped queries their
cache is as wide as the query heads. Here a kv head has one set, by the attention of its group,
summed before it is pooled; kvpress averages over the group, which ranks alike (it knows "avg"
alone, and sums and averages commute). The defaults are those of the authors' LongBench runs; their
model hooks have capacity=2048, kernel=5 and pool="avg".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from alisa_jax.policies import base, swap


@dataclass(frozen=True)
class SnapKV(base.Policy):
    """Stateless: each prompt is cut once, by its own length.

    tokens: the prompt tokens to keep; a spec calls it capacity, which here is a method.
    """

    tokens: int = dataclasses.field(default=1024, metadata={"spec": "capacity"})
    window: int = 32
    kernel: int = 7
    pool: str = "max"

    seed_kind: ClassVar[str] = "rows"
    routes: ClassVar[tuple[str, ...]] = ("working_set", "masked")  # what a prompt lost is gone
    appends: ClassVar[bool] = True

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be at least 1; got {self.window}")
        if self.tokens <= self.window:
            raise ValueError(
                f"capacity counts the window and must be more than window={self.window}; got "
                f"{self.tokens}"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1; got {self.kernel}")
        if self.pool not in ("max", "avg"):
            raise ValueError(f'pool must be "max" or "avg"; got {self.pool!r}')

    def selection_heads(self, K: int) -> int:
        return K

    def capacity(self, S: int) -> int:
        return S

    def prompt_capacity(self, S: int) -> int:
        return min(S, self.tokens)

    @classmethod
    def sized(cls, kept: int, tokens: int) -> SnapKV:
        """As the base says, with a window of at most half of what is kept."""
        return cls(tokens=kept, window=min(cls.window, kept // 2))

    def seed_rows(self, S: int) -> int:
        return self.window

    def seed(self, stats, rows, length, dims):
        p, n = base.positions(dims.S), base.column(length)
        old = p < n - self.window
        paid = jnp.sum(jnp.where(jnp.isnan(rows), jnp.float32(0.0), rows), axis=2)
        score = jnp.where(old, self.pooled(paid, old), -jnp.inf)
        keep = swap.top_mask(score, jnp.full_like(n, self.tokens - self.window))
        return stats, base.slots_of(keep | (~old & (p < n)), dims.M)

    def pooled(self, paid: jax.Array, old: jax.Array) -> jax.Array:
        """`paid` [B, K, S] pooled along positions; nothing outside `old` [B, 1, S] counts.

        For "avg" it is the sum over the kernel, which ranks as the average does.
        """
        around, reach = (1, 1, self.kernel), self.kernel // 2
        outside, merge = (-jnp.inf, jax.lax.max) if self.pool == "max" else (0.0, jax.lax.add)
        inside = jnp.where(old, paid, jnp.float32(outside))
        sides = ((0, 0), (0, 0), (reach, reach))
        return jax.lax.reduce_window(inside, jnp.float32(outside), merge, around, (1, 1, 1), sides)

    def exchange(self, stats, pos, bias, length, S):
        return stats, base.evicted(pos, bias, jnp.zeros(pos.shape, jnp.bool_))
