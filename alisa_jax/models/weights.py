"""The tensors of a model folder, by name, as they are stored.

A folder holds them in one file or in shards with an index; safetensors wins over `.bin`:

    model.safetensors        or  model.safetensors.index.json and its shards
    pytorch_model.bin        or  pytorch_model.bin.index.json and its shards, by torch (`bin.py`)

Files are memory mapped where their format allows it, and a tensor is read when it is asked for.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors

from alisa_jax.models import bin
from alisa_jax.models.hf import CheckpointError

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


class Safetensors:
    """A safetensors file."""

    supported = ("F32", "F16", "BF16")

    def __init__(self, handle: Any):
        self._handle = handle

    def keys(self) -> list[str]:
        return list(self._handle.keys())

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        view = self._handle.get_slice(name)
        return tuple(view.get_shape()), view.get_dtype()

    def read(self, name: str) -> np.ndarray:
        return self._handle.get_tensor(name)


def open_weights(folder: Path, stack: contextlib.ExitStack) -> dict[str, WeightFile]:
    """Which open file holds each tensor of `folder`; `stack` closes them.

    Raises CheckpointError for a folder without weights, a missing or damaged file, an index that
    does not say what its shards hold, and a `.bin` that cannot be read.
    """
    for weights, index in ((WEIGHTS, INDEX), (BIN_WEIGHTS, BIN_INDEX)):
        if (folder / weights).exists():
            file = _open(folder / weights, stack)
            return dict.fromkeys(file.keys(), file)
        if (folder / index).exists():
            return _open_shards(folder, index, stack)
    raise CheckpointError(
        f"{folder} has neither {WEIGHTS} nor {INDEX}, and no {BIN_WEIGHTS} or {BIN_INDEX}; other "
        "weight formats are not read."
    )


def read_tensor(file: WeightFile, name: str, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    """The tensor `name`. Raises CheckpointError for another shape or an unsupported type."""
    stored, kind = file.describe(name)
    if stored != shape:
        raise CheckpointError(
            f"{folder}: tensor {name} has shape {stored}, and the configuration needs {shape}."
        )
    if kind not in file.supported:
        raise CheckpointError(
            f"{folder}: tensor {name} is stored as {kind}; supported are "
            f"{', '.join(file.supported)}."
        )
    return file.read(name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; it must hold a JSON object."
        )
    return content


def _open_shards(folder: Path, index: str, stack: contextlib.ExitStack) -> dict[str, WeightFile]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise CheckpointError(f"{folder / index} has no weight_map from tensor names to files.")
    files = {file: _open(folder / file, stack) for file in sorted(set(weight_map.values()))}
    held = {name: set(file.keys()) for name, file in files.items()}
    for name, file in weight_map.items():
        if name not in held[file]:
            raise CheckpointError(
                f"{folder / file} has no tensor {name}, which {index} says it holds."
            )
    return {name: files[file] for name, file in weight_map.items()}


def _open(path: Path, stack: contextlib.ExitStack) -> WeightFile:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    if path.suffix == ".bin":
        return bin.BinFile(path)
    try:
        return Safetensors(stack.enter_context(safetensors.safe_open(path, framework="numpy")))
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}.") from error
