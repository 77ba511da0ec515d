"""int8 with one scale and zero point per channel, kv head and sequence, frozen after some tokens.

A sequence begins raw and records the range of each channel. After `frozen_after` tokens the range
is widened by `headroom`, everything is encoded, and later values outside the range are clipped
(`clipped` counts them). Equations: `codecs/int8.py`.

Keys carry their position. A pair of channels is

    r (cos u, sin u)              at one position
    r (cos(u + w), sin(u + w))    at another, where w is the pair's angle times the distance

Slow pairs hardly turn over the first tokens, and turn far over a context, so the range of the first
tokens says little. Each of them is therefore counted over the whole arc that its pair would sweep
if the token stood anywhere in the context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax
import jax
import jax.numpy as jnp

from alisa_jax.codecs import codes as products
from alisa_jax.codecs.base import NO_ROTATION, TOKEN_AXIS, Codec, Content, Rotation
from alisa_jax.codecs.raw import Raw
from alisa_jax.ops import rows

# the smallest step of a constant channel, relative to its value: its codes stay exact in float32
_FINEST = 2.0**-16
_SHARE = 8  # one conversion is all that a tile needs


@flax.struct.dataclass
class ChannelCodes:
    """Encoded tokens, and what all tokens of a sequence share."""

    codes: jax.Array  # [B, K, M, H] or [B, S, K, H] int8
    scale: jax.Array  # [B, K, H] float32
    zero: jax.Array  # [B, K, H] float32, whole numbers


@flax.struct.dataclass
class Calibrating:
    """Raw tokens and the range that they have filled so far; low > high if there are none."""

    values: jax.Array  # [B, K, M, H] or [B, S, K, H]
    low: jax.Array  # [B, K, H] float32
    high: jax.Array  # [B, K, H] float32
    rotates: bool = flax.struct.field(pytree_node=False)  # keys


@dataclass(frozen=True)
class ChannelInt8(Codec):
    """See above. raw: the codec of the first tokens, and the type to which values are rounded."""

    raw: Raw
    calibration_tokens: int
    headroom: float
    rotation: Rotation = NO_ROTATION

    @property
    def frozen_after(self) -> int:
        return self.calibration_tokens

    def token_bytes(self, K: int, H: int) -> float:
        return 2.0 * K * H

    def sequence_bytes(self, K: int, H: int) -> float:
        return 16.0 * K * H

    def empty(self, shape, layout, side):
        B = shape[0]
        K = shape[2 if layout == "tokens" else 1]
        H = shape[3]
        nothing = jnp.full((B, K, H), jnp.inf, jnp.float32)
        return Calibrating(self.raw.empty(shape, layout, side), nothing, -nothing, side == "k")

    def grow(self, packed, size, layout):
        return _moved(packed, lambda x: rows.pad_axis(x, TOKEN_AXIS(layout), size, 0))

    def fill(self, packed, x, layout):
        axis, first = TOKEN_AXIS(layout), self.calibration_tokens
        if x.shape[axis] < first:
            raise ValueError(f"the range is frozen after {first} tokens; got {x.shape[axis]}")
        seen = self.raw.rounded(jax.lax.slice_in_dim(x, 0, first, axis=axis))
        low, high = self._extent(seen, packed.rotates)
        values = self.raw.fill(packed.values, x, layout)
        packed = packed.replace(values=values, low=low.min(axis), high=high.max(axis))
        return self.freeze(packed, layout)

    def freeze(self, packed, layout):
        if isinstance(packed, ChannelCodes):
            return packed
        scale, zero = _affine(packed.low, packed.high, self.headroom)
        values = self.raw.rounded(packed.values)
        wide_scale = jnp.expand_dims(scale, TOKEN_AXIS(layout))
        wide_zero = jnp.expand_dims(zero, TOKEN_AXIS(layout))
        return ChannelCodes(products.encode(values, wide_scale, wide_zero), scale, zero)

    def encode_token(self, packed, x):
        """As the base says; while a sequence is raw they hold its new range."""
        if isinstance(packed, ChannelCodes):
            codes = products.encode(self.raw.rounded(x), packed.scale, packed.zero)
            return packed.replace(codes=codes[:, :, None])
        low, high = self._extent(self.raw.rounded(x), packed.rotates)
        return packed.replace(
            values=x.astype(packed.values.dtype)[:, :, None],
            low=jnp.minimum(packed.low, low),
            high=jnp.maximum(packed.high, high),
        )

    def write_slot(self, packed, codes, slot):
        at = slot[:, :, None]
        return self._written(packed, codes, lambda old, new: rows.put_slots(old, new, at))

    def write_token(self, packed, codes, pos):
        return self._written(
            packed, codes, lambda old, new: rows.put_tokens(old, new[:, :, 0], pos)
        )

    def take(self, packed, pos):
        return _moved(packed, lambda x: rows.take_tokens(x, pos))

    def copy_in(self, packed, codes, slot):
        """As the base says; ranges travel with the rows: the result has those of `codes`."""
        (old,), (new,) = self.leaves(packed), self.leaves(codes)
        return self.rebuild(codes, (rows.put_slots(old, new, slot),))

    def slice_tokens(self, packed, start, size):
        return _moved(packed, lambda x: rows.slice_tokens(x, start, size))

    def leaves(self, packed):
        return (packed.values,) if isinstance(packed, Calibrating) else (packed.codes,)

    def rebuild(self, packed, leaves):
        return _moved(packed, lambda _: leaves[0])

    def encode(self, packed, x, layout):
        scale = jnp.expand_dims(packed.scale, TOKEN_AXIS(layout))
        zero = jnp.expand_dims(packed.zero, TOKEN_AXIS(layout))
        return (products.encode(self.raw.rounded(x), scale, zero),)

    def content(self, packed):
        if isinstance(packed, Calibrating):
            return self.raw.content(packed.values)
        return Content("channel", packed.codes, packed.scale, packed.zero)

    def values(self, packed):
        if isinstance(packed, Calibrating):
            return self.raw.values(packed.values)
        shifted = packed.codes.astype(jnp.float32) - packed.zero[:, :, None]
        return shifted * packed.scale[:, :, None]

    def logits(self, q, k):
        if isinstance(k, Calibrating):
            return self.raw.logits(q, k.values)
        folded = q.astype(jnp.float32) * k.scale[:, :, None]
        z = products.logits(folded, k.codes, _SHARE)
        return z - jnp.sum(folded * k.zero[:, :, None], axis=-1, keepdims=True)

    def mix(self, p, v):
        if isinstance(v, Calibrating):
            return self.raw.mix(p, v.values)
        offset = jnp.sum(p, axis=-1, keepdims=True) * v.zero[:, :, None]
        return (products.mix(p, v.codes, _SHARE) - offset) * v.scale[:, :, None]

    def clipped(self, packed, x):
        if isinstance(packed, Calibrating):
            return super().clipped(packed, x)
        B, K, H = packed.scale.shape
        shape = (B, K, *(1,) * (x.ndim - 3), H)
        scale = packed.scale.reshape(shape)
        zero = packed.zero.reshape(shape)
        code = products.nearest(self.raw.rounded(x), scale, zero)
        return jnp.sum(code != products.clamp(code), axis=(1, -1), dtype=jnp.int32)

    def _written(self, packed, codes, put):
        """One new token; a frozen range is each home's own, so that no step copies one."""
        if isinstance(packed, ChannelCodes):
            return packed.replace(codes=put(packed.codes, codes.codes))
        return codes.replace(values=put(packed.values, codes.values))

    def _extent(self, x, rotates: bool):
        """The range [low, high] of each channel of x [..., H].

        It is x itself or, if x `rotates`, all that its pair would sweep over the context.
        """
        half = len(self.rotation.angles) if rotates else 0
        a = x[..., :half]
        b = x[..., half : 2 * half]
        rest = x[..., 2 * half :]
        if not half:
            return x, x
        angle = jnp.asarray(self.rotation.angles, jnp.float32).reshape(
            (1,) * (x.ndim - 1) + (half,)
        )
        back, ahead = angle * (self.calibration_tokens - 1), angle * self.rotation.positions
        length, at = jnp.sqrt(a * a + b * b), jnp.arctan2(b, a)
        ranges = [_arc(length, at - turn - back, at - turn + ahead) for turn in (0.0, math.pi / 2)]
        return tuple(
            jnp.concatenate([first, second, rest], -1)
            for first, second in zip(*ranges, strict=True)
        )


