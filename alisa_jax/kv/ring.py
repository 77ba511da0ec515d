"""The part of a store that stays on the device while older tokens are elsewhere: the newest rows.

Position p lies in row p mod C, C a multiple of the page, so a page is one run of rows and nothing
ever shifts. Rows below `host` [B] are elsewhere, whatever the ring still holds of them. A row that
a policy requests and that is elsewhere becomes *pending*: its slot of the working set waits until
the caller delivers it.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp

from alisa_jax.kv.pending import Pending
from alisa_jax.kv.state import adopt_tree
from alisa_jax.ops import rows


@flax.struct.dataclass
class Ring:
    """A `TokenStore` of C rows; see above."""

    k: Any  # packed [B, C, K, H]
    v: Any  # packed [B, C, K, H]
    host: jax.Array  # [B] int32: positions below it are elsewhere
    pending: Pending

    @staticmethod
    def empty(codec, B: int, C: int, K: int, H: int, P: int) -> Ring:
        """A ring of C rows that holds nothing."""
        k = codec.empty((B, C, K, H), "tokens", "k")
        v = codec.empty((B, C, K, H), "tokens", "v")
        return Ring(k, v, jnp.zeros((B,), jnp.int32), Pending.empty(B, P))

    def append(self, codec, k, v, length):
        row = jnp.mod(length, self.rows(codec))
        return self.replace(
            k=codec.write_token(self.k, k, row), v=codec.write_token(self.v, v, row)
        )

    def take(self, codec, pos):
        row = jnp.mod(pos, self.rows(codec))
        k = codec.seated(codec.take(self.k, row), self.k, pos)
        v = codec.seated(codec.take(self.v, row), self.v, pos)
        return k, v

    def rows(self, codec) -> int:
        """C."""
        return codec.leaves(self.k)[0].shape[1]

    def grow(self, codec, S):
        """As `TokenStore` says: a ring is as large for every S."""
        return self

    def freeze(self, codec):
        return self.replace(k=codec.freeze(self.k, "tokens"), v=codec.freeze(self.v, "tokens"))

    def adopt(self, other, rows, which):
        return Ring(
            adopt_tree(self.k, other.k, rows, which),
            adopt_tree(self.v, other.v, rows, which),
            adopt_tree(self.host, other.host, rows, which),
            self.pending.adopt(other.pending, rows, which),
        )

    def request(self, pending, slot, pos, more):
        absent = (pos >= 0) & (pos < self.host[:, None, None])
        pending = pending.note(slot, pos, absent)
        pending = pending.replace(more=more & ~pending.room(slot.shape[-1]))
        return jnp.where(absent, -1, slot), pending, more & ~pending.more

    def waiting(self, pending):
        return self.replace(pending=pending)

    def delivered(self):
        return self.waiting(Pending.empty(*self.pending.pos.shape[:2]))

    def hide(self, bias):
        return self.pending.hide(bias)

    def waits(self):
        return self.pending.any()


def newest(length: jax.Array, host: jax.Array, C: int) -> jax.Array:
    """[B, C] int32: the position in each of C rows of a ring, -1 for none.

    length [B]: tokens that have come; host [B]: positions below it are elsewhere.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, (length.shape[0], C), 1)
    last = length[:, None] - 1
    pos = last - jnp.mod(last - row, C)
    return jnp.where((pos >= host[:, None]) & (pos >= 0), pos, -1)


def fill(codec, packed: Any, pos: jax.Array, layout: str) -> tuple[jax.Array, ...]:
    """Leaves of a ring with positions `pos` [B, C], from token-major rows `packed` [B, T, K, H]."""
    b = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 0)
    at = jnp.maximum(pos, 0)
    taken = [leaf[b, at] for leaf in codec.leaves(packed)]
    return tuple(jnp.swapaxes(x, 1, 2) if layout == "slots" else x for x in taken)


def put(
    codec, packed: Any, leaves: tuple[jax.Array, ...], sequence: jax.Array, slot: jax.Array
) -> Any:
    """Write single rows `leaves` [R, K, *] into head-major `packed` (see `rows.put_rows`).

    They go to `slot` [R, P] of `sequence` [R].
    """
    pairs = zip(codec.leaves(packed), leaves, strict=True)
    new = tuple(rows.put_rows(old, some, sequence, slot) for old, some in pairs)
    return codec.rebuild(packed, new)
