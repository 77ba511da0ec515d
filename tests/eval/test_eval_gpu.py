"""`eval.gpu`: no GPU is one sentence, a dry run takes every path, and a part that dies takes no other with it."""

import json
import signal
import subprocess
import sys
import time

import pytest

from eval import gpu
from eval.card import page, records, watch, worker
from eval.card.parts import BY_NAME, PARTS

# A worker whose parts are what a test gives; it imports no jax, so a process starts at once.
WORKER = """
import os, signal, sys, time, types
from eval.card import found, records, worker
found.missing = lambda name: None
found.modules = lambda: {}
found.device = lambda: {"platform": "gpu", "device_kind": "Card 1", "python": "3", "driver": "1"}

def part(name, run):
    module = types.ModuleType(name)
    module.run = run
    sys.modules[f"eval.card.{name}"] = module

def good(emit, left, dry, seed):
    for cell in ("one", "two"):
        emit.attempt(cell, lambda: {"value": 1.0})

for name in ("correct", "rates", "beside", "pinned", "layer", "placed", "whole", "tiles"):
    part(name, good)
"""


@pytest.fixture
def run(tmp_path):
    """Runs parts with a worker to which `lines` of Python were added; returns the records and whether all had a turn."""

    def call(lines="", minutes=0.2, only=("rates", "beside"), seed=0):
        script = tmp_path / "worker.py"
        script.write_text(f"{WORKER}\n{lines}\nsys.exit(worker.main(sys.argv))\n")
        turned = watch.run(tmp_path, minutes, False, seed, only, (sys.executable, str(script)))
        return records.read(tmp_path / records.RECORDS), turned

    return call


def cells(found, part):
    return [
        (r["cell"], next((k for k in ("error", "stopped", "skipped") if k in r), "ran"))
        for r in found
        if r["part"] == part
    ]


def whole_lines(path):
    content = path.read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def test_without_a_gpu_it_is_one_sentence_and_not_exit_code_0(tmp_path, capsys):
    assert gpu.main([f"--out={tmp_path}"]) == gpu.NOTHING
    assert capsys.readouterr().err.splitlines()[-1] == "error: no GPU: the device of jax is cpu"
    assert not (tmp_path / records.RECORDS).exists()


@pytest.mark.slow
def test_a_dry_run_takes_every_path_and_its_page_says_dry(tmp_path, capsys):
    """The process that measures refuses every connection, so this is a run without network."""
    out, results = tmp_path / "out", tmp_path / "results"
    assert gpu.main(["--dry", f"--out={out}", "--minutes=20"]) == gpu.DONE
    found = whole_lines(out / records.RECORDS)
    assert {r["part"] for r in found} == {"found", *BY_NAME}
    assert [r for r in found if "error" in r or "stopped" in r or "skipped" in r] == []
    assert {r["basis"] for r in found} == {"dry"} and all(r["dry"] for r in found)
    assert len(list(out.iterdir())) <= 6
    assert len({(r["part"], r["cell"]) for r in found}) == len(found)
    assert gpu.main([f"--take={out}", f"--results={results}"]) == gpu.DONE
    text = capsys.readouterr().out
    assert text.strip() == (results / "dry-cpu" / records.PAGE).read_text().strip()
    for head, *rows in tables(text):
        counted = [i for i, name in enumerate(head) if name in page.NUMBERS]
        assert counted and all(row[i] == "dry" for row in rows for i in counted), head
    assert "not begun" not in text


def tables(text):
    """The rows of each table of Markdown."""
    block, out = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            block.append([cell.strip() for cell in line.replace("\\|", "/").strip("| ").split(" | ")])
        elif block:
            out.append([block[0], *block[2:]])
            block = []
    return out


def test_parts_run_in_order_and_a_second_run_goes_on(run):
    found, turned = run()
    assert turned and [(r["part"], r["cell"]) for r in found if r["part"] != "found"] == [
        (part, cell) for part in ("rates", "beside") for cell in ("one", "two")
    ]
    again, turned = run(only=("rates", "pinned"))
    assert turned and len(again) == len(found) + 1 + 2  # what there is, and the two cells of pinned
    assert cells(again, "rates") == [("one", "ran"), ("two", "ran")]
    other, _ = run(only=("rates",), seed=1)  # another seed: nothing of it is on file
    assert cells(other[len(again) :], "rates") == [("one", "ran"), ("two", "ran")]


