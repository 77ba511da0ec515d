"""Attention maps of one layer under a policy: what every query paid to every token, what it was let
see, and what it missed.

`maps` runs a whole text as `reference.score` does, row i under the selection that its own earlier
rows lead to, and then works out all rows of weights at once from the same queries and keys, as the
codec stores them:

    weights[i] = softmax(q_i K^T / sqrt(H)) over the tokens that row i attends      what the
    policy's own run paid
    dense[i]   = softmax(q_i K^T / sqrt(H)) over tokens 0 .. i                      what the same
               query would have paid

so 1 - sum of dense[i] over the kept tokens is the attention that the policy made query i miss.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax.attention import reference


class Maps(NamedTuple):
    """Row i belongs to the query at position i; what it does not attend is 0. Of a padded batch,
    rows of the padding hold
    nothing of use, and no other row attends them."""

    weights: jax.Array  # [B, N, T, T] float32, rows sum to 1
    # [B, P, T, T] bool: what was attended, itself included; head n has selection n * P // N
    kept: jax.Array
    dense: jax.Array  # [B, N, T, T] float32: the weights of the same queries without a policy


def maps(policy, codec, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Maps]:
    """q [B, T, N, H] unscaled, k and v [B, T, K, H] -> out [B, T, N, H] under the policy, and the
    maps.

    Exactly causal as decoding is, from an empty cache. A codec that begins raw needs its
    `frozen_after` tokens, and its first rows attend raw keys.
    """
    N, T = q.shape[2], q.shape[1]
    out, kept, _ = reference.score(policy, codec, q, k, v, look=lambda taps: taps.pos >= 0)
    kept = jnp.moveaxis(kept, 2, 1)  # [B, P, T, T]
    z = _logits(codec, q, k)
    causal = jnp.tril(jnp.ones((T, T), jnp.bool_))[None, None]
    return out, Maps(
        _softmax(z, jnp.repeat(kept, N // kept.shape[1], axis=1)), kept, _softmax(z, causal)
    )


def _logits(codec, q, k) -> jax.Array:
    """[B, N, T, T] float32, of the keys as they are stored when each row is attended."""
    B, T, N, H = q.shape
    K, raw_tokens = k.shape[2], codec.frozen_after
    scaled = q.astype(jnp.float32) * jnp.float32(H**-0.5)
    grouped = jnp.moveaxis(scaled.reshape(B, T, K, N // K, H), 1, 3)
    heads = grouped.reshape(B, K, -1, H)  # all queries of a group in one axis
    keys = jnp.swapaxes(k, 1, 2)
    z = codec.logits(heads, codec.fill(codec.empty(keys.shape, "slots", "k"), keys, "slots"))
    z = z.reshape(B, N, T, T)
    if not raw_tokens:
        return z
    early = (jnp.arange(T) < raw_tokens)[None, None, :, None]
    return jnp.where(
        early, codec.raw.logits(heads, keys.astype(codec.raw.dtype)).reshape(B, N, T, T), z
    )


def _softmax(z, seen) -> jax.Array:
    e = jnp.where(seen, z, -jnp.inf)
    e = jnp.exp(e - jnp.max(e, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)
