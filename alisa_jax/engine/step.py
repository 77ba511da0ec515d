"""The pure functions that an engine jits: prompts, decode chunks, scoring. They decide nothing.

A chunk runs many decode steps inside one compiled loop; the number of steps is a traced number, so
the last and shorter chunk needs no program of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax import attention
from alisa_jax.attention import compute, reference
from alisa_jax.engine import sampling
from alisa_jax.kv.buckets import bucket
from alisa_jax.kv.cache import KVState
from alisa_jax.kv.state import LayerSpec, LayerState
from alisa_jax.models.decoder import Decoder

CHUNK_STEPS = 64


def init_layer(decoder: Decoder, spec: LayerSpec, B: int, S: int, room: int | None) -> LayerState:
    """The empty state of one layer; see `init`."""
    c = decoder.config
    dims = attention.dims_of(spec, B, c.n_heads, c.n_kv_heads, S, c.head_dim)
    if room is not None:
        dims = attention.prompt_dims(dims, spec, room)
    return attention.init(spec, dims, c.head_dim)


def init(
    decoder: Decoder, layers: tuple[LayerSpec, ...], B: int, S: int, room: int | None = None
) -> KVState:
    """States of all layers for B sequences and a context bucket of S tokens.

    room: given for states that begin with a prompt: free slots for what follows, in sets that grow.
    """
    return KVState(tuple((init_layer(decoder, spec, B, S, room),) for spec in layers))


def prefill(
    decoder: Decoder, layers, params, tokens, length, room: int = 0
) -> tuple[jax.Array, KVState]:
    """tokens [B, T], length [B] -> logits [B, V] of each last token, states for the bucket of T."""
    B, T = tokens.shape
    x = decoder.embed(params, tokens)
    states = []
    for block, spec in zip(params["blocks"], layers, strict=True):
        empty = init_layer(decoder, spec, B, bucket(T), room)

        def attend(q, k, v, empty=empty):
            return attention.prefill(empty, q, k, v, length)

        x, state = decoder.block(block, x, None, attend, rotate=spec.rotation is None)
        states.append((state,))
    return last_logits(decoder, params, x, length), KVState(tuple(states))


def filter_prompt(
    decoder: Decoder, policy, impl: str, params, tokens, length, layer: int
) -> jax.Array:
    """Positions [B, n] int32 that `policy` keeps of prompts: tokens [B, S], length [B].

    The policy reads queries and keys of `layer`; of later layers nothing is computed.
    """
    x = decoder.embed(params, tokens)
    for block in params["blocks"][:layer]:
        x, _ = decoder.block(
            block, x, None, lambda q, k, v: (compute.causal(q, k, v, length, impl), ())
        )
    block = params["blocks"][layer]
    _, (q, k) = decoder.block(block, x, None, lambda q, k, v: (jnp.zeros_like(q), (q, k)))
    last = jnp.take_along_axis(q, (length - 1)[:, None, None, None], axis=1)[:, 0]
    return policy.choose(last, k, length)


def last_logits(decoder: Decoder, params, x, length) -> jax.Array:
    """Logits [B, V] of the last token of each prompt, x [B, T, D]."""
    last = jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)
    return decoder.unembed(params, last)[:, 0]


def decode(
    decoder: Decoder, params, kv: KVState, token
) -> tuple[jax.Array, KVState, list[tuple[attention.Taps, ...]]]:
    """One step: token [B] int32 -> logits [B, V], new states, and the taps of each layer's parts.

    Layers attend; afterwards their sets change.
    """
    at = kv.lengths[:, None]
    x = decoder.embed(params, token[:, None], at)
    layers = []
    taps = []
    outs = []
    for block, layer in zip(params["blocks"], kv.layers, strict=True):

        def attend(q, k, v, layer=layer):
            out, layer, tap = attention.decode(layer, q[:, 0], k[:, 0], v[:, 0])
            return out[:, None], (layer, tap, out)

        rotate = layer[0].spec.rotation is None
        x, (layer, tap, out) = decoder.block(block, x, at, attend, rotate=rotate)
        layers.append(layer)
        taps.append(tap)
        outs.append(out)
    layers, loads = attention.exchange_sets(layers, outs)
    taps = [_with_loads(tap, load) for tap, load in zip(taps, loads, strict=True)]
    return decoder.unembed(params, x)[:, 0], KVState(tuple(layers)), taps


def _with_loads(taps: tuple[attention.Taps, ...], loads) -> tuple[attention.Taps, ...]:
    return tuple(tap._replace(loads=some) for tap, some in zip(taps, loads, strict=True))


def waits(kv: KVState) -> jax.Array:
    """[] bool: some layer waits for rows that are not on the device."""
    stores = [part.store for layer in kv.layers for part in layer if part.store is not None]
    return jnp.any(jnp.stack([jnp.zeros((), jnp.bool_), *(store.waits() for store in stores)]))


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
    `sampling.Draw`, or None for greedy steps.
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
    steps: jax.Array  # [] int32, steps taken


def score_chunk(
    decoder: Decoder, params, kv: KVState, tokens, targets, valid, n
) -> tuple[Scored, KVState]:
    """n <= CHUNK_STEPS teacher-forced steps; ends early after a step that leaves rows pending.

    tokens, targets [B, CHUNK_STEPS] int32; valid [B, CHUNK_STEPS] bool: what is counted.
    """
    L = len(kv.layers)
    none = jnp.zeros((L,), jnp.int32)
    zero = Scored(
        jnp.zeros(tokens.shape, jnp.float32),
        jnp.zeros(tokens.shape, jnp.bool_),
        jnp.zeros((L,), jnp.float32),
        none,
        none,
        jnp.zeros((), jnp.int32),
    )

    def body(carry):
        out, kv = carry
        i = out.steps
        column = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, 1)[:, 0]
        token = column(tokens)
        target = column(targets)
        counts = column(valid)
        tokens_now = kv.lengths + 1
        logits, kv, taps = decode(decoder, params, kv, token)
        logprob, correct = judge(logits, target)
        joined = lambda name: jnp.stack(
            [jnp.concatenate([getattr(tap, name) for tap in layer]) for layer in taps]
        )
        share = joined("attended") / tokens_now[None].astype(jnp.float32)
        loads = joined("loads")
        clipped = joined("clipped")
        return Scored(
            _column(out.logprobs, logprob, i),
            _column(out.correct, correct, i),
            out.attended + jnp.sum(jnp.where(counts[None], share, jnp.float32(0.0)), axis=1),
            out.loads + jnp.sum(jnp.where(counts[None], loads, 0), axis=1, dtype=jnp.int32),
            out.clipped + jnp.sum(jnp.where(counts[None], clipped, 0), axis=1, dtype=jnp.int32),
            i + 1,
        ), kv

    def goes_on(carry):
        out, kv = carry
        return (out.steps < n) & ((out.steps == 0) | ~waits(kv))

    return jax.lax.while_loop(goes_on, body, (zero, kv))


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
    x = decoder.embed(params, tokens)
    seen = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.float32)[None]  # by the dense query
    shares, clips = [], []
    for block, spec in zip(params["blocks"], layers, strict=True):

        def attend(q, k, v, spec=spec):
            out, *aux = reference.score(spec, q, k, v)
            return out, aux

        rotate = spec.rotation is None
        x, (attended, clipped) = decoder.block(block, x, None, attend, rotate=rotate)
        shares.append(jnp.sum(jnp.where(valid, attended / seen, jnp.float32(0.0))))
        clips.append(jnp.sum(jnp.where(valid, clipped, 0), dtype=jnp.int32))
    return *judge_all(decoder, params, x, targets), jnp.stack(shares), jnp.stack(clips)


def judge_all(
    decoder: Decoder, params, x: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`judge` [B, T] of the last layer's x [B, T, D] and targets [B, T] int32; T % 16 = 0."""
    B, T, D = x.shape
    size = 16 if T % 32 else 32  # positions whose logits are held at once
    blocks = jnp.moveaxis(x.reshape(B, T // size, size, D), 1, 0)
    wanted = jnp.moveaxis(targets.reshape(B, T // size, size), 1, 0)
    logprobs, correct = jax.lax.map(
        lambda b: judge(decoder.unembed(params, b[0]), b[1]), (blocks, wanted)
    )
    return tuple(jnp.moveaxis(y, 0, 1).reshape(B, T) for y in (logprobs, correct))


def freeze(state: LayerState, S: int) -> LayerState:
    """One part of a layer with its tokens encoded, for the bucket S."""
    return attention.grow(attention.freeze(state), S)


def adopt(kv: KVState, other: KVState, rows, which) -> KVState:
    """`kv` with the sequences `which` replaced by `rows` of `other`; see `LayerState.adopt`."""
    pairs = zip(kv.layers, other.layers, strict=True)
    return KVState(tuple((state.adopt(source, rows, which),) for (state,), (source,) in pairs))