def test_a_cell_that_raises_is_recorded_and_the_next_one_runs(run):
    found, turned = run("""
def bad(emit, left, dry, seed):
    def fail():
        raise ValueError("no kernel\\nfor this")
    emit.attempt("one", fail)
    emit.attempt("two", lambda: {"value": float("nan")})
    raise RuntimeError("in the part itself")
part("rates", bad)
""")
    assert turned and cells(found, "rates") == [("one", "error"), ("two", "ran"), ("part", "error")]
    rates = [r for r in found if r["part"] == "rates"]
    assert rates[0]["error"] == "ValueError: no kernel for this" and rates[1]["value"] == "nan"
    assert cells(found, "beside") == [("one", "ran"), ("two", "ran")]


@pytest.mark.parametrize(
    ("death", "said"),
    [("os._exit(3)", "the process ended with code 3"), ("os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV")],
)
def test_a_process_that_dies_is_recorded_with_its_last_words_and_a_fresh_one_goes_on(run, death, said):
    found, turned = run(f"""
def dies(emit, left, dry, seed):
    if not emit.done("one"):
        print("last words", file=sys.stderr, flush=True)
        {death}
    emit.attempt("two", lambda: {{"value": os.getpid()}})
part("rates", dies)
""")
    assert turned and cells(found, "rates") == [("one", "error"), ("two", "ran")]
    error = next(r["error"] for r in found if r["part"] == "rates")
    assert said in error and error.endswith("last words")
    assert cells(found, "beside") == [("one", "ran"), ("two", "ran")]


def test_a_broken_device_gets_a_fresh_process(run):
    found, turned = run("""
def breaks(emit, left, dry, seed):
    def fail():
        raise RuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")
    emit.attempt("one", lambda: {"pid": os.getpid()})
    emit.attempt("two", fail)
    emit.attempt("three", lambda: {"pid": os.getpid()})
part("rates", breaks)
""")
    assert turned and cells(found, "rates") == [("one", "ran"), ("two", "error"), ("three", "ran")]
    rates = [r for r in found if r["part"] == "rates"]
    assert rates[0]["pid"] != rates[2]["pid"]
    assert cells(found, "beside") == [("one", "ran"), ("two", "ran")]


def test_a_cell_that_hangs_is_ended_and_a_later_run_tries_it_again(run):
    hangs = """
from eval.card import parts
worker.BY_NAME = {name: part._replace(grace_s=0.3) for name, part in parts.BY_NAME.items()}
def hangs(emit, left, dry, seed):
    emit.attempt("one", lambda: {"value": 1})
    emit.attempt("two", lambda: time.sleep(60))
part("rates", hangs)
"""
    began = time.monotonic()
    found, turned = run(hangs, minutes=1)
    assert turned and time.monotonic() - began < 30
    assert cells(found, "rates") == [("one", "ran"), ("two", "stopped")]
    assert cells(found, "beside") == [("one", "ran"), ("two", "ran")]
    later, _ = run()
    assert cells(later, "rates") == [("one", "ran"), ("two", "stopped"), ("two", "ran")]


def test_time_that_is_up_is_told_by_the_exit_code(run):
    found, turned = run("part('rates', lambda emit, left, dry, seed: time.sleep(60))", minutes=0.04)
    assert not turned and cells(found, "beside") == []


def test_a_kill_at_any_moment_leaves_whole_records(tmp_path):
    script = tmp_path / "worker.py"
    lines = """
def many(emit, left, dry, seed):
    for i in range(40):
        emit.attempt(str(i), lambda: time.sleep(0.01) or {"value": "x" * 5000})
part("rates", many)
"""
    script.write_text(f"{WORKER}\n{lines}\nsys.exit(worker.main(sys.argv))\n")
    call = f"import sys; from pathlib import Path; from eval.card import watch; watch.run(Path({str(tmp_path)!r}), 1, "
    call += f"False, 0, ('rates',), (sys.executable, {str(script)!r}))"
    for seconds in (0.45, 0.6):
        parent = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(seconds)
        parent.send_signal(signal.SIGINT)
        parent.wait(20)
        if (tmp_path / records.RECORDS).exists():
            whole_lines(tmp_path / records.RECORDS)
    watch.run(tmp_path, 1, False, 0, ("rates",), (sys.executable, str(script)))
    found = whole_lines(tmp_path / records.RECORDS)
    ran = [r["cell"] for r in found if r["part"] == "rates" and "stopped" not in r]
    assert sorted(ran, key=int) == [str(i) for i in range(40)]


def test_a_half_written_line_costs_itself_alone(tmp_path):
    path = tmp_path / records.RECORDS
    records.append(path, {"part": "rates", "cell": "one"})
    with open(path, "ab") as file:
        file.write(b'{"part": "rates", "ce')
    records.append(path, {"part": "rates", "cell": "two"})
    assert [r["cell"] for r in records.read(path)] == ["one", "two"]


