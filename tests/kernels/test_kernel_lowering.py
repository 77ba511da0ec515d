"""Every kernel becomes one Triton call on GPUs that are not here, at the shapes of real models."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import backend, int8_decode, packed_decode, shapes, sparse_decode

KINDS = ("float32", "bfloat16", "float16", "int8_token", "int8_channel")


def calls(gpu, function, *args) -> list[str]:
    """The custom calls of the program; StableHLO's own marks of sharding are none."""
    return sorted(set(re.findall(r"custom_call @([\w$.]+)", backend.lower_for(gpu, function, *args))))


def arguments(name: str, kind: str, head_major: bool, P: int):
    """The decode functions for a shape and kind of rows, and what they take."""
    s = shapes.named(name)
    B, K, H, M = s.batch, s.n_kv_heads, s.head_dim, s.kept(0.8)
    rows = (B, K, M, H) if head_major else (B, s.context, K, H)
    some = lambda shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    index, bias = some((B, P, M), "int32"), some((B, P, M), "float32")
    coded = kind.startswith("int8")
    q = some((B, s.n_heads, H), "bfloat16" if coded else kind)
    if kind == "int8_token":
        x = int8_decode.PerToken(some(rows, "int8"), some(rows[:3], "bfloat16"), some(rows[:3], "int8"))
    elif kind == "int8_channel":
        x = int8_decode.PerChannel(some(rows, "int8"), *[some((B, K, H), "float32")] * 2)
    else:
        x = some(rows, kind)
    if head_major:
        function = int8_decode.packed_decode_int8 if coded else packed_decode.packed_decode
        return functools.partial(function, impl="pallas"), (q, x, x, bias)
    function = int8_decode.sparse_decode_int8 if coded else sparse_decode.sparse_decode
    return functools.partial(function, impl="pallas"), (q, x, x, index, bias)


@pytest.mark.parametrize("gpu", backend.GPUS)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_lowers_to_one_triton_call(gpu, kind):
    for name in ("llama-3-8b/b64/c8192", "opt-6.7b/b4/c640"):
        for head_major in (False, True):
            function, args = arguments(name, kind, head_major, P=1)
            assert calls(gpu, function, *args) == ["__gpu$xla.gpu.triton"]


def test_decode_lowers_at_named_shapes_of_every_model_and_size():
    """Also with a list per kv head, which the largest store addresses beyond 32 bits."""
    for i, name in enumerate(shapes.all_names()[::5]):
        function, args = arguments(name, KINDS[i % len(KINDS)], bool(i % 2), P=shapes.named(name).n_kv_heads)
        assert calls(backend.GPUS[-1], function, *args) == ["__gpu$xla.gpu.triton"], name


@pytest.mark.parametrize("H", [32, 64, 80, 96, 256])
def test_decode_lowers_for_head_dimensions_that_are_no_power_of_two(H):
    some = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    index = jax.ShapeDtypeStruct((2, 1, 131), jnp.int32)
    function = functools.partial(sparse_decode.sparse_decode, impl="pallas")
    for n_heads in (4, 16):
        args = some(2, n_heads, H), some(2, 641, 4, H), some(2, 641, 4, H), index
        assert calls(backend.GPUS[0], function, *args) == ["__gpu$xla.gpu.triton"]


@pytest.mark.parametrize("kind", ["int8_token", "int8_channel"])
def test_codes_that_pallas_would_address_wrongly_do_not_reach_a_kernel(kind):
    """It counts in signed 32 bits up to 4 GiB: elements of one byte from 2**31 on would lie before the first."""
    gpu = backend.GPUS[-1]
    for name in ("opt-6.7b/b64/c8192", "opt-13b/b64/c32768"):  # 2**31 codes, and more than 4 GiB
        function, args = arguments(name, kind, head_major=False, P=1)
        assert calls(gpu, function, *args) == ["__gpu$xla.gpu.triton"]
    function, args = arguments("opt-13b/b64/c8192", kind, head_major=False, P=1)
    with pytest.raises(ValueError, match="impl=pallas cannot run: k has 2684354560 elements of int8, more than 2147"):
        calls(gpu, function, *args)
    assert calls(gpu, functools.partial(function, impl="auto"), *args) == []


def test_a_target_that_is_no_gpu_is_refused():
    function, args = arguments("opt-6.7b/b4/c640", "bfloat16", True, 1)
    with pytest.raises(ValueError, match="it needs a GPU, and the device is cpu"):
        jax.jit(function).lower(*args)


def test_names_of_shapes_say_what_they_are():
    assert shapes.named("llama-3-8b/b64/c8192") == (32, 8, 128, 64, 8192)
    assert shapes.named("llama-3-8b/b64/c8192").kept(0.8) == 1638
    assert len(shapes.all_names()) == len(set(shapes.all_names())) == 84
    for wrong in ("opt-7b/b4/c640", "opt-13b/4/640", "opt-13b/b0/c640"):
        with pytest.raises(ValueError, match=r"a shape is MODEL/bBATCH/cCONTEXT, MODEL one of opt-6\.7b"):
            shapes.named(wrong)
