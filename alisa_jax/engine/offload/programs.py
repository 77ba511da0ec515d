"""The pure functions that placed runs jit: prompts by layer, what obeys a plan, dense layers.

The layers of `kv` are in parts (`alisa_jax.attention.parts`); the away part, where there is one, is
the last. `placed` names the layers whose tokens a controller places.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax import attention
from alisa_jax.attention import compute, parts
from alisa_jax.attention.parts import Leaves, Part, Streamed
from alisa_jax.engine import step
from alisa_jax.engine.offload import guessing
from alisa_jax.kv.cache import KVState, Layer, lengths
from alisa_jax.kv.state import LayerSpec
from alisa_jax.models.decoder import Decoder
from alisa_jax.placement.plan import PAGE_TOKENS


class Cut(NamedTuple):
    """Pages first .. stop - 1 of some sequences of the away part, counted from its first."""

    sequences: tuple[int, ...]
    first: int
    stop: int


class Waiting(NamedTuple):
    """What the away parts of the placed layers wait for: `kv.pending.Pending` by layer."""

    pos: jax.Array  # [L, B, P, PENDING_ROWS] int32
    slot: jax.Array  # [L, B, P, PENDING_ROWS] int32
    more: jax.Array  # [] bool


def embed(decoder: Decoder, params, tokens, at=None) -> jax.Array:
    """tokens [B, T] at positions `at` [B, T] -> x [B, T, D]; at: None for 0 .. T - 1."""
    return decoder.embed(params, tokens, at)


def prefill_layer(
    decoder: Decoder,
    spec: LayerSpec,
    layout: tuple[Part, ...],
    cuts: tuple[Cut, ...],
    block,
    x,
    length,
    host,
):
    """One layer of a prompt: (x, its parts, for each cut the leaves of each page)."""

    def attend(q, k, v):
        out, states, kept = parts.prefill(spec, layout, q, k, v, length, host)
        pages = [
            [
                parts.prompt_page(spec, kept, c.sequences, page, PAGE_TOKENS)
                for page in range(c.first, c.stop)
            ]
            for c in cuts
        ]
        return out, (states, pages)

    x, (states, pages) = decoder.block(block, x, None, attend, rotate=spec.rotation is None)
    return x, states, pages


def steps(decoder: Decoder, placed: tuple[int, ...], params, kv, token, done, eos, n, draw):
    """`step.generate_chunk` on layers in parts, and what is pending then (None: no away part)."""
    out, kv = step.generate_chunk(decoder, params, kv, token, done, eos, n, draw)
    return out, kv, waiting(placed, kv)


def score(decoder: Decoder, placed: tuple[int, ...], params, kv, tokens, targets, valid, n):
    """`step.score_chunk` on layers in parts, and what is pending then (None: no away part)."""
    out, kv = step.score_chunk(decoder, params, kv, tokens, targets, valid, n)
    return out, kv, waiting(placed, kv)


def waiting(placed: tuple[int, ...], kv: KVState) -> Waiting | None:
    """What is pending in `kv`, as one set of arrays of its own; None where nothing can be."""
    stores = [part.store for part in away(placed, kv) if part.store is not None]
    pending = [store.pending for store in stores if jax.tree.leaves(store.pending)]
    if not pending:
        return None
    more = jnp.any(jnp.stack([d.more for d in pending]))
    return Waiting(jnp.stack([d.pos for d in pending]), jnp.stack([d.slot for d in pending]), more)


def away(placed: tuple[int, ...], kv: KVState) -> list:
    """The away part of each placed layer."""
    return [kv.layers[layer][-1] for layer in placed]


def held(placed: tuple[int, ...], kv: KVState) -> jax.Array:
    """[L, B, P, M] int32: the token of each active slot of the away parts, -1 elsewhere."""
    sets = [part.ws for part in away(placed, kv)]
    return jnp.stack([jnp.where(ws.bias > -jnp.inf, ws.pos, -1) for ws in sets])


def ring_pages(placed: tuple[int, ...], kv: KVState, sequences, page) -> list[Leaves]:
    """A page of `sequences` [n] from the ring of each placed layer."""
    return [parts.ring_page(part, sequences, page, PAGE_TOKENS) for part in away(placed, kv)]


def move_host(placed: tuple[int, ...], kv, host):
    """`kv` with rings that begin at `host` [B]."""
    return _away(placed, kv, lambda _, state: parts.moved(state, host))


def deliver(placed: tuple[int, ...], clear: bool, kv, leaves: Leaves, layer, sequence, pos, slot):
    """`kv` with rows `leaves` [R, K, *] delivered; see `parts.deliver`.

    layer, sequence, pos: [R], whose rows they are. slot: [R, P], where they go.
    """

    def one(i, state):
        mine = jnp.where(layer == i, sequence, -1)
        return parts.deliver(state, leaves, mine, pos, slot, clear)

    return _away(placed, kv, one)


def resume(placed: tuple[int, ...], kv):
    """The exchanges that broke off, continued; and what is pending then."""
    kv = _away(placed, kv, lambda _, state: parts.resume(state))
    return kv, waiting(placed, kv)


def recompute(
    decoder: Decoder,
    placed: tuple[int, ...],
    clear: bool,
    params,
    kv,
    tokens,
    length,
    sequence,
    pos,
    slot,
):
    """`kv` with tokens computed anew from the ids of their prefixes and delivered.

    tokens [n, T], length [n], sequence [n] of the away part (-1: none); pos [L, n, E] the tokens
    wanted, -1 none, and their slots [L, n, E, P]. A prefix depends on itself alone, so this is what
    the prompt gave.
    """
    n, E = pos.shape[1:]
    x = decoder.embed(params, tokens)
    layers = list(kv.layers)
    for layer in range(placed[-1] + 1):
        spec = layers[layer][-1].spec

        def attend(q, k, v, layer=layer, spec=spec):
            state = layers[layer][-1]
            out = _causal(spec, q, k, v, length)
            if layer not in placed:
                return out, None
            i = placed.index(layer)
            leaves = parts.encoded(state, k, v, jnp.maximum(sequence, 0), pos[i])
            rows = jnp.where(pos[i] >= 0, sequence[:, None], -1).reshape(n * E)
            return out, parts.deliver(
                state, leaves, rows, pos[i].reshape(n * E), slot[i].reshape(n * E, -1), clear
            )

        block = params["blocks"][layer]
        x, state = decoder.block(block, x, None, attend, rotate=spec.rotation is None)
        if state is not None:
            layers[layer] = (*layers[layer][:-1], state)
    return KVState(tuple(layers))


def dense_layer(
    decoder: Decoder,
    order: tuple[int, ...],
    block,
    x,
    states: Layer,
    host,
    dropped,
    staged,
    first,
    prefix,
):
    """One layer of a decode step; its away part attends its ring, `staged` and `prefix`.

    x [B, 1, D]. staged: leaves [n, K, T, *] of each group of sequences, with positions from `first`
    on; () for nothing. order: the places of the away sequences among them. prefix: recomputed
    leaves of positions from 0 on, or (). Returns (x, states, clipped elements [B]).
    """
    at = lengths(states)[:, None]
    pieces = []
    if staged or prefix:
        joined = (
            tuple(_ordered(leaf, order) for leaf in zip(*staged, strict=True)) if staged else prefix
        )
        pieces.append(Streamed(joined, first))
    if prefix:
        pieces.append(Streamed(prefix, jnp.zeros_like(first)))

    def attend(q, k, v):
        out, *new = parts.decode_streamed(
            states, q[:, 0], k[:, 0], v[:, 0], host, dropped, tuple(pieces)
        )
        return out[:, None], new

    rotate = states[0].spec.rotation is None
    x, (states, clipped) = decoder.block(block, x, at, attend, rotate=rotate)
    return x, states, clipped


def prefix_layer(decoder: Decoder, block, x, length, state):
    """One layer of the prefixes of the away part: (x, leaves [B, K, T, *] as its ring has them)."""
    spec = state.spec

    def attend(q, k, v):
        ws = state.ws
        codec = spec.codec
        leaves = [
            codec.encode(packed, jnp.swapaxes(y, 1, 2), "slots")
            for packed, y in ((ws.k, k), (ws.v, v))
        ]
        return _causal(spec, q, k, v, length), (*leaves[0], *leaves[1])

    return decoder.block(block, x, None, attend, rotate=spec.rotation is None)


def _causal(spec: LayerSpec, q, k, v, length) -> jax.Array:
    """Dense attention over prompts, whose q and k come as the layer's keys are stored."""
    q = attention.turned_prompt(q, spec.rotation)
    k = attention.turned_prompt(k, spec.rotation)
    return compute.causal(q, k, v, length, spec.impl)


