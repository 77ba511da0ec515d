"""How many tokens a budget keeps: whole numbers, decided in NumPy when a program is traced.

A budget has two spellings everywhere:

    kv_sparsity   the share of the context that is left out: r = 1 - kv_sparsity is kept, and the
                  count grows with the context
    tokens        a fixed count

Halves round up, as in Algorithm 1's k = round(n r / 2) read as nearest integer (ISCA 2024, arXiv
2403.17312), and a budget keeps at least one token. Counts are tables over n = 0 .. S, so that host
code, jitted code and oracles agree on every border.
"""

from __future__ import annotations

import numpy as np


def check(kv_sparsity: float | None, tokens: int | None) -> None:
    """Raise ValueError unless exactly one budget is given and lies in its domain."""
    if (kv_sparsity is None) == (tokens is None):
        raise ValueError(
            f"give either kv_sparsity or tokens; got kv_sparsity={kv_sparsity} and tokens={tokens}"
        )
    if kv_sparsity is not None and not 0.0 <= kv_sparsity < 1.0:
        raise ValueError(f"kv_sparsity must be in [0, 1); got {kv_sparsity}")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1; got {tokens}")


def kept_frac(kv_sparsity: float) -> float:
    """r = 1 - kv_sparsity without the last bits of binary rounding: 0.2 for 0.8."""
    return round(1.0 - kv_sparsity, 12)


def round_half_up(x) -> np.ndarray:
    """Nearest integers of float64 `x`, halves up; 1e-9 absorbs binary rounding of decimals."""
    return np.floor(np.asarray(x, np.float64) + 0.5 + 1e-9).astype(np.int64)


def amounts(kv_sparsity: float | None, tokens: int | None, S: int) -> np.ndarray:
    """[S + 1] float64: the budget in tokens, not rounded, for each number n of past tokens."""
    n = np.arange(S + 1, dtype=np.float64)
    return n * kept_frac(kv_sparsity) if tokens is None else np.minimum(n, float(tokens))


def at_least_one(count: np.ndarray) -> np.ndarray:
    """`count` [S + 1] clipped to 1 .. n (0 for n = 0), as int32."""
    n = np.arange(len(count))
    return np.minimum(np.maximum(count, 1), n).astype(np.int32)


def lookup(table: np.ndarray, length):
    """table[length], int32, for a traced `length`; lengths beyond the table read its last entry.

    Repetitions of the last entry are cut off, so a constant budget is a short table at any context.
    """
    import jax.numpy as jnp

    table = np.asarray(table)
    table = table[: int(np.flatnonzero(table != table[-1]).max(initial=-1)) + 2]
    return jnp.asarray(table, jnp.int32)[jnp.minimum(length, len(table) - 1)]
