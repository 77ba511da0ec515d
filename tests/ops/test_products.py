"""Products of a few rows with many, on both sides of each fork, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.ops import products


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(x):
    return np.asarray(x, np.float64)


@pytest.mark.parametrize(
    "batch, tokens", [(1, 1), (3, 1), (2, products.FEW_ROWS // 2), (5, products.FEW_ROWS // 5 + 1)]
)
@pytest.mark.parametrize("dtype, out", [("float32", None), ("bfloat16", None), ("bfloat16", "float32")])
def test_times_is_the_product_with_the_transposed_matrix(batch, tokens, dtype, out):
    x, weight = normal(0, batch, tokens, 37, dtype=dtype), normal(1, 23, 37, dtype=dtype)
    got = jax.jit(lambda x, weight: products.times(x, weight, out))(x, weight)
    assert got.dtype == jnp.dtype(out or dtype)
    tolerance = 0.05 if got.dtype == jnp.bfloat16 else 2e-5
    np.testing.assert_allclose(wide(got), wide(x) @ wide(weight).T, rtol=tolerance, atol=tolerance)


def test_the_rows_above_cover_both_orders():
    rows = [1, 3, 2 * (products.FEW_ROWS // 2), 5 * (products.FEW_ROWS // 5 + 1)]
    assert [n <= products.FEW_ROWS for n in rows] == [True, True, True, False]


@pytest.mark.parametrize("G", [1, 2, 5])
@pytest.mark.parametrize("lead", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_each_query_for_each_key(lead, G, dtype):
    q, k = normal(2, *lead, G, 24, dtype=dtype), normal(3, *lead, 41, 24, dtype=dtype)
    got = jax.jit(products.logits)(q, k)
    assert got.dtype == jnp.float32 and got.shape == (*lead, G, 41)
    np.testing.assert_allclose(wide(got), wide(q) @ np.swapaxes(wide(k), -1, -2), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("G", [1, 2, 5])
@pytest.mark.parametrize("lead", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mix_is_the_sum_of_the_values_by_weight(lead, G, dtype):
    p, v = normal(4, *lead, G, 41, dtype=dtype), normal(5, *lead, 41, 24, dtype=dtype)
    got = jax.jit(products.mix)(p, v)
    assert got.dtype == jnp.float32 and got.shape == (*lead, G, 24)
    np.testing.assert_allclose(wide(got), wide(p) @ wide(v), rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the order is that of XLA:CPU")
def test_with_two_query_heads_the_keys_come_first_in_what_is_compiled():
    q, k = jnp.zeros((2, 3, 2, 64)), jnp.zeros((2, 3, 640, 64))
    text = jax.jit(products.logits).lower(q, k).compile().as_text()
    (dot,) = (line for line in text.splitlines() if " dot(" in line)
    assert "f32[2,3,640,2]" in dot.split(" dot(")[0], dot
