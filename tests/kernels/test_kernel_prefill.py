"""`flash_prefill` and `prompt_mass`, interpreted, and their references, against float64 NumPy, fresh inputs at every run."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import backend, cases, check_runs, checks, flash_prefill, prompt_mass, prompts
from tests.full import seed

SEED = seed()
ALL = [c for c in checks.ALL if c.kernel in cases.PROMPT and not isinstance(c.shape, str)]
PROMPTS = [c for c in ALL if not c.large]
BLOCKS = checks.PROMPTS["more than a block of the references"].context
# of the references: all that is asked of the mass and of chunks, what is asked beside right numbers, bfloat16, many blocks
REFERENCES = [
    c
    for c in ALL
    if (c in PROMPTS and c.kernel != "flash_prefill" and (c.dtype, c.kind) == ("float32", ""))
    or c.kind in ("poison", "sums", "overflow", "beyond")
    or (c in PROMPTS and c.dtype == "bfloat16")
    or c.shape.context == BLOCKS
    or (c.shape.first is not None and c.dtype == "float32")
]


def inputs(label):
    """q, k, v and length."""
    return check_runs.prompts(PROMPTS[0]._replace(shape=checks.PROMPTS[label]), SEED)[:4]


@pytest.mark.parametrize("check", PROMPTS, ids=lambda c: c.name)
def test_a_prompt_is_right(check):
    record = checks.run(check, "interpret", SEED)
    assert record["passed"], f"{record['note']}, seed {SEED}"


@pytest.mark.parametrize("check", REFERENCES, ids=lambda c: c.name)
def test_references_are_right(check):
    record = checks.run(check, "xla", SEED)
    assert record["passed"], f"{record['note']}, seed {SEED}"


def test_auto_is_the_reference_without_a_gpu():
    q, k, v, _ = inputs("less than a tile")
    auto, xla = (check_runs.compiled(flash_prefill.flash_prefill, impl, None)(q, k, v) for impl in ("auto", "xla"))
    jax.tree.map(np.testing.assert_array_equal, auto, xla)


def test_the_references_hold_no_array_of_all_weights():
    T, N = 1024, 2
    q = jax.ShapeDtypeStruct((1, T, N, 16), jnp.float32)
    lse = jax.ShapeDtypeStruct((1, T, N), jnp.float32)
    attend = check_runs.compiled(flash_prefill.flash_prefill, "xla", None)
    mass = check_runs.compiled(prompt_mass.prompt_mass, "xla", None, reduce="sum")
    first = jax.ShapeDtypeStruct((1,), jnp.int32)
    for function, args in ((attend, (q, q, q)), (mass, (q, q, lse))):
        for more in ({}, {"first": first}):
            held = function.lower(*args, **more).compile().memory_analysis().temp_size_in_bytes
            assert held < 4 * N * T * T / 2


@pytest.mark.parametrize("gpu", backend.GPUS)
def test_each_function_lowers_to_one_kernel_for_a_gpu_that_is_not_there(gpu):
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, jnp.dtype(dtype))
    for dtype, H in (("float32", 64), ("bfloat16", 128), ("float16", 80)):
        q, k = shape(dtype, 2, 67, 8, H), shape(dtype, 2, 67, 2, H)
        lse, length = shape("float32", 2, 67, 8), shape("int32", 2)
        run = functools.partial(flash_prefill.flash_prefill, impl="pallas")
        rows, total = (
            functools.partial(prompt_mass.prompt_mass, queries=20, heads=2, reduce=reduce, impl="pallas")
            for reduce in ("rows", "sum")
        )
        for function, args in ((run, (q, k, k, length)), (rows, (q, k, lse, length)), (total, (q, k, lse, length))):
            text = backend.lower_for(gpu, function, *args)
            assert re.findall(r"custom_call @([\w$.]+)", text) == ["__gpu$xla.gpu.triton"]


@pytest.mark.parametrize("gpu", backend.GPUS)
def test_each_function_of_a_chunk_lowers_to_one_kernel_for_a_gpu_that_is_not_there(gpu):
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, jnp.dtype(dtype))
    q, k = shape("bfloat16", 2, 23, 8, 80), shape("bfloat16", 2, 67, 2, 80)
    lse, number = shape("float32", 2, 23, 8), shape("int32", 2)
    run = lambda q, k, length, first: flash_prefill.flash_prefill(q, k, k, length, first=first, impl="pallas")
    rows, total = (
        functools.partial(prompt_mass.prompt_mass, heads=2, reduce=r, impl="pallas") for r in ("rows", "sum")
    )
    of_chunk = lambda function: lambda q, k, lse, length, first: function(q, k, lse, length, first=first)
    for function, args in ((run, (q, k)), (of_chunk(rows), (q, k, lse)), (of_chunk(total), (q, k, lse))):
        text = backend.lower_for(gpu, function, *args, number, number)
        assert re.findall(r"custom_call @([\w$.]+)", text) == ["__gpu$xla.gpu.triton"]


def test_what_cannot_run_is_refused_in_one_sentence():
    q, k, v, length = inputs(checks.GROUPED)
    lse = jnp.zeros(q.shape[:3])
    run, rows = flash_prefill.flash_prefill, prompt_mass.prompt_mass
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
        with pytest.raises(ValueError, match=r"first is \[B\] = \(2,\) whole numbers; got float32 \(2,\)"):
            function(q, k, last, length, first=jnp.zeros(2))
        with pytest.raises(ValueError, match=r"without first there are at most T = 41 queries; got 67"):
            function(q, k[:, :41], last if last is lse else last[:, :41], length)
    with pytest.raises(ValueError, match=r"head dimensions up to 256, and this one is 300"):
        wide = jnp.zeros((1, 7, 1, 300))
        run(wide, wide, wide, impl="interpret")
    with pytest.raises(ValueError, match=r"k and v have one shape; got \(2, 67, 2, 80\) and \(2, 67, 1, 80\)"):
        run(q, k, v[:, :, 1:], length)
    with pytest.raises(ValueError, match=r"q is \[B, C, N, H\] and k is \[B, T, K, H\]; got \(67, 8, 80\)"):
        run(q[0], k, v, length)
    with pytest.raises(ValueError, match=r"lse is float32 \[B, C, N\] = \(2, 67, 8\); got float32 \(2, 67, 7\)"):
        rows(q, k, lse[..., 1:], length)
    with pytest.raises(ValueError, match=r"heads is a number of groups that divides N = 8; got 3"):
        rows(q, k, lse, length, heads=3)
    with pytest.raises(ValueError, match=r"queries is 1 or more, or None for all; got 0"):
        rows(q, k, lse, length, queries=0)
    with pytest.raises(ValueError, match=r"reduce must be rows or sum; got 'mean'"):
        rows(q, k, lse, length, reduce="mean")


# ---- chunks

T, N, K, H, W = 307, 4, 2, 8, 19  # more than a block of keys of the references
LENGTHS = (307, 0, 140)


@functools.cache
def whole(impl, tokens=T):
    """q, k, v and length of three prompts; their output and lse, and their mass as rows and as sum."""
    r = np.random.default_rng(SEED)
    q, k, v = (np.float32(r.normal(size=(3, tokens, heads, H))) for heads in (N, K, K))
    length = np.minimum(np.int32(LENGTHS), tokens)
    piece = attend(impl)(q, k, v, length)
    rows, total = (mass(impl, reduce)(q, k, piece.lse, length) for reduce in ("rows", "sum"))
    return jax.device_get(((q, k, v, length), piece, rows, total))


def attend(impl):
    return check_runs.compiled(flash_prefill.flash_prefill, impl, checks.SMALL_PROMPT)


def mass(impl, reduce):
    queries = W if reduce == "rows" else None
    return check_runs.compiled(
        prompt_mass.prompt_mass, impl, checks.SMALL_PROMPT, reduce=reduce, heads=K, queries=queries
    )


def rows_at(x, first, count):
    """Rows first .. first + count - 1 of each sequence of x [B, T, ...]; NaN where there are none."""
    at = np.asarray(first)[:, None] + np.arange(count)
    there = (at >= 0) & (at < x.shape[1])
    found = np.asarray(x)[np.arange(len(x))[:, None], np.clip(at, 0, x.shape[1] - 1)]
    found[~there] = np.nan
    return found


def in_chunks(impl, C, sizes, tokens=T):
    """A prompt read in chunks of up to C: sizes [chunks, B], each cut at its prompt's end; the rest follows."""
    q, k, v, length = whole(impl, tokens)[0]
    read = np.zeros(3, np.int32)
    out, lse = np.zeros(q.shape, np.float32), np.full(q.shape[:3], -np.inf, np.float32)
    total = np.zeros((3, K, tokens), np.float32)
    sizes = list(sizes)
    while (read < length).any():
        n = np.minimum(sizes.pop(0) if sizes else [C] * 3, length - read).astype(np.int32)
        after = read + n
        behind = np.arange(tokens)[None] >= (read + n)[:, None]  # what has not come yet
        seen_k, seen_v = (np.where(behind[..., None, None], np.float32(np.nan), x) for x in (k, v))
        chunk = rows_at(q, read, C)
        piece = jax.device_get(attend(impl)(chunk, seen_k, seen_v, after, first=read))
        total += np.asarray(mass(impl, "sum")(chunk, seen_k, piece.lse, after, first=read))
        for b in range(3):
            span = slice(read[b], read[b] + n[b])
            out[b, span], lse[b, span] = piece.out[b, : n[b]], piece.lse[b, : n[b]]
            assert not piece.out[b, n[b] :].any() and (piece.lse[b, n[b] :] == -np.inf).all()
        read = after  # not in place: a program may still read it
    first = length - W
    rows = mass(impl, "rows")(rows_at(q, first, W), k, rows_at(lse, first, W), length, first=first)
    return out, lse, rows, total


