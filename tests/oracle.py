"""Independent oracles in float64 NumPy and plain Python: what attention and each policy must compute.

Written from the equations, with no line shared with the library: counts by exact fractions, windows as explicit lists of
rows, selection by Python sorting. One sequence at a time, so batching and padding cannot hide anything.

Shapes of one sequence: q [T, N, H] unscaled, k and v [T, K, H]; query head i reads kv head i // (N / K).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def nearest(x: Fraction) -> int:
    """The nearest integer, halves up."""
    return math.floor(x + Fraction(1, 2))


def exact(x: float | str) -> Fraction:
    """The decimal number that `x` is written as: 2/10 for 0.2."""
    return Fraction(str(x))


def attention(q, k, v, allowed) -> tuple[np.ndarray, np.ndarray]:
    """One query q [N, H] over k, v [S, K, H] where allowed [N, S]: out [N, H] and weights [N, S]."""
    N, H = q.shape
    G = N // k.shape[1]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, weights = np.zeros((N, v.shape[-1])), np.zeros((N, len(k)))
    for i in range(N):
        z = k[:, i // G] @ q[i] / math.sqrt(H)
        e = np.where(allowed[i], np.exp(z - z[allowed[i]].max()), 0.0)
        weights[i] = e / e.sum()
        out[i] = weights[i] @ v[:, i // G]
    return out, weights


def causal(q, k, v) -> tuple[np.ndarray, np.ndarray]:
    """Dense causal attention: out [T, N, H] and weights [T, N, T]."""
    T, N, _ = q.shape
    rows = [attention(q[t], k, v, np.broadcast_to(np.arange(T) <= t, (N, T))) for t in range(T)]
    return np.stack([out for out, _ in rows]), np.stack([w for _, w in rows])


def shared(weights, P: int) -> np.ndarray:
    """[N, S] -> [P, S]: weights summed over the heads that share a selection."""
    return weights.reshape(P, -1, weights.shape[-1]).sum(axis=1)


class Rule:
    """Which of the tokens 0 .. n-1 the query at position n keeps. `rows` holds one [P, S] array per earlier query."""

    heads_share = True
    refresh_every = 0

    def keep(self, n: int, rows: list[np.ndarray], p: int) -> set[int]:
        raise NotImplementedError


class Dense(Rule):
    def keep(self, n, rows, p):
        return set(range(n))


@dataclass
class Local(Rule):
    kv_sparsity: float | None = None
    tokens: int | None = None

    def keep(self, n, rows, p):
        count = self.tokens if self.tokens is not None else nearest(n * (1 - exact(self.kv_sparsity)))
        return set(range(max(0, n - max(count, 1)), n))


@dataclass
class Strided(Rule):
    kv_sparsity: float
    anchor: str = "position"

    def keep(self, n, rows, p):
        r = 1 - exact(self.kv_sparsity)
        steps_up = [i for i in range(1, n + 1) if math.floor(i * r) > math.floor((i - 1) * r)]
        return {i - 1 if self.anchor == "position" else n - i for i in steps_up}


@dataclass(frozen=True)
class Swa(Rule):
    """Algorithm 1: the last k tokens, and of the rest the k with the largest sums over the last W rows."""

    kv_sparsity: float | None = None
    tokens: int | None = None
    window: int | str = "k"
    decay: float | None = None
    local_frac: float = 0.5
    heads_share: bool = True
    refresh_every: int = 0

    def counts(self, n: int) -> tuple[int, int, int]:
        """(local, global, window rows) for n past tokens."""
        return _swa_counts(self, n)

    def sums(self, n: int, rows: list[np.ndarray], p: int) -> np.ndarray:
        """S over all positions for the query at n, from the rows [P, S] of the queries before it."""
        if self.decay is not None:
            return sum(row[p] * self.decay ** (n - 1 - i) for i, row in enumerate(rows[:n]))
        width = self.counts(n)[2]
        return np.sum(np.asarray(rows[n - width : n], np.float64)[:, p], axis=0)

    def keep(self, n, rows, p):
        if n == 0:
            return set()
        local, top, _ = self.counts(n)
        sums = self.sums(n, rows, p).tolist()
        ranking = sorted(range(n - local), key=lambda i: -sums[i])  # stable: ties go to the lowest position
        return set(range(n - local, n)) | set(ranking[:top])


@functools.cache
def _swa_counts(rule: Swa, n: int) -> tuple[int, int, int]:
    amount = n * (1 - exact(rule.kv_sparsity)) if rule.tokens is None else Fraction(min(n, rule.tokens))
    part = exact(rule.local_frac)
    local = min(n, max(1, nearest(amount * part))) if part > 0 else 0
    top = min(n - local, max(1, nearest(amount * (1 - part)))) if part < 1 else 0
    k = min(n, max(1, nearest(amount / 2)))
    width = rule.window if isinstance(rule.window, int) else k * {"k": 1, "2k": 2}[rule.window]
    return local, top, min(width, n)


def decode(rule: Rule, q, k, v, prompt: int = 0):
    """A sequence decoded token by token after a dense prompt of `prompt` tokens.

    Returns out [T, N, H] and, for each position, the list over selection heads of the sets that were attended, the query's
    own token included.
    """
    T, N, _ = q.shape
    K = k.shape[1]
    P = 1 if rule.heads_share else K
    rows, outs, sets = [], [], []
    for n in range(T):
        everything = n < prompt or (rule.refresh_every and (n + 1) % rule.refresh_every == 0)
        kept = [set(range(n)) if everything else rule.keep(n, rows, p) for p in range(P)]
        kept = [chosen | {n} for chosen in kept]
        allowed = np.array([[i in kept[head * P // N] for i in range(T)] for head in range(N)])
        out, weights = attention(q[n], k, v, allowed)
        rows.append(shared(weights, P))
        outs.append(out)
        sets.append(kept)
    return np.stack(outs), sets
