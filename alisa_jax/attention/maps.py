"""Attention maps of one layer under a policy: what each query attended, and what it missed.

`maps` runs a whole text as `reference.score` does, row i under the selection that its own earlier
rows lead to. Then it computes all rows of weights at once from the same queries and keys, as the
codec stores them:

    weights[i] = softmax(q_i K^T / sqrt(H)) over the tokens that row i attends: with the policy
    dense[i]   = softmax(q_i K^T / sqrt(H)) over tokens 0 .. i: without it

The policy makes query i miss 1 - (the sum of dense[i] over the kept tokens) of its attention.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from alisa_jax.attention import reference
from alisa_jax.attention.compute import softmax
from alisa_jax.kv.state import LayerSpec


class Maps(NamedTuple):
    """Row i belongs to the query at position i; tokens that it does not attend are 0.

    In a padded batch, rows of padding hold garbage, and no other row attends them.
    """

    weights: jax.Array  # [B, N, T, T] float32, rows sum to 1
    kept: jax.Array  # [B, P, T, T] bool: attended, itself too; head n has selection n * P // N
    dense: jax.Array  # [B, N, T, T] float32: the weights of the same queries without a policy


def maps(spec: LayerSpec, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Maps]:
    """Run q [B, T, N, H] (unscaled), k and v [B, T, K, H] under the policy; return out and maps.

    Exactly causal, as decoding from an empty cache. A codec that begins raw needs its
    `frozen_after` tokens, and its first rows attend raw keys.
    """
    N, T = q.shape[2], q.shape[1]
    out, kept, _ = reference.score(spec, q, k, v, look=lambda taps: taps.pos >= 0)
    kept = jnp.moveaxis(kept, 2, 1)  # [B, P, T, T]
    z = _logits(spec.codec, q, k)
    causal = jnp.tril(jnp.ones((T, T), jnp.bool_))[None, None]
    weights = _softmax(z, jnp.repeat(kept, N // kept.shape[1], axis=1))
    return out, Maps(weights, kept, _softmax(z, causal))


def _logits(codec, q, k) -> jax.Array:
    """[B, N, T, T] float32, with the keys as they are stored when each row is attended."""
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
    raw = codec.raw.logits(heads, keys.astype(codec.raw.dtype)).reshape(B, N, T, T)
    return jnp.where(early, raw, z)


def _softmax(z, seen) -> jax.Array:
    e, total, _ = softmax(jnp.where(seen, z, -jnp.inf))
    return e / total
