"""Writes of one and of many rows, jitted with donation, against NumPy; a write of one copies nothing inside a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.ops import writes

EDGES = (-(2**31), -1, 0, 6, 7, 2**31 - 1)


def numpy_put(x, places, new, rest):
    """`places` are of axes 0 and `axis`; one row after the other."""
    x, axis = x.copy(), len(places) - 1
    first, last = (p.reshape(-1) for p in (places[0], places[-1]))
    for b, at, row in zip(first, last, new.reshape(-1, *rest), strict=True):
        if 0 <= b < x.shape[0] and 0 <= at < x.shape[axis]:
            x[(b, *(slice(None),) * (axis - 1), at)] = row
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.int32])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("between", [0, 1])
def test_rows_go_where_they_should_and_out_of_range_nowhere(between, n, dtype):
    rng = np.random.default_rng(5)
    write = jax.jit(lambda x, a, b, new: writes.put(x, (a, *(slice(None),) * between, b), new), donate_argnums=0)
    shape, rest = ((3, 7, 5), (5,)) if not between else ((3, 2, 7, 5), (2, 5))
    for edge in EDGES:
        for axis in range(2):
            x, new = ((100 * rng.normal(size=s)).astype(dtype) for s in (shape, (n, 1, *rest)))
            first, last = rng.permutation(3)[:n, None].astype(np.int32), rng.integers(0, 7, (n, 1)).astype(np.int32)
            (first, last)[axis][0] = edge
            if axis == 0 and 0 <= edge < 3:
                first = np.roll(np.arange(3), -edge)[:n, None].astype(np.int32)
            want = numpy_put(x, (first, *(slice(None),) * between, last), new, rest)
            np.testing.assert_array_equal(write(x, first, last, new), want)


@pytest.mark.parametrize("n", [1, 2])
def test_a_loop_that_writes_and_reads_copies_nothing(n):
    """The write of a single row is what XLA:CPU would do twice, in two copies of the array."""

    def steps(x, q, at):
        def step(_, carry):
            x, q, at = carry
            x = writes.put(x, (jnp.arange(n), slice(None), at), q)
            weights = jax.nn.softmax(jnp.einsum("bkh,bkmh->bkm", q, x))
            return x, jnp.einsum("bkm,bkmh->bkh", weights, x), at + 1

        return jax.lax.fori_loop(0, 5, step, (x, q, at))

    x = jnp.zeros((n, 4, 4096, 64), jnp.float32)
    q, at = jnp.ones((n, 4, 64), jnp.float32), jnp.full((n,), 9, jnp.int32)
    compiled = jax.jit(steps, donate_argnums=0).lower(x, q, at).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 8
    got = np.asarray(compiled(x, q, at)[0])
    assert (got[:, :, 9:14] != 0).all() and not got[:, :, :9].any() and not got[:, :, 14:].any()
