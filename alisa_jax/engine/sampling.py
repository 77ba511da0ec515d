"""Which token comes next: the best one, or one drawn at random after temperature, top-k and top-p.

With x the logits of one sequence, T the temperature and g independent standard Gumbel numbers, the
token is

    argmax over the kept v of  x_v / T + g_v

which is v with probability exp(x_v / T) / (the sum of these over the kept): Gumbel-max. What is
kept: after the temperature, the `top_k` most probable tokens, and of these the fewest most probable
ones whose share of the probability of the `top_k` reaches `top_p` (Holtzman et al., arXiv
1904.09751, section 3.1); equal tokens are taken lowest id first. The order is that of Hugging
Face's processors.

Token number j of a sequence draws its noise from `fold_in(key of the sequence, j)`, one number per
vocabulary entry: it depends neither on the neighbours in the batch nor on the size of the chunks
and buckets that steps run in. All arithmetic is float32. A logit that is NaN counts as -inf and one
of +inf as the largest finite number; where no logit is left, the token is 0. The log-probability
is then NaN, and so it is where any logit is: a run ends there (`finite.py`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GENERATOR = "threefry2x32"
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)  # a temperature below it is no normal float32 number


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; the default is greedy: the best logit, ties to the lowest id.

    Raises ValueError, in one sentence, for a value outside the range given below.
    """

    temperature: float = 0.0  # divides the logits; 0: greedy, whatever top_k and top_p are
    top_k: int = 0  # keep so many tokens at most; 0: all
    top_p: float = 1.0  # in (0, 1], share of the probability that is kept at least; 1: all

    def __post_init__(self):
        if not _real(self.temperature) or not 0 <= self.temperature <= LARGEST:
            raise ValueError(
                f"temperature must be a number from 0 (greedy) to {LARGEST:.0e}; got "
                f"{self.temperature!r}"
            )
        if (
            not isinstance(self.top_k, numbers.Integral)
            or isinstance(self.top_k, bool)
            or not 0 <= self.top_k < 2**31
        ):
            raise ValueError(
                f"top_k must be a whole number from 0 (off) to 2**31 - 1; got {self.top_k!r}"
            )
        if not _real(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p must be a number above 0 and at most 1 (off); got {self.top_p!r}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def settings(self) -> Settings:
        """The three numbers as arrays, so that one compiled program serves all of their values."""
        return Settings(
            jnp.float32(max(self.temperature, SMALLEST)),
            jnp.int32(self.top_k),
            jnp.float32(max(self.top_p, SMALLEST)),
        )


class Settings(NamedTuple):
    """A `Sampling` that is not greedy, as traced numbers."""

    temperature: jax.Array  # [] float32
    top_k: jax.Array  # [] int32
    top_p: jax.Array  # [] float32


class Draw(NamedTuple):
    """What a step needs to draw a token."""

    keys: jax.Array  # [B] typed keys, one per sequence
    made: jax.Array  # [] int32: new tokens that the sequences have already
    settings: Settings


def sequence_keys(seed, indices: Sequence[int]) -> jax.Array:
    """Keys [len(indices)] of the sequences `indices` of a run with `seed`.

    seed: a whole number or one typed key. `Engine.generate(prompts, seed=s)` uses
    `sequence_keys(s, range(B))`; with `key=sequence_keys(s, [i])` prompt i alone gets the tokens
    that it got there. Raises ValueError for any other seed.
    """
    if _is_key(seed) and seed.ndim == 0:
        key = _checked(seed)
    elif isinstance(seed, numbers.Integral) and 0 <= seed < 2**32:
        key = jax.random.key(int(seed), impl=GENERATOR)
    else:
        raise ValueError(
            "a seed is a whole number in [0, 2**32) or one key of jax.random.key; got "
            f"{_brief(seed)}"
        )
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(list(indices), jnp.int32))


def batch_keys(B: int, seed: int, key: jax.Array | None) -> jax.Array:
    """Keys [B] of `seed`, or of `key` [] or [B] if given. Raises ValueError for other keys."""
    if key is None:
        return sequence_keys(seed, range(B))
    if not _is_key(key) or key.shape not in ((), (B,)):
        raise ValueError(
            f"key is one typed key of jax.random.key, or {B} of them, one per prompt; got "
            f"{_brief(key)}"
        )
    return sequence_keys(key, range(B)) if key.ndim == 0 else _checked(key)


