"""Host buffers in which streamed pages are gathered, kept from step to step.

A stream gathers a layer at a time, tens of megabytes. Memory of that size that is allocated anew
for each is taken from the system and given back, page fault by page fault, which takes several
times as long as what is written to it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ALIGNMENT = 64  # bytes; a CPU device reads an array so aligned in place, and copies any other
THREADS = 2  # for K and V, as a rule two arrays, which NumPy copies without the interpreter's lock


class Staging:
    """Buffers that are lent under a key, and written again once that is released."""

    def __init__(self):
        self.free: list[np.ndarray] = []
        self.lent: dict[Hashable, list[np.ndarray]] = {}
        self.workers = ThreadPoolExecutor(THREADS)

    def gather(
        self, key: Hashable, pages: Sequence[tuple[np.ndarray, ...]], T: int
    ) -> list[np.ndarray]:
        """Join `pages` of leaves [n, K, t, *] to leaves [n, K, T, *], with zeros at the end."""
        wholes = []
        for leaf in pages[0]:
            n, K, _, *rest = leaf.shape
            wholes.append(self.lend(key, (n, K, T, *rest), leaf.dtype))
        return list(self.workers.map(_join, zip(*pages, strict=True), wholes))

    def lend(self, key: Hashable, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An array of arbitrary content, aligned, that nothing else has until `release(key)`."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.free.sort(key=len)
        at = next((i for i, buffer in enumerate(self.free) if len(buffer) >= size), None)
        if at is not None:
            buffer = self.free.pop(at)
        else:
            del self.free[:1]  # outgrown, as the context is longer now
            buffer = np.empty(size + ALIGNMENT, np.uint8)
            start = -buffer.ctypes.data % ALIGNMENT
            buffer = buffer[start : start + size]
        self.lent.setdefault(key, []).append(buffer)
        return buffer[:size].view(dtype).reshape(shape)

    def release(self, key: Hashable) -> None:
        """What was lent under `key` may be written again: whatever read it is done."""
        self.free += self.lent.pop(key, [])


def _join(leaves: Sequence[np.ndarray], whole: np.ndarray) -> np.ndarray:
    T = sum(leaf.shape[2] for leaf in leaves)
    np.concatenate(leaves, axis=2, out=whole[:, :, :T])
    whole[:, :, T:] = 0
    return whole