def test_a_part_whose_needs_are_missing_is_switched_off_by_name(run):
    found, turned = run(
        "found.missing = lambda name: 'ModuleNotFoundError: no flax' if name == 'flax' else None", only=("whole",)
    )
    assert turned and cells(found, "whole") == [("part", "skipped")]
    assert next(r for r in found if r["part"] == "whole")["skipped"] == "flax: ModuleNotFoundError: no flax"


def test_the_process_that_measures_refuses_connections():
    for event, arguments in (("socket.getaddrinfo", ("host",)), ("socket.connect", (None, ("127.0.0.1", 80)))):
        with pytest.raises(RuntimeError, match="downloads nothing"):
            worker._offline(event, arguments)
    worker._offline("socket.connect", (None, "/run/socket"))  # of this machine
    worker._offline("open", ("file",))


MEASURED = {
    "platform": "gpu",
    "device_kind": "NVIDIA H200",
    "run": "r",
    "dry": False,
    "seed": 0,
    "code": "c",
    "jax": "1",
}


def timed(kernel, shape, contender, time_s, **more):
    cell = f"{shape} {kernel} {contender}"
    return {
        "part": "beside",
        "cell": cell,
        "kernel": kernel,
        "shape": shape,
        "contender": contender,
        "time_s": time_s,
        **more,
    }


def test_the_page_sets_what_was_reached_beside_the_bars(tmp_path):
    rows = [
        timed("packed_decode", page.BAR, "kernel", 8e-4, fraction_of_copy=0.8),
        timed("packed_decode_int8_token", page.BAR, "kernel", 4.5e-4),
        timed("packed_decode_int8_channel", page.BAR, "kernel", 6e-4),
        timed("sparse_decode", page.BAR, "kernel", 9e-4, fraction_of_copy=0.7),
        timed("dense_decode", page.BAR, "kernel", 2e-3),
        timed("dense_decode", page.BAR, "jax.nn cudnn", 1.9e-3),
        timed("dense_decode", page.BAR, "torch sdpa", 2.5e-3),
        timed("flash_prefill", page.BAR_PROMPT, "kernel", 1e-3, fraction_of_matmul=0.61),
        {"part": "correct", "cell": "x", "error": "ValueError: no"},
    ]
    for row in rows:
        records.append(tmp_path / records.RECORDS, MEASURED | row)
    text = page.take(tmp_path, tmp_path / "results")
    bars = {row[0].split(":")[0].split(",")[0]: row[2:] for row in tables(text)[0][1:]}
    assert bars["`packed_decode`"] == ["0.8", "yes"] and bars["`sparse_decode`"] == ["0.7", "NO"]
    assert bars["`packed_decode_int8_token`"] == ["1.78", "yes"]
    assert bars["`packed_decode_int8_channel`"] == ["1.33", "NO"]
    assert bars["`sparse_decode_int8_token`"] == ["-", "-"]  # not measured is not missed
    assert bars["`dense_decode`"] == ["0.95", "NO"] and "of the best peer (jax.nn cudnn)" in text
    assert bars["`flash_prefill`"] == ["0.61", "yes"]
    assert "* correct, x: error: ValueError: no" in text and "* tiles: not begun" in text
    assert sorted(p.name for p in (tmp_path / "results" / "nvidia-h200").iterdir()) == [records.PAGE, records.RECORDS]


def test_taking_twice_files_a_record_once_and_the_newest_of_a_cell_counts(tmp_path):
    for share in (0.5, 0.9):
        record = timed("packed_decode", page.BAR, "kernel", 1e-3, fraction_of_copy=share)
        records.append(tmp_path / records.RECORDS, MEASURED | record)
        for _ in range(2):
            text = page.take(tmp_path, tmp_path / "results")
    assert len(records.read(tmp_path / "results" / "nvidia-h200" / records.RECORDS)) == 2
    assert tables(text)[0][1][2:] == ["0.9", "yes"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--only=kernels"], "--only: there is no part 'kernels'; there are correct, rates,"),
        (["--minutes=0"], "--minutes must be above 0 and at most 1440; got 0"),
        (["--seed=-1"], "--seed must be in 0..4294967295; got -1"),
        (["--take=x", "--dry"], "--take files what a run has left"),
        (["--tak=x"], "unrecognized arguments: --tak=x"),
        (["--take=nowhere"], "--take: nowhere holds no records.jsonl"),
    ],
)
def test_mistakes_are_one_sentence(flags, sentence, capsys):
    assert gpu.main(flags) == gpu.MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


def test_shares_of_the_time_leave_room_for_every_part():
    assert sum(part.share for part in PARTS[:-1]) < 1.05
    assert [part.letter for part in PARTS] == list("abcdefgh")
