"""The pure functions of steps whose queries choose: what a layer chooses, and its attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alisa_jax import attention
from alisa_jax.attention import fetched
from alisa_jax.kv.cache import Layer, lengths
from alisa_jax.models.decoder import Decoder


def choose(decoder: Decoder, block, x, state) -> jax.Array:
    """The tokens [B, K, M] that a layer's query chooses in its away part, see `fetched.chosen`.

    x [B, 1, D]: of all sequences, what enters this layer, or, for a guess, what entered an earlier
    one. It goes through this layer's norm and projection, and is rotated to the query's position.
    """
    mine = x[x.shape[0] - state.length.shape[0] :]
    at = state.length[:, None]
    _, q = decoder.block(block, mine, at, lambda q, k, v: (jnp.zeros_like(q), q[:, 0]))
    return fetched.chosen(state, q)


def chosen_layer(decoder: Decoder, block, x, states: Layer, pos, leaves):
    """One layer of a decode step; its away part attends the tokens `pos`, see `fetched.decode`.

    x [B, 1, D]. pos: None for a layer that is on the device whole. Returns (x, states, clipped
    elements [B], attended shares of the context [B]).
    """
    at = lengths(states)[:, None]

    def attend(q, k, v):
        given = states, q[:, 0], k[:, 0], v[:, 0]
        out, *rest = (
            attention.decode(*given) if pos is None else fetched.decode(*given, pos, leaves)
        )
        return out[:, None], rest

    x, (states, taps) = decoder.block(block, x, at, attend, rotate=states[0].spec.rotation is None)
    joined = lambda name: jnp.concatenate([getattr(tap, name) for tap in taps])
    share = joined("attended") / (at[:, 0] + 1).astype(jnp.float32)
    return x, states, joined("clipped"), share
