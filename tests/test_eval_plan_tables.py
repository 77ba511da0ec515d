"""eval.plan_tables: every cell has its error, and the published orderings come out."""

import json

import pytest

from eval import plan_tables


@pytest.fixture(scope="module")
def published() -> dict:
    """The paper's numbers, cut to batches 4 and 64 and to two sparsities."""
    paper = json.loads(plan_tables.PAPER.read_text())
    bars = paper["fig9_tokens_per_s"]
    for name in bars.keys() - {"batch"}:
        bars[name] = {system: [row[0], row[-1]] for system, row in bars[name].items()}
    bars["batch"] = [4, 64]
    paper["fig12a_steps"] = {key: paper["fig12a_steps"][key] for key in ("80", "20")}
    return paper


def test_figure_9_has_an_error_in_each_cell_and_the_published_orderings(published, monkeypatch):
    monkeypatch.setattr(plan_tables, "MODELS", (plan_tables.MODELS[2],))
    cells = plan_tables.figure_9(published, 20e9)
    speed = {(cell["system"], cell["batch"]): cell["modelled_tokens_per_s"] for cell in cells}
    for cell in cells:
        ratio = cell["modelled_tokens_per_s"] / cell["published_tokens_per_s"]
        assert cell["error_frac"] == pytest.approx(ratio - 1) and cell["basis"] == "modelled"
    calibrated = [cell for cell in cells if cell["calibrated"]]
    assert {(cell["system"], cell["batch"]) for cell in calibrated} == {("alisa", 4), ("vllm", 4)}
    assert all(abs(cell["error_frac"]) < 0.02 for cell in calibrated)
    assert speed["vllm", 4] > speed["alisa", 4] > speed["flexgen", 4] > speed["hf_accelerate", 4]
    assert speed["alisa", 64] > speed["vllm", 64] > speed["flexgen", 64] > speed["hf_accelerate", 64]
    assert speed["alisa", 64] / speed["flexgen", 64] > speed["alisa", 4] / speed["flexgen", 4]


def test_p1_does_not_depend_on_sparsity_and_p2_rises_with_it_on_a_slow_link(published):
    cells = [cell for cell in plan_tables.figure_12a(published, 5e9) if cell["rebuild"] == "prefix"]
    assert len({cell["modelled_p1"] for cell in cells}) == 1
    p2 = {cell["kv_sparsity"]: cell["modelled_p2"] for cell in cells}
    assert p2[0.2] < p2[0.8]
    assert all(cell["error_frac"] == pytest.approx(cell["modelled_s"] / cell["published_s"] - 1) for cell in cells)
