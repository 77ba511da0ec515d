"""The first and the last tokens of a sequence, raw, beside a cache of every token as codes.

R = sinks + window rows hold the tokens at the positions

    row r < sinks     position r
    other rows        a ring: position p lies in row sinks + (p - sinks) mod window until window
                      tokens later

So the number of tokens that have come, `count`, says which position a row holds, and nothing ever
shifts. A token enters its row when its codes are written, and leaves it by being overwritten:
nothing is encoded twice.

In a store a row of codes is a position. In a working set it is a slot, and tokens move and go:
there `slot` holds, for each of the R rows, the slot of its token, or -1. A slot that is written
again no longer belongs to the earlier token. Both homes of a layer see every token in turn, so
their counts are equal when tokens are copied from one to the other.
"""

from __future__ import annotations

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp

from alisa_jax.kv import ring
from alisa_jax.ops import rows, writes


class Reach(NamedTuple):
    """How many tokens are kept raw."""

    sinks: int
    window: int

    @property
    def rows(self) -> int:
        """R."""
        return self.sinks + self.window

    def row(self, pos: jax.Array) -> jax.Array:
        """The row of the token at `pos` [...] when it comes; R if it has none."""
        late = self.sinks + jnp.mod(pos - self.sinks, self.window) if self.window else self.rows
        return jnp.where(pos < self.sinks, pos, late)

    def positions(self, count: jax.Array) -> jax.Array:
        """[B, R] int32: the position in each row after `count` [B] tokens, -1 for none."""
        first = jax.lax.broadcasted_iota(jnp.int32, (count.shape[0], self.sinks), 1)
        first = jnp.where(first < count[:, None], first, -1)
        if not self.window:
            return first
        last = ring.newest(count - self.sinks, jnp.zeros_like(count), self.window)
        return jnp.concatenate([first, jnp.where(last >= 0, last + self.sinks, -1)], axis=1)

    def holds(self, pos: jax.Array, count: jax.Array) -> jax.Array:
        """Whether the tokens at `pos` are kept raw after `count` tokens, of the same rank."""
        return (pos >= 0) & (pos < count) & ((pos < self.sinks) | (pos >= count - self.window))


@flax.struct.dataclass
class Recent:
    """The raw rows, see above; slot is None in a store."""

    x: jax.Array  # [B, K, R, H] in the type of the model
    slot: jax.Array | None  # [B, K, R] int32
    count: jax.Array  # [B] int32
    reach: Reach = flax.struct.field(pytree_node=False)

    @staticmethod
    def empty(reach: Reach, B: int, K: int, H: int, dtype, layout: str) -> Recent:
        """The rows before any token."""
        slot = jnp.full((B, K, reach.rows), -1, jnp.int32) if layout == "slots" else None
        return Recent(
            jnp.zeros((B, K, reach.rows, H), dtype), slot, jnp.zeros((B,), jnp.int32), reach
        )

    def after(self, x: jax.Array, count: jax.Array, layout: str) -> Recent:
        """The rows after the first `count` [B] tokens of x, in `layout`, with slot = position."""
        at = self.reach.positions(count)
        take = rows.take_slots if layout == "slots" else rows.take_tokens
        slot = jnp.broadcast_to(at[:, None], self.x.shape[:3]) if layout == "slots" else None
        return self.replace(x=take(x, at[:, None]).astype(self.x.dtype), slot=slot, count=count)

    def append(self, x: jax.Array, slot: jax.Array | None, M: int) -> Recent:
        """Add the next token, x [B, K, H], which lies in `slot` [B, P] of M.

        A slot out of range means that the token lies in none.
        """
        row = self.reach.row(self.count)
        b = jax.lax.broadcasted_iota(jnp.int32, row.shape, 0)
        # row R is out of range, and dropped
        held = writes.put(self.x, (b, slice(None), row), x.astype(self.x.dtype))
        if slot is not None:
            slot = jnp.where((slot >= 0) & (slot < M), slot, -1)[:, :, None]
            own = jax.lax.broadcasted_iota(jnp.int32, self.slot.shape, 2) == row[:, None, None]
            slot = jnp.where(own, slot, jnp.where(self.slot == slot, -1, self.slot))
        return self.replace(x=held, slot=slot, count=self.count + 1)

    def taken(self, pos: jax.Array) -> Recent:
        """Rows of a store for its tokens `pos` [B, P, E] when they lie in slots 0 .. E-1."""
        B, K, R, _ = self.x.shape
        b = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 0)
        p = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 1)
        e = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 2)
        at = jnp.where(self.reach.holds(pos, self.count[:, None, None]), self.reach.row(pos), R)
        slot = jnp.full((B, pos.shape[1], R), -1, jnp.int32).at[b, p, at].set(e, mode="drop")
        return self.replace(slot=jnp.broadcast_to(slot, (B, K, R)))

    def sliced(self, start: jax.Array, size: int) -> Recent:
        """As `taken`, for tokens start .. start+size-1 and slots 0 .. size-1."""
        at = self.reach.positions(self.count)
        slot = jnp.where((at >= start) & (at < start + size), at - start, -1)
        return self.replace(slot=jnp.broadcast_to(slot[:, None], self.x.shape[:3]))

    def copy_in(self, other: Recent, slot: jax.Array, M: int) -> Recent:
        """Move the tokens in slots 0 .. E-1 of `other` into `slot` [B, P, E] of M."""
        B, P, E = slot.shape
        slot = jnp.where((slot >= 0) & (slot < M), slot, M)
        b = jax.lax.broadcasted_iota(jnp.int32, slot.shape, 0)
        p = jax.lax.broadcasted_iota(jnp.int32, slot.shape, 1)
        written = jnp.zeros((B, P, M), jnp.bool_).at[b, p, slot].set(True, mode="drop")
        kept = jnp.where(_at(written, self.slot, False), -1, self.slot)
        moved = _at(slot, other.slot, M)
        comes = moved < M
        held = jnp.where(comes[..., None], other.x, self.x)
        return self.replace(x=held, slot=jnp.where(comes, moved, kept), count=other.count)


def _at(x: jax.Array, index: jax.Array, otherwise) -> jax.Array:
    """x [B, P, E] at `index` [B, K, R]; `otherwise` where that is -1."""
    x = jnp.broadcast_to(x, (*index.shape[:2], x.shape[2]))
    found = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=-1, mode="promise_in_bounds")
    return jnp.where(index >= 0, found, jnp.asarray(otherwise, x.dtype))
