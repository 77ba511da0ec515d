"""The speed of this checkout against another one: the decode steps of both in one process, in turn.

    git worktree add ../before COMMIT
    python -m eval.in_turn --other=../before --out=in_turn.jsonl

`eval.checkouts` compares pairs of processes, whose times differ by what else the machine does and where their arrays lie.
Here each checkout compiles its step and writes it down with its weights and states; one process reads both back and runs
them in turn, a third time the step of this checkout on arrays of its own: what that differs by from the first (`self`) is
the precision of the comparison. In every round all three have new arrays; a round is `--steps` steps in each, in an order
that turns, behind some that are not timed. A ratio is that of the median steps of a round.

The same cells, draws and sizes as in `eval.checkouts`. `equal tokens` counts the sequences whose last token is the same.
"""

import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import serialize_executable
from tqdm import tqdm

from eval import checkouts
from eval.card.records import code
from eval.checkouts import CELLS, OTHER, ROOT, THIS
from eval.script import common, inputs, machine
from eval.script.common import UserError
from eval.speed import cells, one_step
from eval.speed.one_step import WARMUP, Job

AGAIN = "again"  # the step of this checkout, on arrays of its own


class Kept:
    """A step that a checkout wrote down: its program, its weights, and states to begin with."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            program, params, self.states, self.token = pickle.load(file)
        self.program = serialize_executable.deserialize_and_load(*program, execution_devices=jax.devices()[:1])
        self.params = [jnp.array(x) for x in params]

    def begin(self) -> "Steps":
        return Steps(self, [jnp.array(x) for x in self.states])


class Steps:
    """The steps of a round on arrays of their own; `seconds` of each."""

    def __init__(self, kept: Kept, states: list):
        self.kept = kept
        self.states = states
        self.token = kept.token
        self.seconds: list[float] = []

    def step(self) -> None:
        began = time.perf_counter()
        logits, self.states = jax.block_until_ready(self.kept.program(self.kept.params, self.states, self.token))
        self.seconds.append(time.perf_counter() - began)
        self.token = np.argmax(logits, axis=-1).astype(np.int32)


def main(argv: Sequence[str], write: Callable | None = None) -> None:
    """flags -> programs of both checkouts -> rounds -> records -> table. write is for tests."""
    values = config(argv)
    roots = {THIS: ROOT, OTHER: checkouts.checkout(values.other)}
    results = inputs.results(values.out)
    found = []
    for name in tqdm(values.cells, desc="cells", disable=None, leave=False):
        cell = fields(values, roots, name)
        record = None if results is None or values.rerun else results.find(cell | inputs.here())
        if record is None:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                kept = {side: (write or written)(roots[side], Path(folder) / side, values, name) for side in roots}
                got = measured({side: Kept(path) for side, path in kept.items()}, values.rounds, values.steps)
            record = inputs.record(results, cell, got, time.perf_counter() - began, {"warmup": WARMUP})
        found.append(record)
    common.emit(found, report(found), values.json)


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked one by one; raises UserError."""
    values = common.shared_flags("", "", None)
    del values.model, values.text, values.compile_cache
    one = {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_string("other", None, "Folder of the checkout to compare with.", flag_values=values)
    flags.DEFINE_list("cells", list(CELLS), "Comma-separated. Default: all.", flag_values=values)
    flags.DEFINE_integer("rounds", 6, "Rounds, each on new arrays.", **one)
    flags.DEFINE_integer("steps", 48, "Timed steps of a round.", **one)
    flags.DEFINE_integer("batch", 8, "Sequences.", **one)
    flags.DEFINE_integer("context", 1024, "Tokens of a sequence after the last step.", **one)
    common.parse(values, argv, __doc__)
    if values.other is None:
        raise UserError("--other is missing: give the folder of the checkout to compare with")
    if unknown := [name for name in values.cells if name not in CELLS]:
        raise UserError(f"--cells: unknown name {unknown[0]!r}; known: {', '.join(CELLS)}")
    if values.context <= values.steps + WARMUP:
        raise UserError(
            f"--context: {values.context} tokens have no room for {values.steps} steps and {WARMUP} to warm up"
        )
    for name in values.cells:
        cells.shape(CELLS[name][0], values.context)
    return values


def fields(values, roots: Mapping[str, Path], name: str) -> dict:
    """What identifies the record of a cell."""
    model, row = CELLS[name]
    return {
        "script": "eval.in_turn",
        "this_code": code(roots[THIS], checkouts.CODE),
        "other_code": code(roots[OTHER], checkouts.CODE),
        "model": model,
        "row": row,
        "batch": values.batch,
        "context_tokens": values.context,
        "rounds": values.rounds,
        "steps": values.steps,
        "seed": values.seed,
        "processor": machine.processor(),
    }


def written(root: Path, folder: Path, values, name: str) -> Path:
    """The file in `folder` to which a process of the checkout at `root` writes the step of a cell; raises UserError."""
    folder.mkdir()
    job = Job((CELLS[name],), values.batch, values.context, values.steps, values.seed, {}, str(folder))
    command = [sys.executable, "-P", one_step.__file__, json.dumps(job._asdict())]
    ended = subprocess.run(
        command, cwd=root, env=checkouts.environment(root), capture_output=True, text=True, check=False
    )
    if ended.returncode:
        sys.stderr.write(ended.stderr)
        raise UserError(f"the process of {root} ended with code {ended.returncode}")
    return one_step.kept_file(str(folder), *CELLS[name])


def measured(kept: Mapping[str, Kept], rounds: int, steps: int) -> dict:
    """Values of a cell: the ratios of every round, and their medians."""
    medians = {side: [] for side in (THIS, OTHER, AGAIN)}
    equal = 0
    for number in range(rounds):
        runs = {THIS: kept[THIS].begin(), OTHER: kept[OTHER].begin(), AGAIN: kept[THIS].begin()}
        for i in range(WARMUP + steps):
            for side in list(runs) if (i + number) % 2 == 0 else reversed(runs):
                runs[side].step()
        for side, run in runs.items():
            medians[side].append(float(np.median(run.seconds[WARMUP:])))
        equal = int(np.sum(runs[THIS].token == runs[OTHER].token))
    this, other, again = (np.array(medians[side]) for side in (THIS, OTHER, AGAIN))
    ratios, own = (this + again) / 2 / other, again / this
    return {
        "time_ratio": float(np.median(ratios)),
        "time_ratios": ratios.tolist(),
        "self_ratio": float(np.median(own)),
        "self_ratios": own.tolist(),
        "this_seconds_per_step": float(np.median(this)),
        "other_seconds_per_step": float(np.median(other)),
        "equal_sequences": equal,
    }


def report(found: Sequence[dict]) -> str:
    """The table for people."""
    span = lambda values: f"{min(values):.3f} - {max(values):.3f}"
    rows = [
        (
            f"{r['model']}/{r['row']}",
            f"{r['time_ratio']:.3f}",
            span(r["time_ratios"]),
            f"{r['self_ratio']:.3f}",
            span(r["self_ratios"]),
            f"{1e3 * r['this_seconds_per_step']:.2f}",
            f"{1e3 * r['other_seconds_per_step']:.2f}",
            f"{r['equal_sequences']}/{r['batch']}",
        )
        for r in found
    ]
    head = ("decode step", "time", "rounds", "self", "rounds", "this ms", "other ms", "equal tokens")
    return f"this checkout over the other, in turn in one process\n{common.table(head, rows)}"


if __name__ == "__main__":
    sys.exit(common.run(main))
