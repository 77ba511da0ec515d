"""Sums of attention over a sliding window of decoding steps, without drift.

For each token p the sum over the last W rows of attention, S_p = sum_{i = n-W}^{n-1} AW[i, p], is
kept up to date by adding the newest row and subtracting the one that leaves: O(S) work a step
instead of O(W S). Three things make that sound:

* The rows lie in a ring with two rows to spare, indexed by step and shared by the batch. The new
  row is written first and the leaving row is read from the updated ring, so the ring is updated in
  place: no copy of it is ever made.
* A window may also grow (W follows the context): then no row leaves, or the row that left last
  comes back. Hence one correction row a step with sign -1, 0 or +1, of its own for every sequence
  of a ragged batch.
* Adding and subtracting in float32 would drift, and tokens whose rows have all left would keep
  noise instead of 0. Rows are rounded to a grid of 2^-(47 - log2 of the largest sum), and sums are
  held as unevaluated pairs hi + lo (Dekker 1971; the error-free sum is Knuth's, TAOCP 2, 4.2.2),
  where sums of grid values are exact while no sum exceeds the heads times the rows that the ring
  holds. Ranking uses hi.

With `decay` d there is no ring: S <- d S + row.
"""

from __future__ import annotations

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.axes import adopted


@flax.struct.dataclass
class WindowSum:
    """Window sums of B sequences and P selection heads over S tokens; R = 0 when the sums decay."""

    hi: jax.Array  # [B, P, S] float32, the rounded sum
    lo: jax.Array  # [B, P, S] float32, its rounding error ([B, P, 0] when the sums decay)
    ring: jax.Array  # [R, B, P, S] float32, row of step t at t mod R
    step: jax.Array  # [] int32, steps taken
    heads: int = flax.struct.field(pytree_node=False)  # no row sums to more than this


def empty(B: int, P: int, S: int, R: int, heads: int) -> WindowSum:
    """No rows yet. R rows in the ring: the widest window plus two; 0 for decaying sums."""
    return WindowSum(
        hi=jnp.zeros((B, P, S), jnp.float32),
        lo=jnp.zeros((B, P, S if R else 0), jnp.float32),
        ring=jnp.zeros((R, B, P, S), jnp.float32),
        step=jnp.zeros((), jnp.int32),
        heads=heads,
    )


def on_grid(row: jax.Array, heads: int, rows: int) -> jax.Array:
    """`row` rounded to the grid of exact sums of `rows` rows with entries of at most `heads`."""
    scale = float(2 ** (47 - math.ceil(math.log2(max(2, heads * rows)))))
    return jnp.round(row * scale) / scale


