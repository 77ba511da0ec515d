"""From what `Engine.score` gives to the values of a record: perplexities, footprint, and how they were got.

With nll the sum of -ln p over the n scored tokens of all windows:

    token_perplexity = exp(nll / n)                    word_perplexity = exp(nll / words of the scored text)
    bits_per_byte    = nll / (ln 2 * UTF-8 bytes of the scored text)
"""

import math

import numpy as np

from eval import common, windows
from eval.common import UserError


def footprint(scores) -> dict:
    """Attended fraction and bytes per token over calls of `score`, weighted by the tokens they predicted."""
    weights = [sum(len(row) for row in score.logprobs) for score in scores]

    def mean(name: str) -> np.ndarray:
        return np.average([np.asarray(getattr(score, name), np.float64) for score in scores], axis=0, weights=weights)

    per_layer = mean("attended_frac")
    return {
        "attended_frac": float(per_layer.mean()),
        "attended_frac_per_layer": per_layer.tolist(),
        "kv_bytes_per_token": float(mean("kv_bytes_per_token")),
        "stats_bytes_per_token": float(mean("stats_bytes_per_token")),
    }


def how(scores) -> dict:
    """What ran, for the record; `compiles` says how often `wall_s` includes a compilation."""
    ran = sorted({score.implementation for score in scores})
    return {
        "implementation": "+".join(ran),
        "compiles": sum(s.compiles for s in scores),
        "warmup": 0,
        "repeats": 1,
    }


def perplexities(text: windows.Text, plan, logprobs) -> dict:
    """The values above, with standard errors over windows.

    `logprobs[i]` holds the log-probability, in nats, of every token of window i but its first.
    """
    totals, counts, n_bytes, n_words = [], [], 0, 0
    for window, row in zip(plan, logprobs, strict=True):
        count = window.stop - window.score
        totals.append(-math.fsum(np.asarray(row, np.float64)[len(row) - count :]))
        counts.append(count)
        n_bytes += int(text.byte_count[window.score : window.stop].sum())
        n_words += int(text.word_count[window.score : window.stop].sum())
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