def refresh_layer(decoder: Decoder, spec: LayerSpec, block, x, states: Layer, full: Leaves | None):
    """One layer of a decode step whose away part attends `full`; see `parts.decode_full`.

    x [B, 1, D]; full: None for a layer that is not placed. Returns (x, states, what attention
    returned [B, N, H], attended and clipped [B]).
    """
    at = lengths(states)[:, None]

    def attend(q, k, v):
        now = q[:, 0], k[:, 0], v[:, 0]
        out, new, taps = (
            attention.decode(states, *now)
            if full is None
            else parts.decode_full(spec, states, *now, full)
        )
        attended = jnp.concatenate([tap.attended for tap in taps])
        clipped = jnp.concatenate([tap.clipped for tap in taps])
        return out[:, None], (new, out, (attended, clipped))

    x, (states, out, taps) = decoder.block(block, x, at, attend, rotate=spec.rotation is None)
    return x, states, out, taps


def exchange(placed: tuple[int, ...], layers: tuple[Layer, ...], outs):
    """The cache with the sets of the next step, after `refresh_layer` of each; what is pending."""
    found, _ = attention.exchange_sets(layers, outs)
    kv = KVState(tuple(found))
    return kv, waiting(placed, kv)


def widen(leaves: Leaves, T: int) -> Leaves:
    """Streamed leaves [n, K, t, *] with T positions."""
    return tuple(
        jnp.pad(x, [(0, T - s if axis == 2 else 0) for axis, s in enumerate(x.shape)])
        for x in leaves
    )


