"""The contract of a codec: how one token's K or V is stored, and how attention reads it.

A codec packs arrays [..., H] into a pytree, in two layouts (`ops/rows.py`): "slots" is head-major
[B, K, M, H], "tokens" is token-major [B, S, K, H]. Encoding and moving are kept apart:
`encode_token` and `fill` encode values; `write_slot`, `write_token`, `take` and `copy_in` move
codes, bit for bit, so no token is encoded twice. `logits` and `mix` are the two products of
attention, into which a quantised codec folds its scales.

Some codecs must see tokens before they can encode (`frozen_after` > 0). A sequence then begins in a
packed form that holds raw values. Once it has `frozen_after` tokens, `freeze` encodes them, and
from there on all tokens are codes. Methods take either form.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax.ops import products
from alisa_jax.ops.rope import NO_ROTATION, Rotation, Turn, rotate

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
    """Packed rows as arrays that a kernel reads: values, or codes c of (c - zero) * scale."""

    axis: Literal["token", "channel"] | None  # has a scale each; None: values
    codes: jax.Array  # the shape of the packed rows
    scale: jax.Array | None = None  # "token": without the channels; "channel": without the tokens
    zero: jax.Array | None = None  # the shape of scale


class Asked:
    """The spec of a codec: a frozen dataclass whose `resolve` gives the codec of a model.

    `resolve(dtype, rotation)` takes the type in which the model computes. A codec that needs
    neither is its own spec.
    """

    raw_keys: ClassVar[bool] = False  # stores keys before their rotation (`turned_logits`)
    calibrates: ClassVar[bool] = False  # `resolve` also takes calibration= and config=


class Codec(Asked):
    """Base of all codecs: frozen dataclasses of pure methods."""

    crops: ClassVar[bool] = True  # the last tokens can be taken back (`KVState.crop`)

    def for_layer(self, layer: int) -> Codec:
        """The codec of layer `layer`, counted from 0."""
        return self

    def refuses(self, policy, route: str) -> str | None:
        """Why this codec cannot serve `policy` on `route`, in one sentence; None if it can."""
        return None

    @property
    def frozen_after(self) -> int:
        """Tokens of a sequence that stay raw until `freeze`; 0: each is encoded as it comes.

        If it is not 0, the field `raw` is the codec of those tokens.
        """
        return 0

    def token_bytes(self, K: int, H: int) -> float:
        """Bytes of K and V that each token adds in one layer and one home."""
        raise NotImplementedError

    def sequence_bytes(self, K: int, H: int) -> float:
        """Bytes of K and V per sequence in one layer and one home, whatever its length."""
        return 0.0

    def empty(self, shape: tuple[int, ...], layout: Layout, side: Side) -> Packed:
        """Packed zeros of `shape`: [B, K, M, H] for "slots", [B, S, K, H] for "tokens"."""
        raise NotImplementedError

    def grow(self, packed: Packed, size: int, layout: Layout) -> Packed:
        """`packed` with its token axis extended to `size`."""
        raise NotImplementedError

    def fill(self, packed: Packed, x: jax.Array, layout: Layout) -> Packed:
        """Encode a whole prompt of at least `frozen_after` tokens.

        `x` has the layout and shape of the empty `packed`.
        """
        raise NotImplementedError

    def upto(self, packed: Packed, x: jax.Array, length: jax.Array, layout: Layout) -> Packed:
        """`packed`, filled from x, as it is after only the first `length` [B] tokens of x."""
        return packed

    def freeze(self, packed: Packed, layout: Layout) -> Packed:
        """Encode the tokens that are still raw."""
        return packed

    def encode_token(self, packed: Packed, x: jax.Array) -> Packed:
        """Codes of one new token, `x` [B, K, H], for `packed` and every other home of its layer.

        They are head-major, of one token, and may hold what the token changes for its sequence.
        """
        raise NotImplementedError

    def write_slot(self, packed: Packed, codes: Packed, slot: jax.Array) -> Packed:
        """Write the codes of one new token into `slot` [B, P] of a head-major array."""
        return self.copy_in(packed, codes, slot[:, :, None])

    def write_token(self, packed: Packed, codes: Packed, pos: jax.Array) -> Packed:
        """Write the codes of one new token at position `pos` [B] of a token-major array."""
        raise NotImplementedError

    def take(self, packed: Packed, pos: jax.Array) -> Packed:
        """Codes of tokens `pos` [B, P, E] of a token-major array, head-major with E tokens."""
        raise NotImplementedError

    def copy_in(self, packed: Packed, codes: Packed, slot: jax.Array) -> Packed:
        """Copy head-major `codes` of E tokens into `slot` [B, P, E] of a head-major array."""
        raise NotImplementedError

    def slice_tokens(self, packed: Packed, start: jax.Array, size: int) -> Packed:
        """Codes of tokens start .. start+size-1 of a token-major array, head-major."""
        raise NotImplementedError

    def leaves(self, packed: Packed) -> tuple[jax.Array, ...]:
        """The arrays of `packed` that have a token axis: together, the rows of tokens."""
        raise NotImplementedError

    def rebuild(self, packed: Packed, leaves: tuple[jax.Array, ...]) -> Packed:
        """`packed` with the rows `leaves`; what belongs to a whole sequence stays."""
        raise NotImplementedError

    def seated(self, packed: Packed, home: Packed, pos: jax.Array) -> Packed:
        """Head-major `packed` with rows of the tokens `pos` [B, P, M] (-1: none) in its slots.

        home: another packed form of the layer that has seen the same tokens. For codecs that keep
        of some tokens more than their rows: `rebuild` does not know whose rows it is given.
        """
        return packed

    def encode(self, packed: Packed, x: jax.Array, layout: Layout) -> tuple[jax.Array, ...]:
        """Leaves of the rows of tokens `x`, in `layout`, for a `packed` without raw rows."""
        raise NotImplementedError

    def content(self, packed: Packed) -> Content | None:
        """The arrays of `packed` for kernels; None: only XLA reads this codec."""
        return None

    def logits(self, q: jax.Array, k: Packed) -> jax.Array:
        """`q` [B, K, G, H], scaled, against head-major keys: [B, K, G, M] float32."""
        raise NotImplementedError

    def values(self, packed: Packed) -> jax.Array:
        """The values of head-major `packed`: [B, K, M, H] float32."""
        raise NotImplementedError

    def turned_logits(self, q: jax.Array, k: Packed, turn: Turn) -> jax.Array:
        """As `logits`, against keys stored before their rotation, each rotated to its place."""
        keys = rotate(self.values(k), turn.places, turn.rotation)
        return products.logits(q.astype(jnp.float32), keys)

    def mix(self, p: jax.Array, v: Packed) -> jax.Array:
        """Weights `p` [B, K, G, M] float32 times head-major values: [B, K, G, H] float32."""
        raise NotImplementedError

    def clipped(self, packed: Packed, x: jax.Array) -> jax.Array:
        """Elements of each token of `x` [B, K, *, H] beyond the codes of `packed`: [B, *] int32."""
        return jnp.zeros((x.shape[0], *x.shape[2:-1]), jnp.int32)
