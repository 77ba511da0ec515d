"""eval.card.pinned and what its cells share, in dry mode: every cell, right and wrong results, mistakes, resumed runs."""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.card import bare, cells, host_programs, memory, pinned, records

ROOT = Path(__file__).resolve().parents[2]
NEVER = lambda: 1e9
CALM = ["kinds", "mover self_test"]
PAIRS = ["device to pinned_host", "pinned_host to device", "numpy to device", "device to numpy"]
BOTH = ["numpy to pinned_host", "pinned_host to numpy", "device to unpinned_host", "unpinned_host to device"]


class Emit(records.Cells):
    """Where a run puts its records, in a folder of its own; `done`: cells of an earlier run."""

    def __init__(self, done=()):
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        common = dict.fromkeys((*records.SAME, "run")) | {"dry": True}
        super().__init__(Path(folder) / records.RECORDS, "part", common, lambda cell: None)
        self.known |= {cell: {"cell": cell} for cell in done}

    @property
    def records(self) -> list[dict]:
        return records.read(self.path)

    def found(self) -> dict:
        return {record["cell"]: record for record in self.records if record["part"] == "part"}


@pytest.fixture(scope="module")
def dry() -> Emit:
    emit = Emit()
    pinned.run(emit, NEVER, True, 0)
    return emit


def test_every_cell_is_there(dry):
    want = CALM + [f"{pair} {size}" for pair in PAIRS + BOTH for size in ("4 KiB", "16 KiB")]
    want += [f"overlap {pair}" for pair in PAIRS] + ["mover store", "mover stream rows", "mover stream pages"]
    for way in (
        "mover fetch rows",
        "mover fetch pages",
        "rows whole",
        "rows gather",
        "rows gather on host",
        "rows row by row",
    ):
        want += [f"{way} random", f"{way} in a row"]
    want += ["rows slice in a row", "update by traced start", "update by fixed start", "update through the device"]
    assert sorted(dry.found()) == sorted(want)


def test_on_a_cpu_every_transfer_is_right_and_lands_where_it_should(dry):
    found = dry.found()
    assert not [record for record in found.values() if "error" in record]
    right = {cell: record["right"] for cell, record in found.items() if cell not in CALM and "overlap" not in cell}
    assert set(right.values()) == {True}
    for cell, record in found.items():
        if " to " in cell and "overlap" not in cell:
            assert record["kind"] == cell.split(" to ")[1].split()[0]
    assert found["mover self_test"]["reads"] == "rows"


def test_rates_are_bytes_over_the_median(dry):
    record = dry.found()["mover fetch pages random"]
    rows = memory.DRY.rows * 2 * memory.DRY.heads * memory.DRY.head_dim * 2
    assert record["moved_bytes"] == rows < record["sent_bytes"]
    assert record["gb_per_s"] == pytest.approx(rows / record["time_s"] / 1e9)
    assert record["time_min_s"] <= record["time_s"] <= record["time_max_s"]


def test_overlap_is_what_is_saved_of_the_shorter(dry):
    record = dry.found()["overlap device to pinned_host"]
    alone = record["compute_s"], record["transfer_s"]
    for order in ("compute_first", "transfer_first"):
        want = (sum(alone) - record[f"{order}_s"]) / min(alone)
        assert record[f"{order}_overlap_frac"] == pytest.approx(want)


def test_a_finished_run_measures_nothing_again(dry):
    again = Emit(record["cell"] for record in dry.records)
    pinned.run(again, NEVER, True, 0)
    assert again.records == []


def test_wrong_rows_and_a_wrong_update_are_called_wrong(monkeypatch):
    slice_, by_start = host_programs.READS["slice"], host_programs.WRITES["by traced start"]
    monkeypatch.setitem(host_programs.READS, "slice", lambda h, i: slice_(h, (i + 1) % 32))
    monkeypatch.setitem(host_programs.WRITES, "by traced start", lambda h, x, at: by_start(h, x, at * 2))
    assert not host_programs.read("slice", "in a row", memory.DRY, NEVER, 0)["right"]
    assert not host_programs.write("by traced start", memory.DRY, NEVER, 0)["right"]


def test_what_raises_is_recorded_and_the_rest_goes_on():
    def fails():
        raise ValueError("x" * 500)

    emit = Emit()
    cells.each(emit, NEVER, [("a", fails), ("b", lambda: {"time_s": 1.0})])
    assert emit.records[0]["error"] == "ValueError: " + "x" * 400
    assert emit.records[1]["time_s"] == 1.0


def test_a_broken_device_ends_the_part(monkeypatch):
    monkeypatch.setattr(cells, "answers", lambda: False)
    emit = Emit()
    with pytest.raises(records.Broken, match="answers no more after the cell a"):
        cells.each(emit, NEVER, [("a", lambda: 1 / 0), ("b", dict)])
    assert [record["cell"] for record in emit.records] == ["a"]


def test_without_time_nothing_is_measured():
    emit = Emit()
    pinned.run(emit, lambda: 0.0, True, 0)
    assert emit.records == []


def test_timed_leaves_out_the_first_call_and_stops_when_time_is_gone():
    seen = []
    times, last = cells.timed(lambda given: seen.append(given) or len(seen), lambda: -1.0, lambda: "given")
    assert (times["repeats"], last, seen) == (1, 2, ["given"] * 2)
    assert cells.timed(lambda _: None, NEVER)[0]["repeats"] == cells.REPEATS


# ---- without flax


def test_the_stand_in_makes_the_pytrees_that_flax_makes():
    class Pair:
        a: jax.Array
        name: str = bare.field(pytree_node=False, default="n")

    class Likewise:
        a: jax.Array
        name: str = flax.struct.field(pytree_node=False, default="n")

    ours = bare.dataclass(Pair)(jnp.ones(2))
    theirs = flax.struct.dataclass(Likewise)(jnp.ones(2))
    paths = [[jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(x)] for x in (ours, theirs)]
    assert paths[0] == paths[1] == [".a"]
    changed = ours.replace(name="m")
    assert jax.tree.structure(changed) != jax.tree.structure(ours)
    np.testing.assert_array_equal(jax.tree.map(lambda x: 2 * x, changed).a, [2, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.name = "m"


@pytest.mark.slow
def test_placement_and_attention_import_where_flax_is_missing():
    code = """if True:
        import sys
        for name in ("flax", "absl", "optax", "orbax", "safetensors", "tokenizers", "tqdm"):
            sys.modules[name] = None
        from eval.card import layer, pinned
        print(pinned.bare.prepare(), pinned.bare.prepare())
        from alisa_jax import attention, codecs, policies
        from alisa_jax.placement import mover
        from eval.speed import seeded
    """
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split(": ")[0] == "none"
