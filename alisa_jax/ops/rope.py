"""Rotary positions (arXiv 2104.09864, 3.2.2) in the layout of Hugging Face LLaMA and GPT-NeoX.

The leading R channels of a head are rotated, all H of them or a part: channel i of their first half
is paired with channel i of their second half, and the pair is rotated by

    position * theta ** (-2 i / R)

Angles, sines and the rotation itself are float32: a bfloat16 position is wrong by whole tokens
beyond 256.

A rotary model makes logits from differences of positions alone. Keys that are stored before their
rotation can thus be placed anew at every step (StreamingLLM), and are quantised without the
rotation that mixes their channels (SKVQ).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROPE_SCALINGS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor` (position interpolation, arXiv 2306.15595, section
    3.2). `llama3` goes by wavelength:

        above original_max_positions / low_freq_factor     divided by `factor`
        below original_max_positions / high_freq_factor    unchanged
        between                                            frequencies are interpolated linearly in
                                                           original_max_positions / wavelength

    `yarn` (arXiv 2309.00071, section 3.2) goes by the index of the pair: from the pair that makes
    `beta_fast` turns within original_max_positions to the one that makes `beta_slow`, rounded
    outwards with `truncate`, the share that is divided by `factor` grows linearly from 0 to 1. The
    rotated channels of q and k are multiplied by `attention_factor` (section 3.3).

    Raises ValueError for a value out of its range.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_positions: int = 8192  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn
    truncate: bool = True  # yarn

    def __post_init__(self):
        if self.kind not in ROPE_SCALINGS:
            raise ValueError(
                f"rope scaling is {self.kind!r}; allowed are {', '.join(ROPE_SCALINGS)}."
            )
        if not self.factor > 0:
            raise ValueError(f"rope scaling factor is {self.factor}; it must be above 0.")
        if self.kind != "linear" and self.original_max_positions < 1:
            raise ValueError(
                f"rope scaling has original_max_positions={self.original_max_positions}; it "
                "must be at least 1."
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope scaling has low_freq_factor={self.low_freq_factor} and "
                f"high_freq_factor={self.high_freq_factor}; they must be above 0 and in this order."
            )
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"rope scaling has beta_slow={self.beta_slow} and beta_fast={self.beta_fast}; they "
                "must be above 0 and in this order."
            )
        if not self.attention_factor > 0 or (self.kind != "yarn" and self.attention_factor != 1):
            raise ValueError(
                f"rope scaling {self.kind} has attention_factor={self.attention_factor}; it must "
                f"be {'above 0' if self.kind == 'yarn' else '1'}."
            )


def inverse_frequencies(dims: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per token of each pair of `dims` channels, float64 [dims / 2].

    Computed outside jit.
    """
    freq = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    if scaling.kind == "llama3":  # by full turns within the trained context
        turns = scaling.original_max_positions * freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: unchanged; 0: divided
    else:
        keep = 1.0 - np.clip(_ramp(dims, theta, scaling), 0.0, 1.0)
    return freq * (keep + (1.0 - keep) / scaling.factor)


def _ramp(dims: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Of each pair: 0 at the one that makes `beta_fast` turns, 1 at the one of `beta_slow`."""

    def pair(turns: float) -> float:
        return dims * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / wide

    wide = 2 * math.log(theta)
    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    return (np.arange(dims // 2) - first) / ((last - first) or 0.001)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How a model rotates q and k: channels c and c + len(angles) by angles[c] radians a position.

    Channels beyond the pairs stay as they are.
    """

    angles: tuple[float, ...]
    positions: int  # of the longest context
    gain: float = 1.0  # multiplies rotated channels: `RopeScaling.attention_factor`

    @classmethod
    def of(
        cls, dims: int, theta: float, positions: int, scaling: RopeScaling | None = None
    ) -> Rotation:
        """The rotation of the leading `dims` channels by powers of `theta`."""
        angles = tuple(inverse_frequencies(dims, theta, scaling).tolist())
        return cls(angles, positions, 1.0 if scaling is None else scaling.attention_factor)


NO_ROTATION = Rotation((), 0)


class Turn(NamedTuple):
    """Where keys that are stored before their rotation are to be rotated to."""

    places: jax.Array  # [B, P, M] int32
    rotation: Rotation


def rotate(x: jax.Array, positions: jax.Array, rotation: Rotation) -> jax.Array:
    """x [..., H] rotated to `positions` [...] int32: [..., H] in the type of x.

    Axes of positions are as long as those of x, or 1. Worked in float32.
    """
    half = len(rotation.angles)
    if not half:
        return x
    cos, sin = sines(positions, rotation)
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    pieces = [first * cos - second * sin, second * cos + first * sin]
    pieces = [piece.astype(x.dtype) for piece in pieces]
    return jnp.concatenate([*pieces, x[..., 2 * half :]], axis=-1)


def sines(positions: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each pair's angle at positions [...], times the gain.

    Both [..., R / 2] float32.
    """
    angles = np.asarray(rotation.angles, np.float32).reshape((1,) * positions.ndim + (-1,))
    angle = positions.astype(jnp.float32)[..., None] * angles
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if rotation.gain == 1 else (rotation.gain * cos, rotation.gain * sin)


def apply_gain(x: jax.Array, rotation: Rotation) -> jax.Array:
    """x [..., H] with the gain of `rotation` and nothing else of it: position 0."""
    R = 2 * len(rotation.angles)
    if not R or rotation.gain == 1:
        return x
    head = x[..., :R].astype(jnp.float32) * rotation.gain
    return jnp.concatenate([head.astype(x.dtype), x[..., R:]], axis=-1)
