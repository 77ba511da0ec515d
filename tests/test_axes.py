"""The axis alphabet and its check."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import axes


def test_alphabet_in_the_docstring_is_the_alphabet_in_the_code():
    table = axes.__doc__.split("\n\n")[1]
    assert sorted(re.findall(r"(?<!\S)([A-Z])  ", table)) == sorted(axes.LETTERS)
    assert len(set(axes.LETTERS)) == len(axes.LETTERS)


def test_check_returns_the_size_of_every_letter():
    assert axes.check("B K M H", np.zeros((2, 3, 5, 7))) == {"B": 2, "K": 3, "M": 5, "H": 7}


def test_check_returns_known_sizes_too_and_leaves_them_alone():
    sizes = axes.check("B T", jnp.zeros((2, 11)))
    assert axes.check("B S", jnp.zeros((2, 13)), sizes) == {"B": 2, "T": 11, "S": 13}
    assert sizes == {"B": 2, "T": 11}


def test_integers_are_sizes():
    assert axes.check("B 1 W 4", np.zeros((2, 1, 3, 4))) == {"B": 2, "W": 3}


def test_empty_spec_is_a_scalar():
    assert axes.check("", np.float32(1.0)) == {}


def test_check_works_on_tracers_and_shape_structs():
    def shapes(x):
        return jnp.full((), axes.check("B D", x)["D"], jnp.int32)

    assert int(jax.jit(shapes)(jnp.zeros((2, 7)))) == 7
    assert axes.check("L V", jax.ShapeDtypeStruct((3, 5), jnp.float32)) == {"L": 3, "V": 5}


@pytest.mark.parametrize(
    ("spec", "shape", "sizes", "sentence"),
    [
        (
            "B K M H",
            (2, 3, 5),
            None,
            "keys has shape (2, 3, 5), expected [B, K, M, H]: 4 axes, not 3",
        ),
        (
            "B K M H",
            (2, 3, 5, 7),
            {"B": 2, "H": 8},
            "keys has shape (2, 3, 5, 7), expected [B, K, M, H] with B = 2, H = 8: size 8 on axis 3, not 7",
        ),
        ("S S", (4, 5), None, "keys has shape (4, 5), expected [S, S]: size 4 on axis 1, not 5"),
        ("B 1", (4, 5), None, "keys has shape (4, 5), expected [B, 1]: size 1 on axis 1, not 5"),
    ],
)
def test_mismatch_names_the_array_its_shape_and_the_expected_axes(spec, shape, sizes, sentence):
    with pytest.raises(ValueError) as error:
        axes.check(spec, np.zeros(shape), sizes, name="keys")
    assert str(error.value) == sentence


def test_array_without_a_name_is_called_array():
    with pytest.raises(ValueError, match="^array has shape"):
        axes.check("B", np.zeros((2, 3)))


def test_what_has_no_shape_is_refused():
    with pytest.raises(ValueError) as error:
        axes.check("B T", [[1, 2]], name="tokens")
    assert str(error.value) == "tokens must be an array of axes [B, T], got list"


@pytest.mark.parametrize("spec", ["B X", "BK", "B -1", "b", "B ²"])
def test_unknown_axes_are_refused(spec):
    with pytest.raises(ValueError, match="allowed are integers and the letters B L T S M W N K G H D V P"):
        axes.check(spec, np.zeros((2, 3)))
