"""int8 against float64 NumPy: the error bound, the frozen range, what moves, what folds, what it weighs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alisa_jax import codecs
from alisa_jax.codecs import Int8, Rotation
from alisa_jax.codecs.int8_channel import Calibrating, ChannelCodes
from alisa_jax.codecs.int8_token import TokenCodes
from alisa_jax.kv.state import tree_bytes
from alisa_jax.spec import SpecError
from tests import encoded

B, K, M, S, H, G, C = 2, 3, 5, 11, 8, 2, 4
EXACT = Int8(calibration_tokens=C, headroom=0.0)  # the range is that of the first C tokens, and no more
CHANNEL = EXACT.resolve(jnp.float32)
TOKEN = Int8("token").resolve(jnp.float32)
CODECS = [CHANNEL, TOKEN]
AXES = ["channel", "token"]


def normal(seed, *shape):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1])) + rng.normal(size=shape[-1])).astype(np.float32)


def decoded(packed: ChannelCodes | TokenCodes, layout="tokens") -> np.ndarray:
    """The values that codes stand for, float64."""
    codes, scale, zero = (np.asarray(x, np.float64) for x in (packed.codes, packed.scale, packed.zero))
    if isinstance(packed, TokenCodes):
        return scale[..., None] * (codes - zero[..., None])
    axis = 1 if layout == "tokens" else 2
    return np.expand_dims(scale, axis) * (codes - np.expand_dims(zero, axis))


def steps(packed: ChannelCodes | TokenCodes, layout="tokens") -> np.ndarray:
    """The step of each element, broadcast against the values."""
    scale = np.asarray(packed.scale, np.float64)
    if isinstance(packed, TokenCodes):
        return scale[..., None]
    return np.expand_dims(scale, 1 if layout == "tokens" else 2)


@jax.jit
def fill_channel(x):
    codec = Int8(calibration_tokens=x.shape[1], headroom=0.0).resolve(jnp.float32)
    return codec.fill(codec.empty(x.shape, "tokens", "v"), x, "tokens")


@jax.jit
def fill_token(x):
    return TOKEN.fill(TOKEN.empty(x.shape, "tokens", "v"), x, "tokens")


FILLS = dict(zip(AXES, (fill_channel, fill_token)))
values = hnp.arrays(
    np.float32,
    (1, C, 2, H),
    elements=st.one_of(
        st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 1.0, -1.0, 1000.0, 1e-20, -1e-20, 3e30, -3e30])
    ),
)


@pytest.mark.parametrize("axis", AXES)
@given(x=values)
@settings(max_examples=150, deadline=None)
def test_the_error_is_at_most_half_a_step_inside_the_range(axis, x):
    packed = FILLS[axis](x)
    error = np.abs(decoded(packed) - x.astype(np.float64))
    # half a step, and what float32 loses on the way: x / scale is rounded once, and so is its sum with the zero point
    assert (error <= steps(packed) * 0.5 * (1 + 1e-4) + np.abs(x) * 2.0**-22 + 1e-29).all()


@pytest.mark.parametrize("axis", AXES)
@given(value=st.floats(-(2.0**100), 2.0**100, width=32))
@settings(max_examples=60, deadline=None)
def test_constant_and_all_zero_groups_are_safe(axis, value):
    packed = FILLS[axis](np.full((1, C, 2, H), value, np.float32))
    assert (np.asarray(packed.scale, np.float64) > 0).all() and np.isfinite(decoded(packed)).all()
    np.testing.assert_allclose(decoded(packed), np.float64(value), rtol=2.0**-7, atol=1e-29)
    if value == 0:
        assert (decoded(packed) == 0).all()


def test_the_zero_point_is_the_corrected_one():
    """For a range [lo, hi]: round(-lo / scale), in codes that begin at -128; the printed formula lacks the factor lo."""
    x = np.linspace(3.0, 5.1, C, dtype=np.float32)[None, :, None, None] * np.ones((1, 1, 1, H), np.float32)
    packed = fill_channel(x)
    np.testing.assert_allclose(packed.scale, 2.1 / 255, rtol=1e-6)
    np.testing.assert_array_equal(packed.zero, np.round(-3.0 / (2.1 / 255)) - 128)
    codes = np.asarray(packed.codes)[0]
    assert (codes[0] == -128).all() and (codes[-1] == 127).all()


def test_values_outside_the_frozen_range_are_clipped_and_counted():
    x = normal(1, B, S, K, H)
    x[:, C:, 0, 1] = 1e3
    x[1, -1, 2, 3] = -1e3
    packed = jax.jit(lambda x: CHANNEL.fill(CHANNEL.empty(x.shape, "tokens", "v"), x, "tokens"))(x)
    low, high = x[:, :C].min(1), x[:, :C].max(1)
    want = np.clip(x, low[:, None], high[:, None])
    assert (np.abs(decoded(packed) - want) <= steps(packed) * 0.5001).all()
    head_major = np.swapaxes(x, 1, 2)
    scale, zero = (np.asarray(a, np.float64)[:, :, None] for a in (packed.scale, packed.zero))
    code = np.round(head_major / scale + zero)
    outside = ((code < -128) | (code > 127)).sum((1, 3))
    np.testing.assert_array_equal(CHANNEL.clipped(packed, jnp.asarray(head_major)), outside)
    np.testing.assert_array_equal(CHANNEL.clipped(packed, jnp.asarray(x[:, -1])), outside[:, -1])
    assert (outside[:, :C] == 0).all() and (outside[:, C:] > 0).all()
    assert not np.asarray(TOKEN.clipped(fill_token(x), jnp.asarray(head_major))).any()


def turned(x, angles, by):
    """x [B, T, K, H] with its pairs turned by `by` [T] positions, float64."""
    half = len(angles)
    w = np.asarray(by)[:, None, None] * np.asarray(angles)
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * np.cos(w) - b * np.sin(w), a * np.sin(w) + b * np.cos(w), x[..., 2 * half :]], -1)


@pytest.mark.parametrize("angles", [(), (1.0, 0.01), (1.0, 0.1, 0.01, 0.001)], ids=["none", "partial", "all"])
def test_the_range_of_rotated_keys_holds_the_calibration_tokens_at_every_position(angles):
    positions = 300
    codec = EXACT.resolve(jnp.float32, Rotation(angles, positions))
    raw = normal(2, B, C, K, H).astype(np.float64) + 3.0  # unrotated keys of the calibration tokens, all of one sign
    first = turned(raw, angles, np.arange(C))
    later = [turned(raw[:, [t]], angles, [p]) for t in range(C) for p in (C, 77, 157, 200, positions - 1)]
    x = np.concatenate([first, *later], 1).astype(np.float32)
    head_major = jnp.asarray(np.swapaxes(x, 1, 2))
    keys = codec.fill(codec.empty(x.shape, "tokens", "k"), jnp.asarray(x), "tokens")
    assert int(codec.clipped(keys, head_major).sum()) == 0
    assert (np.abs(decoded(keys) - x) <= steps(keys) * 0.501).all()
    values = codec.fill(codec.empty(x.shape, "tokens", "v"), jnp.asarray(x), "tokens")  # values are not rotated
    assert (int(codec.clipped(values, head_major).sum()) > 0) == bool(angles)
    literal = Int8(calibration_tokens=C, headroom=0.0, key_range="minmax").resolve(
        jnp.float32, Rotation(angles, positions)
    )
    minmax = literal.fill(literal.empty(x.shape, "tokens", "k"), jnp.asarray(x), "tokens")
    np.testing.assert_array_equal(minmax.codes, values.codes)
    # and no more than that: brute force over all positions, between C - 1 before the first and the last of the context
    swept = np.stack([turned(first, angles, np.full(C, p)) for p in range(-(C - 1), positions + 1)])
    width = (swept.max((0, 2)) - swept.min((0, 2))) / 255
    np.testing.assert_allclose(keys.scale, width, rtol=0.02)


@pytest.mark.parametrize("headroom", [0.0, 0.5, 1.0])
def test_headroom_widens_the_range_about_its_middle(headroom):
    codec = Int8(calibration_tokens=C, headroom=headroom).resolve(jnp.float32)
    x = normal(12, B, S, K, H)
    packed = codec.fill(codec.empty(x.shape, "tokens", "v"), jnp.asarray(x), "tokens")
    low, high = x[:, :C].min(1), x[:, :C].max(1)
    np.testing.assert_allclose(packed.scale, (high - low) * (1 + headroom) / 255, rtol=1e-5)
    middle = decoded(packed.replace(codes=np.full((B, 1, K, H), -0.5)))[:, 0]
    assert (np.abs(middle - (low + high) / 2) <= np.asarray(packed.scale) * 0.51).all()


@pytest.mark.parametrize("codec", CODECS, ids=AXES)
def test_tokens_written_one_by_one_equal_a_filled_prompt_and_move_bit_for_bit(codec):
    """Jitted with donation, in both layouts; the range freezes on the way."""
    x = normal(4, B, S, K, H)
    write_token = jax.jit(functools.partial(encoded.write_token, codec), donate_argnums=0)
    write_slot = jax.jit(functools.partial(encoded.write_slot, codec), donate_argnums=0)
    store = codec.empty((B, S, K, H), "tokens", "k")
    slots = codec.empty((B, K, S, H), "slots", "k")
    for t in range(S):
        if t == codec.frozen_after:
            store, slots = codec.freeze(store, "tokens"), codec.freeze(slots, "slots")
        here = jnp.full((B,), t, jnp.int32)
        store, slots = write_token(store, x[:, t], here), write_slot(slots, x[:, t], here[:, None])
    filled = jax.jit(lambda x: codec.fill(codec.empty(x.shape, "tokens", "k"), x, "tokens"))(x)
    for a, b in zip(jax.tree.leaves(filled), jax.tree.leaves(store), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.swapaxes(slots.codes, 1, 2), filled.codes)
    pos = jnp.array([[[7, -1, 2]], [[0, 10, 5]]], jnp.int32)
    to = jnp.array([[[4, -1, 0]], [[1, 3, 2]]], jnp.int32)
    moved = jax.jit(codec.copy_in)(
        codec.freeze(codec.empty((B, K, M, H), "slots", "k"), "slots"), codec.take(store, pos), to
    )
    for b, e in [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]:
        np.testing.assert_array_equal(moved.codes[b, :, to[b, 0, e]], store.codes[b, pos[b, 0, e]])
    assert (decoded(moved, "slots")[0, :, [1, 2, 3]] == decoded(moved, "slots")[0, :, 1]).all()  # nothing else written
    np.testing.assert_array_equal(
        codec.slice_tokens(store, jnp.int32(3), 4).codes, np.swapaxes(store.codes, 1, 2)[:, :, 3:7]
    )
    np.testing.assert_allclose(decoded(moved, "slots")[0, :, 4], decoded(store)[0, 7])


def test_tokens_stay_raw_until_the_range_is_frozen():
    x = normal(5, B, C, K, H)
    packed = CHANNEL.empty((B, S, K, H), "tokens", "v")
    for t in range(C):
        packed = encoded.write_token(CHANNEL, packed, jnp.asarray(x[:, t]), jnp.full((B,), t, jnp.int32))
    assert isinstance(packed, Calibrating)
    np.testing.assert_array_equal(packed.values[:, :C], x)
    np.testing.assert_array_equal(packed.low, x.min(1))
    np.testing.assert_array_equal(packed.high, x.max(1))
    assert not np.asarray(CHANNEL.clipped(packed, jnp.asarray(1e6 * x[:, 0]))).any()
    rows = CHANNEL.take(packed, jnp.zeros((B, 1, 1), jnp.int32))
    slots = CHANNEL.copy_in(CHANNEL.empty((B, K, M, H), "slots", "v"), rows, jnp.zeros((B, 1, 1), jnp.int32))
    np.testing.assert_array_equal(slots.values[:, :, 0], x[:, 0])
    np.testing.assert_array_equal(slots.low, packed.low)


@pytest.mark.parametrize("codec", CODECS, ids=AXES)
def test_scales_folded_into_attention_equal_attention_on_decoded_values(codec):
    x, q, p = normal(6, B, K, M, H), normal(7, B, K, G, H), np.random.default_rng(8).random((B, K, G, M))
    p = (p / p.sum(-1, keepdims=True) * np.array([1.0, 0.0])[:, None, None, None]).astype(
        np.float32
    )  # and no weight at all
    packed = codec.fill(codec.empty(x.shape, "slots", "k"), jnp.asarray(x), "slots")
    logits, mixed = jax.jit(codec.logits)(q, packed), jax.jit(codec.mix)(p, packed)
    assert logits.dtype == mixed.dtype == jnp.float32
    y = decoded(packed, "slots")
    np.testing.assert_allclose(logits, np.einsum("bkgh,bkmh->bkgm", q.astype(np.float64), y), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(mixed, np.einsum("bkgm,bkmh->bkgh", p.astype(np.float64), y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("H", [1, 2, 8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("axis", AXES)
def test_bytes_are_those_of_the_arrays_scales_included(axis, H):
    codec, tokens = Int8(axis).resolve(jnp.bfloat16), 1024
    homes = jax.eval_shape(
        lambda: [codec.freeze(codec.empty((B, tokens, K, H), "tokens", part), "tokens") for part in "kv"]
    )
    total = tree_bytes(homes) / B
    assert total == tokens * codec.token_bytes(K, H) + codec.sequence_bytes(K, H)
    assert total == (2 * K * tokens * (H + 3) if axis == "token" else 2 * K * H * (tokens + 8))
    if H == 128:
        bfloat16 = tokens * 2 * K * H * 2
        assert total <= (0.54 if axis == "token" else 0.51) * bfloat16


@pytest.mark.parametrize("codec", CODECS, ids=AXES)
def test_values_are_what_the_codes_stand_for(codec):
    packed = codec.fill(codec.empty((B, K, M, H), "slots", "k"), jnp.asarray(normal(10, B, K, M, H)), "slots")
    np.testing.assert_allclose(jax.jit(codec.values)(packed), decoded(packed, "slots"), rtol=1e-6, atol=1e-6)


def test_growing_keeps_codes_and_scales():
    for codec in CODECS:
        packed = codec.fill(codec.empty((B, S, K, H), "tokens", "v"), jnp.asarray(normal(9, B, S, K, H)), "tokens")
        np.testing.assert_array_equal(decoded(codec.grow(packed, S + 6, "tokens"))[:, :S], decoded(packed))
    raw = CHANNEL.grow(CHANNEL.empty((B, K, M, H), "slots", "k"), M + 2, "slots")
    assert raw.values.shape == (B, K, M + 2, H) and raw.low.shape == (B, K, H)


def test_specs_name_the_codec_and_bad_ones_are_refused():
    assert codecs.parse("int8") == Int8() and Int8().resolve(jnp.float32).frozen_after == 64
    assert codecs.parse("int8(axis=token)") == Int8("token") and TOKEN.frozen_after == 0
    for text, reason in [
        ("int8(axis=row)", "channel"),
        ("int8(axis=token,calibration_tokens=8)", "goes with axis=channel"),
        ("int8(axis=token,headroom=0.5)", "goes with axis=channel"),
        ("int8(calibration_tokens=0)", "at least 1; got 0"),
        ("int8(headroom=-1.0)", "headroom must be in 0..16; got -1.0"),
        ("int8(headroom=nan)", "headroom must be a number"),
        ("int8(key_range=max)", "rotary"),
    ]:
        with pytest.raises(SpecError, match=reason):
            codecs.parse(text)
    codec = Int8().resolve(jnp.float32)
    with pytest.raises(ValueError, match="frozen after 64 tokens; got 11"):
        codec.fill(codec.empty((B, S, K, H), "tokens", "k"), jnp.zeros((B, S, K, H)), "tokens")


def test_nan_becomes_a_number_and_spoils_no_other_token():
    x = normal(10, B, S, K, H)
    bad = x.copy()
    bad[0, -1, 0, 0] = np.nan
    for fill in (lambda x: CHANNEL.fill(CHANNEL.empty(x.shape, "tokens", "v"), x, "tokens"), fill_token):
        got, want = fill(jnp.asarray(bad)), fill(jnp.asarray(x))
        np.testing.assert_array_equal(got.codes[:, :-1], want.codes[:, :-1])
