"""eval.modelled: fits recover what made the data, two cells are checked by hand, and the published trends come out."""

import copy
import dataclasses
from types import MappingProxyType

import numpy as np
import pytest

from eval.figures import base
from eval.modelled import paper_cells, paper_fits, paper_system
from eval.modelled.paper_cells import pick
from eval.modelled.paper_system import OPT_30B, Fits, Seconds
from eval.modelled.paper_trends import trends

pytestmark = pytest.mark.slow

S, N = 128, 512


@pytest.fixture(scope="module")
def published() -> dict:
    """The paper's numbers, Figure 9 cut to batches 4 and 64, Figures 12b and 12c to three sparsities."""
    paper = base.paper("alisa_throughput")
    bars = paper["fig9_tokens_per_s"]
    for name in bars.keys() - {"batch"}:
        bars[name] = {system: [row[0], row[-1]] for system, row in bars[name].items()}
    bars["batch"] = [4, 64]
    paper["fig12a_s"]["flexgen"] = paper["fig12a_s"]["flexgen"][::5]
    del paper["fig12b_s"]["40"], paper["fig12c_tokens_per_s"]["60"]
    return paper


@pytest.fixture(scope="module")
def fits(published) -> Fits:
    return paper_fits.fit(published)


@pytest.fixture(scope="module")
def cells(published, fits) -> list[dict]:
    figures = (paper_cells.figure_9, paper_cells.figure_12a, paper_cells.figure_12b, paper_cells.figure_12c)
    return [one for figure in figures for one in figure(published, fits)]


def test_fits_recover_the_constants_that_made_the_numbers(published):
    truth = Fits(
        link_bytes_per_s=MappingProxyType({"h100": 31e9, "v100": 17e9}),
        layer_s=MappingProxyType({"opt": 1.1e-3, "llama": 1.3e-3}),
        flops_per_s=MappingProxyType({"h100": 3e14, "v100": 2e13}),
        row_bytes_per_s=11e9,
        alpha=0.37,
        beta=0.125,
        recompute_passes=21.0,
        accelerate_layer_s=3e-3,
        vllm_sequences=MappingProxyType({"h100": 16}),
    )
    found = paper_fits.fit(_made_by(truth, published))
    for field in dataclasses.fields(Fits):
        was, now = getattr(truth, field.name), getattr(found, field.name)
        for key in was if isinstance(was, MappingProxyType) else (None,):
            pair = (now, was) if key is None else (now[key], was[key])
            assert pair[0] == pytest.approx(pair[1], rel=1e-6), (field.name, key)


def test_a_step_that_would_shorten_with_the_batch_is_fitted_as_constant(published, monkeypatch):
    """OPT-30B's batch 4 a hundredfold slower: c is 0, not negative."""
    monkeypatch.setattr(paper_fits, "_with_cells", lambda fits, published: fits)
    slow = copy.deepcopy(published)
    for system in ("flexgen", "vllm"):
        slow["fig9_tokens_per_s"]["OPT-30B"][system][0] /= 100
    assert paper_system.step_s(OPT_30B, paper_fits.fit(slow))[1] == 0.0


def test_the_fitted_links_are_those_that_the_bytes_of_the_cache_imply(fits):
    """Seconds of Figures 12 and 1 into the bytes of 16-bit K and V over all steps, of 90 % and of all sequences."""
    tokens = sum(S + j for j in range(N))
    assert fits.link_bytes_per_s["h100"] == pytest.approx(0.9 * 64 * 48 * 7168 * 4 * tokens / 330.2, rel=0.03)
    assert fits.link_bytes_per_s["v100"] == pytest.approx(64 * 32 * 4096 * 4 * tokens / 245.8, rel=0.03)


