"""Rotary positions (arXiv 2104.09864, section 3.2.2) in the layout of Hugging Face LLaMA and GPT-NeoX checkpoints.

The leading R channels of a head are rotated, all H of them or a part: channel i of their first half is paired with
channel i of their second half, and the pair is turned by position * theta ** (-2 i / R). Angles, sines and the
rotation itself are float32: a bfloat16 position is wrong by whole tokens beyond 256.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.models.config import RopeScaling


def inverse_frequencies(dims: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per token of each pair of `dims` channels, float64 [dims / 2]; computed outside jit."""
    freq = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    turns = scaling.original_max_positions * freq / (2 * math.pi)  # full turns within the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: fast, unchanged; 0: slow, divided
    return freq * (keep + (1.0 - keep) / scaling.factor)


def rotate(
    x: jax.Array,  # [B, T, N, H]
    positions: jax.Array,  # [B, T] int32
    theta: float,
    scaling: RopeScaling | None = None,
    dims: int | None = None,  # R; None: all H channels
) -> jax.Array:
    """x with its leading `dims` channels turned by its positions: [B, T, N, H] in the type of x, worked in float32."""
    dims = x.shape[-1] if dims is None else dims
    freq = jnp.asarray(inverse_frequencies(dims, theta, scaling), jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * freq[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x[..., :dims].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., dims:]], axis=-1)
