"""The records of a run on a card: whole lines of JSON, which a later run goes on from. Standard library alone.

A cell is one measurement of a part. Its record holds numbers, or `error` (it failed, and says how), or `stopped` (the time
was up, or the process ended in it), or `skipped` (what it needs is missing). A later run takes finished and failed cells as
done where the code, the device, the versions and the seed are the same; it tries stopped and skipped ones again.
"""

import datetime
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDS, LOG, PAGE = "records.jsonl", "log.txt", "page.md"
SAME = ("code", "dry", "seed", "platform", "device_kind", "jax", "jaxlib")
UNFINISHED = ("stopped", "skipped")
CODE = ("alisa_jax", "pallas_kernels", "eval/card", "eval/speed")


def code(root: Path = ROOT, folders: Sequence[str] = CODE) -> str:
    """A hash of all Python files that the numbers depend on: a checkout without git tells versions apart by it."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def read(path: Path) -> list[dict]:
    """All whole records of a file, oldest first; none where there is no file. A half-written last line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found += [record] if isinstance(record, dict) else []
    return found


def append(path: Path, record: Mapping) -> None:
    """One record as one line, on disk when this returns, or nothing."""
    line = json.dumps(plain(record), allow_nan=False).encode() + b"\n"
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(file).st_size
        if before and os.pread(file, 1, before - 1) != b"\n":  # a process was killed in the middle of a line
            line = b"\n" + line
        if os.write(file, line) < len(line):
            os.ftruncate(file, before)
            raise OSError(f"cannot write a record of {len(line)} bytes to {path}")
        os.fsync(file)
    finally:
        os.close(file)


def plain(value):
    """`value` as JSON returns it; what JSON has no number for is a text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "item"):  # of NumPy
        return plain(value.item())
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


class Broken(BaseException):
    """The device does not answer any more: a fresh process has to go on. No part may catch this as an error of its own."""


class Cells:
    """Where a part puts its records: `emit(record)`, after `emit.done(cell)` has said that the cell is still to do.

    note: called with the cell that begins, so that the watching process can tell in which one a process ended.
    """

    def __init__(self, path: Path, part: str, common: Mapping, note: Callable[[str], None]):
        self.path, self.part, self.common, self.note = path, part, dict(common), note
        self.began = time.time()
        self.known = {r["cell"]: r for r in read(path) if r.get("part") == part and "cell" in r and self._is_same(r)}

    def _is_same(self, record: Mapping) -> bool:
        if record.get("run") != self.common["run"] and any(key in record for key in UNFINISHED):
            return False
        return all(record.get(key) == self.common[key] for key in SAME)

    def done(self, cell: str) -> bool:
        """Whether the cell is on file; where it is not, it begins now."""
        if cell in self.known:
            return True
        self.began = time.time()
        self.note(cell)
        return False

    def found(self, cell: str) -> dict | None:
        """The record of a cell, or None."""
        return self.known.get(cell)

    def __call__(self, record: Mapping) -> None:
        """Write one record of the cell `record["cell"]`."""
        now = time.time()
        at = datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat(timespec="seconds")
        how = {"basis": "dry" if self.common["dry"] else "measured", "wall_s": round(now - self.began, 3), "at": at}
        whole = {"part": self.part, **plain(record), **how, **self.common}
        append(self.path, whole)
        self.known[whole["cell"]] = whole

    def attempt(self, cell: str, measure: Callable[[], Mapping]) -> dict | None:
        """The record of `measure()`, now or before. A failure is recorded, and the next cell goes on.

        Returns None where it failed. Raises Broken where the device will answer no further call.
        """
        if not self.done(cell):
            try:
                self({"cell": cell, **measure()})
            except Exception as wrong:  # of a compiler, a device or a library: the record says it
                self.failed(cell, wrong)
        found = self.known[cell]
        return None if "error" in found else found

    def failed(self, cell: str, wrong: Exception) -> None:
        """Record a failure. Raises Broken where the device will answer no further call."""
        text = f"{type(wrong).__name__}: {' '.join(str(wrong).split())[:400]}"
        self({"cell": cell, "error": text})
        if any(sign in text for sign in BROKEN):
            raise Broken(text)


# after these a CUDA context gives the same error for every call
BROKEN = ("ILLEGAL_ADDRESS", "ILLEGAL_INSTRUCTION", "MISALIGNED_ADDRESS", "LAUNCH_FAILED", "LAUNCH_TIMEOUT", "ASSERT")
BROKEN += ("illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert")
