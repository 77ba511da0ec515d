"""`swa(...)`: Sparse Window Attention, Algorithm 1 of ALISA (ISCA 2024, arXiv 2403.17312).

The query at position n attends

    locally static      the last k_l tokens
    globally dynamic    the k_g tokens with the largest S among the rest; S_p is the sum of the last
                        W rows of attention, over all heads (`shared_heads`) or per kv head
    itself

with

    r   = 1 - kv_sparsity
    k   = round(n r / 2)
    k_l = round(n r local_frac)             k at the default
    k_g = round(n r (1 - local_frac))       k at the default

No token is lost: a token that is not attended stays in the store and returns when its S does. The
points that the paper leaves open are options; the defaults are the recommended readings:

    window           "k" (Algorithm 1) | "2k" (Figure 6) | a number of rows
    decay            d, in place of a window: S <- d S + row, in O(S) memory
    refresh_every    n > 0: every n-th position attends all tokens and its dense row enters the
                     window, so tokens can return that were out for a whole window (0, the paper:
                     never)
    dense_layers     the first layers attend densely
    spare_slots      just-dropped tokens stay resident in this many slots, so that returning costs
                     no copy

Ties go to the lowest position.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.axes import adopted
from alisa_jax.policies import base, budget, swap, window_sum
from alisa_jax.policies.dense import Dense

# Beyond this context the rows of a window that grows with the context outweigh the KV cache itself.
MAX_GROWING_WINDOW_TOKENS = 16384


@flax.struct.dataclass
class SwaStats:
    """Window sums, and where each token lies in the working set."""

    sums: window_sum.WindowSum
    slot_of: jax.Array  # [B, P, S] int32: slot if active, -1 if absent, -2 - slot if parked


class Counts(NamedTuple):
    """Tables over the number n = 0 .. S of past tokens."""

    local: np.ndarray
    top: np.ndarray
    width: np.ndarray


@dataclass(frozen=True)
class Swa(base.Policy):
    """Sparse Window Attention."""

    kv_sparsity: float | None = None
    tokens: int | None = None
    window: int | str = "k"
    decay: float | None = None
    local_frac: float = 0.5
    shared_heads: bool = True
    refresh_every: int = 0
    dense_layers: int = 0
    spare_slots: int = 8

    evicts: ClassVar[bool] = False
    seed_kind: ClassVar[str] = "rows"

    def __post_init__(self):
        budget.check(self.kv_sparsity, self.tokens)
        if isinstance(self.window, str) and self.window not in ("k", "2k"):
            raise ValueError(f'window must be "k", "2k" or a number of rows; got {self.window!r}')
        if not isinstance(self.window, str) and self.window < 1:
            raise ValueError(f"window must be at least 1 row; got {self.window}")
        if self.decay is not None and not 0.0 < self.decay < 1.0:
            raise ValueError(f"decay must be in (0, 1); got {self.decay}")
        if self.decay is not None and self.window != "k":
            raise ValueError(
                f"give either window or decay; got window={self.window!r} and decay={self.decay}"
            )
        if not 0.0 <= self.local_frac <= 1.0:
            raise ValueError(f"local_frac must be in [0, 1]; got {self.local_frac}")
        for name in ("refresh_every", "dense_layers", "spare_slots"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more; got {getattr(self, name)}")

    def for_layer(self, layer: int) -> base.Policy:
        return Dense() if layer < self.dense_layers else self

    def selection_heads(self, K: int) -> int:
        return 1 if self.shared_heads else K

    def validate(self, S: int) -> None:
        grows = isinstance(self.window, str) and self.decay is None and self.tokens is None
        if grows and S > MAX_GROWING_WINDOW_TOKENS:
            raise ValueError(
                f"swa(window={self.window!r}) keeps a window of rows that grows with the context "
                f"and serves at most {MAX_GROWING_WINDOW_TOKENS} tokens; got a context of {S}: "
                "give window=<rows>, decay= or tokens="
            )

    def counts(self, S: int) -> Counts:
        """k_l, k_g and W for every number of past tokens up to S."""
        n = np.arange(S + 1)
        amount = budget.amounts(self.kv_sparsity, self.tokens, S)
        local = budget.round_half_up(amount * self.local_frac)
        top = budget.round_half_up(amount * (1.0 - self.local_frac))
        local = budget.at_least_one(local) if self.local_frac > 0 else np.zeros(S + 1, np.int32)
        top = budget.at_least_one(top) if self.local_frac < 1 else np.zeros(S + 1, np.int32)
        top = np.minimum(top, n - local).astype(np.int32)
        k = budget.at_least_one(budget.round_half_up(amount * 0.5))
        if isinstance(self.window, int):
            width = np.full(S + 1, self.window)
        else:
            width = k * (2 if self.window == "2k" else 1)
        return Counts(local, top, np.minimum(width, n).astype(np.int32))

    def capacity(self, S: int) -> int:
        counts = self.counts(S)
        return min(int((counts.local + counts.top).max()) + 1, S) + self.spare_slots

    def _ring(self, S: int) -> int:
        return 0 if self.decay is not None else int(self.counts(S).width.max()) + 2

    def seed_rows(self, S: int) -> int:
        if self.decay is None:
            return self._ring(S) - 1
        return min(S, max(1, int(np.ceil(np.log(1e-8) / np.log(self.decay)))))

    def init(self, dims: base.Dims) -> SwaStats:
        P = self.selection_heads(dims.K)
        sums = window_sum.empty(dims.B, P, dims.S, self._ring(dims.S), heads=dims.N // P)
        return SwaStats(sums, jnp.full((dims.B, P, dims.S), swap.ABSENT, jnp.int32))

    def grow(self, stats: SwaStats, S: int, M: int) -> SwaStats:
        more = ((0, 0), (0, 0), (0, S - stats.slot_of.shape[-1]))
        slot_of = jnp.pad(stats.slot_of, more, constant_values=swap.ABSENT)
        return SwaStats(window_sum.grow(stats.sums, S, self._ring(S)), slot_of)

    def seed(self, stats: SwaStats, rows, length, dims):
        width = budget.lookup(self.counts(dims.S).width, length)
        sums = window_sum.seed(stats.sums, _without_nan(rows), width, self.decay)
        stats = stats.replace(sums=sums)
        pos = base.slots_of(self.select(stats, length, dims.S), dims.M)
        return stats.replace(slot_of=swap.index_slots(pos, dims.S)), pos

    def refresh(self, length):
        return None if not self.refresh_every else jnp.mod(length + 1, self.refresh_every) == 0

    def without_refresh(self) -> Swa:
        return dataclasses.replace(self, refresh_every=0)

    def observe(self, stats: SwaStats, mass, pos, slot, length, dense=None) -> SwaStats:
        S = stats.slot_of.shape[-1]
        slot_of = swap.put(stats.slot_of, jnp.broadcast_to(length[:, None], slot.shape), slot)
        row = swap.take(mass, jnp.maximum(slot_of, 0))
        row = jnp.where(slot_of >= 0, row, jnp.float32(0.0))
        if dense is not None:
            row = jnp.where(base.column(dense[0]), dense[1], row)
        row = _without_nan(row)
        if self.decay is not None:
            sums = window_sum.push_decayed(stats.sums, row, self.decay)
        else:
            sums = window_sum.push(stats.sums, row, length, self.counts(S).width)
        return SwaStats(sums, slot_of)

    def ranking(self, stats: SwaStats, length) -> jax.Array:
        """[B, P, S] float32: by what tokens are ranked for the query at position `length` [B]."""
        del length
        return stats.sums.hi

    def exchange(self, stats: SwaStats, pos, bias, length, S):
        (stats,), (ex,) = self.exchange_layers([self], [stats], [pos], [bias], length, S)
        return stats, ex

    def joint(self):
        if type(self).exchange is not Swa.exchange:  # a subclass with one of its own
            return None
        return (Swa, *(getattr(self, field.name) for field in dataclasses.fields(Swa)))

    def exchange_layers(self, policies, stats, pos, bias, length, S):
        """As the base says, with the sequences of all layers as one batch.

        A swap is many small operations, and their number is its cost.
        """
        counts = self.counts(S)
        L = len(stats)
        B = length.shape[0]
        score = [policy.ranking(one, length) for policy, one in zip(policies, stats, strict=True)]
        first_local = base.column(length - budget.lookup(counts.local, length))[..., 0]
        want = budget.lookup(counts.top, length)[:, None]
        columns = score, [one.slot_of for one in stats], pos, bias, [first_local] * L, [want] * L
        slot_of, ex = swap.improve(*(jnp.concatenate(x) if L > 1 else x[0] for x in columns))
        cut = [slice(i * B, (i + 1) * B) for i in range(L)]
        arrays = ex.pos, ex.bias, ex.load_slot, ex.load_pos
        return (
            [one.replace(slot_of=slot_of[mine]) for one, mine in zip(stats, cut, strict=True)],
            [base.Exchange(*(x[mine] for x in arrays), ex.more) for mine in cut],
        )

    def adopt(self, stats: SwaStats, other: SwaStats, rows, which) -> SwaStats:
        sums = window_sum.adopt(stats.sums, other.sums, rows, which)
        return SwaStats(sums, adopted(stats.slot_of, other.slot_of, rows, which))

    def select(self, stats: SwaStats, length, S, q=None) -> jax.Array:
        counts = self.counts(S)
        p, n = base.positions(S), base.column(length)
        first_local = n - base.column(budget.lookup(counts.local, length))
        score = jnp.where(p < first_local, self.ranking(stats, length), -jnp.inf)
        top = swap.top_mask(score, base.column(budget.lookup(counts.top, length)))
        return top | ((p >= first_local) & (p < n))


def _without_nan(row: jax.Array) -> jax.Array:
    """`row` with 0 for NaN, which thus neither wins a selection nor stays in a sum."""
    return jnp.where(jnp.isnan(row), jnp.float32(0.0), row)
