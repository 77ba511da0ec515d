"""Streams of queries, keys and values driven through one layer's decode step."""

from __future__ import annotations

import functools
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax import attention
from alisa_jax.kv.codec import Raw
from alisa_jax.policies import Policy

CODEC = Raw("float32")
traces: Counter = Counter()


def _decode(state, q, k, v):
    traces[state.policy, state.route, state.context] += 1
    return attention.decode(state, q, k, v)


# Dozens of programs are compiled for a few steps each: LLVM need not optimise them. XLA's own passes all run.
QUICK = {"xla_backend_optimization_level": 0}
step = jax.jit(_decode, donate_argnums=0, compiler_options=QUICK)
prefill = jax.jit(attention.prefill, compiler_options=QUICK)


class Stream(NamedTuple):
    q: np.ndarray  # [B, T, N, H]
    k: np.ndarray  # [B, T, K, H]
    v: np.ndarray  # [B, T, K, H]


def stream(seed: int, B: int, T: int, N: int, K: int, H: int) -> Stream:
    """Random tokens whose attention is uneven and wanders: a key is heavy for a while, and at times again."""
    rng = np.random.default_rng(seed)
    themes = rng.normal(size=(B, 1, 1, H)) * np.sin(np.arange(T) / 5)[None, :, None, None]
    q = 1.5 * (rng.normal(size=(B, T, N, H)) + themes)
    k = rng.normal(size=(B, T, K, H)) + themes[:, ::-1]
    return Stream(*(x.astype(np.float32) for x in (q, k, rng.normal(size=(B, T, K, H)))))


class Run(NamedTuple):
    out: np.ndarray  # [B, steps, N, H]
    sets: list  # [b][step][p]: the set of attended positions
    attended: np.ndarray  # [B, steps] as the taps count them
    loads: np.ndarray  # [B, steps]
    prompt: np.ndarray | None  # [B, T, N, H], the outputs over the prompts
    state: attention.LayerState


def run(policy, route: str, tokens: Stream, buckets=(64,), prompt=None, padded: int = 0) -> Run:
    """Decode to the end of the last bucket, from nothing or after dense prompts of `prompt` [B] tokens (padded in T)."""
    q, k, v = (jnp.asarray(x) for x in tokens)
    B, _, N, H = q.shape
    buckets = list(buckets)
    S = buckets.pop(0)
    state = attention.init(policy, CODEC, route, attention.dims_of(policy, route, B, N, k.shape[2], S), H)
    length, prompt_out = np.zeros(B, np.int32), None
    if prompt is not None:
        length = np.array(prompt, np.int32)
        prompt_out, state = prefill(state, q[:, :padded], k[:, :padded], v[:, :padded], jnp.asarray(length))
    outs, sets, taps_seen = [], [[] for _ in range(B)], []
    while True:
        if length.max() == S:
            if not buckets:
                break
            S = buckets.pop(0)
            state = attention.grow(state, S)
        now = [jnp.asarray(x[np.arange(B), length]) for x in tokens]
        out, state, taps = step(state, *now)
        outs.append(out)
        taps_seen.append(taps)
        for b in range(B):
            sets[b].append([set(p[p >= 0].tolist()) for p in np.asarray(taps.pos)[b]])
        length = length + 1
    np.testing.assert_array_equal(state.length, length)
    attended, loads = (np.stack([getattr(t, name) for t in taps_seen], 1) for name in ("attended", "loads"))
    return Run(np.stack(outs, 1), sets, attended, loads, prompt_out, state)


# The stream that the tests of all policies share, so that they share compiled programs too.
B, N, K, H, T = 3, 6, 3, 5, 96
BUCKETS = (32, T)  # every run ends with a full bucket
PADDED = 32  # tokens that prompts are padded to: the whole first bucket
STARTS = {"empty": None, "prompt": (5, 29, 16), "full_bucket": (11, 32, 1)}
STREAM = stream(23, B, T, N, K, H)


@functools.cache
def shared_run(policy: Policy, route: str, start: str, buckets=BUCKETS) -> Run:
    """The shared stream under `policy`, from one of STARTS."""
    return run(policy, route, STREAM, buckets, STARTS[start], PADDED)
