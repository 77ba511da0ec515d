"""`python -m eval.reproduce`: the driver and its manifest, and Figure 8 on a small known model."""

import json
import math
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from eval import reproduce
from eval.figures import base, fig8
from eval.quality import paired
from eval.script import common, inputs, resume, tables
from eval.script.tables import Table, Versus
from eval.text import recall, windows
from tests import induction

pytestmark = pytest.mark.slow

HALF = (0.5,)
SIZES = dict(
    sparsities={"local": HALF, "strided": HALF, "swa": (0.0, *HALF), "swa+int8": (0.0, *HALF)},
    context_tokens=96,
    windows=3,
    episode_lengths=(72, 96),
    episodes=2,
    shots=1,
    task_items=None,
)
SAMPLE = paired.Sizes(context_tokens=96, windows=3, episode_lengths=(72, 96), episodes=2)
N_CELLS = 7  # dense; local, strided and both SWA at 50 %; both SWA at 0 %
METHODS = ("local", "strided", "swa", "swa+int8")


@pytest.fixture(scope="module")
def model():
    return induction.make_model()


@pytest.fixture
def bench(tmp_path, model):
    given = induction.write_inputs(tmp_path, max_positions=128)
    setup = SimpleNamespace(calls=[], stop_at=None, out=tmp_path / "r", given=given)
    setup.png, setup.records = setup.out / "fig8.png", setup.out / "records.jsonl"

    def make_engine(model, policy, codec):
        return engine(model, policy, codec, setup.calls, setup.stop_at)

    def call(*flags, only="fig8"):
        argv = ["x", *given, f"--out={setup.out}", f"--only={only}", *flags]
        return common.run(lambda a: reproduce.main(a, lambda name: model, make_engine, SIZES), argv)

    setup.call = call
    return setup


