"""Streams of queries, keys and values, driven through one layer's decode step on any route."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax import attention
from alisa_jax.codecs import Codec, Raw
from alisa_jax.kv.state import EMPTY, LayerSpec, LayerState
from alisa_jax.policies import Policy

CODEC = Raw("float32")
# Dozens of programs run for a few steps each: LLVM need not optimise. XLA's own passes all run.
QUICK = MappingProxyType({"xla_backend_optimization_level": 0})

# The stream of `Driver`: prime or unequal sizes, and runs that end with a full bucket.
B = 3
N = 6
K = 3
H = 5
T = 96
BUCKETS = (32, T)
PADDED = 32  # tokens that prompts are padded to: the whole first bucket
STARTS = MappingProxyType({"empty": None, "prompt": (5, 29, 16), "full_bucket": (11, 32, 1)})


class Stream(NamedTuple):
    """Queries, keys and values of one layer, float32."""

    q: np.ndarray  # [B, T, N, H]
    k: np.ndarray  # [B, T, K, H]
    v: np.ndarray  # [B, T, K, H]


def stream(seed: int, B: int, T: int, N: int, K: int, H: int) -> Stream:
    """Random tokens of uneven attention: a key is heavy for a while, and at times again."""
    rng = np.random.default_rng(seed)
    themes = rng.normal(size=(B, 1, 1, H)) * np.sin(np.arange(T) / 5)[None, :, None, None]
    q = 1.5 * (rng.normal(size=(B, T, N, H)) + themes)
    k = rng.normal(size=(B, T, K, H)) + themes[:, ::-1]
    return Stream(*(x.astype(np.float32) for x in (q, k, rng.normal(size=(B, T, K, H)))))


class Run(NamedTuple):
    """What a decoded stream attended and gave; the query of step i stands at first[b] + i."""

    out: np.ndarray  # [B, steps, N, H]
    # [B, steps, P, T + 1] int8: slots that hold each attended position; the last: any beyond T
    slots: np.ndarray
    attended: np.ndarray  # [B, steps] as the taps count them
    loads: np.ndarray  # [B, steps]
    # [B, steps]: empty slots before the query, of the head with the fewest; 1 off "working_set"
    free: np.ndarray
    refreshed: np.ndarray  # [B, steps] bool: the policy asked for a dense step
    contexts: np.ndarray  # [steps], the context bucket
    first: np.ndarray  # [B]
    prompt: np.ndarray | None  # [B, T, N, H], the outputs over the prompts
    state: LayerState

    @property
    def sets(self) -> list:
        """[b][step][p]: the set of attended positions."""
        return [
            [[set(np.flatnonzero(head).tolist()) for head in step] for step in b]
            for b in self.slots
        ]


def dense_over(tokens: Stream, n: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Float64 attention [B, steps, N, H] of queries n [B, steps] over held [B, steps, P, T + 1]."""
    q, k, v = tokens
    q = np.take_along_axis(q.astype(np.float64), n[:, :, None, None], axis=1)
    k = k.astype(np.float64)
    v = v.astype(np.float64)
    q = q.reshape(*n.shape, k.shape[2], -1, q.shape[-1])  # [B, steps, K, G, H]
    z = np.einsum("bskgh,btkh->bskgt", q, k) / np.sqrt(q.shape[-1])
    z = np.where(held[:, :, :, None, :-1], z, -np.inf)
    e = np.exp(z - z.max(-1, keepdims=True))
    out = np.einsum("bskgt,btkh->bskgh", e / e.sum(-1, keepdims=True), v)
    return out.reshape(*n.shape, -1, q.shape[-1])


class Driver:
    """Decodes streams under any policy and compiles every step once.

    It remembers the runs over its own stream. codec: resolved; one that waits for tokens
    (`frozen_after`) needs prompts of that many.
    """

    def __init__(self, seed: int = 23, codec: Codec = CODEC):
        self.codec = codec
        self.tokens = stream(seed, B, T, N, K, H)
        self.traces: Counter = Counter()  # by policy, route and context
        self.step = jax.jit(self._decode, donate_argnums=0, compiler_options=dict(QUICK))
        self._prefill = jax.jit(attention.prefill, compiler_options=dict(QUICK))
        self._freeze = jax.jit(attention.freeze, compiler_options=dict(QUICK))
        self._grow = jax.jit(attention.grow, static_argnums=1, compiler_options=dict(QUICK))
        self._runs: dict = {}

    def _decode(self, state, q, k, v):
        self.traces[state.spec.policy, state.spec.route, state.context] += 1
        return attention.step(state, q, k, v)

    def shared_run(
        self, policy: Policy, route: str, start: str, buckets: Sequence[int] = BUCKETS
    ) -> Run:
        """The run over the driver's own stream from one of STARTS."""
        key = policy, route, start, tuple(buckets)
        if key not in self._runs:
            self._runs[key] = self.run(policy, route, self.tokens, buckets, STARTS[start], PADDED)
        return self._runs[key]

    def run(
        self, policy, route: str, tokens: Stream, buckets=(64,), prompt=None, padded: int = 0
    ) -> Run:
        """Decode to the end of the last bucket, from nothing or after dense prompts.

        prompt: [B], tokens of each prompt. padded: the length that prompts are padded to.
        """
        with jax.default_matmul_precision("highest"):
            return self._run(policy, route, tokens, list(buckets), prompt, padded)

    def _run(self, policy, route, tokens, buckets, prompt, padded):
        q, k, v = tokens
        q = jnp.asarray(q)
        k = jnp.asarray(k)
        v = jnp.asarray(v)
        B, T, N, H = q.shape
        K = k.shape[2]
        S = buckets.pop(0)
        spec = LayerSpec(policy, self.codec, route)
        dims = attention.dims_of(spec, B, N, K, S)
        if prompt is not None:
            dims = attention.prompt_dims(dims, spec, S - max(prompt))
        state = attention.init(spec, dims, H)
        length, prompt_out = np.zeros(B, np.int32), None
        if prompt is not None:
            length = np.array(prompt, np.int32)
            prompt_out, state = self._prefill(
                state, q[:, :padded], k[:, :padded], v[:, :padded], jnp.asarray(length)
            )
        first = length
        contexts = []
        steps = []
        while length.max() < S or buckets:
            if length.max() == S:
                S = buckets.pop(0)
                state = self._grow(state, S)
            if prompt is None and (length == self.codec.frozen_after).all():
                state = self._freeze(state)
            which, free = policy.refresh(jnp.asarray(length)), np.ones(B, int)
            if route == "working_set":
                free = (np.asarray(state.ws.pos) == EMPTY).sum(-1).min(-1)
            out, state, taps = self.step(
                state, *(jnp.asarray(x[np.arange(B), length]) for x in tokens)
            )
            pos = np.asarray(taps.pos)
            slots = np.zeros((*pos.shape[:2], T + 1), np.int8)
            b, p, m = np.nonzero(pos != EMPTY)
            at = pos[b, p, m]
            np.add.at(slots, (b, p, np.where((at >= 0) & (at < T), at, T)), 1)
            dense = np.zeros(B, bool) if which is None else np.asarray(which)
            steps.append((out, slots, taps.attended, taps.loads, free, dense))
            contexts.append(S)
            length = length + 1
        np.testing.assert_array_equal(state.length, length)
        return Run(
            *(np.stack(x, 1) for x in zip(*steps)), np.array(contexts), first, prompt_out, state
        )
