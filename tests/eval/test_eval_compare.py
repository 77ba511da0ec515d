"""`python -m eval.compare`: sizes and bytes, the script on a known model, three failures that the bundled model shows."""

import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax import codecs, policies
from eval import compare
from eval.quality import rows as compare_rows
from eval.quality import sample as compare_sample
from eval.quality.sample import Sizes
from eval.script import common, inputs
from eval.text import windows
from tests import induction

pytestmark = pytest.mark.slow

CONFIG = SimpleNamespace(vocab_size=280, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, rotary_dims=16, arch="llama")
SIZES = Sizes(prompt_tokens=448, new_tokens=32, windows=4, items=2, depths=(0.5, 1.0))
SIZED = [name for name, kind in policies.POLICIES.items() if kind.sized(24, 96) is not None]


@pytest.mark.parametrize("name", SIZED)
def test_a_size_is_the_number_of_tokens_that_a_prompt_leaves(name):
    one = policies.POLICIES[name].sized(24, 96).resolve(SimpleNamespace(**vars(CONFIG)), alisa_calibration(CONFIG))
    length = jnp.full((1,), 96, jnp.int32)
    if one.reads_layer(96) is not None:
        q, k = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(1, 4, 16), (1, 96, 2, 16)]))
        chosen = one.choose(q, k, length)
        assert int((chosen >= 0).sum()) == 24
    elif one.appends:
        assert one.prompt_capacity(96) == 24
    else:
        assert one.capacity(96) == 24 + 1 + getattr(one, "spare_slots", 0)  # the query's own


def alisa_calibration(config):
    """Statistics in which no channel stands out."""
    one = np.ones((config.n_layers, config.n_heads, config.head_dim))
    return SimpleNamespace(check=lambda config: None, q_abs=one, qk_abs=one, k_abs=one[:, : config.n_kv_heads])


def test_every_policy_that_leaves_tokens_out_has_a_size():
    assert {name for name, kind in policies.POLICIES.items() if kind.selects} - set(SIZED) <= {"dense"}
    assert policies.POLICIES["dense"].sized(24, 96) is None


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_the_tokens_of_a_share_and_the_codecs_bytes_make_up_the_share(codec, share):
    room = compare_rows.Room(share, codec, CONFIG, "float32", SIZES)
    stored = codecs.parse(codec).resolve("float32")
    token, whole = stored.token_bytes(2, 16), 2 * 2 * 16 * 4 * 480  # bytes of a token, and of dense at the end
    fixed = stored.sequence_bytes(2, 16)
    window = room.fitted(policies.POLICIES["local"], CONFIG, None)
    if window is None:
        assert 480 * token + fixed <= share * whole + token
        return
    used = int(window.kept(480)[480]) * token + fixed
    assert abs(used - share * whole) <= token
    appended = room.fitted(policies.POLICIES["snapkv"], CONFIG, None)
    assert abs((appended.prompt_capacity(448) + 32) * token + fixed - share * whole) <= token
    assert appended.window <= appended.prompt_capacity(448) // 2


def test_labels_are_part_of_what_a_step_reads():
    room = compare_rows.Room(0.25, "raw", CONFIG, "float32", SIZES)
    calibration = alisa_calibration(CONFIG)
    one = room.fitted(policies.POLICIES["double_sparsity"], CONFIG, calibration).resolve(CONFIG, calibration)
    label = compare_rows.label_bytes(one, CONFIG, 480)
    assert label == 2 * (4 * 4 / 8 + 2 + 2)  # two heads: four channels of 4 bits, least value and step
    tokens = one.capacity(480) - 1
    assert abs(tokens * 256 + 480 * label - 0.25 * 480 * 256) <= 256
    assert one.dense_layers == 0


def test_a_codec_that_takes_the_share_for_itself_leaves_no_room():
    room = compare_rows.Room(0.25, "int8", SimpleNamespace(n_kv_heads=2, head_dim=16), "float32", SIZES)
    room.sequence_bytes = 0.25 * 256 * 480
    with pytest.raises(ValueError, match="what int8 stores of a sequence, and labels to search, leave no room"):
        room.fitted(policies.POLICIES["local"], CONFIG, None)


