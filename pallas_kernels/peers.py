"""Peers of the kernels for dense attention: jax.nn, decode kernels that ship with jax, torch.

None of them is asked for log-sum-exp or mass, and outputs are in the type of q. Each gets its
inputs in the layout that it reads best. torch runs on the kind of device that jax runs on, with
arrays of its own, and is launched call by call from Python.
"""

from __future__ import annotations

import statistics
import time
import warnings

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import Shape
from pallas_kernels.timing import TARGET_S, WARM_UP, Case, Timed, TooLarge, Work, noise, uniform

CUDNN = "jax.nn cudnn"
XLA = "jax.nn xla"
GQA = "jax gqa"
PAGED = "jax paged"
TORCH = "torch sdpa"
DENSE = (CUDNN, XLA, GQA, PAGED, TORCH)  # for one new token
CAUSAL = (CUDNN, XLA, TORCH)  # for prompts
_PAGE = 16  # tokens


class Missing(Exception):
    """A peer cannot run here; the text says why in one sentence."""


def work(causal: bool, shape: Shape, dtype: str) -> Work:
    """Of attention over the whole context: by all queries of a prompt, or by one."""
    N, K, H, B, S = shape
    e, T = jnp.dtype(dtype).itemsize, S if causal else 1
    flops = 2 * B * N * H * S * S if causal else 4 * B * N * H * S
    return Work(B * (T * N + 2 * S * K) * H * e, B * T * N * H * e, flops)


def build(peer: str, causal: bool, shape: Shape, dtype: str, interpret: bool = False) -> Case:
    """A peer of jax: q [B, T, N, H] or, for one new token, [B, N, H] over S tokens. Raises Missing.

    interpret: run the kernels that ship with jax in Pallas' interpreter, for tests.
    """
    platform, kind = _device()
    if peer != XLA and not interpret and platform != "gpu":
        raise Missing(f"it needs a GPU, and the device is {kind}")
    if peer == CUDNN and dtype == "float32":
        raise Missing("cuDNN's attention takes bfloat16 and float16, and the inputs are float32")
    N, K, H, B, S = shape
    if peer in (XLA, CUDNN):
        implementation = "xla" if peer == XLA else "cudnn"

        def function(q, k, v):
            q = q if causal else q[:, None]
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=causal, implementation=implementation
            )

        return _case(
            function, (B, S, N, H) if causal else (B, N, H), (B, S, K, H), causal, shape, dtype
        )
    splits, block = split(S)
    if peer == GQA:
        function = _gqa(K, splits, block, interpret)
        return _case(function, (B, N, H), (B, K, S, H), causal, shape, dtype)
    return _paged(shape, dtype, splits, block, interpret)


def _device() -> tuple[str, str]:
    """Platform and kind of the device that jax runs on."""
    return jax.devices()[0].platform, jax.devices()[0].device_kind


def split(S: int) -> tuple[int, int]:
    """Programs that share S tokens, and tokens of a step, as the kernels of jax want them.

    Their product divides S. Raises Missing.
    """
    for splits in (16, 8, 4, 2, 1):
        for block in (128, 64, 32, 16):
            if S % (splits * block) == 0:
                return splits, block
    raise Missing(f"it takes contexts in multiples of 16, and this one is {S}")


def _case(function, q_shape, rows, causal: bool, shape: Shape, dtype: str) -> Case:
    def inputs(seed):
        return tuple(
            uniform(seed + i, s, jnp.dtype(dtype)) for i, s in enumerate((q_shape, rows, rows))
        )

    return Case(_plainly(function), inputs, work(causal, shape, dtype))


def _plainly(function):
    """`function` under NumPy's promotion, which peers are written for; its result in q's type."""

    def run(q, *args):
        with jax.numpy_dtype_promotion("standard"):
            return function(q, *args).astype(q.dtype)

    return run


def _gqa(K: int, splits: int, block: int, interpret: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import decode_attention
    how = dict(k_splits=splits, block_k=block, interpret=interpret)
    if K == 1:
        return lambda q, k, v: decode_attention.mqa(q, k[:, 0], v[:, 0], **how)
    # it wants token-major rows and makes them head-major: two transpositions that cancel
    return lambda q, k, v: decode_attention.gqa(
        q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), **how
    )


def _paged(shape: Shape, dtype: str, splits: int, block: int, interpret: bool) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import paged_attention
    N, K, H, B, S = shape
    pages = S // _PAGE
    how = dict(k_splits=splits, pages_per_compute_block=block // _PAGE, interpret=interpret)

    def function(q, k, v, tables):
        return paged_attention.paged_attention(
            q * jnp.asarray(H**-0.5, q.dtype), k, v, tables, None, **how
        )

    def inputs(seed):
        rows = (K, B * pages, _PAGE, H)
        make = lambda i, shape: uniform(seed + i, shape, jnp.dtype(dtype))
        q = make(0, (B, N, H))
        k = make(1, rows)
        v = make(2, rows)
        tables = jnp.argsort(noise(seed + 3, (B * pages,))).reshape(B, pages)  # pages lie anywhere
        return q, k, v, tables.astype(jnp.int32)

    return Case(_plainly(function), inputs, work(False, shape, dtype))


def torch_sdpa(
    causal: bool, shape: Shape, dtype: str, *, calls: int, repeats: int, max_bytes: float
) -> tuple[Timed, str]:
    """Time `scaled_dot_product_attention` of torch; also the device that it ran on.

    Raises Missing and TooLarge.
    """
    try:
        import torch
    except ImportError:
        raise Missing("torch is not installed") from None
    gpu = _device()[0] == "gpu"
    if gpu and not torch.cuda.is_available():
        raise Missing("torch sees no GPU, and the kernels run on one")
    bytes_ = work(causal, shape, dtype).bytes
    if bytes_ > max_bytes:
        raise TooLarge(
            f"{bytes_ / 1e9:.3g} GB of arrays exceed the {max_bytes / 1e9:.3g} GB that may be used"
        )
    N, K, H, B, S = shape
    device, kind = "cuda" if gpu else "cpu", getattr(torch, dtype)
    wait = torch.cuda.synchronize if gpu else lambda: None
    made = torch.Generator(device=device).manual_seed(0)
    like = dict(device=device, dtype=kind, generator=made)
    q = torch.randn(B, N, S if causal else 1, H, **like)
    k = torch.randn(B, K, S, H, **like)
    v = torch.randn(B, K, S, H, **like)

    def run(times: int):
        start = time.perf_counter()
        for _ in range(times):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=N > K
            )
        wait()
        return (time.perf_counter() - start) / times, out

    try:
        with torch.inference_mode():
            run(1)
            calls = max(1, min(calls, int(TARGET_S / run(1)[0])))
            seconds = [run(calls)[0] for _ in range(WARM_UP + repeats)][WARM_UP:]
            out = run(1)[1]
    except torch.OutOfMemoryError as error:
        raise TooLarge(str(error).split(". ")[0]) from None
    name = torch.cuda.get_device_name() if gpu else "cpu"
    found = Timed(statistics.median(seconds), min(seconds), max(seconds), calls, None, out)
    return found, f"torch {torch.__version__} on {name}, {torch.get_num_threads()} threads"
