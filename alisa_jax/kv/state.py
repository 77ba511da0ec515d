"""The state of one layer's cache: explicit arrays in, explicit arrays out.

Two homes for a token (one of them may be absent):

    Store        every token once, append-only, token-major [B, S, K, H]: row p is position p
    WorkingSet   the tokens that the next query attends, head-major [B, K, M, H], with the position
                 of each slot

A slot of the working set is in one of three conditions, given by `pos` and `bias` together:

    active   pos >= 0, bias > -inf     attended
    parked   pos >= 0, bias = -inf     resident but not attended; may return without a copy
    empty    pos = -1, bias = -inf     free

A new token is encoded once (`Codec.encode_token`); both homes are given its codes. What takes the
place of a `Store` (`kv.ring.Ring` keeps the newest rows alone) has the verbs of `TokenStore`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp

from alisa_jax.axes import adopted
from alisa_jax.ops import rows

EMPTY = -1


@dataclass(frozen=True)
class LayerSpec:
    """How one layer keeps its past; the same for all parts of the layer."""

    policy: Any  # a `policies.Policy`
    codec: Any  # a `codecs.Codec`
    route: str  # "working_set" | "indexed" | "masked"
    impl: str = "xla"  # what computes attention: "xla" | "pallas" | "interpret"
    rotation: Any = None  # `ops.rope.Rotation` of keys that are stored before it; None: after it


class TokenStore(Protocol):
    """The verbs of a home that keeps every token, or knows which rows are elsewhere.

    A row that a policy requests and that is elsewhere becomes *pending*: its slot of the working
    set waits until the row is delivered.
    """

    k: Any
    v: Any

    @property
    def pending(self) -> Any:
        """The rows that slots wait for, as a pytree; () for a store that has every row."""

    def append(self, codec, k: Any, v: Any, length: jax.Array) -> TokenStore:
        """Write the codes `k`, `v` of the token at position `length` [B]."""

    def take(self, codec, pos: jax.Array) -> tuple[Any, Any]:
        """Codes of K and V of tokens `pos` [B, P, E], head-major; garbage for rows elsewhere."""

    def grow(self, codec, S: int) -> TokenStore:
        """The same rows, with room for S tokens."""

    def freeze(self, codec) -> TokenStore:
        """The same rows, all of them encoded."""

    def adopt(self, other, rows: jax.Array, which: jax.Array | None) -> TokenStore:
        """The sequences `which` [B] bool replaced by the sequences `rows` [B] of `other`."""

    def request(self, pending: Any, slot, pos, more) -> tuple[jax.Array, Any, jax.Array]:
        """Ask for tokens `pos` for slots `slot`, both [B, P, E] with -1 for none.

        more [] bool: the policy has further requests. Returns the slots whose rows are here (-1
        elsewhere), `pending` with the other ones, and whether the exchange may go on.
        """

    def waiting(self, pending: Any) -> TokenStore:
        """This store with `pending` as the rows that slots wait for."""

    def delivered(self) -> TokenStore:
        """This store when no slot waits any more."""

    def hide(self, bias: jax.Array) -> jax.Array:
        """`bias` [B, P, M] with the slots that wait for a row at -inf."""

    def waits(self) -> jax.Array:
        """[] bool: some slot waits, or an exchange stopped early."""


@flax.struct.dataclass
class Store:
    """Every token's K and V at row = position; a `TokenStore`."""

    k: Any  # packed [B, S, K, H]
    v: Any  # packed [B, S, K, H]

    @staticmethod
    def empty(codec, B: int, S: int, K: int, H: int) -> Store:
        """A store with room for S tokens."""
        return Store(
            codec.empty((B, S, K, H), "tokens", "k"), codec.empty((B, S, K, H), "tokens", "v")
        )

    @property
    def pending(self) -> tuple[()]:
        return ()

    def append(self, codec, k, v, length):
        """See `TokenStore`; a full store stays as it is."""
        return Store(codec.write_token(self.k, k, length), codec.write_token(self.v, v, length))

    def take(self, codec, pos):
        return codec.take(self.k, pos), codec.take(self.v, pos)

    def grow(self, codec, S):
        return Store(codec.grow(self.k, S, "tokens"), codec.grow(self.v, S, "tokens"))

    def freeze(self, codec):
        return Store(codec.freeze(self.k, "tokens"), codec.freeze(self.v, "tokens"))

    def adopt(self, other, rows, which):
        return adopt_tree(self, other, rows, which)

    def request(self, pending, slot, pos, more):
        return slot, pending, more

    def waiting(self, pending):
        return self

    def delivered(self):
        return self

    def hide(self, bias):
        return bias

    def waits(self):
        return jnp.zeros((), jnp.bool_)


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

    def append(self, codec, k: Any, v: Any, length: jax.Array) -> tuple[WorkingSet, jax.Array]:
        """Put the codes `k`, `v` of the token at position `length` [B] into the first empty slot.

        Returns the new working set and the slot taken, [B, P]. If no slot is empty, nothing is
        written and the slot is M: a full set loses the new token and never an old one (the engine
        grows the bucket before that).
        """
        M = self.pos.shape[-1]
        iota = jax.lax.broadcasted_iota(jnp.int32, self.pos.shape, 2)
        slot = jnp.min(jnp.where(self.pos == EMPTY, iota, M), axis=-1)
        return self.put(codec, k, v, slot, length), slot

    def put(self, codec, k: Any, v: Any, slot: jax.Array, length: jax.Array) -> WorkingSet:
        """Put the codes `k`, `v` of the token at position `length` [B] into `slot` [B, P]."""
        here = jax.lax.broadcasted_iota(jnp.int32, self.pos.shape, 2) == slot[:, :, None]
        return WorkingSet(
            codec.write_slot(self.k, k, slot),
            codec.write_slot(self.v, v, slot),
            jnp.where(here, length[:, None, None], self.pos),
            jnp.where(here, jnp.float32(0.0), self.bias),
        )

    def load(self, codec, store: TokenStore, slot: jax.Array, pos: jax.Array) -> WorkingSet:
        """Copy tokens `pos` of a store into `slot`, both [B, P, E]; -1 copies nothing."""
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
    """What one layer remembers of some sequences; a layer is a tuple of these, its parts."""

    ws: WorkingSet | None
    store: Any  # a `TokenStore` or None
    stats: Any  # the policy's pytree, () when it keeps none
    length: jax.Array  # [B] int32, tokens seen per sequence
    spec: LayerSpec = flax.struct.field(pytree_node=False)
    context: int = flax.struct.field(pytree_node=False)  # S, the context bucket

    @property
    def home(self) -> Any:
        """The working set or, on the route without one, the store."""
        return self.store if self.ws is None else self.ws

    def adopt(self, other: LayerState, rows: jax.Array, which: jax.Array | None) -> LayerState:
        """Replace the sequences `which` [B] bool by the sequences `rows` [B] of `other`.

        `other` has the same layer, context bucket and codec state, and any number of sequences.
        which: None for the sequences `rows` alone, however many.
        """
        return self.replace(
            ws=adopt_tree(self.ws, other.ws, rows, which),
            store=None if self.store is None else self.store.adopt(other.store, rows, which),
            stats=self.spec.policy.adopt(self.stats, other.stats, rows, which),
            length=adopted(self.length, other.length, rows, which),
        )


def adopt_tree(tree: Any, other: Any, rows: jax.Array, which: jax.Array | None) -> Any:
    """`axes.adopted` of all arrays of two pytrees, whose first axis counts sequences."""
    return jax.tree.map(lambda a, b: adopted(a, b, rows, which), tree, other)


def bias_of(pos: jax.Array) -> jax.Array:
    """The logit bias of slots `pos`: 0 for a token, -inf for none."""
    return jnp.where(pos >= 0, jnp.float32(0.0), jnp.float32(-jnp.inf))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of all `jax.ShapeDtypeStruct`s, in `tree`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
