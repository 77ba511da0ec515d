"""Layers whose tokens were chosen before their query came, and fetched from the host meanwhile.

The last part of such a layer keeps a `Ring`, and on the device what its policy chooses by. Tokens
are chosen by a guess of the query (`chosen`); those that the ring does not hold are fetched, into
the slots that they will have; then the true query attends what was chosen (`decode`). Where the
guess is the true query, this is the route `indexed` with the same arrays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alisa_jax.attention import compute, layer
from alisa_jax.attention.layer import Taps
from alisa_jax.attention.parts import Leaves, halves
from alisa_jax.kv.cache import Layer
from alisa_jax.kv.state import LayerState, bias_of


def chosen(state: LayerState, q: jax.Array) -> jax.Array:
    """[B, K, M] int32: tokens that a query q [B, N, H], rotated, attends of a part; -1 for none.

    Its own is among them, though the part has not seen it yet.
    """
    K = state.spec.codec.leaves(state.store.k)[0].shape[2]
    pos = layer.chosen(state, q.reshape(q.shape[0], K, -1, q.shape[-1]))
    return jnp.broadcast_to(pos, (pos.shape[0], K, pos.shape[2]))


def decode(
    parts: Layer, q, k, v, pos: jax.Array, leaves: Leaves
) -> tuple[jax.Array, Layer, tuple[Taps, ...]]:
    """As `attention.decode`; the last part attends `pos` [B, K, M] (see `chosen`) of its sequences.

    leaves [B, K, M, *]: K and V of these tokens; read where a token is not in the ring.
    """

    def attend(state, q, k, v):
        return _attend(state, q, k, v, pos, leaves)

    *whole, away = zip(parts, layer.cut(parts, q, k, v), strict=True)
    done = [layer.decode_part(part, *mine) for part, mine in whole]
    done.append(layer.decode_part(away[0], *away[1], attend))
    outs, states, taps = zip(*done, strict=True)
    return jnp.concatenate(outs), states, taps


def _attend(state: LayerState, q, k, v, pos, leaves):
    spec = state.spec
    store = state.store.append(spec.codec, k, v, state.length)
    away = (pos >= 0) & (pos < store.host[:, None, None])
    pairs = zip(store.take(spec.codec, pos), halves(leaves), strict=True)
    rows = [_rows(spec.codec, here, fetched, away) for here, fetched in pairs]
    bias = bias_of(pos)
    turn = layer.turn_of(spec.policy, spec.rotation, pos, state.length)
    piece, mass = compute.slots(spec.codec, q, *rows, bias, spec.impl, turn)
    return piece, state.replace(store=store), layer.taps_of(mass, pos, bias)


def _rows(codec, here, fetched: Leaves, away):
    """`here`, head-major, with the rows `fetched` where `away` [B, K, M]."""
    pairs = zip(codec.leaves(here), fetched, strict=True)
    joined = [
        jnp.where(away.reshape(*away.shape, *[1] * (old.ndim - 3)), new, old) for old, new in pairs
    ]
    return codec.rebuild(here, tuple(joined))
