"""Attention maps of a whole text under a policy, one layer at a time.

    def see(layer, maps, length): print(layer, maps.weights.shape)
    logprobs = attentions(Engine(model, "swa(kv_sparsity=0.8)"), ["some text"], see)

The run is that of `Engine.score(protocol="prefill_mask")`, with one compiled function for all
layers of one policy; between two layers only the hidden states stay, so one layer's maps are held
at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.attention import maps
from alisa_jax.attention.maps import Maps
from alisa_jax.engine import step
from alisa_jax.kv.buckets import bucket


def attentions(engine, sequences, see: Callable[[int, Maps, np.ndarray], None]) -> list[np.ndarray]:
    """Call `see(layer, maps, length)` for every layer of `engine`'s model, first to last.

    sequences: texts or token ids. maps: NumPy arrays [B, *, T, T], T the longest sequence, see
    `alisa_jax.attention.maps.Maps`. length: [B]; rows and columns from there on are padding.
    Returns the log-probability in nats of every token but the first, [len - 1] float32 for each
    sequence, as `Engine.score` does. Raises ValueError, before anything runs, for what
    `Engine.score` refuses.
    """
    batch = engine.batch(sequences)
    T, length = int(batch.length.max()), batch.length
    engine.validate(T)
    engine.check_calibration(length)
    if engine.codec.raw_keys or any(spec.rotation is not None for spec in engine.layers):
        raise ValueError(
            f"maps are of keys that carry their positions; {engine.policy} with {engine.codec} "
            "places them anew"
        )
    decoder = engine.model.decoder
    params = engine.model.params
    tokens = batch.padded(bucket(T))
    x, at = _embed(decoder, _without_blocks(params), tokens)
    for layer, (spec, block) in enumerate(zip(engine.layers, params["blocks"], strict=True)):
        x, found = _layer(decoder, spec, block, x, at)
        see(layer, Maps(*(np.asarray(one)[:, :, :T, :T] for one in found)), length)
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    logprobs = np.asarray(_judge(decoder, _without_blocks(params), x, targets))
    return [row[: n - 1] for row, n in zip(logprobs, length, strict=True)]


def _without_blocks(params) -> dict:
    return {name: part for name, part in params.items() if name != "blocks"}


@functools.partial(jax.jit, static_argnums=0)
def _embed(decoder, params, tokens):
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    return decoder.embed(params, tokens, at), at


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(decoder, spec, block, x, at) -> tuple[jax.Array, Maps]:
    return decoder.block(block, x, at, functools.partial(maps.maps, spec))


@functools.partial(jax.jit, static_argnums=0)
def _judge(decoder, params, x, targets):
    return step.judge_all(decoder, params, x, targets)[0]
