"""Attention on int8 codes, scales folded, against read-then-attend in float64, interpreted."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import backend, check_runs, checks, int8_decode
from tests.full import seed

SEED = seed()
INT8 = [c for c in checks.ALL if "_int8_" in c.kernel and not c.large]
LARGER = check_runs.Lists(2, 3, 4, 32, 1024, 512, 1)


def inputs(kind, shape=checks.LISTS["four heads"]):
    """q, k, v, index and bias of `sparse_decode_int8`, with scales per `token` or `channel`."""
    check = next(c for c in INT8 if c.kernel == f"sparse_decode_int8_{kind}")
    return check_runs.lists(check._replace(shape=shape), SEED)[:5]


@pytest.mark.parametrize("check", INT8, ids=lambda c: c.name)
def test_folded_scales_equal_read_then_attend(check):
    record = checks.run(check, "interpret", SEED)
    assert record["passed"], f"{record['note']}, seed {SEED}"


# one shape is enough for the references
@pytest.mark.parametrize(
    "check",
    [c for c in INT8 if c.dtype == "float32" and c.shape == checks.LISTS["four heads"]],
    ids=lambda c: c.name,
)
def test_references_are_right(check):
    record = checks.run(check, "xla", SEED)
    assert record["passed"], f"{record['note']}, seed {SEED}"


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_the_lowered_program_makes_no_unpacked_array(kind):
    """Between codes and result no float array is as large as the codes."""
    q, k, v, index, bias = inputs(kind, LARGER)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (q, k, v, index, bias))
    run = functools.partial(int8_decode.sparse_decode_int8, impl="pallas")
    text = backend.lower_for(backend.GPUS[-1], run, *shapes)
    program = text[text.index("func.func public @main") :]
    assert "tensor<2x1024x3x32xi8>" in program  # the codes go into the kernel as they are
    assert "1024x3x32xf" not in program and "x512x32xf" not in program


def test_scales_that_do_not_fit_are_refused_in_one_sentence():
    q, k, v, index, bias = inputs("token")
    with pytest.raises(ValueError, match=r"scale and zero \(2, 53, 3\); v is PerToken of int8 with \(2, 53\)"):
        int8_decode.sparse_decode_int8(q, k, v._replace(scale=v.scale[:, :, 0]), index, bias)
    other = inputs("channel")[2]
    with pytest.raises(ValueError, match=r"v is PerChannel"):
        int8_decode.sparse_decode_int8(q, k, other, index, bias)
    with pytest.raises(ValueError, match=r"k is PerToken of float32"):
        int8_decode.sparse_decode_int8(q, k._replace(codes=k.codes.astype(jnp.float32)), v, index, bias)
