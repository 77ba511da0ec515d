"""Every token's K and V once, append-only, token-major [B, S, K, H]: row p is position p."""

from __future__ import annotations

from typing import Any

import flax
import jax


@flax.struct.dataclass
class Store:
    """Every token's K and V at row = position."""

    k: Any  # packed [B, S, K, H]
    v: Any  # packed [B, S, K, H]

    @staticmethod
    def empty(codec, B: int, S: int, K: int, H: int) -> Store:
        """A store with room for S tokens."""
        return Store(
            codec.empty((B, S, K, H), "tokens", "k"), codec.empty((B, S, K, H), "tokens", "v")
        )

    def append(self, codec, k: jax.Array, v: jax.Array, length: jax.Array) -> Store:
        """Write `k`, `v` [B, K, H] at row `length` [B]; a full store stays as it is."""
        return Store(codec.write_token(self.k, k, length), codec.write_token(self.v, v, length))

    def take(self, codec, pos: jax.Array) -> tuple[Any, Any]:
        """Codes of K and V of tokens `pos` [B, P, E], head-major."""
        return codec.take(self.k, pos), codec.take(self.v, pos)

    def freeze(self, codec) -> Store:
        """The same rows, all of them encoded."""
        return self.replace(k=codec.freeze(self.k, "tokens"), v=codec.freeze(self.v, "tokens"))

    def grow(self, codec, S: int) -> Store:
        """The same rows, with room for S tokens."""
        return Store(codec.grow(self.k, S, "tokens"), codec.grow(self.v, S, "tokens"))
