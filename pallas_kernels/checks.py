"""What says whether a kernel is right: inputs, an oracle and limits, by kernel, shape and type.

    for check in sample(seed):
        record = run(check, "pallas", seed)     # record["passed"], and why not in record["note"]

Tests interpret those of `ALL` that are not `large`; a GPU runs all, compiled. Needs jax and NumPy.

    oracle              for
    numpy float64       small shapes: ragged lists, repeated and unsorted rows, empty ones, -inf
    xla float32         the benchmark's shapes, where NumPy would take minutes: the kernel's
                        reference in float32 at `highest` precision, on the same device and inputs

A record is flat. `out_error` and the like are the worst errors (`check_runs.py` says relative to
what), `..._limit` what they may be; None: not part of this check. Limits are the same for kernels
that are compiled and interpreted, and for references: products of float32 ask for the `HIGHEST`
precision, and half precision rounds the same operands everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from pallas_kernels import backend, bench, cases, check_runs, shapes
from pallas_kernels.check_runs import Limits, Lists, Prompt
from pallas_kernels.tilings import DecodeTiling, PrefillTiling

PIECES = "partial"  # pieces of a list, attended by `sparse_decode` and joined by `partial.py`
KERNELS = (*cases.DECODE, *cases.PROMPT, PIECES)

SMALL = DecodeTiling(rows=16, splits=2)
SMALL_PROMPT = PrefillTiling(queries=32, rows=16)

# sizes are prime where they can be
LISTS = MappingProxyType(
    {
        "one head per kv head": Lists(3, 5, 1, 64, 37, 23, 1),
        "four heads": Lists(2, 3, 4, 32, 53, 41, 3),
        "eight heads": Lists(1, 2, 8, 128, 31, 29, 1),
        "a head that is no power of two": Lists(2, 2, 4, 80, 19, 17, 2),
        "wide heads": Lists(1, 2, 1, 256, 67, 61, 2),
        "one row": Lists(2, 1, 1, 32, 7, 1, 1),
        "no rows": Lists(2, 3, 4, 32, 53, 0, 3),
        "many tiles": Lists(1, 2, 4, 32, 211, 197, 1),
        "int8, one head per kv head": Lists(2, 3, 1, 64, 37, 23, 1),
        "int8, eight heads": Lists(1, 2, 8, 80, 31, 29, 1),
        "tails of large tiles": Lists(3, 2, 4, 128, 1031, 517, 1),
    }
)
PROMPTS = MappingProxyType(
    {
        "one head per kv head, ragged": Prompt(67, 3, 1, 32, (67, 1, 0, 41)),
        "four heads, no power of two": Prompt(67, 2, 4, 80, (13, 67)),
        "eight heads": Prompt(37, 1, 8, 128, None),
        "wide heads": Prompt(37, 2, 1, 256, (29,)),
        "less than a tile": Prompt(5, 2, 2, 16, (3, 5)),
        "more than a block of the references": Prompt(149, 2, 2, 32, (149, 133)),
        "tails of large tiles": Prompt(331, 2, 4, 128, (331, 203)),
        "chunks, ragged": Prompt(67, 3, 1, 32, (67, 41, 13, 0), chunk=23, first=(37, 30, -9, 3)),
        "chunks of one": Prompt(37, 2, 4, 80, (37, 20), chunk=1, first=(36, 19)),
        "chunks longer than a tile": Prompt(67, 2, 4, 80, (67, 29), chunk=41, first=(26, -12)),
        "chunks longer than prompts": Prompt(19, 2, 2, 16, (19, 7), chunk=37, first=(-18, 0)),
        "chunks of large tiles": Prompt(331, 2, 4, 128, (331, 203), chunk=139, first=(192, 30)),
    }
)
MAIN = "one head per kv head, ragged"
GROUPED = "four heads, no power of two"
CHUNKS = "chunks, ragged"
MAIN_LISTS = "one head per kv head"
GROUPED_LISTS = "four heads"
HALVES = ("bfloat16", "float16")

# An output is a mean of values, and small where they cancel: decode tells its error relative to the
# greatest value of v, and allows half.
DECODE_LIMITS = MappingProxyType(
    {
        "float32": Limits(1.25e-6, 2.5e-6, 2.5e-6),
        "bfloat16": Limits(2.5e-3, 5e-3, 5e-3),
        "float16": Limits(1e-3, 2e-3, 2e-3),
    }
)
INT8_LIMITS = MappingProxyType(
    {"float32": Limits(1e-5, 1e-5, 1e-5), "bfloat16": Limits(1e-2, 1e-2, 2e-2)}
)
PROMPT_LIMITS = MappingProxyType(
    {
        "float32": Limits(5e-6, 5e-6, 5e-6),
        "bfloat16": Limits(5e-3, 5e-3, 5e-3),
        "float16": Limits(5e-3, 5e-3, 5e-3),
    }
)
# float32 holds logits of some hundreds to 1e-4, so weights are right to about that
OVERFLOW_LIMITS = Limits(2e-3, 5e-6, 2e-3)
# At named shapes every row has its own error. Decode rounds q and the weights to bfloat16 (2**-8),
# which moves a row by 0.3 % of its length, and the worst of some thousands by 0.45 %.
NAMED_LIMITS = MappingProxyType(
    {"decode": Limits(1e-2, 5e-3, 1e-2), "int8": Limits(2e-2, 1e-2, 2e-2)}
)
PIECES_LIMITS = Limits(5e-6, 5e-6, None)


class Check(NamedTuple):
    """One kernel at one shape, type and tiling."""

    kernel: str  # one of KERNELS
    name: str  # no other check has it
    dtype: str  # of q, and of k and v unless int8
    shape: Lists | Prompt | str  # a text: of `shapes.py`
    limits: Limits
    tiling: DecodeTiling | PrefillTiling | None = None  # None: the table's
    kind: str = ""  # what is asked beside the right numbers, see `check_runs.py`
    large: bool = False  # too much for the interpreter


def run(check: Check, impl: str, seed: int) -> dict:
    """The record of one run with inputs from `seed`: flat, JSON-able, `passed` true or false.

    impl: see `backend`; `auto` is recorded as what it chose. Raises ValueError where `impl` cannot
    run, and whatever compiling or running raises.
    """
    ran = backend.choose(impl).impl
    named = isinstance(check.shape, str)
    found = check_runs.at_named_shape if named else check_runs.at_small_shape
    errors, faults = found(check, ran, seed)
    limits = check.limits._asdict()
    for what, error in errors.items():
        if limits[what] is None:
            continue
        if not error <= limits[what]:
            faults.append(f"{what} is off by {error:.3g}, and {limits[what]:g} is allowed")
    return {
        "check": check.name,
        "kernel": check.kernel,
        "impl": ran,
        "dtype": check.dtype,
        **_described(check),
        "seed": seed,
        "oracle": "xla float32" if named else "numpy float64",
        **{
            f"{what}_{key}": value
            for what in limits
            for key, value in (("error", _number(errors.get(what))), ("limit", limits[what]))
        },
        "passed": not faults,
        "note": "; ".join(faults) or None,
    }


def sample(seed: int, large: bool = True) -> tuple[Check, ...]:
    """All checks, or those that are not `large`, in an order that `seed` draws.

    Each round has one check of every kernel that has any left, so a run that is cut short has seen
    each. Of a kernel small and large ones take turns, a small one first.
    """
    r = np.random.default_rng(seed)
    queues = []
    for kernel in r.permutation(KERNELS):
        own = [check for check in ALL if check.kernel == kernel]
        own = [own[i] for i in r.permutation(len(own))]
        small = [check for check in own if not check.large]
        turns = itertools.zip_longest(small, [c for c in own if c.large] if large else ())
        queues.append([check for turn in turns for check in turn if check is not None])
    rounds = itertools.zip_longest(*queues)
    return tuple(check for turn in rounds for check in turn if check is not None)


# ---- the record


def _described(check: Check) -> dict:
    """The shape in the words of the benchmark's records, tiling and kind."""
    shape = check.shape
    if isinstance(shape, str):
        s = shapes.named(shape)
        lengths = None
        lists = 1
        queries = min(cases.WINDOW, s.context) if check.kernel == "prompt_mass_rows" else None
        chunk = first = None
        attended = cases.attended(check.kernel, s, check_runs.KV_SPARSITY)
    else:
        prompt = isinstance(shape, Prompt)
        lengths = shape.lengths if prompt else None
        lists = shape.groups if prompt else shape.lists
        queries = shape.queries if prompt else None
        chunk = shape.chunk if prompt else None
        first = shape.first if prompt else None
        batch = len(lengths or (0, 0)) if prompt else shape.batch
        heads = shape.group * shape.n_kv_heads
        s = shapes.Shape(heads, shape.n_kv_heads, shape.head_dim, batch, shape.context)
        attended = shape.context if prompt else shape.attended
    return {
        **s._asdict(),
        "attended_tokens": attended,
        "lists": lists,
        "queries": queries,
        "lengths": lengths and " ".join(map(str, lengths)),
        "chunk": chunk,
        "first": first and " ".join(map(str, first)),
        "tiling": check.tiling and str(check.tiling),
        "kind": check.kind or None,
        "large": check.large,
    }


