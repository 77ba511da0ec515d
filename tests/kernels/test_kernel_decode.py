"""`sparse_decode` and `packed_decode`, interpreted, against float64 NumPy, fresh inputs at every run."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend, check_runs, checks, packed_decode, sparse_decode
from pallas_kernels.oracle import error, lse_error
from pallas_kernels.partial import Partial, merge, merge_axis
from tests.full import seed

SEED = seed()
DECODE = [
    c for c in checks.ALL if c.kernel in ("sparse_decode", "packed_decode", "dense_decode", "partial") and not c.large
]
# of the references: two shapes, sums, poison, and no rows
TWO = checks.LISTS["one head per kv head"], checks.LISTS["four heads"], checks.LISTS["no rows"]
REFERENCES = [
    c
    for c in DECODE
    if c.kernel in ("sparse_decode", "packed_decode") and c.dtype == "float32"
    if c.kind == "sums" or (c.shape in TWO and c.kind in ("", "poison"))
]
PLAIN = next(c for c in DECODE if c.kernel == "sparse_decode" and c.shape == checks.LISTS["four heads"])


def inputs(shape=PLAIN.shape, seed=SEED):
    """q, k, v, index and bias of `sparse_decode`."""
    return check_runs.lists(PLAIN._replace(shape=shape), seed)[:5]


@pytest.mark.parametrize("check", DECODE, ids=lambda c: c.name)
def test_decode_is_right(check):
    record = checks.run(check, "interpret", SEED)
    assert record["passed"], f"{record['note']}, seed {SEED}"


@pytest.mark.parametrize("check", REFERENCES, ids=lambda c: c.name)
def test_references_are_right(check):
    record = checks.run(check, "xla", SEED)
    assert record["passed"], f"{record['note']}, seed {SEED}"


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 41), max_size=4))
def test_merge_of_any_split_equals_the_whole(seed, cuts):
    """Cut a list anywhere, empty pieces too, attend each piece, join them in any order."""
    q, k, v, index, bias = inputs(PLAIN.shape._replace(lists=1), seed)
    borders = np.array([0, *sorted(cuts), *[41] * (5 - len(cuts))])
    order = np.random.default_rng(seed).permutation(5)
    whole, one_by_one, at_once = _split(q, k, v, index, bias, borders[order], borders[order + 1])
    for part in (one_by_one, at_once):
        assert error(part.out, whole.out) <= 5e-6
        assert lse_error(part.lse, whole.lse) <= 5e-6


@jax.jit
def _split(q, k, v, index, bias, low, high):
    m = jnp.arange(index.shape[2])
    run = lambda keep: sparse_decode.reference(q, k, v, index, jnp.where(keep, bias, -jnp.inf))[0]
    parts = [run((m >= low[i]) & (m < high[i])) for i in range(5)]
    stacked = Partial(*(jnp.stack(x, 2) for x in zip(*parts)))
    return run(m >= 0), functools.reduce(merge, parts), merge_axis(stacked, 2)


def test_wrong_shapes_and_implementations_are_refused_in_one_sentence():
    q, k, v, index, bias = inputs()
    run = sparse_decode.sparse_decode
    with pytest.raises(ValueError, match=r"impl must be one of auto, xla, pallas, interpret; got 'triton'"):
        run(q, k, v, index, impl="triton")
    with pytest.raises(
        ValueError, match=r"impl=pallas cannot run: it needs a GPU, and the device is cpu; give impl=auto"
    ):
        run(q, k, v, index, impl="pallas")
    with pytest.raises(ValueError, match=r"head dimensions up to 256, and this one is 300"):
        wide = jnp.zeros((2, 53, 3, 300))
        run(jnp.zeros((2, 12, 300)), wide, wide, index, impl="interpret")
    with pytest.raises(ValueError, match=r"serve q of float32, bfloat16, float16, and it is int32"):
        run(q.astype(jnp.int32), k, v, index, impl="interpret")
    with pytest.raises(ValueError, match=r"k and v have one shape"):
        run(q, k, v[:, :-1], index)
    with pytest.raises(ValueError, match=r"K divides N; got \(2, 11, 32\)"):
        run(q[:, :-1], k, v, index)
    with pytest.raises(ValueError, match=r"index and bias have one shape; got \(2, 3, 41\) and \(2, 3, 40\)"):
        run(q, k, v, index, bias[..., :-1])
    with pytest.raises(ValueError, match=r"\[B, 1, 40\] or \[B, 3, 40\]"):
        packed_decode.packed_decode(q, jnp.swapaxes(k, 1, 2)[:, :, :40], jnp.swapaxes(v, 1, 2)[:, :, :40], bias)


def test_a_device_that_fails_at_a_small_kernel_has_a_reason():
    """Before `auto` trusts a GPU it runs one there; a CPU fails that trial."""
    assert backend.works("cpu").startswith("a small kernel fails on cpu: ValueError: impl=pallas cannot run")


def test_auto_falls_back_where_there_is_no_gpu_and_says_why():
    assert backend.choose("auto") == ("xla", "it needs a GPU, and the device is cpu")
    assert backend.choose("auto", "the heads are odd") == ("xla", "the heads are odd")
    q, k, v, index, bias = inputs()
    auto, named = (sparse_decode.sparse_decode(q, k, v, index, bias, impl=impl) for impl in ("auto", "xla"))
    jax.tree.map(np.testing.assert_array_equal, auto, named)