@pytest.fixture
def without_figure(monkeypatch):
    """A figure takes seconds."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def engine(model, policy, codec="raw", calls=None, stop_at=None):
    """Dense and SWA see everything, the others 4 tokens."""
    reach = 10**6 if policy == "dense" or "swa" in policy else 4
    calls = [] if calls is None else calls
    return induction.InductionEngine(model.decoder.config.vocab_size, reach, codec, calls, stop_at)


def test_every_method_and_sparsity_has_a_row_a_record_and_a_point(bench, capsys):
    assert bench.call("--json") == 0
    out = capsys.readouterr()
    records = [json.loads(line) for line in out.out.splitlines()]
    assert len(records) == N_CELLS
    pairs = {(r["method"], r["kv_sparsity"]) for r in records}
    assert pairs == {("dense", 0.0), ("swa", 0.0), ("swa+int8", 0.0), *((m, 0.5) for m in METHODS)}
    by = {(r["method"], r["kv_sparsity"]): r for r in records}
    assert by["swa", 0.5]["token_perplexity"] == by["dense", 0.0]["token_perplexity"]
    assert by["local", 0.5]["recall_accuracy_frac"] < by["dense", 0.0]["recall_accuracy_frac"]
    assert by["local", 0.5]["policy"] == "local(kv_sparsity=0.5)" and by["swa", 0.5]["windows"] == 3
    assert (by["swa+int8", 0.5]["policy"], by["swa+int8", 0.5]["codec"]) == ("swa(kv_sparsity=0.5)", "int8")
    assert by["swa+int8", 0.5]["clipped_frac"] == pytest.approx(0.0002) and by["swa", 0.5]["clipped_frac"] == 0.0
    assert "Figure 8" in out.err and "LLaMA-7B" in out.err and "stands in for LLaMA-7B: another model" in out.err
    assert bench.png.read_bytes().startswith(b"\x89PNG") and "figure:" in out.err


def test_all_sequences_of_a_cell_are_one_batch_and_the_same_in_every_cell(bench, without_figure):
    assert bench.call() == 0
    assert len(bench.calls) == N_CELLS
    assert all(call == bench.calls[0] for call in bench.calls)
    assert sorted(map(len, bench.calls[0])) == [72] * 4 + [96] * 7


def test_a_record_holds_what_the_paired_errors_need(bench, without_figure, capsys):
    assert bench.call("--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for r in records:
        assert sum(r["nll_nats_per_window"]) / sum(r["scored_tokens_per_window"]) == r["nll_nats_per_token"]
        assert sum(r["hits_per_episode"]) / sum(r["answers_per_episode"]) == r["recall_accuracy_frac"]
        assert (len(r["nll_nats_per_window"]), len(r["hits_per_episode"])) == (3, 8)
        assert all(r[count] == records[0][count] for count in ("scored_tokens_per_window", "answers_per_episode"))


def test_cells_side_by_side_give_the_records_of_cells_one_after_the_other(bench, without_figure, capsys):
    names = ("method", "kv_sparsity", "nll_nats_per_window", "hits_per_episode", "recall_accuracy_frac")
    runs = []
    for jobs in (1, 3):
        assert bench.call("--json", "--rerun", f"--jobs={jobs}") == 0
        runs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [[r[name] for name in names] for r in runs[0]] == [[r[name] for name in names] for r in runs[1]]
    assert [r["jobs"] for r in runs[1]] == [3] * N_CELLS


def test_a_record_from_before_single_windows_were_kept_is_measured_again(bench, without_figure, capsys):
    assert bench.call() == 0
    ran, lines = len(bench.calls), bench.records.read_text().splitlines()
    old = json.loads(lines[0])
    del old["nll_nats_per_window"]
    bench.records.write_text("\n".join([json.dumps(old), *lines[1:]]) + "\n")
    assert bench.call() == 0
    assert len(bench.calls) == ran + 1


def test_only_differences_above_two_paired_standard_errors_are_claimed(bench, without_figure, capsys):
    assert bench.call() == 0
    text = capsys.readouterr().out
    *rows, claimed = text.split("Paired differences")[1].split("\nwhy: ", 1)
    claimed = claimed.strip().split("\nwhy: ")
    rows = [line.split() for line in rows[0].splitlines()[3:]]
    by = {(row[0], row[1]): row[3:] for row in rows}
    assert by["swa", "50"][:2] == ["+0.0000", "±0.0000"]  # the same values as dense
    assert "recall: strided is lower at 50 % than dense" in claimed
    assert "recall: swa is higher at 50 % than local" in claimed
    assert not any(line.startswith(("perplexity: swa is higher", "recall: swa is lower")) for line in claimed)
    assert len(claimed) - 1 == sum(value.endswith("*") for row in rows for value in row)
    assert claimed[-1].startswith("all else is within two standard errors")


def test_a_second_run_measures_nothing_and_prints_the_same_table(bench, without_figure, capsys):
    assert bench.call() == 0
    first, ran = capsys.readouterr().out, len(bench.calls)
    assert bench.call() == 0
    again = capsys.readouterr()
    assert len(bench.calls) == ran and again.out == first and f"{N_CELLS} of {N_CELLS} cells" in again.err
    assert bench.call("--rerun") == 0
    assert len(bench.calls) == 2 * ran


def test_an_interrupted_run_writes_no_page_and_goes_on_to_the_pages_of_one_that_was_not(bench, without_figure, capsys):
    bench.stop_at = 3
    assert bench.call("--jobs=1") == common.EXIT_INTERRUPTED
    assert capsys.readouterr().out == "" and len(bench.records.read_text().splitlines()) == 3
    assert {path.name for path in bench.out.iterdir()} == {"records.jsonl"}
    bench.stop_at = None
    assert bench.call() == 0
    assert len(bench.calls) == N_CELLS
    resumed = {path.name: path.read_text() for path in bench.out.iterdir() if path.suffix == ".md"}
    assert set(resumed) == {"fig8.md", "MANIFEST.md"}
    bench.records.unlink()
    assert bench.call() == 0
    assert {name: (bench.out / name).read_text() for name in resumed} == resumed


def test_a_cell_that_is_running_at_an_interrupt_is_finished_and_kept(tmp_path, model, capsys):
    folder = induction.write_inputs(tmp_path, max_positions=128)[0].removeprefix("--model=")
    source = windows.read(str(tmp_path / "text.txt"))
    sample = paired.draw(lambda name: model, folder, inputs.card(folder), source, SAMPLE, seed=0)
    both_run, never = threading.Barrier(2), threading.Event()

    def make_engine(model, policy, codec):
        known = engine(model, policy)

        def score(batch, protocol):
            both_run.wait(timeout=60)
            if policy == "dense":
                raise KeyboardInterrupt
            never.wait(timeout=1.0)  # so this cell ends well after the interrupt
            return known.score(batch, protocol)

        return SimpleNamespace(score=score)

    cells = [{"policy": p, "codec": "raw", "protocol": "decode", **sample.fields} for p in ("dense", "local(tokens=4)")]
    out = inputs.results(str(tmp_path / "q.jsonl"))
    made, reused, interrupted = paired.run(cells, sample, make_engine, out, rerun=False, jobs=2)
    assert (made[0], reused, interrupted) == (None, 0, True)
    assert made[1]["policy"] == "local(tokens=4)" and list(out) == [made[1]]
    assert "the cells that are running are finished first" in capsys.readouterr().err


def test_without_matplotlib_the_script_says_so_and_ends_well(bench, capsys, without_figure):
    assert bench.call() == 0
    assert "no figure: matplotlib is not installed" in capsys.readouterr().err
    assert not bench.png.exists()


def test_a_figure_that_cannot_be_written_is_told_in_one_sentence(bench, tmp_path, capsys):
    bench.png.mkdir(parents=True)
    assert bench.call() == common.EXIT_MISTAKE
    assert "cannot write the figure 'fig8.png'" in capsys.readouterr().err


def test_recall_counts_only_the_answers():
    answers = np.asarray([False, False, False, True, True])
    one = recall.Episode("copy", np.arange(5), answers)
    two = recall.Episode("lookup", np.arange(5), answers)
    values = recall.accuracies([one, two], [np.asarray([1, 1, 0, 1], bool), np.asarray([0, 0, 1, 1], bool)])
    assert values["recall_accuracy_frac"] == 0.75 and values["recall_n"] == 4
    assert values["recall_copy_accuracy_frac"] == 0.5 and values["recall_lookup_accuracy_frac"] == 1.0
    assert values["recall_copy_accuracy_frac_by_length"] == {"5": 0.5}
    assert values["recall_copy_accuracy_frac_stderr"] is None
    assert math.isclose(values["recall_accuracy_frac_stderr"], 0.25)


def test_episodes_are_the_same_for_a_seed_and_use_no_special_token(model):
    first, again = (recall.draw(model, ("copy", "lookup"), (32,), 3, seed=5) for _ in range(2))
    other = recall.draw(model, ("copy", "lookup"), (32,), 3, seed=6)
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))
    assert any((a.tokens != b.tokens).any() for a, b in zip(first, other, strict=True))
    assert all(e.tokens[0] == 0 and (e.tokens[1:] != 0).all() and len(e.tokens) == 32 for e in first)


def test_an_induction_model_answers_copies_and_cannot_without_reach(model):
    drawn = recall.draw(model, ("copy",), (64,), 4, seed=0)
    for policy, expected in [("dense", 1.0), ("strided(kv_sparsity=0.5)", 0.0)]:
        correct = engine(model, policy).score([e.tokens.tolist() for e in drawn]).correct
        values = recall.accuracies(drawn, correct)
        if expected:
            assert values["recall_accuracy_frac"] == 1.0
        else:
            assert values["recall_accuracy_frac"] < 0.5


@pytest.mark.parametrize("metric", paired.METRICS)
def test_a_paired_difference_is_that_of_a_least_squares_fit_with_clustered_errors(metric):
    """The ratio of sums is the weighted mean of the parts; its clustered error, written out in float64."""
    total, count, _ = paired.METRICS[metric]
    rng = np.random.default_rng(7)
    counts, hard = rng.integers(5, 50, 11), rng.normal(3.0, 2.0, 11)
    one, other = (counts * (hard + shift + rng.normal(0, 0.1, 11)) for shift in (0.3, 0.0))
    records = [{total: x.tolist(), count: counts.tolist()} for x in (one, other)]
    d = paired.difference(*records, metric)
    weights = counts / counts.sum()
    parts = (one - other) / counts
    mean = float(np.sum(weights * parts))
    stderr = np.sqrt(11 / 10 * np.sum((weights * (parts - mean)) ** 2))
    np.testing.assert_allclose([d.value, d.stderr], [mean, stderr], rtol=1e-12)
    unpaired = [common.ratio_stderr(x.tolist(), counts.tolist()) for x in (one, other)]
    assert d.shown and d.stderr < 0.2 * math.hypot(*unpaired)
    jackknife = [np.delete(one - other, i).sum() / np.delete(counts, i).sum() for i in range(11)]
    assert d.stderr == pytest.approx(math.sqrt(10 / 11 * np.sum((jackknife - np.mean(jackknife)) ** 2)), rel=0.25)


def test_no_difference_is_shown_from_one_window_from_rounding_or_within_two_standard_errors():
    def shown(one, other, metric="perplexity"):
        total, count, _ = paired.METRICS[metric]
        return paired.difference(*({total: x, count: [10] * len(x)} for x in (one, other)), metric).shown

    assert not shown([50.0], [10.0])
    assert not shown([10.0, 20.0, 30.0], [10.0, 20.0, 30.0])
    assert not shown([10.0 + 5e-6, 20.0 + 5e-6], [10.0, 20.0])
    assert not shown([9.0, 21.0], [10.0, 20.0]) and not shown([3, 9], [5, 9], "recall")
    assert shown([11.0, 21.1], [10.0, 20.0]) and shown([4, 8], [5, 9], "recall")


def test_records_of_different_samples_are_not_compared():
    one = {"hits_per_episode": [1, 2], "answers_per_episode": [3, 4]}
    with pytest.raises(ValueError, match="different samples"):
        paired.difference(one, one | {"answers_per_episode": [3, 5]}, "recall")


def test_a_task_gets_a_table_beside_the_papers_panel(bench, tmp_path, without_figure, capsys):
    rows = [{"query": f"The word {i} is", "choices": ["this", "that or so"], "gold": i % 2} for i in range(4)]
    path = tmp_path / "copa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bench.call("--task=copa", f"--task_file={path}", "--json") == 0
    out = capsys.readouterr()
    records = [json.loads(line) for line in out.out.splitlines()]
    mine = [r for r in records if r.get("task") == "copa"]
    assert len(records) == N_CELLS + len(mine) and {r["method"] for r in mine} >= {"dense", "local", "swa"}
    assert all(r["n"] == 4 and r["shots"] == 1 and r["chance"] == 0.5 for r in mine)
    head = next(line for line in out.err.splitlines() if line.startswith("method") and "acc_norm" in line)
    assert "paper (OPT-30B)" in head


def test_a_model_that_was_not_trained_for_recall_is_given_text_alone(bench, monkeypatch, without_figure, capsys):
    monkeypatch.setitem(SIZES, "episodes_for", "bundled")
    assert bench.call("--json") == 0
    out = capsys.readouterr()
    records = [json.loads(line) for line in out.out.splitlines()]
    assert all("recall_accuracy_frac" not in r and r["windows"] == 3 for r in records)
    assert "recall" not in out.err.split("Paper: LLaMA-7B")[1].split("\nwhy")[0]


@pytest.mark.parametrize(
    "method, sparsity, model, wanted",
    [
        ("swa", 0.8, "tiny", 6.0),
        ("swa+int8", 0.8, "tiny", 6.0),
        ("local", 0.95, "tiny", 287),
        ("dense", 0.0, "tiny", 5.65),
    ]
    + [("h2o", 0.8, "tiny", None), ("swa", 0.5, "tiny", None)],
)
def test_the_papers_value_stands_beside_the_cell_it_belongs_to(method, sparsity, model, wanted):
    assert fig8.published(fig8.panel(("wikitext2",), model), method, sparsity) == wanted


def test_a_panel_is_that_of_the_model_with_the_same_name():
    assert fig8.panel(("piqa",), "/models/OPT-6.7b")["dense"] == 77.2
    assert fig8.panel(("piqa",), "tiny")["model"] == "LLaMA-33B"


def test_full_has_every_sparsity_of_the_paper_and_quick_a_part_of_it():
    config = {size: resume.Setup("m", "t", size, 0, 1, False, None).config("fig8") for size in ("quick", "full")}
    cells = {size: fig8.grid(config[size]) for size in config}
    assert cells["full"][0] == ("dense", 0.0, "dense", "raw") and len(cells["full"]) == 1 + 2 * 6 + 2 * 7
    assert {s for _, s, _, _ in cells["full"]} == {0.0, *base.paper("alisa_fig8")["kv_sparsity"]}
    assert (
        set(cells["quick"]) < set(cells["full"]) and ("swa+int8", 0.8, "swa(kv_sparsity=0.8)", "int8") in cells["quick"]
    )
    assert not {("local", 0.0), ("strided", 0.0)} & {cell[:2] for cell in cells["full"]}


# The driver.


class Fake:
    """A figure of two numbers; the second of its cells is interrupted where it is told so."""

    TITLE = "Two numbers"

    def __init__(self):
        self.ran, self.interrupt, self.refuse = [], False, None

    def check(self, setup):
        if self.refuse:
            raise common.UserError(self.refuse)

    def records(self, setup):
        def run(cell):
            if self.interrupt and cell["number"] == 2:
                raise KeyboardInterrupt
            self.ran.append(cell["number"])
            return {"value": 1.5 * cell["number"]}, {"measured": cell["number"] == 1}

        return resume.collect(setup, [{"figure": "fake", "number": n} for n in (1, 2)], run, "fake")

    def tables(self, setup, records):
        rows = [(str(r["number"]), tables.value(r["value"], ".1f", r["basis"]), "-") for r in records]
        versus = [Versus(f"number {r['number']}", "", r["value"], p, r["basis"]) for r, p in zip(records, (1.5, 6.0))]
        return [Table("A caption", ("n", "a|b", "c"), rows, versus=versus, why=("it is a fake",))]

    def draw(self, setup, records, path):
        path.write_bytes(b"a picture")
        return f"figure: {path}"


@pytest.fixture
def fakes(monkeypatch):
    """Figures 3 and 5, faked."""
    made = {name: Fake() for name in ("fig3", "fig5")}
    known = reproduce.importlib.import_module
    monkeypatch.setattr(reproduce.importlib, "import_module", lambda name: made.get(name.split(".")[-1]) or known(name))
    return made


def test_a_page_holds_the_table_with_modelled_cells_marked_and_the_manifest_the_distance(bench, fakes, capsys):
    assert bench.call(only="fig5,fig3") == 0
    page = (bench.out / "fig3.md").read_text()
    assert page.startswith(
        "# Figure 3: Two numbers\n\nA caption\n\n| n | a\\|b | c |\n| --- | ---: | ---: |\n| 1 | 1.5 | - |\n"
    )
    assert "| 2 | 3.0† | - |" in page and "* it is a fake" in page and "† modelled, not measured" in page
    found = json.loads((bench.out / "manifest.json").read_text())
    assert list(found) == ["fig3", "fig5"] and found["fig3"]["model"] == "tiny"
    assert str(bench.out.parent) not in (bench.out / "MANIFEST.md").read_text()
    assert {k: found["fig5"][k] for k in ("compared", "near", "median_ratio", "basis")} == {
        "compared": 2,
        "near": 1,
        "median_ratio": 0.75,
        "basis": ["measured", "modelled"],
    }
    assert found["fig3"]["numbers"][1] == dict(
        what="number 2", unit="", ours=3.0, paper=6.0, ratio=0.5, basis="modelled"
    )
    assert "| [fig3](fig3.md) | Two numbers | quick |" in (bench.out / "MANIFEST.md").read_text()
    capsys.readouterr()


def test_figures_of_an_earlier_run_stay_in_the_manifest_and_finished_cells_are_not_run_again(bench, fakes, capsys):
    assert bench.call(only="fig3") == 0 and bench.call(only="fig5") == 0
    assert list(json.loads((bench.out / "manifest.json").read_text())) == ["fig3", "fig5"]
    assert (fakes["fig3"].ran, fakes["fig5"].ran) == ([1, 2], [])  # the two fakes have the same cells
    assert "fig5: 2 of 2 cells were already in" in capsys.readouterr().err


def test_an_interrupt_leaves_the_figures_before_it_whole_and_the_cells_before_it_on_file(bench, fakes, capsys):
    fakes["fig5"].interrupt = fakes["fig3"].interrupt = True
    assert bench.call(only="fig3,fig5") == common.EXIT_INTERRUPTED
    assert {path.name for path in bench.out.iterdir()} == {"records.jsonl"}
    assert [json.loads(line)["number"] for line in bench.records.read_text().splitlines()] == [1]
    fakes["fig3"].interrupt = False
    assert bench.call(only="fig3") == 0 and fakes["fig3"].ran == [1, 2]
    capsys.readouterr()


def test_every_figure_is_checked_before_the_first_one_runs(bench, fakes, capsys):
    fakes["fig5"].refuse = "fig5 needs a tokenizer"
    assert bench.call(only="fig3,fig5") == common.EXIT_MISTAKE
    assert capsys.readouterr().err == "error: fig5 needs a tokenizer\n" and fakes["fig3"].ran == []


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--only=fig6"], "unknown figure 'fig6'; known: fig1, fig2c"),
        (["--quick", "--full"], "give one of them"),
        (["--task=hellaswag"], "unknown task 'hellaswag'"),
        (["--task=copa", "--task_file=a", "--task_file=b"], "1 tasks and 2 files"),
        (["--task=copa", "--task_file=absent.jsonl"], "cannot read 'absent.jsonl'"),
        (["--model=random:opt_125m"], "fig8: random:opt_125m has no tokenizer"),
        (["--model=nowhere"], "no model at 'nowhere'"),
        (["--text=nowhere.txt"], "cannot read the text 'nowhere.txt'"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_before_anything_runs(bench, flags, part, capsys):
    assert bench.call(*flags) == common.EXIT_MISTAKE
    err = capsys.readouterr().err
    assert err.startswith("error: ") and part in err and err.count("\n") == 1 and bench.calls == []


def test_a_ratio_needs_two_numbers():
    assert Versus("x", "s", 3.0, 2.0, "measured").ratio == 1.5 and not Versus("x", "s", 3.0, 2.0, "measured").near
    assert Versus("x", "rho", 0.9, 0.7, "measured").near and Versus("x", "rho", 0.9, 0.7, "measured").ratio is None
    assert not Versus("x", "rho", 0.9, 0.01, "measured").near and Versus("x", "rho", None, 0.7, "measured").near is None
    assert base.density("x", 95.0, 90.0).ratio == 0.5 and base.density("x", None, 90.0).near is None
    assert [
        Versus("x", "s", *pair, "measured").ratio for pair in ((None, 1.0), ("OOM", 1.0), (1.0, 0), (1.0, None))
    ] == [None] * 4