def _is_key(value) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _brief(value) -> str:
    return (
        f"an array {value.dtype}{list(value.shape)}"
        if hasattr(value, "shape")
        else f"{value!r:.60}"
    )


def _checked(key: jax.Array) -> jax.Array:
    """`key`, if its generator gives the same numbers in a batch as alone; only one does."""
    if str(jax.random.key_impl(key)) != GENERATOR:
        raise ValueError(
            f"keys must be of the generator {GENERATOR}; got {jax.random.key_impl(key)}"
        )
    return key


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """One token [B] int32 from logits [B, V] and typed keys [B]; greedy sampling reads no key."""
    logits = clean(logits)
    return pick(logits if sampling.greedy else scores(logits, keys, sampling.settings()))[0]


def now(draw: Draw | None, made: int) -> Draw | None:
    """`draw` of sequences that have `made` new tokens."""
    return None if draw is None else draw._replace(made=jnp.int32(made))


def of_rows(draw: Draw | None, rows: slice) -> Draw | None:
    """`draw` of the sequences `rows` of its batch."""
    return None if draw is None else draw._replace(keys=draw.keys[rows])


def next_token(
    logits: jax.Array, draw: Draw | None, step
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token [B] int32, margin [B] and log-probability [B] from logits [B, V].

    draw: None is greedy. step: [] int32, steps since `draw` was made. margin: by how much the token
    won: its logit minus the best of the others, or, when drawn, of x / T + g over what is kept (inf
    where one is). log-probability: of the token under the model's own distribution, in nats,
    whatever the sampling; NaN where a logit is NaN or all are -inf.
    """
    given = bounded(logits)
    compared = clean(given)
    if draw is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(draw.keys, draw.made + step)
        compared = scores(compared, keys, draw.settings)
    token, margin = pick(compared)
    chosen = jnp.take_along_axis(given, token[:, None], axis=-1)[:, 0]
    return token, margin, chosen - jax.nn.logsumexp(given, axis=-1)


def bounded(logits: jax.Array) -> jax.Array:
    """float32 logits without +inf."""
    return jnp.minimum(logits.astype(jnp.float32), jnp.float32(LARGEST))


def clean(logits: jax.Array) -> jax.Array:
    """float32 logits without NaN and +inf."""
    logits = bounded(logits)
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits)


def pick(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Best entry [B] int32 of scores [B, V], ties to the lowest id, and its margin [B]."""
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return token, lead(scores, token)


def lead(scores: jax.Array, token: jax.Array) -> jax.Array:
    """Entry `token` [B] of scores [B, V] minus the best of the others: [B]."""
    rest = jnp.where(
        jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) == token[:, None], -jnp.inf, scores
    )
    return jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0] - jnp.max(rest, axis=-1)


def scores(logits: jax.Array, keys: jax.Array, settings: Settings) -> jax.Array:
    """x / T + g [B, V] up to a constant per row, -inf for what is not kept; logits [B, V] clean."""
    V = logits.shape[-1]
    # at least 0, so there is no -0
    deficit = (jnp.max(logits, axis=-1, keepdims=True) - logits) / settings.temperature
    deficit = jnp.where(jnp.isnan(deficit), jnp.inf, deficit)
    filtered = (settings.top_k > 0) | (settings.top_p < 1)
    deficit = jax.lax.cond(filtered, _filter, lambda d, _: d, deficit, settings)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32))(keys)
    return noise - deficit


def _filter(deficit: jax.Array, settings: Settings) -> jax.Array:
    """`deficit` [B, V] with inf for what top-k and top-p leave out."""
    ids = jax.lax.broadcasted_iota(jnp.int32, deficit.shape, 1)
    in_order, order = jax.lax.sort((deficit, ids), dimension=1, num_keys=2)
    counted = (settings.top_k == 0) | (ids < settings.top_k)
    weight = jnp.where(counted, jnp.exp(-in_order), jnp.float32(0.0))
    upto = jnp.cumsum(weight, axis=-1)
    before = jnp.pad(upto[:, :-1], ((0, 0), (1, 0)))
    kept = counted & ((before < settings.top_p * upto[:, -1:]) | (settings.top_p >= 1))
    last = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.int32) - 1, 0)
    # Everything up to the last kept entry, in the order (deficit, id).
    border = jnp.take_along_axis(in_order, last, axis=-1)
    border_id = jnp.take_along_axis(order, last, axis=-1)
    return jnp.where(
        (deficit < border) | ((deficit == border) & (ids <= border_id)), deficit, jnp.inf
    )


def _real(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
