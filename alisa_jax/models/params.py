"""The parameters of a decoder and the tensors of a folder: which lies where, and how it is read.

Tensors pass through host memory one at a time; q, k and v of one tensor become three.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tqdm

from alisa_jax.models import names
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder, Params
from alisa_jax.models.hf import CheckpointError
from alisa_jax.models.weights import open_weights, read_tensor

_DTYPES = ("float32", "float16", "bfloat16")


class Slot(NamedTuple):
    """One parameter of a tensor."""

    path: tuple  # (part, [layer,] module)
    leaf: str
    value: Any  # array or shape, as held here


def read_params(folder: Path, decoder: Decoder, dtype: np.dtype | None) -> Params:
    """The parameters of `decoder` from the weights of `folder`; dtype None: the first tensor's.

    Raises CheckpointError for a tensor that is missing, or of a wrong shape or type.
    """
    params: Params = {
        "embed": {},
        "blocks": [{} for _ in range(decoder.config.n_layers)],
        "unembed": {},
    }
    expected, head_dim = expected_tensors(decoder), decoder.config.head_dim
    with contextlib.ExitStack() as stack:
        where = open_weights(folder, stack)
        for name, slots in tqdm.tqdm(
            expected.items(), "weights", unit=" tensors", disable=None, leave=False
        ):
            stored = next(
                (spelling for spelling in names.spellings(name) if spelling in where), None
            )
            if stored is None:
                raise CheckpointError(
                    f"{folder} has no tensor {name}, which its configuration needs."
                )
            _, leaf, spec = slots[0]
            array = read_tensor(
                where[stored], stored, (len(slots) * spec.shape[0], *spec.shape[1:]), folder
            )
            dtype = array.dtype if dtype is None else dtype
            for slot, piece in zip(slots, names.split(array, len(slots), head_dim), strict=True):
                part, *inner, module = slot.path
                holder = params[part][inner[0]] if inner else params[part]
                holder.setdefault(module, {})[leaf] = jnp.array(
                    cast(piece, dtype, f"{folder}: {name}")
                )
    return params


def expected_tensors(decoder: Decoder) -> dict[str, list[Slot]]:
    """Every tensor of a folder and the shapes of its parameters."""
    return slots_of(decoder.config, jax.eval_shape(decoder.init, jax.random.key(0)))


def slots_of(config: ModelConfig, params: Params) -> dict[str, list[Slot]]:
    """Name of a tensor -> its parameters, in the order in which they lie in it."""
    slots: dict[str, list[Slot]] = {}

    def add(part: str, layer: int | None, held: dict) -> None:
        for module in (module for module in names.modules(config.arch, part) if module in held):
            path = (part, module) if layer is None else (part, layer, module)
            for leaf, value in held[module].items():
                name = names.tensor_name(config.arch, part, module, leaf, layer)
                slots.setdefault(name, []).append(Slot(path, leaf, value))

    add("embed", None, params["embed"])
    for layer, held in enumerate(params["blocks"]):
        add("blocks", layer, held)
    add("unembed", None, params["unembed"])
    return slots


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` in `dtype`. Raises CheckpointError for values beyond float16; name: of the tensor."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(cast).all():
        raise CheckpointError(
            f"{name} has values beyond the range of float16; use bfloat16 or float32."
        )
    return cast


def dtype_named(dtype: Any, where: str = "") -> np.dtype:
    """One of float32, float16 and bfloat16, given by name or type. Raises CheckpointError."""
    name = dtype if isinstance(dtype, str) else None
    if name is None:
        with contextlib.suppress(TypeError):
            name = np.dtype(dtype).name
    if name not in _DTYPES:
        prefix = f"{where}: " if where else ""
        raise CheckpointError(
            f"{prefix}dtype {dtype!r} is not supported; supported are {', '.join(_DTYPES)}."
        )
    return np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" else np.dtype(name)