def test_what_follows_the_prompt_must_fit_where_it_is_kept():
    small = Sizes(prompt_tokens=64, new_tokens=64, windows=1, items=1, depths=(1.0,))
    room = compare_rows.Room(0.25, "raw", CONFIG, "float32", small)
    with pytest.raises(ValueError, match="all 64 new tokens are kept, and there is room for 32"):
        room.fitted(policies.POLICIES["snapkv"], CONFIG, None)


class Known(induction.InductionEngine):
    """Copies what followed the same token; policies reach 20 tokens back, dense attention all."""

    placement = None

    def __init__(self, policy, codec, bench):
        super().__init__(280, 10**6 if policy == "dense" else 20, codec, bench.calls, bench.stop_at)
        self.policy, self.bench = policy, bench

    def validate(self, tokens, prompt_tokens):
        if self.policy.startswith("strided"):
            raise ValueError("combs are not served today")

    def check_calibration(self, length):
        pass

    def score(self, sequences, protocol, last):
        assert protocol == "prompt"
        found = super().score(sequences, protocol)
        for name in ("logprobs", "correct"):
            setattr(found, name, [row[-n:] for row, n in zip(getattr(found, name), last, strict=True)])
        found.kv_bytes_per_token = {"raw": 64.0, "int8": 16.5, "int4": 9.0}.get(self.codec, 60.0)
        found.attended_frac = np.ones(2)
        if self.policy != "dense":
            found.attended_frac, found.kv_bytes_per_token = np.full(2, 0.25), found.kv_bytes_per_token / 4
        if self.bench.blind:
            found.correct = [np.zeros_like(row) for row in found.correct]
        return found

    def generate(self, prompts, new, eos_ids):
        assert eos_ids == ()  # every step is timed
        self.bench.timed.append(len(prompts))
        return SimpleNamespace(prefill_s=0.5, decode_s=0.007 * len(self.bench.timed))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """`call(*flags)` -> exit code, with a known model and without matplotlib."""
    given = induction.write_inputs(tmp_path, max_positions=96)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    setup = SimpleNamespace(calls=[], timed=[], made=[], loads=[], stop_at=None, blind=False, out=tmp_path / "c.jsonl")
    model = induction.make_model()
    model.decoder.config, model.calibration, model.params = CONFIG, lambda: None, [jnp.zeros(1, jnp.float32)]
    setup.page, setup.png = tmp_path / "c.md", tmp_path / "c.png"

    def load(name):
        setup.loads.append(name)
        return model

    def make_engine(model, policy, codec):
        setup.made.append((policy, codec))
        return Known(policy, codec, setup)

    def call(*flags):
        sizes = "--prompt_tokens=88 --new_tokens=8 --windows=3 --items=3 --share=0.25".split()
        argv = ["compare", *given, *sizes, f"--out={setup.out}", *flags]
        return common.run(lambda a: compare.main(a, load, make_engine), argv)

    setup.call = call
    return setup


def rows_of(text):
    """(method, codec) -> the other cells of its row, of the last table."""
    lines = text.split("At 25 % of the bytes of dense attention\n")[1].splitlines()
    table = lines[2 : next((i for i, line in enumerate(lines) if " with " in line), len(lines))]
    cells = [re.split(r" {2,}", line.strip()) for line in table]
    return {(name.split("(")[0], codec): rest for name, codec, *rest in cells}


def test_a_row_for_every_method_or_a_sentence_why_not(bench, capsys):
    assert bench.call() == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    wanted = {(name, "raw") for name in SIZED} - {("strided", "raw"), ("double_sparsity", "raw")}
    assert set(rows) - {("dense", codec) for codec in codecs.CODECS} == wanted
    assert {("dense", "raw"), ("dense", "int4")} <= set(rows) and next(iter(rows)) == ("dense", "raw")
    assert list(rows)[1:] == sorted(list(rows)[1:])
    assert re.search(r"left out: strided\(.*\) with raw: combs are not served today", out)
    assert "left out: double_sparsity with raw at 0.25: double_sparsity(channels=0.25) needs the channels" in out


def test_what_is_left_out_for_one_reason_is_told_in_one_sentence(bench, capsys):
    assert bench.call("--methods=double_sparsity", "--codec=raw", "--codec=int8(axis=token)", "--repeats=0") == 0
    out = capsys.readouterr().out
    assert "double_sparsity with raw at 0.25, double_sparsity with int8(axis=token) at 0.25: double_sparsity(" in out
    assert out.count("left out") == 1


