"""Prefill: filter the prompt, read it, return the layer states; score what comes after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.engine import shared
from alisa_jax.engine.batch import Batch
from alisa_jax.engine.progress import progress_bar
from alisa_jax.kv.buckets import bucket, next_bucket, prompt_bucket
from alisa_jax.kv.state import bytes_of

ROOM = 32  # tokens; sets grow in multiples of it, so that few programs are compiled


class Begun(NamedTuple):
    """A batch of prompts that has been read."""

    fed: Batch  # the tokens that were read: the prompts, or what a policy kept of them
    logits: jax.Array  # [B, V] of the last token of each
    kv: Any  # the states, for the bucket of the longest
    room: int  # free slots of working sets that grow


def begin(engine, batch: Batch, tokens: int) -> Begun:
    """Read `batch` as dense prompts, with `tokens` more to come.

    A policy that `reads_layer` filters the prompts first.
    """
    fed = condensed(engine, batch)
    longest = int(fed.length.max())
    S = bucket(longest)
    more = room(engine, min(S - longest, tokens)) or 0
    prompts = jnp.asarray(fed.padded(prompt_bucket(longest))), jnp.asarray(fed.length)
    logits, kv = engine._prefill(engine.model.params, *prompts, more)
    return Begun(fed, logits, kv, more)


def room(engine, tokens: int) -> int | None:
    """Free slots to reserve for `tokens` new tokens, a multiple of ROOM; None if no set grows."""
    if not any(layer.policy.appends for layer in engine.layers):
        return None
    return -(-max(tokens, 1) // ROOM) * ROOM


def condensed(engine, batch: Batch) -> Batch:
    """The prompts that are read: all of their tokens, or those that an early layer chooses."""
    layer = engine.policy.reads_layer(int(batch.length.max()))
    if layer is None:
        return batch
    S = prompt_bucket(int(batch.length.max()))
    at = np.asarray(
        engine._filter_prompt(
            engine.model.params, jnp.asarray(batch.padded(S)), jnp.asarray(batch.length), layer
        )
    )
    return Batch.from_lists(
        [row[p[p >= 0]].tolist() for row, p in zip(batch.tokens, at, strict=True)]
    )


def score(engine, batch: Batch, last: np.ndarray, progress: bool):
    """Score the last tokens of `batch`, last [B] of each, after the others as a dense prompt.

    Equal prompts are read once. Returns log-probabilities and hits [B, max(last)], three sums [L]
    over the tokens that were decoded (see `step.Scored`), and the bytes of K and V and of all else
    at the end.
    """
    heads = [
        tuple(row[: n - k].tolist())
        for row, n, k in zip(batch.tokens, batch.length, last, strict=True)
    ]
    start, of = shared.distinct(heads)
    begun = begin(engine, start, int(last.max()))
    rows, first = np.arange(last.max())[None], batch.length - last
    at = np.minimum(first[:, None] + rows, batch.tokens.shape[1] - 1)
    tokens = np.take_along_axis(batch.tokens, at, 1)
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    opening = engine._judge(begun.logits[jnp.asarray(of)], jnp.asarray(tokens[:, 0]))
    logprob, hit = jax.tree.map(np.asarray, opening)
    feed = shared.Feed(engine, tokens, targets, rows < last[:, None] - 1)
    steps, kv = int(last.max()) - 1, begun.kv
    logprobs = logprob[:, None]
    correct = hit[:, None]
    if steps:
        S = bucket(int(begun.fed.length.max()))
        if len(of) > len(start.length):
            kv = _spread(engine, kv, of, S, begun.room)
        with progress_bar(progress, steps, "score") as bar:
            done, free = 0, S - int(begun.fed.length.max())
            while done < steps:
                if not free:
                    grown = next_bucket(S)
                    layers = list(kv)
                    del kv
                    kv = engine._grow_each(layers, grown, steps - done)
                    free, S = grown - S, grown
                n = min(free, steps - done)
                kv = feed(kv, done, done + n, bar)
                done, free = done + n, free - n
        later_logprobs, later_correct = feed.rows()
        logprobs = np.concatenate([logprobs, later_logprobs], 1)
        correct = np.concatenate([correct, later_correct], 1)
        sums = feed.sums()
    else:
        sums = tuple(np.zeros(len(kv)) for _ in range(3))
    each = len(of) / len(kv[0].length)
    return logprobs, correct, *sums, *(each * size for size in bytes_of(kv))


def _spread(engine, kv, of: np.ndarray, S: int, room: int):
    """States of len(of) sequences; sequence i is a copy of sequence of[i] of `kv`."""
    new = engine.init(len(of), S, room)
    if engine.codec.frozen_after:
        new = tuple(engine._freeze(state, S) for state in new)
    return engine._adopt(new, kv, jnp.asarray(of), jnp.ones(len(of), jnp.bool_))
