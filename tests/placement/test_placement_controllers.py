"""What each controller decides, and what it refuses."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from alisa_jax import placement, spec
from alisa_jax.placement import ALL, Rows, Setting, Span, Tier
from alisa_jax.placement.modelled.cost import Cost, Hardware, Shape
from alisa_jax.placement.modelled.residency import PlanError, Residency
from alisa_jax.placement.modelled.simulate import simulate, swa_trace, walk
from alisa_jax.placement.moves import device_bytes
from alisa_jax.placement.plan import moved_bytes

pytestmark = pytest.mark.slow

COST = Cost(
    Hardware("toy", 1e9, 1e9, 1e12, 1e11, 1e10, 2e10, gathered_frac=0.5),
    Shape(1e6, 2e6, 1e3, layers=2, d_model=8, d_ff=32, vocab_size=11, kv_token_bytes=1.0),
)
PAGE = 16.0  # bytes of a page of one layer and sequence in SMALL
SMALL = Setting(layers=2, prompt_tokens=(40, 40), new_tokens=41, token_bytes=1.0, device_kv_bytes=1e9)
KEPT = dict(slots=20, selects=True)
TRACE = swa_trace(lambda n: min(6, n), lambda n: min(12, max(0, n - 6)))


def run(text, setting, trace=TRACE):
    return simulate(placement.parse(text), setting, COST, trace, strict=1)


def with_pages(setting, count, host=1e9):
    """`setting` with room for `count` pages per layer and sequence on the device once it offloads."""
    room = setting.fixed_bytes + setting.staging_bytes(0 if setting.selects else 1)
    room += count * setting.layers * setting.batch * PAGE
    return dataclasses.replace(setting, device_kv_bytes=room, host_kv_bytes=host)


@pytest.mark.parametrize(
    "text",
    ["alisa", "alisa(alpha=0.5,beta=0.25,p1=3,p2=9,traffic=paper,lag=1)", "alisa(recompute=false)"]
    + ["flexgen(cache_device_frac=0.5)", "flexgen", "accelerate", "waves", "resident"],
)
def test_a_spec_prints_as_it_was_read(text):
    assert spec.to_text(placement.parse(text), placement.CONTROLLERS) == text


def test_the_placement_layer_imports_no_jax():
    folder = Path(placement.__file__).parent
    trees = [ast.parse(path.read_text()) for path in folder.rglob("*.py") if path.name != "mover.py"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert len(trees) >= 12 and not [name for name in names if name.split(".")[0] in ("jax", "jaxlib", "flax")]


def test_resident_and_waves_never_plan_anything():
    for text in ("resident", "waves"):
        assert all(plan.empty for _, plan, _ in walk(placement.parse(text), SMALL))


def test_waves_are_as_large_as_the_device_holds():
    five = dataclasses.replace(SMALL, prompt_tokens=(40,) * 5, device_kv_bytes=2 * 2 * 5 * PAGE)  # 80 tokens: 5 pages
    assert [part.batch for part in placement.Waves().groups(five)] == [2, 2, 1]
    assert run("waves", five).groups == 3
    assert [part.batch for part in placement.Waves().groups(dataclasses.replace(five, device_kv_bytes=1e6))] == [5]


def test_accelerate_streams_every_full_page_of_every_layer():
    steps = list(walk(placement.Accelerate(), SMALL))
    assert steps[0][1].store == (Rows(0, 32, Tier.DEVICE, Tier.HOST),)
    assert steps[1][1].load == (Rows(0, 32, Tier.HOST, Tier.STAGING),)
    assert [view.step for view, plan, _ in steps if plan.store] == [0, 9, 25]  # 40 + 8 and 40 + 24 are full pages
    total = run("accelerate", SMALL)
    assert total.load_bytes == sum(2 * 2 * ((39 + j) // 16 * 16) for j in range(1, 41))


def test_flexgen_splits_by_whole_sequences():
    four = dataclasses.replace(SMALL, prompt_tokens=(40,) * 4, layers=6)
    plans = [plan for _, plan, _ in walk(placement.FlexGen(0.6), four)]
    assert {row.sequence for plan in plans for row in (*plan.store, *plan.load)} == {2, 3}
    assert all(plan.ahead == 1 for plan in plans)
    assert placement.FlexGen().device_sequences(four) == 4
    need = four.part(0, 3).store_bytes((80, 80, 80)) + 6 * PAGE + four.staging_bytes(1, slice(3, None))
    assert placement.FlexGen().device_sequences(dataclasses.replace(four, device_kv_bytes=need)) == 3
    assert placement.FlexGen().device_sequences(dataclasses.replace(four, device_kv_bytes=need - 1)) == 2


def test_alisa_keeps_everything_while_it_fits():
    fits = dataclasses.replace(SMALL, **KEPT)
    assert run("alisa", fits).p1 == 41 and run("alisa", fits).load_bytes == 0


def test_alisa_keeps_as_many_recent_tokens_as_fit_and_stores_each_page_once():
    setting = with_pages(dataclasses.replace(SMALL, **KEPT), 2)
    stored = []
    for view, plan, spans in walk(placement.Alisa(), setting, TRACE):
        stored += [(row.start, row.stop) for row in plan.store]
        if view.step:
            held = -(-view.after[0] // 16) - spans[0].host // 16
            assert held == 2 if spans[0].host else held * 16 * 4 <= setting.device_kv_bytes - setting.fixed_bytes
    assert [start for start, _ in stored] == [0, *(stop for _, stop in stored[:-1])] and stored[-1][1] == 48


def test_delta_traffic_loads_what_enters_and_paper_traffic_all_that_is_away():
    setting = with_pages(dataclasses.replace(SMALL, **KEPT), 1)
    delta, paper = run("alisa", setting), run("alisa(traffic=paper)", setting)
    assert 0 < delta.load_bytes < paper.load_bytes / 3
    expected, spans = 0, None
    for view, _, spans in walk(placement.Alisa(traffic="paper"), setting, TRACE):
        away = [p for p in (view.wanted or {}).get((ALL, ALL), ()) if p < spans[0].host]
        expected += 2 * 2 * len(away)
    assert paper.load_bytes == expected and delta.store_bytes == paper.store_bytes


def test_pages_travel_whole_where_rows_cannot_be_read():
    rows = (Rows(3, 4, Tier.HOST, Tier.WORKING), Rows(9, 17, Tier.HOST, Tier.WORKING))
    assert moved_bytes(rows, SMALL, (40, 40)) == 2 * 2 * 9
    assert moved_bytes(rows, dataclasses.replace(SMALL, gather=False), (40, 40)) == 2 * 2 * 2 * PAGE
    assert moved_bytes(rows, dataclasses.replace(SMALL, gather=False), (40, 5)) == 2 * 3 * PAGE


def test_the_host_budget_brings_phase_three():
    setting = with_pages(dataclasses.replace(SMALL, new_tokens=73, **KEPT), 3, host=2 * 2 * 3 * PAGE)
    found = run("alisa", setting)
    assert found.p1 == 9 and found.p2 == 57  # from 49 and 97 tokens: 3 pages stay, and the host has room for 3
    assert found.host_peak_bytes == setting.host_kv_bytes and run("alisa(traffic=paper)", setting).recompute_s > 0
    plans = [plan for _, plan, _ in walk(placement.Alisa(), setting, TRACE)]
    assert all(row.stop <= 16 for plan in plans for row in plan.drop)  # 64 tokens are away at the end, 48 fit
    assert all(row.start == 0 and row.layer == ALL for plan in plans for row in plan.recompute)


def test_deleting_generated_tokens_is_clamped_to_the_prompt_and_said():
    setting = with_pages(dataclasses.replace(SMALL, **KEPT), 1)
    controller = placement.Alisa(alpha=0.99, beta=0.8, p1=0, p2=1)
    *_, (view, plan, spans) = walk(controller, setting, TRACE)
    assert spans == (Span(32, 64),) * 2 and "clamped to the prompt" in plan.notes[0]
    assert "clamped to the prompt" in run("alisa(alpha=0.99,beta=0.8,p1=0,p2=1)", setting).notes[0]


def test_lag_hides_loads_behind_compute():
    setting = with_pages(dataclasses.replace(SMALL, **KEPT), 1)
    now, late = run("alisa(traffic=paper)", setting), run("alisa(traffic=paper,lag=1)", setting)
    assert late.load_bytes == now.load_bytes and late.total_s < now.total_s
    assert late.total_s >= max(late.compute_s, late.load_s)


def test_ragged_batches_move_each_sequence_by_its_own_length():
    ragged = with_pages(dataclasses.replace(SMALL, prompt_tokens=(90, 7), **KEPT), 2)
    steps = [(view.step, spans) for view, _, spans in walk(placement.Alisa(), ragged, TRACE)]
    assert steps[-1][1] == (Span(0, 112), Span(0, 16))  # 130 and 47 tokens, 2 pages kept of each
    assert steps[0][1] == (Span(0, 64), Span())
    assert next(step for step, spans in steps if spans[1].host) == 26  # 33 tokens: more than 2 pages
    assert run("alisa", ragged).load_bytes > 0


@pytest.mark.parametrize(
    ("text", "layouts"),  # with everything on the device; with 400 bytes; with 2000
    [
        ("resident", ((2, 0), None, None)),
        ("waves", ((2, 0), None, (1, 0))),
        ("accelerate", ((0, 1), (0, 1), (0, 1))),
        ("flexgen", ((2, 0), (0, 1), (1, 1))),
        ("flexgen(cache_device_frac=0.5)", ((1, 1), None, (1, 1))),
        ("alisa", ((2, 0), (0, 1), (0, 26))),
        ("alisa(alpha=0.999,traffic=paper)", ((2, 0), (0, 1), (0, 26))),
        ("alisa(p1=0)", ((0, 60), (0, 1), (0, 26))),
        ("alisa(p1=941)", ((2, 0), None, None)),
    ],
)
def test_a_layout_is_how_many_stay_whole_and_the_pages_of_the_others(text, layouts):
    controller = placement.parse(text)
    for room, layout in zip((1e9, 400.0, 2000.0), layouts, strict=True):
        setting = dataclasses.replace(SMALL, prompt_tokens=(7, 90), new_tokens=871, device_kv_bytes=room, **KEPT)
        try:
            controller.check(setting)
        except ValueError:
            assert layout is None
        else:
            assert controller.layout(controller.groups(setting)[0]) == placement.Layout(*layout)


def test_evicting_policies_have_no_store_to_lay_out():
    evicts = dataclasses.replace(SMALL, **KEPT, evicts=True, device_kv_bytes=80.0)
    assert run("resident", evicts).device_peak_bytes == 80.0 and run("waves", evicts).groups == 1


def test_a_token_that_was_not_stored_in_time_is_overwritten():
    setting = with_pages(dataclasses.replace(SMALL, **KEPT), 2)
    controller = placement.Alisa()
    assert controller.layout(setting) == placement.Layout(0, 2)
    for kept, last in ((2, 40), (1, -1)):
        rows, done = Residency(setting, placement.Layout(0, kept), layers=1), -1
        try:
            for view, plan, _ in walk(controller, setting, TRACE):
                if view.step == 1:
                    rows.seed(view.wanted)
                rows.step(view, plan)
                done = view.step
        except PlanError as error:
            assert "position 16 of layer 0 and sequence 0 is overwritten" in str(error)
        assert done == last


@pytest.mark.parametrize("text", ["accelerate", "flexgen(cache_device_frac=0.5)", "alisa", "alisa(traffic=paper)"])
def test_only_a_controller_that_says_so_reads_what_is_wanted(text):
    controller = placement.parse(text)
    setting = with_pages(dataclasses.replace(SMALL, **KEPT), 1)
    differs = False
    for view, plan, _ in walk(controller, setting, TRACE):
        if view.step:
            other = dataclasses.replace(view, wanted={(ALL, ALL): (0, 1, 2, 30)})
            differs |= controller.decide(other) != plan
    assert differs is controller.reads_wanted


def test_a_split_is_found_where_more_on_the_device_need_less():
    one = Setting(1, (16, 160, 16), new_tokens=1, token_bytes=1.0, device_kv_bytes=25 * PAGE)
    # Pages with 0, 1, 2, 3 on the device: two layers of the longest of the others are staged, three where they differ.
    needs = [93, 63, 23, 30]
    assert [device_bytes(one, placement.Layout(b, int(b < 3)), ahead=1) / PAGE for b in range(4)] == needs
    assert placement.FlexGen().device_sequences(one) == 2
    assert placement.FlexGen().device_sequences(dataclasses.replace(one, device_kv_bytes=30 * PAGE)) == 3


RAGGED = dict(KEPT, prompt_tokens=(90, 7))
UNEVEN = dict(KEPT, prompt_tokens=(7, 640), new_tokens=129)
REFUSED = (
    ("resident", {}, 100.0, 1e9, "resident needs device_kv_bytes of at least 320 here; got 100"),
    ("waves", {}, 100.0, 1e9, "waves needs device_kv_bytes of at least 160 here; got 100"),
    ("accelerate", {}, 200.0, 1e9, "accelerate needs device_kv_bytes of at least 224 here; got 200"),
    ("accelerate", {}, 1e9, 319.0, "accelerate needs host_kv_bytes of at least 320 here; got 319"),
    ("flexgen(cache_device_frac=1)", {}, 319.0, 1e9, "flexgen needs device_kv_bytes of at least 320 here"),
    ("alisa", KEPT, 150.0, 1e9, "alisa needs device_kv_bytes of at least 304 here; got 150"),
    ("alisa(recompute=false)", KEPT, 310.0, 100.0, "alisa needs host_kv_bytes of at least 256 here; got 100"),
    ("alisa", KEPT, 310.0, 100.0, "alisa, which deletes prompt tokens at most, needs host_kv_bytes of at least 128"),
    (
        "alisa(p1=30)",
        KEPT,
        360.0,
        1e9,
        "p1 must be at most 0 here, the first step after which a sequence has more than the 16",
    ),
    ("alisa(p1=41)", KEPT, 399.0, 1e9, "leaves it room for; got 41"),
    ("alisa(p1=30)", KEPT, 440.0, 1e9, "p1 must be at most 9 here"),
    ("alisa(p1=30)", KEPT, 440.0, 1e9, "room for, or 41: everything fits; got 30"),
    ("alisa(alpha=0.1)", KEPT, 310.0, 1e9, "alpha must be at least 0.984616 here"),
    ("alisa", dict(KEPT, prompt_tokens=(10, 10), new_tokens=2), 100.0, 1e9, "device_kv_bytes of at least 144 here"),
    (
        "alisa(p1=1)",
        dict(KEPT, prompt_tokens=(10, 10), new_tokens=2),
        150.0,
        1e9,
        "device_kv_bytes of at least 240 here",
    ),
    # 90 and 7 tokens, 130 and 47 at the end: 9 pages each where both are whole, 6 each for the prompt of a layer.
    ("resident", RAGGED, 100.0, 1e9, "device_kv_bytes of at least 656 here"),
    ("waves", RAGGED, 100.0, 1e9, "device_kv_bytes of at least 328 here"),
    ("accelerate", RAGGED, 100.0, 1e9, "device_kv_bytes of at least 400 here"),
    ("accelerate", dict(prompt_tokens=(90, 7)), 100.0, 1e9, "device_kv_bytes of at least 640 here"),
    ("flexgen", RAGGED, 100.0, 1e9, "device_kv_bytes of at least 400 here"),
    ("flexgen(cache_device_frac=0.5)", RAGGED, 100.0, 1e9, "device_kv_bytes of at least 448 here"),
    ("flexgen", dict(prompt_tokens=(7, 90)), 100.0, 1e9, "device_kv_bytes of at least 416 here"),
    ("alisa", RAGGED, 100.0, 1e9, "device_kv_bytes of at least 400 here"),
    ("alisa(alpha=0.5)", RAGGED, 464.0, 1e9, "alpha must be at least 0.868218 here"),
    ("alisa(alpha=0.9)", dict(KEPT, prompt_tokens=(112, 17), new_tokens=1), 450.0, 1e9, "at least 0.941177 here"),
    ("alisa(p1=4)", dict(KEPT, prompt_tokens=(30, 7)), 344.0, 1e9, "p1 must be at most 3 here"),
    # 7 and 43 pages are away at the end; the first sequence can delete none of them, the other keeps half the budget.
    ("alisa(alpha=0.9,p1=0)", UNEVEN, 1808.0, 320.0, "needs host_kv_bytes of at least 416 here; got 320"),
    ("alisa", dict(KEPT, refreshes=True), 1e9, 1e9, "give recompute=false, or refresh_every=0"),
    *((name, dict(KEPT, evicts=True), 1e9, 1e9, "evicts what it does not keep") for name in ("alisa", "flexgen")),
    ("accelerate", dict(KEPT, evicts=True), 1e9, 1e9, "evicts what it does not keep"),
)


@pytest.mark.parametrize(("text", "more", "device", "host", "sentence"), REFUSED)
def test_a_refusal_names_the_smallest_value_that_would_do(text, more, device, host, sentence):
    controller = placement.parse(text)
    setting = dataclasses.replace(SMALL, **more, device_kv_bytes=device, host_kv_bytes=host)
    with pytest.raises(ValueError) as caught:
        controller.check(setting)
    assert sentence in str(caught.value)
    for name in ("device_kv_bytes", "host_kv_bytes"):
        least = re.search(rf"{name} of at least (\d+)", str(caught.value))
        if least:
            enough = dataclasses.replace(setting, **{name: float(least[1])})
            controller.check(enough)
            run(text, enough)
            with pytest.raises(ValueError, match=f"{name} of at least {least[1]}"):
                controller.check(dataclasses.replace(setting, **{name: float(least[1]) - 1}))
    fixed = re.search(r"(p1|alpha) must be at (?:most|least) ([0-9.]+)", str(caught.value))
    if fixed:
        enough = dataclasses.replace(controller, **{fixed[1]: type(getattr(controller, fixed[1]))(fixed[2])})
        simulate(enough, setting, COST, TRACE, strict=1)


@pytest.mark.parametrize(
    "text",
    ["alisa(alpha=0)", "alisa(alpha=1)", "alisa(beta=1.5)", "alisa(p1=9,p2=8)", "alisa(p1=-1)", "alisa(lag=2)"]
    + ["alisa(traffic=all)", "alisa(recompute=false,p2=4)", "flexgen(cache_device_frac=1.1)", "offload"],
)
def test_a_spec_that_makes_no_sense_is_refused_when_it_is_read(text):
    with pytest.raises(spec.SpecError):
        placement.parse(text)
