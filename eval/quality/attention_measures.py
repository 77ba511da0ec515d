"""Measures of attention maps, in float64 NumPy: what `eval.sparsity` reports, each defined once.

One sequence of n tokens and one layer: `weights` [N, n, n] is what row i (the query at position i) paid to tokens 0 .. i
under a policy, `kept` [P, n, n] bool which tokens it was let attend, itself included, and `dense` [N, n, n] what the same
queries would have paid without the policy (`alisa_jax/attention/maps.py`). Head h has the selection h * P // N.

    sparsity        share of the entries 0 .. i of a row that count as zero: below 1 % of the row's maximum, mean over heads
                    (ALISA, Figure 3). What a policy leaves out is an entry, and zero
    sparsity_kept   the same share over the entries that the policy kept only
    sparsity_pooled the first share again, of rows that are averaged over heads before they are compared with their maximum,
                    as SWA reduces its rows over heads. All three stand here because Figure 10 does not say which it shows
    attended        share of the entries 0 .. i that were kept, mean over selections
    missed          1 - sum of `dense` over the kept tokens, mean over heads: the attention mass that the policy missed
    entered         tokens below i that row i attends and row i - 1 did not, mean over selections: the selection's turnover
    first_token     weight on token 0, mean over heads: the attention sink
    received        for each token, the weights that all rows paid to it, mean over heads: its accumulated score
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

ZERO_BELOW = 0.01  # of the row's maximum
BY_ROW = ("sparsity", "sparsity_kept", "sparsity_pooled", "attended", "missed", "entered", "first_token")
UNITS = MappingProxyType({**{name: f"{name}_frac" for name in BY_ROW}, "entered": "entered_tokens"})


def measure(weights: np.ndarray, kept: np.ndarray, dense: np.ndarray) -> dict[str, np.ndarray]:
    """The measures above, [n] float64 each, for one sequence and layer without padding."""
    weights, dense = (np.asarray(x, np.float64) for x in (weights, dense))
    n = weights.shape[-1]
    each = np.repeat(kept, len(weights) // len(kept), axis=0)  # [N, n, n]
    entries = np.arange(1, n + 1)
    small, pooled = (x < ZERO_BELOW * x.max(axis=-1, keepdims=True) for x in (weights, weights.mean(axis=0)))
    causal = np.tri(n, dtype=bool)
    before = np.concatenate([np.zeros_like(kept[:, :1]), kept[:, :-1]], axis=1)
    return {
        "sparsity": ((small & causal).sum(axis=-1) / entries).mean(axis=0),
        "sparsity_kept": ((small & each).sum(axis=-1) / each.sum(axis=-1)).mean(axis=0),
        "sparsity_pooled": (pooled & causal).sum(axis=-1) / entries,
        "attended": (kept.sum(axis=-1) / entries).mean(axis=0),
        "missed": np.where(each, 0, dense).sum(axis=-1).mean(axis=0),
        "entered": (kept & ~before & np.tri(n, k=-1, dtype=bool)).sum(axis=-1).mean(axis=0),
        "first_token": weights[:, :, 0].mean(axis=0),
        "received": weights.mean(axis=0).sum(axis=0),
    }


def batch(weights, kept, dense, length) -> dict[str, np.ndarray]:
    """As `measure`, for a padded batch [B, *, T, T] with `length` [B]: [B, T] each, nan behind the length."""
    found = {}
    for b, n in enumerate(length):
        for name, row in measure(*(x[b, :, :n, :n] for x in (weights, kept, dense))).items():
            found.setdefault(name, np.full(weights.shape[::3], np.nan))[b, :n] = row
    return found


def summary(rows: Mapping[str, np.ndarray], skip: int) -> dict:
    """Means of `BY_ROW` arrays [L, B, T], by layer, by step and overall, as values of a record.

    The first `skip` rows of each sequence are left out, so step 1 is row `skip`; all sequences have T tokens. A standard
    error is that over the B sequences, None for one.
    """
    values = {}
    for name in BY_ROW:
        counted, unit = rows[name][:, :, skip:], UNITS[name]
        values[unit], values[f"{unit}_stderr"] = (float(x) for x in _over(counted.mean(axis=(0, 2))))
        for axis, per in ((2, "layer"), (0, "step")):
            mean, stderr = _over(np.moveaxis(counted.mean(axis=axis), 0 if axis == 0 else 1, 0))
            values[f"{unit}_by_{per}"], values[f"{unit}_by_{per}_stderr"] = short(mean), short(stderr)
    return {name: None if _nan(value) else value for name, value in values.items()}


def _nan(value) -> bool:
    return bool(np.isnan(np.asarray(value)).any())


def _over(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of x [B, ...] over its first axis, and its standard error (nan for B = 1)."""
    B = len(x)
    return x.mean(axis=0), x.std(axis=0, ddof=1) / B**0.5 if B > 1 else np.full(x.shape[1:], np.nan)


def short(x: np.ndarray, digits: int = 5) -> list:
    """As a list, to so many digits."""
    return [short(one, digits) if np.ndim(one) else float(f"{one:.{digits}g}") for one in x]


# ---- accumulated scores, and rank correlation


def by_id(received: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accumulated scores by vocabulary id (the axis of Figure 4): the ids that occur, the sum of `received` over the
    occurrences of each, and their number. Both arguments have one shape."""
    ids, at = np.unique(tokens.ravel(), return_inverse=True)
    return ids, np.bincount(at.ravel(), np.asarray(received, np.float64).ravel()), np.bincount(at.ravel())


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks 1 .. n of x [n] in ascending order; equal values share the mean of their ranks."""
    _, at, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[at.ravel()]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rho of a and b [n]: Pearson's correlation of their ranks; nan where one of them is constant."""
    a, b = (ranks(np.asarray(x)) - (len(x) + 1) / 2 for x in (a, b))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else float("nan")


def correlations(received: np.ndarray, dense: np.ndarray, tokens: np.ndarray) -> dict:
    """Spearman's rho between the accumulated scores of a policy and of dense attention, [B, T] each, on `tokens` [B, T].

    rho_by_id: of the sums by vocabulary id, over the ids that occur. rho_by_occurrence: of the same sums over the number of
    occurrences, so that frequent tokens do not decide it. Both have the jackknife standard error over sequences.
    rho_by_position: of the tokens of one sequence, mean over sequences with its standard error. None where undefined.
    """

    def pooled(which: np.ndarray) -> tuple[float, float]:
        _, mine, count = by_id(received[which], tokens[which])
        _, other, _ = by_id(dense[which], tokens[which])
        return spearman(mine, other), spearman(mine / count, other / count)

    B = len(tokens)
    every = np.arange(B)
    values = dict(zip(("rho_by_id", "rho_by_occurrence"), pooled(every), strict=True))
    values["rho_by_position"], stderr = (
        float(x) for x in _over(np.array([spearman(a, b) for a, b in zip(received, dense, strict=True)]))
    )
    left_out = np.array([pooled(np.delete(every, b)) for b in every]) if B > 1 else np.full((1, 2), np.nan)
    jackknife = (B - 1) ** 0.5 * left_out.std(axis=0)
    errors = dict(rho_by_id=jackknife[0], rho_by_occurrence=jackknife[1], rho_by_position=stderr)
    values |= {f"{name}_stderr": float(error) for name, error in errors.items()}
    return {name: None if _nan(value) else value for name, value in values.items()}
