"""The checks of kernels: that they can fail, each in what it looks at; their order; and what they need to be imported."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from pallas_kernels import (
    bench,
    cases,
    check_runs,
    checks,
    flash_prefill,
    int8_decode,
    oracle,
    prompt_mass,
    sparse_decode,
)
from tests.full import seed

SEED = seed()
BY_NAME = {check.name: check for check in checks.ALL}
SPARSE = BY_NAME["sparse_decode/four heads/float32/16x2"]


def altered(monkeypatch, function, alter):
    """Programs of `function` return what `alter` makes of their results."""
    right = check_runs.compiled

    def compiled(asked, *args, **options):
        run = right(asked, *args, **options)
        return (lambda *arrays, **more: alter(run(*arrays, **more))) if asked is function else run

    monkeypatch.setattr(check_runs, "compiled", compiled)


@pytest.mark.parametrize(
    ("alter", "note"),
    [
        (lambda part, mass: (part._replace(out=part.out * 1.0001), mass), "out is off by"),
        (lambda part, mass: (part._replace(out=part.out[:, ::-1]), mass), "out is off by"),
        (lambda part, mass: (part._replace(out=part.out + 1e-9), mass), "out is not 0 where nothing is attended"),
        (lambda part, mass: (part._replace(lse=part.lse + 1e-4), mass), "lse is off by"),
        (lambda part, mass: (part._replace(lse=abs(part.lse)), mass), "lse is off by inf"),
        (lambda part, mass: (part, mass.at[0, 0, 0].add(1e-4)), "mass is off by"),
        (lambda part, mass: (part, mass * np.nan), "mass is off by inf"),
        (lambda part, mass: (part, mass.astype("bfloat16")), "mass is bfloat16, not float32"),
    ],
)
def test_a_wrong_output_fails_a_check(monkeypatch, alter, note):
    altered(monkeypatch, sparse_decode.sparse_decode, lambda found: alter(*found))
    record = checks.run(SPARSE, "xla", SEED)
    assert record["passed"] is False and note in record["note"], f"{record}"
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("function", "name", "note"),
    [
        (int8_decode.sparse_decode_int8, "sparse_decode_int8_token/four heads/float32/16x2", "out is off by"),
        (sparse_decode.sparse_decode, "partial/four heads/float32/16x2", "out is off by"),
        (sparse_decode.sparse_decode, "sparse_decode/four heads/float32/16x2/sums", "sum is off by"),
        (flash_prefill.flash_prefill, "flash_prefill/less than a tile/float32/32x16", "out is off by"),
        (prompt_mass.prompt_mass, "prompt_mass_sum/less than a tile/W=all P=2/float32/32x16", "mass is off by"),
    ],
)
def test_a_thousandth_too_much_fails_the_check_of_every_kind_of_kernel(monkeypatch, function, name, note):
    altered(monkeypatch, function, lambda found: jax.tree.map(lambda x: x * 1.001, found))
    record = checks.run(BY_NAME[name], "xla", SEED)
    assert record["passed"] is False and note in record["note"], f"{record}"


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (sparse_decode.sparse_decode, "sparse_decode/four heads/float32/16x2/poison"),
        (sparse_decode.sparse_decode, "sparse_decode/four heads/float32/16x2/no mass"),
        (flash_prefill.flash_prefill, "flash_prefill/less than a tile/float32/32x16/beyond"),
    ],
)
def test_a_bit_that_changes_fails_a_check(monkeypatch, function, name):
    factors = iter((1.0, 1.0 + 2e-7))
    scaled = lambda found, factor: jax.tree.map(lambda x: x * factor, found)
    altered(monkeypatch, function, lambda found: scaled(found, next(factors)))
    record = checks.run(BY_NAME[name], "xla", SEED)
    assert record["passed"] is False and "the results change" in record["note"], f"{record}"


@pytest.mark.parametrize("kernel", ["packed_decode", "prompt_mass_rows"])
def test_at_named_shapes_the_reference_in_half_precision_is_right(kernel):
    check = next(c for c in checks.ALL if c.kernel == kernel and isinstance(c.shape, str))
    record = checks.run(check._replace(shape="llama-3-8b/b2/c80"), "xla", SEED)
    assert record["passed"] and record["oracle"] == "xla float32", f"{record}"
    assert record["mass_error"] >= 0 and record["batch"] == 2  # a number: newer XLA gives masses without any error


def test_errors_at_named_shapes_are_told_of_rows_and_of_single_masses():
    """A small row that is wrong is not hidden by a large one that is right."""
    want = np.float32([[3e3, 4e3], [3e-3, 4e-3]])
    got = want + np.float32([[0.0, 0.0], [5e-4, 0.0]])
    assert float(check_runs._off("out", got, want)) == pytest.approx(0.1, rel=1e-4)
    assert float(check_runs._off("mass", got, want)) == pytest.approx(1 / 6, rel=1e-4)
    assert float(check_runs._off("lse", got, want)) == pytest.approx(5e-4, rel=1e-4)
    zero = np.zeros(2, np.float32)
    assert float(check_runs._off("mass", zero, zero)) == 0 and float(check_runs._off("mass", zero + 1, zero)) == np.inf
    assert np.isnan(check_runs._off("mass", zero * np.nan, zero + 1))


def test_an_infinite_error_is_told_of_either_sign():
    assert oracle.error([np.inf, 1.0], [-np.inf, 1.0]) == np.inf
    assert oracle.error([-np.inf, 1.5], [-np.inf, 1.0]) == 0.5
    assert oracle.error([np.nan], [1.0]) == oracle.error([1.0], [np.inf]) == oracle.error([1.0, 1.0], [1.0]) == np.inf


def test_an_order_has_every_check_once_and_every_kernel_early():
    order = checks.sample(SEED)
    assert sorted(c.name for c in order) == sorted(BY_NAME) and len(BY_NAME) == len(checks.ALL)
    assert {c.kernel for c in order[: len(checks.KERNELS)]} == set(checks.KERNELS)
    assert not any(c.large for c in order[: len(checks.KERNELS)])
    assert checks.sample(SEED) == order and checks.sample(SEED + 1) != order
    assert set(checks.sample(SEED, large=False)) == {c for c in checks.ALL if not c.large}


def test_every_kernel_is_checked_at_the_shapes_that_are_timed():
    decode, prompts = bench.SHAPES["gpu"]
    for kernel in (*cases.DECODE, *cases.PROMPT):
        named = [c.shape for c in checks.ALL if c.kernel == kernel and isinstance(c.shape, str)]
        assert named == list(prompts if kernel in cases.PROMPT else decode)


def test_checks_need_jax_and_numpy_alone():
    code = (
        "import sys; from pallas_kernels import checks; "
        "print([name for name in ('pytest', 'hypothesis', 'flax', 'absl', 'tests') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
