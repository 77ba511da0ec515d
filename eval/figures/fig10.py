"""Figure 10: how sparse attention is under SWA, by decode step, at several KV sparsities."""

from collections.abc import Sequence
from pathlib import Path

from eval import sparsity
from eval.drawing import attention
from eval.figures import base
from eval.script import common
from eval.script.resume import Found, Setup
from eval.script.tables import Table
from eval.sparsity import Sizes

TITLE = "Sparsity of attention under SWA by step"
MEASURES = (
    ("sparsity_frac", "all entries, those that SWA left out counted as zero"),
    ("sparsity_kept_frac", "the kept entries"),
    ("sparsity_pooled_frac", "all entries, rows averaged over heads first"),
)
COMPARED = "sparsity_pooled_frac"  # in the manifest: the reading that gives the paper's order


def check(setup: Setup) -> None:
    """Raise UserError for a model without tokenizer, or one that is too small for the sample."""
    sparsity.check(setup, Sizes.of(setup.config("fig10")), _policies(setup))


def records(setup: Setup) -> Found:
    """Dense, and SWA at every sparsity."""
    return sparsity.collect(setup, Sizes.of(setup.config("fig10")), _policies(setup))


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """One table a reading of the measure, since the paper does not say over which entries the share is taken."""
    paper = base.paper("alisa_fig10")
    return [_table(setup, records, paper, *measure) for measure in MEASURES]


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """All readings beside the paper's curves."""
    return attention.under_policies(records, _names(setup), base.paper("alisa_fig10"), path)


def _table(setup: Setup, records: Sequence[dict], paper: dict, measure: str, entries: str) -> Table:
    rows, versus = [], []
    for name, record in zip(_names(setup), records, strict=True):
        row = [name]
        for at, step in enumerate(paper["step"]):
            ours, _ = sparsity.at_step(record, measure, step)
            shown = None if ours is None else 100 * ours
            cells = [common.number(shown, ".1f")]
            for model, curves in paper["percent"].items():
                published = curves[name][at] if name in curves else None
                cells.append(common.number(published, ".1f"))
                if measure == COMPARED:
                    what = f"density of {entries} at step {step}, KV sparsity {name}, {model}"
                    versus.append(base.density(what, shown, published))
            row.append(" / ".join(cells))
        rows.append([*row, common.number(record[measure], ".1f", 100, record[f"{measure}_stderr"])])
    caption = (
        f"Figure 10, of {entries}: share of attention weights below 1 % of the maximum of their row, in %, mean over layers "
        f"and heads: ours / {' / '.join(paper['percent'])} of the paper; last column: ours over all steps, ± one standard "
        f"error over windows. {sparsity.caption(records[0])} Paper: {paper['workload']}."
    )
    head = ("KV sparsity, %", *(f"step {step}" for step in paper["step"]), "all steps")
    why = (
        "The paper does not say over which entries the share is taken.",
        _order(setup, records, paper, measure),
        f"{records[0]['model']} stands in for OPT: another model, tokenizer and text; steps are counted after "
        f"{records[0]['skip_tokens']} tokens.",
    )
    return Table(caption, head, rows, versus=versus, why=why)


def _order(setup: Setup, records: Sequence[dict], paper: dict, measure: str) -> str:
    """Where SWA is below dense, as Figure 3 measures dense, by this reading and in the paper."""
    dense, names = records[0]["sparsity_frac"], _names(setup)[1:]
    ours = [name for name, r in zip(names, records[1:], strict=True) if r[measure] < dense]
    found = [f"ours at {_listed(ours)}"]
    for model, curves in paper["percent"].items():
        below = [name for name in names if name in curves and sum(curves[name]) < sum(curves["dense"])]
        found.append(f"{model} at {_listed(below)}")
    return f"Less sparse than dense, measured by head as in Figure 3, mean over steps: {'; '.join(found)}."


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} %" if names else "no KV sparsity"


def _sparsities(setup: Setup) -> Sequence[float]:
    return setup.config("fig10")["sparsities"]


def _names(setup: Setup) -> list[str]:
    """How the paper's data calls each record."""
    return ["dense", *(f"{100 * s:g}" for s in _sparsities(setup))]


def _policies(setup: Setup) -> list[str]:
    return [f"swa(kv_sparsity={s:g})" for s in _sparsities(setup)]
