"""Belady's oracle beside exhaustive search, a rule without foresight, and every controller on the same selections."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alisa_jax import placement
from alisa_jax.placement import Layout, Setting
from alisa_jax.placement.controllers.alisa import least_device_bytes
from alisa_jax.placement.modelled.belady import held_rows, least_rows
from alisa_jax.placement.modelled.simulate import brought_rows, walk


@st.composite
def selections(draw, tokens=7):
    """(wanted, prompt_tokens, capacity) of up to `tokens` tokens."""
    prompt = draw(st.integers(1, tokens - 1))
    steps = draw(st.integers(0, tokens - prompt))
    wanted = [sorted(draw(st.sets(st.integers(0, prompt + i - 1), max_size=5))) for i in range(steps)]
    most = max(map(len, wanted), default=0)
    return wanted, prompt, draw(st.integers(most, prompt + steps))


def searched(wanted, prompt_tokens, capacity):
    """The least over all ways to let go, from every set that a prompt can leave; a set is the bits of an int."""
    fits = lambda rows: rows.bit_count() <= capacity
    best = {rows: 0 for rows in range(1 << prompt_tokens) if fits(rows)}
    for step, positions in enumerate(wanted):
        want, tokens, after = sum(1 << p for p in positions), prompt_tokens + step + 1, {}
        for held, cost in best.items():
            cost += (want & ~held).bit_count()
            for kept in filter(fits, (want | some for some in subsets(held & ~want))):
                written = kept | 1 << (tokens - 1)
                for left in filter(fits, (written, *(written & ~(1 << p) for p in range(tokens)))):
                    after[left] = min(cost, after.get(left, cost))
        best = after
    return min(best.values())


def subsets(rows):
    some = rows
    while some:
        yield some
        some = (some - 1) & rows
    yield 0


def least_recently_used(wanted, prompt_tokens, capacity):
    """What a rule without foresight loads: the newest of the prompt are there first, the least recently used go."""
    held, loads = list(range(prompt_tokens))[-capacity:] if capacity else [], 0
    for step, positions in enumerate(wanted):
        loads += len(set(positions) - set(held))
        used = [*positions, prompt_tokens + step]
        held = [p for p in held if p not in used] + used
        held = held[-capacity:] if capacity else []
    return loads


@given(selections())
def test_no_way_to_let_go_loads_fewer_and_one_loads_as_many(case):
    assert least_rows(*case) == searched(*case)


@given(selections(tokens=40))
def test_the_oracle_is_a_bound_and_room_never_hurts(case):
    wanted, prompt, capacity = case
    loads = [least_rows(wanted, prompt, room) for room in range(capacity, prompt + len(wanted) + 1)]
    assert loads == sorted(loads, reverse=True) and loads[-1] == 0
    cold = {p for positions in wanted for p in positions if p < prompt}
    assert max(0, len(cold) - capacity) <= loads[0] <= least_recently_used(*case)
    assert loads[0] <= sum(len(set(now) - set(held)) for held, now in itertools.pairwise(wanted))


def test_by_hand():
    assert least_rows([], 5, 0) == 0
    assert least_rows([(0,), (1,), (0,), (1,)], 2, 1) == 3  # 0 is there, then each takes the other's place
    assert least_rows([(0,), (1,), (0,), (1,)], 2, 2) == 0
    assert least_rows([(), (3,), (), (3,)], 3, 1) == 0  # what a step wrote is kept for free
    assert least_rows([(0, 1), (2,), (0, 1)], 3, 2) == 2  # 2 comes in place of 0 or 1, which comes back


def test_as_much_as_a_long_run_has_agrees_with_a_search_for_the_farthest_use():
    rng = np.random.default_rng(0)
    prompt = 60
    steps = 150
    capacity = 45
    wanted = [np.sort(rng.choice(prompt + i, rng.integers(10, 40), replace=False)) for i in range(steps)]
    uses = [[i for i in range(steps) if p in wanted[i]] for p in range(prompt + steps)]
    following = lambda p, i: next((use for use in uses[p] if use > i), math.inf)
    held, loads = set(sorted(range(prompt), key=lambda p: following(p, -1))[:capacity]), 0
    for i, rows in enumerate(wanted):
        rows = set(rows.tolist())
        loads += len(rows - held)
        others = sorted(held - rows, key=lambda p: following(p, i))[: capacity - len(rows)]
        held = set(sorted({*rows, *others, prompt + i}, key=lambda p: following(p, i))[:capacity])
    assert least_rows(wanted, prompt, capacity) == loads > 0


@pytest.mark.parametrize(
    "wanted, says",
    [
        ([(), (0, 1, 2)], "step 2 wants 3 rows together, and the device holds 2"),
        ([(), (5,)], "step 2 wants positions 5 to 5, and there are 5 tokens before its own"),
        ([(-1, 2)], "step 1 wants positions -1 to 2"),
        ([(2, 1)], "step 1 wants positions that do not ascend"),
    ],
)
def test_what_no_device_can_attend_is_refused(wanted, says):
    with pytest.raises(ValueError, match=says):
        least_rows(wanted, 4, 2)


def test_rows_are_held_in_slots_of_every_head_and_in_the_ring():
    setting = Setting(2, (40, 40), 8, 1.0, 1e9, slots=7, selects=True)
    assert held_rows(setting, Layout(0, 3)) == 7 + 48
    assert held_rows(setting, Layout(1, 1), heads=4) == 28 + 16


PROMPTS, NEW, SLOTS = (40, 33), 60, 9


def restless(seed):
    """{(layer, sequence): what each step wants}: the newest token and seven others, of which a few change."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(2):
        for b, n in enumerate(PROMPTS):
            held, found[layer, b] = list(range(7)), []
            for step in range(NEW - 1):
                for i in np.flatnonzero(rng.random(7) < 0.6):
                    held[i] = rng.choice([p for p in range(n + step - 1) if p not in held])
                found[layer, b].append(tuple(sorted({*map(int, held), n + step - 1})))
    return found


@pytest.mark.parametrize("pages", [1, 2])
@pytest.mark.parametrize(
    "text",
    ["accelerate", "flexgen(cache_device_frac=0.5)", "alisa", "alisa(traffic=paper)", "alisa(p1=0,p2=9,beta=0.3)"]
    + ["alisa(p1=0,p2=9,beta=0.3,traffic=paper)"],
)
def test_no_controller_brings_fewer_rows_than_the_oracle_loads(text, pages):
    controller, found = placement.parse(text), restless(pages)
    setting = Setting(2, PROMPTS, NEW, 1.0, device_kv_bytes=math.inf, slots=SLOTS, selects=True)
    room = least_device_bytes(setting) + (pages - 1) * 2 * 2 * setting.page_bytes
    if text != "flexgen(cache_device_frac=0.5)":
        setting = dataclasses.replace(setting, device_kv_bytes=room)
    controller.check(setting)
    layout = controller.layout(setting)
    trace = lambda step, lengths: {key: sets[step - 1] for key, sets in found.items()}
    brought = [brought_rows(controller, *step) for step in walk(controller, setting, trace)]
    least = sum(
        least_rows(sets, PROMPTS[b], held_rows(setting, layout)) for (_, b), sets in found.items() if b >= layout.whole
    )
    assert layout.whole == int(text.startswith("flexgen"))
    assert 0 < least <= sum(map(sum, brought))
    assert ("beta" in text) == any(recomputed for _, recomputed in brought)
