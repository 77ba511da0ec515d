"""Rows of the benchmark: a kernel or a peer at a shape, as a flat record, units in its keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backend, cases, peers, shapes, tilings, timing

KERNELS = (*cases.DECODE, *cases.PROMPT, "swa_layer")
TILED = ("sparse_decode", "packed_decode", "flash_prefill")
# contenders beside those of `peers`
SELF = "kernel"
REFERENCE = "xla"
DENSE = "dense_decode"
_IMPLS = MappingProxyType(
    {
        peers.CUDNN: "cudnn",
        peers.XLA: "xla",
        peers.GQA: "pallas",
        peers.PAGED: "pallas",
        peers.TORCH: "torch",
    }
)
_MEASURED = tuple(
    "basis time_s time_min_s time_max_s gb_per_s tflop_per_s fraction_of_copy fraction_of_matmul "
    "calls repeats warmup temporary_bytes best_peer ratio_to_best_peer max_error note".split()
)
_TILES = MappingProxyType(
    {"rows": (16, 256), "queries": (16, 256), "warps": (1, 16), "stages": (1, 6)}
)


class Settings(NamedTuple):
    """What holds for all rows."""

    dtype: str
    kv_sparsity: float
    impl: str
    repeats: int
    calls: int | None  # None: as many as fill timing.TARGET_S
    max_bytes: float


def contenders(kernel: str, impl: str) -> tuple[str, ...]:
    """The kernel and what is timed beside it; its reference only where `impl` runs another."""
    if kernel == "swa_layer":
        return SELF, DENSE, *peers.DENSE
    reference = () if backend.choose(impl).impl == "xla" else (REFERENCE,)
    return SELF, *reference, *{DENSE: peers.DENSE, "flash_prefill": peers.CAUSAL}.get(kernel, ())


def group(kernel: str, name: str, how: Settings, rates: timing.Ceilings, known: dict) -> list[dict]:
    """The rows of a kernel at the shape `name`, the kernel's first.

    known: rows of this shape that are measured already; `swa_layer` has rows of other kernels.
    """
    rows, kept = [], None
    for contender in contenders(kernel, how.impl):
        subject = _subject(kernel, contender)
        if subject not in known:
            known[subject], outs = measure(*subject, name, how, rates)
            if contender == REFERENCE:
                known[subject]["max_error"] = error_of(kept, outs)
            kept, outs = outs if contender == SELF else None, None
        rows.append(known[subject] | {"kernel": kernel, "contender": contender})
    own, best = rows[0], min(rows[1:], key=_seconds, default=rows[0])
    if max(_seconds(own), _seconds(best)) < math.inf and best is not own:
        own |= {
            "best_peer": best["contender"],
            "ratio_to_best_peer": best["time_s"] / own["time_s"],
        }
    return rows


def _subject(kernel: str, contender: str) -> tuple[str, str]:
    """What is measured for a row: a kernel of `cases` and a contender."""
    if kernel != "swa_layer":
        return kernel, contender
    return (
        ("packed_decode", SELF)
        if contender == SELF
        else (DENSE, SELF if contender == DENSE else contender)
    )


def measure(
    kernel: str, contender: str, name: str, how: Settings, rates: timing.Ceilings, tiling=None
) -> tuple[dict, object]:
    """One row, not yet related to others, and the last call's outputs (None if nothing ran)."""
    shape, causal = shapes.named(name), kernel in cases.PROMPT
    own = contender in (SELF, REFERENCE)
    ran = backend.choose(how.impl if contender == SELF else "xla")
    row = {
        "kernel": kernel,
        "contender": contender,
        "shape": name,
        **shape._asdict(),
        "attended_tokens": cases.attended(kernel, shape, how.kv_sparsity if own else 0.0),
        "dtype": how.dtype,
        "tiling": None if tiling is None else str(tiling),
        "impl": _IMPLS.get(contender, ran.impl),
        "impl_reason": ran.reason if own else "a peer",
        **dict.fromkeys(_MEASURED),
    }
    case = cases.build(kernel, shape, how.dtype, how.kv_sparsity, ran.impl, tiling) if own else None
    work = case.work if own else peers.work(causal, shape, how.dtype)
    calls = how.calls or (1 if ran.impl == "interpret" else rates.calls(work))
    limits, found = dict(calls=calls, repeats=how.repeats, max_bytes=how.max_bytes), None
    try:
        if contender == peers.TORCH:
            found, row["note"] = peers.torch_sdpa(causal, shape, how.dtype, **limits)
        else:
            found = timing.measure(
                case or peers.build(contender, causal, shape, how.dtype), **limits
            )
    except timing.TooLarge as large:
        row |= {"time_s": "OOM", "note": str(large)}
    except peers.Missing as missing:
        row["note"] = str(missing)
    except Exception as wrong:  # of a compiler or a device: the row says it, other rows go on
        text = " ".join(str(wrong).split())[:200]
        # shared memory that a kernel lacks is a matter of its tiling, not of the device's memory
        full = "RESOURCE_EXHAUSTED" in text and "hared memory" not in text
        row |= {
            "time_s": "OOM" if full else None,
            "note": text if full else f"{type(wrong).__name__}: {text}",
        }
    return row | _numbers(found, work, how, rates), None if found is None else found.outs


