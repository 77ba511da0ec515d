"""Attention in float64 NumPy, written from the equations of the kernels' docstrings, row by row."""

from __future__ import annotations

import numpy as np


def decode(q, k, v, index, bias, head_major: bool):
    """Attention of one query per head.

    index None: row m is row m. Returns out [B, N, H], lse [B, N], mass [B, P, M] and logits
    [B, N, M].
    """
    q, k, v, bias = map(_wide, (q, k, v, bias))
    B, N, H = q.shape
    K, S = (k.shape[1], k.shape[2]) if head_major else (k.shape[2], k.shape[1])
    P, M = bias.shape[1:]
    index = np.broadcast_to(np.arange(M), bias.shape) if index is None else np.asarray(index)
    out = np.zeros((B, N, H))
    lse = np.full((B, N), -np.inf)
    logits = np.full((B, N, M), -np.inf)
    mass = np.zeros((B, P, M))
    for b in range(B):
        for n in range(N):
            h = n // (N // K)
            p = h if P > 1 else 0
            seen = [m for m in range(M) if bias[b, p, m] > -np.inf and 0 <= index[b, p, m] < S]
            if not seen:
                continue
            rows = index[b, p, seen]
            place = (b, h, rows) if head_major else (b, rows, h)
            keys, values = k[place], v[place]
            z = keys @ q[b, n] / np.sqrt(H) + bias[b, p, seen]
            e = np.exp(z - z.max())
            out[b, n], lse[b, n] = (e / e.sum()) @ values, z.max() + np.log(e.sum())
            logits[b, n, seen] = z
            np.add.at(mass[b, p], seen, e / e.sum())
    return out, lse, mass, logits


def prompt(q, k, v, length, first=None):
    """Causal attention, query by query; the query in row i stands at first + i, or at i.

    length: [B], or None for all of T. Returns out [B, C, N, H], lse [B, C, N] and weights
    [B, N, C, T].
    """
    q, k, v = map(_wide, (q, k, v))
    B, C, N, H = q.shape
    T, K = k.shape[1:3]
    out = np.zeros(q.shape)
    lse = np.full((B, C, N), -np.inf)
    weights = np.zeros((B, N, C, T))
    for b, i in np.ndindex(B, C):
        at = i + (0 if first is None else int(first[b]))
        if not 0 <= at < (T if length is None else int(length[b])):
            continue
        for n in range(N):
            h = n // (N // K)
            z = k[b, : at + 1, h] @ q[b, i, n] / np.sqrt(H)
            lse[b, i, n] = np.log(np.exp(z - z.max()).sum()) + z.max()
            weights[b, n, i, : at + 1] = np.exp(z - lse[b, i, n])
            out[b, i, n] = weights[b, n, i, : at + 1] @ v[b, : at + 1, h]
    return out, lse, weights


def last_rows(weights, length, W: int, P: int, first=None):
    """[B, P, W, T]: weights [B, N, C, T] of the last W queries, summed over the heads of P groups.

    Zero for queries that have no row.
    """
    B, N, C, T = weights.shape
    rows = np.zeros((B, P, W, T))
    for b, r in np.ndindex(B, W):
        at = (T if length is None else int(length[b])) - W + r
        i = at - (0 if first is None else int(first[b]))
        if at >= 0 and 0 <= i < C:
            rows[b, :, r] = weights[b, :, i].reshape(P, N // P, T).sum(axis=1)
    return rows


def _wide(x):
    return np.asarray(x, np.float64)


def error(got, want, least: float = 1e-30) -> float:
    """Greatest difference relative to the greatest value, or to `least`.

    Infinite where shapes differ, and where what is not finite is not the same in both.
    """
    got, want = _wide(got), _wide(want)
    finite = np.isfinite(want)
    if (
        got.shape != want.shape
        or not np.isfinite(got[finite]).all()
        or not np.array_equal(got[~finite], want[~finite])
    ):
        return np.inf
    difference = np.max(np.abs(got[finite] - want[finite]), initial=0.0)
    return float(difference / np.max(np.abs(want)[finite], initial=least))


def lse_error(got, want) -> float:
    """`error` of logarithms: differences below 1 count as they are.

    They are relative ones of the sums.
    """
    return error(got, want, least=1.0)
