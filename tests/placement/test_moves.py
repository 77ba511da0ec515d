"""What lists of positions become, against sets."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alisa_jax.placement import ALL, Rows, Setting, Span, Tier
from alisa_jax.placement.moves import fetch, runs
from alisa_jax.placement.plan import View

POSITIONS = st.lists(st.integers(0, 60), unique=True).map(lambda x: tuple(sorted(x)))


@given(POSITIONS)
def test_runs_are_the_positions_in_as_few_ranges_as_there_are_gaps(positions):
    found = list(runs(positions))
    assert [p for start, stop in found for p in range(start, stop)] == list(positions)
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(found))


@given(st.lists(POSITIONS, min_size=2, max_size=2), st.integers(0, 3), st.integers(0, 3), st.integers(1, 64))
def test_what_is_fetched_is_what_is_wanted_and_off_the_device(wanted, dropped, more, length):
    dropped, host = 16 * dropped, 16 * min(dropped + more, 4)
    setting = Setting(layers=2, prompt_tokens=(48,), new_tokens=80, token_bytes=1.0, device_kv_bytes=1e9)
    spans = (Span(dropped, host),)
    view = View(setting, 1, (length,), (1,), spans)
    load, again = fetch(view, spans, {(layer, ALL): some for layer, some in enumerate(wanted)})
    for layer, some in enumerate(wanted):
        got = [p for r in load if r.layer == layer for p in range(r.start, r.stop)]
        assert got == [p for p in some if dropped <= p < min(host, length)]
    assert all(r.source is Tier.HOST and r.target is Tier.WORKING for r in load)
    lost = [p for some in wanted for p in some if p < min(dropped, host, length)]
    if not lost:
        assert again == ()
    else:
        assert again == (Rows(0, max(lost) + 1, Tier.NOWHERE, Tier.WORKING),)


@pytest.mark.parametrize("positions", [(), (3,), (0, 1, 2)])
def test_runs_of_none_one_and_neighbours(positions):
    assert list(runs(positions)) == ([(positions[0], positions[-1] + 1)] if positions else [])
