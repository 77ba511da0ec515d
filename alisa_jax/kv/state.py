"""The state of one layer's cache: explicit arrays in, explicit arrays out.

Two homes for a token (one of them may be absent):

    Store        every token once, append-only, token-major [B, S, K, H]: row p is position p
    WorkingSet   the tokens that the next query attends, head-major [B, K, M, H], with the position
                 of each slot

A slot of the working set is in one of three conditions, given by `pos` and `bias` together:

    active   pos >= 0, bias > -inf     attended
    parked   pos >= 0, bias = -inf     resident but not attended; may return without a copy
    empty    pos = -1, bias = -inf     free
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp

from alisa_jax.axes import adopted
from alisa_jax.kv import rows

EMPTY = -1


@flax.struct.dataclass
class WorkingSet:
    """M slots per sequence; P is 1 if heads share the selection, K if each kv head has its own."""

    k: Any  # packed [B, K, M, H]
    v: Any  # packed [B, K, M, H]
    pos: jax.Array  # [B, P, M] int32, -1 empty
    bias: jax.Array  # [B, P, M] float32, added to the logits: 0 active, -inf empty or parked

    @staticmethod
    def empty(codec, B: int, K: int, M: int, H: int, P: int) -> WorkingSet:
        """A working set with all of its M slots free."""
        shape = (B, K, M, H)
        pos = jnp.full((B, P, M), EMPTY, jnp.int32)
        return WorkingSet(
            codec.empty(shape, "slots", "k"), codec.empty(shape, "slots", "v"), pos, bias_of(pos)
        )

    def append(
        self, codec, k: jax.Array, v: jax.Array, length: jax.Array
    ) -> tuple[WorkingSet, jax.Array]:
        """Put the token at position `length` [B] into the first empty slot; `k`, `v` [B, K, H].

        Returns the new working set and the slot taken, [B, P]. If no slot is empty, nothing is
        written and the slot is M: a full set loses the new token and never an old one (the engine
        grows the bucket before that).
        """
        M = self.pos.shape[-1]
        iota = jax.lax.broadcasted_iota(jnp.int32, self.pos.shape, 2)
        slot = jnp.min(jnp.where(self.pos == EMPTY, iota, M), axis=-1)
        here = iota == slot[:, :, None]
        return WorkingSet(
            codec.write_slot(self.k, k, slot),
            codec.write_slot(self.v, v, slot),
            jnp.where(here, length[:, None, None], self.pos),
            jnp.where(here, jnp.float32(0.0), self.bias),
        ), slot

    def load(self, codec, store, slot: jax.Array, pos: jax.Array) -> WorkingSet:
        """Copy tokens `pos` of a store or ring into `slot`, both [B, P, E]; -1 copies nothing."""
        k, v = store.take(codec, pos)
        return self.replace(k=codec.copy_in(self.k, k, slot), v=codec.copy_in(self.v, v, slot))

    def freeze(self, codec) -> WorkingSet:
        """The same tokens, all of them encoded (`Codec.freeze`)."""
        return self.replace(k=codec.freeze(self.k, "slots"), v=codec.freeze(self.v, "slots"))

    def grow(self, codec, M: int) -> WorkingSet:
        """The same tokens in the same slots, with M slots in all."""
        return WorkingSet(
            codec.grow(self.k, M, "slots"),
            codec.grow(self.v, M, "slots"),
            rows.pad_axis(self.pos, 2, M, EMPTY),
            rows.pad_axis(self.bias, 2, M, -jnp.inf),
        )


@flax.struct.dataclass
class LayerState:
    """All that one layer remembers. `KVState` is the tuple of the layers' states."""

    ws: WorkingSet | None
    store: Any  # Store, or a Ring of its newest rows, or None
    stats: Any  # the policy's pytree, () when it keeps none
    length: jax.Array  # [B] int32, tokens seen per sequence
    policy: Any = flax.struct.field(pytree_node=False)
    codec: Any = flax.struct.field(pytree_node=False)
    route: str = flax.struct.field(pytree_node=False)  # "working_set" | "indexed" | "masked"
    context: int = flax.struct.field(pytree_node=False)  # S, the context bucket
    # the implementation of attention: "xla" | "pallas" | "interpret"
    impl: str = flax.struct.field(pytree_node=False, default="xla")
    # `Rotation` of keys that are stored before it
    turning: Any = flax.struct.field(pytree_node=False, default=None)

    def adopt(self, other: LayerState, rows: jax.Array, which: jax.Array) -> LayerState:
        """Replace the sequences `which` [B] bool by the sequences `rows` [B] of `other`.

        `other` has the same layer, context bucket and codec state, and any number of sequences.
        """

        def put(name):
            return jax.tree.map(
                lambda a, b: adopted(a, b, rows, which), getattr(self, name), getattr(other, name)
            )

        stats = self.policy.adopt(self.stats, other.stats, rows, which)
        return self.replace(ws=put("ws"), store=put("store"), stats=stats, length=put("length"))


KVState = tuple[LayerState, ...]


def bias_of(pos: jax.Array) -> jax.Array:
    """The logit bias of slots `pos`: 0 for a token, -inf for none."""
    return jnp.where(pos >= 0, jnp.float32(0.0), jnp.float32(-jnp.inf))


def bytes_of(kv: KVState) -> tuple[int, int]:
    """Bytes of K and V, and of everything else, in states or their shapes."""
    homes = [h for state in kv for h in (state.ws, state.store) if h is not None]
    content = sum(tree_bytes((h.k, h.v)) for h in homes)
    return content, sum(tree_bytes(state) for state in kv) - content


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of all `jax.ShapeDtypeStruct`s, in `tree`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
