"""Our engine beside transformers on this machine: decode, prefill, perplexity; float32, the same weights, threads, shapes.

    python -m eval.bench                                     every suite; --quick for a look at a small size
    python -m eval.bench --suite=decode --model=random:opt_125m --cell=8x1024 --out=bench.jsonl
    python -m eval.bench --suite=perplexity --full           100k tokens instead of 20k
    python -m eval.bench --suite=decode --cell=1x128 --systems=dense,static --profile=FOLDER

decode      A round decodes `steps` greedy tokens of every sequence. The systems run each round in turn, so all are at the
            same length at the same time. The first round is not timed. Caches hold `context - rounds x steps` tokens before
            it and `context` after the last. No prompt fills them: K and V (and q, for policies that attention seeds) are
            normal numbers, drawn once per cell, the same for all systems. Dense and the peers therefore give the same
            tokens; `agrees` is the share that is equal. Random weights select nothing lasting, so SWA attends what it
            selects when the model of --trace reads a text at this context (`eval/speed/traces.py`).
prefill     The systems read the same random prompt in turn, several times; the first time is not timed. Our engine pads it
            as it pads all prompts.
perplexity  The systems score each group of windows of the text in turn. `decode` and `prefill_mask` are the protocols of
            `eval.perplexity`; the peer does one forward. The mean nll of dense must equal the peer's to 1e-3.

Decode and prefill report medians over the rounds, perplexity the whole text; all report quartiles. `x peer` is tokens/s over
those of the best peer in the cell, `x dense` over those of our dense, raw row. `limit` is the time that the bytes and FLOPs
of the row take at the read bandwidth and the matmul peak of this machine (`eval/speed/limits.py`). `compiles` counts the
programs that the timed rounds compiled; it must be 0. The gates stand below the tables (`eval/speed/gates.py`). Run on an
idle machine (torch suffers most from other load); `load_before` records the load. Peers need the extra `parity`. A cell is
measured as a whole, and taken from --out as a whole.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence

from absl import flags
from tqdm import tqdm

from eval.script import common, inputs
from eval.script.common import UserError
from eval.script.machine import load as load_before
from eval.speed import cells as bench_cells
from eval.speed import gates, limits, peers, rounds
from eval.speed.cells import NAMES, SUITES, Cell, System
from eval.speed.limits import Rates
from eval.text import windows


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked one by one; raises UserError."""
    values = common.shared_flags(bench_cells.BUNDLED, windows.BUNDLED, None)
    del values.model
    where, one = {"flag_values": values}, {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_enum("suite", "all", (*SUITES, "all"), "What is measured.", **where)
    flags.DEFINE_multi_string(
        "model",
        [bench_cells.SMALL, bench_cells.BUNDLED],
        "random:NAME, a folder or bundled; repeatable.",
        **where,
    )
    flags.DEFINE_multi_string(
        "cell", None, "BATCHxCONTEXT of decode and prefill; repeatable. Default: each model's own.", **where
    )
    flags.DEFINE_list("systems", [], f"Rows, comma-separated, of {', '.join(NAMES)}. Default: all.", **where)
    flags.DEFINE_integer("repeats", 5, "Timed rounds.", lower_bound=5, **where)
    flags.DEFINE_integer(
        "steps", None, "Decode steps of a round. Default: 16 at 1024 tokens; else fewer.", 1, 64, **where
    )
    flags.DEFINE_integer("perplexity_tokens", 20_000, "Tokens of the text that are scored.", **one)
    flags.DEFINE_integer("window_tokens", 1024, "Tokens of a window, at most; perplexity.", 2, **where)
    flags.DEFINE_bool("full", False, "Score 100k tokens.", **where)
    flags.DEFINE_bool("quick", False, "Small sizes: the bundled model, one sequence of 96 tokens.", **where)
    flags.DEFINE_string("trace", bench_cells.BUNDLED, "The model whose selections SWA replays, or none.", **where)
    flags.DEFINE_string(
        "profile",
        None,
        "Folder for a trace of one more round of each of our rows (decode, prefill).",
        **where,
    )
    common.impl_flag(values)
    common.parse(values, argv, __doc__)
    if unknown := [name for name in values.systems if name not in NAMES]:
        raise UserError(f"--systems: unknown name {unknown[0]!r}; known: {', '.join(NAMES)}")
    if values.quick:
        values.model = [bench_cells.BUNDLED]
        values.window_tokens = min(values.window_tokens, 64)
        values.perplexity_tokens = min(values.perplexity_tokens, 640)
    if values.trace != "none" and values.trace.startswith("random:"):
        raise UserError(f"--trace: the weights of {values.trace} are random; give bundled, a folder or none")
    return values


def main(argv: Sequence[str], measure_rates: Callable = limits.rates) -> None:
    """flags -> cells -> rounds in turn -> records. measure_rates is for tests."""
    values, sources = config(argv), {}
    inputs.check_impl(values.attention_impl)
    suites = SUITES if values.suite == "all" else (values.suite,)
    cells = bench_cells.cells(suites, list(dict.fromkeys(values.model)), values)
    results, threads = inputs.results(values.out), peers.threads()
    known = peers.installed()
    if not known:
        common.say("torch and transformers are not installed (extra parity), so there are rows of ours alone")
    records, machine, load, reused = [], None, None, 0
    for cell in tqdm(cells, desc="cells", disable=None, leave=False):
        systems = {n: s for n, s in bench_cells.chosen(cell.suite, values.systems).items() if known or s.ours}
        if not systems:
            continue
        rows = {name: _fields(values, cell, systems, name, threads, sources) for name in systems}
        anew = results is None or values.rerun or values.profile is not None
        old = [None if anew else results.find(row | inputs.here()) for row in rows.values()]
        if None not in old:
            reused += 1
            records += old
            continue
        load = load_before() if machine is None else load
        machine = machine or measured_rates(measure_rates, known)
        common.say(f"{cell.title}: {', '.join(systems)}")
        began = time.perf_counter()
        found = rounds.SUITES[cell.suite](cell, systems, values, machine)
        wall_s = (time.perf_counter() - began) / len(found)
        for name, got in compared(found, systems).items():
            how = {"warmup": 1, "repeats": cell.rounds}
            got |= machine.fields() | peers.versions() | {"load_before": load}
            records.append(inputs.record(results, rows[name], got, wall_s, how))
    if not records:
        raise UserError(f"--systems: none of {', '.join(values.systems)} is a row of --suite={values.suite}")
    if reused:
        common.say(f"{reused} of {len(cells)} cells were already in {values.out}; --rerun measures them again")
    common.emit(records, gates.text(records), values.json)


def measured_rates(measure: Callable, known: bool) -> Rates:
    """The rates of this machine, by XLA and by torch where it is there."""
    read_bytes, side = limits.READ_BYTES, limits.SIDE
    machine = measure(lambda r, s: peers.reads(r, s) if known else None, read_bytes, side)
    common.say(
        f"this machine reads {machine.read_bytes_per_s / 1e9:.1f} GB/s ({machine.read_by}) and does "
        f"{machine.matmul_flops_per_s / 1e9:.0f} GFLOP/s ({machine.matmul_by})"
    )
    return machine


def compared(found: Mapping[str, dict], systems: Mapping[str, System]) -> dict[str, dict]:
    """`found` with ratios of tokens per second."""
    speed = {name: got["tokens_per_s"] for name, got in found.items() if got["tokens_per_s"]}
    peer = max((s for name, s in speed.items() if not systems[name].ours), default=None)
    dense = speed.get("dense")
    return {
        name: got
        | {
            "ratio_to_best_peer": speed[name] / peer if name in speed and peer else None,
            "ratio_to_dense": speed[name] / dense if name in speed and dense and systems[name].ours else None,
        }
        for name, got in found.items()
    }


def _fields(values, cell: Cell, systems: Mapping[str, System], name: str, threads: int, sources: dict) -> dict:
    """The fields that identify a record; the text, where one is read, is kept in `sources`."""
    traced = {"trace": values.trace} if cell.replays(systems, values.trace) else {}
    if traced or cell.suite == "perplexity":
        if values.text not in sources:
            sources[values.text] = windows.read(values.text).fields
        traced |= sources[values.text]
    return {
        "script": "eval.bench",
        **inputs.card(cell.model).fields(),
        **cell.fields(),
        **systems[name].fields(),
        **traced,
        "placement": "resident",
        "dtype": "float32",
        "threads": threads,
        "beside": tuple(systems),
        "seed": values.seed,
        **common.impl_field(values.attention_impl),
    }


if __name__ == "__main__":
    sys.exit(common.run(main))