def test_all_sequences_have_one_prompt_length_and_steady_ones_ask_for_what_was_asked_before():
    sizes = Sizes(prompt_tokens=88, new_tokens=8, windows=2, items=2, depths=(0.5, 1.0))
    source = windows.Source("text", "0" * 64, induction.TEXT)
    sample = compare_sample.draw(induction.make_model(), source, sizes, compare_sample.TASKS, seed=1)
    prompts = {task.name: {len(s) - n for s, n in zip(task.sequences, task.last, strict=True)} for task in sample.tasks}
    assert prompts == {"needle": {88}, "after": {86}, "recall": {88}, "shift": {88}, "steady": {88}}
    assert {len(s) for s in sample.sequences} == {96} and [w.stop - w.score for w in sample.plan] == [8, 8]
    tasks = {task.name: task for task in sample.tasks}
    for name, times in (("shift", 1), ("steady", 4)):
        for ids, answers in zip(tasks[name].sequences, tasks[name].answers, strict=True):
            assert answers.sum() == 4
            for at in 88 + np.flatnonzero(answers):
                before = [i for i in range(at - 1) if (ids[i], ids[i + 1]) == (ids[at - 1], ids[at])]
                assert len(before) == times  # in the table, and in earlier rounds


def test_cells_of_the_table_are_those_of_the_records(bench, capsys):
    assert bench.call("--methods=local,swa", "--repeats=2", "--tasks=needle,shift") == 0
    out = capsys.readouterr().out
    local, swa = rows_of(out)["local", "raw"], rows_of(out)["swa", "raw"]
    records = {(r["policy"].split("(")[0], r["codec"]): r for r in map(json.loads, bench.out.read_text().splitlines())}
    r, dense = records["local", "raw"], records["dense", "raw"]
    assert r["held_frac"] == r["budget_frac"] == 0.25 and r["read_frac"] == 0.25 and r["share"] == 0.25
    assert records["dense", "int4"]["held_frac"] == 9 / 64 and records["dense", "int4"]["share"] is None
    assert records["swa", "raw"]["budget_frac"] == records["swa", "raw"]["read_frac"]
    assert local[:2] == swa[:2] == ["25.0", "25.0"]
    change = sum(r["nll_nats_per_window"]) - sum(dense["nll_nats_per_window"])
    assert float(local[4].split()[0]) == pytest.approx(change / r["n"], abs=6e-4)
    assert r["n"] == 3 * 8 and dense["needle_accuracy_frac"] == 1.0 and r["needle_accuracy_frac"] == 0.5
    assert local[5] == "50.0 ±0.0*" and local[-2:] == ["0.50", format(1000 * r["decode_step_s"], ".1f")]
    timed = [0.007 * n for n in (2, 3)]
    assert dense["decode_step_s"] == pytest.approx(sum(timed) / 2 / 7)
    assert "local(kv_sparsity=0.75) with raw loses needle at 0.5 (-100 points)" in out
    assert re.search(r"local.* it holds .*needle at 1", out)


def test_a_finished_comparison_measures_nothing_and_an_interrupted_one_goes_on(bench, capsys):
    flags = ("--methods=local", "--tasks=needle", "--repeats=0", f"--page={bench.page}", f"--figure={bench.png}")
    bench.stop_at = 7
    assert bench.call(*flags) == common.EXIT_INTERRUPTED
    kept = len(bench.out.read_text().splitlines())
    assert 0 < kept < len(codecs.CODECS) + 1
    bench.stop_at = None
    assert bench.call(*flags) == 0
    out, calls = capsys.readouterr(), len(bench.calls)
    assert f"{kept} of {len(codecs.CODECS) + 1} cells" in out.err and "no figure: matplotlib" in out.err
    assert bench.call(*flags) == 0
    assert capsys.readouterr().out == out.out and len(bench.calls) == calls and not bench.timed
    assert bench.page.read_text().startswith("# Methods at equal bytes") and "| local(kv_sparsity=0.75) |" in (
        bench.page.read_text()
    )
    assert rows_of(out.out)["local", "raw"][-2:] == ["-", "-"]


