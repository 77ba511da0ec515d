"""Figures 1, 9 and 12a-c of `eval.reproduce`: published numbers beside modelled and measured ones."""

import dataclasses
import functools
import json
import re
from types import SimpleNamespace

import pytest

from eval.figures import base, fig1, fig9, fig12a, fig12b, fig12c, modelled
from eval.modelled import paper_fits, paper_system
from eval.script import common, inputs, tables
from eval.script.common import UserError
from eval.script.resume import Setup
from eval.speed import timing
from eval.text import windows
from tests.eval.test_eval_throughput import made_run

pytestmark = pytest.mark.slow

MODULES = {"fig1": fig1, "fig9": fig9, "fig12a": fig12a, "fig12b": fig12b, "fig12c": fig12c}
SIZES = {
    "fig1": dict(
        batch=4,
        prompt_tokens=64,
        new_tokens=dict(W1=32, W2=64),
        measured=(("W1", "cpu_only"), ("W1", "half_half"), ("W1", "gpu_only"), ("W2", "gpu_only")),
        repeats=2,
    ),
    "fig9": dict(models=("OPT-30B",), batches=(4, 16), prompt_tokens=64, new_tokens=48, repeats=2, device_kv_frac=0.8),
    "fig12a": {},
    "fig12b": {},
    "fig12c": {},
}
SECONDS = {"accelerate": 8.0, "flexgen": 4.0, "waves": 2.0, "alisa": 1.0, "resident": 0.5}
PAPER = {name: base.paper(name) for name in ("alisa_throughput", "alisa_fig1", "alisa_fig12")}


class MadeUp:
    """In place of an `Engine`: a run takes the seconds of its controller."""

    def __init__(self, controller: str, calls: list):
        self.name, self.calls, self.placement = controller.partition("(")[0], calls, None
        self.implementation, self.implementation_reason = "made up", "asked for"

    def generate(self, prompts, new_tokens, eos_ids, progress=False):
        self.calls.append((self.name, len(prompts), new_tokens))
        tokens = [[7] * new_tokens for _ in prompts]
        return made_run(tokens, prefill_s=0.0, decode_s=SECONDS[self.name], load_bytes=3 * 2**20)


def raises(*given):
    raise AssertionError("nothing was to be loaded")


@pytest.fixture(scope="module", autouse=True)
def text_read_once():
    """Every figure checks and reads its text, here thousands of files, which stay as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "read", functools.cache(windows.read))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_read_once):
    """The five figures: `found`, `tables`, `setup` and the calls of made-up systems by name."""
    done = SimpleNamespace(found={}, tables={}, setup={}, calls={})
    results = inputs.results(str(tmp_path_factory.mktemp("figures") / "records.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        for name, module in MODULES.items():
            calls = done.calls.setdefault(name, [])
            patch.setattr(timing, "build", lambda m, p, c, controller, *b, calls=calls: MadeUp(controller, calls))
            setup = Setup("bundled", windows.BUNDLED, "quick", 0, 1, False, results, sizes=SIZES[name])
            module.check(setup)
            done.setup[name], done.found[name] = setup, module.records(setup)
            done.tables[name] = module.tables(setup, done.found[name].records)
    return done


def numbers(value):
    """All numbers below `value`."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def row(found, start: tuple[str, ...], at: int = 0) -> list[str]:
    """The cells behind `start` of table number `at`."""
    (one,) = [cells for cells in found[at].rows if tuple(cells[: len(start)]) == start]
    return list(one[len(start) :])


def is_measured(table) -> bool:
    return "Measured:" in table.caption


@pytest.mark.parametrize("name", MODULES)
def test_every_published_number_stands_in_a_table(run, name):
    throughput = PAPER["alisa_throughput"]
    published = {
        "fig1": [PAPER["alisa_fig1"][key] for key in ("W1", "W2")],
        "fig9": [],  # row by row below
        "fig12a": [throughput["fig12a_steps"], throughput["fig12a_s"], PAPER["alisa_fig12"]["fig12a"]],
        "fig12b": [throughput["fig12b_s"], PAPER["alisa_fig12"]["fig12b_printed_gain"]],
        "fig12c": throughput["fig12c_tokens_per_s"],
    }[name]
    text = " ".join(cell for table in run.tables[name] for cells in table.rows for cell in cells)
    shown = set(re.findall(r"[0-9]+\.?[0-9]*", text))
    shown |= {f"{float(one):g}" for one in shown}
    assert not {f"{one:g}" for one in numbers(published)} - shown


