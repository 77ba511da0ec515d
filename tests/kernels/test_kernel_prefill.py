"""`flash_prefill` and `prompt_mass`, interpreted, and their references, against float64 NumPy, fresh inputs at every run."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend, flash_prefill
from pallas_kernels.tilings import PrefillTiling
from tests.kernels.oracle import SEED, error, lse_error

LIMITS = {"float32": 5e-6, "bfloat16": 5e-3, "float16": 5e-3}
SMALL = PrefillTiling(queries=32, rows=16)
# T, K, G, H, length of each prompt (None: all of T)
PROMPTS = {
    "one head per kv head, ragged": (67, 3, 1, 32, (67, 1, 0, 41)),
    "four heads, no power of two": (67, 2, 4, 80, (13, 67)),
    "eight heads": (37, 1, 8, 128, None),
    "wide heads": (37, 2, 1, 256, (29,)),
    "less than a tile": (5, 2, 2, 16, (3, 5)),
}
MAIN = PROMPTS["one head per kv head, ragged"]
GROUPED = PROMPTS["four heads, no power of two"]


def inputs(prompt, dtype="float32"):
    """q, k, v and length."""
    T, K, G, H, length = prompt
    r = np.random.default_rng(SEED)
    B = 2 if length is None else len(length)
    q, k, v = (jnp.asarray(r.normal(size=(B, T, n, H)), jnp.dtype(dtype)) for n in (K * G, K, K))
    return q, k, v, None if length is None else jnp.asarray(length, jnp.int32)


def oracle(q, k, v, length):
    """out [B, T, N, H], lse [B, T, N] and weights [B, N, T, T], query by query."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    out, lse, weights = np.zeros(q.shape), np.full((B, T, N), -np.inf), np.zeros((B, N, T, T))
    for b in range(B):
        for i in range(T if length is None else int(length[b])):
            for n in range(N):
                h = n // (N // k.shape[2])
                z = k[b, : i + 1, h] @ q[b, i, n] / np.sqrt(H)
                lse[b, i, n] = np.log(np.exp(z - z.max()).sum()) + z.max()
                weights[b, n, i, : i + 1] = np.exp(z - lse[b, i, n])
                out[b, i, n] = weights[b, n, i, : i + 1] @ v[b, : i + 1, h]
    return out, lse, weights


