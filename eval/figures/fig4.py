"""Figure 4: rank correlation of accumulated attention scores with dense attention, for local, strided and SWA."""

from collections.abc import Sequence
from pathlib import Path

from eval import sparsity
from eval.drawing import attention
from eval.figures import base
from eval.script import common
from eval.script.resume import Found, Setup
from eval.script.tables import Table, Versus
from eval.sparsity import RHOS, Sizes

TITLE = "Rank correlation of accumulated attention scores with dense"
METHODS = ("local", "strided", "swa")


def check(setup: Setup) -> None:
    """Raise UserError for a model without tokenizer, or one that is too small for the sample."""
    sparsity.check(setup, Sizes.of(setup.config("fig4")), _policies(setup))


def records(setup: Setup) -> Found:
    """Dense, local, strided, SWA."""
    return sparsity.collect(setup, Sizes.of(setup.config("fig4")), _policies(setup))


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """Spearman's rho by three readings of what is ranked, beside the paper's."""
    paper = base.paper("alisa_fig4")
    rows, versus = [], []
    for method, record in zip(METHODS, records[1:], strict=True):
        shown = [common.number(record[name], ".3f", stderr=record[f"{name}_stderr"]) for name in RHOS]
        rows.append([method, *shown, f"{paper['rho'][method]:.3f}"])
        versus += [Versus(f"{method}, {name}", "rho", record[name], paper["rho"][method], "measured") for name in RHOS]
    caption = (
        f"Figure 4: Spearman's rho between the accumulated attention scores of a policy at {_sparsity(setup):.0%} KV "
        "sparsity and of dense attention, mean over layers and heads: by vocabulary id (the figure's axis; over the ids "
        "that occur), the same divided by the id's occurrences, and by position in a window (mean over windows). ± is one "
        f"standard error over windows, jackknife for ids. {sparsity.caption(records[0], counted=False)} "
        f"Paper: {paper['workload']}."
    )
    head = ("policy", "by id", "by id, per occurrence", "by position", "paper")
    why = (
        f"The paper does not state the sparsity of its figure; {_sparsity(setup):.0%} is that of its system tests.",
        "By id every causal pattern ranks frequent tokens high, which alone gives local and strided a high rho; what the "
        "paper ranked to get values near 0 it does not say.",
        "local is here the most recent part of the row, which grows with it; a fixed window is drawn in the paper's sketch.",
    )
    return [Table(caption, head, rows, versus=versus, why=why)]


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """Accumulated scores by vocabulary id, in the order of dense's."""
    return attention.scores(records, base.paper("alisa_fig4"), path)


def _sparsity(setup: Setup) -> float:
    return setup.config("fig4")["kv_sparsity"]


def _policies(setup: Setup) -> list[str]:
    return [f"{method}(kv_sparsity={_sparsity(setup):g})" for method in METHODS]
