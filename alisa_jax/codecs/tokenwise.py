"""Base of codecs that encode each token by itself: its arrays lie and move together."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alisa_jax.codecs.base import TOKEN_AXIS, Codec, Packed
from alisa_jax.ops import rows


class TokenWise(Codec):
    """A codec that defines `codes_of`; packed is a dataclass of arrays [B, *, *, ...]."""

    def codes_of(self, x: jax.Array) -> Packed:
        """The packed form of x [..., H]: arrays [..., *]."""
        raise NotImplementedError

    def empty(self, shape, layout, side):
        like = jax.eval_shape(self.codes_of, jax.ShapeDtypeStruct(shape, jnp.float32))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def grow(self, packed, size, layout):
        return jax.tree.map(lambda x: rows.pad_axis(x, TOKEN_AXIS(layout), size, 0), packed)

    def fill(self, packed, x, layout):
        return self.codes_of(x)

    def encode_token(self, packed, x):
        return self.codes_of(x[:, :, None])

    def write_token(self, packed, codes, pos):
        return jax.tree.map(lambda old, new: rows.put_tokens(old, new[:, :, 0], pos), packed, codes)

    def take(self, packed, pos):
        return jax.tree.map(lambda x: rows.take_tokens(x, pos), packed)

    def copy_in(self, packed, codes, slot):
        return jax.tree.map(lambda old, new: rows.put_slots(old, new, slot), packed, codes)

    def slice_tokens(self, packed, start, size):
        return jax.tree.map(lambda x: rows.slice_tokens(x, start, size), packed)

    def leaves(self, packed):
        return tuple(jax.tree.leaves(packed))

    def rebuild(self, packed, leaves):
        return jax.tree.unflatten(jax.tree.structure(packed), leaves)

    def encode(self, packed, x, layout):
        return self.leaves(self.codes_of(x))
