"""`python -m eval.ablations` on a small known model: cells, table, records, figure, mistakes; one cell for real."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from eval import ablations
from eval.quality import paired
from eval.script import common, inputs
from eval.text import windows
from tests import induction

pytestmark = pytest.mark.slow

SMALL = """
CONFIG = dict(
    sparsities=(0.5, 0.8),
    sizes=dict(context_tokens=48, windows=3, episode_lengths=(24, 48), episodes=2),
    groups={
        "window": {"k": {}, "16 rows": dict(window=16)},
        "local share": {"50 %": dict(local_frac=0.5), "100 %": dict(local_frac=1.0)},
        "codec": {"raw": {}, "token": dict(codec="int8(axis=token)")},
    },
)
"""
N_CELLS = 1 + 2 * 4  # dense; default, window, share and codec at two sparsities


@pytest.fixture(scope="module")
def model():
    return induction.make_model()


@pytest.fixture
def bench(tmp_path, model, monkeypatch):
    """`call(*flags)` -> exit code, with a known model and without matplotlib, which takes seconds."""
    given = induction.write_inputs(tmp_path, max_positions=64)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "small.py").write_text(SMALL)
    setup = SimpleNamespace(calls=[], made=[], loads=[], stop_at=None)
    setup.config, setup.out, setup.png = tmp_path / "small.py", tmp_path / "a.jsonl", tmp_path / "a.png"

    def load(name):
        setup.loads.append(name)
        return model

    def make_engine(model, policy, codec):
        setup.made.append((policy, codec))
        reach = 4 if "local_frac" in policy else 10**6
        size = model.decoder.config.vocab_size
        return induction.InductionEngine(size, reach, codec, setup.calls, setup.stop_at)

    def call(*flags):
        argv = ["x", *given, f"--config={setup.config}", f"--out={setup.out}", *flags]
        return common.run(lambda a: ablations.main(a, load, make_engine), argv)

    setup.call = call
    return setup


def rows_of(text):
    """(sparsity, label) -> the cells of its row."""
    rows = {}
    for part in text.split("KV sparsity ")[1:]:
        sparsity, *lines = part.strip().splitlines()
        for line in lines[2:]:
            cells = re.split(r" {2,}", line.strip())
            label = next(c for c in cells if c not in ("window", "local share", "codec"))
            rows[sparsity, label] = cells[cells.index(label) + 1 :]
    return rows


def test_every_variant_is_measured_once_and_the_default_stands_in_every_group(bench, capsys, monkeypatch):
    monkeypatch.undo()
    assert bench.call("--json") == 0
    out = capsys.readouterr()
    records = [json.loads(line) for line in out.out.splitlines()]
    assert len(records) == len(bench.made) == len(set(bench.made)) == N_CELLS
    assert all(call == bench.calls[0] for call in bench.calls)
    expected = [f"swa(kv_sparsity=0.8{more})" for more in ("", ",window=16", ",local_frac=1.0", "")]
    assert [r["policy"] for r in records if r["kv_sparsity"] == 0.8] == expected
    assert [r["codec"] for r in records if r["kv_sparsity"] == 0.8] == ["raw", "raw", "raw", "int8(axis=token)"]
    assert {r["protocol"] for r in records} == {"decode"}
    assert out.err.count("k (default)") == out.err.count("50 % (default)") == out.err.count("raw (default)") == 2
    assert bench.png.read_bytes().startswith(b"\x89PNG")


def test_the_table_marks_differences_above_two_standard_errors_and_no_others(bench, capsys):
    assert bench.call() == 0
    rows = rows_of(capsys.readouterr().out)
    records = {
        (r["policy"], r["kv_sparsity"], r["codec"]): r for r in map(json.loads, bench.out.read_text().splitlines())
    }
    default, worse = (records[f"swa(kv_sparsity=0.5{x})", 0.5, "raw"] for x in ("", ",local_frac=1.0"))
    d = paired.difference(worse, default, "recall")
    assert d.shown and d.value < 0
    ppl, nats, recall, points, *rest = rows["50 %", "100 %"]
    assert recall.startswith(f"{100 * worse['recall_accuracy_frac']:.1f} ±")
    assert points == f"{100 * d.value:+.1f} ±{100 * d.stderr:.1f}*"
    assert rest == ["50.0", "64", "0", "-"]
    same = rows["50 %", "16 rows"]
    assert same[1].startswith("+0.0000") and not any(cell.endswith("*") for cell in same)
    assert rows["80 %", "token"][-1] == "0.020" and rows["80 %", "k (default)"][1] == "-"


def test_an_interrupted_table_goes_on_and_a_finished_one_measures_nothing(bench, capsys):
    bench.stop_at = 4
    assert bench.call("--jobs=1") == common.EXIT_INTERRUPTED
    rows = rows_of(capsys.readouterr().out)
    assert rows["50 %", "token"][0] != "-" or rows["80 %", "token"][0] == "-"
    assert len(bench.out.read_text().splitlines()) == 4
    bench.stop_at = None
    assert bench.call() == 0
    whole = capsys.readouterr().out
    assert len(bench.calls) == N_CELLS
    assert bench.call() == 0
    again = capsys.readouterr()
    assert len(bench.calls) == N_CELLS and again.out == whole and f"{N_CELLS} of {N_CELLS} cells" in again.err
    assert "no figure: matplotlib is not installed" in again.err and not bench.png.exists()


def test_some_groups_can_be_run_and_their_cells_are_found_later(bench, capsys):
    assert bench.call("--only=window,codec") == 0
    assert {(p, c) for p, c in bench.made if "0.8" in p} == {
        ("swa(kv_sparsity=0.8)", "raw"),
        ("swa(kv_sparsity=0.8,window=16)", "raw"),
        ("swa(kv_sparsity=0.8)", "int8(axis=token)"),
    }
    assert bench.call() == 0
    assert len(bench.calls) == N_CELLS and f"7 of {N_CELLS} cells" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "flag", "sentence"),
    [
        ((), "--only=codecs", "--only: unknown group 'codecs'; known: window, local share, codec"),
        ((), "--config=absent.py", "no config at 'absent.py'"),
        (("window=16", "rows=16"), None, "unknown key 'rows'"),
        (("window=16", "window=0"), None, "window must be at least 1 row"),
        (("int8(axis=token)", "int9"), None, "unknown name 'int9'"),
        (("int8(axis=token)", "int8"), None, "first 64 tokens"),
        (("windows=3", "window=3"), None, "does not define a CONFIG"),
        (("CONFIG", "TABLE"), None, "does not define a CONFIG"),
        (('"50 %": dict(local_frac=0.5), ', ""), None, "needs a default in the group 'local share'"),
        (("sparsities=(0.5, 0.8)", "sparsities=()"), None, "needs sparsities"),
        (("context_tokens=48", "context_tokens=65"), None, "must be in 2..64"),
    ],
)
def test_a_mistake_is_one_sentence_before_the_model_is_loaded(bench, capsys, change, flag, sentence):
    if change:
        assert change[0] in SMALL
        bench.config.write_text(SMALL.replace(*change))
    assert bench.call(*([flag] if flag else [])) == common.EXIT_MISTAKE
    out = capsys.readouterr()
    assert sentence in out.err and "Traceback" not in out.err and len(out.err.strip().splitlines()) == 1
    assert out.out == "" and not bench.loads


def test_the_config_of_the_repository_holds_the_choices_of_the_method():
    table = ablations.read(ablations.CONFIG)
    by_group = {group: [v for v in table.variants if v.group == group] for group in {v.group for v in table.variants}}
    assert all(sum(v.is_default for v in members) == 1 for members in by_group.values())
    options = {name for v in table.variants for name, _ in v.options}
    assert options == {"window", "decay", "shared_heads", "local_frac", "dense_layers", "refresh_every"}
    assert 0.8 in table.sparsities and table.sizes.windows >= 3 and table.sizes.episodes >= 3
    codecs = [v.codec for v in by_group["codec"]]
    assert codecs[0] == "raw" and len(set(codecs)) == 5
    assert ablations.read(ablations.CONFIG, ["refresh"]).variants == tuple(by_group["refresh"])


def test_a_cell_of_the_library_itself_keeps_what_the_engine_gave(stories, test_data):
    """SWA and INT8 on a small trained model: short sequences, but longer than the calibration."""
    characters = (test_data / "text" / "tinystories.txt").read_text(encoding="utf-8")[:1500]
    sizes = paired.Sizes(context_tokens=48, windows=2, episode_lengths=(32,), episodes=1)
    source = windows.Source("story", "0" * 64, characters)
    sample = paired.draw(inputs.load, str(stories), inputs.card(str(stories)), source, sizes, seed=0)
    kept = []

    def make_engine(model, policy, codec):
        engine = inputs.make_engine(model, policy, codec)
        score = engine.score
        engine.score = lambda batch, protocol: kept.append(score(batch, protocol)) or kept[-1]
        return engine

    codec = inputs.codec("int8(calibration_tokens=16)")
    cell = {"policy": "swa(kv_sparsity=0.5)", "codec": codec, "protocol": "prefill_mask", **sample.fields}
    (record,), reused, interrupted = paired.run([cell], sample, make_engine, None, rerun=False, jobs=1)
    (scores,) = kept
    assert (reused, interrupted) == (0, False) and [len(s) for s in sample.batch] == [48, 48, 32, 32]
    assert record["nll_nats_per_window"] == pytest.approx([-row.astype(float).sum() for row in scores.logprobs[:2]])
    answers = [e.answers[1:] for e in sample.drawn]
    assert record["hits_per_episode"] == [(c & a).sum() for c, a in zip(scores.correct[2:], answers, strict=True)]
    assert 0 < record["clipped_frac"] < 0.1 and record["clipped_frac"] == pytest.approx(scores.clipped_frac.mean())
    assert 0.5 < record["attended_frac"] < 0.7 and record["implementation"] == "xla:masked"
