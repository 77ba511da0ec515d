"""The process that watches: it starts the one that measures, ends it when the time is up, and starts a fresh one.

It imports nothing beyond the standard library, so nothing that breaks a device breaks it.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from eval.card import records, worker
from eval.card.parts import PARTS

TAIL = 400  # characters of what a process that died said last
MOST_DEATHS = 12  # of processes in one run


class Refused(Exception):
    """There is nothing to run on; the text is one sentence."""


WORKER = (sys.executable, "-m", "eval.card.worker")


def run(folder: Path, minutes: float, dry: bool, seed: int, only: tuple[str, ...] = (), command=WORKER) -> bool:
    """All parts, or those named in `only`, within `minutes`; whether each had its turn. Raises Refused.

    Records are appended to records.jsonl in `folder`, and what the processes say to log.txt. command: of the process that
    measures, for tests.
    """
    end = time.time() + 60 * minutes
    names = tuple(part.name for part in PARTS if not only or part.name in only)
    with tempfile.TemporaryDirectory(prefix="eval-gpu-") as scratch:
        return _Run(command, folder, Path(scratch), end, 60 * minutes, dry, seed).all(names)


class _Run:
    def __init__(self, command, folder: Path, scratch: Path, end: float, seconds: float, dry: bool, seed: int):
        self.command = command
        self.end, self.seconds, self.dry, self.seed = end, seconds, dry, seed
        folder = folder.resolve()  # the process works elsewhere
        self.records, self.log, self.now = folder / records.RECORDS, folder / records.LOG, scratch / "now.json"
        self.id = datetime.datetime.now(datetime.UTC).isoformat()
        self.deaths = 0
        kept = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(scratch / "programs"))
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": kept,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(records.ROOT), os.environ.get("PYTHONPATH")))),
            **({"JAX_PLATFORMS": "cpu"} if dry else {}),
        }

    def all(self, names: tuple[str, ...]) -> bool:
        """Processes until every part had its turn; False where the time was up before, or too many died."""
        parts, again, first_until = names, () if self.dry else names, None
        while parts or again:
            if self.end - time.time() < worker.SETTLE_S:
                return not parts
            code, tail = self._process(parts, again, first_until)
            at = self._where()
            if code in (0, worker.OVER):
                return code == 0
            if code in (worker.NO_GPU, worker.NO_JAX):
                raise Refused(tail.splitlines()[-1] if tail else "jax does not start")
            if at is None:
                raise Refused(f"the measuring process ended with code {code} before its first part: {tail[-TAIL:]}")
            if code != worker.FRESH:
                self._ended(at, code, tail)
            self.deaths += 1
            if self.deaths > MOST_DEATHS:
                return False
            over = at["cell"] == "part" or (code is None and time.time() > at["until"])
            if at["again"]:
                parts, again = (), again[again.index(at["part"]) + over :]
            else:
                parts = parts[parts.index(at["part"]) + over :]
            first_until = None if over else at["until"]
        return True

    def _process(self, parts: tuple[str, ...], again: tuple[str, ...], first_until) -> tuple[int | None, str]:
        """Start one process and wait for it: its exit code, None where it was ended here, and what it said."""
        how = (self.end, self.seconds, self.dry, self.seed, self.id, first_until)
        job = worker.Job(str(self.records), str(self.now), parts, again, *how)
        self.now.unlink(missing_ok=True)
        command = [*self.command, json.dumps(job._asdict())]
        with open(self.log, "ab") as log, open(self.log, "rb") as said:
            began = said.seek(0, os.SEEK_END)
            child = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True, cwd=records.ROOT
            )
            code = None
            try:
                while (code := child.poll()) is None and not self._late():
                    time.sleep(0.05)
                    _show(said)
            finally:
                if code is None:
                    _kill(child)
                _show(said)
            said.seek(began)
            return code, said.read().decode(errors="replace").strip()

    def _late(self) -> bool:
        """Whether all time is up, or that of the part and the grace of its cell."""
        at = self._where()
        return time.time() > self.end or (at is not None and time.time() > at["until"] + at["grace"])

    def _where(self) -> dict | None:
        """In which part and cell the process is, or was."""
        try:
            return json.loads(self.now.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _ended(self, at: dict, code: int | None, tail: str) -> None:
        """Record that a process ended in a cell: it was late, or it crashed."""
        if any(
            r.get("run") == self.id and r.get("cell") == at["cell"] and r["part"] == at["part"] for r in self._read()
        ):
            return
        like = next((r for r in reversed(self._read()) if r.get("run") == self.id), {})
        how = {"stopped": "the time was up"} if code is None else {"error": f"{_died(code)}: {tail[-TAIL:]}"}
        where = {key: like.get(key) for key in (*records.SAME, "run", "python", "flax")}
        basis = "dry" if self.dry else "measured"
        records.append(self.records, {"part": at["part"], "cell": at["cell"], **how, "basis": basis, **where})

    def _read(self) -> list[dict]:
        return records.read(self.records)


def _show(said) -> None:
    """Pass on to the reader what the process has said since."""
    sys.stderr.write(said.read().decode(errors="replace"))
    sys.stderr.flush()


def _died(code: int) -> str:
    if code >= 0:
        return f"the process ended with code {code}"
    try:
        return f"the process died of {signal.Signals(-code).name}"
    except ValueError:
        return f"the process died of signal {-code}"


def _kill(child: subprocess.Popen) -> None:
    """End a process and all that it started."""
    for kind, wait_s in ((signal.SIGTERM, 2), (signal.SIGKILL, 10)):
        try:
            os.killpg(child.pid, kind)
            child.wait(wait_s)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
