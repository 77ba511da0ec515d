"""Arrays in the memories of a device, and in NumPy: what `eval.card.pinned` moves."""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from pallas_kernels import timing

DEVICE, HOST, OTHER_HOST = "device", "pinned_host", "unpinned_host"
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


class Sizes(NamedTuple):
    """What is moved: bfloat16 everywhere."""

    transfers: tuple[int, ...]  # bytes
    heads: int
    head_dim: int
    sequences: int
    pages: int  # of 16 tokens, of each sequence
    rows: int  # that are read at once, K and V together
    side: int  # of the matrices of the products
    target_s: float  # that the products and the transfer of an overlap take
    largest: int  # bytes of that transfer

    @property
    def row(self) -> int:
        """Elements of K and V of one token."""
        return 2 * self.heads * self.head_dim


FULL = Sizes((2**28, 2**30, 2**24, 2**20), 8, 128, 16, 128, 1000, 4096, 0.01, 2**30)
DRY = Sizes((2**12, 2**14), 2, 4, 2, 3, 20, 32, 1e-4, 2**14)


@functools.cache
def place(kind: str) -> SingleDeviceSharding:
    """The memory `kind` of the first device."""
    return SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def put(x, target: str):
    """`x` in a memory kind, or in NumPy."""
    return np.asarray(x) if target == "numpy" else jax.device_put(x, place(target))


def source_of(first: jax.Array, source: str, target: str):
    """A function that gives `first` in `source`, a new array each time where NumPy keeps what it has read."""
    start = put(first, source)
    return (lambda: jax.device_put(first + 0, place(source))) if target == "numpy" else lambda: start


@functools.partial(jax.jit, static_argnums=(1, 2))
def drawn(seed, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    """bfloat16 on the device, of variance `scale` squared."""
    limit = scale * 3**0.5
    return timing.uniform(jnp.asarray(seed, jnp.uint32), shape, jnp.bfloat16, -limit, limit)


def array(seed: int, size: int) -> jax.Array:
    """bfloat16 of `size` bytes on the device, in rows of 2,048 bytes."""
    return drawn(seed, (size // 2048, 1024))


def table(sizes: Sizes, seed: int) -> tuple[np.ndarray, jax.Array]:
    """K and V of all tokens [tokens, 2 K H], in NumPy and in pinned memory."""
    shape = (16 * sizes.pages * sizes.sequences, sizes.row)
    values = drawn(seed, shape)
    return np.array(values), jax.block_until_ready(jax.device_put(values, place(HOST)))


def where(pattern: str, tokens: int, rows: int, seed: int) -> np.ndarray:
    """`rows` positions below `tokens`."""
    rng = np.random.default_rng(seed)
    if pattern == "random":
        return rng.permutation(tokens)[:rows]
    return np.arange(rows) + int(rng.integers(tokens - rows + 1))


def compile_of(program, *args):
    """`program` compiled for `args`, and the seconds that this took."""
    start = time.perf_counter()
    compiled = program.lower(*args).compile()
    return compiled, time.perf_counter() - start


@jax.jit
def same(a: jax.Array, b: jax.Array) -> jax.Array:
    """Whether two bfloat16 arrays have the same bits."""
    return jnp.array_equal(*(jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (a, b)))


def bits(x) -> np.ndarray:
    """bfloat16 as uint16, so that equal means equal in every bit."""
    return np.ascontiguousarray(np.asarray(x)).view(np.uint16)


def pointer(x: jax.Array) -> int | None:
    """Where an array lies; None where its backend does not say."""
    try:
        return x.unsafe_buffer_pointer()
    except (RuntimeError, NotImplementedError, ValueError):
        return None


def kind_of(x) -> str:
    """The memory kind of an array."""
    return "numpy" if isinstance(x, np.ndarray) else x.sharding.memory_kind


def text(size: int) -> str:
    """A number of bytes as in 16 MiB."""
    unit, name = next(pair for pair in UNITS if size >= pair[0])
    return f"{size // unit} {name}"
