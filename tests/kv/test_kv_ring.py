"""The ring against NumPy, jitted: rows, what is pending, what is hidden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_jax.codecs import parse
from alisa_jax.codecs.base import Rotation
from alisa_jax.kv import ring
from alisa_jax.kv.pending import PENDING_ROWS, Pending
from alisa_jax.kv.ring import Ring
from alisa_jax.kv.state import Store
from tests import encoded

B, C, K, H = 2, 32, 3, 4


@functools.cache
def codec(spec):
    return parse(spec).resolve(jnp.float32, Rotation((), 0))


append = jax.jit(lambda spec, r, k, v, n: encoded.append(r, codec(spec), k, v, n), static_argnums=0, donate_argnums=1)


SKVQ = "skvq(group=2,window=9,sinks=2,reorder=false)"


@pytest.mark.parametrize("spec", ["raw", "int8(axis=token)", SKVQ])
def test_a_ring_keeps_the_newest_rows_of_a_store(spec):
    rng, one = np.random.default_rng(0), codec(spec)
    small, whole = Ring.empty(one, B, C, K, H, 1), Store.empty(one, B, 3 * C, K, H)
    write = jax.jit(lambda s, k, v, n: encoded.append(s, one, k, v, n), donate_argnums=0)
    first = np.array([0, 5])
    for n in range(2 * C + 7):
        k, v = (jnp.asarray(rng.normal(size=(B, K, H)), jnp.float32) for _ in "kv")
        length = jnp.asarray(first + n, jnp.int32)
        small, whole = append(spec, small, k, v, length), write(whole, k, v, length)
    pos = jnp.asarray((first + n)[:, None, None] - np.arange(C)[None, None], jnp.int32)
    take = jax.jit(lambda s, p: s.take(one, p))
    for a, b in zip(jax.tree.leaves(take(small, pos)), jax.tree.leaves(take(whole, pos))):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@settings(max_examples=30)
@given(lengths=st.tuples(st.integers(1, 90), st.integers(1, 90)), pages=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_every_row_of_a_ring_holds_the_newest_position_that_belongs_there(lengths, pages):
    host = [min(16 * p, n) for p, n in zip(pages, lengths)]
    got = np.asarray(
        jax.jit(ring.newest, static_argnums=2)(jnp.asarray(lengths, jnp.int32), jnp.asarray(host, jnp.int32), C)
    )
    for b in range(2):
        for row in range(C):
            fitting = [p for p in range(host[b], lengths[b]) if p % C == row]
            assert got[b, row] == (fitting[-1] if fitting else -1)


def test_a_ring_is_filled_with_the_rows_of_a_prompt_in_both_layouts():
    rng, one = np.random.default_rng(1), codec("raw")
    prompt = jnp.asarray(rng.normal(size=(B, 48, K, H)), jnp.float32)
    pos = jax.jit(ring.newest, static_argnums=2)(np.int32([48, 37]), np.int32([16, 16]), C)
    fill = jax.jit(lambda x, pos: [ring.fill(one, x, pos, layout) for layout in ("tokens", "slots")])
    (tokens,), (slots,) = fill(prompt, pos)
    for b in range(B):
        for row, p in enumerate(np.asarray(pos)[b]):
            if p >= 0:
                np.testing.assert_array_equal(tokens[b, row], prompt[b, p])
                np.testing.assert_array_equal(slots[b, :, row], prompt[b, p])


def test_due_rows_are_noted_behind_each_other_and_hide_their_slots():
    note = jax.jit(lambda pending, slot, pos, absent: pending.note(slot, pos, absent))
    pending = Pending.empty(2, 1)
    pos = jnp.asarray([[[7, 8, 9]], [[1, 2, -1]]], jnp.int32)
    slot = jnp.asarray([[[0, 1, 2]], [[3, 4, -1]]], jnp.int32)
    pending = note(pending, slot, pos, jnp.asarray([[[True, False, True]], [[False, True, False]]]))
    pending = note(pending, slot + 2, pos + 10, jnp.asarray([[[False, True, False]], [[False, False, False]]]))
    np.testing.assert_array_equal(pending.pos[:, 0, :4], [[7, 9, 18, -1], [2, -1, -1, -1]])
    np.testing.assert_array_equal(pending.slot[:, 0, :4], [[0, 2, 3, -1], [4, -1, -1, -1]])
    assert pending.any() and pending.count().tolist() == [[3], [1]]
    assert pending.room(PENDING_ROWS - 3) and not pending.room(PENDING_ROWS - 2)
    bias = np.asarray(pending.hide(jnp.zeros((2, 1, 6), jnp.float32)))
    assert [np.flatnonzero(np.isinf(row)).tolist() for row in bias[:, 0]] == [[0, 2, 3], [4]]
    assert not Pending.empty(2, 1).any()


def test_delivered_rows_go_to_their_slots_and_nowhere_else():
    rng, one = np.random.default_rng(2), codec("int8(axis=token)")
    codes_of = jax.jit(one.codes_of)
    packed = codes_of(rng.normal(size=(B, K, 5, H)).astype(np.float32))
    rows = codes_of(rng.normal(size=(3, K, 1, H)).astype(np.float32))
    leaves = tuple(leaf[:, :, 0] for leaf in one.leaves(rows))
    sequence, slot = jnp.asarray([1, -1, 0], jnp.int32), jnp.asarray([[2, 4, -1], [0, 0, 0], [3, 3, 3]], jnp.int32)
    got = jax.jit(lambda p, r: ring.put(one, p, r, sequence, slot))(packed, leaves)
    for old, new, row in zip(one.leaves(packed), one.leaves(got), leaves):
        expected = np.array(old)
        for r, (b, slots) in enumerate(zip([1, None, 0], np.asarray(slot))):
            for head, m in enumerate(slots):
                if b is not None and m >= 0:
                    expected[b, head, m] = np.asarray(row)[r, head]
        assert np.asarray(new).tobytes() == expected.tobytes()


@pytest.mark.parametrize("spec", ["raw", "int8(calibration_tokens=6)", "int8(axis=token)", SKVQ])
@pytest.mark.parametrize("layout", ["tokens", "slots"])
def test_a_row_encoded_later_is_the_row_encoded_at_first(spec, layout):
    """What recomputation relies on: with the scales as they are, the codes are the same."""
    rng, one = np.random.default_rng(3), codec(spec)
    shape = (B, 20, K, H) if layout == "tokens" else (B, K, 20, H)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    packed = jax.jit(lambda x: one.fill(one.empty(shape, layout, "k"), x, layout))(x)
    encoded = jax.jit(lambda p, x: one.encode(p, x, layout))(packed, x)
    for first, again in zip(one.leaves(packed), encoded, strict=True):
        assert np.asarray(first).tobytes() == np.asarray(again).tobytes()
    rebuilt = one.rebuild(packed, one.leaves(packed))
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(rebuilt), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
