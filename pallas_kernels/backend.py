"""Which implementation runs, and the only module that knows how a kernel becomes GPU code.

    xla         the reference in plain jnp, compiled by XLA: every device
    pallas      the kernel, lowered through Triton: NVIDIA GPUs of compute capability 8.0 and newer
    interpret   the kernel's own body, run by Pallas' interpreter: every device, for tests
    auto        pallas where it can run, else xla; `Choice.reason` says why

`auto` may fall back; a named implementation runs or is refused in one sentence. Before `auto`
settles on kernels it compiles a small one on the device at hand and compares it with its reference,
once per process (`works`).

Kernel bodies are written in core `pallas` with the few functions below. Pallas' Triton backend
lowers on every jax from 0.10 to 0.12 and is announced to go, Mosaic GPU is to follow it: a change
of backend is a change of this file. The default backend of `pallas_call` differs between releases,
so it is always named here.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    get_abstract_mesh,
    use_abstract_mesh,
)

IMPLS = ("auto", "xla", "pallas", "interpret")
# kernels can be lowered for these without having one
GPUS = ("NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200")
LEAST_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256
# Pallas' Triton backend counts elements in signed 32 bits up to so many bytes, and in 64 bits above
NARROW_BYTES = 2**32
MAX_NARROW = 2**31

load, store = triton.load, triton.store


class Choice(NamedTuple):
    """An implementation that runs, and why it is this one."""

    impl: str  # "xla" | "pallas" | "interpret"
    reason: str


def choose(impl: str = "auto", why_not: str | None = None) -> Choice:
    """What `impl` means here.

    why_not: what about the call kernels do not serve, as the end of a sentence, if anything. Raises
    ValueError for an unknown name, and for "pallas" or "interpret" where it cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    if impl == "xla":
        return Choice(impl, "asked for")
    reason = why_not or (None if impl == "interpret" else unsupported_device())
    if reason is None and impl == "auto":
        reason = works(jax.devices()[0].device_kind)
    if impl == "auto":
        return Choice("xla", reason) if reason else Choice("pallas", "the device runs the kernels")
    if reason:
        raise ValueError(f"impl={impl} cannot run: {reason}; give impl=auto or impl=xla")
    return Choice(impl, "asked for")


def unsupported_device() -> str | None:
    """Why the default device, or the one that is lowered for, runs no kernels; None: it does."""
    target = get_abstract_mesh().abstract_device
    if target is not None:
        return (
            None
            if target.platform == "gpu"
            else f"it needs a GPU, and the target is {target.device_kind}"
        )
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"it needs a GPU, and the device is {device.device_kind}"
    capability = str(getattr(device, "compute_capability", ""))
    if "NVIDIA" not in device.device_kind or not capability:
        return f"it needs an NVIDIA GPU, and the device is {device.device_kind}"
    if tuple(int(x) for x in capability.split(".")) < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0, and {device.device_kind} has {capability}"
    return None


def unaddressable(x) -> str | None:
    """Why a kernel would miss elements of an array like `x`, as the end of a sentence; None: none.

    Only types of one byte have arrays that need more than 31 bits and do not get 64.
    """
    if x.size > MAX_NARROW and x.size * x.dtype.itemsize <= NARROW_BYTES:
        return (
            f"{x.size} elements of {x.dtype.name}, more than {MAX_NARROW} in up to 4 GiB, "
            "are addressed wrongly by Pallas' Triton backend"
        )
    return None


def cores() -> int:
    """Multiprocessors of the device that is compiled for; 132, an H100's, where there is none."""
    target = get_abstract_mesh().abstract_device
    device = jax.devices()[0]
    return int(
        (target.num_cores if target is not None else getattr(device, "core_count", None)) or 132
    )


def chip() -> str:
    """The device kind that is compiled for."""
    target = get_abstract_mesh().abstract_device
    return (target or jax.devices()[0]).device_kind


@functools.cache
def works(device_kind: str) -> str | None:
    """Run a small kernel on the default device: None if it agrees with its reference, else why."""
    from pallas_kernels import sparse_decode

    for_q, for_k, for_v = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(for_q, (1, 2, 64))
    k = jax.random.normal(for_k, (1, 64, 1, 64))
    v = jax.random.normal(for_v, (1, 64, 1, 64))
    index = jnp.arange(63, -1, -3, dtype=jnp.int32)[None, None]
    try:
        got, _ = sparse_decode.sparse_decode(q, k, v, index, impl="pallas")
        want, _ = sparse_decode.reference(q, k, v, index)
        error = float(jnp.max(jnp.abs(got.out - want.out)))
    except Exception as wrong:  # whatever a compiler may raise: the reason is recorded
        said = f"{type(wrong).__name__}: {str(wrong).splitlines()[0]:.120}"
        return f"a small kernel fails on {device_kind}: {said}"
    return None if error < 1e-4 else f"a small kernel is off by {error:.1e} on {device_kind}"


def call(kernel, *, name: str, impl: str, warps: int, stages: int, **spec):
    """`pl.pallas_call` of `kernel`, interpreted or lowered through Triton.

    spec: grid, in_specs, out_specs, out_shape.
    """
    if impl == "interpret":
        return pl.pallas_call(kernel, name=name, interpret=True, **spec)
    return pl.pallas_call(
        kernel, name=name, compiler_params=triton.CompilerParams(warps, stages), **spec
    )


def dot(a: jax.Array, b: jax.Array, trans_b: bool = False) -> jax.Array:
    """Product of tiles of one dtype, accumulated in float32; float32 is not rounded to tf32."""
    return triton.dot(a, b, trans_b=trans_b, precision=jax.lax.Precision.HIGHEST)


def power_of_two(n: int) -> int:
    """The least power of two that is not below `n`: what tiles are made of."""
    return pl.next_power_of_2(n)


def lower_for(gpu: str, function, *args, cores: int = 132) -> str:
    """StableHLO text of `function` lowered for the GPU named `gpu`, which need not be there.

    Inside, `impl="pallas"` means that GPU. args: arrays or `jax.ShapeDtypeStruct`s. Raises what
    lowering raises.
    """
    device = AbstractDevice(device_kind=gpu, num_cores=cores, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with warnings.catch_warnings(), use_abstract_mesh(mesh):
        warnings.filterwarnings(
            "ignore", message=".*Pallas Triton backend is deprecated", category=DeprecationWarning
        )
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