def _arc(length, start, end):
    """Least and greatest value of length * cos(u) for u in [start, end]."""

    def passes(angle: float):
        turn = 2 * math.pi
        return jnp.floor((end - angle) / turn) >= jnp.ceil((start - angle) / turn)

    ends = jnp.cos(start), jnp.cos(end)
    low = jnp.where(passes(math.pi), jnp.float32(-1.0), jnp.minimum(*ends))
    high = jnp.where(passes(0.0), jnp.float32(1.0), jnp.maximum(*ends))
    return length * low, length * high


def _affine(low, high, headroom: float):
    """Scale and zero point, float32, of [low, high] widened by `headroom`; empty ranges are 0."""
    least = jnp.where(low > high, jnp.float32(0.0), low)
    greatest = jnp.where(low > high, jnp.float32(0.0), high)
    more = (greatest - least) * (headroom / 2)
    low = least - more
    high = greatest + more
    finest = jnp.maximum(jnp.abs(low), jnp.abs(high)) * _FINEST
    scale = jnp.maximum(
        jnp.maximum((high - low) / products.LEVELS, finest), jnp.float32(products.TINY)
    )
    return scale, jnp.round(-low / scale) - 128


def _moved(packed, move):
    """Apply `move` to the array that has a token axis."""
    if isinstance(packed, Calibrating):
        return packed.replace(values=move(packed.values))
    return packed.replace(codes=move(packed.codes))