def _number(error: float | None) -> float | str | None:
    """JSON has no infinity and no NaN: these are texts."""
    return error if error is None or math.isfinite(error) else str(error)


# ---- the list


def _name(*parts) -> str:
    return "/".join(str(part) for part in parts if part)


def _decode(kernel: str, label: str, dtype: str, tiling=SMALL, kind="", large=False) -> Check:
    cut = f"{tiling.rows}x{tiling.splits}" if tiling else "table's tiling"
    limits = INT8_LIMITS if "_int8_" in kernel else DECODE_LIMITS
    limits = PIECES_LIMITS if kernel == PIECES else limits[dtype]
    limits = limits._replace(sum=2e-6) if kind == "sums" else limits
    name = _name(kernel, label, dtype, cut, kind)
    return Check(kernel, name, dtype, LISTS[label], limits, tiling, kind, large)


def _prompt(
    kernel: str,
    label: str,
    dtype: str = "float32",
    W: int | None = None,
    P: int = 1,
    tiling=SMALL_PROMPT,
    kind: str = "",
    large: bool = False,
) -> Check:
    mass = kernel != "flash_prefill"
    cut = f"{tiling.queries}x{tiling.rows}" if tiling else "table's tiling"
    limits = OVERFLOW_LIMITS if kind == "overflow" else PROMPT_LIMITS[dtype]
    limits = limits._replace(sum=5e-6) if kind == "sums" else limits
    asked = f"W={W or 'all'} P={P}" if mass else ""
    name = _name(kernel, label, asked, dtype, cut, kind)
    shape = PROMPTS[label]._replace(queries=W, groups=P)
    return Check(kernel, name, dtype, shape, limits, tiling, kind, large)


