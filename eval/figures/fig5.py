"""Figure 5: attention maps of a text of 16 tokens in some layers, and how much of it lies on the first token."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval import sparsity
from eval.drawing import attention
from eval.script import common
from eval.script.resume import Found, Setup
from eval.script.tables import Table, Versus
from eval.sparsity import FIRST_TOKENS, Sizes

TITLE = "Attention maps of dense attention, and its sink"
PANELS = 4


def check(setup: Setup) -> None:
    """Raise UserError for a model without tokenizer, or one that is too small for the sample."""
    sparsity.check(setup, Sizes.of(setup.config("fig5")), ())


def records(setup: Setup) -> Found:
    """The record of dense attention, which holds the maps."""
    return sparsity.collect(setup, Sizes.of(setup.config("fig5")), ())


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """What the maps show, in numbers: the weight on the first token, on the query's own and on the one before."""
    dense = records[0]
    later, errors = (dense[f"first_token_frac_by_layer{end}"] for end in ("", "_stderr"))
    rows, versus = [], []
    for layer, rows_of in enumerate(dense["first_map"]):
        first, own, before = shares(attention.square(rows_of))
        row = [str(layer), *(common.number(x, ".1f", 100) for x in (first, own, before))]
        rows.append([*row, common.number(later[layer], ".1f", 100, errors and errors[layer])])
        versus.append(Versus(f"weight on the first token, layer {layer}", "%", 100 * first, None, "measured"))
    caption = (
        f"Figure 5: where the attention of the first {FIRST_TOKENS} tokens of the first window lies in each layer, in %, "
        f"mean over heads and over the queries after the first two; last column: after {dense['skip_tokens']} tokens, over "
        f"all windows. {sparsity.caption(dense)} The paper prints no numbers: it shows OPT-6.7B, layers 0, 15, 23, 31, with "
        "a bright first column in 15 and 23 and no pattern that all layers share."
    )
    head = ("layer", "first token", "own token", "token before", "first token, later")
    return [
        Table(caption, head, rows, versus=versus, why=("A model as small as this one may have no attention sink.",))
    ]


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """The maps of the first, of middle and of the last layer."""
    return attention.first_maps(records[0], shown(len(records[0]["first_map"])), path)


def shown(layers: int) -> list[int]:
    """Which of so many layers are drawn: at most `PANELS`, the first and the last among them."""
    return [int(i) for i in np.unique(np.linspace(0, layers - 1, PANELS).round())]


def shares(square: np.ndarray) -> tuple[float, float, float]:
    """Weight on the first token, the query's own and the one before it, mean over the rows of [F, F] from the third on."""
    F = len(square)
    return tuple(float(np.mean(x)) for x in (square[2:, 0], np.diag(square)[2:], square[range(2, F), range(1, F - 1)]))
