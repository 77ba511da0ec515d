"""Buffers for streams: nothing that is lent overlaps, what is released is used again, and streams come out whole."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_jax.placement.mover import Meter, Mover
from alisa_jax.placement.plan import PAGE_TOKENS
from alisa_jax.placement.staging import ALIGNMENT, Staging

INF = float("inf")


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("lend"), st.integers(0, 2), st.integers(0, 40)),
            st.tuples(st.just("release"), st.integers(0, 2), st.just(0)),
        ),
        max_size=30,
    )
)
def test_what_is_lent_is_aligned_and_keeps_its_content_until_it_is_released(calls):
    staging, held, count = Staging(), {}, 0
    for call, key, size in calls:
        if call == "release":
            staging.release(key)
            held.pop(key, None)
            continue
        array = staging.lend(key, (size, 3), np.float32)
        assert array.shape == (size, 3) and (size == 0 or array.ctypes.data % ALIGNMENT == 0)
        count += 1
        array[:] = count
        held.setdefault(key, []).append((array, count))
        assert all((x == n).all() for some in held.values() for x, n in some)


def test_buffers_are_used_again_and_those_that_are_outgrown_are_dropped():
    staging = Staging()
    for size in (8, 8, 6, 9, 9):
        for key in "ab":
            staging.release(key)
            staging.lend(key, (size,), np.int8)
        assert len(staging.free) + sum(map(len, staging.lent.values())) == 2
    first = staging.lent["a"][0].ctypes.data
    staging.release("a")
    assert staging.lend("a", (3,), np.int8).ctypes.data == first


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(1, 3), st.integers(0, 2)), max_size=8))
def test_streams_end_in_zeros_and_change_no_other_that_is_in_use(asked):
    rng, n, K, H = np.random.default_rng(3), 2, 2, 3
    mover = Mover(((0, 1),), "slots", "rows", Meter(INF, INF))
    pages = {(layer, 0, page): rng.normal(size=(n, K, PAGE_TOKENS, H)) for layer in range(2) for page in range(7)}
    pages = {key: (x.astype(np.float32), (100 * x).astype(np.int8)) for key, x in pages.items()}
    mover.store((*key, tuple(map(jnp.asarray, leaves))) for key, leaves in pages.items())
    flight, loaded = [], 0
    for layer, first, size, more in asked:
        if len(flight) == 2:
            done, _ = flight.pop(0)
            if done not in {other for other, _ in flight}:
                mover.release(done)
        got = mover.stream(layer, 0, first, first + size, size + more)
        joined = [np.concatenate(x, axis=2) for x in zip(*(pages[layer, 0, first + i] for i in range(size)))]
        loaded += sum(x.nbytes for x in joined)
        tail = [(0, 0), (0, 0), (0, PAGE_TOKENS * more), (0, 0)]
        flight.append((layer, [(leaf, np.pad(x, tail)) for leaf, x in zip(got, joined, strict=True)]))
        for _, pairs in flight:
            for leaf, expected in pairs:
                np.testing.assert_array_equal(leaf, expected)
    assert mover.meter.load_bytes == loaded
