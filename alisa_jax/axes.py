"""The axis alphabet: one letter per axis, the same letter everywhere in the library.

    B  batch: sequences of a batch          N  query heads
    L  layers                               K  key/value heads
    T  query tokens of one call             G  query heads per key/value head, G = N / K
    S  context positions                    H  size of one head
    M  slots of the working set             D  width of the model
    W  rows of the statistics window        V  vocabulary
    P  heads that select: 1 when all heads share a selection, K when each has its own

A comment such as ``k: jax.Array,  # [B, K, M, H]`` states a shape; `check` enforces it at public
entry points. Shapes are static under ``jax.jit``, so a check costs nothing in a compiled step.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

LETTERS = "BLTSMWNKGHDVP"


def check(
    spec: str, array: Any, sizes: Mapping[str, int] | None = None, name: str = ""
) -> dict[str, int]:
    """Compare the shape of `array` with `spec` and return the size of every letter seen so far.

    Args:
      spec: axes separated by spaces, each a letter of the alphabet or a plain integer, such as
        ``"B K M H"`` or ``"B 1 W S"``. The empty string stands for a scalar.
      array: anything with a ``shape``: a NumPy or JAX array, a tracer, a ``jax.ShapeDtypeStruct``.
      sizes: letters whose size is known already, usually what an earlier call returned; equal
        letters must agree.
      name: what the error calls the array.

    Returns:
      A new dict from letter to size: `sizes` and the letters of `spec`.

    Raises:
      ValueError: the array has no shape, another rank or another size than `spec` says, or `spec`
        itself holds something that is neither a letter of the alphabet nor an integer.
    """
    axes = spec.split()
    for axis in axes:
        if not (_is_integer(axis) or (len(axis) == 1 and axis in LETTERS)):
            raise ValueError(
                f"the axes {spec!r} hold {axis!r}; allowed are integers and the letters "
                f"{' '.join(LETTERS)}"
            )
    who = name or "array"
    shape = getattr(array, "shape", None)
    if shape is None:
        raise ValueError(
            f"{who} must be an array of axes [{', '.join(axes)}], got {type(array).__name__}"
        )
    found = dict(sizes or {})
    if len(shape) != len(axes):
        raise ValueError(_mismatch(who, shape, axes, found, f"{len(axes)} axes, not {len(shape)}"))
    for place, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        wanted = int(axis) if _is_integer(axis) else found.setdefault(axis, size)
        if size != wanted:
            reason = f"size {wanted} on axis {place}, not {size}"
            raise ValueError(_mismatch(who, shape, axes, sizes or {}, reason))
    return found


def adopted(array, other, rows, which, axis: int = 0):
    """`array` with its sequences `which` [B] bool replaced by the sequences `rows` [B] of `other`.

    Sequences are counted along `axis`; all other sizes of the two arrays are equal. which: None for
    the sequences `rows` of `other` alone, however many.
    """
    if which is None:
        return jnp.take(other, rows, axis=axis)
    named = which.reshape(-1, *[1] * (array.ndim - axis - 1))
    return jnp.where(named, jnp.take(other, rows, axis=axis), array)


def _is_integer(axis: str) -> bool:
    return axis.isascii() and axis.isdigit()


def _mismatch(who: str, shape, axes: list[str], sizes: Mapping[str, int], reason: str) -> str:
    known = ", ".join(f"{axis} = {sizes[axis]}" for axis in dict.fromkeys(axes) if axis in sizes)
    expected = f"[{', '.join(axes)}]" + (f" with {known}" if known else "")
    return f"{who} has shape {tuple(shape)}, expected {expected}: {reason}"
