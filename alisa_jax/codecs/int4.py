"""`int4(group=64)`: asymmetric 4-bit codes, two to a byte, one range per token, kv head and group.

    x ~ scale (code - zero)
    scale = (max - min) / 15
    zero  = round(-min / scale)
    code  = round(x / scale + zero)

FlexGen compresses its cache this way (arXiv 2303.06865, Section 5: 4 bits, groups of 64 along the
channels); there a group stores its minimum and its scale in 16 bits each. Here the range is
extended to include 0, so the zero point is a code; the scale is bfloat16, rounded up. A kv head of
H channels and n = ceil(H / group) groups takes ceil(H / 2) + 3 n bytes, for K and for V.

Channel c shares its byte with channel c + ceil(H / 2), in the upper half. Attention decodes tile by
tile (`codecs/codes.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import flax
import jax
import jax.numpy as jnp

from alisa_jax.codecs import codes as products
from alisa_jax.codecs.base import NO_ROTATION, Asked, Codec, Rotation
from alisa_jax.codecs.raw import Raw
from alisa_jax.codecs.tokenwise import TokenWise

LEVELS = 15.0


@dataclass(frozen=True)
class Int4(Asked):
    """The spec; `resolve` gives the codec of a model. group: channels that share a range."""

    group: int = 64

    def __post_init__(self):
        if self.group < 1:
            raise ValueError(f"group must be at least 1 channel; got {self.group}")

    def resolve(self, dtype, rotation: Rotation = NO_ROTATION) -> Codec:
        """The codec for a model that computes in `dtype`."""
        return GroupInt4(Raw().resolve(dtype), self.group)


@flax.struct.dataclass
class GroupCodes:
    """Encoded tokens, in either layout."""

    codes: jax.Array  # [..., ceil(H / 2)] uint8
    scale: jax.Array  # [..., n] bfloat16
    zero: jax.Array  # [..., n] int8, 0 .. 15
    channels: int = flax.struct.field(pytree_node=False)  # H


@dataclass(frozen=True)
class GroupInt4(TokenWise):
    """See above; `raw` is the type to which values are rounded first."""

    raw: Raw
    group: int

    def token_bytes(self, K: int, H: int) -> float:
        return 2.0 * K * (-(-H // 2) + 3 * -(-H // self.group))

    def codes_of(self, x) -> GroupCodes:
        x = self.raw.rounded(x)
        H = x.shape[-1]
        # padded by 0, which every range includes
        grouped = _padded(x, self.group).reshape(*x.shape[:-1], -1, self.group)
        low = jnp.minimum(grouped.min(-1), jnp.float32(0.0))
        high = jnp.maximum(grouped.max(-1), jnp.float32(0.0))
        step = jnp.maximum((high - low) / LEVELS, jnp.float32(products.TINY))
        scale = (step * (1 + 2.0**-8)).astype(jnp.bfloat16)  # this step or the next above it
        wide = scale.astype(jnp.float32)
        zero = jnp.clip(jnp.round(-low / wide), 0, LEVELS)
        code = jnp.clip(jnp.round(x / self._wide(wide, H) + self._wide(zero, H)), 0, LEVELS)
        lower, upper = jnp.split(_padded(code.astype(jnp.uint8), 2), 2, axis=-1)
        return GroupCodes(lower | (upper << 4), scale, zero.astype(jnp.int8), H)

    def values(self, packed):
        return self._values(packed.channels)(*self.leaves(packed))

    def logits(self, q, k):
        return products.logits_of(q.astype(jnp.float32), self.leaves(k), self._values(k.channels))

    def mix(self, p, v):
        return products.mix_of(p, self.leaves(v), v.channels, self._values(v.channels))

    def _values(self, H: int):
        """The values that leaves [..., *] stand for: [..., H] float32."""

        def values(codes, scale, zero):
            both = jnp.concatenate([codes & 15, codes >> 4], axis=-1)[..., :H].astype(jnp.float32)
            shifted = both - self._wide(zero.astype(jnp.float32), H)
            return shifted * self._wide(scale.astype(jnp.float32), H)

        return values

    def _wide(self, x, H: int):
        """x [..., n] for each of the H channels of its groups."""
        size = x.shape[-1] * self.group
        return jnp.repeat(x, self.group, axis=-1, total_repeat_length=size)[..., :H]


def _padded(x: jax.Array, size: int) -> jax.Array:
    """x with zeros behind its last axis, up to a multiple of `size`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
