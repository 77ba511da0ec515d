"""The tables of `eval.compare`: a row a method, and below each table what methods lose while they hold something else."""

from collections.abc import Mapping
from dataclasses import replace

from eval.quality import sample as compare_sample
from eval.quality.paired import Difference, show
from eval.quality.rows import Entry
from eval.script import common, tables
from eval.script.common import number
from eval.script.tables import Table

Rows = Mapping[float, Mapping[Entry, dict]]  # of each share, dense attention first


def text(rows: Rows, dense: Mapping, refused: Mapping[str, str]) -> str:
    """For a terminal."""
    parts = [heading(dense)]
    for one in made(rows, dense, refused):
        parts.append("\n".join([one.caption, common.table(one.head, one.rows, left=one.left), *one.why]))
    return "\n\n".join(parts)


def page(rows: Rows, dense: Mapping, refused: Mapping[str, str]) -> str:
    """A Markdown page."""
    first, *rest = made(rows, dense, refused)
    first = replace(first, caption=f"{heading(dense)}\n\n{first.caption}")
    return tables.page("Methods at equal bytes", [first, *rest])


def heading(dense: Mapping) -> str:
    """What all tables share."""
    r = dense
    sample = f"{r['windows']} windows (n = {r['n']} tokens), {r['items_each']} needles at each depth, seed {r['seed']}"
    return (
        f"{r['model']} on {r['data']} ({r['data_sha256'][:12]}): prompts of {r['prompt_tokens']} tokens, "
        f"{r['new_tokens']} decoded; {sample}.\n"
        f"held and read: bytes of K and V resident at the end and read at a step, in % of dense, raw "
        f"({r['kv_bytes_per_token']:.0f} B a token). ± one standard error,\nof differences that of the paired difference; "
        f"* above two. Tasks in % of the answers. Times of {r['timed_sequences']} sequences on {r['device_kind']}, "
        f"{r['cpu_count']} cores, median of {r['timed_runs']}."
    )


def made(rows: Rows, dense: Mapping, refused: Mapping[str, str]) -> list[Table]:
    """A table for each share; what was refused stands below the last one."""
    head = ["method", "codec", "held", "read", "stats B/token", "ppl", "nats from dense"]
    head += [*dense["told_apart"], "prefill s", "ms/step"]
    found = []
    for share, mine in rows.items():
        lines = [_row(entry, r, dense) for entry, r in mine.items()]
        why = failures(mine, dense)
        caption = f"At {100 * share:g} % of the bytes of dense attention"
        found.append(Table(caption, head, lines, left=2, why=why))
    whose: dict[str, list[str]] = {}
    for what, why in refused.items():
        whose.setdefault(why, []).append(what)
    left = tuple(f"left out: {', '.join(whats)}: {why}" for why, whats in whose.items())
    return [*found[:-1], replace(found[-1], why=(*found[-1].why, *left))]


def _row(entry: Entry, r: Mapping, dense: Mapping) -> list[str]:
    changes = {} if r is dense else compare_sample.differences(r, dense, whole=True)
    row = [entry.policy, entry.codec, *(number(r[key], ".1f", 100) for key in ("held_frac", "read_frac"))]
    row += [number(r["stats_bytes_per_token"], ".0f"), number(r["token_perplexity"], ".2f")]
    nats = changes.get("text")
    row.append(show(None if nats is None else nats._replace(value=0.0 - nats.value), ".3f"))
    for name in dense["told_apart"]:
        worse = name in changes and changes[name].shown
        cell = number(r[f"{name}_accuracy_frac"], ".1f", 100, r[f"{name}_accuracy_frac_stderr"])
        row.append(cell + ("*" if worse else " "))
    return [*row, number(r["prefill_s"], ".2f"), number(r["decode_step_s"], ".1f", 1000)]


def failures(rows: Mapping[Entry, dict], dense: Mapping) -> tuple[str, ...]:
    """For each method: where it is worse than dense by more than two standard errors, and where it is not."""
    lines = []
    for entry, record in rows.items():
        found = None if record is dense else compare_sample.modes(record, dense)
        if found is not None:
            lost, held = found
            losses = {name: f" ({_change(name, d)})" for name, d in lost.items()}
            lines.append(f"{entry} loses {_listed(losses)}; it holds {_listed(dict.fromkeys(held, ''))}")
    return tuple(lines)


def _listed(parts: Mapping[str, str]) -> str:
    """Names with what is said of each; neighbours that differ in their depth alone share the rest of the name."""
    said, before = [], ""
    for name, what in parts.items():
        task, _, depth = name.partition(" at ")
        said.append((depth if depth and task == before else name) + what)
        before = task
    return ", ".join(said)


def _change(name: str, d: Difference) -> str:
    if name == "text":
        return f"{-d.value:+.3f} nats a token"
    return f"{100 * d.value:+.0f} points"
