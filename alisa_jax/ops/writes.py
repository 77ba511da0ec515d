"""Writes of rows into an array that is changed in place, however many they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def put(x: jax.Array, places: tuple[jax.Array | slice, ...], new: jax.Array) -> jax.Array:
    """`x` with `new` at distinct `places`: int32 arrays of one shape, and `slice(None)` between.

    The first place is an array. As `x.at[places].set(new)`, but an index that is negative or not
    below the size of its axis writes nothing. A single place gets a second one, out of range: XLA
    would make a slice update of the one, and XLA:CPU one for attention and another for the next
    step, so that a loop over steps copies all of `x` four times each.
    """
    index = {axis: place for axis, place in enumerate(places) if not isinstance(place, slice)}
    for axis, place in index.items():
        index[axis] = jnp.where((place >= 0) & (place < x.shape[axis]), place, x.shape[axis])
    if index[0].size == 1:
        rest = [n for axis, n in enumerate(x.shape) if axis not in index]
        new = jnp.broadcast_to(new.reshape(1, *rest), (2, *rest))
        index = {
            axis: jnp.pad(at.reshape(1), (0, 1), constant_values=x.shape[axis])
            for axis, at in index.items()
        }
    return x.at[tuple(index.get(axis, place) for axis, place in enumerate(places))].set(
        new, mode="drop"
    )
