"""How fast a cell could be: bytes over measured read bandwidth, FLOPs over the measured peak of matrix products.

    decode     max(weights + K and V that a step reads, over bandwidth;  FLOPs of B tokens, over the peak)
    prefill    FLOPs of B prompts over the peak

Weights count once a step: blocks, head and projections; looked-up rows of tables do not count. K and V count as they are
stored, scales included, for the tokens that the method attends; what a program reads beside these is its loss. Weights
and caches that fit the processor's own caches are read faster than memory, so small models can pass their limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.models.decoder import Decoder
from alisa_jax.policies import Policy

REPEATS = 7
READ_BYTES, SIDE = 2**29, 2048  # beyond any processor's caches; a product that no overhead shows in


class Rates(NamedTuple):
    """What this machine does, the best of what was tried, and what that was."""

    read_bytes_per_s: float
    read_by: str
    matmul_flops_per_s: float
    matmul_by: str

    def fields(self) -> dict:
        return self._asdict()


class Limit(NamedTuple):
    """The least seconds of a piece of work, and from what."""

    seconds: float
    of: str  # "bytes" | "flops"
    read_bytes: float
    flops: float


def rates(peers: Callable | None = None, read_bytes: int = READ_BYTES, side: int = SIDE) -> Rates:
    """Measure both rates, float32: the best run of XLA's ways and of the peers'.

    peers(read_bytes, side): {"read": {name: run}, "matmul": {name: run}}, or None for no peer.
    """
    rows = 2048
    matrix = jnp.ones((rows, read_bytes // 4 // rows), jnp.float32)
    vector, square = jnp.ones(matrix.shape[1], jnp.float32), jnp.ones((side, side), jnp.float32)
    product, total, matmul = jax.jit(jnp.dot), jax.jit(jnp.sum), jax.jit(jnp.dot)
    others = (peers(read_bytes, side) if peers is not None else None) or {"read": {}, "matmul": {}}
    reads = {
        "xla matrix-vector product": lambda: jax.block_until_ready(product(matrix, vector)),
        "xla sum": lambda: jax.block_until_ready(total(matrix)),
        **others["read"],
    }
    products = {"xla": lambda: jax.block_until_ready(matmul(square, square)), **others["matmul"]}
    read_s, read_by = min((_best(run), name) for name, run in reads.items())
    matmul_s, matmul_by = min((_best(run), name) for name, run in products.items())
    return Rates(4.0 * matrix.size / read_s, read_by, 2.0 * side**3 / matmul_s, matmul_by)


def _best(run: Callable) -> float:
    """Seconds of the fastest run: others on the machine can only make it slower."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def weight_bytes(decoder: Decoder, element_bytes: int = 4) -> int:
    """Bytes of the weights that a step multiplies by."""
    c = decoder.config
    projections = 0 if c.embed_dim is None else 2 * c.embed_dim * c.d_model
    return element_bytes * (decoder.count_params(embedding=False) + c.vocab_size * c.table_dim + projections)


def kv_read_bytes(layers, batch: int, attended: float, K: int, H: int) -> float:
    """Bytes of K and V of `attended` tokens in every one of `layers`, which have a `codec`, for `batch` sequences."""
    return batch * sum(layer.codec.token_bytes(K, H) * attended + layer.codec.sequence_bytes(K, H) for layer in layers)


def attended_tokens(layers: Iterable[Policy], at: Sequence[int]) -> float:
    """Tokens that a query attends, itself included: the mean over `layers`, a policy each, and the positions `at`."""
    at, found = np.asarray(at), []
    for policy in layers:
        counts = policy.counts(int(at.max())) if policy.selects else None
        found.append(at + 1 if counts is None else counts.local[at] + counts.top[at] + 1)
    return float(np.mean(found))


def decode(decoder: Decoder, layers, batch: int, attended: float, machine: Rates) -> Limit:
    """Of one step of `batch` sequences that attend `attended` tokens each, the mean over layers and steps."""
    c = decoder.config
    read = weight_bytes(decoder) + kv_read_bytes(layers, batch, attended, c.n_kv_heads, c.head_dim)
    flops = batch * (decoder.flops_per_token(0) + (decoder.flops_per_token(1) - decoder.flops_per_token(0)) * attended)
    return _of(read, flops, machine)


def prefill(decoder: Decoder, batch: int, tokens: int, machine: Rates) -> Limit:
    """Of `batch` prompts of `tokens` tokens under causal attention, the head for the last token alone."""
    c = decoder.config
    head = 2 * c.vocab_size * c.table_dim
    each = (
        decoder.flops_per_token(0)
        - head
        + (decoder.flops_per_token(2) - decoder.flops_per_token(1)) * ((tokens + 1) / 2)
    )
    return _of(0.0, batch * (tokens * each + head), machine)


def scoring(decoder: Decoder, layers, group, stepwise: bool, machine: Rates) -> float:
    """Seconds of a group of sequences whose tokens but the last are fed: step by step, or in one pass (`stepwise` False)."""
    steps = max(map(len, group)) - 1
    attended = attended_tokens([layer.policy for layer in layers], range(steps))
    one = decode(decoder, layers, len(group), attended, machine)
    return steps * (one.seconds if stepwise else one.flops / machine.matmul_flops_per_s)


def _of(read: float, flops: float, machine: Rates) -> Limit:
    by_bytes, by_flops = read / machine.read_bytes_per_s, flops / machine.matmul_flops_per_s
    return Limit(max(by_bytes, by_flops), "bytes" if by_bytes >= by_flops else "flops", read, flops)
