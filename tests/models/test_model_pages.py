"""Weights in one block of memory are the weights, and JAX leaves them where they were put."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.models.pages import on_large_pages


def test_values_types_and_shapes_stay():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 3, 4), "none": (0, 4)}
    drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params = {
        "wide": {k: jnp.asarray(x, jnp.float32) for k, x in drawn.items()},
        "half": [jnp.asarray(x, t) for x in drawn.values() for t in (jnp.bfloat16, jnp.float16)],
    }
    placed = on_large_pages(params)
    assert jax.tree.structure(placed) == jax.tree.structure(params)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))
    assert on_large_pages({}) == {}


def test_arrays_lie_one_behind_the_other():
    params = [jnp.full((n,), n, jnp.float32) for n in (100, 300, 16, 1)]
    places = [x.unsafe_buffer_pointer() for x in on_large_pages(params)]
    assert [b - a for a, b in itertools.pairwise(places)] == [
        448,
        1216,
        64,
    ]  # 400, 1200 and 64 bytes, up to multiples of 64
