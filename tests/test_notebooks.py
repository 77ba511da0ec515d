"""The notebooks run from clean, in a kernel of their own, and what they find is sane."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "eval" / "notebooks").glob("*.ipynb"))
NAMES = [path.name for path in NOTEBOOKS]
LONGEST_S = 600
# In a process of its own: the event loop, its sockets and their warnings stay out of the tests' process.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    nbclient.NotebookClient(notebook, timeout=int(sys.argv[3]), kernel_name="python3").execute()
finally:
    nbformat.write(notebook, sys.argv[2])
"""


def executed(path: Path, folder: Path) -> dict:
    """The notebook at `path` with its outputs; run in `folder`, which is not the repository."""
    if missing := [name for name in ("nbclient", "nbformat", "ipykernel") if find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed (extra 'notebooks')")
    home = {
        name: str(folder)
        for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")
    }
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # installed or not
    out = folder / "executed.ipynb"
    command = [sys.executable, "-c", EXECUTE, str(path), str(out), str(LONGEST_S)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **home, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """Every notebook after a run from clean, by file name; two run at a time."""
    folders = [tmp_path_factory.mktemp("notebook") for _ in NOTEBOOKS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NAMES, pool.map(executed, NOTEBOOKS, folders), strict=True))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebooks_are_there():
    assert {"write_your_own_policy.ipynb", "sparsity_analysis.ipynb", "where_does_the_time_go.ipynb"} <= set(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_committed_notebook_holds_no_outputs_and_names_no_machine(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"].get("language_info", {"name": "python"}) == {"name": "python"}
    for cell in code_cells(notebook):
        assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_of_a_notebook_runs_and_none_raises(name, results):
    cells = code_cells(results[name])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]


@pytest.mark.slow
def test_the_wrong_policy_is_refused_the_right_one_passes_and_the_comparison_is_sane(results):
    cells = code_cells(results["write_your_own_policy.ipynb"])
    found = json.loads("".join(cells[-1]["outputs"][0]["text"]))
    assert "breaks the rule 'capacity'" in found["refused"] and "no slot is empty for its own token" in found["refused"]
    reports = [out["data"]["text/plain"] for cell in cells for out in cell["outputs"] if "data" in out]
    passed = ["".join(text) for text in reports if "".join(text).startswith("Report(policy=Landmarks(")]
    assert len(passed) == 1 and all(f"'{rule}'" in passed[0] for rule in ("routes", "gone", "no_sparsity"))

    dense, *others = found["rows"]
    budgets = {(row["policy"], row["kv_sparsity"]) for row in others}
    assert budgets == {(name, s) for name in ("local", "strided", "swa", "landmarks") for s in (0.8, 0.9)}
    assert dense["policy"] == "dense" and dense["attended_frac"] == pytest.approx(1)
    for row in found["rows"]:
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
        assert 0 <= row["recall"] <= 1 and row["perplexity"] > 1 and row["perplexity_stderr"] > 0
    for row in others:
        assert row["perplexity"] > dense["perplexity"] - 2 * dense["perplexity_stderr"]
        assert row["recall"] <= dense["recall"] + 2 * dense["recall_stderr"]
        past = 1 - row["kv_sparsity"]
        assert past < row["attended_frac"] < past + 0.1, "a budget is kept up to the query itself and the first tokens"


@pytest.mark.slow
def test_the_figures_of_the_notebook_are_drawn(results):
    cells = code_cells(results["write_your_own_policy.ipynb"])
    images = [out for cell in cells for out in cell["outputs"] if "image/png" in out.get("data", {})]
    assert len(images) == 2


@pytest.mark.slow
def test_what_the_analysis_of_attention_finds_is_sane_and_missed_mass_predicts_perplexity(results):
    cells = code_cells(results["sparsity_analysis.ipynb"])
    found = json.loads("".join(cells[-1]["outputs"][0]["text"]))
    dense, *others = found["rows"]
    rows = {row["policy"]: row for row in others}
    assert set(rows) == {f"{name}(kv_sparsity={s})" for name in ("local", "strided", "swa", "h2o") for s in (0.6, 0.9)}
    assert dense["missed_frac"] == 0 and dense["attended_frac"] == 1 and dense["token_perplexity"] < 40
    assert len(found["by_layer"]) == 4 and all(0.6 < one < 1 for one in found["by_layer"])
    for row in others:
        assert dense["sparsity_frac"] < row["sparsity_frac"] < 1 and row["sparsity_kept_frac"] < dense["sparsity_frac"]
        assert 0 < row["missed_frac"] < 0.9 and -1 <= row["rho_by_position"] < row["rho_by_id"] <= 1
        assert (row["entered_tokens"] > 0) == row["policy"].startswith("swa")
    for name in ("local", "strided", "swa", "h2o"):
        mild, strong = (rows[f"{name}(kv_sparsity={s})"] for s in (0.6, 0.9))
        assert mild["missed_frac"] < strong["missed_frac"] and mild["token_perplexity"] < strong["token_perplexity"]
        assert rows["swa(kv_sparsity=0.9)"]["missed_frac"] <= strong["missed_frac"]
    assert found["rho_missed_perplexity"] > 0.8


@pytest.mark.slow
def test_the_watched_run_has_its_phases_and_the_planner_says_where_offloading_does_not_help(results):
    cells = code_cells(results["where_does_the_time_go.ipynb"])
    found = json.loads("".join(cells[-1]["outputs"][0]["text"]))
    p1, p2, n = (found["phases"][name] for name in ("p1", "p2", "new_tokens"))
    moved, homes = found["moved_bytes"], found["homes"]
    first = {name: next((j for j, size in enumerate(sizes) if size), n) for name, sizes in moved.items()}
    assert 0 < first["stored"] == p1 < p2 == first["dropped"] < n and p1 < first["loaded"] and p2 < first["recomputed"]
    assert 0 < sum(moved["loaded"]) < sum(moved["stored"]), "only what enters a selection travels"
    assert 0 < homes["device_peak_bytes"] <= homes["device_budget"] and homes["host_peak_bytes"] <= sum(moved["stored"])
    brought = [row["loaded"] + row["recomputed"] for row in found["rows"].values()]
    assert len(brought) == 3 and brought == sorted(brought), "alisa, the paper's traffic, accelerate"
    assert all(0 <= row["Belady loads"] <= rows for row, rows in zip(found["rows"].values(), brought, strict=True))
    small, large = found["plans"]
    assert small["batch"] < small["offload_wins_from_batch"] == large["offload_wins_from_batch"] < large["batch"]
    assert small["fits"] and small["alisa_tokens_per_s"] < small["waves_tokens_per_s"]
    assert not large["fits"] and large["alisa_tokens_per_s"] > large["waves_tokens_per_s"]
    ours = {"append", "attend", "observe", "exchange", "step"}
    assert ours < set(found["operation_s"]) and all(0 < seconds < 10 for seconds in found["operation_s"].values())
