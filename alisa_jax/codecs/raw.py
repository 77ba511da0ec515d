"""`raw(dtype=)`: K and V without quantisation."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from alisa_jax.codecs.base import NO_ROTATION, TOKEN_AXIS, Codec, Content, Rotation
from alisa_jax.ops import products, rows

_DTYPES = ("model", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Raw(Codec):
    """K and V in `dtype` ("model": that of the model); packed is one array."""

    dtype: str = "model"

    def __post_init__(self):
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {self.dtype!r}")

    def resolve(self, dtype, rotation: Rotation = NO_ROTATION) -> Raw:
        """This codec with "model" replaced by the model's own `dtype`."""
        return Raw(jnp.dtype(dtype).name) if self.dtype == "model" else self

    def rounded(self, x: jax.Array) -> jax.Array:
        """`x` rounded to the stored type, as float32."""
        return x.astype(jnp.dtype(self.dtype)).astype(jnp.float32)

    def token_bytes(self, K: int, H: int) -> float:
        return 2.0 * K * H * jnp.dtype(self.dtype).itemsize

    def empty(self, shape, layout, side):
        return jnp.zeros(shape, jnp.dtype(self.dtype))

    def grow(self, packed, size, layout):
        return rows.pad_axis(packed, TOKEN_AXIS(layout), size, 0)

    def fill(self, packed, x, layout):
        return x.astype(packed.dtype)

    def encode_token(self, packed, x):
        return x.astype(packed.dtype)[:, :, None]

    def write_token(self, packed, codes, pos):
        return rows.put_tokens(packed, codes[:, :, 0], pos)

    def take(self, packed, pos):
        return rows.take_tokens(packed, pos)

    def copy_in(self, packed, codes, slot):
        return rows.put_slots(packed, codes, slot)

    def slice_tokens(self, packed, start, size):
        return rows.slice_tokens(packed, start, size)

    def leaves(self, packed):
        return (packed,)

    def rebuild(self, packed, leaves):
        return leaves[0]

    def encode(self, packed, x, layout):
        return (x.astype(packed.dtype),)

    def content(self, packed):
        return Content(None, packed)

    def values(self, packed):
        return packed.astype(jnp.float32)

    def logits(self, q, k):
        return products.logits(q.astype(k.dtype), k)

    def mix(self, p, v):
        return products.mix(p.astype(v.dtype), v)