def same(found, impl, tokens=T):
    _, piece, rows, total = whole(impl, tokens)
    for got, want in zip(found, (piece.out, piece.lse, rows, total), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@settings(max_examples=10)
@given(
    C=st.sampled_from([150, T + 4]),
    sizes=st.lists(st.tuples(*[st.integers(0, T)] * 3), max_size=6),
)
def test_a_prompt_in_chunks_of_any_size_is_the_whole_prompt(C, sizes):
    same(in_chunks("xla", C, np.minimum(np.array(sizes, np.int32).reshape(-1, 3), C)), "xla")


@pytest.mark.parametrize(("C", "sizes", "tokens"), [(1, ((0, 1, 0),), 13), (17, ((5, 3, 17), (1, 0, 2)), 37)])
def test_a_prompt_in_chunks_is_the_whole_prompt_interpreted(C, sizes, tokens):
    same(in_chunks("interpret", C, sizes, tokens), "interpret", tokens)


def test_queries_without_a_first_position_are_those_of_the_first_tokens():
    (q, k, v, length), piece, _, _ = whole("xla")
    got = attend("xla")(q[:, :61], k, v, length)
    for mine, all_of_them in zip(got, piece, strict=True):
        np.testing.assert_allclose(mine, all_of_them[:, :61], atol=1e-5)
    total = mass("xla", "sum")(q[:, :61], k, got.lse, length)
    np.testing.assert_allclose(np.sum(total, axis=(1, 2)), N * np.minimum(length, 61), rtol=1e-5)


def test_a_chunk_visits_the_blocks_of_keys_up_to_the_last_query_that_exists():
    at = jnp.arange(3, dtype=jnp.int32)[None] + jnp.array([[0], [600], [-3]], jnp.int32)
    q, count = jnp.zeros((3, 3, 1, 16)), jax.jit(lambda queries: prompts.over_keys(queries, 1000, visited, 0))
    visited = lambda n, start, key: n + 1
    for length, blocks in (((2, 0, 9), 1), ((1000, 602, 0), 3), ((0, 0, 9), 0)):
        queries = prompts.gathered(q, at, jnp.array(length, jnp.int32), 1, q.dtype, at[:, 0])
        assert count(queries) == blocks
