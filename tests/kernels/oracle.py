"""Attention of one query per head in float64 NumPy, written from the equations of the kernels' docstrings, row by row.

`SEED` is that of a module's inputs: another at every run, so that the kernels meet new numbers; failures name it, and
`ALISA_TEST_SEED` gives it again.
"""

from __future__ import annotations

import numpy as np

from tests.full import seed

SEED = seed()


def decode(q, k, v, index, bias, head_major: bool):
    """out [B, N, H], lse [B, N], mass [B, P, M] and logits [B, N, M]; index None: row m is row m."""
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    B, N, H = q.shape
    K, S = (k.shape[1], k.shape[2]) if head_major else (k.shape[2], k.shape[1])
    P, M = bias.shape[1:]
    index = np.broadcast_to(np.arange(M), bias.shape) if index is None else np.asarray(index)
    out, lse, logits = np.zeros((B, N, H)), np.full((B, N), -np.inf), np.full((B, N, M), -np.inf)
    mass = np.zeros((B, P, M))
    for b in range(B):
        for n in range(N):
            h = n // (N // K)
            p = h if P > 1 else 0
            seen = [m for m in range(M) if bias[b, p, m] > -np.inf and 0 <= index[b, p, m] < S]
            if not seen:
                continue
            rows = index[b, p, seen]
            keys, values = (x[b, h, rows] if head_major else x[b, rows, h] for x in (k, v))
            z = keys @ q[b, n] / np.sqrt(H) + bias[b, p, seen]
            e = np.exp(z - z.max())
            out[b, n], lse[b, n] = (e / e.sum()) @ values, z.max() + np.log(e.sum())
            logits[b, n, seen] = z
            np.add.at(mass[b, p], seen, e / e.sum())
    return out, lse, mass, logits


def error(got, want, least: float = 1e-30) -> float:
    """Greatest difference relative to the greatest value, or to `least`; infinite where one is and the other is not."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.array_equal(np.isfinite(got), np.isfinite(want)) or np.isnan(got).any():
        return np.inf
    finite = np.isfinite(want)
    return float(np.max(np.abs(got[finite] - want[finite]), initial=0.0) / np.max(np.abs(want)[finite], initial=least))


def lse_error(got, want) -> float:
    """`error` of logarithms: differences below 1 count as they are, for they are relative ones of the sums."""
    return error(got, want, least=1.0)
