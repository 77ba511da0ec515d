"""Weights on large pages: a decode step reads them all, and a CPU looks up each small page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_ALIGNED_BYTES = 64  # of an array that JAX takes as it lies


def on_large_pages(params: Any) -> Any:
    """`params` in one block of memory where the default device is a CPU.

    On any other device `params` is returned as it is. While this runs both copies are there.
    """
    leaves, tree = jax.tree.flatten(params)
    if not leaves or leaves[0].devices() != {jax.devices()[0]} or not _on_cpu():
        return params
    placed = []
    for leaf, place in zip(leaves, _block([(x.shape, x.dtype) for x in leaves]), strict=True):
        place[...] = np.asarray(leaf)
        placed.append(jax.device_put(place))
    return jax.tree.unflatten(tree, placed)


def room(shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> list[np.ndarray]:
    """Arrays to fill, of these shapes, in one block of memory; [] if no CPU is the default device.

    `jax.device_put` takes each as it lies; it must not be written to afterwards.
    """
    return _block([(shape, dtype) for shape in shapes]) if _on_cpu() else []


def _on_cpu() -> bool:
    return jax.devices()[0].platform == "cpu"


def _block(arrays: Sequence[tuple[tuple[int, ...], np.dtype]]) -> list[np.ndarray]:
    """Arrays one behind the other: for a block of some MiB NumPy asks for large pages."""
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays]
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += math.ceil(size / _ALIGNED_BYTES) * _ALIGNED_BYTES
    block = np.empty(end + _ALIGNED_BYTES, np.uint8)
    block = block[-block.ctypes.data % _ALIGNED_BYTES :]
    return [
        block[start : start + size].view(dtype).reshape(shape)
        for start, size, (shape, dtype) in zip(starts, sizes, arrays, strict=True)
    ]
