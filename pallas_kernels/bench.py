"""Times the kernels, their references and what others offer, on the device at hand.

    python -m pallas_kernels.bench                         # about half a minute on 2 CPU cores
    python -m pallas_kernels.bench --kernel packed_decode --shape llama-3-8b/b64/c8192
    python -m pallas_kernels.bench --json --out kernels.jsonl
    python -m pallas_kernels.bench --tilings               # better ones than the table's?

Kernels are those of `cases.py`, at `--kv_sparsity`; `swa_layer` sets a layer's step on the kept
tokens (packed_decode with mass) beside dense attention at the same context. A row is a kernel or a
peer at a shape: `timing.py` says how its seconds are got, `cases.py` which bytes and FLOPs are
counted. In the same process a copy of a large array and a product of large matrices are timed, and
rows say which share of those rates they reach. A copy writes half of what it moves and attention
reads, so a share above 1 can be true, all the more where K and V fit into a cache.

Peers: the reference compiled by XLA, for whole contexts also jax.nn.dot_product_attention, the
decode kernels that ship with jax, and torch. What cannot run has no seconds ("-") and a reason,
what does not fit is "OOM". `ratio_to_best_peer` is the seconds of the quickest peer over those of
the kernel; `max_error`, in the row of the reference, the greatest difference of the two on the same
inputs over the greatest value.

A row is a flat record of JSON with units in its keys. Exit codes: 0 done, 1 a kernel failed (its
row says how), 2 a mistake on the command line, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from types import MappingProxyType

import jax

from pallas_kernels import backend, bench_rows, cases, shapes, timing

FAILED = 1
MISTAKE = 2
INTERRUPTED = 130
SHAPES = MappingProxyType(  # platform -> shapes for kernels of one token, and of prompts
    {
        "gpu": (
            (
                "opt-6.7b/b64/c640",
                "llama-3-8b/b4/c8192",
                "llama-3-8b/b64/c8192",
                "llama-3-8b/b16/c32768",
            ),
            ("llama-3-8b/b4/c2048", "llama-3-8b/b1/c8192", "llama-3-8b/b1/c32768"),
        ),
        "cpu": (("llama-3-8b/b1/c640", "llama-3-8b/b4/c640"), ("llama-3-8b/b1/c256",)),
    }
)


class Mistake(Exception):
    """Of the person at the keyboard; the text is one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """flags -> rates of the device -> rows -> table; returns the exit code."""
    records: list[dict] = []
    try:
        flags = parse(sys.argv[1:] if argv is None else argv)
        out = None if flags.out is None else appendable(flags.out)
        how = bench_rows.Settings(
            flags.dtype, flags.kv_sparsity, flags.impl, flags.repeats, flags.calls, flags.max_bytes
        )
        rates = timing.ceilings(flags.dtype, flags.repeats, flags.max_bytes)
        here = where() | {
            "copy_gb_per_s": rates.copy_bytes_per_s / 1e9,
            "matmul_tflop_per_s": rates.matmul_flops_per_s / 1e12,
        }
        for record in _rows(flags, how, rates):
            records.append(record | here)
            if out is not None:
                append(out, records[-1])
            if flags.json:
                print(json.dumps(records[-1], allow_nan=False), flush=True)
    except Mistake as mistake:
        _say(f"error: {mistake}")
        return MISTAKE
    except KeyboardInterrupt:
        _say("interrupted: what was done is printed, and kept in --out")
        return INTERRUPTED
    finally:
        if records:
            print(table(records), file=sys.stderr if flags.json else sys.stdout, flush=True)
    ran = {
        (r["kernel"], r["shape"])
        for r in records
        if r["contender"] == bench_rows.SELF and r["time_s"] is not None
    }
    return 0 if ran == {(r["kernel"], r["shape"]) for r in records} else FAILED


def _rows(flags, how: bench_rows.Settings, rates: timing.Ceilings) -> Iterator[dict]:
    """All records, as they come: shape by shape, so that what is dense is measured once."""
    for name, kernels in flags.pairs.items():
        known: dict = {}
        for kernel in kernels:
            if sys.stderr.isatty():
                _say(f"timing {kernel} at {name}")
            run = (
                bench_rows.tiled(kernel, name, how, rates)
                if flags.tilings
                else bench_rows.group(kernel, name, how, rates, known)
            )
            yield from run


def where() -> dict:
    """Where and by what a number was measured."""
    device = jax.devices()[0]
    return {
        "script": "pallas_kernels.bench",
        "platform": device.platform,
        "device_kind": device.device_kind,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("jax", "jaxlib")},
    }


