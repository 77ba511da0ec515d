"""The kernels as they are timed: inputs of one layer, and the bytes and FLOPs of a call.

For B sequences of S tokens, N query and K kv heads of H channels, M tokens attended at
`kv_sparsity` and elements of e bytes, the kernels' own docstrings give

    kernel              bytes read                         bytes written            FLOPs
    sparse_decode       B N H e + 2 B K M H e + 8 B M      4 B N (H + 1) + 4 B M    4 B N M H
    packed_decode       B N H e + 2 B K M H e + 4 B M      4 B N (H + 1) + 4 B M    4 B N M H
    ... _int8_token     as above, e = 1 for K and V, and 6 B K M of scales and zero points
    ... _int8_channel   as above, e = 1 for K and V, and 16 B K H of scales and zero points
    dense_decode        as packed_decode with M = S, without bias and mass
    flash_prefill       B S (N + 2 K) H e                  4 B S N (H + 1)          2 B N H S^2
    prompt_mass_rows    B (W N + S K) H e + 4 B W N        4 B W S                  2 B N H W S
    prompt_mass_sum     B S (N + K) H e + 4 B S N          4 B S                    B N H S^2

The 8 or 4 B M that decode kernels read are index and bias, the 4 B M that they write are the mass.
Selections are shared by all heads (P = 1); a list names one random row of every S / M, in order.
Values are uniform with variance 1. W is WINDOW, or S if that is less. Logits that are written and
read again between are not counted.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import (
    flash_prefill,
    int8_decode,
    packed_decode,
    prompt_mass,
    sparse_decode,
)
from pallas_kernels.shapes import Shape
from pallas_kernels.timing import Case, Work, noise, uniform

WINDOW = 64
DECODE = (
    "sparse_decode",
    "packed_decode",
    "sparse_decode_int8_token",
    "sparse_decode_int8_channel",
    "packed_decode_int8_token",
    "packed_decode_int8_channel",
    "dense_decode",
)
PROMPT = ("flash_prefill", "prompt_mass_rows", "prompt_mass_sum")


def build(
    kernel: str, shape: Shape, dtype: str, kv_sparsity: float, impl: str, tiling=None
) -> Case:
    """One of DECODE or PROMPT on one layer of `shape`; dtype: of q, and of K and V unless int8."""
    if kernel in PROMPT:
        return _prompt(kernel, shape, jnp.dtype(dtype), impl, tiling)
    return _decode(
        kernel, shape, jnp.dtype(dtype), attended(kernel, shape, kv_sparsity), impl, tiling
    )


def attended(kernel: str, shape: Shape, kv_sparsity: float) -> int:
    """Tokens that the last query of a sequence attends."""
    return (
        shape.context if kernel == "dense_decode" or kernel in PROMPT else shape.kept(kv_sparsity)
    )


def _decode(kernel: str, shape: Shape, dtype, M: int, impl: str, tiling) -> Case:
    N, K, H, B, S = shape
    name, _, codes = kernel.partition("_int8_")
    indexed, dense = name == "sparse_decode", name == "dense_decode"
    rows = (B, S, K, H) if indexed else (B, K, M, H)

    def inputs(seed):
        make = lambda seed: (
            _codes(seed, codes, rows, 1 if indexed else 2) if codes else uniform(seed, rows, dtype)
        )
        index = (_lists(seed + 3, B, M, S),) if indexed else ()
        bias = () if dense else (jnp.zeros((B, 1, M), jnp.float32),)
        return uniform(seed, (B, N, H), dtype), make(seed + 1), make(seed + 2), *index, *bias

    function = {
        "sparse_decode": int8_decode.sparse_decode_int8 if codes else sparse_decode.sparse_decode,
        "packed_decode": int8_decode.packed_decode_int8 if codes else packed_decode.packed_decode,
        "dense_decode": packed_decode.packed_decode,
    }[name]
    scales = {"": 0, "token": 6 * B * K * M, "channel": 16 * B * K * H}[codes]
    listed = 0 if dense else (8 if indexed else 4) * B * M
    read = (
        B * N * H * dtype.itemsize
        + 2 * B * K * M * H * (1 if codes else dtype.itemsize)
        + scales
        + listed
    )
    written = 4 * B * N * (H + 1) + (0 if dense else 4 * B * M)
    run = functools.partial(function, mass=not dense, impl=impl, tiling=tiling)
    return Case(run, inputs, Work(read, written, 4 * B * N * M * H))


def _codes(seed, kind: str, rows, token_axis: int) -> int8_decode.Int8:
    """Codes, and scales with which the values have a variance of about 1."""
    B, H = rows[0], rows[3]
    codes = lambda seed, shape: (noise(seed, shape) >> 24).astype(jnp.uint8).astype(jnp.int8)
    each = rows[:3] if kind == "token" else (B, rows[3 - token_axis], H)
    scale, zero = uniform(seed + 8, each, jnp.float32, 0.008, 0.012), codes(seed + 16, each)
    if kind == "token":
        return int8_decode.PerToken(codes(seed, rows), scale.astype(jnp.bfloat16), zero)
    return int8_decode.PerChannel(codes(seed, rows), scale, zero.astype(jnp.float32))


def _lists(seed, B: int, M: int, S: int) -> jax.Array:
    """[B, 1, M] int32: for each sequence a random one of every S / M rows."""
    m = jax.lax.broadcasted_iota(jnp.uint32, (B, 1, M), 2)
    low, high = m * S // M, (m + 1) * S // M
    return (low + noise(seed, m.shape) % (high - low)).astype(jnp.int32)


def _prompt(kernel: str, shape: Shape, dtype, impl: str, tiling) -> Case:
    N, K, H, B, T = shape
    e = dtype.itemsize

    def inputs(seed):
        rows = lambda i, heads: uniform(seed + i, (B, T, heads, H), dtype)
        q = rows(0, N)
        k = rows(1, K)
        v = rows(2, K)
        if kernel == "flash_prefill":
            return q, k, v
        seen = jax.lax.broadcasted_iota(jnp.float32, (B, T, N), 1) + jnp.float32(1.0)
        # about the lse of queries and keys of variance 1
        return q, k, jnp.log(seen) + jnp.float32(0.5)

    if kernel == "flash_prefill":
        work = Work(B * T * (N + 2 * K) * H * e, 4 * B * T * N * (H + 1), 2 * B * N * H * T * T)
        return Case(
            functools.partial(flash_prefill.flash_prefill, impl=impl, tiling=tiling), inputs, work
        )
    W = min(WINDOW, T) if kernel == "prompt_mass_rows" else T
    read = B * (W * N + T * K) * H * e + 4 * B * W * N
    if kernel == "prompt_mass_rows":
        how, work = dict(queries=W, reduce="rows"), Work(read, 4 * B * W * T, 2 * B * N * H * W * T)
    else:
        how, work = dict(reduce="sum"), Work(read, 4 * B * T, B * N * H * T * T)
    return Case(
        functools.partial(prompt_mass.prompt_mass, impl=impl, tiling=tiling, **how), inputs, work
    )
