"""Prompts read in chunks: a lane in every layer, and the pass of a prompt filter over its lanes.

A lane of each layer holds dense keys and values until the prompts are read, where `step.prefill`
holds one layer at a time: their bytes count as long as prompts are read.
"""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp

from alisa_jax import attention
from alisa_jax.attention import Lane
from alisa_jax.engine import step
from alisa_jax.kv.state import LayerSpec, LayerState
from alisa_jax.models.decoder import Decoder
from alisa_jax.policies.dense import Dense


@flax.struct.dataclass
class Lanes:
    """B prompts on their way through the first layers of a model, or all of them."""

    layers: tuple[Lane, ...]
    x: jax.Array  # [B, D]: the last token read of each prompt, behind these layers

    @property
    def length(self) -> jax.Array:
        """[B] int32: tokens read."""
        return self.layers[0].length


def begin(
    decoder: Decoder, layers: tuple[LayerSpec, ...], B: int, S: int, room: int, dtype
) -> Lanes:
    """Nothing is read of B prompts of up to `room` tokens, for states of the bucket S."""
    c = decoder.config
    lanes = [
        attention.begin(
            spec,
            attention.dims_of(spec, B, c.n_heads, c.n_kv_heads, S, c.head_dim),
            dtype,
            room,
        )
        for spec in layers
    ]
    return Lanes(tuple(lanes), jnp.zeros((B, c.d_model), dtype))


def extend(decoder: Decoder, params, lanes: Lanes, tokens, n) -> Lanes:
    """Read the first `n` [B] of tokens [B, C], the next of each prompt."""
    x, at = _chunk(decoder, params, lanes.length, tokens)
    x, layers = _through(decoder, params, lanes.layers, x, at, n)
    return Lanes(layers, _last(lanes.x, x, n))


def finish(decoder: Decoder, lane: Lane, S: int, room: int | None) -> LayerState:
    """The state of one layer for the bucket S, of prompts that are read; room: see `step.init`."""
    B = lane.length.shape[0]
    return attention.finish(lane, step.init_layer(decoder, lane.spec, B, S, room))


# ---- prompt filters


@flax.struct.dataclass
class Filtering:
    """Prompts on their way to the layer that a prompt filter reads."""

    lanes: Lanes  # of the layers before it
    k: jax.Array  # [B, T, K, H], the keys of that layer
    q: jax.Array  # [B, N, H], the query of the last token read of each prompt
    length: jax.Array  # [B] int32


def begin_filter(
    decoder: Decoder, spec: LayerSpec, layer: int, B: int, room: int, dtype
) -> Filtering:
    """Nothing is read of B prompts of up to `room` tokens; `layer` is read, as `spec` says."""
    c = decoder.config
    dense = (LayerSpec(Dense(), spec.codec, "masked", spec.impl),) * layer
    return Filtering(
        begin(decoder, dense, B, room, room, dtype),
        jnp.zeros((B, room, c.n_kv_heads, c.head_dim), dtype),
        jnp.zeros((B, c.n_heads, c.head_dim), dtype),
        jnp.zeros((B,), jnp.int32),
    )


def extend_filter(decoder: Decoder, params, found: Filtering, tokens, n) -> Filtering:
    """Read the first `n` [B] of tokens [B, C]; of later layers nothing is computed."""
    x, at = _chunk(decoder, params, found.length, tokens)
    x, layers = _through(decoder, params, found.lanes.layers, x, at, n)
    block = params["blocks"][len(layers)]
    _, (q, k) = decoder.block(block, x, at, lambda q, k, v: (jnp.zeros_like(q), (q, k)))
    return Filtering(
        Lanes(layers, found.lanes.x),
        attention.written(found.k, k, found.length, n),
        _last(found.q, q, n),
        found.length + n,
    )


def _through(decoder: Decoder, params, lanes: tuple[Lane, ...], x, at, n):
    """x [B, C, D] of a chunk behind the layers of `lanes`, and the lanes that have read it."""
    layers = []
    for block, lane in zip(params["blocks"], lanes):

        def attend(q, k, v, lane=lane):
            return attention.extend(lane, q, k, v, n)

        x, lane = decoder.block(block, x, at, attend, rotate=lane.spec.rotation is None)
        layers.append(lane)
    return x, tuple(layers)


def _chunk(decoder: Decoder, params, length, tokens):
    at = length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return decoder.embed(params, tokens, at), at


def _last(old, new, n):
    """`new` [B, C, ...] at n - 1, or `old` [B, ...] where n [B] is 0."""
    at = jnp.maximum(n - 1, 0).reshape(-1, *[1] * (new.ndim - 1))
    some = jnp.take_along_axis(new, at, axis=1)[:, 0]
    return jnp.where((n > 0).reshape(-1, *[1] * (old.ndim - 1)), some.astype(old.dtype), old)
