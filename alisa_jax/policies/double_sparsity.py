"""`double_sparsity(kv_sparsity= | tokens=, ...)`: tokens with the highest q k over few channels.

Double Sparsity (arXiv 2408.07092, Section 3). Every token has a label: its key in r = `channels` H
of the H channels of a kv head, those that carry the most of q k in this model. A calibration ranks
them (`ranking`): by the mean of |q|, of |k|, both before their rotation, or of |q k| of a token
with itself; a kv head takes the mean over its query heads. A query scores all tokens by their
labels and attends exactly the best ones. Nothing is evicted: a token that is left out may return.

    label    r channels of the rotated key, `label_bits` bits each, with the token's own least value
             and step
    score    q k over those channels; if G > 1 query heads share a kv head, softmax(H^-1/2 q k)
             summed over them
    k        round(n (1 - kv_sparsity)) of n past tokens, or `tokens`, per kv head; ties go to the
             lowest position
    local    of these, the `local` most recent tokens are always kept; 0 in the paper

Layers below `dense_layers` attend densely. Differences from the authors' code: it repeats kv heads
before it labels, so each query head has its own tokens, while here everything is stored and chosen
per kv head; it also quantises the query's label, which is not stored and stays exact here; the
query's own token is always attended here.

Without a model (`resolve` was not called) all channels are labels.

Where the tokens are on the host, a guess of the query chooses (`engine/offload/by_guess.py`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import flax
import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.ops import products, writes
from alisa_jax.policies import base, budget, swap
from alisa_jax.policies.dense import Dense

BITS = (2, 4, 8, 16, 32)
RANKINGS = ("q", "k", "qk")
TINY = 2.0**-100  # the smallest step: that of a label of zeros


@flax.struct.dataclass
class Labels:
    """Labels of S tokens, head-major: code c means low + step c; 16 and 32 bits hold the values.

    A bfloat16 is kept as its bits, uint16: to write one row of bfloat16, XLA:CPU would copy the
    whole array through float32.
    """

    codes: jax.Array  # [B, K, S, ceil(r bits / 8)] uint8, or [B, K, S, r] uint16 or float32
    low: jax.Array | None  # [B, K, S] uint16: the least value of a token, or a little less
    step: jax.Array | None  # [B, K, S] uint16


@dataclass(frozen=True)
class DoubleSparsity(base.Policy):
    """Tokens by labels, per kv head."""

    kv_sparsity: float | None = None
    tokens: int | None = None
    channels: float = 0.25
    label_bits: int = 4
    dense_layers: int = 2
    ranking: str = "qk"
    local: int = 0
    table: tuple = dataclasses.field(default=(), repr=False)  # [L][K][r] channels; () for all

    evicts: ClassVar[bool] = False
    needs_query: ClassVar[bool] = True
    takes_keys: ClassVar[bool] = True
    routes: ClassVar[tuple[str, ...]] = ("indexed", "masked")

    def __post_init__(self):
        budget.check(self.kv_sparsity, self.tokens)
        if not 0.0 < self.channels <= 1.0:
            raise ValueError(
                f"channels is a share of the channels of a head, in (0, 1]; got {self.channels}"
            )
        if self.label_bits not in BITS:
            raise ValueError(
                f"label_bits must be one of {', '.join(map(str, BITS))}; got {self.label_bits}"
            )
        if self.ranking not in RANKINGS:
            raise ValueError(f"ranking must be one of {', '.join(RANKINGS)}; got {self.ranking!r}")
        for name in ("dense_layers", "local"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.tokens is not None and self.tokens < self.local:
            raise ValueError(
                f"tokens counts the local ones and must be at least local={self.local}; got "
                f"{self.tokens}"
            )

    def label_channels(self, H: int) -> int:
        """r: channels of a label, for heads of H channels."""
        return min(H, max(1, int(budget.round_half_up(H * self.channels))))

    def resolve(self, config, calibration=None) -> DoubleSparsity:
        r = self.label_channels(config.head_dim)
        if r == config.head_dim or self.dense_layers >= config.n_layers:
            return dataclasses.replace(self, table=())
        if calibration is None:
            raise ValueError(
                f"double_sparsity(channels={self.channels:g}) needs the channels that carry the "
                "most of q k in this model: give a calibration, which python -m eval.calibrate "
                "makes, or channels=1"
            )
        calibration.check(config)
        weight = getattr(calibration, f"{self.ranking}_abs")  # [L, N or K, H]
        L = config.n_layers
        K = config.n_kv_heads
        H = config.head_dim
        weight = np.asarray(weight, np.float64).reshape(L, K, -1, H).mean(axis=2)
        best = np.sort(np.argsort(-weight, axis=-1, kind="stable")[..., :r], axis=-1)
        table = tuple(tuple(map(tuple, layer)) for layer in best.tolist())
        return dataclasses.replace(self, table=table)

    def for_layer(self, layer: int) -> base.Policy:
        if layer < self.dense_layers:
            return Dense()
        return dataclasses.replace(self, table=self.table and (self.table[layer],))

    def selection_heads(self, K: int) -> int:
        return K

    def counts(self, S: int) -> tuple[np.ndarray, np.ndarray]:
        """[S + 1] int32 twice: tokens kept by label, and local ones, when n tokens are past."""
        n = np.arange(S + 1)
        amounts = budget.amounts(self.kv_sparsity, self.tokens, S)
        kept = budget.at_least_one(budget.round_half_up(amounts))
        local = np.minimum(n, self.local).astype(np.int32)
        return np.maximum(kept - local, 0), local

    def capacity(self, S: int) -> int:
        return int(sum(self.counts(S)).max()) + 1

    def init(self, dims: base.Dims) -> Labels:
        r = len(self._channels(dims.K, dims.H)[0])
        like = jax.eval_shape(
            self._encode, jax.ShapeDtypeStruct((dims.B, dims.K, dims.S, r), jnp.float32)
        )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def grow(self, stats: Labels, S: int, M: int) -> Labels:
        more = S - stats.codes.shape[2]
        return jax.tree.map(
            lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3)), stats
        )

    def seed(self, stats: Labels, rows, length, dims):
        pos = jnp.where(base.positions(dims.S) < base.column(length), base.positions(dims.S), -1)
        # all tokens are at hand: the next query selects
        return stats, jnp.broadcast_to(pos, (dims.B, dims.K, dims.M))

    def note(self, stats: Labels, k: jax.Array, first: jax.Array) -> Labels:
        new = self._encode(self._labels(jnp.swapaxes(k, 1, 2)))
        B, K, T = new.codes.shape[:3]
        b = jax.lax.broadcasted_iota(jnp.int32, (B, K, T), 0)
        h = jax.lax.broadcasted_iota(jnp.int32, (B, K, T), 1)
        t = jax.lax.broadcasted_iota(jnp.int32, (B, K, T), 2)
        at = base.column(first) + t
        return jax.tree.map(lambda old, x: writes.put(old, (b, h, at), x), stats, new)

    def select(self, stats: Labels, length, S, q=None) -> jax.Array:
        p, n = base.positions(S), base.column(length)
        top_counts, local_counts = self.counts(S)
        top = base.column(budget.lookup(top_counts, length))
        local = base.column(budget.lookup(local_counts, length))
        score = self.scores(stats, q, p < n)
        best = swap.top_mask(jnp.where(p < n - local, score, -jnp.inf), top)
        return best | ((p >= n - local) & (p < n))

    def scores(self, stats: Labels, q: jax.Array, past: jax.Array) -> jax.Array:
        """Scores of tokens: q [B, K, G, H], past [B, 1, S] bool -> [B, K, S] float32.

        With G > 1, the logarithm of the attention that the query heads would pay to the labels, so
        that no token underflows to 0.
        """
        label = self._labels(q).astype(jnp.float32)
        if self.label_bits >= 16:
            z = _product(label, stats.codes if self.label_bits == 32 else _value(stats.codes))
        else:
            z = self._product_of_codes(label, stats.codes) * _value(stats.step)[:, :, None]
            z = z + jnp.sum(label, -1, keepdims=True) * _value(stats.low)[:, :, None]
        if q.shape[2] == 1:
            return z[:, :, 0]
        z = jnp.where(
            past[:, :, None] & ~jnp.isnan(z), z * jnp.float32(q.shape[3] ** -0.5), -jnp.inf
        )
        return jax.nn.logsumexp(jax.nn.log_softmax(z, axis=-1), axis=2)

    def _channels(self, K: int, H: int) -> tuple[tuple[int, ...], ...]:
        """[K][r]: the channels of the labels."""
        if len(self.table) > 1:
            raise ValueError("a layer has its own label channels: take for_layer(i)")
        return self.table[0] if self.table else (tuple(range(H)),) * K

    def _labels(self, x: jax.Array) -> jax.Array:
        """The label channels of x [B, K, *, H]: [B, K, *, r]."""
        if not self.table:
            return x
        _, K, _, H = x.shape
        index = jnp.asarray(self._channels(K, H), jnp.int32)[None, :, None]
        return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")

    def _encode(self, x: jax.Array) -> Labels:
        """The stored form of x [B, K, T, r]."""
        x = x.astype(jnp.float32)
        if self.label_bits >= 16:
            return Labels(x if self.label_bits == 32 else _bits(x), None, None)
        levels, per_byte = 2**self.label_bits - 1, 8 // self.label_bits
        low = _bits(_bfloat16_not_above(jnp.min(x, axis=-1, initial=jnp.inf)))
        below = _value(low) - jnp.max(x, axis=-1, initial=-jnp.inf)
        step = _bits(-_bfloat16_not_above(below / jnp.float32(levels)))
        wide = jnp.maximum(_value(step), jnp.float32(TINY))[..., None]
        code = jnp.clip(jnp.round((x - _value(low)[..., None]) / wide), 0, levels).astype(jnp.uint8)
        code = jnp.pad(code, [(0, 0)] * 3 + [(0, -x.shape[-1] % per_byte)])
        parts = jnp.split(code, per_byte, axis=-1)
        codes = sum(part << jnp.uint8(i * self.label_bits) for i, part in enumerate(parts))
        return Labels(codes, low, step)

    def _product_of_codes(self, q: jax.Array, codes: jax.Array) -> jax.Array:
        """q [B, K, G, r] against the numbers in codes: [B, K, G, S] float32."""
        per_byte, mask = 8 // self.label_bits, jnp.uint8(2**self.label_bits - 1)
        q = jnp.pad(q, [(0, 0)] * 3 + [(0, per_byte * codes.shape[-1] - q.shape[-1])])
        parts = jnp.split(q, per_byte, axis=-1)
        return sum(
            _product(x, (codes >> jnp.uint8(i * self.label_bits)) & mask)
            for i, x in enumerate(parts)
        )


def _product(q, labels) -> jax.Array:
    return products.logits(q, labels.astype(jnp.float32))


def _bits(x: jax.Array) -> jax.Array:
    """x rounded to bfloat16, as uint16."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def _value(bits: jax.Array) -> jax.Array:
    """The inverse of `_bits`, as float32."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


def _bfloat16_not_above(x: jax.Array) -> jax.Array:
    """x float32 -> a bfloat16 that is at most x, within two of its steps."""
    return (x - jnp.abs(x) * jnp.float32(2.0**-8)).astype(jnp.bfloat16)
