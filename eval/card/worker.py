"""The process that measures: it works through the parts and writes a record after each cell.

    python -m eval.card.worker JOB        JOB: a JSON object, see `Job`; started by `eval.card.watch`

It says in the file `job.now` in which part and cell it is, and until when, so that the watching process can end it. Exit
codes: 0 all parts had their turn, OVER the time was up before, FRESH the device is broken and a new process has to go on,
NO_GPU, NO_JAX.
"""

import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from eval.card import found, records
from eval.card.parts import BY_NAME, Part

FRESH, NO_GPU, NO_JAX, OVER = 75, 76, 77, 78
SETTLE_S = 2.0  # less is not worth beginning a part for
LEAST_S = 2.5  # of a part, however short the run


class Job(NamedTuple):
    """What the watching process asks for. Times are seconds since the epoch."""

    records: str
    now: str
    parts: tuple[str, ...]  # these within their shares of the time, then
    again: tuple[str, ...]  # these as long as there is time
    until: float
    seconds: float  # of the whole run
    dry: bool
    seed: int
    run: str
    first_until: float | None  # of the first of `parts`, where an earlier process of this run began it


def main(argv: list[str]) -> int:
    job = Job(**json.loads(argv[1]))
    sys.addaudithook(_offline)
    if reason := found.missing("jax"):
        say(f"jax does not import: {reason}")
        return NO_JAX
    device = found.device()
    if device["platform"] != "gpu" and not job.dry:
        card = device["driver"]
        beside = f", although nvidia-smi lists {card}: jax lacks its CUDA plugin" if card else ""
        say(f"no GPU: the device of jax is {device['device_kind']}{beside}")
        return NO_GPU
    common = _common(job, device)
    look(job, device, common)
    missed = False  # a part of the first turns, as the time was up
    through = set()  # parts that ended before their time was up: no second turn
    turns = [(BY_NAME[name], False) for name in job.parts] + [(BY_NAME[name], True) for name in job.again]
    for i, (part, again) in enumerate(turns):
        until = job.until if again else min(job.until, time.time() + max(part.share * job.seconds, LEAST_S))
        if i == 0 and job.first_until is not None:
            until = min(until, job.first_until)
        late = until - time.time() <= SETTLE_S
        missed |= late and not again and (i > 0 or job.first_until is None)
        if not late and part.name not in through:
            try:
                take(job, part, until, again, common)
                if time.time() < until:
                    through.add(part.name)
            except records.Broken as broken:
                say(f"{part.name}: the device is broken, a fresh process goes on: {broken}")
                return FRESH
    return OVER if missed else 0


def _common(job: Job, device: dict) -> dict:
    """What every record says of where and by what it was measured."""
    versions = found.packages()
    return {
        "run": job.run,
        "dry": job.dry,
        "seed": job.seed,
        "code": records.code(),
        **{key: device[key] for key in ("platform", "device_kind", "python")},
        **{name: versions[name] for name in ("jax", "jaxlib", "flax")},
    }


def look(job: Job, device: dict, common: dict) -> None:
    """Record what there is, once for each run, and say what is missing."""
    emit = records.Cells(Path(job.records), "found", common, lambda cell: None)
    if emit.done(f"run {job.run}"):
        return
    packages, modules = found.packages(), found.modules()
    absent = [name for name, version in packages.items() if version is None]
    broken = {name: why for name, why in modules.items() if why}
    emit(
        {
            "cell": f"run {job.run}",
            **{key: value for key, value in device.items() if key not in common},
            "packages": packages,
            "modules": len(modules),
            "modules_that_fail": broken,
        }
    )
    say(f"{device['device_kind']}, driver {device['driver']}")
    say("found " + ", ".join(f"{name} {version}" for name, version in packages.items() if version))
    say(f"not installed: {', '.join(absent) or 'nothing'}")
    say(f"{len(modules) - len(broken)} of {len(modules)} modules of the project import")
    for name, why in broken.items():
        say(f"  {name}: {why}")


def take(job: Job, part: Part, until: float, again: bool, common: dict) -> None:
    """Run one part until `until`; again: for the second time in this run."""

    def note(cell: str) -> None:
        whole = {"part": part.name, "cell": cell, "until": until, "grace": part.grace_s, "again": again}
        temporary = f"{job.now}.part"
        Path(temporary).write_text(json.dumps(whole))
        os.replace(temporary, job.now)

    note("part")
    emit = records.Cells(Path(job.records), part.name, common, note)
    lacking = {name: why for name in part.needs if (why := found.missing(name))}
    if lacking:
        why = "; ".join(f"{name}: {reason}" for name, reason in lacking.items())
        if not emit.done("part"):
            emit({"cell": "part", "skipped": why})
            say(f"{part.name} is switched off: {why}")
        return
    if "error" in emit.known.get("part", {}):
        return
    say(f"{part.letter} {part.name}{', again' if again else ''}: {part.what}, {until - time.time():.0f} s at most")
    try:
        module = importlib.import_module(f"eval.card.{part.name}")
        module.run(emit, lambda: until - time.time(), job.dry, job.seed)
    except Exception as wrong:  # of a part's own frame: the next part goes on
        traceback.print_exc()
        emit.failed("part", wrong)
    finally:
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
        gc.collect()


def _offline(event: str, arguments: tuple) -> None:
    """Refuse what would reach beyond this machine."""
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        raise RuntimeError(f"{event}: a run on a card downloads nothing")


def say(text: str) -> None:
    """One line for the reader."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
