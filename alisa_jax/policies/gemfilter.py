"""`gemfilter(layer=, tokens=1024, pool=5)`: one early layer picks the prompt tokens to keep.

GemFilter (arXiv 2409.17422, Algorithm 1). Layers 0 .. `layer` run over the whole prompt. There the
query of the last token, rotated as all keys are, ranks the tokens; the best `tokens` of them, in
their order, are the prompt that the whole model reads, at positions 0, 1, ...: keys and values of
the first pass are thrown away.

    score    q k of the last token's query, raw: no H^-1/2, no softmax; summed over query heads,
             each with its kv head
    pool     mean over `pool` neighbouring positions, those outside the prompt counting 0; 1: none
    chosen   the `tokens` best, ties to the lowest position; all of a prompt that has no more

Pooling is absent from the paper's algorithm, the mean in its listing and in the authors' code, and
called the maximum in its appendix: pooling="max" is that. A score that is NaN counts for its
neighbours as a position outside the prompt, and its token is chosen last. The last token may not be
chosen (`last_kept`). Of `layer` only queries and keys are computed, where the authors run the whole
of it.

`layer` counts from 0: the authors take 13 of 32 for Llama-3.1-8B, 19 of 40 for Mistral-Nemo, 19 of
32 for Phi-3.5-mini, the first layer whose choice covers a planted needle. The default is two fifths
of the model's layers, to the nearest (13 of 32), which is a rule of ours and worth a sweep.

Tokens after the prompt are attended densely, and so is all that is read without one: the protocols
`decode` and `prefill_mask`. Without a model (`resolve` was not called) and without `layer` nothing
is filtered.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.policies import base, budget, swap
from alisa_jax.policies.dense import Dense

DEPTH_FRAC = 0.4  # of the layers, where `layer` is not given
POOLINGS = ("avg", "max")


@dataclass(frozen=True)
class GemFilter(Dense):
    """Dense attention over the prompt tokens that one layer picks, and over all later tokens."""

    layer: int | None = None
    tokens: int = 1024
    pool: int = 5
    pooling: str = "avg"

    def __post_init__(self):
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer counts from 0; got {self.layer}")
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1; got {self.tokens}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(
                f"pool must be odd, a token and as many on both sides; got {self.pool}"
            )
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {self.pooling!r}")

    def resolve(self, config, calibration=None) -> GemFilter:
        layer, L = self.layer, config.n_layers
        if layer is None:
            layer = int(budget.round_half_up(DEPTH_FRAC * L))
        if layer >= L:
            raise ValueError(f"layer must be in 0..{L - 1}, the layers of the model; got {layer}")
        return dataclasses.replace(super().resolve(config, calibration), layer=layer)

    @classmethod
    def sized(cls, kept: int, tokens: int) -> GemFilter:
        return cls(tokens=kept)

    def for_layer(self, layer: int) -> base.Policy:
        return Dense()

    def feeds(self, tokens):
        return np.minimum(tokens, self.tokens)

    def reads_layer(self, tokens: int) -> int | None:
        return self.layer if tokens > self.tokens else None

    def choose(self, q, k, length) -> jax.Array:
        T = k.shape[1]
        inside = base.positions(T) < base.column(length)  # [B, 1, T]
        score = jnp.where(inside, self.scores(q, k, length)[:, None], -jnp.inf)
        best = swap.top_mask(score, jnp.int32(self.tokens))
        return base.slots_of(best, min(self.tokens, T))[:, 0]

    def scores(self, q: jax.Array, k: jax.Array, length: jax.Array) -> jax.Array:
        """Scores of tokens, [B, T] float32, never NaN.

        q [B, N, H] of the last token, k [B, T, K, H], length [B].
        """
        B, T, K, H = k.shape
        half = self.pool // 2
        # the query heads of a group meet the same keys
        q = jnp.sum(q.astype(jnp.float32).reshape(B, K, -1, H), axis=2)
        raw = jnp.einsum("bkh,btkh->bt", q, k.astype(jnp.float32), precision="highest")
        known = ~jnp.isnan(raw) & (base.positions(T)[0] < length[:, None])
        none, join = (0.0, jax.lax.add) if self.pooling == "avg" else (-jnp.inf, jax.lax.max)
        sides = ((0, 0), (half, half))
        pooled = jax.lax.reduce_window(
            jnp.where(known, raw, none), none, join, (1, self.pool), (1, 1), sides
        )
        if self.pooling == "avg":
            pooled = pooled / jnp.float32(self.pool)
        lowest = jnp.finfo(jnp.float32).min
        return jnp.where(known & (pooled > lowest), pooled, lowest)


def last_kept(chosen: jax.Array, length: jax.Array) -> jax.Array:
    """[B] bool: whether `chosen` [B, n] holds the last token of each prompt of `length` [B]."""
    return jnp.any(chosen == (length - 1)[:, None], axis=1)
