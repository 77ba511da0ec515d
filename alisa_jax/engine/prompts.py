"""Prefill: filter the prompts, read them whole or in chunks, return the layer states."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.engine.batch import Batch
from alisa_jax.kv.buckets import bucket, prompt_bucket
from alisa_jax.kv.cache import KVState
from alisa_jax.kv.state import tree_bytes

ROOM = 32  # tokens; sets grow in multiples of it, so that few programs are compiled


class Begun(NamedTuple):
    """A batch of prompts that has been read."""

    fed: Batch  # the tokens that were read: the prompts, or what a policy kept of them
    logits: jax.Array  # [B, V] of the last token of each
    kv: KVState  # for the bucket of the longest
    room: int  # free slots of working sets that grow
    lane_bytes: int  # that prompts read in chunks took until their states were made


def begin(engine, batch: Batch, tokens: int) -> Begun:
    """Read `batch` as dense prompts, with `tokens` more to come.

    A policy that `reads_layer` filters the prompts first.
    """
    fed = condensed(engine, batch)
    longest = int(fed.length.max())
    S = bucket(longest)
    more = room(engine, min(S - longest, tokens)) or 0
    read = _whole if engine.chunk_tokens is None else _in_chunks
    logits, kv, lane_bytes = read(engine, fed, S, more)
    return Begun(fed, logits, kv, more, lane_bytes)


def room(engine, tokens: int) -> int | None:
    """Free slots to reserve for `tokens` new tokens, a multiple of ROOM; None if no set grows."""
    if not any(spec.policy.appends for spec in engine.layers):
        return None
    return -(-max(tokens, 1) // ROOM) * ROOM


def condensed(engine, batch: Batch) -> Batch:
    """The prompts that are read: all of their tokens, or those that an early layer chooses."""
    layer = engine.policy.reads_layer(int(batch.length.max()))
    if layer is None:
        return batch
    choose = _chosen if engine.chunk_tokens is None else _chosen_in_chunks
    at = np.asarray(choose(engine, batch, layer))
    return Batch.from_lists(
        [row[p[p >= 0]].tolist() for row, p in zip(batch.tokens, at, strict=True)]
    )


def _padded(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, T] and lengths [B] as programs read them."""
    T = prompt_bucket(int(batch.length.max()))
    return jnp.asarray(batch.padded(T)), jnp.asarray(batch.length)


def _whole(engine, fed: Batch, S: int, more: int) -> tuple[jax.Array, KVState, int]:
    del S  # the program knows it by its padded tokens
    return *engine.programs.prefill(engine.model.params, *_padded(fed), more), 0


def _in_chunks(engine, fed: Batch, S: int, more: int) -> tuple[jax.Array, KVState, int]:
    programs = engine.programs
    B, T = len(fed.length), prompt_bucket(int(fed.length.max()))
    lanes = programs.begin(B, S, T, engine.dtype)
    for tokens, n in chunks(fed, engine.chunk_tokens):
        lanes = programs.extend(engine.model.params, lanes, tokens, n)
    lane_bytes = tree_bytes(lanes)
    layers = list(lanes.layers)
    x = lanes.x
    del lanes  # `layers` alone holds them: a lane is freed when its state is made
    kv = programs.finish_each(layers, S, more)
    return programs.last_logits(engine.model.params, x), kv, lane_bytes


def _chosen(engine, batch: Batch, layer: int) -> jax.Array:
    return engine.programs.filter_prompt(engine.model.params, *_padded(batch), layer)


def _chosen_in_chunks(engine, batch: Batch, layer: int) -> jax.Array:
    programs = engine.programs
    B, T = len(batch.length), prompt_bucket(int(batch.length.max()))
    found = programs.begin_filter(layer, B, T, engine.dtype)
    for tokens, n in chunks(batch, engine.chunk_tokens):
        found = programs.extend_filter(engine.model.params, found, tokens, n)
    return programs.choose(found.q, found.k, found.length)


def chunks(batch: Batch, size: int):
    """The next `size` tokens [B, size] of each prompt, and how many of them are there, n [B]."""
    longest = int(batch.length.max())
    padded = batch.padded(-(-longest // size) * size)
    for first in range(0, longest, size):
        n = np.clip(batch.length - first, 0, size).astype(np.int32)
        yield jnp.asarray(padded[:, first : first + size]), jnp.asarray(n)
