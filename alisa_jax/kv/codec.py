"""How one token's K or V is stored, and how attention reads it without unpacking it.

A codec turns arrays [..., H] into a packed pytree and is used in two layouts (see `rows.py`): "slots" is head-major
[B, K, M, H], "tokens" is token-major [B, S, K, H]. Two kinds of move are kept apart: `write` encodes new values;
`take` and `put` move what is already encoded, bit for bit, so that exchanging tokens never encodes twice.
`logits` and `mix` are the two products of attention, where scales of a quantised codec are folded in.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from alisa_jax import spec
from alisa_jax.kv import rows

Packed = Any  # a pytree that only its codec looks into
Layout = Literal["slots", "tokens"]
_TOKEN_AXIS = MappingProxyType({"slots": 2, "tokens": 1})
_DTYPES = ("model", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Raw:
    """`raw(dtype=)`: K and V as they are, in `dtype` ("model": the dtype in which the model produced them)."""

    dtype: str = "model"

    def __post_init__(self):
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {self.dtype!r}")

    def resolve(self, dtype) -> Raw:
        """This codec with "model" replaced by the model's own `dtype`."""
        return Raw(jnp.dtype(dtype).name) if self.dtype == "model" else self

    def token_bytes(self, K: int, H: int) -> float:
        """Bytes of K and V of one token in one layer and one home."""
        return 2.0 * K * H * jnp.dtype(self.dtype).itemsize

    def empty(self, shape: tuple[int, ...], layout: Layout) -> Packed:
        """Packed zeros for `shape`, which is [B, K, M, H] for "slots" and [B, S, K, H] for "tokens"."""
        del layout
        return jnp.zeros(shape, jnp.dtype(self.dtype))

    def grow(self, packed: Packed, size: int, layout: Layout) -> Packed:
        """`packed` with its token axis extended to `size`."""
        return rows.pad_axis(packed, _TOKEN_AXIS[layout], size, 0)

    def fill(self, packed: Packed, x: jax.Array, layout: Layout) -> Packed:
        """Encode a whole prompt: `x` has the layout and shape of the empty array that `packed` is."""
        del layout
        return x.astype(packed.dtype)

    def write_slot(self, packed: Packed, x: jax.Array, slot: jax.Array) -> Packed:
        """Encode one new token, `x` [B, K, H], into `slot` [B, P] of a head-major array."""
        return rows.put_slots(packed, x.astype(packed.dtype)[:, :, None], slot[:, :, None])

    def write_token(self, packed: Packed, x: jax.Array, pos: jax.Array) -> Packed:
        """Encode one new token, `x` [B, K, H], at position `pos` [B] of a token-major array."""
        return rows.put_tokens(packed, x.astype(packed.dtype), pos)

    def take(self, packed: Packed, pos: jax.Array) -> Packed:
        """Codes of tokens `pos` [B, P, E] of a token-major array, as head-major rows [B, K, E, *]."""
        return rows.take_tokens(packed, pos)

    def put(self, packed: Packed, codes: Packed, slot: jax.Array) -> Packed:
        """Codes [B, K, E, *] copied into `slot` [B, P, E] of a head-major array."""
        return rows.put_slots(packed, codes, slot)

    def slice_tokens(self, packed: Packed, start: jax.Array, size: int) -> Packed:
        """Codes of tokens start .. start+size-1 of a token-major array, as head-major rows [B, K, size, *]."""
        page = jax.lax.dynamic_slice_in_dim(packed, start, size, axis=1)
        return jnp.swapaxes(page, 1, 2)

    def logits(self, q: jax.Array, k: Packed) -> jax.Array:
        """`q` [B, K, G, H] against head-major keys: [B, K, G, M] float32. The caller has scaled `q`."""
        return jnp.einsum("bkgh,bkmh->bkgm", q.astype(k.dtype), k, preferred_element_type=jnp.float32)

    def mix(self, p: jax.Array, v: Packed) -> jax.Array:
        """Weights `p` [B, K, G, M] float32 times head-major values: [B, K, G, H] float32."""
        return jnp.einsum("bkgm,bkmh->bkgh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)


CODECS = MappingProxyType({"raw": Raw})


def parse(text: str) -> Raw:
    """The codec that `text` names, for example 'raw' or 'raw(dtype=bfloat16)'. Raises `spec.SpecError`."""
    return spec.parse(text, CODECS)
