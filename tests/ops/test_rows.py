"""Rows in and out of both layouts, jitted with donation, against NumPy loops, on prime sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.ops import rows

B, K, M, S, E, H = 2, 3, 7, 11, 5, 13
NOWHERE = (-1, -M, -1000, 2**31 - 1, -(2**31))


@pytest.fixture
def rng():
    return np.random.default_rng(17)


def slots(rng, P, size):
    """Distinct indices per (b, p), some of them out of range on either side."""
    index = np.stack([[rng.permutation(size)[:E] for _ in range(P)] for _ in range(B)]).astype(np.int64)
    for i, bad in enumerate((*NOWHERE[:2], size, size + 1, NOWHERE[3])):
        index[i % B, i % P, i % E] = bad
    return index.astype(np.int32)


@pytest.mark.parametrize("P", [1, K])
def test_put_slots_writes_the_named_slots_and_nothing_else(rng, P):
    x = rng.normal(size=(B, K, M, H)).astype(np.float32)
    new = rng.normal(size=(B, K, E, H)).astype(np.float32)
    slot = slots(rng, P, M)
    want = x.copy()
    for b in range(B):
        for k in range(K):
            for e in range(E):
                at = slot[b, k % P, e]
                if 0 <= at < M:
                    want[b, k, at] = new[b, k, e]
    got = jax.jit(rows.put_slots, donate_argnums=0)(jnp.asarray(x), jnp.asarray(new), jnp.asarray(slot))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("P", [1, K])
@pytest.mark.parametrize("bad", [*NOWHERE, M])
def test_an_index_out_of_range_changes_nothing(rng, P, bad):
    x = rng.normal(size=(B, K, M, H)).astype(np.float32)
    new = np.ones((B, K, E, H), np.float32)
    got = put(jnp.asarray(x), jnp.asarray(new), jnp.full((B, P, E), bad, jnp.int32))
    np.testing.assert_array_equal(got, x)


put = jax.jit(rows.put_slots, donate_argnums=0)


@pytest.mark.parametrize("P", [1, K])
def test_take_slots_and_take_tokens_read_the_named_rows(rng, P):
    x = rng.normal(size=(B, K, M, H)).astype(np.float32)
    store = rng.normal(size=(B, S, K, H)).astype(np.float32)
    slot, pos = slots(rng, P, M), slots(rng, P, S)
    got, got_tokens = jax.jit(rows.take_slots)(x, slot), jax.jit(rows.take_tokens)(store, pos)
    for b in range(B):
        for k in range(K):
            for e in range(E):
                at, token = slot[b, k % P, e], pos[b, k % P, e]
                np.testing.assert_array_equal(got[b, k, e], x[b, k, at if 0 <= at < M else 0])
                np.testing.assert_array_equal(got_tokens[b, k, e], store[b, token if 0 <= token < S else 0, k])


def test_put_tokens_writes_one_row_per_sequence_and_nothing_out_of_range(rng):
    write = jax.jit(rows.put_tokens, donate_argnums=0)
    for pos in ([3, 10], [-1, 11], [0, 2**31 - 1], [-(2**31), 5]):
        x = rng.normal(size=(B, S, K, H)).astype(np.float32)
        new = rng.normal(size=(B, K, H)).astype(np.float32)
        want = x.copy()
        for b, p in enumerate(pos):
            if 0 <= p < S:
                want[b, p] = new[b]
        np.testing.assert_array_equal(write(jnp.asarray(x), jnp.asarray(new), jnp.array(pos, jnp.int32)), want)


@pytest.mark.parametrize("P", [1, K])
def test_copying_rows_from_the_store_to_slots_and_reshaping_in_one_program_is_exact(rng, P):
    """The pattern of an exchange followed by attention, where in-place updates must not read what they overwrote."""

    def program(x, store, slot, pos, new, length):
        store = rows.put_tokens(store, new, length)
        x = rows.put_slots(x, rows.take_tokens(store, pos), slot)
        x = rows.put_slots(x, rows.take_slots(x, slot[..., ::-1]), slot)
        return x.reshape(B * K, M * H), store.reshape(B, S * K * H)

    x = rng.normal(size=(B, K, M, H)).astype(np.float32)
    store = rng.normal(size=(B, S, K, H)).astype(np.float32)
    new = rng.normal(size=(B, K, H)).astype(np.float32)
    slot = np.stack([[rng.permutation(M)[:E] for _ in range(P)] for _ in range(B)]).astype(np.int32)
    pos = np.stack([[rng.permutation(S)[:E] for _ in range(P)] for _ in range(B)]).astype(np.int32)
    length = np.array([4, 9], np.int32)
    want, want_store = x.copy(), store.copy()
    for b in range(B):
        want_store[b, length[b]] = new[b]
        for k in range(K):
            loaded = [want_store[b, p, k] for p in pos[b, k % P]]
            for at, row in zip(slot[b, k % P], loaded[::-1]):  # written, then read back in reversed order
                want[b, k, at] = row
    step = jax.jit(program, donate_argnums=(0, 1))
    got, got_store = step(*(jnp.asarray(a) for a in (x, store, slot, pos, new, length)))
    np.testing.assert_array_equal(got, want.reshape(B * K, M * H))
    np.testing.assert_array_equal(got_store, want_store.reshape(B, S * K * H))


def test_pad_axis_extends_behind_and_keeps_the_dtype():
    x = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    got = rows.pad_axis(x, 1, 5, -1)
    assert np.asarray(got).tolist() == [[0, 1, 2, -1, -1], [3, 4, 5, -1, -1]] and got.dtype == x.dtype
