"""One setting of a parsed `config.json`, checked; null is as good as absent.

Every function raises CheckpointError for a value of another kind or out of its range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_NEEDED = object()
_MOST = 2**31 - 1  # sizes and indices of arrays are int32


class CheckpointError(ValueError):
    """A model folder or name that cannot be used; the message says why in one sentence."""


class CheckpointWarning(UserWarning):
    """What is assumed about a model folder, or read from it against its configuration."""


def value(raw: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value of `key`, or `default`."""
    found = raw.get(key)
    return default if found is None else found


def size(raw: Mapping[str, Any], key: str, default: Any = _NEEDED, least: int = 1) -> int:
    """A whole number of at least `least`."""
    found = _found(raw, key, default)
    if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= _MOST:
        raise CheckpointError(
            f"{key} is {shown(found)}; it must be a whole number of at least {least}, below 2**31."
        )
    return found


def number(raw: Mapping[str, Any], key: str, default: Any = _NEEDED) -> float:
    """A finite number above 0."""
    found = _found(raw, key, default)
    if (
        not isinstance(found, int | float)
        or isinstance(found, bool)
        or not 0 < found <= 1e30
        or not math.isfinite(found)
    ):
        raise CheckpointError(f"{key} is {shown(found)}; it must be a finite number above 0.")
    return float(found)


def flag(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    """true or false."""
    found = _found(raw, key, default)
    if not isinstance(found, bool):
        raise CheckpointError(f"{key} is {shown(found)}; it must be true or false.")
    return found


def choice(raw: Mapping[str, Any], key: str, allowed: Mapping[str, Any], default: str) -> Any:
    """What `allowed` has for the word at `key`."""
    found = _found(raw, key, default)
    if not isinstance(found, str) or found not in allowed:
        raise CheckpointError(
            f"{key} {shown(found)} is not supported; supported are {', '.join(allowed)}."
        )
    return allowed[found]


def section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object at `key`, or an empty one; it holds no further objects."""
    found = value(raw, key, {})
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{key} is {shown(found)}; it must be an object or null.")
    for inner, held in found.items():
        if isinstance(held, Mapping):
            raise CheckpointError(
                f"{key} has an object at {inner}; settings by layer are not supported."
            )
    return found


def _found(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    found = value(raw, key, default)
    if found is _NEEDED:
        raise CheckpointError(f"the configuration has no {key}.")
    return found


def shown(found: Any) -> str:
    """A value for a sentence, cut where it is long."""
    text = repr(found)
    return text if len(text) <= 80 else f"{text[:77]}..."