def test_a_task_that_dense_attention_cannot_do_is_left_out_of_all_rows(bench, capsys):
    bench.blind = True
    assert bench.call("--methods=local", "--tasks=needle,recall") == 0
    out = capsys.readouterr()
    assert (
        "needle is left out: dense attention gets 0 % of it right" in out.err
        and "needle" not in out.out.split("At ")[1]
    )
    records = [json.loads(line) for line in bench.out.read_text().splitlines()]
    assert records[0]["tasks"] == ["needle", "recall"] and all(r["tasks"] == [] for r in records[1:])


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--share=0", "--share must be above 0 and at most 1, got 0"),
        ("--share=1.5", "--share must be above 0 and at most 1, got 1.5"),
        ("--methods=locale", "--methods: unknown name 'locale'; known: dense, local"),
        ("--tasks=haystack", "--tasks: unknown name 'haystack'; known: needle, after, recall, shift, steady"),
        ("--codec=int9", "unknown name 'int9'"),
        ("--prompt_tokens=89", "--prompt_tokens must be in 32..88"),
        ("--new_tokens=4", "new_tokens"),
        ("--depths=half", "--depths must be numbers"),
        ("--depths=2", "--depths must be in 0..1, got 2"),
        ("--text=absent.txt", "cannot read the text 'absent.txt'"),
    ],
)
def test_a_mistake_is_one_sentence_before_the_model_is_loaded(bench, capsys, flag, sentence):
    assert bench.call(flag) == common.EXIT_MISTAKE
    out = capsys.readouterr()
    assert sentence in out.err and len(out.err.strip().splitlines()) == 1 and out.out == "" and not bench.loads


def test_the_figure_has_a_line_for_each_method(bench, tmp_path, monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert bench.call("--methods=local,swa", f"--figure={bench.png}") == 0
    assert bench.png.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def bundled():
    """(differences from dense attention, values) of a method at a share, on the bundled model and 160 tokens."""
    model, sizes = (
        alisa_jax.load("bundled"),
        Sizes(prompt_tokens=144, new_tokens=16, windows=4, items=4, depths=(0.5, 1.0)),
    )
    sample = compare_sample.draw(model, windows.read(windows.BUNDLED), sizes, ("needle", "after", "shift", "steady"), 0)
    setup = SimpleNamespace(sizes=sizes, values=SimpleNamespace(batch=8, repeats=0))
    sample = compare_sample.Sample(sample.text, sample.plan * 2, [*sample.sequences] * 2, sample.tasks)  # batches of 8
    fields = {"tasks": [task.name for task in sample.tasks], "depths_frac": sizes.depths}

    def values(entry, dense=None):
        engine = inputs.make_engine(model, entry.policy, entry.codec)
        got, _ = compare.evaluate(engine, sample, sample.tasks, setup)
        return {**fields, **got, **compare_rows.traffic(got, dense, entry, model, sizes)}

    dense = values(compare_rows.Entry("dense", "raw"))

    def measured(name, share):
        entries, _ = compare_rows.candidates(model, [share], ["raw"], [name], sizes)
        record = values(next(e for e in entries if e.share is not None), dense)
        return compare_sample.differences(record, dense), record

    assert set(dense["told_apart"]) == set(fields["tasks"])
    return measured


def test_streaming_loses_a_needle_that_lies_outside_its_window(bundled):
    change, record = bundled("streaming", 0.25)
    assert change["needle at 0.5"].value < -0.5 and change["needle at 0.5"].shown
    assert abs(change["needle at 1"].value) < 0.1
    assert abs(record["held_frac"] - 0.25) <= 1.5 / 160 and record["read_frac"] <= record["held_frac"]
    assert record["needle_hits_per_sequence"][1::2] == record["needle_answers_per_sequence"][1::2]


def test_snapkv_finds_what_the_prompt_asks_for_and_not_what_is_asked_later(bundled):
    change, record = bundled("snapkv", 0.25)
    assert change["needle asked for after the prompt at 0.5"].value < -0.5
    assert change["needle asked for after the prompt at 0.5"].shown
    assert change["needle at 0.5"].value > -0.25
    assert abs(record["read_frac"] - 0.25) < 0.05


def test_heavy_hitters_of_the_past_push_out_what_is_asked_for_next(bundled):
    change, record = bundled("h2o", 0.5)
    assert change["shift"].value < -0.4 and change["shift"].shown
    assert abs(change["steady"].value) < 0.1
    assert abs(record["held_frac"] - 0.5) <= 1.5 / 160
    assert compare_sample.modes(record, record) is None
