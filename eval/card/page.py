"""What a run on a card found, as a page: what was reached beside the bars, and what could not be finished."""

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from eval.card import records
from eval.card.parts import PARTS

HEAD, DRY = "# What this card did", "dry"
COPY, INT8, PEER, MATMUL = 0.75, 1.6, 1.0, 0.6  # the bars
BAR, BAR_PROMPT = "llama-3-8b/b64/c8192", "llama-3-8b/b1/c8192"


# heads of columns whose cells are numbers or follow from them
NUMBERS = frozenset(
    "reached,met,cases,right,failed to run,worst error of its limit,copy GB/s,product TFLOP/s,us,GB/s,of copy,TFLOP/s,"
    "of product,error,tokens/s,prefill s,decode s,load bytes,host reads,same tokens,sequences that differ,"
    "margins in nats,XLA's,found".split(",")
)


class NothingToTake(Exception):
    """A folder holds no records; the text is one sentence."""


def take(folder: Path, results: Path) -> str:
    """File the records and the log of `folder` under `results`, by card, and return the page, which is filed with them.

    Records that lie there already stay. Raises NothingToTake.
    """
    found = records.read(folder / records.RECORDS)
    if not found:
        raise NothingToTake(f"--take: {folder} holds no {records.RECORDS} with a record in it")
    cards = {slug(r): [] for r in found}
    for record in found:
        cards[slug(record)].append(record)
    pages = []
    for card, mine in cards.items():
        there = results / card
        there.mkdir(parents=True, exist_ok=True)
        filed = records.read(there / records.RECORDS)
        for record in mine:
            if record not in filed:
                records.append(there / records.RECORDS, record)
        if (folder / records.LOG).is_file() and (folder / records.LOG).resolve() != (there / records.LOG).resolve():
            shutil.copyfile(folder / records.LOG, there / records.LOG)
        text = page(records.read(there / records.RECORDS))
        part = there / f".{records.PAGE}.part"
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, there / records.PAGE)
        pages.append(text)
    return "\n\n".join(pages)


def slug(record: dict) -> str:
    """The folder of a card's results; dry runs have their own."""
    kind = re.sub(r"[^a-z0-9]+", "-", str(record.get("device_kind")).lower()).strip("-")
    return f"{DRY}-{kind}" if record.get("dry") else kind


def page(found: Sequence[dict]) -> str:
    """Markdown. The newest record of each cell counts; every number of a dry run reads dry."""
    newest = {(r["part"], r.get("cell")): r for r in found}
    cells = list(newest.values())
    of = {part.name: [r for r in cells if r["part"] == part.name] for part in PARTS}
    dry, last = all(r.get("dry") for r in cells), cells[-1]
    show = (lambda value, form="": DRY) if dry else number
    looks = [r for r in cells if r["part"] == "found" and "packages" in r]
    text = [f"{HEAD}: {last['device_kind']}", "", _about(last, looks, dry), ""]
    text += ["## The bars", "", *_bars(of, show), ""]
    for part in PARTS:
        text += [f"## {part.letter} {part.name}: {part.what}", "", *TABLES[part.name](of[part.name], show), ""]
    text += ["## Not finished", "", *_unfinished(cells, dry)]
    return "\n".join(text)


def number(value, form: str = ".3g") -> str:
    """A cell of a table; "-" for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return format(value, form) if isinstance(value, int | float) else str(value)


def _about(last: dict, looks: Sequence[dict], dry: bool) -> str:
    packages = looks[-1]["packages"] if looks else {}
    said = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    fails = looks[-1]["modules_that_fail"] if looks else {}
    what = (
        "A dry run: every path was taken with tiny shapes, and no number says anything about a card."
        if dry
        else (f"Measured {last.get('at', '')[:10]}; driver {looks[-1]['driver'] if looks else '-'}.")
    )
    lacking = "; ".join(f"`{name}`: {why}" for name, why in fails.items())
    return f"{what} {said}. Modules of the project that do not import: {lacking or 'none'}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown, or a line where there are no rows."""
    if not rows:
        return ["No records."]
    clean = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
    return [clean(head), "| " + " | ".join("---" for _ in head) + " |", *map(clean, rows)]


