"""The parameters of a decoder, read from the tensors of a folder.

Tensors pass through host memory one at a time; q, k and v of one tensor become three. On a CPU each
goes straight to its place on large pages, so that there is no second copy of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tqdm

from alisa_jax.models import names
from alisa_jax.models.agree import agree
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder, Params
from alisa_jax.models.pages import room
from alisa_jax.models.settings import CheckpointError
from alisa_jax.models.weights import WeightFile, read_tensor

_DTYPES = ("float32", "float16", "bfloat16")


def read_params(
    where: Mapping[str, WeightFile],
    config: ModelConfig,
    dtype: np.dtype | None,
    source: str | Path,
) -> tuple[Decoder, Params]:
    """The decoder that `config` and the tensors of `where` describe, and its parameters.

    where: which open file holds each tensor. dtype None: the first tensor's. source: the folder or
    file, for messages. Raises CheckpointError, and warns, where `agree` does.
    """
    config, tensors = agree(config, where, source)
    params: Params = {"embed": {}, "blocks": [{} for _ in range(config.n_layers)], "unembed": {}}
    places: list[np.ndarray] | None = None
    for stored, slots in tqdm.tqdm(tensors, "weights", unit=" tensors", disable=None, leave=False):
        shape = slots[0].value.shape
        array = read_tensor(where[stored], stored, (len(slots) * shape[0], *shape[1:]), source)
        if places is None:
            dtype = array.dtype if dtype is None else dtype
            places = room([slot.value.shape for _, held in tensors for slot in held], dtype)
        for slot, piece in zip(slots, names.split(array, len(slots), config.head_dim), strict=True):
            part, *inner, module = slot.path
            holder = params[part][inner[0]] if inner else params[part]
            piece = cast(piece, dtype, f"{source}: {stored}")
            if places:
                place = places.pop(0)
                place[...] = piece
                held = jax.device_put(place)
            else:
                held = jnp.array(piece)
            holder.setdefault(module, {})[slot.leaf] = held
    return Decoder(config), params


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
        with contextlib.suppress(TypeError, ValueError):
            name = np.dtype(dtype).name
    if name not in _DTYPES:
        prefix = f"{where}: " if where else ""
        raise CheckpointError(
            f"{prefix}dtype {dtype!r} is not supported; supported are {', '.join(_DTYPES)}."
        )
    return np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" else np.dtype(name)
