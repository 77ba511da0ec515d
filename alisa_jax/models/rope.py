"""Rotary positions (arXiv 2104.09864, section 3.2.2) in the layout of Hugging Face LLaMA checkpoints.

Dimension i of the first half of a head is paired with dimension i of the second half, and the pair is turned
by position * theta ** (-2 i / H). Angles, sines and the rotation itself are float32: a bfloat16 position is
wrong by whole tokens beyond 256.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.models.config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per token of each pair, float64 [H / 2]; computed outside jit."""
    freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
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
) -> jax.Array:
    """x turned by its positions: [B, T, N, H] in the type of x; the work is float32."""
    freq = jnp.asarray(inverse_frequencies(x.shape[-1], theta, scaling), jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * freq[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
