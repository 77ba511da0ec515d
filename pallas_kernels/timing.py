"""Seconds of a call on the device: many calls in one program, each after the one before it.

A program of `calls` calls is compiled, run `WARM_UP` times and then timed `repeats` times by the
host's clock until its results are ready; a call took the median over `calls`. To launch a call from
Python and wait for it takes as long as a small kernel runs, so a program holds as many calls as
fill `TARGET_S`, at most `MOST_CALLS`.

XLA must run every call. So the first argument of a call depends on what the call before it returned
(its first element is set to zero in a way that only the device can know), the other arguments pass
an optimisation barrier together with that, which keeps what XLA prepares of them, such as gathered
or converted rows, inside the loop; and all outputs are carried, so none is dead. Beside the call an
iteration runs that write and the counter of the loop, two small kernels. Arguments and outputs are
donated: nothing is copied.

`ceilings` are measured the same way: what a copy of a large array moves, and what a product of
large square matrices does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

WARM_UP = 2
TARGET_S = 0.01
MOST_CALLS = 200
SEED = 1
LAUNCH_S = 2e-5  # that a call takes at least, when their number is chosen
COPY_BYTES = 2**28
SIDES = (("gpu", 8192), ("", 1024))  # of the matrices, by the start of a platform's name


class Work(NamedTuple):
    """What a call cannot do without: inputs read once and outputs written once."""

    read_bytes: int
    written_bytes: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes


class Case(NamedTuple):
    """A function, what to call it with, and what a call must do."""

    function: Callable  # the arrays of `inputs` -> arrays
    inputs: Callable  # a uint32 seed -> a tuple of arrays, made inside jit
    work: Work


class Timed(NamedTuple):
    """Seconds of a call, over the repeats, and what the last call returned."""

    time_s: float
    time_min_s: float
    time_max_s: float
    calls: int
    temporary_bytes: int | None  # of the program, beside arguments and results; None: unknown
    outs: object


class Ceilings(NamedTuple):
    """What this device did at its best, in this process."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float

    def calls(self, work: Work) -> int:
        """As many calls of at least `work` as fill TARGET_S."""
        least = max(work.bytes / self.copy_bytes_per_s, work.flops / self.matmul_flops_per_s)
        return max(1, min(MOST_CALLS, math.ceil(TARGET_S / (least + LAUNCH_S))))


class TooLarge(Exception):
    """What is timed does not fit into the memory that it may use; the text is one sentence."""


def loop(function: Callable, calls: int) -> Callable:
    """(args, outs) -> (args, outs) after `calls` calls of `function(*args)`.

    `outs` are arrays like those that `function` returns.
    """

    def call(_, carry):
        (first, *rest), before = jax.lax.optimization_barrier(carry)
        args = _touched(first, before), *rest
        return args, function(*args)

    return lambda args, outs: jax.lax.fori_loop(0, calls, call, (args, outs))


def _touched(x: jax.Array, outs) -> jax.Array:
    """`x` with its first element zero, or one if the first result is NaN.

    XLA cannot know which before the result is there.
    """
    first = jax.tree.leaves(outs)[0]
    first = jax.lax.slice(first, (0,) * first.ndim, (1,) * first.ndim).reshape((1,) * x.ndim)
    return jax.lax.dynamic_update_slice(x, jax.lax.ne(first, first).astype(x.dtype), (0,) * x.ndim)


def program(function: Callable, calls: int, args, outs):
    """`loop` compiled for arrays like `args` and `outs`, which it takes over."""
    return jax.jit(loop(function, calls), donate_argnums=(0, 1)).lower(args, outs).compile()


def measure(case: Case, *, calls: int, repeats: int, max_bytes: float) -> Timed:
    """Compile, warm up and time.

    Raises TooLarge before anything is allocated, and whatever compiling or running raises.
    """
    seed = jnp.uint32(SEED)
    args = jax.eval_shape(case.inputs, seed)
    outs = jax.eval_shape(case.function, *args)
    arrays = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((args, outs)))
    _check(arrays, 0, max_bytes)
    compiled = program(case.function, calls, args, outs)
    memory = compiled.memory_analysis()
    temporary = None if memory is None else int(memory.temp_size_in_bytes)
    _check(arrays, temporary or 0, max_bytes)
    state = jax.jit(case.inputs)(seed), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outs)
    seconds = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(*state))
        seconds.append((time.perf_counter() - start) / calls)
    seconds = seconds[WARM_UP:]
    return Timed(statistics.median(seconds), min(seconds), max(seconds), calls, temporary, state[1])


def _check(arrays: int, temporary: int, max_bytes: float) -> None:
    if arrays + temporary > max_bytes:
        beside = f" and {temporary / 1e9:.3g} GB of temporary arrays" if temporary else ""
        raise TooLarge(
            f"{arrays / 1e9:.3g} GB of arrays{beside} exceed the {max_bytes / 1e9:.3g} GB that "
            "may be used"
        )


def ceilings(
    dtype: str,
    repeats: int,
    max_bytes: float,
    copy_bytes: int = COPY_BYTES,
    side: int | None = None,
) -> Ceilings:
    """Bytes per second, read and written, of a copy, and FLOPs per second of a matrix product.

    The product is in `dtype`; float32 is not tf32. Arrays of `copy_bytes` and square matrices of
    `side` rows, by default of SIDES, smaller where `max_bytes` wants it.
    """
    platform, elements = jax.devices()[0].platform, int(min(copy_bytes, max_bytes / 4)) // 4
    largest = math.sqrt(max_bytes / 4 / jnp.dtype(dtype).itemsize)
    side = side or next(n for name, n in SIDES if platform.startswith(name))
    side = int(min(side, largest))
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    line = lambda seed: (uniform(seed, (elements,), jnp.float32),)
    square = lambda seed: tuple(uniform(seed + i, (side, side), jnp.dtype(dtype)) for i in range(2))
    copy = Case(lambda x: x * jnp.float32(2.0), line, Work(4 * elements, 4 * elements, 0))
    product = Case(lambda a, b: jnp.dot(a, b, precision=precision), square, Work(0, 0, 2 * side**3))
    run = lambda case: measure(case, calls=4, repeats=repeats, max_bytes=max_bytes).time_s
    return Ceilings(copy.work.bytes / run(copy), product.work.flops / run(product))


# ---- what calls are given


def noise(seed, shape) -> jax.Array:
    """uint32 [*shape], any of them alike: a hash of each position.

    It compiles quickly and needs no other array.
    """
    h = jnp.broadcast_to(seed.astype(jnp.uint32) * jnp.uint32(0xC2B2AE3D), shape)
    for axis in range(len(shape)):
        h = (h ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        h = (h ^ (h >> 15)) * jnp.uint32(0x85EBCA77)
    return h ^ (h >> 13)


def uniform(seed, shape, dtype, low: float = -(3**0.5), high: float = 3**0.5) -> jax.Array:
    """Values between `low` and `high`; the variance is 1 unless these are given."""
    unit = (noise(seed, shape) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    return (unit * jnp.float32(high - low) + jnp.float32(low)).astype(dtype)
