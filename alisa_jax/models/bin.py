"""PyTorch checkpoints (`pytorch_model.bin`): a pickled dictionary of tensors, read through torch.

A pickle can run code when it is loaded, so torch is told to build tensors and plain containers and
nothing else (`weights_only`); a file that needs more is refused. torch is an extra of this package,
imported here alone and when a file is opened. Files in torch's zip format, its default since 1.6,
are memory mapped; older ones are read whole.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import ml_dtypes
import numpy as np

from alisa_jax.models.hf import CheckpointError

_ZIP = b"PK\x03\x04"


def import_torch(where: str):
    """The torch module, for the weights of `where`. Raises CheckpointError if not installed."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{where} has its weights as pytorch_model.bin alone, which is read through torch; "
            "install 'alisa-jax[torch]', or use a model with safetensors weights."
        ) from error
    return torch


class BinFile:
    """One file: its tensors by name. Entries that are no tensors are left out."""

    supported = ("float32", "float16", "bfloat16")

    def __init__(self, path: Path):
        torch = import_torch(str(path.parent))
        try:
            with path.open("rb") as file:
                mapped = file.read(len(_ZIP)) == _ZIP
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} is damaged or needs more than weights to be read, which is refused "
                "because it could run code; use a model with safetensors weights."
            ) from error
        except Exception as error:  # a damaged pickle fails in any way
            raise CheckpointError(
                f"{path} is truncated or damaged: {_first_line(error)}."
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path} holds a {type(content).__name__}; it must hold a dictionary of tensors."
            )
        self._torch = torch
        self._tensors = {
            str(name): x.detach() for name, x in content.items() if isinstance(x, torch.Tensor)
        }

    def keys(self) -> list[str]:
        return list(self._tensors)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        x = self._tensors[name]
        kind = x.dtype if x.layout == self._torch.strided else x.layout
        return tuple(x.shape), str(kind).removeprefix("torch.")

    def read(self, name: str) -> np.ndarray:
        x = self._tensors[name]
        if x.dtype == self._torch.bfloat16:  # NumPy has none, so the bits pass as integers
            return x.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
