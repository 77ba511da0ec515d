"""Tables as text, for a terminal and as Markdown, and our numbers beside the paper's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eval.script import common

MODELLED = "†"
LEGEND = f"{MODELLED} modelled, not measured; - no number; paper: published, read off the figures where they print none"
NEAR = 0.25  # what counts as close to the paper's number


@dataclass(frozen=True)
class Versus:
    """One number of ours beside the paper's; "OOM" for what did not fit, None for what is not there."""

    what: str
    unit: str
    ours: float | str | None
    paper: float | str | None
    basis: str  # "measured" | "modelled"

    @property
    def ratio(self) -> float | None:
        """Ours over the paper's, where both are numbers and the paper's is not 0; None for a correlation ("rho")."""
        return self.ours / self.paper if self._both and self.paper and self.unit != "rho" else None

    @property
    def near(self) -> bool | None:
        """Whether ours is within a quarter of the paper's, a correlation within 0.25 of it; None without two numbers."""
        if self.unit == "rho":
            return abs(self.ours - self.paper) <= NEAR if self._both else None
        return None if self.ratio is None else abs(self.ratio - 1) <= NEAR

    @property
    def _both(self) -> bool:
        return all(isinstance(x, int | float) for x in (self.ours, self.paper))


@dataclass(frozen=True)
class Table:
    """A table as texts; a cell that is modelled ends in `tables.MODELLED`, one that is missing is `-`.

    caption: what was run, on which model, data and device, and how the quantity is defined. versus: the numbers that the
    manifest compares. why: why they differ from the paper's, one sentence each.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1  # columns that are aligned left
    versus: Sequence[Versus] = ()
    why: Sequence[str] = ()


def value(number, form: str = ".3g", basis: str = "measured", scale: float = 1.0, stderr: float | None = None) -> str:
    """A cell: `-` for None, a text such as OOM unchanged, `MODELLED` behind a modelled number."""
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


def device(records: Iterable[dict]) -> str:
    """The devices that records were got on, for a caption."""
    kinds = dict.fromkeys(f"{r['device_kind']} ({r['cpu_count']} cores)" for r in records)
    return ", ".join(kinds)


def _row(cells) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