def last_rows(weights, length, W, P):
    """[B, P, W, T] of weights [B, N, T, T]."""
    B, N, T, _ = weights.shape
    rows = np.zeros((B, P, W, T))
    for b in range(B):
        end = T if length is None else int(length[b])
        for r in range(max(0, W - end), W):
            rows[b, :, r] = weights[b, :, end - W + r].reshape(P, N // P, T).sum(axis=1)
    return rows


@functools.cache
def attend(impl="interpret", tiling=SMALL):
    return jax.jit(functools.partial(flash_prefill.flash_prefill, impl=impl, tiling=tiling))


@functools.cache
def mass(impl, queries, heads, reduce, tiling=SMALL):
    options = dict(queries=queries, heads=heads, reduce=reduce, impl=impl, tiling=tiling)
    return jax.jit(functools.partial(flash_prefill.prompt_mass, **options))


def compare(part, want, limit):
    out, lse, _ = want
    assert part.out.dtype == part.lse.dtype == jnp.float32
    assert error(part.out, out) <= limit, f"seed {SEED}"
    assert lse_error(part.lse, lse) <= limit, f"seed {SEED}"


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompt_attention_equals_numpy(prompt):
    args = inputs(prompt)
    compare(attend()(*args), oracle(*args), LIMITS["float32"])


@pytest.mark.parametrize(
    ("name", "W", "P", "reduce"),
    [
        ("one head per kv head, ragged", 19, 3, "rows"),
        ("one head per kv head, ragged", 71, 1, "rows"),  # more rows than tokens
        ("four heads, no power of two", 37, 2, "rows"),
        ("four heads, no power of two", 1, 8, "rows"),
        ("one head per kv head, ragged", None, 1, "sum"),
        ("four heads, no power of two", 37, 2, "sum"),
        ("eight heads", None, 8, "sum"),
        ("less than a tile", None, 2, "sum"),
    ],
)
@pytest.mark.parametrize("impl", ["interpret", "xla"])
def test_prompt_mass_equals_numpy(name, W, P, reduce, impl):
    q, k, v, length = inputs(PROMPTS[name])
    _, lse, weights = oracle(q, k, v, length)
    want = last_rows(weights, length, W or q.shape[1], P)
    got = mass(impl, W, P, reduce)(q, k, jnp.asarray(lse, jnp.float32), length)
    assert got.dtype == jnp.float32
    assert error(got, want if reduce == "rows" else want.sum(axis=2)) <= LIMITS["float32"], f"seed {SEED}"


@pytest.mark.parametrize(("dtype", "impl"), [("bfloat16", "interpret"), ("float16", "interpret"), ("bfloat16", "xla")])
def test_a_prompt_in_half_precision_equals_numpy(dtype, impl):
    q, k, v, length = inputs(GROUPED, dtype)
    want = oracle(q, k, v, length)
    part = attend(impl)(q, k, v, length)
    compare(part, want, LIMITS[dtype])
    got = mass(impl, 7, 2, "rows")(q, k, part.lse, length)
    assert error(got, last_rows(want[2], length, 7, 2)) <= LIMITS[dtype], f"seed {SEED}"


def test_references_equal_numpy_over_more_than_one_block_of_queries():
    q, k, v, length = args = inputs((149, 2, 2, 32, (149, 133)))
    want = oracle(*args)
    part = attend("xla")(*args)
    compare(part, want, LIMITS["float32"])
    rows = last_rows(want[2], length, 139, 2)
    for reduce, expected in (("rows", rows), ("sum", rows.sum(axis=2))):
        got = mass("xla", 139, 2, reduce)(q, k, part.lse, length)
        assert error(got, expected) <= LIMITS["float32"], f"seed {SEED}"


@pytest.mark.parametrize(("tiling", "reduce"), [(PrefillTiling(16, 64), "sum"), (PrefillTiling(128, 128), "rows")])
def test_any_tiling_gives_the_same(tiling, reduce):
    q, k, v, length = args = inputs(MAIN)
    want = oracle(*args)
    part = attend("interpret", tiling)(*args)
    compare(part, want, LIMITS["float32"])
    rows = last_rows(want[2], length, 23, 1)
    got = mass("interpret", 23, 1, reduce, tiling)(q, k, part.lse, length)
    assert error(got, rows if reduce == "rows" else rows.sum(axis=2)) <= LIMITS["float32"], f"seed {SEED}"


@pytest.mark.parametrize("impl", ["interpret", "xla"])
def test_each_row_sums_to_the_heads_of_its_group_and_all_rows_to_the_sum(impl):
    """With the function's own lse, not the oracle's, and W beyond the longest prompt."""
    q, k, v, length = inputs(MAIN)
    lse = attend(impl)(q, k, v, length).lse
    rows, total = (mass(impl, 71, 1, reduce)(q, k, lse, length) for reduce in ("rows", "sum"))
    real = np.arange(71) >= 71 - np.asarray(length)[:, None, None]
    want = np.broadcast_to(np.where(real, q.shape[2], 0), rows.shape[:3])
    np.testing.assert_allclose(np.asarray(rows).sum(-1), want, rtol=5e-6)
    np.testing.assert_allclose(total, np.asarray(rows, np.float64).sum(2), rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["interpret", "xla"])
def test_what_lies_behind_a_prompt_reaches_nothing(impl):
    """Poison in the padding of q, k, v and lse changes no bit; every element of the outputs is written."""
    q, k, v, length = inputs(MAIN)
    padding = np.arange(q.shape[1]) >= np.asarray(length)[:, None]
    poison = lambda x: jnp.where(padding[(...,) + (None,) * (x.ndim - 2)], jnp.nan, x)
    part = attend(impl)(q, k, v, length)
    jax.tree.map(np.testing.assert_array_equal, attend(impl)(poison(q), poison(k), poison(v), length), part)
    assert (np.asarray(part.out)[padding] == 0).all() and (np.asarray(part.lse)[padding] == -np.inf).all()
    assert np.isfinite(part.out).all()
    for reduce in ("rows", "sum"):
        run = mass(impl, *((19, 3) if reduce == "rows" else (None, 1)), reduce)
        got = run(q, k, part.lse, length)
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(run(poison(q), poison(k), poison(part.lse), length), got)


@pytest.mark.parametrize("impl", ["interpret", "xla"])
def test_logits_of_some_hundreds_overflow_nothing(impl):
    """float32 holds such logits to 1e-4, so weights are right to about that; exp of them would be infinite."""
    q, k, v, length = inputs(MAIN)
    args = q.at[:, :, :, 0].multiply(30.0), k.at[:, 7].multiply(30.0), v, length
    out, lse, weights = oracle(*args)
    assert np.max(lse) > 100, f"seed {SEED}"
    part = attend(impl)(*args)
    assert lse_error(part.lse, lse) <= LIMITS["float32"] and error(part.out, out) <= 2e-3, f"seed {SEED}"
    got = mass(impl, None, 1, "sum")(*args[:2], part.lse, length)
    assert error(got, last_rows(weights, length, q.shape[1], 1).sum(axis=2)) <= 2e-3, f"seed {SEED}"


def test_lengths_beyond_the_arrays_mean_all_of_them_and_auto_is_the_reference_without_a_gpu():
    q, k, v, _ = inputs(PROMPTS["less than a tile"])
    T = q.shape[1]
    for impl in ("interpret", "xla"):
        jax.tree.map(
            np.testing.assert_array_equal,
            attend(impl)(q, k, v, jnp.array([T, 2**30], jnp.int32)),
            attend(impl)(q, k, v, jnp.array([T, T], jnp.int32)),
        )
    jax.tree.map(np.testing.assert_array_equal, attend("auto")(q, k, v, None), attend("xla")(q, k, v, None))


def test_the_references_hold_no_array_of_all_weights():
    T, N = 1024, 2
    q = jax.ShapeDtypeStruct((1, T, N, 16), jnp.float32)
    lse = jax.ShapeDtypeStruct((1, T, N), jnp.float32)
    for function, args in ((attend("xla"), (q, q, q)), (mass("xla", None, 1, "sum"), (q, q, lse))):
        held = function.lower(*args).compile().memory_analysis().temp_size_in_bytes
        assert held < 4 * N * T * T / 2


@pytest.mark.parametrize("gpu", backend.GPUS)
def test_each_function_lowers_to_one_kernel_for_a_gpu_that_is_not_there(gpu):
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, jnp.dtype(dtype))
    for dtype, H in (("float32", 64), ("bfloat16", 128), ("float16", 80)):
        q, k = shape(dtype, 2, 67, 8, H), shape(dtype, 2, 67, 2, H)
        lse, length = shape("float32", 2, 67, 8), shape("int32", 2)
        run = functools.partial(flash_prefill.flash_prefill, impl="pallas")
        rows, total = (
            functools.partial(flash_prefill.prompt_mass, queries=20, heads=2, reduce=reduce, impl="pallas")
            for reduce in ("rows", "sum")
        )
        for function, args in ((run, (q, k, k, length)), (rows, (q, k, lse, length)), (total, (q, k, lse, length))):
            text = backend.lower_for(gpu, function, *args)
            assert re.findall(r"custom_call @([\w$.]+)", text) == ["__gpu$xla.gpu.triton"]


