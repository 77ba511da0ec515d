"""What a codec is: how one token's K or V is stored, and how attention reads it without unpacking
it.

A codec turns arrays [..., H] into a packed pytree and is used in two layouts (see `rows.py`):
"slots" is head-major [B, K, M, H], "tokens" is token-major [B, S, K, H]. Two kinds of move are kept
apart: `write` and `fill` encode new values; `take` and `put` move what is already encoded, bit for
bit, so that exchanging tokens never encodes twice. `logits` and `mix` are the two products of
attention, where the scales of a quantised codec are folded in.

A codec may have to see some tokens before it can encode (`frozen_after` > 0). A sequence then
begins in packed form that holds raw values; when it has `frozen_after` tokens, `freeze` encodes
them, once, and from there on all are codes. Methods take either form.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax.ops import products
from alisa_jax.ops.rope import NO_ROTATION, Rotation, Turn, turned

__all__ = [
    "NO_ROTATION",
    "TOKEN_AXIS",
    "Asked",
    "Codec",
    "Content",
    "Layout",
    "Packed",
    "Rotation",
    "Side",
    "Turn",
]

Packed = Any  # a pytree that only its codec looks into
Layout = Literal["slots", "tokens"]
Side = Literal["k", "v"]
TOKEN_AXIS = {"slots": 2, "tokens": 1}.__getitem__


class Content(NamedTuple):
    """Packed rows as arrays that a kernel reads: values, or codes c of values
    (c - zero) * scale.
    """

    # what each scale and zero point belongs to, beside the kv head; None: values
    axis: Literal["token", "channel"] | None
    codes: jax.Array  # the shape of the packed rows
    # without the channels ("token") or without the tokens ("channel")
    scale: jax.Array | None = None
    zero: jax.Array | None = None  # the shape of scale


class Asked:
    """What a user names in a spec: a frozen dataclass that `resolve(dtype, rotation)` turns into
    the codec of a model, where
    `dtype` is the type that the model computes in. A codec that needs to know neither is its own
    spec.
    """

    # keys are to come before their rotation; `turned_logits` turns them
    raw_keys: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False  # `resolve` also takes calibration= and config=, the model's


class Codec(Asked):
    """Base of all codecs: frozen dataclasses of pure methods."""

    # the row of a token is all there is of it, and may be moved by itself
    placed: ClassVar[bool] = True

    def for_layer(self, layer: int) -> Codec:
        """The codec of layer `layer`, counted from 0."""
        return self

    def refuses(self, policy, route: str) -> str | None:
        """Why this codec cannot serve `policy` on `route`, in one sentence; None: it can."""
        return None

    @property
    def frozen_after(self) -> int:
        """Tokens of a sequence that are kept raw before `freeze` encodes them; 0: every token is
        encoded as it comes.

        Where it is not 0, the field `raw` is the codec of those tokens.
        """
        return 0

    def token_bytes(self, K: int, H: int) -> float:
        """Bytes of K and V that each token adds in one layer and one home."""
        raise NotImplementedError

    def sequence_bytes(self, K: int, H: int) -> float:
        """Bytes of K and V that each sequence has in one layer and one home, however many tokens it
        holds.
        """
        return 0.0

    def empty(self, shape: tuple[int, ...], layout: Layout, side: Side) -> Packed:
        """Packed zeros for `shape`, which is [B, K, M, H] for "slots" and [B, S, K, H] for
        "tokens".
        """
        raise NotImplementedError

    def grow(self, packed: Packed, size: int, layout: Layout) -> Packed:
        """`packed` with its token axis extended to `size`."""
        raise NotImplementedError

    def fill(self, packed: Packed, x: jax.Array, layout: Layout) -> Packed:
        """Encode a whole prompt of `frozen_after` tokens or more; `x` has the layout and shape of
        the empty `packed`.
        """
        raise NotImplementedError

    def upto(self, packed: Packed, x: jax.Array, length: jax.Array, layout: Layout) -> Packed:
        """`packed`, which `fill` made of x, as it is when only the first `length` [B] tokens of x
        have come.
        """
        return packed

    def freeze(self, packed: Packed, layout: Layout) -> Packed:
        """Encode what has been kept raw until now."""
        return packed

    def write_slot(self, packed: Packed, x: jax.Array, slot: jax.Array) -> Packed:
        """Encode one new token, `x` [B, K, H], into `slot` [B, P] of a head-major array."""
        raise NotImplementedError

    def write_token(self, packed: Packed, x: jax.Array, pos: jax.Array) -> Packed:
        """Encode one new token, `x` [B, K, H], at position `pos` [B] of a token-major array."""
        raise NotImplementedError

    def take(self, packed: Packed, pos: jax.Array) -> Packed:
        """Codes of tokens `pos` [B, P, E] of a token-major array, head-major with E tokens."""
        raise NotImplementedError

    def copy_in(self, packed: Packed, codes: Packed, slot: jax.Array) -> Packed:
        """Head-major `codes` of E tokens copied into `slot` [B, P, E] of a head-major array."""
        raise NotImplementedError

    def slice_tokens(self, packed: Packed, start: jax.Array, size: int) -> Packed:
        """Codes of tokens start .. start+size-1 of a token-major array, head-major."""
        raise NotImplementedError

    def leaves(self, packed: Packed) -> tuple[jax.Array, ...]:
        """The arrays of `packed` that have a token axis: what the row of a token is made of."""
        raise NotImplementedError

    def rebuild(self, packed: Packed, leaves: tuple[jax.Array, ...]) -> Packed:
        """`packed` with other rows, as `leaves` has them; what a sequence has as a whole stays."""
        raise NotImplementedError

    def encode(self, packed: Packed, x: jax.Array, layout: Layout) -> tuple[jax.Array, ...]:
        """Leaves of the rows that tokens `x`, in `layout`, would have in `packed`, in which nothing
        is raw any more.
        """
        raise NotImplementedError

    def content(self, packed: Packed) -> Content | None:
        """The arrays of `packed` for kernels; None: this codec is read by XLA alone."""
        return None

    def logits(self, q: jax.Array, k: Packed) -> jax.Array:
        """`q` [B, K, G, H] against head-major keys: [B, K, G, M] float32. The caller has scaled
        `q`.
        """
        raise NotImplementedError

    def values(self, packed: Packed) -> jax.Array:
        """What head-major `packed` stands for: [B, K, M, H] float32."""
        raise NotImplementedError

    def turned_logits(self, q: jax.Array, k: Packed, turn: Turn) -> jax.Array:
        """As `logits`, against keys that were stored before their rotation: each slot is turned to
        its place.
        """
        places = jnp.broadcast_to(turn.places, (*q.shape[:2], turn.places.shape[2]))
        keys = turned(self.values(k), places, turn.rotation)
        return products.logits(q.astype(jnp.float32), keys)

    def mix(self, p: jax.Array, v: Packed) -> jax.Array:
        """Weights `p` [B, K, G, M] float32 times head-major values: [B, K, G, H] float32."""
        raise NotImplementedError

    def clipped(self, packed: Packed, x: jax.Array) -> jax.Array:
        """How many elements of each token of `x` [B, K, *, H] the codes of `packed` cannot reach:
        [B, *] int32.
        """
        return jnp.zeros((x.shape[0], *x.shape[2:-1]), jnp.int32)
