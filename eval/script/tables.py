"""Tables as text: for a terminal and as Markdown. Nothing is computed here but the numbers' own digits."""

from collections.abc import Sequence

from eval.figures.base import Table
from eval.script import common

MODELLED = "†"
LEGEND = f"{MODELLED} modelled, not measured; - no number; paper: published, read off the figures where they print none"


def value(number, form: str = ".3g", basis: str = "measured", scale: float = 1.0, stderr: float | None = None) -> str:
    """A cell: `-` for None, a text such as OOM as it is, `MODELLED` behind a modelled number."""
    text = common.number(number, form, scale, stderr)
    return text + MODELLED if basis == "modelled" and text != "-" else text


def text(table: Table) -> str:
    """For a terminal."""
    parts = [table.caption, common.table(table.head, table.rows, left=table.left)]
    return "\n".join(parts + [f"why: {why}" for why in table.why])


def markdown(table: Table) -> str:
    """As a Markdown table with its caption above and the reasons below."""
    lines = [_row(table.head), _row("---" if i < table.left else "---:" for i in range(len(table.head)))]
    lines += [_row(row) for row in table.rows]
    below = "".join(f"\n* {why}" for why in table.why)
    return f"{table.caption}\n\n" + "\n".join(lines) + ("\n" + below if below else "")


def page(title: str, figures: Sequence[Table]) -> str:
    """A Markdown page of tables."""
    return "\n\n".join([f"# {title}", *map(markdown, figures), LEGEND]) + "\n"


def _row(cells) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
