"""int4 against float64 NumPy: the error bound of a group, what lies in a byte, what moves, attention, bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alisa_jax import codecs
from alisa_jax.codecs import Int4
from alisa_jax.codecs.int4 import GroupCodes
from alisa_jax.kv.state import tree_bytes
from alisa_jax.spec import SpecError
from tests import encoded

B, K, M, S, G = 2, 3, 5, 11, 2
SHAPES = [(8, 64), (5, 2), (10, 4), (130, 64)]  # channels and group: one group, odd ones, a last group that is not full


def normal(seed, *shape):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1])) + rng.normal(size=shape[-1])).astype(np.float32)


def spread(x, group, H):
    """x [..., n] for every channel of its groups."""
    return np.repeat(np.asarray(x, np.float64), group, -1)[..., :H]


def decoded(packed: GroupCodes, group: int) -> np.ndarray:
    """The values that codes stand for, float64: channel c in the lower half of byte c, the others in the upper halves."""
    codes, H = np.asarray(packed.codes), packed.channels
    half = -(-H // 2)
    of_channel = [codes[..., c] % 16 if c < half else codes[..., c - half] // 16 for c in range(H)]
    zero, scale = spread(packed.zero, group, H), spread(packed.scale, group, H)
    return scale * (np.stack(of_channel, -1).astype(np.float64) - zero)


def fill(codec, x, layout="tokens"):
    return jax.jit(lambda x: codec.fill(codec.empty(x.shape, layout, "k"), x, layout))(jnp.asarray(x))


CODEC = Int4(4).resolve(jnp.float32)
FILL = jax.jit(CODEC.codes_of)
values = hnp.arrays(
    np.float32,
    (1, 3, 2, 10),
    elements=st.one_of(
        st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 1.0, -1.0, 1000.0, 1e-20, -1e-20, 3e30, -3e30])
    ),
)


@given(x=values)
@settings(max_examples=150, deadline=None)
def test_the_error_is_at_most_half_a_step_of_its_group(x):
    packed = FILL(x)
    error = np.abs(decoded(packed, 4) - x.astype(np.float64))
    step = spread(packed.scale, 4, 10)
    assert (error <= step * 0.5 * (1 + 1e-4) + np.abs(x) * 2.0**-22 + 1e-29).all()
    held = np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 2))).reshape(1, 3, 2, 3, 4).astype(np.float64)
    width = np.maximum(held.max(-1), 0) - np.minimum(held.min(-1), 0)
    assert (np.asarray(packed.scale, np.float64) <= np.maximum(width / 15 * (1 + 2.0**-6), 2.0**-99)).all()


@given(value=st.floats(-(2.0**100), 2.0**100, width=32))
@settings(max_examples=60, deadline=None)
def test_constant_and_all_zero_groups_are_safe(value):
    packed = FILL(np.full((1, 3, 2, 10), value, np.float32))
    assert (np.asarray(packed.scale, np.float64) > 0).all()
    np.testing.assert_allclose(decoded(packed, 4), np.float64(value), rtol=2.0**-6, atol=1e-29)
    if value == 0:
        assert (decoded(packed, 4) == 0).all()


@pytest.mark.parametrize("H, group", SHAPES)
def test_tokens_written_one_by_one_equal_a_filled_prompt_and_move_bit_for_bit(H, group):
    codec, x = Int4(group).resolve(jnp.float32), normal(1, B, S, K, H)
    write_token = jax.jit(functools.partial(encoded.write_token, codec), donate_argnums=0)
    write_slot = jax.jit(functools.partial(encoded.write_slot, codec), donate_argnums=0)
    begin = jax.jit(lambda: (codec.empty((B, S, K, H), "tokens", "k"), codec.empty((B, K, S, H), "slots", "k")))
    store, slots = begin()
    for t in range(S):
        here = jnp.full((B,), t, jnp.int32)
        store, slots = write_token(store, x[:, t], here), write_slot(slots, x[:, t], here[:, None])
    filled = fill(codec, x)
    for a, b, c in zip(*map(jax.tree.leaves, (filled, store, slots)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.swapaxes(np.asarray(c), 1, 2), a)
    pos, to = np.int32([[[7, -1, 2]], [[0, 10, 5]]]), np.int32([[[4, -1, 0]], [[1, 3, 2]]])
    move = jax.jit(lambda s, p, to: codec.copy_in(codec.empty((B, K, M, H), "slots", "k"), codec.take(s, p), to))
    moved = move(store, pos, to)
    for old, new in zip(jax.tree.leaves(store), jax.tree.leaves(moved), strict=True):
        for b, e in [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]:
            np.testing.assert_array_equal(np.asarray(new)[b, :, to[b, 0, e]], np.asarray(old)[b, pos[b, 0, e]])
    again = codec.rebuild(store, codec.leaves(store))
    assert jax.tree.structure(again) == jax.tree.structure(store) and again.channels == H


@pytest.mark.parametrize("H, group", SHAPES)
def test_attention_on_codes_equals_attention_on_decoded_values(H, group):
    codec = Int4(group).resolve(jnp.float32)
    x, q, p = normal(2, B, K, 600, H), normal(3, B, K, G, H), np.random.default_rng(4).random((B, K, G, 600))
    p = (p / p.sum(-1, keepdims=True) * np.array([1.0, 0.0])[:, None, None, None]).astype(np.float32)
    packed = fill(codec, x, "slots")
    logits, mixed = jax.jit(codec.logits)(q, packed), jax.jit(codec.mix)(p, packed)
    assert logits.dtype == mixed.dtype == jnp.float32
    y = decoded(packed, group)
    np.testing.assert_allclose(logits, np.einsum("bkgh,bkmh->bkgm", q.astype(np.float64), y), rtol=1e-5, atol=2e-4)
    np.testing.assert_allclose(mixed, np.einsum("bkgm,bkmh->bkgh", p.astype(np.float64), y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("H, group", [*SHAPES, (64, 64), (128, 64), (128, 32), (1, 1)])
def test_bytes_are_those_of_the_arrays_scales_included(H, group):
    codec, tokens = Int4(group).resolve(jnp.bfloat16), 96
    homes = jax.eval_shape(lambda: [codec.empty((B, tokens, K, H), "tokens", part) for part in "kv"])
    assert tree_bytes(homes) == B * tokens * codec.token_bytes(K, H)
    if (H, group) == (128, 64):
        assert codec.token_bytes(K, H) <= 0.28 * 2 * K * H * 2  # of bfloat16: 4 bits, and 3 bytes a group


def test_no_float_copy_of_the_codes_is_made_on_a_cpu():
    codec, shape = Int4().resolve(jnp.float32), (2, 4, 4096, 64)
    packed = codec.empty(shape, "slots", "k")
    q, p = jnp.zeros((2, 4, 1, 64)), jnp.zeros((2, 4, 1, 4096))
    for form, x in ((codec.logits, q), (codec.mix, p)):
        temporary = jax.jit(form).lower(x, packed).compile().memory_analysis().temp_size_in_bytes
        assert temporary < tree_bytes(packed), temporary  # a float32 copy would be eight times the codes


def test_specs_name_the_codec_and_bad_ones_are_refused():
    assert codecs.parse("int4") == Int4() == Int4(64) and codecs.parse("int4(group=32)").group == 32
    with pytest.raises(SpecError, match="group must be at least 1 channel; got 0"):
        codecs.parse("int4(group=0)")
