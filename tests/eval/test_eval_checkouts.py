"""`python -m eval.checkouts`: the order of its processes, what is resumed, the table, refusals, and a real pair."""

import importlib.metadata
import json
import platform
import shlex
from types import SimpleNamespace

import pytest

from eval import checkouts
from eval.checkouts import OTHER, THIS
from eval.script import common
from eval.speed import one_step
from eval.speed.one_step import Job

TWO = ("bundled/dense", "bundled/swa-int8")
ABBA = [THIS, OTHER, OTHER, THIS]


def made(job: Job, **values) -> list[dict]:
    """The records of a process that made its numbers up."""
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib")}
    sizes = {"batch": job.batch, "context_tokens": job.context, "rounds": job.steps}
    measured = {"seconds_per_step": 1.0, "bytes_accessed": 100.0, "flops": 10.0, "temp_bytes": 0}
    measured["tokens_sha256"] = ["ab"] * job.batch
    where = {"python": platform.python_version(), **versions, "git_commit": "0123456789", "git_dirty": False}
    return [{**job.fields, "model": m, "row": row, **sizes, **measured, **values, **where} for m, row in job.cells]


@pytest.fixture
def setup(other, tmp_path, capsys, monkeypatch):
    """`call(*flags)` -> (exit code, rows, stderr), where processes make numbers up and stand in `asked` as (pair, side)."""
    clock = SimpleNamespace(s=0.0)
    one = SimpleNamespace(asked=[], values=lambda pair, side: {}, stop_at=None, clock=clock, out=tmp_path / "out.jsonl")
    monkeypatch.setattr(checkouts, "time", SimpleNamespace(monotonic=lambda: clock.s))
    monkeypatch.setattr(checkouts, "code", lambda root, folders: "as it was")

    def measure(root, job):
        pair, side = job.fields["pair"], job.fields["side"]
        assert root == {THIS: checkouts.ROOT, OTHER: other.resolve()}[side]
        if len(one.asked) == one.stop_at:
            raise KeyboardInterrupt
        one.asked.append((pair, side))
        clock.s += 20
        return made(job, **one.values(pair, side))

    def call(*flags):
        one.asked.clear()
        argv = ["checkouts", f"--other={other}", f"--out={one.out}", f"--cells={','.join(TWO)}", "--json", *flags]
        code = common.run(lambda a: checkouts.main(a, measure), argv)
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    one.call = call
    return one


