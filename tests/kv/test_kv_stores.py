"""`Store` and `Ring` behind `TokenStore`: one set of verbs, and what each verb does, against NumPy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.codecs import Raw
from alisa_jax.kv.pending import PENDING_ROWS, Pending
from alisa_jax.kv.ring import Ring
from alisa_jax.kv.state import Store, TokenStore
from tests import encoded

B, P, K, H, S, C, E, M = 3, 2, 2, 4, 40, 32, 3, 9
CODEC = Raw("float32")
HOST = (16, 0, 32)  # positions below are elsewhere
VERBS = sorted(name for name in vars(TokenStore) if not name.startswith("_"))


def filled(kind, rng):
    if kind is Store:
        return Store(*(jnp.asarray(rng.normal(size=(B, S, K, H)), jnp.float32) for _ in "kv"))
    k, v = (jnp.asarray(rng.normal(size=(B, C, K, H)), jnp.float32) for _ in "kv")
    return Ring(k, v, jnp.asarray(HOST, jnp.int32), Pending.empty(B, P))


def asked(rng, absent=0.5):
    """Slots and positions [B, P, E] that a policy asks for; -1 for none."""
    pos = np.where(rng.random((B, P, E)) < absent, rng.integers(0, 16, (B, P, E)), rng.integers(32, S, (B, P, E)))
    slot = np.stack([[rng.permutation(M)[:E] for _ in range(P)] for _ in range(B)])
    none = rng.random((B, P, E)) < 0.3
    return np.where(none, -1, slot).astype(np.int32), np.where(none, -1, pos).astype(np.int32)


request = jax.jit(lambda store, pending, slot, pos, more: store.request(pending, slot, pos, more))
waiting = jax.jit(lambda store, pending: store.waiting(pending))
delivered = jax.jit(lambda store: store.delivered())
hide = jax.jit(lambda store, bias: store.hide(bias))
waits = jax.jit(lambda store: store.waits())
adopt = jax.jit(lambda store, other, rows, which: store.adopt(other, rows, which))
TRUE = np.bool_(True)


def test_the_protocol_is_of_these_verbs():
    assert VERBS == sorted("append take grow freeze adopt request pending waiting delivered hide waits".split())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", [Store, Ring])
def test_both_stores_have_every_verb_with_its_arguments(kind, verb):
    wanted, found = inspect.getattr_static(TokenStore, verb), inspect.getattr_static(kind, verb, None)
    if verb == "pending":
        assert isinstance(wanted, property) and (isinstance(found, property) or verb in kind.__dataclass_fields__)
        return
    args = [list(inspect.signature(f).parameters.values()) for f in (wanted, found)]
    names, kinds, defaults = ([[getattr(p, x) for p in side] for side in args] for x in ("name", "kind", "default"))
    assert names[0] == names[1] and kinds[0] == kinds[1] and defaults[0] == defaults[1]


@pytest.mark.parametrize("kind", [Store, Ring])
def test_both_stores_hold_the_fields_and_verbs_keep_the_tree(kind):
    store = filled(kind, np.random.default_rng(0))
    assert {"k", "v"} <= set(store.__dataclass_fields__)
    kept = (store.freeze(CODEC), store.delivered(), store.waiting(store.pending), store.grow(CODEC, S))
    assert {jax.tree.structure(x) for x in kept} == {jax.tree.structure(store)}
    again = adopt(store, store, jnp.arange(B, dtype=jnp.int32), jnp.ones(B, bool))
    jax.tree.map(np.testing.assert_array_equal, again, store)


@pytest.mark.parametrize("kind", [Store, Ring])
def test_rows_are_taken_where_they_were_appended(kind):
    rng = np.random.default_rng(1)
    store, length = filled(kind, rng), jnp.asarray([33, 39, 32], jnp.int32)
    k, v = (jnp.asarray(rng.normal(size=(B, K, H)), jnp.float32) for _ in "kv")
    store = jax.jit(lambda s, k, v, n: encoded.append(s, CODEC, k, v, n))(store, k, v, length)
    pos = jnp.broadcast_to(length[:, None, None], (B, 1, 1))
    for found, row in zip(store.take(CODEC, pos), (k, v), strict=True):
        np.testing.assert_array_equal(found[:, :, 0], row)


def test_a_store_has_every_row():
    rng = np.random.default_rng(2)
    store, (slot, pos), bias = filled(Store, rng), asked(rng), rng.normal(size=(B, P, M)).astype(np.float32)
    assert store.pending == () and not waits(store)
    for more in (TRUE, ~TRUE):
        here, pending, goes_on = request(store, (), slot, pos, more)
        np.testing.assert_array_equal(here, slot)
        assert pending == () and bool(goes_on) == bool(more)
    for same in (waiting(store, ()), delivered(store)):
        jax.tree.map(np.testing.assert_array_equal, same, store)
    np.testing.assert_array_equal(hide(store, bias), bias)
    grown = jax.jit(lambda s: s.grow(CODEC, S + 8))(store)
    np.testing.assert_array_equal(np.asarray(grown.k)[:, :S], store.k)
    assert grown.k.shape[1] == S + 8


class Waiting:
    """What waits, in NumPy: a list of (position, slot) per sequence and head."""

    def __init__(self):
        self.rows = [[[] for _ in range(P)] for _ in range(B)]
        self.stopped = False

    def request(self, slot, pos, more):
        here = slot.copy()
        for b, p, e in np.ndindex(slot.shape):
            if 0 <= pos[b, p, e] < HOST[b]:
                here[b, p, e] = -1
                self.rows[b][p].append((pos[b, p, e], slot[b, p, e]))
        full = max(len(rows) for sides in self.rows for rows in sides) + E > PENDING_ROWS
        self.stopped = more and full
        return here, more and not full

    def check(self, pending):
        for b, p in np.ndindex(B, P):
            rows = self.rows[b][p] + [(-1, -1)] * (PENDING_ROWS - len(self.rows[b][p]))
            np.testing.assert_array_equal(np.stack([pending.pos[b, p], pending.slot[b, p]], 1), rows)
        assert bool(pending.more) == self.stopped


def test_a_ring_notes_what_is_elsewhere_until_no_more_fits():
    rng, model = np.random.default_rng(3), Waiting()
    store = filled(Ring, rng)
    pending = store.pending
    more = True
    asks = 0
    while more:
        slot, pos = asked(rng, 0.9)
        found, pending, goes_on = request(store, pending, slot, pos, TRUE)
        here, more = model.request(slot, pos, True)
        np.testing.assert_array_equal(found, here)
        assert bool(goes_on) == more
        model.check(pending)
        asks += 1
    assert asks > 3 and model.stopped
    assert not waits(store), "the store itself waits for nothing before it is told"
    store = waiting(store, pending)
    assert waits(store)
    bias = rng.normal(size=(B, P, M)).astype(np.float32)
    hidden = bias.copy()
    for b, p in np.ndindex(B, P):
        hidden[b, p, [slot for _, slot in model.rows[b][p]]] = -np.inf
    np.testing.assert_array_equal(hide(store, bias), hidden)
    store = delivered(store)
    assert not waits(store)
    np.testing.assert_array_equal(hide(store, bias), bias)


def test_an_exchange_that_ends_with_its_last_request_is_not_stopped():
    rng, model = np.random.default_rng(4), Waiting()
    store = filled(Ring, rng)
    slot, pos = asked(rng)
    _, pending, goes_on = request(store, store.pending, slot, pos, ~TRUE)
    model.request(slot, pos, False)
    model.check(pending)
    assert not goes_on and not pending.more


def test_a_ring_that_is_adopted_brings_its_pending_rows():
    rng = np.random.default_rng(5)
    rings = []
    for _ in range(2):
        ring = filled(Ring, rng)
        rings.append(waiting(ring, request(ring, ring.pending, *asked(rng), ~TRUE)[1]))
    one, other = rings
    rows, which = np.array([2, 0, 1], np.int32), np.array([True, False, True])
    got = adopt(one, other, rows, which)
    pairs = zip(*(jax.tree.leaves((r.k, r.v, r.host, r.pending.pos, r.pending.slot)) for r in (got, one, other)))
    for found, mine, theirs in pairs:
        picked = which.reshape(-1, *[1] * (mine.ndim - 1))
        np.testing.assert_array_equal(found, np.where(picked, np.asarray(theirs)[rows], mine))
    assert not got.pending.more and waits(got)
    stopped = other.replace(pending=other.pending.replace(more=jnp.bool_(True)))
    assert adopt(one, stopped, rows, which).pending.more
    alone = adopt(one, one, np.array([1, 1], np.int32), None)  # two sequences of three
    np.testing.assert_array_equal(alone.pending.slot, np.asarray(one.pending.slot)[[1, 1]])
    assert alone.k.shape[0] == alone.host.shape[0] == 2