def _decode_checks() -> Iterator[Check]:
    plain = ("sparse_decode", "packed_decode")
    sizes = [label for label in LISTS if "int8" not in label and "tiles" not in label]
    two = (MAIN_LISTS, GROUPED_LISTS)
    for kernel in plain:
        yield from (_decode(kernel, label, "float32") for label in sizes if label != "no rows")
        yield from (_decode(kernel, label, dtype) for label in two for dtype in HALVES)
    yield _decode("sparse_decode", "no rows", "float32")
    for tiling in ((16, 1), (16, 3), (64, 0), (32, 7)):
        yield _decode("sparse_decode", "many tiles", "float32", DecodeTiling(*tiling))
    yield _decode("sparse_decode", "eight heads", "float32", kind="sums")
    yield _decode("sparse_decode", GROUPED_LISTS, "float32", kind="sums")
    yield _decode("sparse_decode", GROUPED_LISTS, "float32", kind="no mass")
    for kernel in plain:
        yield _decode(kernel, GROUPED_LISTS, "float32", kind="poison")
    yield _decode("dense_decode", GROUPED_LISTS, "float32")
    yield _decode(PIECES, GROUPED_LISTS, "float32")
    coded = [kernel for kernel in cases.DECODE if "_int8_" in kernel]
    for kernel in coded:
        for label in ("int8, one head per kv head", GROUPED_LISTS, "int8, eight heads"):
            yield _decode(kernel, label, "float32")
        # two that tests interpret are enough
        large = kernel.startswith("packed")
        yield _decode(kernel, GROUPED_LISTS, "bfloat16", large=large)
    for kernel in cases.DECODE:
        for dtype in ("bfloat16",) if "_int8_" in kernel else ("float32", *HALVES):
            yield _decode(kernel, "tails of large tiles", dtype, None, large=True)


