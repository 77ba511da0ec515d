"""The type that weights are held in: one rule for `load`, the commands and their records."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from alisa_jax.models.params import dtype_named

AUTO = "auto"


def is_auto(dtype: Any) -> bool:
    """Whether `dtype` leaves the choice to `resolve`; None does as well."""
    return dtype is None or (isinstance(dtype, str) and dtype == AUTO)


def resolve(
    dtype: Any, stated: Any, where: str = "", platform: str | None = None
) -> np.dtype | None:
    """The type that `dtype` means; "auto": float32 on a CPU, elsewhere the type of the file.

    stated: what `config.json` says, `where` it lies; None there gives None, which stands for the
    type of the first tensor. A CPU computes in float32 what it holds in 16 bits, and converts at
    every use. platform: None is that of the default device. Raises CheckpointError for a type that
    is not supported.
    """
    if not is_auto(dtype):
        return dtype_named(dtype)
    held = None if stated is None else dtype_named(stated, where)
    return np.dtype("float32") if (platform or jax.default_backend()) == "cpu" else held
