"""Store and working set under donation, against a NumPy model of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.codecs import Raw
from alisa_jax.kv.state import EMPTY, Store, WorkingSet, bias_of, tree_bytes
from tests import encoded

B, K, M, S, H, E = 2, 3, 7, 23, 5, 2
CODEC = Raw("float32")


def append_(ws, k, v, length):
    return encoded.append(ws, CODEC, k, v, length)


append = jax.jit(append_, donate_argnums=0)
load = jax.jit(lambda ws, store, slot, pos: ws.load(CODEC, store, slot, pos), donate_argnums=0)
store_append = jax.jit(lambda store, k, v, length: encoded.append(store, CODEC, k, v, length), donate_argnums=0)


class Model:
    """A working set and a store in NumPy: one slot at a time."""

    def __init__(self, P, slots=M):
        self.P = P
        self.k, self.v = (np.zeros((B, K, slots, H), np.float32) for _ in "kv")
        self.pos = np.full((B, P, slots), EMPTY, np.int32)
        self.bias = np.full((B, P, slots), -np.inf, np.float32)
        self.store_k, self.store_v = (np.zeros((B, S, K, H), np.float32) for _ in "kv")

    def append(self, k, v, length):
        taken = np.full((B, self.P), self.pos.shape[-1])
        for b in range(B):
            if 0 <= length[b] < S:
                self.store_k[b, length[b]], self.store_v[b, length[b]] = k[b], v[b]
            for p in range(self.P):
                free = np.flatnonzero(self.pos[b, p] == EMPTY)
                if len(free):
                    at = taken[b, p] = free[0]
                    self.pos[b, p, at], self.bias[b, p, at] = length[b], 0
                    for head in range(K) if self.P == 1 else [p]:
                        self.k[b, head, at], self.v[b, head, at] = k[b, head], v[b, head]
        return taken

    def load(self, slot, pos):
        for b in range(B):
            for head in range(K):
                for at, token in zip(slot[b, head % self.P], pos[b, head % self.P]):
                    if at >= 0:
                        self.k[b, head, at], self.v[b, head, at] = (
                            self.store_k[b, token, head],
                            self.store_v[b, token, head],
                        )

    def check(self, ws, store):
        for name in ("k", "v", "pos", "bias"):
            np.testing.assert_array_equal(getattr(ws, name), getattr(self, name), name)
        np.testing.assert_array_equal(store.k, self.store_k)
        np.testing.assert_array_equal(store.v, self.store_v)


@pytest.mark.parametrize("P", [1, K])
def test_a_hundred_random_appends_evictions_and_loads_equal_the_model(P):
    rng = np.random.default_rng(29)
    model = Model(P)
    ws, store = WorkingSet.empty(CODEC, B, K, M, H, P), Store.empty(CODEC, B, S, K, H)
    for n in range(100):
        length = np.array([n % (S + 2), (n + 3) % (S + 2)], np.int32)  # at times behind the store's last row
        k, v = rng.normal(size=(2, B, K, H)).astype(np.float32)
        ws, slot = append(ws, jnp.asarray(k), jnp.asarray(v), jnp.asarray(length))
        store = store_append(store, jnp.asarray(k), jnp.asarray(v), jnp.asarray(length))
        np.testing.assert_array_equal(slot, model.append(k, v, length))
        if n % 3 == 0:
            to = np.stack([[rng.permutation(M)[:E] for _ in range(P)] for _ in range(B)]).astype(np.int32)
            to[rng.random(to.shape) < 0.3] = -1
            token = np.where(to >= 0, rng.integers(0, S, to.shape), -1).astype(np.int32)
            ws = load(ws, store, jnp.asarray(to), jnp.asarray(token))
            model.load(to, token)
        if n % 4 == 0:  # a policy empties some slots
            gone = rng.random(model.pos.shape) < 0.5
            model.pos[gone], model.bias[gone] = EMPTY, -np.inf
            ws = ws.replace(pos=jnp.asarray(model.pos), bias=jnp.asarray(model.bias))
        model.check(ws, store)


@pytest.mark.parametrize("P", [1, K])
def test_a_full_set_loses_the_new_token_and_never_an_old_one(P):
    rng = np.random.default_rng(31)
    ws, lost = WorkingSet.empty(CODEC, B, K, M, H, P), jnp.full((B, K, H), 99.0)
    for n in range(M):
        k, v = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, B, K, H)))
        ws, slot = append(ws, k, v, jnp.full((B,), n, jnp.int32))
        assert (np.asarray(slot) == n).all()
    before = jax.tree.map(np.array, ws)
    ws, slot = append(ws, lost, lost, jnp.full((B,), M, jnp.int32))
    assert (np.asarray(slot) == M).all()
    jax.tree.map(np.testing.assert_array_equal, ws, before)


def test_a_parked_token_is_not_overwritten_by_an_append():
    ws = WorkingSet.empty(CODEC, B, K, M, H, 1)
    ws = ws.replace(pos=ws.pos.at[:, :, :2].set(5))  # resident, bias still -inf
    ws, slot = append(ws, jnp.ones((B, K, H)), jnp.ones((B, K, H)), jnp.full((B,), 9, jnp.int32))
    assert (np.asarray(slot) == 2).all() and np.asarray(ws.pos)[0, 0].tolist() == [5, 5, 9] + [-1] * (M - 3)


def test_growing_keeps_every_token_in_its_slot_and_adds_empty_ones():
    rng = np.random.default_rng(37)
    ws = WorkingSet.empty(CODEC, B, K, M, H, K)
    ws = ws.replace(
        k=jnp.asarray(rng.normal(size=ws.k.shape), jnp.float32), v=jnp.asarray(rng.normal(size=ws.v.shape), jnp.float32)
    )
    ws = ws.replace(pos=ws.pos.at[:, :, 2:5].set(3), bias=ws.bias.at[:, :, 2:4].set(0.0))
    more = jax.jit(lambda ws: ws.grow(CODEC, M + 4))(ws)
    for name in ("k", "v", "pos", "bias"):
        np.testing.assert_array_equal(getattr(more, name)[:, :, :M], getattr(ws, name))
    assert (np.asarray(more.pos)[..., M:] == EMPTY).all() and (np.asarray(more.bias)[..., M:] == -np.inf).all()
    store = Store(jnp.ones((B, S, K, H)), jnp.full((B, S, K, H), 2.0)).grow(CODEC, S + 6)
    assert store.k.shape == store.v.shape == (B, S + 6, K, H)
    assert (np.asarray(store.v)[:, :S] == 2).all() and (np.asarray(store.v)[:, S:] == 0).all()


def test_an_empty_set_has_only_empty_slots():
    ws = WorkingSet.empty(CODEC, B, K, M, H, K)
    assert ws.pos.shape == (B, K, M) and (np.asarray(ws.pos) == EMPTY).all() and (np.asarray(ws.bias) == -np.inf).all()
    assert np.asarray(bias_of(jnp.array([3, -1, 0]))).tolist() == [0, -np.inf, 0]


def test_tree_bytes_counts_arrays_and_shapes_alike():
    ws = WorkingSet.empty(Raw("float16"), B, K, M, H, 1)
    want = 2 * B * K * M * H * 2 + B * M * 4 * 2
    assert tree_bytes(ws) == want == sum(leaf.nbytes for leaf in jax.tree.leaves(ws))
    assert tree_bytes(jax.eval_shape(lambda: ws)) == want
