"""Turns what `Engine.score` returns into the values of a record: perplexities as `eval.perplexity` defines them, the
footprint, and what ran.
"""

import math

import numpy as np

from eval.script import common
from eval.script.common import UserError
from eval.text import windows


def footprint(scores) -> dict:
    """Attended and clipped fractions and bytes per token over calls of `score`, weighted by the tokens they decoded.

    `clipped_frac` is the share of the elements of K and V that lay outside the codec's range, 0 for `raw`.
    """
    weights = [score.decoded_tokens for score in scores]

    def mean(name: str) -> np.ndarray:
        return np.average([np.asarray(getattr(score, name), np.float64) for score in scores], axis=0, weights=weights)

    attended, clipped = mean("attended_frac"), mean("clipped_frac")
    return {
        "attended_frac": float(attended.mean()),
        "attended_frac_per_layer": attended.tolist(),
        "clipped_frac": float(clipped.mean()),
        "clipped_frac_per_layer": clipped.tolist(),
        "kv_bytes_per_token": float(mean("kv_bytes_per_token")),
        "stats_bytes_per_token": float(mean("stats_bytes_per_token")),
        **moved(*(score.placement for score in scores)),
    }


MOVED = ("load_bytes", "store_bytes", "recomputed_tokens", "device_peak_bytes", "host_peak_bytes", "p1", "p2", "groups")


def moved(*reports) -> dict:
    """What the placement of the calls cost: sums of what moved, peaks over all, p1 and p2 of the first; None: resident."""
    if reports[0] is None:
        return {}
    values = {name: [getattr(one, name) for one in reports] for name in MOVED}
    totals = {name: sum(values[name]) for name in ("load_bytes", "store_bytes", "recomputed_tokens")}
    peaks = {name: max(values[name]) for name in ("device_peak_bytes", "host_peak_bytes", "groups")}
    return totals | peaks | {name: values[name][0] for name in ("p1", "p2")}


def how(scores) -> dict:
    """What ran, for the record; `compiles` says how often `wall_s` includes a compilation."""
    ran = sorted({score.implementation for score in scores})
    return {
        "implementation": "+".join(ran),
        "implementation_reason": scores[0].implementation_reason,
        "compiles": sum(s.compiles for s in scores),
        "warmup": 0,
        "repeats": 1,
    }


def per_window(plan, logprobs) -> tuple[list[float], list[int]]:
    """Negative log-likelihood in nats of the tokens that each window scores, and their number.

    `logprobs[i]` holds the log-probability, in nats, of every token of window i but its first.
    """
    counts = [window.stop - window.score for window in plan]
    rows = zip(logprobs, counts, strict=True)
    return [-math.fsum(np.asarray(row, np.float64)[len(row) - count :]) for row, count in rows], counts


def perplexities(text: windows.Text, plan, logprobs) -> dict:
    """Perplexities and bits per byte, with standard errors over windows; `logprobs` as in `per_window`."""
    totals, counts = per_window(plan, logprobs)
    n_bytes = sum(int(text.byte_count[window.score : window.stop].sum()) for window in plan)
    n_words = sum(int(text.word_count[window.score : window.stop].sum()) for window in plan)
    nll, n = math.fsum(totals), sum(counts)
    if not math.isfinite(nll):
        raise UserError("the model gave a log-probability that is not finite, so there is no perplexity to report")
    nll_stderr = common.ratio_stderr(totals, counts)
    perplexity = _exp(nll / n)
    return {
        "token_perplexity": perplexity,
        "n": n,
        "stderr": None if nll_stderr is None else perplexity * nll_stderr,
        "nll_nats_per_token": nll / n,
        "nll_nats_per_token_stderr": nll_stderr,
        "bits_per_byte": nll / math.log(2) / n_bytes if n_bytes else None,
        "word_perplexity": _exp(nll / n_words) if n_words else None,
        "windows": len(plan),
        "scored_bytes": n_bytes,
        "scored_words": n_words,
    }


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 709 else math.inf
