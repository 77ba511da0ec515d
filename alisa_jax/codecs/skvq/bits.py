"""Tokens as codes with a scale and a lower end per group of channels, as SKVQ stores them.

With Q = 2^b - 1 (2 for 1.5 bits), clip ratio a, and group by group of the channels of a token,

    lo   = a min x
    hi   = a max x
    s    = max((hi - lo) / Q, 1e-5)
    code = round(clip((x - lo) / s, 0, Q))
    x^   = s code + lo

a multiplies both ends, so the range shrinks towards zero. Codes are made with s and lo in float32,
and read with s and lo as they are stored ("float8" is e4m3), as in the authors' code. There an end
beyond 448 becomes NaN in float8; here it is 448.

Codes lie in the order of the channels of the model, each head's by themselves, so a head that keeps
other tokens moves them alone; only scales and lower ends go by group. On a CPU attention decodes
tiles that hold all heads of some tokens (`codecs/codes.py`), since heads share scales and the
angles of a rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax.codecs import codes as products
from alisa_jax.codecs import packing
from alisa_jax.codecs.raw import Raw
from alisa_jax.codecs.skvq.groups import Groups
from alisa_jax.ops.rope import Turn, sines

PARAMS = MappingProxyType({"float8": "float8_e4m3fn", "bfloat16": "bfloat16", "float32": "float32"})
_LEAST_STEP = 1e-5
_ONE_HOT = 32  # groups up to which, on a CPU, a one-hot product is faster than a gather


class Rows(NamedTuple):
    """Encoded tokens: [..., K or U, *], in either layout once the token axis has its place."""

    codes: jax.Array  # [..., K, packed bytes of H codes] uint8
    scale: jax.Array  # [..., U, groups]
    low: jax.Array  # [..., U, groups]


@dataclass(frozen=True)
class GroupBits:
    """The equations above for one of K and V. raw: the type to which values are rounded first."""

    raw: Raw
    bits: float
    groups: Groups
    clip: float
    params: str

    def token_bytes(self, K: int, H: int) -> int:
        """Bytes of a token: codes, scales and lower ends."""
        ranges = self.groups.units(K) * self.groups.count(K, H)
        codes_bytes = K * packing.packed_bytes(self.bits, H)
        return codes_bytes + 2 * ranges * jnp.dtype(PARAMS[self.params]).itemsize

    def encode(self, x: jax.Array) -> Rows:
        """Rows of x [..., K, H]."""
        scale, low = self._range(x)
        codes = jnp.clip(self._nearest(x, scale, low), 0, packing.steps(self.bits))
        packed = packing.pack(codes.astype(jnp.uint16), self.bits)
        return Rows(packed, self._stored(scale), self._stored(low))

    def clipped(self, x: jax.Array) -> jax.Array:
        """The number of elements of x [..., K, H] outside the clipped range: [...] int32."""
        code = self._nearest(x, *self._range(x))
        outside = (code < 0) | (code > packing.steps(self.bits))
        return jnp.sum(outside, axis=(-2, -1), dtype=jnp.int32)

    def _range(self, x) -> tuple[jax.Array, jax.Array]:
        """Unrounded scale and lower end of the groups of x [..., K, H]: [..., U, groups] float32.

        The bounds of the ends also keep a compiler from fusing a product with the difference that
        follows: codes are then the same in every program.
        """
        members = self.groups.members(*x.shape[-2:])
        grouped = self.raw.rounded(x).reshape(*x.shape[:-2], -1)[..., members]
        most = jnp.finfo(PARAMS[self.params]).max.astype(jnp.float32)
        least = grouped.min(-1)
        greatest = grouped.max(-1)
        low = jnp.clip(least * jnp.float32(self.clip), -most, most)
        high = jnp.clip(greatest * jnp.float32(self.clip), -most, most)
        return jnp.maximum((high - low) / packing.steps(self.bits), jnp.float32(_LEAST_STEP)), low

    def _nearest(self, x, scale, low):
        """The whole number nearest to each element of x [..., K, H], float32, not clipped."""
        K, H = x.shape[-2:]
        U, n = scale.shape[-2:]
        # numbered through all units
        group = self.groups.of(K, H) + n * (jnp.arange(K, dtype=jnp.int32) % U)[:, None]

        def by_element(y):
            return y.reshape(*y.shape[:-2], U * n)[..., group]

        scale = by_element(scale)
        low = by_element(low)
        return jnp.round((self.raw.rounded(x) - low) / scale)

    def _stored(self, x):
        dtype = jnp.dtype(PARAMS[self.params])
        most = jnp.finfo(dtype).max.astype(jnp.float32)
        return jnp.clip(x, -most, most).astype(dtype)

    def values(self, rows: Rows, K: int, H: int) -> jax.Array:
        """The values of head-major rows: [B, K, M, H] float32."""
        return self._values(H)(*self._operands(rows, K, H))

    def logits(self, q: jax.Array, rows: Rows, turn: Turn | None) -> jax.Array:
        """q [B, K, G, H] float32 against rows rotated by `turn`: [B, K, G, M] float32."""
        K, H = q.shape[1], q.shape[3]
        operands, values = self._operands(rows, K, H), self._values(H)
        if turn is None or not turn.rotation.angles:
            return products.logits_of(q, operands, values, whole_tokens=True)
        operands = (*operands, turn.places[..., None])

        def placed(*tiles):
            return _turned(values(*tiles[:-1]), *sines(tiles[-1][..., 0], turn.rotation))

        return products.logits_of(q, operands, placed, whole_tokens=True)

    def mix(self, p: jax.Array, rows: Rows, H: int) -> jax.Array:
        """p [B, K, G, M] float32 times head-major rows: [B, K, G, H] float32."""
        operands = self._operands(rows, p.shape[1], H)
        return products.mix_of(p, operands, H, self._values(H), whole_tokens=True)

    def _operands(self, rows: Rows, K: int, H: int) -> tuple[jax.Array, ...]:
        """The rows and each channel's group: arrays [B or 1, K or 1, M or 1, *].

        `_values` takes tiles of them.
        """
        return *rows, jnp.asarray(self.groups.of(K, H))[None, :, None]

    def _values(self, H: int):
        """The values [..., M, H] of tiles of `_operands`, whose axes broadcast."""

        def values(codes, scale, low, group):
            code = packing.unpack(codes, self.bits, H)
            scale = _spread(scale.astype(jnp.float32), group)
            low = _spread(low.astype(jnp.float32), group)
            return code * scale + low

        return values


def _spread(x: jax.Array, group: jax.Array) -> jax.Array:
    """x [..., M, groups] float32 at the group group[..., 0, c] of each channel c: [..., M, H].

    Other axes broadcast.
    """
    n = x.shape[-1]
    if n == 1:
        return x
    if n > _ONE_HOT:
        shape = (*jnp.broadcast_shapes(x.shape[:-1], group.shape[:-1]), group.shape[-1])
        at = jnp.broadcast_to(group, shape)
        return jnp.take_along_axis(x, at, axis=-1, mode="promise_in_bounds")
    number = jnp.arange(n, dtype=jnp.int32).reshape((1,) * (group.ndim - 2) + (n, 1))
    member = number == group  # [..., n, H]
    return jnp.matmul(x, member.astype(jnp.float32), precision="highest")


def _turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """As `rope.rotate`, x [..., H] float32 by angles [..., R / 2] whose axes broadcast.

    Two products of full width, behind a barrier: else the compiler, on a CPU, would compute values
    and sines again for every head and half.
    """
    half = cos.shape[-1]
    shape = (*cos.shape[:-1], x.shape[-1] - 2 * half)
    cos = jnp.concatenate([cos, cos, jnp.ones(shape, jnp.float32)], axis=-1)
    sin = jnp.concatenate([-sin, sin, jnp.zeros(shape, jnp.float32)], axis=-1)
    x, cos, sin = jax.lax.optimization_barrier((x, cos, sin))
    other = jnp.concatenate([x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]], axis=-1)
    return x * cos + other * sin