def test_what_cannot_run_is_refused_in_one_sentence():
    q, k, v, length = inputs(GROUPED)
    lse = jnp.zeros(q.shape[:3])
    run, rows = flash_prefill.flash_prefill, flash_prefill.prompt_mass
    for function, last in ((run, v), (rows, lse)):
        with pytest.raises(ValueError, match=r"impl=pallas cannot run: it needs a GPU, and the device is cpu"):
            function(q, k, last, length, impl="pallas")
        with pytest.raises(ValueError, match=r"serve k of float32, bfloat16, float16, and it is int8"):
            k8 = k.astype(jnp.int8)
            function(q, k8, last if last is lse else k8, length, impl="interpret")
        with pytest.raises(ValueError, match=r"K divides N; got \(2, 67, 7, 80\) and \(2, 67, 2, 80\)"):
            function(q[:, :, 1:], k, last, length)
        with pytest.raises(ValueError, match=r"length is \[B\] = \(2,\) whole numbers; got int32 \(1,\)"):
            function(q, k, last, length[1:])
    with pytest.raises(ValueError, match=r"head dimensions up to 256, and this one is 300"):
        wide = jnp.zeros((1, 7, 1, 300))
        run(wide, wide, wide, impl="interpret")
    with pytest.raises(ValueError, match=r"k and v have one shape; got \(2, 67, 2, 80\) and \(2, 67, 1, 80\)"):
        run(q, k, v[:, :, 1:], length)
    with pytest.raises(ValueError, match=r"q is \[B, T, N, H\] and k is \[B, T, K, H\]; got \(67, 8, 80\)"):
        run(q[0], k, v, length)
    with pytest.raises(ValueError, match=r"lse is float32 \[B, T, N\] = \(2, 67, 8\); got float32 \(2, 67, 7\)"):
        rows(q, k, lse[..., 1:], length)
    with pytest.raises(ValueError, match=r"heads is a number of groups that divides N = 8; got 3"):
        rows(q, k, lse, length, heads=3)
    with pytest.raises(ValueError, match=r"queries is 1 or more, or None for all; got 0"):
        rows(q, k, lse, length, queries=0)
    with pytest.raises(ValueError, match=r"reduce must be rows or sum; got 'mean'"):
        rows(q, k, lse, length, reduce="mean")