def _numbers(
    found: timing.Timed | None, work: timing.Work, how: Settings, rates: timing.Ceilings
) -> dict:
    """What was measured and what follows from it; only what a call must do where nothing ran."""
    counts = {
        "read_bytes": work.read_bytes,
        "written_bytes": work.written_bytes,
        "flops": work.flops,
    }
    if found is None:
        return counts
    moved, done = work.bytes / found.time_s, work.flops / found.time_s
    return {
        **counts,
        "basis": "measured",
        "time_s": found.time_s,
        "time_min_s": found.time_min_s,
        "time_max_s": found.time_max_s,
        "gb_per_s": moved / 1e9,
        "tflop_per_s": done / 1e12,
        "fraction_of_copy": moved / rates.copy_bytes_per_s,
        "fraction_of_matmul": done / rates.matmul_flops_per_s,
        "calls": found.calls,
        "repeats": how.repeats,
        "warmup": timing.WARM_UP,
        "temporary_bytes": found.temporary_bytes,
    }


def error_of(got, want) -> float | str | None:
    """Greatest difference over the greatest value, of all arrays; a text if it is not finite.

    None where one of the two did not run.
    """
    if got is None or want is None:
        return None
    errors = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        errors.append(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
    worst = float(jnp.max(jnp.stack(errors)))
    return worst if math.isfinite(worst) else str(worst)


# ---- tilings


def tiled(kernel: str, name: str, how: Settings, rates: timing.Ceilings) -> list[dict]:
    """A row for each tiling that `climb` tries from that of the table on, the quickest first."""
    found = {}

    def seconds(tiling) -> float:
        found[tiling], _ = measure(kernel, SELF, name, how, rates, tiling)
        return _seconds(found[tiling])

    start = tilings.tiling_for(kernel, backend.chip(), shapes.named(name).head_dim)
    climb(start, seconds)
    rows = sorted(found.values(), key=_seconds)
    if _seconds(rows[0]) < math.inf:
        rows[0]["note"] = f"the quickest of {len(rows)}"
    found[start]["note"] = "; ".join(filter(None, ("of the table", found[start]["note"])))
    return rows


def _seconds(row: dict) -> float:
    """Of a call; infinite where nothing was measured."""
    return row["time_s"] if isinstance(row["time_s"], float) else math.inf


def climb(start, seconds: Callable) -> dict:
    """tiling -> `seconds(tiling)`, for `start`, its neighbours, and those of the quickest so far.

    Ends when the neighbours of the quickest are all known.
    """
    tried = {start: seconds(start)}
    while new := [
        tiling for tiling in neighbours(min(tried, key=tried.get)) if tiling not in tried
    ]:
        tried |= {tiling: seconds(tiling) for tiling in new}
    return tried


def neighbours(tiling) -> Iterator:
    """Tilings that differ in one number.

    Half or twice as many rows, queries or warps, one stage more or less.
    """
    for field, (least, most) in _TILES.items():
        if field in tiling._fields:
            value = getattr(tiling, field)
            for other in (value - 1, value + 1) if field == "stages" else (value // 2, value * 2):
                if least <= other <= most:
                    yield tiling._replace(**{field: other})
