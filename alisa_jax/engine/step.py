"""The pure functions that an engine jits: prompt, decode chunks, scoring. They decide nothing.

A chunk runs many decode steps inside one compiled loop; the number of steps is a traced number, so
the last and shorter chunk needs no program of its own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax import attention
from alisa_jax.attention import compute, exchange, parts, reference
from alisa_jax.engine import sampling
from alisa_jax.kv.buckets import bucket
from alisa_jax.kv.ring import Ring
from alisa_jax.kv.state import KVState, LayerState
from alisa_jax.models.decoder import Decoder

CHUNK_STEPS = 64
Layer = parts.Kind


def init(
    decoder: Decoder, layers: tuple[Layer, ...], B: int, S: int, room: int | None = None
) -> KVState:
    """States of all layers for B sequences and a context bucket of S tokens.

    room: given for states that begin with a prompt: free slots for what follows, in sets that grow.
    """
    c, states = decoder.config, []
    for policy, codec, route, impl, turning in layers:
        dims = attention.dims_of(policy, route, B, c.n_heads, c.n_kv_heads, S, c.head_dim)
        if room is not None:
            dims = attention.prompt_dims(dims, policy, route, room)
        states.append(attention.init(policy, codec, route, dims, c.head_dim, impl, turning))
    return tuple(states)


def prefill(
    decoder: Decoder, layers, params, tokens, length, room: int = 0
) -> tuple[jax.Array, KVState]:
    """tokens [B, T], length [B] -> logits [B, V] of each last token, states for the bucket of T."""
    B, T = tokens.shape
    kv, x, at = list(init(decoder, layers, B, bucket(T), room)), *_embed(decoder, params, tokens)

    for layer, state in enumerate(kv):

        def attend(q, k, v, state=state):
            return attention.prefill(state, q, k, v, length)

        x, kv[layer] = decoder.block(
            params["blocks"][layer], x, at, attend, rotate=state.turning is None
        )
    last = jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)
    return decoder.unembed(params, last)[:, 0], tuple(kv)


def filter_prompt(
    decoder: Decoder, policy, impl: str, params, tokens, length, layer: int
) -> jax.Array:
    """Positions [B, n] int32 that `policy` keeps of prompts: tokens [B, S], length [B].

    The policy reads queries and keys of `layer`; of later layers nothing is computed.
    """
    x, at = _embed(decoder, params, tokens)
    for block in params["blocks"][:layer]:
        x, _ = decoder.block(
            block, x, at, lambda q, k, v: (compute.causal(q, k, v, length, impl), ())
        )
    _, (q, k) = decoder.block(
        params["blocks"][layer], x, at, lambda q, k, v: (jnp.zeros_like(q), (q, k))
    )
    last = jnp.take_along_axis(q, (length - 1)[:, None, None, None], axis=1)[:, 0]
    return policy.choose(last, k, length)


def decode(
    decoder: Decoder, params, kv: KVState, token
) -> tuple[jax.Array, KVState, list[attention.Taps]]:
    """One step: token [B] int32 -> logits [B, V], new states, taps of each layer.

    A layer may be in parts.
    """
    at = lengths(kv[0])[:, None]
    x = decoder.embed(params, token[:, None], at)
    states = []
    taps = []
    outs = []
    together = {}  # layers that exchange at once, by the key of `exchange.joint`
    for layer, state in enumerate(kv):
        whole = isinstance(state, LayerState)
        key = exchange.joint(state) if whole else None
        if key is not None:
            together.setdefault(key, []).append(layer)

        def attend(q, k, v, state=state, whole=whole, key=key):
            one = (
                functools.partial(attention.decode, exchange=key is None) if whole else parts.decode
            )
            out, state, tap = one(state, q[:, 0], k[:, 0], v[:, 0])
            return out[:, None], (state, tap, out)

        rotate = not whole or state.turning is None
        x, (state, tap, out) = decoder.block(params["blocks"][layer], x, at, attend, rotate=rotate)
        states.append(state)
        taps.append(tap)
        outs.append(out)
    for layers in together.values():
        changed, loads = exchange.exchange_layers(
            [states[i] for i in layers], [outs[i] for i in layers]
        )
        for i, state, count in zip(layers, changed, loads, strict=True):
            states[i], taps[i] = state, taps[i]._replace(loads=count)
    return decoder.unembed(params, x)[:, 0], tuple(states), taps


def lengths(layer) -> jax.Array:
    """[B] int32: tokens that a layer, in parts or not, has seen."""
    return (
        layer.length
        if isinstance(layer, LayerState)
        else jnp.concatenate([part.length for part in layer])
    )


def waits(kv) -> jax.Array:
    """[] bool: some layer waits for rows that are not on the device."""
    stores = [part.store for layer in kv if not isinstance(layer, LayerState) for part in layer]
    pending = [store.pending.any() for store in stores if isinstance(store, Ring)]
    return jnp.any(jnp.stack(pending)) if pending else jnp.zeros((), jnp.bool_)


class Chunk(NamedTuple):
    """A chunk of generation; columns from `steps` on hold nothing."""

    tokens: jax.Array  # [B, CHUNK_STEPS] int32
    margins: jax.Array  # [B, CHUNK_STEPS] float32: see `sampling.next_token`
    logprobs: jax.Array  # [B, CHUNK_STEPS] float32: nats under the model's own distribution
    token: jax.Array  # [B] int32, the input of the next step
    done: jax.Array  # [B] bool: a stop token has been produced
    steps: jax.Array  # [] int32, steps taken


def is_stop(token: jax.Array, eos: jax.Array) -> jax.Array:
    """[B] bool: `token` [B] is one of `eos` [E]."""
    return jnp.any(token[:, None] == eos[None], axis=-1)


def generate_chunk(
    decoder: Decoder, params, kv: KVState, token, done, eos, n, draw=None
) -> tuple[Chunk, KVState]:
    """Up to n <= CHUNK_STEPS steps from `token` [B].

    Ends early when every sequence is done, and after a step that leaves rows pending. draw: a
    `sampling.Draw` or `Forced`, or None for greedy steps.
    """
    B = token.shape[0]
    empty = jnp.zeros((B, CHUNK_STEPS), jnp.float32)
    out = Chunk(
        jnp.zeros((B, CHUNK_STEPS), jnp.int32), empty, empty, token, done, jnp.zeros((), jnp.int32)
    )

    def body(carry):
        out, kv = carry
        logits, kv, _ = decode(decoder, params, kv, out.token)
        token, margin, logprob = sampling.next_token(logits, draw, out.steps)
        return Chunk(
            _column(out.tokens, token, out.steps),
            _column(out.margins, margin, out.steps),
            _column(out.logprobs, logprob, out.steps),
            token,
            out.done | is_stop(token, eos),
            out.steps + 1,
        ), kv

    def goes_on(carry):
        out, kv = carry
        return (out.steps < n) & ~jnp.all(out.done) & ((out.steps == 0) | ~waits(kv))

    return jax.lax.while_loop(goes_on, body, (out, kv))


def _column(x: jax.Array, new: jax.Array, at) -> jax.Array:
    """x [B, n] with `new` [B] in column `at` [] int32."""
    return jax.lax.dynamic_update_slice_in_dim(x, new[:, None], at, axis=1)


class Scored(NamedTuple):
    """A chunk of teacher-forced decoding."""

    logprobs: jax.Array  # [B, CHUNK_STEPS] float32, nats
    correct: jax.Array  # [B, CHUNK_STEPS] bool: the greedy token is the target
    attended: jax.Array  # [L] float32: attended share of the context, summed over all steps
    loads: jax.Array  # [L] int32: rows copied from the stores
    clipped: jax.Array  # [L] int32: elements of K and V that the codec clipped


def score_chunk(
    decoder: Decoder, params, kv: KVState, tokens, targets, valid, n
) -> tuple[Scored, KVState]:
    """n <= CHUNK_STEPS teacher-forced steps.

    tokens, targets [B, CHUNK_STEPS] int32; valid [B, CHUNK_STEPS] bool: what is counted.
    """
    L = len(kv)
    none = jnp.zeros((L,), jnp.int32)
    zero = Scored(
        jnp.zeros(tokens.shape, jnp.float32),
        jnp.zeros(tokens.shape, jnp.bool_),
        jnp.zeros((L,), jnp.float32),
        none,
        none,
    )

    def body(i, carry):
        out, kv = carry
        column = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, 1)[:, 0]
        token = column(tokens)
        target = column(targets)
        counts = column(valid)
        length = kv[0].length
        logits, kv, taps = decode(decoder, params, kv, token)
        logprob, correct = judge(logits, target)
        share = jnp.stack([t.attended / (length + 1).astype(jnp.float32) for t in taps])
        loads = jnp.stack([t.loads for t in taps])
        clipped = jnp.stack([t.clipped for t in taps])
        return Scored(
            _column(out.logprobs, logprob, i),
            _column(out.correct, correct, i),
            out.attended + jnp.sum(jnp.where(counts[None], share, jnp.float32(0.0)), axis=1),
            out.loads + jnp.sum(jnp.where(counts[None], loads, 0), axis=1, dtype=jnp.int32),
            out.clipped + jnp.sum(jnp.where(counts[None], clipped, 0), axis=1, dtype=jnp.int32),
        ), kv

    return jax.lax.fori_loop(0, n, body, (zero, kv))


def judge(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits [..., V], target [...] -> nats of the target, and whether it is the greedy token."""
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return chosen - jax.nn.logsumexp(logits, axis=-1), best == target


