"""SKVQ against NumPy: what a code stands for, which tokens stay raw, what moves, attention, the order of channels, bytes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alisa_jax.calibration import Calibration
from alisa_jax.codecs import packing
from alisa_jax.codecs.skvq import Skvq, groups
from alisa_jax.codecs.skvq.groups import Groups
from alisa_jax.kv.state import Store, WorkingSet, tree_bytes
from alisa_jax.ops.rope import Rotation, Turn
from alisa_jax.policies import parse
from alisa_jax.spec import SpecError, to_text
from alisa_jax.spec import parse as parse_spec
from alisa_jax.testing.streams import Driver, stream
from tests import encoded

B, K, H = 2, 3, 10
FLOAT = {"float8": ml_dtypes.float8_e4m3fn, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SMALL = Skvq(k_bits=2, v_bits=1.5, group=4, window=7, sinks=2, reorder=False)
HEADS = dataclasses.replace(SMALL, span="head")


def normal(seed, *shape):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1])) + rng.normal(size=shape[-1])).astype(np.float32)


def groups_of(asked: Skvq, K: int, H: int, order=None) -> list[np.ndarray]:
    """The channels, of K H, of every group."""
    channels = np.arange(K * H) if order is None else np.asarray(order)
    units = [channels] if asked.span == "layer" else np.split(channels, K)
    return [unit[i : i + asked.group] for unit in units for i in range(0, unit.size, asked.group)]


def stands_for(asked: Skvq, bits: float, x: np.ndarray, order=None) -> np.ndarray:
    """What the codes of x [..., K, H] stand for, float64, by the equations of the paper, one group after the other."""
    K, H = x.shape[-2:]
    flat, out = x.reshape(*x.shape[:-2], K * H), np.empty((*x.shape[:-2], K * H))
    Q, store = (2 if bits == 1.5 else 2**bits - 1), lambda y: y.astype(FLOAT[asked.params]).astype(np.float64)
    for group in groups_of(asked, K, H, order):
        y, clip = flat[..., group], np.float32(asked.clip)
        low, high = clip * y.min(-1, keepdims=True), clip * y.max(-1, keepdims=True)
        scale = np.maximum((high - low) / np.float32(Q), np.float32(1e-5))
        out[..., group] = np.round(np.clip((y - low) / scale, 0, Q)) * store(scale) + store(low)
    return out.reshape(x.shape)


def is_raw(asked: Skvq, pos, count):
    """Whether the token at `pos` is attended as it came when `count` tokens have come."""
    return (pos < asked.sinks) | (pos >= count - asked.window)


@functools.cache
def jitted(asked: Skvq, dtype="float32"):
    """The codec and its compiled methods; writes are donated, as in a step."""
    codec = asked.resolve(jnp.dtype(dtype))
    donated = {
        "write_slot": functools.partial(encoded.write_slot, codec),
        "write_token": functools.partial(encoded.write_token, codec),
        "copy_in": codec.copy_in,
    }
    donated = {name: jax.jit(write, donate_argnums=0) for name, write in donated.items()}
    return codec, donated | {name: jax.jit(getattr(codec, name)) for name in ("values", "take", "logits", "mix")}


@functools.cache
def filler(asked: Skvq, layout="tokens", part="k", dtype="float32"):
    codec = asked.resolve(jnp.dtype(dtype))

    def fill(x, length):
        return codec.upto(codec.fill(codec.empty(x.shape, layout, part), x, layout), x, length, layout)

    return jax.jit(fill)


def filled(asked, x, layout="slots", part="k"):
    T = x.shape[2 if layout == "slots" else 1]
    return filler(asked, layout, part)(jnp.asarray(x), jnp.full((x.shape[0],), T, jnp.int32))


# ---- codes


@pytest.mark.parametrize("bits", packing.BITS)
def test_codes_come_back_from_their_bytes(bits):
    every = []
    for n in (1, 5, 16, 37):
        codes = np.random.default_rng(n).integers(0, packing.steps(bits) + 1, (3, n)).astype(np.uint16)
        codes[0], codes[1] = 0, packing.steps(bits)
        every.append(codes)
    pack = jax.jit(lambda every: [packing.pack(codes, bits) for codes in every])
    unpack = jax.jit(lambda every, sizes: [packing.unpack(p, bits, n) for p, n in zip(every, sizes)], static_argnums=1)
    packed = pack(every)
    for codes, p, back in zip(every, packed, unpack(packed, (1, 5, 16, 37)), strict=True):
        assert p.dtype == jnp.uint8 and p.shape == (3, packing.packed_bytes(bits, codes.shape[1]))
        np.testing.assert_array_equal(back, codes)
    want = {1.5: 8, 1: 5, 2: 10, 3: 15, 4: 20, 5: 25, 6: 30, 7: 35, 8: 40, 16: 80}[bits]
    assert packing.packed_bytes(bits, 40) == want  # five ternary codes to a byte, else b bits each


EXACT = Skvq(clip=1.0, params="float32", group=4, reorder=False)
numbers = hnp.arrays(
    np.float32,
    (3, K, H),
    elements=st.one_of(
        st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 1.0, -1.0, 1000.0, 1e-20, -1e-6, 3e30, -3e30])
    ),
)


@given(x=numbers, bits=st.sampled_from([1.5, 1, 2, 3, 8]), span=st.sampled_from(["layer", "head"]))
@settings(max_examples=100, deadline=None)
def test_the_error_is_at_most_half_a_step_where_nothing_is_clipped(x, bits, span):
    asked = dataclasses.replace(EXACT, k_bits=bits, span=span)
    codec = asked.resolve(jnp.float32)
    rows, values, clipped = encoder(codec.k, x.shape[1:])(x)
    values, clipped = np.asarray(values, np.float64), np.asarray(clipped)
    for i, group in enumerate(groups_of(asked, K, H)):
        y, got = (a.reshape(3, -1)[:, group].astype(np.float64) for a in (x, values))
        step = np.asarray(rows.scale, np.float64).reshape(3, -1)[:, i, None]
        width = y.max(-1, keepdims=True) - y.min(-1, keepdims=True)
        np.testing.assert_allclose(step, np.maximum(width / packing.steps(bits), 1e-5), rtol=1e-6)
        size = np.abs(y).max(-1, keepdims=True)
        assert (np.abs(got - y) <= step * 0.5 * (1 + 1e-4) + size * 2.0**-21).all()
    assert (clipped == 0).all()


@functools.cache
def encoder(bits, shape):
    """Rows of tokens x [T, K, H], what they stand for, and how many elements were clipped."""

    def run(x):
        rows = bits.encode(x)
        head_major = jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1)[None], rows)
        return rows, jnp.swapaxes(bits.values(head_major, *shape)[0], 0, 1), bits.clipped(x)

    return jax.jit(run)


@pytest.mark.parametrize("params", FLOAT)
@pytest.mark.parametrize("bits, span", [(2, "layer"), (1.5, "head"), (5, "layer")])
def test_codes_are_those_of_the_equations_with_parameters_rounded_for_storage(params, bits, span):
    asked = Skvq(k_bits=bits, group=7, span=span, params=params, clip=0.92, reorder=False)
    x = normal(3, 40, K, H)
    rows, values, clipped = encoder(asked.resolve(jnp.float32).k, (K, H))(x)
    want = stands_for(asked, bits, x)
    np.testing.assert_allclose(values, want, rtol=1e-6, atol=1e-5)
    assert rows.scale.dtype == rows.low.dtype == FLOAT[params]
    if params == "float8":  # codes were made with the scale before it was rounded, and read with the rounded one
        exact = stands_for(dataclasses.replace(asked, params="float32"), bits, x)
        assert np.abs(want - exact).max() > 0.01
    lowest = np.stack([x.reshape(40, -1)[:, g].min(-1) for g in groups_of(asked, K, H)], -1) * np.float32(0.92)
    np.testing.assert_array_equal(np.asarray(rows.low).reshape(40, -1), lowest.astype(FLOAT[params]))
    outside = 0
    for group in groups_of(asked, K, H):
        y = x.reshape(40, -1)[:, group].astype(np.float64)
        low, high = 0.92 * y.min(-1, keepdims=True), 0.92 * y.max(-1, keepdims=True)
        half = (high - low) / packing.steps(bits) / 2
        outside = outside + ((y < low - half) | (y > high + half)).sum(-1)
    np.testing.assert_array_equal(clipped, outside)


def test_float8_ends_beyond_its_range_stay_finite():
    x = np.array([[[-2000.0, 1000.0, 3.0, -5.0]]], np.float32)
    _, values, _ = encoder(Skvq(clip=1.0, k_bits=1, group=4, reorder=False).resolve(jnp.float32).k, (1, 4))(x)
    np.testing.assert_array_equal(values, [[[-448.0, 0.0, 0.0, -448.0]]])  # a step of 896 is stored as 448


@pytest.mark.parametrize("value", [0.0, 1e-3, -7.0])
def test_constant_groups_are_safe(value):
    x = np.full((1, K, H), value, np.float32)
    _, values, _ = encoder(EXACT.resolve(jnp.float32).k, (K, H))(x)
    np.testing.assert_allclose(values, x, atol=3e-5)


# ---- which tokens are raw, and what moves


@pytest.mark.parametrize(
    "reach, dtype", [((7, 2), "float32"), ((7, 2), "bfloat16"), ((0, 3), "float32"), ((0, 0), "float32")]
)
def test_sinks_and_window_are_bit_identical_at_every_step_and_every_other_token_is_its_first_code(reach, dtype):
    """In a working set and in a store, while the ring goes round several times; sinks + codes + window is every token."""
    asked = dataclasses.replace(SMALL, window=reach[0], sinks=reach[1])
    codec, run = jitted(asked, dtype)
    T = 31
    x = normal(5, B, T, K, H).astype(dtype)
    rounded = np.swapaxes(x.astype(np.float32), 1, 2)
    codes = np.swapaxes(stands_for(asked, 2, x.astype(np.float32)), 1, 2)
    store, slots = (codec.empty(s, n, "k") for s, n in (((B, T, K, H), "tokens"), ((B, K, T, H), "slots")))
    everything = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, 1, T))
    first = {}
    for t in range(T):
        here = jnp.full((B,), t, jnp.int32)
        store, slots = run["write_token"](store, x[:, t], here), run["write_slot"](slots, x[:, t], here[:, None])
        values = np.asarray(run["values"](slots))[:, :, : t + 1]
        np.testing.assert_array_equal(values, np.asarray(run["values"](run["take"](store, everything)))[:, :, : t + 1])
        raw = is_raw(asked, np.arange(t + 1), t + 1)
        assert raw.sum() == min(t + 1, sum(reach))
        np.testing.assert_array_equal(values[:, :, raw], rounded[:, :, : t + 1][:, :, raw])
        np.testing.assert_allclose(values[:, :, ~raw], codes[:, :, : t + 1][:, :, ~raw], rtol=1e-5, atol=1e-5)
        for p in np.flatnonzero(~raw):
            np.testing.assert_array_equal(values[:, :, p], first.setdefault(p, values[:, :, p]))


@pytest.mark.parametrize("asked, dtype", [(SMALL, "bfloat16"), (HEADS, "float32")], ids=lambda a: getattr(a, "span", a))
def test_a_prompt_followed_by_decoding_equals_decoding_alone_bit_for_bit(asked, dtype):
    """Ragged prompts, in both homes: codes, raw rows, slots and counts, all compiled."""
    codec, run = jitted(asked, dtype)
    T, length = 26, np.array([19, 4], np.int32)
    x = normal(6, B, T, K, H).astype(dtype)
    for layout in ("tokens", "slots"):
        shape = (B, T, K, H) if layout == "tokens" else (B, K, T, H)
        part = "v"
        prompt = x.copy()
        prompt[1, 4:] = 77.0  # padding
        given = prompt if layout == "tokens" else np.swapaxes(prompt, 1, 2)
        both = [codec.empty(shape, layout, part), filler(asked, layout, part, dtype)(given, length)]
        for i, packed in enumerate(both):
            begun = np.zeros(B, np.int32) if i == 0 else length
            for t in range(T):
                at = np.where(begun + t < T, begun + t, T)  # sequences that are done write nowhere
                if (at == T).all():
                    break
                new = x[np.arange(B), np.minimum(at, T - 1)]
                at = jnp.asarray(at)
                write = run["write_token"](packed, new, at) if layout == "tokens" else None
                packed = run["write_slot"](packed, new, at[:, None]) if write is None else write
                both[i] = packed
        decoded, continued = both
        np.testing.assert_array_equal(continued.recent.count[1], decoded.recent.count[1])
        for a, b in zip(jax.tree.leaves(decoded.rows), jax.tree.leaves(continued.rows), strict=True):
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
        for a, b in zip(jax.tree.leaves(decoded.recent), jax.tree.leaves(continued.recent), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[1], np.asarray(b)[1])


class Oracle:
    """What a working set of M slots for each kv head should hold, token by token."""

    def __init__(self, asked: Skvq, x: np.ndarray, M: int):
        self.asked, self.x, self.pos = asked, x, np.full((B, K, M), -1)
        self.codes = stands_for(asked, 2, x)

    def check(self, values: np.ndarray, count: int) -> int:
        """Compare the slots that hold a token; how many of them are read raw."""
        b, k, m = np.nonzero(self.pos >= 0)
        pos = self.pos[b, k, m]
        raw = is_raw(self.asked, pos, count)
        np.testing.assert_array_equal(values[b, k, m][raw], self.x[b, pos, k][raw])
        np.testing.assert_allclose(values[b, k, m][~raw], self.codes[b, pos, k][~raw], rtol=1e-5, atol=1e-5)
        return int(raw.sum())


def test_slots_that_an_evicting_policy_uses_again_hold_the_new_token_alone():
    """Each head drops other tokens, those of the window among them, and the new token takes the slot that was emptied."""
    codec, run = jitted(HEADS)
    T, M, rng = 50, 9, np.random.default_rng(7)
    x = normal(8, B, T, K, H)
    packed, oracle, raw = codec.empty((B, K, M, H), "slots", "k"), Oracle(HEADS, x, M), 0
    for t in range(T):
        slot = rng.integers(0, M, (B, K)).astype(np.int32)
        slot[:, 0] = M if t % 11 == 3 else slot[:, 0]  # one head has no slot: its token is lost
        packed = run["write_slot"](packed, x[:, t], slot)
        b, k = np.nonzero(slot < M)
        oracle.pos[b, k, slot[b, k]] = t
        raw += oracle.check(np.asarray(run["values"](packed)), t + 1)
    assert 0 < raw < B * K * M * T


@pytest.mark.parametrize("asked", [SMALL, HEADS], ids=lambda a: a.span)
def test_tokens_that_move_from_a_store_to_a_working_set_stay_what_they_are(asked):
    """Random loads from the store, after a prompt and between steps, window and sinks among them; P = 1, or K with spans."""
    codec, run = jitted(asked)
    P, S, M, E, prompt, rng = (1 if asked.span == "layer" else K), 40, 8, 3, 12, np.random.default_rng(9)
    x = normal(10, B, S, K, H)
    store = filler(asked)(x, jnp.full((B,), prompt, jnp.int32))
    packed, oracle, raw = codec.empty((B, K, M, H), "slots", "k"), Oracle(asked, x, M), 0

    def load(packed, pos, slot):
        packed = run["copy_in"](packed, run["take"](store, jnp.asarray(pos)), jnp.asarray(slot))
        pos, slot = (np.broadcast_to(y, (B, K, y.shape[2])) for y in (pos, slot))
        b, k, e = np.nonzero(slot >= 0)
        oracle.pos[b, k, slot[b, k, e]] = pos[b, k, e]
        return packed

    chosen = np.sort(rng.permuted(np.tile(np.arange(prompt), (B, P, 1)), axis=2)[..., : M - 1], axis=2).astype(np.int32)
    fresh = np.pad(chosen, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
    slots = np.where(fresh >= 0, np.arange(M, dtype=np.int32), -1)
    packed = load(packed, fresh, slots)
    for t in range(prompt, S):
        raw += oracle.check(np.asarray(run["values"](packed)), t)
        slot = rng.integers(0, M, (B, P)).astype(np.int32)
        store = run["write_token"](store, x[:, t], jnp.full((B,), t, jnp.int32))
        packed = run["write_slot"](packed, x[:, t], slot)
        np.put_along_axis(oracle.pos, np.broadcast_to(slot[..., None], (B, K, 1)), t, axis=2)
        absent = [[[p for p in range(t + 1) if p not in oracle.pos[b, k]] for k in range(P)] for b in range(B)]
        pos = np.array([[rng.choice(y, E, replace=False) for y in row] for row in absent], np.int32)
        pos[..., 0] = np.where(rng.random((B, P)) < 0.3, -1, pos[..., 0])
        to = np.argsort(rng.random((B, P, M)), axis=2)[..., :E].astype(np.int32)
        packed = load(packed, pos, np.where(pos >= 0, to, -1))
    assert raw > S
    page = jax.jit(codec.slice_tokens, static_argnums=2)(store, jnp.int32(29), 11)
    whole = Oracle(asked, x, 11)
    whole.pos[:] = np.arange(29, 40)
    assert whole.check(np.asarray(run["values"](page)), S) == B * K * 7


@pytest.mark.parametrize("asked", [SMALL, HEADS], ids=lambda a: a.span)
def test_rows_that_are_written_over_slots_are_raw_where_their_tokens_are(asked):
    """Codes alone come back from elsewhere; a store that has seen the same tokens knows which of them are raw."""
    codec, run = jitted(asked)
    P, S, M, rng = (1 if asked.span == "layer" else K), 40, 13, np.random.default_rng(19)
    x = normal(20, B, S, K, H)
    packed, oracle, raw = codec.empty((B, K, M, H), "slots", "k"), Oracle(asked, x, M), 0

    def written(packed, store, pos):
        rows = codec.leaves(codec.take(store, pos))
        return codec.seated(codec.rebuild(packed, rows), store, pos)

    write = jax.jit(written)
    for count in (3, 12, 29, 40):
        store = filler(asked)(x, jnp.full((B,), count, jnp.int32))
        pos = np.argsort(rng.random((B, P, max(count, M))), axis=2)[..., :M].astype(np.int32)
        pos = np.where(pos < count, pos, -1)
        packed = write(packed, store, pos)
        oracle.pos[:] = pos
        raw += oracle.check(np.asarray(run["values"](packed)), count)
    assert raw > B * K * 3


# ---- attention


def rotated(x, places, angles):
    """Float64 rotation of x [..., H] by places [...]."""
    half, out = len(angles), x.astype(np.float64).copy()
    turn = places[..., None] * np.asarray(angles)
    a, b = out[..., :half].copy(), out[..., half : 2 * half].copy()
    out[..., :half], out[..., half : 2 * half] = (
        a * np.cos(turn) - b * np.sin(turn),
        b * np.cos(turn) + a * np.sin(turn),
    )
    return out


@pytest.mark.parametrize(
    "asked, channels, M",
    [
        (HEADS, 10, 2500),
        (dataclasses.replace(SMALL, group=1), 12, 1900),
        (Skvq(reorder=False), 64, 700),
    ],
    ids=["heads", "many groups", "defaults"],
)
def test_attention_equals_float64_attention_over_what_is_stood_for(asked, channels, M):
    codec, run = jitted(asked)
    G, rng = 2, np.random.default_rng(11)
    x, q, p = normal(12, B, K, M, channels), normal(13, B, K, G, channels), rng.random((B, K, G, M))
    p = (p / p.sum(-1, keepdims=True)).astype(np.float32)
    k, v = filled(asked, x), filled(asked, x, part="v")
    for packed, bits in ((k, asked.k_bits), (v, asked.v_bits)):
        want = np.moveaxis(stands_for(asked, bits, np.moveaxis(x, 2, 1)), 1, 2)
        raw = is_raw(asked, np.arange(M), M)
        want[:, :, raw] = x[:, :, raw]
        np.testing.assert_allclose(run["values"](packed), want, rtol=1e-5, atol=2e-5)
    keys, values = (np.asarray(run["values"](y), np.float64) for y in (k, v))
    out, mixed = run["logits"](q, k), run["mix"](p, v)
    assert out.dtype == mixed.dtype == jnp.float32
    np.testing.assert_allclose(out, np.einsum("bkgh,bkmh->bkgm", q.astype(np.float64), keys), rtol=1e-5, atol=3e-4)
    np.testing.assert_allclose(mixed, np.einsum("bkgm,bkmh->bkgh", p.astype(np.float64), values), rtol=1e-5, atol=1e-5)
    rotation = Rotation((1.0, 0.3, 0.01), 4096)  # of six channels; the others are not turned
    places = rng.integers(0, 50, (B, 1 if asked.span == "layer" else K, M)).astype(np.int32)
    got = jax.jit(lambda q, k, at: codec.turned_logits(q, k, Turn(at, rotation)))(q, k, places)
    want = np.einsum("bkgh,bkmh->bkgm", q.astype(np.float64), rotated(keys, places, rotation.angles))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-4)


def test_no_float_copy_of_the_codes_is_made_on_a_cpu(optimised):
    codec, shape = Skvq(reorder=False).resolve(jnp.bfloat16), (1, 4, 8192, 64)
    k, v = (codec.empty(shape, "slots", part) for part in "kv")
    q, p = jnp.zeros((1, 4, 1, 64), jnp.bfloat16), jnp.zeros((1, 4, 1, 8192))
    turn = Turn(jnp.zeros((1, 1, 8192), jnp.int32), Rotation((1.0,) * 32, 8192))
    forms = (codec.logits, q, k), (codec.mix, p, v), (lambda q, k: codec.turned_logits(q, k, turn), q, k)
    for form, x, packed in forms:
        temporary = jax.jit(form).lower(x, packed).compile().memory_analysis().temp_size_in_bytes
        assert temporary < 2**21, temporary  # a float32 copy would be 8 MiB


def test_all_routes_of_a_selecting_policy_attend_alike_and_over_what_the_codes_stand_for():
    """From an empty cache: a token that a set drops while it is in the window, and that returns, is raw again."""
    asked = dataclasses.replace(SMALL, window=24)
    policy, driver = parse("swa(kv_sparsity=0.6)"), Driver(codec=asked.resolve(jnp.float32))
    tokens = stream(3, 2, 64, 4, 2, 6)
    first, *others = (driver.run(policy, route, tokens) for route in policy.routes)
    for other in others:
        assert other.sets == first.sets
        np.testing.assert_allclose(other.out, first.out, atol=1e-5)
    codes = [stands_for(asked, bits, x) for bits, x in ((2, tokens.k), (1.5, tokens.v))]
    for b in range(2):
        for n in range(0, 64, 7):
            at = np.array(sorted(first.sets[b][n][0]))
            raw = is_raw(asked, at, n + 1)[:, None, None]
            k, v = (np.where(raw, x[b, at], c[b, at]) for x, c in zip(tokens[1:], codes, strict=True))
            z = np.einsum("kgh,mkh->kgm", tokens.q[b, n].astype(np.float64).reshape(2, 2, 6), k) / np.sqrt(6)
            e = np.exp(z - z.max(-1, keepdims=True))
            want = np.einsum("kgm,mkh->kgh", e / e.sum(-1, keepdims=True), v).reshape(4, 6)
            np.testing.assert_allclose(first.out[b, n], want, atol=1e-4)


# ---- the order of channels


def codec_with(asked: Skvq, order=None):
    codec = asked.resolve(jnp.float32)
    if order is None:
        return codec
    groups = Groups(asked.group, asked.span, np.asarray(order, "<u2").tobytes())
    return dataclasses.replace(codec, **{p: dataclasses.replace(getattr(codec, p), groups=groups) for p in "kv"})


def attended(codec, q, x):
    """Attention of q [B, K, G, H] over x [B, K, M, H] as the codec keeps it, as K and as V."""

    @jax.jit
    def run(q, x):
        k, v = (codec.fill(codec.empty(x.shape, "slots", part), x, "slots") for part in "kv")
        return codec.mix(jax.nn.softmax(codec.logits(q, k), axis=-1), v)

    return np.asarray(run(q, x))


@pytest.mark.parametrize("span", ["layer", "head"])
def test_at_16_bits_no_order_of_channels_changes_the_output(span):
    """To what half a step of 1/65535 of a range is; at 2 bits the same orders differ visibly."""
    asked = Skvq(k_bits=16, v_bits=16, group=4, window=0, sinks=0, clip=1.0, params="float32", reorder=False, span=span)
    rng = np.random.default_rng(14)
    x, q = rng.normal(size=(B, K, 33, H)).astype(np.float32), rng.normal(size=(B, K, 2, H)).astype(np.float32)
    unit = (1, K * H) if span == "layer" else (K, H)
    order = np.stack([rng.permutation(unit[1]) for _ in range(unit[0])])
    for bits, same in ((16, True), (2, False)):
        one = dataclasses.replace(asked, k_bits=bits, v_bits=bits)
        difference = np.abs(attended(codec_with(one), q, x) - attended(codec_with(one, order), q, x)).max()
        assert (difference < 1e-4) if same else (difference > 1e-2), difference


def test_values_follow_the_order_of_channels():
    rng = np.random.default_rng(15)
    order, x = rng.permutation(K * H), normal(16, 40, K, H)
    got = encoder(codec_with(SMALL, order).k, (K, H))(x)[1]
    np.testing.assert_allclose(got, stands_for(SMALL, 2, x, order), rtol=1e-6, atol=1e-5)
    assert np.abs(got - stands_for(SMALL, 2, x)).max() > 0.1


def calibration(*low_high: np.ndarray) -> Calibration:
    """Of keys and values with the ranges k_min, k_max, v_min, v_max [L, K, H]."""
    means = np.ones_like(low_high[0])
    return Calibration(*low_high, q_abs=means, k_abs=means, qk_abs=means, n_tokens=100, model="m")


@dataclasses.dataclass
class Config:
    """What `resolve` reads of a `ModelConfig`."""

    n_kv_heads: int
    head_dim: int
    n_layers: int = 1

    @property
    def n_heads(self) -> int:
        return self.n_kv_heads


def reordered(asked: Skvq, k: np.ndarray, v: np.ndarray):
    """The codec of one layer whose calibration saw the tokens k and v [T, K, H]."""
    ranges = calibration(*(f(0)[None] for x in (k, v) for f in (x.min, x.max)))
    return asked.resolve(jnp.float32, calibration=ranges, config=Config(*k.shape[1:])).for_layer(0)


@pytest.mark.parametrize("span", ["layer", "head"])
def test_reordering_pays_on_channels_of_unlike_ranges_and_not_on_like_ones(span):
    """Channel scales log-uniform over two decades, 2 bits in groups of 32; the order comes from other tokens.

    The mean squared error is mostly that of the widest channels, which no order helps; relative to a channel's own mean
    square it is that of all.
    """
    rng, shape = np.random.default_rng(17), (2, 128)
    asked = Skvq(group=32, span=span)
    plain = dataclasses.replace(asked, reorder=False).resolve(jnp.float32)
    noise = rng.normal(size=(2, 256, *shape)).astype(np.float32)
    skewed = noise * (10 ** rng.uniform(-1, 1, shape)).astype(np.float32)
    for x, whole, relative in ((skewed, (0, 0.75), (0, 0.2)), (noise, (0.97, 1.03), (0.97, 1.03))):
        error = [
            np.mean((np.asarray(encoder(codec.k, shape)(x[1])[1], np.float64) - x[1]) ** 2, axis=0)
            for codec in (reordered(asked, x[0], x[0]), plain)
        ]
        own = np.mean(x[1].astype(np.float64) ** 2, axis=0)
        for (low, high), weight in ((whole, 1), (relative, 1 / own)):
            ratio = np.mean(error[0] * weight) / np.mean(error[1] * weight)
            assert low < ratio < high, ratio


def test_the_order_is_that_of_each_layer_and_part_and_the_same_at_every_call():
    rng = np.random.default_rng(18)
    ends = [rng.normal(size=(2, K, H)).astype(np.float32) * (10 ** rng.uniform(-1, 1, (2, K, H))) for _ in range(4)]
    made = calibration(*(sign * np.abs(e) for sign, e in zip((-1, 1, -1, 1), ends, strict=True)))
    asked, config = Skvq(group=4), Config(K, H, 2)
    codec = asked.resolve(jnp.float32, calibration=made, config=config)
    again = asked.resolve(jnp.float32, calibration=made, config=config)
    assert codec == again and hash(codec) == hash(again)
    layers = [codec.for_layer(i) for i in range(2)]
    orders = [part.groups.order for layer in layers for part in (layer.k, layer.v)]
    assert len(set(orders)) == 4 and b"" not in orders
    for order in orders:
        assert sorted(np.frombuffer(order, "<u2")) == list(range(K * H))
    assert layers[0].for_layer(1) == layers[0] != layers[1]


def test_clusters_that_are_far_apart_are_found_and_become_groups():
    rng = np.random.default_rng(19)
    centres = np.array([[-9.0, 0.1], [-0.1, 9.0], [-3.0, 3.0], [-0.1, 0.1]])
    label = rng.permutation(np.repeat(np.arange(4), 8))
    points = centres[label] + 0.05 * rng.normal(size=(32, 2))
    found = groups.cluster(points, 4)
    assert len({(a, b) for a, b in zip(label, found, strict=True)}) == 4
    order = groups.line_up(*points.T, 8)
    assert all(len(set(label[order[i : i + 8]])) == 1 for i in range(0, 32, 8))
    flat = np.ones(32)
    np.testing.assert_array_equal(groups.line_up(-flat, flat, 8), np.arange(32))  # all alike: as they come


def test_a_codec_of_a_model_is_not_made_without_the_calibration_that_reordering_needs():
    with pytest.raises(
        ValueError, match=r"no calibration: make one with python -m eval.calibrate, or give reorder=fal"
    ):
        Skvq(group=4).resolve(jnp.float32, config=Config(K, H))
    plain = dataclasses.replace(Skvq(group=4), reorder=False).resolve(jnp.float32, config=Config(K, H))
    assert plain == Skvq(group=4).resolve(jnp.float32)  # no model, nothing to order
    assert Skvq().resolve(jnp.float32, config=Config(2, 64)) == Skvq().resolve(jnp.float32)  # one group of 128
    wrong = codec_with(SMALL, np.arange(8))
    with pytest.raises(ValueError, match="the order of channels is of 8 channels; the keys and values have 30"):
        wrong.empty((B, K, 4, H), "slots", "k")


# ---- bytes, specs, refusals


@pytest.mark.parametrize("span", ["layer", "head"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_an_element_takes_b_plus_16_over_group_bits_measured_on_the_arrays(bits, span):
    tokens, heads, channels = 32, 2, 128
    for group in (128, 64, 32):
        asked = Skvq(k_bits=bits, v_bits=bits, group=group, span=span)
        codec = asked.resolve(jnp.bfloat16)
        empty = jax.eval_shape(lambda c=codec: [c.empty((B, heads, tokens, channels), "slots", part) for part in "kv"])
        rows = [packed.rows for packed in empty]
        elements = 2 * B * heads * tokens * channels
        assert tree_bytes(rows) * 8 / elements == bits + 16 / group
        assert tree_bytes(rows) == B * tokens * codec.token_bytes(heads, channels)
        exact = dataclasses.replace(asked, params="float32").resolve(jnp.bfloat16)
        assert exact.token_bytes(heads, channels) * 8 / (2 * heads * channels) == bits + 64 / group


@pytest.mark.parametrize("channels", [64, 128])
def test_three_levels_take_five_to_a_byte(channels):
    codec = Skvq(k_bits=1.5, v_bits=1.5, group=64).resolve(jnp.bfloat16)
    rows = jax.eval_shape(lambda: codec.empty((B, 2, 32, channels), "slots", "v")).rows
    assert tree_bytes(rows.codes) * 8 / (B * 2 * 32 * channels) == 1.625  # 13 bytes for 64
    assert codec.token_bytes(2, channels) * 8 / (4 * channels) == 1.625 + 16 / 64


@pytest.mark.parametrize("asked", [SMALL, HEADS, Skvq(), Skvq(group=3, window=0, sinks=0)], ids=lambda a: a.span)
def test_all_bytes_of_both_homes_are_counted(asked):
    codec, tokens = asked.resolve(jnp.bfloat16), 96
    ws, store = jax.eval_shape(
        lambda: (WorkingSet.empty(codec, B, K, tokens, H, 1), Store.empty(codec, B, tokens, K, H))
    )
    by_token, by_sequence = tokens * codec.token_bytes(K, H), codec.sequence_bytes(K, H)
    raw_rows = asked.window + asked.sinks
    assert by_sequence == 2 * (raw_rows * K * (2 * H + 4) + 4)
    assert tree_bytes((ws.k, ws.v)) == B * (by_token + by_sequence)
    assert tree_bytes((store.k, store.v)) == B * (by_token + by_sequence - 2 * 4 * raw_rows * K)
    grown = jax.eval_shape(lambda ws: ws.grow(codec, 128), ws)
    assert tree_bytes((grown.k, grown.v)) == B * (128 * codec.token_bytes(K, H) + by_sequence)


def test_specs_say_what_is_asked_for_and_bad_ones_are_refused():
    registry = {"skvq": Skvq}
    asked = parse_spec("skvq(v_bits=1.5,group=64,window=0,reorder=false)", registry)
    assert asked == Skvq(v_bits=1.5, group=64, window=0, reorder=False)
    assert to_text(asked, registry) == "skvq(v_bits=1.5,group=64,window=0,reorder=false)"
    assert Skvq() == Skvq(2, 2, 128, 128, 5, 0.92, True, "layer", "float8")
    for text, sentence in [
        ("k_bits=9", "k_bits must be 1.5, 1 to 8 or 16; got 9"),
        ("v_bits=2.5", "v_bits must be 1.5, 1 to 8 or 16; got 2.5"),
        ("group=0", "group must be at least 1; got 0"),
        ("window=-1", "window must be at least 0; got -1"),
        ("sinks=-2", "sinks must be at least 0; got -2"),
        ("clip=0.0", "clip must be above 0 and at most 1, which clips nothing; got 0.0"),
        ("clip=1.1", "clip must be above 0 and at most 1, which clips nothing; got 1.1"),
        ("span=token", "span must be one of layer, head; got 'token'"),
        ("params=float16", "params must be one of float8, bfloat16, float32; got 'float16'"),
    ]:
        with pytest.raises(SpecError, match=sentence):
            parse_spec(f"skvq({text})", registry)


def test_groups_over_heads_are_refused_to_policies_whose_heads_keep_other_tokens():
    h2o, swa = parse("h2o(kv_sparsity=0.5)"), parse("swa(kv_sparsity=0.5)")
    layer, head = (s.resolve(jnp.float32) for s in (SMALL, HEADS))
    assert layer.refuses(swa, "working_set") is None and head.refuses(h2o, "masked") is None
    sentence = layer.refuses(h2o, "masked")
    assert "and h2o(kv_sparsity=0.5) keeps" in sentence and sentence.endswith("give span=head")
