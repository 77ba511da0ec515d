"""Rows that slots of a working set wait for: a policy requests them and the `Ring` lacks them."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp

from alisa_jax.axes import adopted

# per layer, sequence and selection head; an exchange that needs more stops and is called again
PENDING_ROWS = 16


@flax.struct.dataclass
class Pending:
    """Rows that slots wait for; -1 where none."""

    pos: jax.Array  # [B, P, PENDING_ROWS] int32
    slot: jax.Array  # [B, P, PENDING_ROWS] int32
    more: jax.Array  # [] bool: the exchange stopped early

    @staticmethod
    def empty(B: int, P: int) -> Pending:
        """Nothing is pending."""
        # two buffers: each may be donated
        pos = jnp.full((B, P, PENDING_ROWS), -1, jnp.int32)
        slot = jnp.full((B, P, PENDING_ROWS), -1, jnp.int32)
        return Pending(pos, slot, jnp.zeros((), jnp.bool_))

    def note(self, slot: jax.Array, pos: jax.Array, absent: jax.Array) -> Pending:
        """Add the `absent` ones of the loads `slot`, `pos` (all [B, P, E]) behind the pending."""
        rank = jnp.cumsum(absent, axis=-1, dtype=jnp.int32) - 1
        at = jnp.where(absent, rank + self.count()[..., None], PENDING_ROWS)
        b = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
        p = jax.lax.broadcasted_iota(jnp.int32, at.shape, 1)
        put = lambda old, new: old.at[b, p, at].set(new, mode="drop")
        return self.replace(pos=put(self.pos, pos), slot=put(self.slot, slot))

    def count(self) -> jax.Array:
        """[B, P] int32: the number of pending rows."""
        return jnp.sum(self.pos >= 0, axis=-1, dtype=jnp.int32)

    def room(self, E: int) -> jax.Array:
        """[] bool: `E` more fit for each sequence and head."""
        return jnp.max(self.count()) + E <= PENDING_ROWS

    def adopt(self, other: Pending, rows: jax.Array, which: jax.Array) -> Pending:
        """The sequences `which` [B] bool replaced by the sequences `rows` [B] of `other`."""
        put = lambda a, b: adopted(a, b, rows, which)
        return Pending(put(self.pos, other.pos), put(self.slot, other.slot), self.more | other.more)

    def any(self) -> jax.Array:
        """[] bool: something is pending, or the exchange stopped early."""
        return self.more | jnp.any(self.pos >= 0)

    def hide(self, bias: jax.Array) -> jax.Array:
        """`bias` [B, P, M] with the waiting slots at -inf."""
        b = jax.lax.broadcasted_iota(jnp.int32, self.slot.shape, 0)
        p = jax.lax.broadcasted_iota(jnp.int32, self.slot.shape, 1)
        at = jnp.where(self.slot >= 0, self.slot, bias.shape[-1])
        return bias.at[b, p, at].set(-jnp.inf, mode="drop")