def test_the_bars_of_figure_9_stand_in_order_and_its_ratios_are_theirs(run):
    bars = PAPER["alisa_throughput"]["fig9_tokens_per_s"]
    for model in bars.keys() - {"batch"}:
        for system, rates in bars[model].items():
            cells = row(run.tables["fig9"], (model, system))
            assert [cell.partition(" / ")[0] for cell in cells] == [f"{rate:g}" for rate in rates]
        cells = row(run.tables["fig9"], (model, "alisa/flexgen"), 1)
        ratios = [a / b for a, b in zip(bars[model]["alisa"], bars[model]["flexgen"], strict=True)]
        assert [float(cell.partition(" / ")[0]) for cell in cells] == pytest.approx(ratios, abs=0.005)


def test_modelled_cells_carry_the_mark_and_measured_ones_do_not(run):
    for name, found in run.tables.items():
        assert sum(is_measured(table) for table in found) == (name in ("fig1", "fig9"))
        for table in found:
            ours = [cell for cells in table.rows for cell in cells if " / " in cell and not cell.endswith(" / -")]
            if is_measured(table):
                assert tables.MODELLED not in str(table.rows)
            else:
                assert "modelled" in table.caption.lower() and all(cell.endswith(tables.MODELLED) for cell in ours)
            assert {one.basis for one in table.versus} <= {"measured" if is_measured(table) else "modelled"}
        assert {r["basis"] for r in run.found[name].records} <= {"measured", "modelled"}
        assert all(("cells" in r) == (r["basis"] == "modelled") for r in run.found[name].records)


def test_a_cell_that_is_missing_is_a_dash(run):
    assert row(run.tables["fig9"], ("LLaMA-7B", "alisa")) == [
        f"{rate:g} / -" for rate in PAPER["alisa_throughput"]["fig9_tokens_per_s"]["LLaMA-7B"]["alisa"]
    ]
    assert row(run.tables["fig1"], ("W2", "half"), 2)[0] == "-"
    for name, module in MODULES.items():
        for table in module.tables(run.setup[name], []):
            assert not table.versus and tables.MODELLED not in str(table.rows)
            assert all(cell.endswith(" / -") for cells in table.rows for cell in cells if " / " in cell)


def test_the_gpu_alone_is_out_of_memory_where_the_paper_says_so(run):
    modelled_s, gib, measured = run.tables["fig1"]
    assert row([modelled_s], ("W2", "GPU only"))[:3] == ["OOM / OOM†"] * 3
    assert sum("OOM" in cell for cells in modelled_s.rows for cell in cells) == 3
    assert row([measured], ("W2", "GPU only"))[:2] == ["OOM", "OOM"]
    assert any("W2 gpu_only: resident needs device_kv_bytes" in why for why in measured.why)
    ours = {one["placement"]: one["modelled"] for one in _cells(run, "fig1", quantity="kv_on_gpu_gib", workload="W2")}
    assert 32 < ours["gpu_only"] + 12.4 + 0.887 < 34 and ours["half_half"] < 0.6 * ours["gpu_only"]


