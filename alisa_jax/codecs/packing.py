"""Small codes in bytes: n codes of b bits take n b / 8 bytes, five codes of three levels take one.

    bits      1   2   3     4   5     6     7       8   16
    fields    1   2   2+1   4   4+1   4+2   4+2+1   8   8+8

A width that does not divide 8 is cut into fields that do, low bits first. Within a field of w bits
m = ceil(n w / 8) bytes hold the codes: code c lies in byte c mod m, shifted by w (c // m), so that
unpacking is shifts of whole arrays.

"1.5 bits" are three levels, log2 3 = 1.585 bits of information. Five digits to base 3 take 243 of
the 256 values of a byte, which is 1.6 bits each.
"""

from __future__ import annotations

from types import MappingProxyType

import jax
import jax.numpy as jnp

TERNARY = 1.5
_DIGITS = 5  # of base 3 in a byte
_FIELDS = MappingProxyType(
    {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,), 16: (8, 8)}
)
BITS = (TERNARY, *_FIELDS)


def steps(bits: float) -> int:
    """Q: the greatest code; codes are 0 .. Q."""
    return 2 if bits == TERNARY else 2 ** int(bits) - 1


def packed_bytes(bits: float, n: int) -> int:
    """Bytes of n codes."""
    if bits == TERNARY:
        return -(-n // _DIGITS)
    return sum(-(-n * width // 8) for width in _FIELDS[bits])


def pack(codes: jax.Array, bits: float) -> jax.Array:
    """codes [..., n] uint16, each 0 .. Q -> [..., packed_bytes(bits, n)] uint8."""
    if bits == TERNARY:
        digits = enumerate(_cut(codes, _DIGITS))
        return _sum([digit * 3**i for i, digit in digits]).astype(jnp.uint8)
    fields, low = [], 0
    for width in _FIELDS[bits]:
        field = (codes >> low) & (2**width - 1)
        fields.append(_sum([part << (width * i) for i, part in enumerate(_cut(field, 8 // width))]))
        low += width
    return jnp.concatenate(fields, axis=-1).astype(jnp.uint8)


def unpack(packed: jax.Array, bits: float, n: int) -> jax.Array:
    """The n codes of `packed` [..., packed_bytes(bits, n)] uint8: [..., n] float32."""
    if bits == TERNARY:
        digits = [packed // 3**i % 3 for i in range(_DIGITS)]
        return jnp.concatenate(digits, axis=-1)[..., :n].astype(jnp.float32)
    parts = []
    first = 0
    low = 0
    for width in _FIELDS[bits]:
        size = -(-n * width // 8)
        field = packed[..., first : first + size]
        codes = jnp.concatenate(
            [(field >> (width * i)) & (2**width - 1) for i in range(8 // width)], axis=-1
        )
        parts.append(codes[..., :n].astype(jnp.float32) * jnp.float32(2**low))
        first, low = first + size, low + width
    return _sum(parts)


def _cut(codes: jax.Array, parts: int) -> list[jax.Array]:
    """codes [..., n], padded with zeros, as `parts` arrays [..., ceil(n / parts)]."""
    padded = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % parts)])
    return jnp.split(padded, parts, axis=-1)


def _sum(arrays: list[jax.Array]) -> jax.Array:
    first, *others = arrays
    for other in others:
        first = first + other
    return first
