"""Part c: each kernel at its named shapes beside its reference, `jax.nn`, jax's own kernels and torch."""

from collections.abc import Iterator

from eval.card import rates
from pallas_kernels import bench_rows, cases, peers

DTYPE, KV_SPARSITY = "bfloat16", 0.8
BAR = "llama-3-8b/b64/c8192"  # of the bars for one new token, and
BAR_PROMPT = "llama-3-8b/b1/c8192"  # of that for prompts
SHAPES = (BAR, "llama-3-8b/b4/c8192", "opt-6.7b/b64/c640", "llama-3-8b/b16/c32768")
PROMPT_SHAPES = (BAR_PROMPT, "llama-3-8b/b4/c2048", "llama-3-8b/b1/c32768")
DRY = ((("packed_decode", "dense_decode"), "llama-3-8b/b1/c32"),)
DRY += ((("flash_prefill",), "llama-3-8b/b1/c16"),)


def run(emit, left, dry: bool, seed: int) -> None:
    """A cell for each kernel or peer at a shape: `time_s` of a call, bytes, FLOPs, and shares of the measured rates."""
    limits = rates.known(emit, DTYPE, dry)
    how = settings(dry)
    for kernel, shape, contender in plan(dry, how.impl):
        if left() < 0:
            return

        def measure(kernel=kernel, shape=shape, contender=contender) -> dict:
            row, outs = bench_rows.measure(kernel, contender, shape, how, limits)
            if outs is not None and contender == bench_rows.REFERENCE:
                own, mine = bench_rows.measure(kernel, bench_rows.SELF, shape, how._replace(repeats=1, calls=1), limits)
                row["max_error"] = bench_rows.error_of(mine, outs) if own["time_s"] is not None else None
            return failed(row)

        emit.attempt(f"{shape} {kernel} {contender}", measure)


def settings(dry: bool) -> bench_rows.Settings:
    """How kernels are timed here."""
    if dry:
        return bench_rows.Settings(DTYPE, KV_SPARSITY, "interpret", 1, 1, 2.0**30)
    return bench_rows.Settings(DTYPE, KV_SPARSITY, "pallas", 7, None, rates.most_bytes())


def failed(row: dict) -> dict:
    """A row that a compiler or a device refused is a failed cell; what cannot run here, or does not fit, is none."""
    if (
        row["time_s"] is None
        and ": " in (row["note"] or "")
        and row["contender"] in (bench_rows.SELF, bench_rows.REFERENCE)
    ):
        return row | {"error": row["note"]}
    return row


def plan(dry: bool, impl: str) -> Iterator[tuple[str, str, str]]:
    """(kernel, shape, contender): what the bars need first, torch after all else of a shape."""
    groups = DRY if dry else _groups()
    for kernels, shape in groups:
        found = [(kernel, shape, c) for kernel in kernels for c in bench_rows.contenders(kernel, impl)]
        yield from sorted(found, key=lambda one: one[2] == peers.TORCH)


def _groups() -> Iterator[tuple[tuple[str, ...], str]]:
    first = ("packed_decode", "sparse_decode", "packed_decode_int8_token", "sparse_decode_int8_token", "dense_decode")
    yield first, BAR
    yield ("flash_prefill",), BAR_PROMPT
    yield tuple(kernel for kernel in cases.DECODE if kernel not in first), BAR
    yield tuple(kernel for kernel in cases.PROMPT if kernel != "flash_prefill"), BAR_PROMPT
    for shape in SHAPES[1:]:
        yield cases.DECODE, shape
    for shape in PROMPT_SHAPES[1:]:
        yield cases.PROMPT, shape