def test_kv_bytes_of_figure_1_are_those_of_whole_sequences_and_two_layers_on_their_way(run):
    page = 16 * 2 * 2 * 4096  # K and V of 16 tokens of a layer and sequence, 16 bits
    (half,) = _cells(run, "fig1", quantity="kv_on_gpu_gib", workload="W1", placement="half_half")
    pages = -(-(128 + 255) // 16)
    hand = 32 * pages * 32 + 32 * 32 + 2 * 32 * pages  # 32 sequences, a page of each other one in 32 layers, staging
    assert half["modelled"] == pytest.approx(hand * page / 2**30)


def test_alisa_fills_the_gpu_of_figure_12a_and_the_cpu_has_the_rest(run):
    position = 4 * 64 * 48 * 7168 / 2**30
    whole = position * (128 + 143)
    (gpu,) = _cells(run, "fig12a", quantity="gpu_total_gib", kv_sparsity=0.8, step=144)
    (cpu,) = _cells(run, "fig12a", quantity="kv_on_cpu_gib", kv_sparsity=0.8, step=144)
    assert gpu["modelled"] == pytest.approx(80.0)
    assert cpu["modelled"] == pytest.approx(whole - (80 - 55.8 - 6.15), abs=0.2)
    (end,) = _cells(run, "fig12a", quantity="kv_on_cpu_gib", kv_sparsity=0.8, step=512)
    lost = 1 - 47.54 / 52.5
    assert end["modelled"] == pytest.approx(position * 639 * (1 - lost) - (80 - 55.8 - 6.15), abs=0.2)


def test_what_is_fitted_on_is_marked_and_left_out_of_the_distances(run):
    rates, ratios = run.tables["fig9"][:2]
    assert row([rates], ("OPT-30B", "flexgen"))[-1].startswith("89.1 / =")
    compared = {one.what for one in rates.versus}
    fitted = {f"{m}, {s}, batch {b}" for m, s, b in paper_fits.FITTED_CELLS if m == "OPT-30B"}
    assert len(compared) == 4 * 5 - len(fitted) and not fitted & compared
    assert len(ratios.versus) == 10 and all(one.unit == "x" for one in ratios.versus)
    assert not any("FlexGen" in one.what for one in run.tables["fig12c"][0].versus)
    assert not any("W2, CPU only" in one.what for one in run.tables["fig1"][0].versus)
    for name in MODULES:
        cells = [
            one for one in modelled.cells(run.found[name].records) if one["system" if "system" in one else "figure"]
        ]
        free = [one for one in cells if not one["fitted"] and one["published"] is not None]
        free = [one for one in free if one.get("system") != "vllm_by_memory"]
        ours = [one for table in run.tables[name] for one in table.versus if one.basis == "modelled"]
        assert sorted(str(one.ours) for one in ours) == sorted(str(one["modelled"]) for one in free)
        marks = sum(cell.count("=") for table in run.tables[name] for cells in table.rows for cell in cells)
        assert marks >= sum(one["fitted"] for one in cells)


def test_what_alisa_could_have_been_stands_in_the_tables(run):
    """Every cell of traffic=delta, whose published number is a dash."""
    for name, digits in (("fig9", 0), ("fig12a", 0), ("fig12b", 1), ("fig12c", 0)):
        delta = [common.number(one["modelled"], f".{digits}f") for one in _cells(run, name, traffic="delta")]
        text = [cell for table in run.tables[name] for cells in table.rows for cell in cells]
        shown = [cell.removeprefix("- / ").removesuffix(tables.MODELLED) for cell in text if cell.startswith("- / ")]
        assert delta and not set(delta) - set(shown)
        assert len(shown) >= len(delta)


def test_trends_stand_in_the_tables_with_whether_they_hold(run):
    held = {text: holds for table in run.tables["fig12c"] if table.head[-1] == "holds" for text, holds in table.rows}
    words = {text.partition(":")[0]: holds for text, holds in held.items()}
    assert words["every step of the ablation helps"] == "yes" + tables.MODELLED
    assert words["compression helps more at higher sparsity"] == "no" + tables.MODELLED
    assert any(why.startswith("p2 rises with sparsity") and "holds" in why for why in run.tables["fig12a"][0].why)


def test_the_fitted_numbers_stand_on_the_page_of_figure_9(run):
    (table,) = [one for one in run.tables["fig9"] if "fitted numbers" in one.caption]
    shown, fits = dict(table.rows), modelled.fits()
    assert shown["link of the H100"] == f"{fits.link_bytes_per_s['h100'] / 1e9:.1f} GB/s†"
    assert shown["alpha"] == f"{fits.alpha:.3f}†" and shown["beta"] == f"{fits.beta:.3f}†"
    assert shown["a, a layer of opt"] == f"{1e3 * fits.layer_s['opt']:.2f} ms†"
    assert shown["vLLM's sequences on the H100"] == f"{fits.vllm_sequences['h100']}†"
    assert sum(name.startswith("a + c b of ") for name in shown) == len(paper_system.MODELS)
    assert not table.versus and len(table.rows) == 2 + 2 + 2 + len(paper_system.MODELS) + 5 + 1


def test_ratios_of_measured_systems_stand_beside_those_of_the_paper(run):
    measured = run.tables["fig9"][-1]
    assert row([measured], ("hf_accelerate", "4"))[1] == "0.50"
    bars = PAPER["alisa_throughput"]["fig9_tokens_per_s"]
    theirs = [bars[model]["alisa"][2] / bars[model]["flexgen"][2] for model in bars.keys() - {"batch"}]
    cells = row([measured], ("alisa", "16"))
    assert cells[:3] == [f"{16 * 48 / 1.0:.4g}", "4.00", f"{min(theirs):.2f} - {max(theirs):.2f}"]
    assert "3.00 MiB" in cells and "no PCIe link" in measured.caption and "bundled" in measured.caption
    budgets = {r["device_kv_bytes"] for r in run.found["fig9"].records if "batch" in r}
    assert budgets == {0.8 * 4 * 2 * 2 * 64 * 4 * 16 * (64 + 48 - 1)}  # layers, K and V, kv heads, channels, float32
    one = run.tables["fig1"][-1]
    assert row([one], ("W1", "CPU only"))[:4] == ["8", "104.3", "16.00", f"{104.3 / 22.4:.2f}"]


def test_systems_of_a_batch_take_turns(run):
    names = [name for name, batch, _ in run.calls["fig9"] if batch == 16]
    assert names == ["accelerate", "flexgen", "waves", "alisa", "alisa"] * 3


@pytest.mark.parametrize("name", MODULES)
def test_records_on_file_are_used_and_nothing_runs(run, name, monkeypatch):
    monkeypatch.setattr(timing, "build", raises)
    monkeypatch.setattr(modelled, "fits", raises)
    setup = dataclasses.replace(run.setup[name], load=raises)
    found = MODULES[name].records(setup)
    assert found.reused == len(found.records) == len(run.found[name].records)
    assert [json.dumps(r) for r in found.records] == [json.dumps(r) for r in run.found[name].records]


@pytest.mark.parametrize("name", ["fig1", "fig9"])
def test_a_model_without_room_for_the_tokens_is_refused(run, name):
    new = dict(W1=32, W2=2000) if name == "fig1" else 2000
    sizes = SIZES[name] | dict(new_tokens=new, measured=(("W2", "gpu_only"),))
    setup = dataclasses.replace(run.setup[name], sizes=sizes, load=raises)
    with pytest.raises(UserError, match="bundled has 1024 positions"):
        MODULES[name].check(setup)
    with pytest.raises(UserError, match="random:none"):
        MODULES[name].check(dataclasses.replace(run.setup[name], model="random:none"))


def test_the_sizes_of_the_configs_can_be_read(run):
    for name in MODULES:
        setup = dataclasses.replace(run.setup[name], sizes=None)
        assert (
            set(setup.config(name))
            == set(dataclasses.replace(setup, size="full").config(name))
            >= set(SIZES[name]) - {"models"}
        )


@pytest.mark.parametrize("name", ["fig1", "fig12a"])
def test_the_chart_has_published_and_modelled_lines(run, name, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn, path = [], tmp_path / "figure.png"
    close, pyplot.close = pyplot.close, drawn.append
    try:
        assert MODULES[name].draw(run.setup[name], run.found[name].records, path) == f"figure: {path}"
    finally:
        pyplot.close = close
    lines = [line.get_ydata().tolist() for line in drawn[0].axes[0].lines]
    close(drawn[0])
    if name == "fig1":
        assert lines[0] == [104.3, 63.5, 22.4] and lines[2][:2] == [294.4, 171.5]
        assert lines[3][2] != lines[3][2]  # no point where it is out of memory
        assert lines[1][0] == pytest.approx(104.3, rel=0.1)
    else:
        assert lines[0] == [12.7, 41.8, 137.2] and lines[1][2] == pytest.approx(137.2, rel=0.1)
        assert len(lines) == 10
    assert path.stat().st_size > 10_000


def _cells(run, name: str, **where) -> list[dict]:
    cells = modelled.cells(run.found[name].records)
    return [one for one in cells if all(one.get(key) == value for key, value in where.items())]