def _row(rows: Sequence[dict], kernel: str, shape: str, contender: str = "kernel") -> dict:
    """The record of a kernel or a peer, {} where there is none with a time."""
    like = (r for r in rows if (r.get("kernel"), r.get("shape"), r.get("contender")) == (kernel, shape, contender))
    return next((r for r in like if isinstance(r.get("time_s"), float)), {})


def _bars(of: dict, show: Callable) -> list[str]:
    rows, out = of["beside"], []

    def line(what: str, wanted: str, value: float | None, met: bool | None) -> None:
        out.append([what, wanted, show(value), show(None if value is None else met)])

    for kernel in ("packed_decode", "sparse_decode"):
        share = _row(rows, kernel, BAR).get("fraction_of_copy")
        line(f"`{kernel}`, {BAR}, 80 % sparsity: share of copy bandwidth", f"{COPY}", share, (share or 0) >= COPY)
        for kind in ("int8_token", "int8_channel"):
            raw, coded = (_row(rows, name, BAR).get("time_s") for name in (kernel, f"{kernel}_{kind}"))
            ratio = raw / coded if raw and coded else None
            line(f"`{kernel}_{kind}`: times as fast as bfloat16", f"{INT8}", ratio, (ratio or 0) >= INT8)
    own, peer = _row(rows, "dense_decode", BAR), best(rows, "dense_decode", BAR)
    ratio = peer["time_s"] / own["time_s"] if own and peer else None
    name = f" ({peer['contender']})" if peer else ""
    line(f"`dense_decode`, {BAR}: of the best peer{name}", f"{PEER}", ratio, (ratio or 0) >= PEER)
    share = _row(rows, "flash_prefill", BAR_PROMPT).get("fraction_of_matmul")
    line(
        f"`flash_prefill`, {BAR_PROMPT}: share of the matrix product's rate", f"{MATMUL}", share, (share or 0) >= MATMUL
    )
    return table(("what", "wanted", "reached", "met"), out)


def best(rows: Sequence[dict], kernel: str, shape: str) -> dict:
    """The quickest peer of a kernel at a shape, {} where none ran."""
    like = [r for r in rows if (r.get("kernel"), r.get("shape")) == (kernel, shape) and r.get("contender") != "kernel"]
    return min((r for r in like if isinstance(r.get("time_s"), float)), key=lambda r: r["time_s"], default={})


def _correct(rows: Sequence[dict], show: Callable) -> list[str]:
    kernels = list(dict.fromkeys(r["kernel"] for r in rows if "kernel" in r))
    out = []
    for kernel in kernels:
        mine = [r for r in rows if r.get("kernel") == kernel]
        right, ran = sum(r.get("passed") is True for r in mine), sum("passed" in r for r in mine)
        worst = max(itertools.chain.from_iterable(map(shares, mine)), default=None)
        out.append([f"`{kernel}`", show(ran, "d"), show(right, "d"), show(len(mine) - ran, "d"), show(worst)])
    wrong = [r for r in rows if r.get("passed") is False]
    text = table(("kernel", "cases", "right", "failed to run", "worst error of its limit"), out)
    return text + ["", *(f"* **Wrong**: {r['cell']}: {r.get('reason') or r.get('note')}" for r in wrong)]


def shares(record: dict) -> Iterator[float]:
    """Each error of a case over what it may be."""
    for key, limit in record.items():
        error = record.get(key.replace("_limit", "_error"))
        if key.endswith("_limit") and isinstance(limit, float) and isinstance(error, float):
            yield error / limit


def _rates(rows: Sequence[dict], show: Callable) -> list[str]:
    head = ("type", "copy GB/s", "product TFLOP/s")
    keys = ("copy_gb_per_s", "matmul_tflop_per_s")
    return table(head, [[r["dtype"], *(show(r.get(key), ".4g") for key in keys)] for r in rows if "dtype" in r])