def _ordered(groups: tuple[jax.Array, ...], order: tuple[int, ...]) -> jax.Array:
    joined = groups[0] if len(groups) == 1 else jnp.concatenate(groups)
    return joined if order == tuple(range(len(order))) else joined[jnp.asarray(order)]


def _away(placed: tuple[int, ...], kv: KVState, change) -> KVState:
    """`kv` with `change(i, state)` of the away part of the i-th placed layer."""
    layers = list(kv.layers)
    for i, layer in enumerate(placed):
        layers[layer] = (*layers[layer][:-1], change(i, layers[layer][-1]))
    return KVState(tuple(layers))


class PlacedPrograms:
    """The functions above, jitted for `engine`; `Engine.compiles` counts their traces."""

    def __init__(self, engine, placed: tuple[int, ...]):
        decoder = engine.model.decoder
        jit = engine.programs.jit
        on = functools.partial
        self.embed = jit(on(embed, decoder))
        self.last_logits = jit(on(step.last_logits, decoder))
        self.judge_all = jit(on(step.judge_all, decoder))
        self.prefill_layer = jit(on(prefill_layer, decoder), static_argnums=(0, 1, 2))
        self.next_token = engine.programs.next_token
        self.steps = jit(on(steps, decoder, placed), donate_argnums=1)
        self.score = jit(on(score, decoder, placed), donate_argnums=1)
        self.judge = engine.programs.judge
        self.held = jit(on(held, placed))
        self.ring_pages = jit(on(ring_pages, placed))
        self.move_host = jit(on(move_host, placed), donate_argnums=0)
        self.deliver = jit(on(deliver, placed), static_argnums=0, donate_argnums=1)
        self.resume = jit(on(resume, placed), donate_argnums=0)
        self.recompute = jit(on(recompute, decoder, placed), static_argnums=0, donate_argnums=2)
        self.dense_layer = jit(on(dense_layer, decoder), static_argnums=0, donate_argnums=3)
        self.choose = jit(on(guessing.choose, decoder))
        self.chosen_layer = jit(on(guessing.chosen_layer, decoder), donate_argnums=2)
        self.prefix_layer = jit(on(prefix_layer, decoder))
        self.unrolled = jit(parts.unrolled)
        self.spread = jit(parts.spread, donate_argnums=0)
        self.refresh_layer = jit(on(refresh_layer, decoder), static_argnums=0, donate_argnums=3)
        self.exchange = jit(on(exchange, placed), donate_argnums=0)
        self.widen = jit(widen, static_argnums=1)
        self.unembed = jit(lambda params, x: decoder.unembed(params, x)[:, 0])
