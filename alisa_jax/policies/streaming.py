"""`streaming(sinks=4, kv_sparsity= | tokens=, positions="true")`: the first and the latest tokens.

StreamingLLM (ICLR 2024, arXiv 2309.17453): softmax must put its mass somewhere, models learn to put
it on the first tokens, and a sliding window that lets these go breaks. So `sinks` tokens are never
evicted, and the rest of the budget slides. The budget counts both: with `tokens` the window has
tokens - sinks, with kv_sparsity 1 - r the two together have round(n r). The sinks are kept from the
beginning, and at least one recent token: as long as the share of a short context is less than that,
more than the share is kept.

    positions="true"     a key keeps the rotation of the token's true position: the result is
                         attention over the masked text, as under every other policy here
    positions="cache"    the authors' code: tokens are placed by their index in the cache, anew at
                         every step, so a model sees no distance longer than the budget, and a
                         stream runs on beyond the longest position that the model knows. Keys are
                         stored before their rotation, so only rotary models can do it

A dense prompt is read at true positions in either case. Without sinks, or before anything is
evicted, both are the same.
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
    positions: str = "true"

    def __post_init__(self):
        budget.check(self.kv_sparsity, self.tokens)
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0; got {self.sinks}")
        if self.tokens is not None and self.tokens <= self.sinks:
            raise ValueError(
                f"tokens counts the sinks and must be more than sinks={self.sinks}; got "
                f"{self.tokens}"
            )
        if self.positions not in ("true", "cache"):
            raise ValueError(f'positions must be "true" or "cache"; got {self.positions!r}')

    @property
    def raw_keys(self) -> bool:
        return self.positions == "cache"

    @property
    def endless(self) -> bool:
        return self.raw_keys and self.tokens is not None

    def resolve(self, config, calibration=None):
        if self.raw_keys and not config.rotary_dims:
            raise ValueError(
                f"positions=cache needs a model with rotary positions; {config.arch} models learn "
                "theirs"
            )
        if self.endless and self.tokens >= config.max_positions:
            raise ValueError(
                f"positions=cache needs tokens below {config.max_positions}, the model's context; "
                f"got {self.tokens}"
            )
        return super().resolve(config, calibration)

    def recent(self, S: int) -> np.ndarray:
        """[S + 1] int32: tokens of the sliding window, without sinks, when n tokens are past."""
        n = np.arange(S + 1)
        kept = budget.round_half_up(budget.amounts(self.kv_sparsity, self.tokens, S))
        window = np.maximum(kept - self.sinks, 1)
        return np.minimum(window, np.maximum(n - self.sinks, 0)).astype(np.int32)

    def capacity(self, S: int) -> int:
        return min(S, self.sinks + int(self.recent(S).max())) + 1

    def _first(self, length, S: int):
        """[B, 1, 1]: where the sliding window begins."""
        # an endless stream needs no table of its length
        counted = S if self.tokens is None else min(S, self.tokens)
        return base.column(length - budget.lookup(self.recent(counted), length))

    def places(self, pos, length):
        """With positions="cache": index in the cache minus that of the query (at 0, `place`).

        The index of a kept token is its rank by age, sinks first; that of the query is their
        number. Rotary logits depend on differences alone, which follow from the positions and the
        number of kept tokens: a token of the window is at its true distance from the query, and the
        sinks lie directly before the window. A place is never below 1 - capacity, wherever the
        stream is.
        """
        if not self.raw_keys:
            return pos
        n = base.column(length)
        kept = jnp.sum((pos >= 0) & (pos < n), axis=-1, keepdims=True, dtype=jnp.int32)
        return pos - jnp.where(pos < self.sinks, kept, n)

    def place(self, length):
        return jnp.zeros_like(length) if self.raw_keys else length

    def exchange(self, stats, pos, bias, length, S):
        return stats, base.evicted(pos, bias, (pos >= self.sinks) & (pos < self._first(length, S)))

    def select(self, stats, length, S, q=None) -> jax.Array:
        p = base.positions(S)
        keep = (p < jnp.int32(self.sinks)) | (p >= self._first(length, S))
        return keep & (p < base.column(length))
