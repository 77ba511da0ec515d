"""Records: one flat JSON line each, files that resume after an interruption."""

import json
import math
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import records
from alisa_jax.records import Results, make_record, read

CELL = {"model": "tiny", "policy": "swa(kv_sparsity=0.8)", "seed": 0}


def test_record_holds_cell_values_and_where_they_come_from():
    record = make_record(CELL, {"token_perplexity": 4.5}, wall_s=1.5, implementation="masked")
    assert record | CELL == record
    assert record["token_perplexity"] == 4.5
    assert (record["basis"], record["wall_s"], record["implementation"]) == ("measured", 1.5, "masked")
    assert set(records.environment()) <= set(record)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_modelled_numbers_are_labelled_modelled():
    record = make_record(CELL, {"decode_s": 0.1}, measured=False)
    assert (record["basis"], record["wall_s"]) == ("modelled", None)


def test_environment_tells_versions_and_device():
    found = records.environment()
    assert list(found) == [
        "git_commit",
        "git_dirty",
        "python",
        "jax",
        "jaxlib",
        "flax",
        "platform",
        "device_kind",
        "cpu_count",
    ]
    assert found["platform"] == "cpu"
    assert found["cpu_count"] == os.cpu_count()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A new git repository around a copy of records.py, and a function that runs git in it."""
    for name in list(os.environ):
        if name.startswith("GIT_"):
            monkeypatch.delenv(name)
    copy = tmp_path / "package" / "records.py"
    copy.parent.mkdir()
    copy.write_text("one = 1\n")
    monkeypatch.setattr(records, "__file__", str(copy))

    def git(*arguments):
        who = ["-c", "user.name=tester", "-c", "user.email=tester@example.com", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("init", "--quiet")
    except OSError:
        pytest.skip("git is not installed")
    return copy, git


def test_environment_tells_the_commit_and_whether_python_files_differ_from_it(checkout):
    copy, git = checkout
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert (records.environment()["git_commit"], records.environment()["git_dirty"]) == (commit, False)
    (copy.parent.parent / "results.jsonl").write_text("{}\n")
    assert records.environment()["git_dirty"] is False
    copy.write_text("one = 2\n")
    assert (records.environment()["git_commit"], records.environment()["git_dirty"]) == (commit, True)


def test_environment_does_not_take_the_commit_of_a_repository_that_only_surrounds_it(checkout):
    copy, git = checkout
    (copy.parent / "other.py").write_text("")
    git("add", "package/other.py")
    git("commit", "--quiet", "-m", "one")
    assert (records.environment()["git_commit"], records.environment()["git_dirty"]) == (None, None)


def test_environment_before_the_first_commit_or_without_git(checkout, monkeypatch):
    _, git = checkout
    git("add", ".")
    assert records.environment()["git_commit"] is None
    monkeypatch.setenv("PATH", "")
    assert (records.environment()["git_commit"], records.environment()["git_dirty"]) == (None, None)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        (jnp.asarray(0.25, jnp.bfloat16), 0.25),
        ((1, (2.0, "x")), [1, [2.0, "x"]]),
        ({"a": np.float64(1.0)}, {"a": 1.0}),
        (Path("a") / "b", os.path.join("a", "b")),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (np.float32("nan"), "nan"),
        ("OOM", "OOM"),
        (None, None),
    ],
)
def test_values_become_plain_json(tmp_path, value, plain):
    results = Results(tmp_path / "r.jsonl")
    results.add(make_record(CELL, {"value": value}))
    assert read(results.path)[0]["value"] == plain
    assert results.find(CELL)["value"] == plain


def test_a_value_that_json_cannot_say_is_refused_before_anything_is_written(tmp_path):
    results = Results(tmp_path / "r.jsonl")
    with pytest.raises(TypeError, match="^the field 'x' of a record holds object, which JSON cannot say$"):
        results.add({"x": object()})
    assert results.path.read_bytes() == b""


def test_a_field_may_stand_in_one_group_only():
    with pytest.raises(ValueError, match="^the field 'seed' stands twice in one record; rename one of the two"):
        make_record(CELL, {"seed": 3})
    with pytest.raises(ValueError, match="^the field 'jax' stands twice"):
        make_record(CELL, {"n": 3}, jax="mine")


def test_a_record_needs_a_value():
    with pytest.raises(ValueError, match="^a record needs at least one value, got none$"):
        make_record(CELL, {})


def test_added_records_are_found_at_once_and_after_reopening(tmp_path):
    path = tmp_path / "new" / "folder" / "r.jsonl"
    results = Results(path)
    assert (len(results), results.find(CELL)) == (0, None)
    results.add({**CELL, "n": 1})
    results.add({**CELL, "seed": 1, "n": 2})
    for opened in (results, Results(path)):
        assert [record["n"] for record in opened] == [1, 2]
        assert opened.find(CELL)["n"] == 1
        assert opened.find({**CELL, "seed": 1})["n"] == 2
        assert opened.find({**CELL, "seed": 2}) is None
        assert opened.find({**CELL, "codec": "raw"}) is None
    assert path.read_bytes().count(b"\n") == 2


def test_the_newest_record_of_a_cell_is_found(tmp_path):
    results = Results(tmp_path / "r.jsonl")
    results.add({**CELL, "n": 1})
    results.add({**CELL, "n": 2})
    assert results.find(CELL)["n"] == 2


def test_cells_match_after_json_and_true_is_not_one(tmp_path):
    results = Results(tmp_path / "r.jsonl")
    results.add({"shape": (2, 3), "flag": True})
    assert results.find({"shape": (2, 3)}) is not None
    assert results.find({"shape": np.array([2, 3])}) is not None
    assert results.find({"flag": 1}) is None
    assert results.find({"absent": None}) is None


def test_every_interruption_of_the_last_line_is_repaired(tmp_path, capsys):
    whole = Results(tmp_path / "whole.jsonl")
    whole.add({**CELL, "n": 1})
    first = whole.path.stat().st_size
    whole.add({**CELL, "seed": 1, "text": "é\n\\"})
    content = whole.path.read_bytes()
    torn = tmp_path / "torn.jsonl"
    for cut in range(first + 1, len(content) - 1):
        torn.write_bytes(content[:cut])
        assert len(read(torn)) == 1
        assert capsys.readouterr().err == (
            f"warning: {torn}: left out a half-written last line of {cut - first} bytes\n"
        )
        assert torn.read_bytes() == content[:cut]
        results = Results(torn)
        assert capsys.readouterr().err == (
            f"warning: {torn}: removed a half-written last line of {cut - first} bytes\n"
        )
        assert torn.read_bytes() == content[:first]
        results.add({"n": 3})
        assert [record.get("n") for record in read(torn)] == [1, 3]
    assert capsys.readouterr().err == ""


def test_a_whole_last_line_without_newline_is_kept(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}')
    results = Results(path)
    results.add({"n": 3})
    assert [record["n"] for record in read(path)] == [1, 2, 3]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", [b"{", b"3", b"[1]", b"\xff\xfe", b'{"n": 1}{"n": 2}'])
def test_a_broken_line_that_is_not_the_last_is_an_error(tmp_path, line):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 2}\n')
    before = path.read_bytes()
    for open_file in (Results, read):
        with pytest.raises(ValueError) as error:
            open_file(path)
        assert str(error.value) == f"{path}: line 2 is not a record (one JSON object per line)"
    assert path.read_bytes() == before


def test_unwritable_paths_are_refused_on_opening(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "r.jsonl"):
        with pytest.raises(OSError) as error:
            Results(path)
        message = str(error.value)
        assert message.startswith(f"cannot write results to {path}: ")
        assert "\n" not in message


def test_a_missing_file_cannot_be_read(tmp_path):
    with pytest.raises(OSError, match="^cannot read results from .*absent.jsonl: No such file"):
        read(tmp_path / "absent.jsonl")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    results = Results(tmp_path / "r.jsonl")
    results.add({"n": 1})
    before = results.path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:3]))
    with pytest.raises(OSError) as error:
        results.add({"n": 2})
    assert str(error.value) == f"cannot write results to {results.path}: only 3 of 9 bytes fitted"
    assert results.path.read_bytes() == before
    assert len(results) == 1


def test_a_line_is_on_the_disk_before_add_returns(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
    Results(tmp_path / "r.jsonl").add({"n": 2})
    assert synced == [9]
