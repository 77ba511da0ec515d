"""The speed of this checkout against another one of this project: decode steps, in pairs of processes.

    git worktree add ../before COMMIT
    python -m eval.checkouts --other=../before --out=checkouts.jsonl            5 minutes of processor time a pair
    python -m eval.checkouts --other=../before --out=checkouts.jsonl --pairs=2 --cells=bundled/dense,bundled/swa-int8

A cell is a model and a row of the suite decode of `eval.bench`. In each, one process measures one checkout: it fills the
states of a batch with keys and values that are drawn, compiles one decode step, reads its costs (bytes accessed and FLOPs by
`cost_analysis`, temporaries by `memory_analysis`) and times single steps, each until it is ready. The processes have the
same interpreter, environment, weights and draws; nothing that they compile is kept. A pair is one process of each checkout,
and its order turns with each pair: this other, other this, ... so that a machine that slows down harms both alike.

The table divides numbers of this checkout by those of the other. Costs are allowed to be 1 % above, the median of the
pairs' ratios of time (of the median step each) 5 %. What is over that stands in the last line; the exit code is 0 all the
same. `equal tokens` counts the sequences whose greedy tokens are the same in both, in the pair where they are fewest.

The records of a process are appended to --out when it ends, and the same command goes on where it stopped. A pair that was
interrupted between its processes is measured again: the two have to be neighbours in time. No pair begins that would take
longer than --minutes. Run on an idle machine; `load_before` records the load.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from absl import flags

from eval.card.records import code
from eval.script import common, inputs, machine
from eval.script.common import UserError
from eval.speed import cells, one_step
from eval.speed.one_step import Job

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("alisa_jax/engine/step.py", "eval/speed/ours.py", "eval/speed/cells.py")  # of a checkout
CODE = ("alisa_jax", "pallas_kernels", "eval/speed")  # what the numbers depend on
THIS, OTHER = "this", "other"
CELLS = MappingProxyType(
    {
        f"{model}/{system}": (model, system)
        for model in (cells.BUNDLED, cells.SMALL)
        for system in ("dense", "dense-int8", "swa", "swa-int8")
    }
)
COSTS = MappingProxyType({"bytes": "bytes_accessed", "FLOPs": "flops", "temporaries": "temp_bytes"})
COST_LIMIT, TIME_LIMIT = 1.01, 1.05
Pair = Mapping[tuple[str, str], dict]  # the record of each side and cell


def main(argv: Sequence[str], measure: Callable[[Path, Job], list[dict]] | None = None) -> None:
    """flags -> pairs of processes -> records -> table. measure is for tests."""
    values = config(argv)
    roots = {THIS: ROOT, OTHER: checkout(values.other)}
    results = inputs.results(values.out)
    fields = shared(values, roots)
    done = {} if values.rerun else finished(results, fields | found_by(values), values.cells, values.pairs)
    if done:
        common.say(f"{len(done)} of {values.pairs} pairs were already in {values.out}")
    run(values, roots, fields, results, done, measure or process)
    if len(done) < values.pairs:
        common.say(
            f"{len(done)} of {values.pairs} pairs are done, the next may take longer than --minutes; this goes on:"
        )
        common.say(f"python -m eval.checkouts {shlex.join(argv[1:])}")
    rows = [compared(name, [done[pair] for pair in sorted(done)]) for name in values.cells]
    common.emit(rows, report(rows, next(iter(done.values()))), values.json)


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked one by one; raises UserError."""
    values = common.shared_flags("", "", None)
    del values.model, values.text, values.compile_cache
    where, one = {"flag_values": values}, {"lower_bound": 1, "flag_values": values}
    values["json"].help = "The rows of the table on stdout, one JSON line each; all else on stderr."
    flags.DEFINE_string("other", None, "Folder of the checkout to compare with.", **where)
    flags.DEFINE_integer("pairs", 12, "Pairs of processes.", **one)
    flags.DEFINE_float("minutes", 90.0, "No pair begins that would end later.", lower_bound=0.0, **where)
    flags.DEFINE_list("cells", list(CELLS), "Comma-separated. Default: all.", **where)
    flags.DEFINE_integer("batch", 8, "Sequences.", **one)
    flags.DEFINE_integer("context", 1024, "Tokens of a sequence after the last step.", **one)
    flags.DEFINE_integer("steps", 64, "Timed steps of a process in a cell.", **one)
    common.parse(values, argv, __doc__)
    if values.other is None:
        raise UserError("--other is missing: give the folder of the checkout to compare with")
    if values.out is None:
        raise UserError("--out is missing: give the file that keeps the records of every process")
    if unknown := [name for name in values.cells if name not in CELLS]:
        raise UserError(f"--cells: unknown name {unknown[0]!r}; known: {', '.join(CELLS)}")
    if not values.cells:
        raise UserError(f"--cells names none; known: {', '.join(CELLS)}")
    values.cells = list(dict.fromkeys(values.cells))
    if values.context <= values.steps + one_step.WARMUP:
        raise UserError(
            f"--context: {values.context} tokens have no room for {values.steps} steps and {one_step.WARMUP} to warm up"
        )
    for name in values.cells:
        cells.shape(CELLS[name][0], values.context)
    return values


