"""Attention on int8 codes, scales folded, against read-then-attend in float64, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend, int8_decode
from pallas_kernels.int8_decode import PerChannel, PerToken
from pallas_kernels.tilings import DecodeTiling
from tests.kernels.oracle import SEED, decode, error, lse_error

SMALL = DecodeTiling(rows=16, splits=2)
SHAPES = {"G1": (2, 3, 1, 64, 37, 23, 1), "G4": (2, 3, 4, 32, 53, 41, 3), "G8": (1, 2, 8, 80, 31, 29, 1)}


def codes(r, kind, shape, token_axis: int):
    """Codes with zero points over the whole of int8, and their values in float64."""
    each = shape[:3] if kind is PerToken else (shape[0], shape[3 - token_axis], shape[3])
    scale = r.uniform(0.002, 0.02, each).astype(np.float32)
    zero = r.integers(-128, 128, each).astype(np.int8 if kind is PerToken else np.float32)
    if kind is PerToken:
        scale = np.asarray(jnp.asarray(scale, jnp.bfloat16))
    c = r.integers(-128, 128, shape).astype(np.int8)
    axis = 3 if kind is PerToken else token_axis
    values = (c.astype(np.float64) - np.expand_dims(zero, axis)) * np.expand_dims(scale.astype(np.float64), axis)
    return kind(*(jnp.asarray(x) for x in (c, scale, zero))), values


def inputs(kind, shape, token_axis: int, dtype="float32"):
    B, K, G, H, S, M, P = shape
    r = np.random.default_rng(SEED)
    rows = (B, S, K, H) if token_axis == 1 else (B, K, M, H)
    q = jnp.asarray(r.normal(size=(B, K * G, H)), jnp.dtype(dtype))
    (k, k_wide), (v, v_wide) = (codes(r, kind, rows, token_axis) for _ in "kv")
    index = jnp.asarray(r.integers(-1, S, (B, P, M)), jnp.int32)
    bias = r.choice([0.0, np.log(5.0), -np.inf], (B, P, M)).astype(np.float32)
    if B > 1:
        bias[1, 0] = -np.inf
    return q, k, v, index, jnp.asarray(bias), k_wide, v_wide


@functools.cache
def compiled(function, impl):
    tiling = SMALL if impl == "interpret" else None
    return jax.jit(functools.partial(function, impl=impl, tiling=tiling))


@pytest.mark.parametrize("impl", ["interpret", "xla"])
@pytest.mark.parametrize("kind", [PerToken, PerChannel])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_folded_scales_equal_read_then_attend(shape, kind, impl):
    if impl == "xla" and shape is not SHAPES["G4"]:
        pytest.skip("one shape is enough for the reference")
    for token_axis in (1, 2):
        q, k, v, index, bias, k_wide, v_wide = inputs(kind, shape, token_axis)
        if token_axis == 1:
            part, mass = compiled(int8_decode.sparse_decode_int8, impl)(q, k, v, index, bias)
        else:
            part, mass = compiled(int8_decode.packed_decode_int8, impl)(q, k, v, bias)
        out, lse, weights, _ = decode(q, k_wide, v_wide, index if token_axis == 1 else None, bias, token_axis == 2)
        for got, want in ((part.out, out), (mass, weights)):
            assert error(got, want) <= 1e-5, f"seed {SEED}"
        assert lse_error(part.lse, lse) <= 1e-5, f"seed {SEED}"


@pytest.mark.parametrize("kind", [PerToken, PerChannel])
def test_products_in_half_precision_stay_within_its_error(kind):
    q, k, v, index, bias, k_wide, v_wide = inputs(kind, SHAPES["G4"], 1, "bfloat16")
    part, mass = compiled(int8_decode.sparse_decode_int8, "interpret")(q, k, v, index, bias)
    out, lse, weights, _ = decode(q.astype(jnp.float32), k_wide, v_wide, index, bias, False)
    assert error(part.out, out) <= 1e-2, f"seed {SEED}"
    assert error(mass, weights) <= 2e-2, f"seed {SEED}"


@pytest.mark.parametrize("kind", [PerToken, PerChannel])
def test_no_unpacked_array_is_made(kind):
    """Between codes and result no float array is as large as the codes."""
    q, k, v, index, bias, *_ = inputs(kind, (2, 3, 4, 32, 1024, 512, 1), 1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (q, k, v, index, bias))
    run = functools.partial(int8_decode.sparse_decode_int8, impl="pallas")
    text = backend.lower_for(backend.GPUS[-1], run, *shapes)
    program = text[text.index("func.func public @main") :]
    assert "tensor<2x1024x3x32xi8>" in program  # the codes go into the kernel as they are
    assert "1024x3x32xf" not in program and "x512x32xf" not in program


def test_scales_that_do_not_fit_are_refused_in_one_sentence():
    q, k, v, index, bias, *_ = inputs(PerToken, SHAPES["G4"], 1)
    with pytest.raises(ValueError, match=r"scale and zero \(2, 53, 3\); v is PerToken of int8 with \(2, 53\)"):
        int8_decode.sparse_decode_int8(q, k, v._replace(scale=v.scale[:, :, 0]), index, bias)
    other = inputs(PerChannel, SHAPES["G4"], 1)[2]
    with pytest.raises(ValueError, match=r"v is PerChannel"):
        int8_decode.sparse_decode_int8(q, k, other, index, bias)
    with pytest.raises(ValueError, match=r"k is PerToken of float32"):
        int8_decode.sparse_decode_int8(q, k._replace(codes=k.codes.astype(jnp.float32)), v, index, bias)