def test_a_cell_of_flexgen_is_what_the_formula_by_hand_gives(published):
    """OPT-13B, batch 16: one sequence stays, full pages of the others are sent at every step, and stored once."""
    place, given = paper_system.MODELS[1], _given(flops_per_s=50e12)
    layers, width, vocab = 40, 5120, 50272
    weight_flops = 2 * (12 * width**2 * layers + vocab * width)
    token_bytes = 4 * layers * width
    step = 1.5e-3 * layers + weight_flops / 50e12 * 16
    prompt = 16 * (S * weight_flops + 4 * layers * width * S * (S + 1) / 2) / (0.6 * 125e12)
    pages = [(S + j - 1) // 16 * 16 for j in range(1, N)]
    copied = 15 * token_bytes * (sum(pages) + pages[-1])
    hand = prompt + (N - 1) * step + copied / 20e9
    assert paper_system.seconds("flexgen", place, 16, published, given).total_s == pytest.approx(hand, rel=2e-3)


def test_a_cell_of_alisa_is_what_equation_5_by_hand_gives(published):
    """OPT-30B, batch 64, 80 % sparsity: every p2 in float64, and the best of them is the cell."""
    given, r, layers, width = _given(), 1.0 - 0.8, 48, 7168
    weight_flops = 2 * (12 * width**2 * layers + 50272 * width)
    unit = 64 * layers * 2 * 56 * (128 + 3) / 19e9  # INT8 and 3 bytes for scale and zero point, K and V of 56 heads
    step = 1.5e-3 * layers + layers * 1e-6 * (190.7 - 94.7) + 64 * weight_flops / 300e12
    more = 45 * 64 * weight_flops / 989.4e12
    prompt = 64 * (S * weight_flops + 4 * layers * width * S * (S + 1) / 2) / (0.6 * 989.4e12)
    j = np.arange(N, dtype=np.float64)
    two = unit * (0.2 * (S + j) + np.floor((S + j) * r + 0.5))
    three = unit * np.floor((S + j) * r * 0.9 + 0.5)
    total = [
        prompt + (N - 1) * step + two[144:p2].sum() + three[p2:].sum() + (N - p2) * more for p2 in range(145, N + 1)
    ]
    found = paper_system.alisa(OPT_30B, 64, 0.8, published, given)
    assert (found.p1, found.p2) == (144, 145 + int(np.argmin(total)))
    assert 145 < found.p2 < N
    assert found.seconds.total_s == pytest.approx(min(total), rel=1e-3)
    whole = paper_system.alisa(OPT_30B, 64, 0.8, published, given, recompute=False)
    assert whole.p2 == N and whole.seconds.total_s == pytest.approx(total[-1], rel=1e-3)
    halves = [sum(part) for part in zip(found.until(200), _after(found, 200))]
    assert halves == pytest.approx(found.seconds)


def test_recomputing_would_never_pay_if_phase_three_went_on_offloading(fits):
    """What deletion alone saves at the last step of the longest selection, against T, in passes of a token."""
    position_s = 64 * 48 * 2 * 56 * 131 / fits.row_bytes_per_s
    saved = position_s * 0.8 * fits.beta * (S + N)
    weight_flops = 2 * (12 * 7168**2 * 48 + 50272 * 7168)
    assert saved < fits.recompute_passes * 64 * weight_flops / 989.4e12


def test_a_longer_recomputation_gives_the_published_p2_and_too_little_gain(published, fits):
    longer = dataclasses.replace(fits, recompute_passes=1.26 * fits.recompute_passes)
    for key, steps in published["fig12a_steps"].items():
        found = paper_system.alisa(OPT_30B, 64, int(key) / 100, published, longer)
        assert found.p2 == pytest.approx(steps["p2"], rel=0.06)
        whole = paper_system.alisa(OPT_30B, 64, int(key) / 100, published, longer, recompute=False)
        assert 1.0 < whole.seconds.total_s / found.seconds.total_s < 1.1


def test_phase_one_ends_early_where_the_device_is_full(published, fits):
    small, large = (paper_system.alisa(paper_system.MODELS[0], batch, 0.8, published, fits) for batch in (4, 64))
    assert large.p1 < small.p1 == published["fig12a_steps"]["80"]["p1"]


def test_every_cell_has_its_error_and_the_fitted_ones_are_marked(cells, published):
    for one in cells:
        assert one["basis"] == "modelled"
        if one["published"] is None or one["modelled"] == "OOM":
            assert one["error_frac"] is None
        else:
            assert one["error_frac"] == pytest.approx(one["modelled"] / one["published"] - 1)
    nine = [
        one
        for one in pick(cells, figure="9", quantity="tokens_per_s", fitted=True)
        if one["system"] != "vllm_by_memory"
    ]
    assert {(one["model"], one["system"], one["batch"]) for one in nine} == paper_fits.FITTED_CELLS
    assert len(pick(cells, figure="9", quantity="tokens_per_s", system="alisa")) == 2 * 6 * 2  # half of them delta
    exact = [one for one in nine if one["batch"] == 64 or one["system"] == "hf_accelerate"]
    assert len(exact) == 3 and all(abs(one["error_frac"]) < 0.02 for one in exact)
    assert all("published" in one and one["published"] is None for one in cells if one.get("traffic") == "delta")


def test_the_trends_of_the_paper_come_out_and_compression_is_the_one_that_does_not(cells):
    said = {(one.figure, one.text.partition(":")[0]): one.holds for one in trends(cells) if one.holds is not None}
    fails = {key for key, holds in said.items() if not holds}
    assert fails == {
        ("12c", "compression helps more at higher sparsity"),
        ("9", "the same with all that the H100's memory holds in vLLM"),
    }
    for figure, text in (
        ("9", "vLLM is ahead at batch 4"),
        ("9", "ALISA is ahead at batch 64"),
        ("12a", "p1 does not depend on sparsity"),
        ("12a", "p2 rises with sparsity"),
        ("12b", "recomputation gains 1.1 to 1.35 times"),
        ("12c", "every step of the ablation helps"),
    ):
        assert said[figure, text] is True
    speed = {
        (one["model"], one["system"], one["batch"]): one["modelled"]
        for one in pick(cells, figure="9", quantity="tokens_per_s")
        if "traffic" not in one
    }
    for place in paper_system.MODELS:
        of = lambda system, batch, place=place: speed[place.model, system, batch]
        assert of("vllm", 4) > of("alisa", 4) > of("flexgen", 4) > of("hf_accelerate", 4)
        assert of("alisa", 64) > of("vllm", 64) and of("alisa", 64) > of("flexgen", 64) > of("hf_accelerate", 64)


def test_alisa_and_its_ratios_to_flexgen_are_within_a_quarter(cells):
    near = [*pick(cells, figure="9", system="alisa/flexgen"), *pick(cells, figure="12b", quantity="recompute_gain")]
    near += [one for one in pick(cells, figure="9", system="alisa") if "traffic" not in one]
    near += [
        one for one in cells if one["quantity"] in ("with_recompute_s", "without_recompute_s") and "traffic" not in one
    ]
    assert len(near) == 12 + 3 + 12 + 6
    assert all(abs(one["error_frac"]) <= 0.25 for one in near)


def test_sending_only_what_enters_is_never_slower_than_the_paper_s_traffic(cells):
    for one in pick(cells, figure="9", traffic="delta"):
        (paper,) = [
            other
            for other in pick(
                cells, figure="9", model=one["model"], system="alisa", batch=one["batch"], quantity="tokens_per_s"
            )
            if "traffic" not in other
        ]
        assert one["modelled"] == "OOM" or one["modelled"] > paper["modelled"]


def test_trends_are_read_off_the_cells(cells):
    changed = copy.deepcopy(cells)
    for one in pick(changed, figure="12a", quantity="p2", kv_sparsity=0.8):
        one["modelled"] = 100
    pick(changed, figure="12b", quantity="recompute_gain", kv_sparsity=0.6)[0]["modelled"] = 1.5
    pick(changed, figure="9", system="alisa/vllm", batch=64, model="OPT-13B")[0]["modelled"] = "OOM"
    pick(changed, figure="12c", system="swa", kv_sparsity=0.4)[0]["modelled"] = 10.0
    said = {one.text.partition(":")[0]: one.holds for one in trends(changed)}
    for text in (
        "p2 rises with sparsity",
        "recomputation gains 1.1 to 1.35 times",
        "ALISA is ahead at batch 64",
        "every step of the ablation helps",
    ):
        assert said[text] is False


def test_the_plot_has_modelled_and_published_lines(cells, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from eval.drawing import systems

    drawn, path = [], tmp_path / "figure.png"
    close, pyplot.close = pyplot.close, drawn.append
    try:
        assert systems.throughput(pick(cells, figure="9", quantity="tokens_per_s"), path) == f"figure: {path}"
    finally:
        pyplot.close = close
    axes = drawn[0].axes
    assert path.stat().st_size > 10_000 and len(axes) == 6
    alisa = [line.get_ydata().tolist() for line in axes[2].lines][6:]
    same = pick(cells, figure="9", model="OPT-30B", system="alisa", quantity="tokens_per_s")
    assert alisa == [[one[key] for one in same if "traffic" not in one] for key in ("published", "modelled")]
    close(drawn[0])


def _given(**rates) -> Fits:
    both = lambda value: MappingProxyType({"h100": value, "v100": value})
    return Fits(
        link_bytes_per_s=both(20e9),
        layer_s=MappingProxyType({"opt": 1.5e-3, "llama": 1.5e-3}),
        flops_per_s=both(rates.get("flops_per_s", 300e12)),
        row_bytes_per_s=19e9,
        alpha=0.2,
        beta=0.1,
        recompute_passes=45.0,
    )


def _after(found: paper_system.Schedule, step: int) -> Seconds:
    return Seconds(sum(found.compute_s[step:]), sum(found.memory_s[step:]))


def _made_by(truth: Fits, published: dict) -> dict:
    """Published numbers as they would be if `truth` had made them; what no fit reads stays."""
    made = copy.deepcopy(published)
    for name, system, batch in paper_fits.FITTED_CELLS:
        place = next(one for one in paper_system.MODELS if one.model == name)
        found = paper_system.seconds(system, place, batch, published, truth)
        made["fig9_tokens_per_s"][name][system][0 if batch == 4 else -1] = batch * N / found.total_s
    found = paper_system.seconds("flexgen", OPT_30B, 64, published, truth)
    made["fig12a_s"]["flexgen"][-1].update(compute_s=found.compute_s, memory_s=found.memory_s)
    setting, cost = paper_system.run(paper_fits.FIGURE_1, 64, published, truth)
    found = paper_system.added(paper_system.flexgen(setting, cost, 0.0))
    made["fig1_s"]["kv_on_cpu"] = dict(mha_s=found.compute_s, ffn_s=0.0, memory_s=found.memory_s)
    for key in ("80", "20"):
        whole = paper_system.alisa(OPT_30B, 64, int(key) / 100, published, truth, recompute=False).seconds
        made["fig12b_s"][key]["without_recompute"] = dict(total_s=whole.total_s, mha_s=whole.compute_s, ffn_s=0.0)
    _, cost = paper_system.run(OPT_30B, 1, published)
    step = truth.recompute_passes * 64 * cost.shape.weight_flops / cost.hardware.matmul_flops_per_s
    again = made["fig12b_s"]["80"]["without_recompute"]["mha_s"] + step * (N - made["fig12a_steps"]["80"]["p2"])
    made["fig12b_s"]["80"]["with_recompute"].update(mha_s=again, ffn_s=0.0)
    made["fig12a_gib"].update(kv_at_end=(1 - truth.beta) * made["fig12a_gib"]["dense_kv_at_end"])
    return made
