"""What `plan` is given, checked.

Every function returns the value in one form, and raises ValueError with one sentence that begins
with the name of the argument.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Sequence

from alisa_jax import codecs, placement, spec
from alisa_jax.models import checkpoint
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.shapes import SHAPES
from alisa_jax.placement.modelled import devices
from alisa_jax.placement.modelled.cost import Hardware


def whole(name: str, value) -> int:
    """A whole number of at least 1."""
    try:
        found = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = 0
    if found < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    return found


def number(name: str, value, least: float, most: float = math.inf) -> float:
    """A finite number from `least` to `most`."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not least <= value <= most:
        allowed = f"of at least {least:g}" + ("" if most == math.inf else f" and at most {most:g}")
        raise ValueError(f"{name} must be a number {allowed}; got {value!r}")
    return float(value)


def one_of(name: str, value, allowed: Sequence[str]) -> str:
    """One of some texts."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def model(value) -> tuple[str, ModelConfig]:
    """What to call a model, and its configuration."""
    if isinstance(value, checkpoint.Model):
        return value.name, value.decoder.config
    if isinstance(value, ModelConfig):
        known = next((name for name, config in SHAPES.items() if config == value), None)
        return known or f"{value.arch}, {value.n_layers} layers of {value.d_model}", value
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(
            f"model must be a name, a folder, a Model or a ModelConfig; got {value!r:.60}"
        )
    try:
        return os.fspath(value), checkpoint.config_of(value)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def hardware(value) -> Hardware:
    """A device or a machine."""
    if isinstance(value, Hardware):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(
            f"hardware must be a Hardware, a name or the file of a profile; got {value!r:.60}"
        )
    try:
        return devices.hardware(value)
    except ValueError as error:
        raise ValueError(f"hardware: {error}") from error


def codec(value, dtype: str) -> tuple[str, codecs.Codec]:
    """The canonical text of a codec, and the codec of a model that computes in `dtype`."""
    try:
        asked = codecs.parse(value) if isinstance(value, str) else value
        return spec.to_text(asked, codecs.CODECS), asked.resolve(dtype)
    except ValueError as error:
        raise ValueError(f"codec: {error}") from error


def controllers(value) -> dict[str, placement.Controller]:
    """Controllers by the texts that name them, of one or of several."""
    found = {}
    for one in (value,) if isinstance(value, (str, placement.Controller)) else value:
        try:
            if isinstance(one, str):
                found[one] = placement.parse(one)
            else:
                found[spec.to_text(one, placement.CONTROLLERS)] = one
        except ValueError as error:
            raise ValueError(f"placement: {error}") from error
    return found
