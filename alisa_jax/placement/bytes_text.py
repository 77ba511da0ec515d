"""Bytes in the spellings of people."""

from __future__ import annotations

import math
import numbers
import re
from types import MappingProxyType

UNITS = MappingProxyType(
    {"": 1.0, "B": 1.0}
    | {f"{letter}B": 1000.0**i for i, letter in enumerate("KMGT", 1)}
    | {f"{letter}iB": 1024.0**i for i, letter in enumerate("KMGT", 1)}
)


def read_bytes(text: str | float, dense_kv_bytes: float, where: str = "") -> float:
    """'2GB', '512MiB', '1000' and 'inf' in bytes; '0.33x' times `dense_kv_bytes`; numbers as given.

    Raises ValueError, one sentence that begins with `where`, for what is none of these.
    """
    if isinstance(text, numbers.Real) and not isinstance(text, bool):
        if math.isnan(text) or text < 0:
            raise ValueError(f"{where}a number of bytes is at least 0; got {text}")
        return float(text)
    if not isinstance(text, str):
        raise ValueError(f"{where}give a number of bytes or a text such as 2GB; got {text!r}")
    if text == "inf":
        return math.inf
    found = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]*)", text.strip())
    if not found or found[2] not in {*UNITS, "x"}:
        raise ValueError(
            f"{where}{text!r} is no size; write 2GB, 512MiB, or 0.33x for a share of the dense KV"
        )
    return float(found[1]) * (dense_kv_bytes if found[2] == "x" else UNITS[found[2]])


def as_text(number: float) -> str:
    """Bytes as a table shows them, such as "1.50 GiB"; "any" for no limit."""
    if not math.isfinite(number):
        return "any"
    unit = next((u for u in ("TiB", "GiB", "MiB", "KiB") if number >= UNITS[u]), "B")
    return f"{number / UNITS[unit]:.2f} {unit}"
