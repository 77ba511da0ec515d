"""The codecs by name."""

from __future__ import annotations

from types import MappingProxyType

from alisa_jax import spec
from alisa_jax.codecs.base import NO_ROTATION, Asked, Codec, Packed, Rotation
from alisa_jax.codecs.int4 import Int4
from alisa_jax.codecs.int8 import Int8
from alisa_jax.codecs.raw import Raw
from alisa_jax.codecs.skvq import Skvq

__all__ = [
    "CODECS",
    "NO_ROTATION",
    "Asked",
    "Codec",
    "Int4",
    "Int8",
    "Packed",
    "Raw",
    "Rotation",
    "Skvq",
    "parse",
]

CODECS = MappingProxyType({"raw": Raw, "int8": Int8, "int4": Int4, "skvq": Skvq})


def parse(text: str) -> Asked:
    """The spec that `text` names, for example 'raw' or 'int8(axis=token)', still to be resolved.

    Raises `spec.SpecError`.
    """
    return spec.parse(text, CODECS)
