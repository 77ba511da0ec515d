"""The project's modules where flax is not installed: a bare machine has jax and NumPy alone.

The package `alisa_jax` imports its engine, and that imports `flax.linen`. Placement, policies, codecs and attention need
of flax only `flax.struct.dataclass`. So where flax is missing, `prepare` puts a package without contents in the place of
`alisa_jax`, which leaves its modules to be imported one by one, and a module with `struct.dataclass` in that of flax.
Use it in a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[2]


def prepare() -> str:
    """Make `alisa_jax.placement` and `alisa_jax.attention` importable; says what flax they use."""
    if (found := importlib.util.find_spec("flax")) is not None and found.origin is not None:
        return "flax"
    flax = types.ModuleType("flax")
    flax.__spec__ = importlib.machinery.ModuleSpec("flax", None)  # as a second call finds it
    flax.struct = types.SimpleNamespace(dataclass=dataclass, field=field)
    package = types.ModuleType("alisa_jax")
    package.__path__ = [str(ROOT / "alisa_jax")]
    sys.modules |= {"flax": flax, "alisa_jax": package}
    return "none: dataclasses that jax registers"


def dataclass(cls):
    """As `flax.struct.dataclass`: frozen, with `replace`, and a pytree."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    static = [one.name for one in fields if not one.metadata.get("pytree_node", True)]
    jax.tree_util.register_dataclass(cls, [one.name for one in fields if one.name not in static], static)
    cls.replace = dataclasses.replace
    return cls


def field(pytree_node: bool = True, **options):
    """As `flax.struct.field`."""
    return dataclasses.field(metadata={"pytree_node": pytree_node}, **options)