def _two_sum(a, b):
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def add(hi: jax.Array, lo: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(hi + lo) + x as a normalised pair."""
    s, e = _two_sum(hi, x)
    return _two_sum(s, e + lo)


def push(sums: WindowSum, row: jax.Array, length: jax.Array, widths: np.ndarray) -> WindowSum:
    """Add the row [B, P, S] of the query at position `length` [B].

    The sums then serve the next position. widths: [S + 1] int, W for each number of past tokens;
    neighbours differ by at most 2 (see `correction`).
    """
    R, S = sums.ring.shape[0], sums.hi.shape[-1]
    row = on_grid(row, sums.heads, R)
    ring = jax.lax.dynamic_update_slice_in_dim(sums.ring, row[None], jnp.mod(sums.step, R), axis=0)
    ages, signs = correction(widths)
    age = jnp.asarray(ages)[jnp.minimum(length, S - 1)]
    sign = jnp.asarray(signs)[jnp.minimum(length, S - 1)]
    at = jnp.mod(sums.step - age, R)
    other = ring[at, jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)]
    hi, lo = add(sums.hi, sums.lo, row)
    hi, lo = add(hi, lo, other * sign.astype(jnp.float32)[:, None, None])
    return sums.replace(hi=hi, lo=lo, ring=ring, step=sums.step + 1)


def correction(widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each n in 0 .. S-1: age and sign of the row that corrects the window as row n is added.

    Ages are in steps.

    The window for n past tokens begins at row a(n) = n - W(n). When a moves up, row a(n) leaves
    (sign -1, age W(n)); when it moves down, row a(n) - 1 returns (sign +1, age W(n) + 1); else
    nothing (sign 0). Raises ValueError when a moves by more than one row.
    """
    n = np.arange(len(widths))
    first = n - np.minimum(widths, n)
    move = np.diff(first)
    if np.abs(move).max(initial=0) > 1:
        raise ValueError("a window may grow by at most two rows a step")
    age = (n - first)[:-1] + (move < 0)
    return age.astype(np.int32), (-move).astype(np.int32)


def push_decayed(sums: WindowSum, row: jax.Array, decay: float) -> WindowSum:
    """S <- decay S + row."""
    return sums.replace(hi=sums.hi * jnp.float32(decay) + row, step=sums.step + 1)


def seed(
    sums: WindowSum, rows: jax.Array, width: jax.Array, decay: float | None = None
) -> WindowSum:
    """Sums after a dense prompt, from its last rows [B, P, W, S] (R = W + 1 in the ring).

    width [B]: the number of rows that count now.
    """
    W = rows.shape[2]
    by_step = jnp.moveaxis(rows, 2, 0)  # [W, B, P, S], the newest last
    if decay is not None:
        hi, _ = jax.lax.scan(lambda s, r: (s * jnp.float32(decay) + r, None), sums.hi, by_step)
        return sums.replace(hi=hi)
    R = sums.ring.shape[0]
    by_step = on_grid(by_step, sums.heads, R)

    def body(pair, item):
        row, age = item
        return add(*pair, jnp.where((age <= width)[:, None, None], row, jnp.float32(0.0))), None

    ages = jnp.arange(W, 0, -1, dtype=jnp.int32)
    (hi, lo), _ = jax.lax.scan(body, (sums.hi, sums.lo), (by_step, ages))
    # steps -W .. -1 at R - W .. R - 1
    ring = jnp.concatenate([jnp.zeros_like(sums.ring[: R - W]), by_step])
    return sums.replace(hi=hi, lo=lo, ring=ring)


def adopt(sums: WindowSum, other: WindowSum, rows: jax.Array, which: jax.Array) -> WindowSum:
    """`sums` with the sequences `which` [B] bool replaced by `rows` [B] of `other`.

    `other` may be at another step.
    """
    ring, R = other.ring, other.ring.shape[0]
    if R:  # the row of age a lies at step - a
        ring = ring[jnp.mod(jnp.arange(R, dtype=jnp.int32) - sums.step + other.step, R)]
    return sums.replace(
        hi=adopted(sums.hi, other.hi, rows, which),
        lo=adopted(sums.lo, other.lo, rows, which),
        ring=adopted(sums.ring, ring, rows, which, axis=1),
    )


def grow(sums: WindowSum, S: int, R: int) -> WindowSum:
    """The same sums and rows with room for S tokens and R rows."""
    old = sums.ring.shape[0]
    more = ((0, 0), (0, 0), (0, S - sums.hi.shape[-1]))
    ring = sums.ring
    if old:
        # 0 means R steps ago: not held
        age = jnp.mod(sums.step - jnp.arange(R, dtype=jnp.int32), R)
        held = (age >= 1) & (age < old)
        rows = ring[jnp.where(held, jnp.mod(sums.step - age, old), 0)]
        ring = jnp.where(held[:, None, None, None], rows, jnp.float32(0.0))
    ring = jnp.pad(ring, ((0, 0), *more))
    lo = jnp.pad(sums.lo, more) if old else sums.lo
    return sums.replace(hi=jnp.pad(sums.hi, more), lo=lo, ring=ring)
