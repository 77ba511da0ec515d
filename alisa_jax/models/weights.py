"""The tensors of a model folder, by name, as they are stored.

A folder holds them in one file or in shards with an index; safetensors wins over `.bin`:

    model.safetensors        or  model.safetensors.index.json and its shards
    pytorch_model.bin        or  pytorch_model.bin.index.json and its shards, by torch (`bin.py`)

A tensor is read when it is asked for. Files of torch are memory mapped where their format allows
it; safetensors files are not, because what was read of a map stays in memory beside the parameters.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import safetensors

from alisa_jax.models import bin
from alisa_jax.models.settings import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_WEIGHTS, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class WeightFile(Protocol):
    """One open file."""

    supported: tuple[str, ...]  # the stored types that `read` understands

    def keys(self) -> list[str]: ...

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and stored type of a tensor."""

    def read(self, name: str) -> np.ndarray:
        """The tensor, bit for bit; bfloat16 is that of ml_dtypes."""


_TYPES = types.MappingProxyType({"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16})
_POINTER = b"version https://git-lfs"


class Safetensors:
    """A safetensors file: length of the header, header as JSON, bytes of the tensors."""

    supported = tuple(_TYPES)

    def __init__(self, path: Path):
        with safetensors.safe_open(path, framework="numpy"):  # checks the whole header
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._tensors = json.loads(file.read(length))
        self._tensors.pop("__metadata__", None)
        self._path = path
        self._start = 8 + length

    def keys(self) -> list[str]:
        return list(self._tensors)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        held = self._tensors[name]
        return tuple(held["shape"]), held["dtype"]

    def read(self, name: str) -> np.ndarray:
        shape, kind = self.describe(name)
        first, end = self._tensors[name]["data_offsets"]
        data = np.fromfile(self._path, np.uint8, end - first, offset=self._start + first)
        return data.view(_TYPES[kind]).reshape(shape)


def open_weights(folder: Path) -> dict[str, WeightFile]:
    """Which open file holds each tensor of `folder`.

    Raises CheckpointError for a folder without weights, a missing or damaged file, an index that
    does not say what its shards hold, and a `.bin` that cannot be read.
    """
    for weights, index in ((WEIGHTS, INDEX), (BIN_WEIGHTS, BIN_INDEX)):
        if (folder / weights).exists():
            file = _open(folder / weights)
            return dict.fromkeys(file.keys(), file)
        if (folder / index).exists():
            return _open_shards(folder, index)
    raise CheckpointError(
        f"{folder} has neither {WEIGHTS} nor {INDEX}, and no {BIN_WEIGHTS} or {BIN_INDEX}; other "
        "weight formats are not read."
    )


def check_tensor(file: WeightFile, name: str, shape: tuple[int, ...], source: str | Path) -> None:
    """Raise CheckpointError where the tensor `name` has another shape or an unsupported type."""
    stored, kind = file.describe(name)
    if stored != shape:
        raise CheckpointError(
            f"{source}: tensor {name} has shape {stored}, and the configuration needs {shape}."
        )
    if kind not in file.supported:
        raise CheckpointError(
            f"{source}: tensor {name} is stored as {kind}; supported are "
            f"{', '.join(file.supported)}."
        )


def read_tensor(
    file: WeightFile, name: str, shape: tuple[int, ...], source: str | Path
) -> np.ndarray:
    """The tensor `name`. Raises CheckpointError where `check_tensor` does."""
    check_tensor(file, name, shape, source)
    return file.read(name)


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError where git-lfs left a note of a file in place of the file."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path} is a pointer of git-lfs and not the file itself; run 'git lfs pull' in "
                "its folder, or download the file."
            )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; it must hold a JSON object."
        )
    return content


def _open_shards(folder: Path, index: str) -> dict[str, WeightFile]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise CheckpointError(f"{folder / index} has no weight_map from tensor names to files.")
    files = {file: _open(folder / file) for file in sorted(set(weight_map.values()))}
    held: dict[str, str] = {}  # what shards hold counts, beyond what the index lists
    for file, opened in files.items():
        for name in opened.keys():
            if name in held:
                raise CheckpointError(f"{folder}: both {held[name]} and {file} hold {name}.")
            held[name] = file
    for name, file in weight_map.items():
        if held.get(name) != file:
            raise CheckpointError(
                f"{folder / file} has no tensor {name}, which {index} says it holds."
            )
    return {name: files[file] for name, file in held.items()}


def _open(path: Path) -> WeightFile:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    refuse_pointer(path)
    if path.suffix == ".bin":
        return bin.BinFile(path)
    try:
        return Safetensors(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}.") from error