# ---- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Mistake(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, checked, with `pairs`: shape -> kernels. Raises Mistake."""
    parser = _Parser(
        prog="python -m pallas_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--kernel",
        action="append",
        metavar="NAME",
        help=f"repeatable; all of {', '.join(bench_rows.KERNELS)}",
    )
    add(
        "--shape",
        action="append",
        metavar="MODEL/bBATCH/cCONTEXT",
        help="repeatable; a few that suit the device",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="bfloat16 on a GPU, else float32",
    )
    add(
        "--kv_sparsity",
        type=float,
        default=0.8,
        help="share of the context that is not attended (0.8)",
    )
    add(
        "--repeats",
        type=int,
        default=5,
        help=f"timed runs of a program, after {timing.WARM_UP} to warm up (5)",
    )
    add("--calls", type=int, help=f"calls in a program; as many as fill {timing.TARGET_S:g} s")
    add("--impl", choices=backend.IMPLS, default="auto", help="what runs the kernels (auto)")
    add(
        "--max_bytes",
        type=float,
        help="memory that a row may use; 70 %% of the device's, 4 GiB where it does not tell",
    )
    add(
        "--json",
        action="store_true",
        help="one JSON line for each row on stdout, all else on stderr",
    )
    add("--out", metavar="FILE", help="JSON lines are appended to it, whole lines only")
    add(
        "--tilings",
        action="store_true",
        help=f"time tilings instead, of {', '.join(bench_rows.TILED)}",
    )
    flags = parser.parse_args(argv)
    for name, good, allowed in (
        ("kv_sparsity", 0 <= flags.kv_sparsity < 1, "at least 0 and below 1"),
        ("repeats", flags.repeats >= 1, "1 or more"),
        ("calls", flags.calls is None or flags.calls >= 1, "1 or more"),
        ("max_bytes", flags.max_bytes is None or flags.max_bytes >= 2**16, "65536 or more"),
    ):
        if not good:
            raise Mistake(f"--{name} must be {allowed}; got {getattr(flags, name):g}")
    device = jax.devices()[0]
    if flags.dtype is None:
        flags.dtype = "bfloat16" if device.platform == "gpu" else "float32"
    if flags.max_bytes is None:
        limit = (
            (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
        )
        flags.max_bytes = 0.7 * limit if limit else 2.0**32
    try:
        ran = backend.choose(flags.impl)
        for name in flags.shape or ():
            shapes.named(name)
    except ValueError as error:
        raise Mistake(str(error)) from None
    if flags.tilings and ran.impl != "pallas":
        raise Mistake(f"--tilings has nothing to time: {ran.reason}")
    if flags.tilings and flags.dtype == "float32":
        raise Mistake(
            "--tilings has nothing to time in float32: the table is for bfloat16 and float16"
        )
    flags.pairs = _pairs(flags, device.platform)
    return flags


def _pairs(flags, kind: str) -> dict[str, list[str]]:
    """Kernels by shape."""
    allowed = bench_rows.TILED if flags.tilings else bench_rows.KERNELS
    for kernel in flags.kernel or ():
        if kernel not in allowed:
            raise Mistake(f"--kernel must be one of {', '.join(allowed)}; got {kernel!r}")
    decode, prompt = SHAPES["gpu" if kind == "gpu" else "cpu"]
    found: dict[str, list[str]] = {}
    for kernel in (kernel for kernel in allowed if kernel in (flags.kernel or allowed)):
        for name in dict.fromkeys(flags.shape or (prompt if kernel in cases.PROMPT else decode)):
            found.setdefault(name, []).append(kernel)
    return found


# ---- records and the table


def appendable(path: str) -> str:
    """`path`, made where it is absent; half a last line is cut off, with a warning on stderr."""
    try:
        with open(path, "ab+") as file:
            file.seek(0)
            content = file.read()
            last = content[content.rfind(b"\n") + 1 :]
            if last and _whole(last):
                file.write(b"\n")
            elif last:
                file.truncate(len(content) - len(last))
                _say(f"warning: {path}: removed a half-written last line of {len(last)} bytes")
    except OSError as error:
        raise Mistake(f"cannot write rows to {path}: {error.strerror or error}") from None
    return path


def _whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def append(path: str, record: dict) -> None:
    """One record as one line, or nothing. Raises Mistake where it cannot be written."""
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(file).st_size
            if os.write(file, line) < len(line):
                os.ftruncate(file, before)
                raise OSError("the line did not fit")
        finally:
            os.close(file)
    except OSError as error:
        raise Mistake(f"cannot write rows to {path}: {error.strerror or error}") from None


def table(records: Sequence[dict]) -> str:
    """What the rows have in common, and a line for each."""
    one = records[0]
    head = (
        "kernel",
        "shape",
        "row",
        "impl",
        "ms",
        "GB/s",
        "of copy",
        "TFLOP/s",
        "of matmul",
        "to best",
        "error",
        "note",
    )
    lines = [head]
    for r in records:
        note = (
            r["note"]
            or (
                r["impl_reason"] if r["impl"] == "xla" and r["contender"] == bench_rows.SELF else ""
            )
            or ""
        )
        rates = (
            ("gb_per_s", 1),
            ("fraction_of_copy", 1),
            ("tflop_per_s", 1),
            ("fraction_of_matmul", 1),
        )
        numbers = [_number(r["time_s"], 1e3), *(_number(r.get(key), by) for key, by in rates)]
        more = [_number(r["ratio_to_best_peer"], 1), _number(r["max_error"], 1)]
        lines.append(
            (
                r["kernel"],
                r["shape"],
                r["tiling"] or r["contender"],
                r["impl"],
                *numbers,
                *more,
                note,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, tuple("-" * width for width in widths))
    pads = [str.ljust] * 4 + [str.rjust] * 7 + [str.ljust]
    text = [
        "  ".join(pad(c, w) for pad, c, w in zip(pads, line, widths, strict=True)).rstrip()
        for line in lines
    ]
    about = (
        f"{one['device_kind']} ({one['platform']}), jax {one['jax']}, {one['dtype']}: a copy moves "
        f"{one['copy_gb_per_s']:.4g} GB/s, a matrix product does {one['matmul_tflop_per_s']:.4g} "
        "TFLOP/s"
    )
    return "\n".join(["", about, "", *text])


def _number(value, scale: float) -> str:
    """Three digits; a text as it is; "-" for None."""
    return "-" if value is None else value if isinstance(value, str) else f"{value * scale:.3g}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
