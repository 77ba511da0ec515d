"""Records: every number the project reports is one line of JSON, and a file of them can be resumed.

A record is a flat dict with four kinds of fields:

* the **cell**, what was computed: model, data, policy, codec, placement, protocol, context, seed,
  ...;
* the **values**, with the unit in the key: ``token_perplexity``, ``kv_bytes_per_token``,
  ``decode_s``, ``n``, ``stderr``, ... If something did not fit in memory, the value is the text
  ``"OOM"``; a cell without a record is printed as ``-``;
* the **method**: ``basis`` is ``"measured"`` or ``"modelled"``, ``wall_s`` in seconds,
  ``implementation`` (what really ran), ``warmup``, ``repeats``, ...;
* the **environment**: git commit, versions, device (see `environment`).

JSON has no infinity and no NaN: they are the texts ``"inf"``, ``"-inf"`` and ``"nan"``.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def environment() -> dict[str, Any]:
    """The environment of a number.

    Returns:
      ``git_commit`` (None outside a checkout of this project), ``git_dirty`` (a Python file differs
      from that commit; None without one), versions ``python``, ``jax``, ``jaxlib``, ``flax``, the
      default device's ``platform`` and ``device_kind``, and ``cpu_count``.
    """
    here = Path(__file__)
    ours = _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None
    commit = _git(here.parent, "rev-parse", "HEAD") if ours else None
    changed = _git(here.parent, "status", "--porcelain", "--", ":(top)*.py") if commit else None
    device = jax.devices()[0]
    return {
        "git_commit": commit,
        "git_dirty": None if changed is None else bool(changed),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "cpu_count": os.cpu_count(),
    }


def make_record(
    cell: Mapping[str, Any],
    values: Mapping[str, Any],
    measured: bool = True,
    wall_s: float | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Join a cell, its values and its method to one flat record of plain JSON types.

    Args:
      cell: the fields that identify the result; `Results.find` looks for them.
      values: the results, with units in the keys.
      measured: False for a number that a cost model gave.
      wall_s: seconds that the cell took, compilation included; None if nothing ran.
      **extra: further fields of the method, for instance ``implementation="working_set"``.

    Raises:
      ValueError: a field stands in two of the groups, or there is no value.
      TypeError: a field holds something that JSON cannot say.
    """
    if not values:
        raise ValueError("a record needs at least one value, got none")
    how = {"basis": "measured" if measured else "modelled", "wall_s": wall_s}
    record: dict[str, Any] = {}
    for group in (cell, values, extra, how, environment()):
        for key, value in group.items():
            if key in record:
                raise ValueError(
                    f"the field {key!r} stands twice in one record; rename one of the two"
                )
            record[key] = _plain(value, key)
    return record


class Results:
    """A file of records that an interrupted run can continue.

    Opening the file repairs it: a last line that an interrupted run wrote only in part is removed,
    with a warning on stderr.

    Args:
      path: the file; it and its folders are made when absent.

    Raises:
      OSError: the file cannot be written; raised here, before any work.
      ValueError: a line other than a half-written last one is no JSON object.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                file.seek(0)
                content = file.read()
                self._records, keep = _decode(content, self.path)
                if keep < len(content):
                    file.truncate(keep)
                    _warn(
                        f"{self.path}: removed a half-written last line of {len(content) - keep} "
                        "bytes"
                    )
                elif content and not content.endswith(b"\n"):
                    file.write(b"\n")
        except OSError as error:
            raise OSError(
                f"cannot write results to {self.path}: {error.strerror or error}"
            ) from error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def find(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
        """The newest record that holds every field of `cell` with an equal value, or None.

        `cell` must hold all that identifies a result: a field that it lacks may have any value.
        """
        wanted = {key: _plain(value, key) for key, value in cell.items()}
        missing = object()
        for record in reversed(self._records):
            if all(_same(record.get(key, missing), value) for key, value in wanted.items()):
                return record
        return None

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record as one line and wait until it is on the disk.

        Raises:
          OSError: the line could not be written whole; the file is then as it was before.
          TypeError: a field holds something that JSON cannot say.
        """
        plain = {key: _plain(value, key) for key, value in record.items()}
        line = json.dumps(plain, allow_nan=False).encode() + b"\n"
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                before = os.fstat(file).st_size
                written = os.write(file, line)
                if written < len(line):
                    os.ftruncate(file, before)
                    raise OSError(f"only {written} of {len(line)} bytes fitted")
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise OSError(
                f"cannot write results to {self.path}: {error.strerror or error}"
            ) from error
        self._records.append(plain)


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a file, oldest first.

    A half-written last line is left out with a warning, and not removed.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line other than a half-written last one is no JSON object.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise OSError(f"cannot read results from {path}: {error.strerror or error}") from error
    records, keep = _decode(content, path)
    if keep < len(content):
        _warn(f"{path}: left out a half-written last line of {len(content) - keep} bytes")
    return records


def _decode(content: bytes, path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
    """The records in `content` and how many of its bytes they fill."""
    records = []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # covers malformed JSON and bytes that are not UTF-8
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number == len(lines):
            return records, len(content) - len(line)
        else:
            raise ValueError(f"{path}: line {number} is not a record (one JSON object per line)")
    return records, len(content)


def _plain(value: Any, key: str) -> Any:
    """`value` as JSON returns it."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        value = np.asarray(value).tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, key) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item, key) for name, item in value.items()}
    raise TypeError(
        f"the field {key!r} of a record holds {type(value).__name__}, which JSON cannot say"
    )


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git, no repository or no commit."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)