def lines(path):
    """The records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(*numbers):
    """What is asked for when these pairs are measured."""
    return [(pair, side) for pair in numbers for side in (ABBA[:2] if pair % 2 == 0 else ABBA[2:])]


def test_two_pairs_are_measured_in_the_order_abba_and_the_next_two_again(setup):
    code, rows, _ = setup.call("--pairs=4")
    assert code == 0 and [side for _, side in setup.asked] == ABBA * 2
    assert setup.asked == pairs(0, 1, 2, 3)
    assert [row["cell"] for row in rows] == list(TWO) and {row["pairs"] for row in rows} == {4}


def test_a_second_run_measures_nothing_and_one_of_more_pairs_only_these(setup):
    _, rows, _ = setup.call("--pairs=2")
    assert setup.call("--pairs=2")[1] == rows and not setup.asked
    setup.call("--pairs=3")
    assert setup.asked == pairs(2)
    setup.call("--pairs=1", "--rerun")
    assert setup.asked == pairs(0)


def test_a_run_that_was_stopped_between_two_processes_goes_on_with_their_pair(setup):
    setup.stop_at = 3
    code, rows, _ = setup.call("--pairs=3")
    assert (code, rows, setup.asked) == (common.EXIT_INTERRUPTED, [], pairs(0, 1)[:3])
    assert len(lines(setup.out)) == 3 * len(TWO)
    setup.stop_at = None
    code, rows, _ = setup.call("--pairs=3")
    assert (code, setup.asked, rows[0]["pairs"]) == (0, pairs(1, 2), 3)


def test_a_torn_last_line_is_dropped_and_its_pair_measured_again(setup):
    setup.call("--pairs=2")
    setup.out.write_bytes(setup.out.read_bytes()[:-20])
    code, rows, err = setup.call("--pairs=2")
    assert (code, setup.asked, rows[0]["pairs"]) == (0, pairs(1), 2)
    assert "half-written" in err
    assert len(lines(setup.out)) == 2 * 2 * len(TWO) - 1 + 2 * len(TWO)


@pytest.mark.parametrize("flag", ["--seed=1", "--batch=2", "--context=512", "--steps=32", "--cells=bundled/dense"])
def test_another_setting_or_set_of_cells_is_another_comparison(setup, flag):
    setup.call("--pairs=1")
    setup.call("--pairs=1", flag)
    assert setup.asked == pairs(0)


@pytest.mark.parametrize("what", ["code of one side", "processor", "environment"])
def test_pairs_of_another_code_or_machine_are_not_taken(setup, what, monkeypatch):
    setup.call("--pairs=1")
    if what == "processor":
        monkeypatch.setattr(checkouts.machine, "processor", lambda: "another")
    elif what == "environment":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_thunk_runtime=true")
    else:
        monkeypatch.setattr(checkouts, "code", lambda root, _: "one" if root == checkouts.ROOT else "two")
    setup.call("--pairs=1")
    assert setup.asked == pairs(0)


def test_a_process_in_whose_time_the_files_of_its_checkout_changed_is_not_kept(setup, monkeypatch):
    hashes = lambda root, _: "edited" if root == checkouts.ROOT and len(setup.asked) == 4 else "as it was"
    monkeypatch.setattr(checkouts, "code", hashes)
    code, rows, err = setup.call("--pairs=2")
    assert (code, rows) == (common.EXIT_MISTAKE, [])
    assert err.splitlines()[-1].startswith(f"error: the files of {checkouts.ROOT} changed while they")
    assert [(r["pair"], r["side"]) for r in lines(setup.out)][:: len(TWO)] == pairs(0, 1)[:3]


def test_no_pair_begins_that_would_not_end_in_time_and_the_command_that_goes_on_is_told(setup):
    code, rows, err = setup.call("--pairs=3", "--minutes=1")  # a pair takes 40 s
    assert (code, setup.asked, rows[0]["pairs"]) == (0, pairs(0), 1)
    assert "1 of 3 pairs are done" in err
    command = next(line for line in err.splitlines() if line.startswith("python -m eval.checkouts"))
    setup.call(*shlex.split(command)[6:])
    assert setup.asked == pairs(1)
    _, rows, err = setup.call("--pairs=3", "--minutes=0.5")  # what is on file says that a pair takes longer
    assert (setup.asked, rows[0]["pairs"]) == ([], 2) and "2 of 3 pairs" in err


def test_time_is_the_median_of_the_ratios_of_pairs_and_not_a_ratio_of_medians(setup):
    seconds = {THIS: [1.0, 2.2, 9.0, 4.0], OTHER: [1.0, 2.0, 10.0, 5.0]}
    setup.values = lambda pair, side: {"seconds_per_step": seconds[side][pair]}
    _, rows, err = setup.call("--pairs=4")
    for row in rows:  # ratios 0.8, 0.9, 1, 1.1
        assert row["time_ratio"] == pytest.approx(0.95)
        assert row["time_ratio_quartiles"] == pytest.approx([0.875, 1.025])
        assert (row["this_seconds_per_step"], row["other_seconds_per_step"]) == pytest.approx((3.1, 3.5))
    assert err.splitlines()[-1] == "all 2 cells are within what is allowed"


@pytest.mark.parametrize(
    ("values", "within", "said"),
    [
        ({"seconds_per_step": 1.049, "bytes_accessed": 101.0, "flops": 5.0}, True, []),
        ({"seconds_per_step": 1.051}, False, ["time 1.0510 (1.05 allowed)"]),
        ({"bytes_accessed": 101.1}, False, ["bytes 1.0110 (1.01 allowed)"]),
        (
            {"flops": 10.2, "temp_bytes": 3},
            False,
            ["FLOPs 1.0200 (1.01 allowed)", "temporaries 4.0000 (1.01 allowed)"],
        ),
    ],
)
def test_what_is_over_its_limit_stands_in_the_last_line_and_the_exit_code_is_0(setup, values, within, said):
    setup.values = lambda pair, side: values if side == THIS else {}
    code, rows, err = setup.call("--pairs=1")
    assert code == 0 and rows[0]["over"] == said
    last = err.splitlines()[-1]
    assert last.startswith("all 2 cells are within") == within
    assert all(f"{name} {text}" in last for name in TWO for text in said)
    assert err.splitlines()[-2].split()[-1] == ("yes" if within else "no")


def test_the_pair_with_fewest_equal_tokens_is_told(setup):
    digests = {(1, THIS): ["ab"] * 7 + ["cd"], (2, OTHER): ["cd"] * 2 + ["ab"] * 6}
    setup.values = lambda pair, side: {"tokens_sha256": digests.get((pair, side), ["ab"] * 8)}
    _, rows, err = setup.call("--pairs=3")
    assert rows[0]["equal_sequences"] == 6 and " 6/8 " in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--other="], "is no checkout of this project"),
        (["--other=nowhere"], "--other: 'nowhere' is no folder"),
        (["--other={empty}"], "is no checkout of this project, it lacks alisa_jax/engine/step.py"),
        (["--other={root}"], "is this checkout; give the folder of another one"),
        (["--cells=bundled/sparse"], "--cells: unknown name 'bundled/sparse'; known: bundled/dense,"),
        (["--cells="], "--cells names none; known: bundled/dense,"),
        (["--context=72"], "72 tokens have no room for 64 steps and 8 to warm up"),
        (["--context=4096"], "bundled reads 1024 tokens at most, and 4096 are asked for"),
        (["--pairs=0"], "pairs"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence_before_anything_is_measured(setup, flags, said, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, rows, err = setup.call(*(flag.format(empty=tmp_path / "empty", root=checkouts.ROOT) for flag in flags))
    assert (code, rows, setup.asked) == (common.EXIT_MISTAKE, [], [])
    assert len(err.splitlines()) == 1 and said in err
    assert not setup.out.exists()


@pytest.mark.parametrize("left_out", ["--other", "--out"])
def test_the_other_folder_and_the_file_of_records_have_to_be_given(left_out, other, tmp_path, capsys):
    flags = [f for f in (f"--other={other}", f"--out={tmp_path / 'o'}") if not f.startswith(left_out)]
    assert common.run(checkouts.main, ["checkouts", *flags]) == common.EXIT_MISTAKE
    assert f"{left_out} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys; print('a trace', file=sys.stderr); sys.exit('it broke')", "ended with code 1: it broke"),
        ("import os; os.abort()", "ended with code -6: it said nothing"),
        ('print(\'{"folder": "/elsewhere", "records": []}\')', "imported the library from /elsewhere"),
    ],
)
def test_a_process_that_ends_with_an_error_or_measures_another_folder_is_told(script, said, tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(one_step, "__file__", str(tmp_path / "child.py"))
    with pytest.raises(common.UserError, match=said):
        checkouts.process(tmp_path, Job((), 1, 64, 1, 0, {}))


@pytest.mark.slow
def test_a_checkout_costs_as_much_as_itself_and_gives_the_same_tokens(other, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    argv = ["checkouts", f"--other={other}", f"--out={out}", "--pairs=1", "--cells=bundled/dense", "--json"]
    assert common.run(checkouts.main, [*argv, "--batch=2", "--context=40", "--steps=4"]) == 0
    captured = capsys.readouterr()
    (row,) = map(json.loads, captured.out.splitlines())
    assert [row[f"{name}_ratio"] for name in checkouts.COSTS.values()] == [1, 1, 1]
    assert (row["equal_sequences"], row["pairs"]) == (2, 1)
    records = lines(out)
    assert [record["side"] for record in records] == [THIS, OTHER]
    for record in records:
        assert (record["policy"], record["codec"], record["start_tokens"]) == ("dense", "raw", 28)
        assert record["repeats"] == 4 and record["warmup"] == one_step.WARMUP
        assert record["flops"] > 1e6 and record["bytes_accessed"] > 1e6 and record["seconds_per_step"] > 0
        assert {"processor", "jax", "git_dirty", "load_before", "process_s", "wall_s", "threads"} <= record.keys()
        assert not any(str(folder) in json.dumps(record) for folder in (other, checkouts.ROOT))
