"""Turning keys that are stored before their rotation to the places where a query is to see them.

A rotary model makes logits from differences of positions alone. Keys that are stored as the projection gave them can thus be
placed anew at every step (StreamingLLM), and are quantised without the rotation that mixes their channels (SKVQ).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """How a model turns its keys: pair c of H channels, (c, c + len(angles)), by angles[c] radians a position."""

    angles: tuple[float, ...]
    positions: int  # of the longest context


NO_ROTATION = Rotation((), 0)


class Turn(NamedTuple):
    """Keys at hand that are still to be turned, each to its place."""

    places: jax.Array  # [B, P, M] int32
    rotation: Rotation


def turned(x: jax.Array, places: jax.Array, rotation: Rotation) -> jax.Array:
    """x [..., H] turned by its places [...] int32: pair (c, c + R / 2) of the leading R channels by places * angles[c].

    Worked in float32, as `models.rope.rotate` does; the result has the type of x.
    """
    half = len(rotation.angles)
    if not half:
        return x
    cos, sin = sines(places, rotation)
    wide = x.astype(jnp.float32)
    first, second = wide[..., :half], wide[..., half : 2 * half]
    pieces = [first * cos - second * sin, second * cos + first * sin, wide[..., 2 * half :]]
    return jnp.concatenate(pieces, axis=-1).astype(x.dtype)


def sines(places: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angle of each pair at places [...] int32: [..., R / 2] float32 each."""
    angles = jnp.asarray(rotation.angles, jnp.float32).reshape((1,) * places.ndim + (-1,))
    angle = places.astype(jnp.float32)[..., None] * angles
    return jnp.cos(angle), jnp.sin(angle)
