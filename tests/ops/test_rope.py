"""Rotary positions against float64 NumPy: as models and as caches call them; their frequencies; their gain."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.ops.rope import NO_ROTATION, RopeScaling, Rotation, apply_gain, inverse_frequencies, rotate

H, LONGEST = 14, 500
ROTATIONS = {
    "plain": Rotation.of(H, 700.0, LONGEST),
    "leading channels": Rotation.of(6, 700.0, LONGEST),
    "linear": Rotation.of(H, 700.0, LONGEST, RopeScaling("linear", 4.0)),
    "llama3": Rotation.of(H, 5e5, LONGEST, RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    "yarn": Rotation.of(H, 1e4, LONGEST, RopeScaling("yarn", 4.0, original_max_positions=64, attention_factor=1.14)),
    "yarn of leading channels": Rotation.of(
        6, 1e4, LONGEST, RopeScaling("yarn", 4.0, original_max_positions=64, attention_factor=0.7)
    ),
}


def rows(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def rotated(x, positions, rotation):
    """x [..., H] times gain e^(i angle) of its position, its pairs of channels as complex numbers, in float64."""
    half = len(rotation.angles)
    angle = np.float64(positions)[..., None] * np.array(rotation.angles)
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle) * rotation.gain
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_is_a_product_of_complex_numbers(name, dtype):
    """q as models rotate it, token-major, one position for all heads; keys as caches do, head-major, one or one each."""
    rotation, rng = ROTATIONS[name], np.random.default_rng(1)
    x = jnp.asarray(rows((2, 5, 3, H)), dtype)
    at = rng.integers(0, LONGEST, (2, 5)).astype(np.int32)
    at[0, 0] = 0
    each = rng.integers(0, LONGEST, (2, 3, 5)).astype(np.int32)
    keys = jnp.swapaxes(x, 1, 2)
    cases = [(x, at[:, :, None]), (keys, at[:, None]), (keys, each)]
    got = [rotate(y, jnp.asarray(p), rotation) for y, p in cases]
    assert {y.dtype for y in got} == {x.dtype}
    step = 2.0**-8 if dtype == jnp.bfloat16 else 0.0  # half a unit of the last place, and once more for the sum
    for (y, p), result in zip(cases, got, strict=True):
        want = rotated(np.asarray(y, np.float64), p, rotation)
        np.testing.assert_allclose(np.asarray(result, np.float64), want, rtol=step, atol=2e-4)
    np.testing.assert_array_equal(got[0], jnp.swapaxes(got[1], 1, 2))  # to the bit, whichever the layout
    rest = 2 * len(rotation.angles)
    np.testing.assert_array_equal(got[0][..., rest:], x[..., rest:])


@pytest.mark.parametrize("name", ROTATIONS)
def test_the_gain_is_what_is_left_at_position_0(name):
    x, rotation = jnp.float32(rows((2, 3, H))), ROTATIONS[name]
    assert (rotation.gain != 1) == name.startswith("yarn")
    got = apply_gain(x, rotation)
    np.testing.assert_array_equal(got, rotate(x, jnp.zeros((2, 1), jnp.int32), rotation))
    if rotation.gain == 1:
        assert got is x


def test_a_rotation_is_static_and_nothing_is_done_for_one_without_angles():
    calls = []

    def run(x, rotation):
        calls.append(rotation)
        return rotate(x, jnp.arange(2, dtype=jnp.int32), rotation)

    jitted = jax.jit(run, static_argnums=1)
    x = jnp.float32(rows((2, H)))
    for _ in range(2):  # equal ones made anew share one program
        jitted(x, Rotation.of(6, 700.0, LONGEST))
    assert len(calls) == 1 and calls[0] == ROTATIONS["leading channels"] != ROTATIONS["plain"]
    assert rotate(x, jnp.arange(2, dtype=jnp.int32), NO_ROTATION) is x and apply_gain(x, NO_ROTATION) is x


def test_rotated_logits_depend_on_the_distance_alone():
    q, k = jnp.float32(rows(H, seed=1)), jnp.float32(rows(H, seed=2))

    def logit(*positions):
        a, b = (rotate(x, jnp.int32(p), ROTATIONS["plain"]) for x, p in zip((q, k), positions, strict=True))
        return float(jnp.sum(a * b))

    assert logit(107, 96) == pytest.approx(logit(11, 0), abs=1e-4)
    assert abs(logit(11, 0) - logit(12, 0)) > 1e-3


def test_llama3_scaling_leaves_fast_frequencies_and_divides_slow_ones():
    """The rule of the released model, wavelength by wavelength."""
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    plain, scaled = inverse_frequencies(128, 5e5), inverse_frequencies(128, 5e5, scaling)
    kinds = set()
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            kinds.add("fast")
            want = before
        elif wavelength > 8192:
            kinds.add("slow")
            want = before / 8
        else:
            kinds.add("between")
            share = (8192 / wavelength - 1) / (4 - 1)
            want = (1 - share) * before / 8 + share * before
        assert after == pytest.approx(want, rel=1e-12)
    assert kinds == {"fast", "slow", "between"}


def test_linear_scaling_is_a_division_of_positions():
    plain, scaled = Rotation.of(22, 1e4, LONGEST), Rotation.of(22, 1e4, LONGEST, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(scaled.angles, np.array(plain.angles) / 4)
    np.testing.assert_array_equal(plain.angles, 1e4 ** (-np.arange(0, 22, 2) / 22))