def _beside(rows: Sequence[dict], show: Callable) -> list[str]:
    head = ("kernel", "shape", "row", "us", "GB/s", "of copy", "TFLOP/s", "of product", "error", "note")
    out = []
    for r in (r for r in rows if "kernel" in r):
        time_s = r.get("time_s")
        time_us = time_s * 1e6 if isinstance(time_s, float) else time_s
        keys = ("gb_per_s", "fraction_of_copy", "tflop_per_s", "fraction_of_matmul", "max_error")
        numbers = [show(time_us), *(show(r.get(key)) for key in keys)]
        out.append([f"`{r['kernel']}`", r["shape"], r["contender"], *numbers, (r.get("note") or "")[:120]])
    return table(head, out)


def _plain(rows: Sequence[dict], show: Callable) -> list[str]:
    """Cells whose records differ from part to part: what a record holds beside what all of them do."""
    out = []
    for r in rows:
        hidden = {
            "part",
            "cell",
            "basis",
            "wall_s",
            "at",
            "run",
            "dry",
            "seed",
            "code",
            *records.SAME,
            "python",
            "flax",
        }
        said = "; ".join(f"{key} {number(value)}" for key, value in r.items() if key not in hidden)
        out.append([r["cell"], show(said)])
    return table(("cell", "found"), out)


def _placed(rows: Sequence[dict], show: Callable) -> list[str]:
    """Systems that differ only in where the cache lies give the same tokens."""
    head = ("batch", "system", "tokens/s", "prefill s", "decode s", "load bytes", "host reads", "same tokens", "note")
    out = []
    for r in rows:
        name = re.sub(r"^b\d+ ", "", r["cell"])
        if " run " in r["cell"] and any(
            x["cell"] == r["cell"].rpartition(" run ")[0] and "tokens_per_s" in x for x in rows
        ):
            continue  # the system is through: its own row says more
        keys = ("tokens_per_s", "prefill_s", "decode_s", "load_bytes", "host_reads")
        numbers = [show(r.get(key), ".4g") for key in keys]
        alike = [x["tokens_sha256"] for x in rows if "tokens_sha256" in x and _system(x) == _system(r)]
        same = None if len(alike) < 2 or "tokens_sha256" not in r else len(set(alike)) == 1
        out.append([str(r.get("batch", "-")), name, *numbers, show(same), r.get("note") or ""])
    return table(head, out)


def _system(record: dict) -> tuple:
    """Batch, policy and codec; the controller and the run are left out."""
    name = record["cell"].rpartition(" run ")[0] or record["cell"]
    parts = [part.strip() for part in name.split("|")]
    return record.get("batch"), *parts[1:]


def _whole(rows: Sequence[dict], show: Callable) -> list[str]:
    head = ("system", "same tokens", "sequences that differ", "margins in nats", "tokens/s", "XLA's", "what ran")
    out = []
    for r in rows:
        keys = ("same", "sequences_that_differ", "margins_nats", "tokens_per_s", "xla_tokens_per_s")
        out.append([r["cell"], *(show(r.get(key)) for key in keys), r.get("implementation", "-")])
    return table(head, out)


def _tiles(rows: Sequence[dict], show: Callable) -> list[str]:
    timed = sorted((r for r in rows if isinstance(r.get("time_s"), float)), key=lambda r: (r["kernel"], r["time_s"]))
    out = [
        [f"`{r['kernel']}`", r["tiling"], show(r["time_s"] * 1e6), "yes" if r.get("of_table") else ""] for r in timed
    ]
    return table(("kernel", "tiling", "us", "of the table"), out)


def _unfinished(cells: Sequence[dict], dry: bool) -> list[str]:
    """Cells that failed, were stopped or were switched off, and parts without a record."""
    out = []
    for r in cells:
        for key in ("error", "stopped", "skipped"):
            if key in r:
                out.append(f"* {r['part']}, {r['cell']}: {key}{', dry' if dry else ''}: {r[key]}")
    began = {r["part"] for r in cells}
    out += [f"* {part.name}: not begun{', dry' if dry else ''}" for part in PARTS if part.name not in began]
    return out or ["Nothing."]


TABLES = {
    "correct": _correct,
    "rates": _rates,
    "beside": _beside,
    "pinned": _plain,
    "layer": _plain,
    "placed": _placed,
    "whole": _whole,
    "tiles": _tiles,
}