def score_masked(decoder: Decoder, layers, params, tokens, targets, valid):
    """Protocol `prefill_mask`: tokens, targets [B, T] int32, valid [B, T] bool, T a multiple of 32.

    Returns log-probabilities and hits [B, T], and two sums [L] over valid tokens: of the share that
    was attended, and of the elements that the codec clipped.
    """
    x, at = _embed(decoder, params, tokens)
    shares, clips = [], []
    for layer, (policy, codec, _, _, turning) in enumerate(layers):

        def attend(q, k, v, policy=policy, codec=codec, turning=turning):
            out, *aux = reference.score(policy, codec, q, k, v, turning=turning)
            return out, aux

        x, (attended, clipped) = decoder.block(
            params["blocks"][layer], x, at, attend, rotate=turning is None
        )
        share = attended / (at + 1).astype(jnp.float32)
        shares.append(jnp.sum(jnp.where(valid, share, jnp.float32(0.0))))
        clips.append(jnp.sum(jnp.where(valid, clipped, 0), dtype=jnp.int32))
    return *judge_all(decoder, params, x, targets), jnp.stack(shares), jnp.stack(clips)


def judge_all(
    decoder: Decoder, params, x: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`judge` [B, T] of the last layer's x [B, T, D] and targets [B, T] int32; T % 32 = 0."""
    B, T, D = x.shape
    size = 32  # positions whose logits are held at once
    blocks = jnp.moveaxis(x.reshape(B, T // size, size, D), 1, 0)
    wanted = jnp.moveaxis(targets.reshape(B, T // size, size), 1, 0)
    logprobs, correct = jax.lax.map(
        lambda b: judge(decoder.unembed(params, b[0]), b[1]), (blocks, wanted)
    )
    return tuple(jnp.moveaxis(y, 0, 1).reshape(B, T) for y in (logprobs, correct))


def grow(state: LayerState, S: int, room: int | None = None) -> LayerState:
    """One layer's state for the bucket S; see `attention.grow`."""
    return attention.grow(state, S, room)


def freeze(state: LayerState, S: int) -> LayerState:
    """One layer's state with its tokens encoded, for the bucket S."""
    return attention.grow(attention.freeze(state), S)


def adopt(kv: KVState, other: KVState, rows, which) -> KVState:
    """The states of all layers with sequences of `other`; see `LayerState.adopt`."""
    return tuple(state.adopt(source, rows, which) for state, source in zip(kv, other, strict=True))


def _embed(decoder: Decoder, params, tokens):
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    return decoder.embed(params, tokens, at), at
