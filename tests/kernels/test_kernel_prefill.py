"""`flash_prefill` and `prompt_mass`, interpreted, and their references, against float64 NumPy, fresh inputs at every run."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend, cases, check_runs, checks, flash_prefill
from tests.full import seed

SEED = seed()
ALL = [c for c in checks.ALL if c.kernel in cases.PROMPT and not isinstance(c.shape, str)]
PROMPTS = [c for c in ALL if not c.large]
BLOCKS = checks.PROMPTS["more than a block of the references"].context
# of the references: all that is asked of the mass, what is asked beside right numbers, bfloat16, and many blocks
REFERENCES = [
    c
    for c in ALL
    if (c in PROMPTS and c.kernel != "flash_prefill" and (c.dtype, c.kind) == ("float32", ""))
    or c.kind in ("poison", "sums", "overflow", "beyond")
    or (c in PROMPTS and c.dtype == "bfloat16")
    or c.shape.context == BLOCKS
]


def inputs(label):
    """q, k, v and length."""
    return check_runs.prompts(PROMPTS[0]._replace(shape=checks.PROMPTS[label]), SEED)


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
    mass = check_runs.compiled(flash_prefill.prompt_mass, "xla", None, reduce="sum")
    for function, args in ((attend, (q, q, q)), (mass, (q, q, lse))):
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
    q, k, v, length = inputs(checks.GROUPED)
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
