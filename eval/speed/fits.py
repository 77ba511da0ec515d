"""Growth in numbers: slopes and prices of a token, fitted to seconds by context, and whether they are as designed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LINEAR, SHARE, FLAT = (0.8, 1.2), (0.75, 1.5), 0.1  # a last slope; a price over the share of dense's; a slope
MOVED_SHARE = (0.0, 1.5)  # where it is offloaded: rows that stay are not fetched again, so a share less is no flaw
LAST = 3  # contexts of the last slope


class Growth(NamedTuple):
    """How a series grows; None where it has too few points."""

    slope: float | None  # of log seconds over log tokens
    last_slope: float | None  # the same over the last contexts, of seconds less those of the weights
    base_s: float | None  # seconds of a context of 0 tokens
    token_s: float | None  # seconds that a token more takes


class Series(NamedTuple):
    """Seconds by context, and what they should do: "linear", "flat", or "share", `share` times the series called `of`."""

    name: str
    part: str  # "step" | "decide" | "search"
    seconds: Mapping[int, float]
    design: str
    share: float = 1.0
    of: str = ""
    bounds: tuple[float, float] = SHARE


def growth(seconds: Mapping[int, float], weights_s: float = 0.0) -> Growth:
    """`seconds` by context, `weights_s` of them for what does not grow."""
    if len(seconds) < 2:
        return Growth(None, None, None, None)
    last = {n: seconds[n] - weights_s for n in sorted(seconds)[-LAST:]}
    return Growth(slope(seconds), slope(last), *line(seconds))


def slope(seconds: Mapping[int, float]) -> float | None:
    """Of log seconds over log tokens, by least squares; None where a number is not above 0."""
    if min(seconds.values()) <= 0:
        return None
    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])


def line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """(a, b) of seconds = a + b tokens, by least squares of relative errors."""
    n, t = (np.asarray(list(x), float) for x in (seconds, seconds.values()))
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / t, n / t], axis=1), np.ones(len(t)), rcond=None)
    return float(a), float(b)


def series(records: Sequence[Mapping]) -> tuple[dict[str, Series], float | None]:
    """All that grows, by name, and the seconds of `weights only`; what is OOM is left out."""
    first = next(r for r in records if r["measured_part"] == "step")
    shortest, found = first["context_tokens"], {}
    weights = first["seconds_per_step"]
    share = {r["policy"]: r["attended_frac"] for r in records if r["measured_part"] == "step"}
    for r in records:
        part, tokens = r["measured_part"], r["context_tokens"]
        name = f"{r['placement']} | {r['policy']}"
        if part == "search":
            name = (
                "search, half of the context new"
                if r["new_tokens_rule"] == "half"
                else f"search, {r['new_tokens']} new"
            )
        elif part == "decide":
            name = f"decide: {name}"
        if name not in found:
            found[name] = Series(name, part, {}, *_design(r, share, records))
        seconds = r[{"step": "seconds_per_step", "decide": "decide_s", "search": "search_s"}[part]]
        if tokens != shortest and seconds != "OOM":
            found[name].seconds[tokens] = seconds
    return found, weights


def _design(r: Mapping, share: Mapping[str, float], records: Sequence[Mapping]) -> tuple:
    """(design, share, of, bounds) of the series that record `r` is of; dense is that on the same side."""
    if r["measured_part"] == "search":
        return ("linear" if r["new_tokens_rule"] == "half" else "flat",)
    if r["measured_part"] == "decide":
        return ("linear" if "traffic=paper" in r["placement"] else "flat",)
    if r["policy"] == "dense":
        return ("linear",)
    resident = records[0]["placement"]
    if r["placement"] == resident:
        return "share", share[r["policy"]], f"{resident} | dense", SHARE
    away = next(
        other["placement"] for other in records if other["policy"] == "dense" and other["placement"] != resident
    )
    return "share", share[r["policy"]], f"{away} | dense", MOVED_SHARE


def as_designed(one: Series, found: Mapping[str, Series], weights_s: float) -> bool | None:
    """Whether a series does what it should; None where it has too few points."""
    own = growth(one.seconds, weights_s if one.part == "step" else 0.0)
    if own.slope is None:
        return None
    if one.design == "flat":
        return own.slope <= FLAT
    if one.design == "linear":
        return None if own.last_slope is None else LINEAR[0] <= own.last_slope <= LINEAR[1]
    dense = growth(found[one.of].seconds).token_s
    return None if not dense else one.bounds[0] <= own.token_s / dense / one.share <= one.bounds[1]


def ratios(sparse: float, dense: float, weights_s: float) -> tuple[float, float | None]:
    """sparse / dense, and the same of what is above the weights' seconds; None where dense is not above them."""
    above = dense - weights_s
    return sparse / dense, (sparse - weights_s) / above if above > 0 else None
