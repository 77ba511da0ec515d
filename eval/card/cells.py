"""Cells of a part: each is measured once, what it raises is recorded, and the next one runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from eval.card import records

REPEATS = 9
MOST_S = 4.0  # that the repeats of one measurement may take together

Cells = Iterable[tuple[str, Callable[[], dict]]]


def each(emit, left, cells: Cells) -> None:
    """Measure the cells that are not on file, while time is left, and record each; see `records.Cells.attempt`.

    Raises `records.Broken` where a cell left the device broken, so that others are not judged by that.
    """
    for name, measure in cells:
        if emit.done(name):
            continue
        if left() <= 0:
            return
        if emit.attempt(name, measure) is None and not answers():
            raise records.Broken(f"the device answers no more after the cell {name}")


def answers() -> bool:
    """Whether the device still adds two numbers."""
    try:
        return float(jnp.float32(1.0) + jnp.float32(2.0)) == 3.0
    except jax.errors.JaxRuntimeError:
        return False


def timed(call: Callable, left, before: Callable = lambda: None) -> tuple[dict, object]:
    """Seconds of `call(before())` until its result is ready, `before` left out, and the last result.

    One call comes first that is not counted; then there are at most REPEATS, as many as `left` and MOST_S allow.
    """
    seconds = []
    while True:
        out = None  # a call finds the memory of the call before it free
        given = jax.block_until_ready(before())
        start = time.perf_counter()
        out = jax.block_until_ready(call(given))
        seconds.append(time.perf_counter() - start)
        if len(seconds) > REPEATS or (len(seconds) > 1 and (left() <= 0 or sum(seconds) > MOST_S)):
            return spread(seconds[1:]), out


def spread(seconds: list[float]) -> dict:
    """Median, least and most of `seconds`, as fields of a record."""
    return {
        "time_s": statistics.median(seconds),
        "time_min_s": min(seconds),
        "time_max_s": max(seconds),
        "repeats": len(seconds),
    }


def rate(times: dict, moved_bytes: int) -> dict:
    """`times` with the bytes that were moved, and GB (1e9) per second by the median."""
    return times | {"moved_bytes": moved_bytes, "gb_per_s": moved_bytes / times["time_s"] / 1e9}