def _prompt_checks() -> Iterator[Check]:
    rows, total = "prompt_mass_rows", "prompt_mass_sum"
    longest, tails = "more than a block of the references", "tails of large tiles"
    chunk_tails = "chunks of large tiles"
    for label in PROMPTS:
        if label not in (longest, tails, chunk_tails):
            yield _prompt("flash_prefill", label)
    yield _prompt(rows, MAIN, W=19, P=3)
    yield _prompt(rows, MAIN, W=71)  # more rows than tokens
    yield _prompt(rows, GROUPED, W=37, P=2)
    yield _prompt(rows, GROUPED, W=1, P=8)
    yield _prompt(total, MAIN)
    yield _prompt(total, GROUPED, W=37, P=2)
    yield _prompt(total, "eight heads", P=8)
    yield _prompt(total, "less than a tile", P=2)
    yield _prompt(rows, CHUNKS, W=29, P=3)
    yield _prompt(rows, "chunks of one", W=5, P=2)
    yield _prompt(rows, "chunks longer than a tile", W=41, P=2)  # first is length - W
    yield _prompt(total, CHUNKS, P=3)
    yield _prompt(total, "chunks longer than a tile", W=37)
    yield _prompt(total, "chunks longer than prompts", P=2)
    for kernel in ("flash_prefill", rows, total):
        yield _prompt(kernel, CHUNKS, W=None if kernel == "flash_prefill" else 71, kind="poison")
    for dtype in HALVES:
        yield _prompt("flash_prefill", GROUPED, dtype)
        yield _prompt(rows, GROUPED, dtype, 7, 2, kind="own lse")
    for tiling, kernel in ((PrefillTiling(16, 64), total), (PrefillTiling(128, 128), rows)):
        yield _prompt("flash_prefill", MAIN, tiling=tiling)
        yield _prompt(kernel, MAIN, W=23, tiling=tiling, kind="own lse")
    yield _prompt("flash_prefill", MAIN, kind="poison")
    yield _prompt(rows, MAIN, W=19, P=3, kind="poison")
    yield _prompt(total, MAIN, kind="poison")
    yield _prompt(rows, MAIN, W=71, kind="sums")
    yield _prompt(total, MAIN, W=71, kind="sums")
    yield _prompt("flash_prefill", MAIN, kind="overflow")
    yield _prompt(total, MAIN, kind="overflow")
    yield _prompt("flash_prefill", "less than a tile", kind="beyond")
    for label, dtypes, tiling in (
        (longest, ("float32",), SMALL_PROMPT),
        (tails, ("float32", *HALVES), None),
        (chunk_tails, ("float32", *HALVES), None),
    ):
        for dtype in dtypes:
            yield _prompt("flash_prefill", label, dtype, tiling=tiling, large=True)
            for kernel in (rows, total):
                yield _prompt(kernel, label, dtype, 139, 2, tiling, "own lse", True)


def _named_checks() -> Iterator[Check]:
    decode, prompts = bench.SHAPES["gpu"]
    for kernel in (*cases.DECODE, *cases.PROMPT):
        for shape in prompts if kernel in cases.PROMPT else decode:
            limits = NAMED_LIMITS["int8" if "_int8_" in kernel else "decode"]
            limits = PROMPT_LIMITS["bfloat16"] if kernel in cases.PROMPT else limits
            name = _name(kernel, shape, "bfloat16")
            yield Check(kernel, name, "bfloat16", shape, limits, large=True)


ALL = (*_decode_checks(), *_prompt_checks(), *_named_checks())
