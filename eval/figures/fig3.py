"""Figure 3: how sparse dense attention is, by decode step and by layer."""

from collections.abc import Sequence
from pathlib import Path

from eval import sparsity
from eval.drawing import attention
from eval.figures import base
from eval.script import common
from eval.script.resume import Found, Setup
from eval.script.tables import Table
from eval.sparsity import Sizes

TITLE = "Sparsity of dense attention by step and layer"


def check(setup: Setup) -> None:
    """Raise UserError for a model without tokenizer, or one that is too small for the sample."""
    sparsity.check(setup, Sizes.of(setup.config("fig3")), ())


def records(setup: Setup) -> Found:
    """The record of dense attention."""
    return sparsity.collect(setup, Sizes.of(setup.config("fig3")), ())


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """Sparsity at the paper's steps, and of our layers beside the paper's layers at the same depth."""
    dense, paper = records[0], base.paper("alisa_fig3")
    return [_by_step(dense, paper), _by_layer(dense, paper)]


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """Both curves, ours and the paper's."""
    return attention.sparsity(records, base.paper("alisa_fig3"), path)


def _by_step(dense: dict, paper: dict) -> Table:
    models = paper["by_step"]["percent"]
    rows, versus = [], []
    for at, step in enumerate(paper["by_step"]["step"]):
        ours, stderr = sparsity.at_step(dense, "sparsity_frac", step)
        published = {name: values[at] for name, values in models.items()}
        rows.append([str(step), common.number(ours, ".1f", 100, stderr), *(f"{v:.1f}" for v in published.values())])
        shown = None if ours is None else 100 * ours
        versus += [base.density(f"density at step {step}, {name}", shown, v) for name, v in published.items()]
    caption = (
        "Figure 3, by step: share of attention weights below 1 % of the maximum of their row, in %, mean over layers and "
        "heads, ± one standard error over windows. "
        f"{sparsity.caption(dense)} Paper: {paper['workload']}."
    )
    return Table(
        caption, ("step", dense["model"], *(f"{name} (paper)" for name in models)), rows, versus=versus, why=_why(dense)
    )


def _by_layer(dense: dict, paper: dict) -> Table:
    models, layers = paper["by_layer"]["percent"], paper["layers"]
    ours, errors = (dense[f"sparsity_frac_by_layer{end}"] for end in ("", "_stderr"))
    rows, versus = [], []
    for layer, value in enumerate(ours):
        depth = layer / max(1, len(ours) - 1)
        row = [str(layer), common.number(value, ".1f", 100, errors and errors[layer])]
        for name, values in models.items():
            known = [(i, v) for i, v in zip(paper["by_layer"]["layer"], values, strict=True) if v is not None]
            near, published = min(known, key=lambda one: abs(one[0] / (layers[name] - 1) - depth))
            row.append(f"{published:g} (layer {near})")
            what = f"density of layer {layer} of {len(ours)}, {name} layer {near} of {layers[name]}"
            versus.append(base.density(what, 100 * value, published))
        rows.append(row)
    caption = (
        "Figure 3, by layer: the same share, mean over steps and heads; the paper's reading at the nearest depth, its layer "
        "in brackets. "
        f"{sparsity.caption(dense)}"
    )
    return Table(caption, ("layer", dense["model"], *(f"{name} (paper)" for name in models)), rows, versus=versus)


def _why(dense: dict) -> list[str]:
    return [
        "The paper gives no prompt; its first step is 83 to 86 % sparse, which a row of one entry cannot be, so there was "
        f"one. Ours: step 1 is the row after {dense['skip_tokens']} tokens.",
        f"{dense['model']} stands in for OPT: another model, tokenizer and text.",
    ]
