"""`sparse_decode` and `packed_decode`, interpreted, against float64 NumPy, fresh inputs at every run."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend, packed_decode, sparse_decode
from pallas_kernels.partial import Partial, merge, merge_axis
from pallas_kernels.tilings import DecodeTiling
from tests.kernels.oracle import SEED, decode, error, lse_error

LIMITS = {"float32": 2.5e-6, "bfloat16": 5e-3, "float16": 2e-3}
SMALL = DecodeTiling(rows=16, splits=2)
# B, K, G, H, S, M, P: prime where it can be
SHAPES = {
    "one head per kv head": (3, 5, 1, 64, 37, 23, 1),
    "four heads": (2, 3, 4, 32, 53, 41, 3),
    "eight heads": (1, 2, 8, 128, 31, 29, 1),
    "a head that is no power of two": (2, 2, 4, 80, 19, 17, 2),
    "wide heads": (1, 2, 1, 256, 67, 61, 2),
    "one row": (2, 1, 1, 32, 7, 1, 1),
}


def inputs(shape, dtype="float32", head_major=False, seed=SEED):
    """q, k, v, index, bias: ragged lists, an empty one, repeated and unsorted rows, biases -inf and log n."""
    B, K, G, H, S, M, P = shape
    r = np.random.default_rng(seed)
    rows = (B, K, M, H) if head_major else (B, S, K, H)
    q, k, v = (jnp.asarray(r.normal(size=s), jnp.dtype(dtype)) for s in ((B, K * G, H), rows, rows))
    index = r.integers(0, S, (B, P, M))
    index[r.random(index.shape) < 0.2] = -1
    if M > 1:
        index[0, 0, -1] = S  # beyond the store: no row
    bias = r.choice([0.0, 0.0, np.log(3.0), -np.inf], (B, P, M)).astype(np.float32)
    if B > 1:
        index[1], bias[1] = -1, -np.inf  # an empty sequence
    return q, k, v, jnp.asarray(index, jnp.int32), jnp.asarray(bias)


@functools.cache
def compiled(function, tiling, impl="interpret"):
    return jax.jit(functools.partial(function, impl=impl, tiling=tiling))


def compare(run, args, head_major):
    """An output is a mean of values, and may be small where they cancel: its error is told of the greatest value."""
    q, k, v, index, bias = args
    part, mass = run(q, k, v, bias) if head_major else run(*args)
    out, lse, weights, _ = decode(q, k, v, None if head_major else index, bias, head_major)
    limit = LIMITS[q.dtype.name]
    assert part.out.dtype == part.lse.dtype == mass.dtype == jnp.float32
    assert error(part.out, out, least=float(jnp.abs(v).max())) <= limit / 2, f"seed {SEED}"
    assert lse_error(part.lse, lse) <= limit, f"seed {SEED}"
    assert error(mass, weights) <= limit, f"seed {SEED}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sparse_decode_equals_numpy(shape):
    compare(compiled(sparse_decode.sparse_decode, SMALL), inputs(shape), head_major=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_packed_decode_equals_numpy(shape):
    compare(compiled(packed_decode.packed_decode, SMALL), inputs(shape, head_major=True), head_major=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [SHAPES["one head per kv head"], SHAPES["four heads"]], ids=["G1", "G4"])
def test_decode_in_half_precision_equals_numpy(shape, dtype):
    compare(compiled(sparse_decode.sparse_decode, SMALL), inputs(shape, dtype), head_major=False)
    compare(compiled(packed_decode.packed_decode, SMALL), inputs(shape, dtype, head_major=True), head_major=True)


@pytest.mark.parametrize("shape", [SHAPES["one head per kv head"], SHAPES["four heads"]], ids=["G1", "G4"])
def test_references_equal_numpy(shape):
    compare(compiled(sparse_decode.sparse_decode, None, "xla"), inputs(shape), head_major=False)
    compare(compiled(packed_decode.packed_decode, None, "xla"), inputs(shape, head_major=True), head_major=True)


@pytest.mark.parametrize("impl", ["interpret", "xla"])
def test_mass_sums_to_the_heads_that_share_a_list(impl):
    for name in ("eight heads", "four heads"):
        B, K, G, H, S, M, P = SHAPES[name]
        q, k, v, index, bias = inputs(SHAPES[name])
        bias = bias.at[:, :, 0].set(0.0)
        index = index.at[:, :, 0].set(3)
        _, mass = compiled(sparse_decode.sparse_decode, SMALL, impl)(q, k, v, index, bias)
        np.testing.assert_allclose(np.asarray(mass).sum(-1), K * G / P, rtol=2e-6)


@pytest.mark.parametrize("impl", ["interpret", "xla"])
def test_rows_that_are_not_attended_may_hold_anything(impl):
    """Poison in the store where no index points, and behind biases of -inf, reaches no result."""
    shape = SHAPES["four heads"]
    q, k, v, index, bias = inputs(shape)
    unread = np.ones(k.shape[:3], bool)
    listed = np.broadcast_to(np.asarray(index), (k.shape[0], k.shape[2], index.shape[2]))
    open_ = np.broadcast_to(np.asarray(bias), listed.shape) > -np.inf
    for b, h, m in np.argwhere((listed >= 0) & (listed < k.shape[1]) & open_):
        unread[b, listed[b, h, m], h] = False
    poisoned = [jnp.where(unread[..., None], jnp.nan, x) for x in (k, v)]
    run = compiled(sparse_decode.sparse_decode, SMALL, impl)
    jax.tree.map(np.testing.assert_array_equal, run(q, *poisoned, index, bias), run(q, k, v, index, bias))


@pytest.mark.parametrize("impl", ["interpret", "xla"])
def test_a_list_of_no_rows_is_the_empty_piece(impl):
    q, k, v, index, _ = inputs(SHAPES["four heads"])
    part, mass = sparse_decode.sparse_decode(q, k, v, index[..., :0], impl=impl)
    assert mass.shape == (2, 3, 0) and part.out.shape == q.shape
    assert not np.asarray(part.out).any() and (np.asarray(part.lse) == -np.inf).all()


def test_without_mass_the_rest_is_the_same():
    args = inputs(SHAPES["four heads"])
    run = jax.jit(functools.partial(sparse_decode.sparse_decode, impl="interpret", tiling=SMALL, mass=False))
    part, mass = run(*args)
    assert mass is None
    jax.tree.map(np.testing.assert_array_equal, part, compiled(sparse_decode.sparse_decode, SMALL)(*args)[0])


@pytest.mark.parametrize("tiling", [DecodeTiling(16, 1), DecodeTiling(16, 3), DecodeTiling(64, 0), DecodeTiling(32, 7)])
def test_any_tiling_gives_the_same(tiling):
    compare(compiled(sparse_decode.sparse_decode, tiling), inputs((1, 2, 4, 32, 211, 197, 1)), head_major=False)


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 41), max_size=4))
def test_merge_of_any_split_equals_the_whole(seed, cuts):
    """Cut a list anywhere, empty pieces too, attend each piece, join them in any order."""
    q, k, v, index, bias = inputs((2, 3, 4, 32, 53, 41, 1), seed=seed)
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
    q, k, v, index, bias = inputs(SHAPES["four heads"])
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
    q, k, v, index, bias = inputs(SHAPES["four heads"])
    auto, named = (sparse_decode.sparse_decode(q, k, v, index, bias, impl=impl) for impl in ("auto", "xla"))
    jax.tree.map(np.testing.assert_array_equal, auto, named)
