"""Merging neighbours with similar keys: sets, pivots and weights, all in static shapes.

Tokens lie on the last axis, T of them, padding behind; leading axes are [B, K]. A set is a run of
tokens, and `ids` numbers the sets from 0, ascending: a token of padding is a set by itself. All
arithmetic is float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

STEPS = 20  # halvings of an interval of 3: cosines closer than 3e-6 count as equal
ITERATIONS = 200  # of the fixed point of sigma: 168 reach 1e-7 where it converges most slowly


def cosines(k: jax.Array) -> jax.Array:
    """[B, K, T]: cosine of each key of `k` [B, K, T, H] and the next one, in [-1, 1].

    A key of length 0 has cosine 0 to all others. NaN, and the last token, which has no next one,
    give -1.
    """
    k = k.astype(jnp.float32)
    size = jnp.sqrt(jnp.sum(jnp.square(k), axis=-1, keepdims=True))
    k = k / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)
    cos = jnp.clip(jnp.sum(k[:, :, :-1] * k[:, :, 1:], axis=-1), -1.0, 1.0)
    cos = jnp.where(jnp.isnan(cos), -1.0, cos)
    return jnp.pad(cos, ((0, 0), (0, 0), (0, 1)), constant_values=-1.0)


def pairs(free: jax.Array) -> jax.Array:
    """[B, K, T] bool: token i and the next one may share a set; `free` [B, K, T]: may merge."""
    return free & jnp.pad(free[..., 1:], ((0, 0), (0, 0), (0, 1)))


def fitted(cos: jax.Array, may: jax.Array, length: jax.Array, allowed: jax.Array) -> jax.Array:
    """[B, K, 1]: the highest threshold that leaves at most `allowed` [B, 1, 1] sets of a prompt.

    It is found by bisection, and 1 if all `length` [B, 1, 1] tokens may stay. The pairs of `may`
    [B, K, T] can join; if all of them do (-2), few enough sets must be left.
    """

    def fits(threshold):
        joins = jnp.sum(may & (cos > threshold), axis=-1, keepdims=True, dtype=jnp.int32)
        return length - joins <= allowed

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        good = fits(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    high = jnp.ones((*cos.shape[:2], 1), jnp.float32)
    return jax.lax.fori_loop(0, STEPS, halve, (jnp.where(fits(high), high, -2.0 * high), high))[0]


def numbered(joins: jax.Array) -> jax.Array:
    """`ids` [B, K, T] int32 of the sets; `joins` [B, K, T] bool: tokens i and i + 1 share a set.

    Scanning from the last token, i opens a set unless it joins; here the same sets are numbered
    from the first token.
    """
    # true for the first token of each set
    opens = jnp.pad(~joins[..., :-1], ((0, 0), (0, 0), (1, 0)))
    return jnp.cumsum(opens, axis=-1, dtype=jnp.int32)


def over(reduce, x: jax.Array, ids: jax.Array, n: int) -> jax.Array:
    """Reduce x [B, K, T, *] over the sets of ascending `ids` [B, K, T]: [B, K, n, *].

    reduce: a segment operation of `jax.ops`. Ids from n on are dropped.
    """
    each = lambda x, ids: reduce(x, ids, num_segments=n, indices_are_sorted=True)
    return jax.vmap(jax.vmap(each))(x, ids)


def spread(reduce, x: jax.Array, ids: jax.Array) -> jax.Array:
    """As `over`, and every token gets the result of its set: [B, K, T]."""
    return jnp.take_along_axis(
        over(reduce, x, ids, ids.shape[-1]), ids, axis=-1, mode="promise_in_bounds"
    )


def pivots(mass: jax.Array, ids: jax.Array) -> jax.Array:
    """[B, K, T] int32: the token with the most `mass` [B, K, T] in each token's set.

    Of equals the first counts; NaN is least.
    """
    T = ids.shape[-1]
    mass = jnp.where(jnp.isnan(mass), -jnp.inf, mass)
    best = mass == spread(jax.ops.segment_max, mass, ids)
    place = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 2)
    return spread(jax.ops.segment_min, jnp.where(best, place, T), ids)


def weights(k: jax.Array, pivot: jax.Array, ids: jax.Array, sigma: float | str) -> jax.Array:
    """[B, K, T]: g / sum of g over each set; g = exp(-|k_p - k|^2 / (2 sigma^2)), p its pivot.

    k [B, K, T, H]; pivot, ids [B, K, T]. sigma is one of

        a number
        "mean_dist"   the mean of |k_p - k| over the set, over sqrt 2
        "literal"     the fixed point of sigma = mean of g / sqrt 2, iterated from 0.7
    """
    k = k.astype(jnp.float32)
    apart = k - jnp.take_along_axis(k, pivot[..., None], axis=2, mode="promise_in_bounds")
    far = jnp.sqrt(jnp.sum(jnp.square(apart), axis=-1))
    root2 = jnp.float32(math.sqrt(2))
    total = lambda x: spread(jax.ops.segment_sum, x, ids)

    def gauss(sigma):
        return jnp.exp(-0.5 * jnp.square(far / jnp.maximum(sigma, jnp.finfo(jnp.float32).tiny)))

    if sigma == "literal":
        count = total(jnp.ones_like(far))
        width = lambda _, sigma: total(gauss(sigma)) / (root2 * count)
        sigma = jax.lax.fori_loop(0, ITERATIONS, width, jnp.full_like(far, 0.7))
    elif sigma == "mean_dist":
        sigma = total(far) / (root2 * total(jnp.ones_like(far)))
    g = gauss(jnp.float32(sigma) if isinstance(sigma, float | int) else sigma)
    return g / total(g)