def checkout(name: str) -> Path:
    """The folder of another checkout of this project; raises UserError for any other folder."""
    folder = Path(name).resolve()
    if not folder.is_dir():
        raise UserError(f"--other: {name!r} is no folder")
    if missing := [file for file in NEEDED if not (folder / file).is_file()]:
        raise UserError(f"--other: {name!r} is no checkout of this project, it lacks {missing[0]}")
    if folder == ROOT:
        raise UserError(f"--other: {name!r} is this checkout; give the folder of another one")
    return folder


# Which pairs are on file, and the others.


def shared(values, roots: Mapping[str, Path]) -> dict:
    """The fields that the command gives all its records."""
    settings = {name: text for name, text in environment(ROOT).items() if name.startswith(("JAX_", "XLA_"))}
    return {
        "script": "eval.checkouts",
        "this_code": code(roots[THIS], CODE),
        "other_code": code(roots[OTHER], CODE),
        "beside": values.cells,
        "seed": values.seed,
        "processor": machine.processor(),
        "settings": dict(sorted(settings.items())),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def found_by(values) -> dict:
    """What else all records of a comparison share: sizes and versions."""
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib")}
    sizes = {"batch": values.batch, "context_tokens": values.context, "rounds": values.steps}
    return {**sizes, "python": platform.python_version(), **versions}


def finished(results: Iterable[dict], wanted: Mapping, names: Sequence[str], pairs: int) -> dict[int, Pair]:
    """The pairs below `pairs` of which one run has measured both sides in all cells, the newest of each."""
    runs = {}
    for record in results:
        if all(record.get(key) == value for key, value in wanted.items()):
            cell = record["side"], f"{record['model']}/{record['row']}"
            runs.setdefault((record["pair"], record["run"]), {})[cell] = record
    whole = {(side, name) for side in (THIS, OTHER) for name in names}
    return {pair: got for (pair, _), got in runs.items() if pair < pairs and got.keys() == whole}


def order(pair: int) -> tuple[str, str]:
    """The sides in the order in which a pair measures them: ABBA over every two pairs."""
    return (THIS, OTHER) if pair % 2 == 0 else (OTHER, THIS)


def run(values, roots: Mapping[str, Path], fields: Mapping, results, done: dict[int, Pair], measure: Callable) -> None:
    """Measure the pairs that are not `done` and add them there, until one may take longer than there is time."""
    began, now = time.monotonic(), datetime.datetime.now(datetime.UTC).isoformat()
    load = None
    for pair in range(values.pairs):
        longest_s = max(map(seconds, done.values()), default=0.0)
        if pair in done or (done and time.monotonic() - began + longest_s > 60 * values.minutes):
            continue
        load = machine.load() if load is None else load
        got = {}
        for side in order(pair):
            start = time.monotonic()
            asked = {**fields, "pair": pair, "side": side}
            which = tuple(CELLS[name] for name in values.cells)
            records = measure(roots[side], Job(which, values.batch, values.context, values.steps, values.seed, asked))
            took = time.monotonic() - start
            if code(roots[side], CODE) != fields[f"{side}_code"]:
                raise UserError(
                    f"the files of {roots[side]} changed while they were measured: this process is not kept"
                )
            for record in records:
                record |= {"run": now, "load_before": load, "process_s": took}
                got[side, f"{record['model']}/{record['row']}"] = record
            keep(results, records)
            common.say(f"pair {pair + 1} of {values.pairs}, {side} checkout: {took:.0f} s")
        done[pair] = got


def keep(results, records: Iterable[dict]) -> None:
    """Append the records of a process."""
    try:
        for record in records:
            results.add(record)
    except OSError as error:
        raise UserError(f"--out: {error}") from None


def seconds(pair: Pair) -> float:
    """What the two processes of a pair took."""
    return sum({side: record["process_s"] for (side, _), record in pair.items()}.values())


# A process.


def environment(root: Path) -> dict[str, str]:
    """Of the process that measures the checkout at `root`: its modules come from there, and no program was kept before."""
    kept = {name: text for name, text in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return kept | {"PYTHONPATH": str(root)}


def process(root: Path, job: Job) -> list[dict]:
    """The records that a process of the checkout at `root` makes; raises UserError where it ends with an error."""
    command = [sys.executable, "-P", one_step.__file__, json.dumps(job._asdict())]
    ended = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.stderr.write(ended.stderr)
        last = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(f"the process that measures {root} ended with code {ended.returncode}: {last[0]}")
    found = json.loads(ended.stdout.splitlines()[-1])
    if Path(found["folder"]) != root:
        raise UserError(f"{root} was not measured: its process imported the library from {found['folder']}")
    return found["records"]


# The table.


def ratio(new: float, old: float) -> float:
    """new / old; where there was nothing, as if there had been one, so that nothing is as much as nothing."""
    return new / old if old else 1.0 + new


def compared(name: str, pairs: Sequence[Pair]) -> dict:
    """The row of a cell. A cost is the same in every process; were it not, its largest is divided by the other's least."""
    new = [pair[THIS, name] for pair in pairs]
    old = [pair[OTHER, name] for pair in pairs]
    costs = {what: ratio(max(r[key] for r in new), min(r[key] for r in old)) for what, key in COSTS.items()}
    times = [n["seconds_per_step"] / o["seconds_per_step"] for n, o in zip(new, old, strict=True)]
    low, median, high = (float(x) for x in np.percentile(times, [25, 50, 75]))
    over = [f"{what} {x:.4f} ({COST_LIMIT} allowed)" for what, x in costs.items() if x > COST_LIMIT]
    over += [f"time {median:.4f} ({TIME_LIMIT} allowed)"] if median > TIME_LIMIT else []
    same = [sum(map(str.__eq__, n["tokens_sha256"], o["tokens_sha256"])) for n, o in zip(new, old, strict=True)]
    return {
        "cell": name,
        "pairs": len(pairs),
        **{f"{key}_ratio": costs[what] for what, key in COSTS.items()},
        "time_ratio": median,
        "time_ratio_quartiles": [low, high],
        "this_seconds_per_step": float(np.median([r["seconds_per_step"] for r in new])),
        "other_seconds_per_step": float(np.median([r["seconds_per_step"] for r in old])),
        "batch": new[0]["batch"],
        "equal_sequences": min(same),
        "over": over,
    }


def report(rows: Sequence[dict], pair: Pair) -> str:
    """The table for people; `pair` says which checkouts were measured."""
    head = ("decode step", "pairs", *COSTS, "time", "quartiles", "this ms", "other ms", "equal tokens", "within")
    lines = [
        (
            row["cell"],
            str(row["pairs"]),
            *(f"{row[f'{key}_ratio']:.4f}" for key in COSTS.values()),
            f"{row['time_ratio']:.3f}",
            "{:.3f} - {:.3f}".format(*row["time_ratio_quartiles"]),
            f"{1e3 * row['this_seconds_per_step']:.2f}",
            f"{1e3 * row['other_seconds_per_step']:.2f}",
            f"{row['equal_sequences']}/{row['batch']}",
            "no" if row["over"] else "yes",
        )
        for row in rows
    ]
    over = [f"{row['cell']} {what}" for row in rows for what in row["over"]]
    last = f"over what is allowed: {'; '.join(over)}" if over else f"all {len(rows)} cells are within what is allowed"
    sides = {side: record for (side, _), record in pair.items()}
    where = "; ".join(f"{side}: {commit(sides[side])}" for side in (THIS, OTHER))
    return f"{where}\n{common.table(head, lines)}\n{last}"


def commit(record: Mapping) -> str:
    """The commit of a checkout, and whether files differ from it."""
    if record["git_commit"] is None:
        return "no commit"
    return record["git_commit"][:7] + (" with changes" if record["git_dirty"] else "")


if __name__ == "__main__":
    sys.exit(common.run(main))
