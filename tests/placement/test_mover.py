"""The mover against NumPy: what comes back is what went, for rows and for pages; bytes are those of the arrays."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_jax.placement import mover
from alisa_jax.placement.mover import Meter, Mover, powers
from alisa_jax.placement.plan import PAGE_TOKENS

INF = float("inf")
GROUPS = ((0, 2), (1,))
K, H, LAYERS, PAGES = 2, 3, 2, 3


def pages_of(layout, seed=0):
    """Random K and V of int8, and a bfloat16 scale for each token: {(layer, group, page): leaves}."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(LAYERS):
        for group, members in enumerate(GROUPS):
            for page in range(PAGES):
                n = len(members)
                order = (n, PAGE_TOKENS, K) if layout == "tokens" else (n, K, PAGE_TOKENS)
                codes = [rng.integers(-128, 128, (*order, H)).astype(np.int8) for _ in "kv"]
                scale = rng.normal(size=order).astype(jnp.bfloat16)
                found[layer, group, page] = (codes[0], scale, codes[1])
    return found


def filled(layout, reads, meter=None):
    meter = Meter(INF, INF) if meter is None else meter
    one, pages = Mover(GROUPS, layout, reads, meter), pages_of(layout)
    one.store((*key, tuple(map(jnp.asarray, leaves))) for key, leaves in pages.items())
    return one, pages


def test_the_self_test_finds_pinned_memory_that_gives_every_bit_back():
    report = mover.self_test()
    assert "pinned_host" in report.kinds and "device" in report.kinds
    assert report.reads in ("rows", "pages")


def test_without_pinned_memory_the_error_says_what_there_is(monkeypatch):
    monkeypatch.setattr(mover, "HOST_KIND", "no_such_kind")
    with pytest.raises(RuntimeError, match="has no no_such_kind memory, only .*pinned_host"):
        mover.self_test()


def test_pages_lie_in_pinned_memory_and_reads_bring_them_to_the_device():
    one, _ = filled("tokens", "rows")
    assert {leaf.sharding.memory_kind for leaves in one.pages.values() for leaf in leaves} == {"pinned_host"}
    (leaves, _), *_ = one.fetch(*np.array([[0], [0], [5]]))
    assert {leaf.sharding.memory_kind for leaf in leaves} == {"device"}


@pytest.mark.parametrize("reads", ["rows", "pages"])
@settings(max_examples=15)
@given(seed=st.integers(0, 999), none=st.floats(0, 1))
def test_gathered_rows_of_single_heads_lie_where_they_were_asked_for(reads, seed, none):
    rng, meter = np.random.default_rng(seed), Meter(INF, INF)
    one, pages = filled("tokens", reads, meter)
    pos = np.stack([rng.permutation(PAGES * PAGE_TOKENS)[:5] for _ in range(3 * K)]).reshape(3, K, 5)
    pos = np.where(rng.random(pos.shape) < none, -1, pos)
    got, wanted = one.gather(1, pos), list(zip(*np.nonzero(pos >= 0)))
    homes = {b: (g, members.index(b)) for g, members in enumerate(GROUPS) for b in members}
    touched, size = set(), 0
    for b, head, slot in wanted:
        (group, member), (page, offset) = homes[b], divmod(int(pos[b, head, slot]), PAGE_TOKENS)
        for leaf, stored in zip(got, pages[1, group, page]):
            np.testing.assert_array_equal(leaf[b, head, slot], stored[member, offset, head])
            size += stored[member, offset, head].nbytes
        touched.add((1, group, page))
    assert meter.loaded_rows == len({(b, pos[b, head, slot]) for b, head, slot in wanted})
    whole = sum(leaf.nbytes for key in touched for leaf in pages[key])
    assert meter.load_bytes == (size if reads == "rows" else whole)
    one.release(1)


@pytest.mark.parametrize("reads", ["rows", "pages"])
@settings(max_examples=15)
@given(
    wanted=st.sets(
        st.tuples(st.integers(0, LAYERS - 1), st.integers(0, 2), st.integers(0, PAGES * PAGE_TOKENS - 1)),
        min_size=1,
        max_size=11,
    )
)
def test_fetched_rows_are_the_stored_ones_bit_for_bit(reads, wanted):
    meter = Meter(INF, INF)
    one, pages = filled("tokens", reads, meter)
    wanted, seen, size = sorted(wanted), set(), 0
    for leaves, index in one.fetch(*np.array(wanted).T):
        size += sum(leaf.nbytes for leaf in leaves)
        for row, i in enumerate(index.tolist()):
            if i < 0:
                continue
            layer, sequence, position = wanted[i]
            group = next(g for g, members in enumerate(GROUPS) if sequence in members)
            page, offset = divmod(position, PAGE_TOKENS)
            for leaf, stored in zip(leaves, pages[layer, group, page]):
                expected = stored[GROUPS[group].index(sequence), offset]
                assert np.asarray(leaf)[row].tobytes() == expected.tobytes()
            seen.add(i)
    assert seen == set(range(len(wanted))) and meter.loaded_rows == len(wanted)
    assert meter.load_bytes == size
    if reads == "rows":
        assert size == len(wanted) * (2 * K * H + 2 * K)


@pytest.mark.parametrize("reads", ["rows", "pages"])
def test_streamed_pages_are_joined_in_order(reads):
    one, pages = filled("slots", reads)
    leaves = one.stream(1, 0, 1, 3, 2)
    for i, leaf in enumerate(leaves):
        expected = np.concatenate([pages[1, 0, page][i] for page in (1, 2)], axis=2)
        assert np.asarray(leaf).tobytes() == expected.tobytes()
    assert one.meter.load_bytes == sum(leaf.nbytes for leaf in leaves)
    assert one.meter.loaded_rows == 2 * PAGE_TOKENS * 2


def test_bytes_are_counted_as_stored_and_freed_when_dropped():
    meter = Meter(INF, INF)
    one, pages = filled("tokens", "rows", meter)
    each = PAGE_TOKENS * (2 * K * H + 2 * K)
    total = each * 3 * LAYERS * PAGES
    assert meter.store_bytes == meter.live["host"] == meter.peak["host"] == total
    assert meter.stored_rows == 3 * PAGE_TOKENS * LAYERS * PAGES
    one.drop(LAYERS, 0, 0)
    assert meter.live["host"] == total - 2 * each * LAYERS and meter.peak["host"] == total
    assert {key for key in pages if key not in one.pages} == {(0, 0, 0), (1, 0, 0)}


def test_a_page_is_written_once():
    one, pages = filled("tokens", "rows")
    with pytest.raises(RuntimeError, match="page 1 of layer 0, group 0 is already on the host"):
        one.store([(0, 0, 1, tuple(map(jnp.asarray, pages[0, 0, 1])))])


def test_a_meter_stops_at_its_budget_and_says_by_how_much():
    meter = Meter(100, 50)
    meter.hold("device", 100)
    with pytest.raises(RuntimeError, match="101 KV bytes on the device, whose budget is 100"):
        meter.hold("device", 1)
    with pytest.raises(RuntimeError, match="60 KV bytes on the host, whose budget is 50"):
        meter.hold("host", 60)


@given(number=st.integers(0, 5000))
def test_transfers_are_powers_of_two_that_carry_nothing_superfluous(number):
    sizes = powers(number)
    assert sum(sizes) == number and sizes == sorted(set(sizes), reverse=True)
    assert all(size & (size - 1) == 0 for size in sizes)
