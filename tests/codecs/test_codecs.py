"""The raw codec: what is written is what is read, in the named dtype, in both layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import codecs
from alisa_jax.codecs import Raw
from alisa_jax.spec import SpecError
from tests import encoded

B, K, M, S, H, G = 2, 3, 5, 7, 11, 2
DTYPES = ("float32", "bfloat16", "float16")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_written_is_read_back_rounded_once_and_moved_bit_for_bit(dtype):
    codec, x = Raw(dtype), normal(1, B, K, H)
    rounded = np.asarray(x.astype(dtype))
    store = encoded.write_token(codec, codec.empty((B, S, K, H), "tokens", "k"), x, jnp.array([2, 6]))
    np.testing.assert_array_equal(np.asarray(store)[[0, 1], [2, 6]], rounded)
    codes = codec.take(store, jnp.array([[[2]], [[6]]]))
    slots = codec.copy_in(codec.empty((B, K, M, H), "slots", "k"), codes, jnp.array([[[4]], [[0]]]))
    np.testing.assert_array_equal(np.asarray(slots)[[0, 1], :, [4, 0]], rounded)
    direct = encoded.write_slot(codec, codec.empty((B, K, M, H), "slots", "k"), x, jnp.array([[4], [0]]))
    np.testing.assert_array_equal(direct, slots)
    np.testing.assert_array_equal(codec.slice_tokens(store, jnp.int32(2), 3)[0, :, 0], rounded[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_filling_a_prompt_equals_writing_its_tokens_one_by_one(dtype):
    codec, x = Raw(dtype), normal(2, B, S, K, H)
    filled = codec.fill(codec.empty((B, S, K, H), "tokens", "k"), x, "tokens")
    one_by_one = codec.empty((B, S, K, H), "tokens", "k")
    for t in range(S):
        one_by_one = encoded.write_token(codec, one_by_one, x[:, t], jnp.full((B,), t))
    np.testing.assert_array_equal(filled, one_by_one)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_both_products_of_attention_are_float32_and_close_to_float64(dtype, tolerance):
    codec, q, k = Raw(dtype), normal(3, B, K, G, H), normal(4, B, K, M, H)
    p = jax.nn.softmax(normal(5, B, K, G, M), axis=-1)
    packed = codec.fill(codec.empty((B, K, M, H), "slots", "k"), k, "slots")
    logits, mixed = codec.logits(q, packed), codec.mix(p, packed)
    assert logits.dtype == mixed.dtype == jnp.float32
    q, k, p = (np.asarray(x, np.float64) for x in (q, k, p))
    np.testing.assert_allclose(logits, np.einsum("bkgh,bkmh->bkgm", q, k), atol=tolerance * 10)
    np.testing.assert_allclose(mixed, np.einsum("bkgm,bkmh->bkgh", p, k), atol=tolerance * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_bytes_is_what_the_arrays_take(dtype):
    codec = Raw(dtype)
    pair = [codec.empty((B, S, K, H), "tokens", part) for part in "kv"]
    assert codec.token_bytes(K, H) == sum(x.nbytes for x in pair) / (B * S)


def test_growing_extends_the_token_axis_of_either_layout():
    codec = Raw("float32")
    assert codec.grow(jnp.ones((B, K, M, H)), M + 2, "slots").shape == (B, K, M + 2, H)
    assert codec.grow(jnp.ones((B, S, K, H)), S + 2, "tokens").shape == (B, S + 2, K, H)


def test_model_means_the_dtype_of_the_model():
    assert Raw().resolve(jnp.bfloat16) == Raw("bfloat16")
    assert Raw("float16").resolve(jnp.bfloat16) == Raw("float16")


def test_specs_name_codecs():
    assert codecs.parse("raw") == Raw() and codecs.parse("raw(dtype=bfloat16)") == Raw("bfloat16")
    with pytest.raises(SpecError, match="dtype must be one of model, float32, bfloat16, float16; got 'int8'"):
        codecs.parse("raw(dtype=int8)")
    with pytest.raises(SpecError, match="zip"):
        codecs.parse("zip")
