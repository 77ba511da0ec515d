"""Part b: bytes per second of a copy and FLOPs per second of a matrix product, for each type."""

import jax

from pallas_kernels import timing

DTYPES = ("bfloat16", "float32", "float16")
DRY_BYTES, DRY_SIDE = 2**12, 16


def run(emit, left, dry: bool, seed: int) -> None:
    """A cell for each type; what parts c and h set their shares against is that of bfloat16."""
    for dtype in DTYPES:
        if left() < 0:
            return
        emit.attempt(cell(dtype), lambda dtype=dtype: measure(dtype, dry))


def cell(dtype: str) -> str:
    return f"ceilings {dtype}"


def measure(dtype: str, dry: bool) -> dict:
    """Rates of this device, by the host's clock over programs of four calls."""
    how = (1, most_bytes(), DRY_BYTES, DRY_SIDE) if dry else (9, most_bytes())
    rates = timing.ceilings(dtype, *how)
    return {
        "dtype": dtype,
        "copy_gb_per_s": rates.copy_bytes_per_s / 1e9,
        "matmul_tflop_per_s": rates.matmul_flops_per_s / 1e12,
    }


def most_bytes() -> float:
    """Memory that a measurement may use: 70 % of what jax may take of the device."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return 0.7 * limit if limit else 2.0**32


def known(emit, dtype: str, dry: bool) -> timing.Ceilings:
    """The rates of this device that part b has on file, else measured now."""
    from pathlib import Path

    from eval.card.records import Cells

    there = Cells(Path(emit.path), "rates", emit.common, emit.note)
    found = there.attempt(cell(dtype), lambda: measure(dtype, dry))
    if found is None:
        raise RuntimeError(f"the rates of this device are not known: {there.found(cell(dtype))['error']}")
    return timing.Ceilings(found["copy_gb_per_s"] * 1e9, found["matmul_tflop_per_s"] * 1e12)
