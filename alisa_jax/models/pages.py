"""Weights on large pages: a decode step reads them all, and a CPU looks up each small page."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

_ALIGNED_BYTES = 64  # of an array that JAX takes as it lies


def on_large_pages(params: Any) -> Any:
    """`params` in one block of memory where the default device is a CPU.

    NumPy asks the system for large pages for a block of some MiB, and JAX keeps the arrays where
    they are, one behind the other. On any other device `params` is returned as it is. While this
    runs both copies are there.
    """
    leaves, tree = jax.tree.flatten(params)
    if (
        not leaves
        or leaves[0].devices() != {jax.devices()[0]}
        or jax.devices()[0].platform != "cpu"
    ):
        return params
    starts, end = [], 0
    for leaf in leaves:
        starts.append(end)
        end += math.ceil(leaf.nbytes / _ALIGNED_BYTES) * _ALIGNED_BYTES
    block = np.empty(end + _ALIGNED_BYTES, np.uint8)
    block = block[-block.ctypes.data % _ALIGNED_BYTES :]
    placed = []
    for leaf, start in zip(leaves, starts, strict=True):
        place = block[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
        place[...] = np.asarray(leaf)
        placed.append(jax.device_put(place))
    return jax.tree.unflatten(tree, placed)
