"""Part h: tilings, from that of the table on to better neighbours, at the shapes of the bars."""

import math

from eval.card import beside, rates
from pallas_kernels import backend, bench_rows, shapes, tilings

DRY_TILINGS = 2


class _Over(Exception):
    """The time of the part is up."""


def run(emit, left, dry: bool, seed: int) -> None:
    """A cell for each tiling that is tried: `time_s` of a call."""
    limits, how = rates.known(emit, beside.DTYPE, dry), beside.settings(dry)
    for kernel in bench_rows.TILED[1:2] if dry else bench_rows.TILED:
        shape = beside.DRY[0][1] if dry else beside.BAR_PROMPT if kernel == "flash_prefill" else beside.BAR
        tried = []

        def seconds(tiling, kernel=kernel, shape=shape, tried=tried) -> float:
            if left() < 0 or (dry and len(tried) == DRY_TILINGS):
                raise _Over
            tried.append(tiling)

            def measure() -> dict:
                row, _ = bench_rows.measure(kernel, bench_rows.SELF, shape, how, limits, tiling)
                return beside.failed(row) | {"of_table": len(tried) == 1}

            found = emit.attempt(f"{shape} {kernel} {tiling}", measure)
            return found["time_s"] if found and isinstance(found["time_s"], float) else math.inf

        try:
            bench_rows.climb(tilings.tiling_for(kernel, backend.chip(), shapes.named(shape).head_dim), seconds)
        except _Over:
            if not dry:
                return
