"""Records of `eval.bench` as tables, and the numbers that they have to reach: gates, and goals beyond them.

A gate is checked wherever its cell was measured with the rows that it needs:

    decode, one sequence          dense over the best peer at least 0.9; goal 1
    decode (8, 1024)              dense over the best peer at least 1; SWA over our dense at least 1.5; goal: SWA over the
                                  best peer at least 2
    decode (8, 1024), int8        tokens/s over the same policy's raw ones at least 1, bytes of K and V at most half
    decode (4, 4096)              SWA over our dense at least 1.6
    prefill, 1024 tokens          dense over the best peer at least 1
    perplexity of 100k tokens     goal: dense below 60 s, SWA below 180 s, by the protocol `decode`
    every row                     nothing compiles while it is timed; dense gives the peers' tokens and nll; goal: 60 % of
                                  its limit
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from eval.script import common
from eval.speed import cells as bench_cells

LONG_TEXT_TOKENS = 99_000  # of 100k, those that are scored


class Gate(NamedTuple):
    """A number and what it has to be."""

    kind: str  # "gate" | "goal"
    where: str
    what: str
    value: float
    least: float | None  # None: `most` counts
    most: float | None = None

    @property
    def met(self) -> bool:
        return self.value >= self.least if self.least is not None else self.value <= self.most

    def row(self) -> list[str]:
        wanted = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        return [self.kind, self.where, self.what, common.number(self.value), wanted, "met" if self.met else "missed"]


def text(records: Sequence[dict]) -> str:
    """A table for every cell, and below them the gates."""
    cells = list(grouped(records).values())
    found = [gate for rows in cells for gate in gates(rows)]
    parts = [_above(records), *map(table, cells)]
    if found:
        parts.append(common.table(["", "cell", "number", "is", "wanted", ""], [gate.row() for gate in found], left=3))
    return "\n\n".join(parts)


def grouped(records: Sequence[dict]) -> dict[tuple, list[dict]]:
    """Records by cell, in their order."""
    cells: dict[tuple, list[dict]] = {}
    for r in records:
        cells.setdefault((r["suite"], r["model"], r["batch"], r["context_tokens"]), []).append(r)
    return cells


def table(rows: Sequence[dict]) -> str:
    """The rows of a cell; what its rows share stands above, why a row has no number below."""
    suite, made = rows[0]["suite"], []
    how = "protocol" if suite == "perplexity" else "codec"
    for r in rows:
        seconds, quartiles = _times(r)
        made.append(
            [
                r["system"],
                r["policy"],
                r[how],
                common.number(r["tokens_per_s"], ",.1f"),
                common.number(seconds, ".2f", 1e3),
                "-" if quartiles is None else " - ".join(common.number(x, ".2f", 1e3) for x in quartiles),
                common.number(r["ratio_to_best_peer"], ".2f"),
                common.number(r["ratio_to_dense"], ".2f"),
                common.number(r.get("limit_s"), ".2f", 1e3),
                common.number(r.get("limit_frac"), ".0%"),
                common.number(r.get("nll_nats_per_token"), ".5f")
                if suite == "perplexity"
                else common.number(r.get("kv_bytes"), ".1f", 1e-6),
                common.number(r.get("agrees"), ".2f"),
                common.number(r.get("compiles"), ".0f"),
            ]
        )
    unit = {"decode": "ms/step", "prefill": "ms", "perplexity": "ms"}[suite]
    head = ["system", "policy", how, "tokens/s", unit, "quartiles", "x peer", "x dense", "limit ms", "of limit"]
    head += ["nll" if suite == "perplexity" else "KV MB", "agrees", "compiles"]
    notes = [f"{r['system']}: {r['note']}" for r in rows if r.get("note")]
    return "\n".join([_title(rows[0]), common.table(head, made, left=3), *notes])


def _times(r: dict) -> tuple[float | None, list[float] | None]:
    for name in ("seconds_per_step", "prefill_s"):
        if name in r:
            return r[name], r[f"{name}_quartiles"]
    return r.get("score_s"), None


def _title(r: dict) -> str:
    size = f"{r['batch']} x {r['context_tokens']} tokens"
    more = {
        "decode": f"{r['rounds']} rounds of {r.get('steps')} steps, the last ends at {r['context_tokens']} tokens",
        "prefill": f"{r['rounds']} rounds",
        "perplexity": f"{r.get('n')} tokens in windows",
    }
    return f"{r['suite']}: {r['model']}, {size}, {more[r['suite']]}"


def _above(records: Sequence[dict]) -> str:
    r = records[0]
    return (
        f"{r['device_kind']}, {r['cpu_count']} cores, {r['threads']} threads, {r['dtype']}; reads "
        f"{r['read_bytes_per_s'] / 1e9:.1f} GB/s, multiplies {r['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s; "
        f"jax {r['jax']}, torch {r['torch']}, transformers {r['transformers']}"
    )


def gates(rows: Sequence[dict]) -> list[Gate]:
    """The gates that the rows of one cell are checked against."""
    r = rows[0]
    where = f"{r['suite']} {r['model']} ({r['batch']}, {r['context_tokens']})"
    return [Gate(kind, where, *rest) for kind, *rest in (*_speed(rows), *_always(rows))]


def _speed(rows: Sequence[dict]) -> Iterator[tuple]:
    r = rows[0]
    dense, swa = _row(rows, "dense"), _row(rows, bench_cells.SWA)
    size = r["batch"], r["context_tokens"]
    if r["suite"] == "decode":
        if size[0] == 1:
            yield from _ratio("gate", "dense over the best peer", dense, "ratio_to_best_peer", 0.9)
            yield from _ratio("goal", "dense over the best peer", dense, "ratio_to_best_peer", 1.0)
        if size == (8, 1024):
            yield from _ratio("gate", "dense over the best peer", dense, "ratio_to_best_peer", 1.0)
            yield from _ratio("gate", "SWA over dense", swa, "ratio_to_dense", 1.5)
            yield from _ratio("goal", "SWA over the best peer", swa, "ratio_to_best_peer", 2.0)
            for name, raw, policy in (("dense", dense, "dense"), ("SWA", swa, bench_cells.SWA)):
                coded = _row(rows, policy, "int8")
                if raw is not None and coded is not None:
                    yield "gate", f"{name}, int8 over raw", coded["tokens_per_s"] / raw["tokens_per_s"], 1.0
                    yield "gate", f"{name}, bytes of int8 over raw", coded["kv_bytes"] / raw["kv_bytes"], None, 0.5
        if size == (4, 4096):
            yield from _ratio("gate", "SWA over dense", swa, "ratio_to_dense", 1.6)
    if r["suite"] == "prefill" and size[1] == 1024:
        yield from _ratio("gate", "dense over the best peer", dense, "ratio_to_best_peer", 1.0)
    if r["suite"] == "perplexity" and r.get("n", 0) >= LONG_TEXT_TOKENS:
        for name, row, most in (("dense", dense, 60.0), ("SWA", swa, 180.0)):
            if row is not None:
                yield "goal", f"{name}, seconds", row["score_s"], None, most


def _always(rows: Sequence[dict]) -> Iterator[tuple]:
    ours = [r for r in rows if r["system"] == bench_cells.OURS]
    if ours:
        yield "gate", "programs compiled while timed", float(sum(r["compiles"] for r in ours)), None, 0.0
        if ours[0]["suite"] != "perplexity":
            yield "goal", "least share of the limit", min(r["limit_frac"] for r in ours), 0.6
    dense = _row(rows, "dense")
    if dense is not None and dense.get("agrees") is not None:
        yield "gate", "dense agrees with the peers", _agreement(rows, dense), 1.0


def _agreement(rows: Sequence[dict], dense: dict) -> float:
    peers = [r["agrees"] for r in rows if r["system"] != bench_cells.OURS and r.get("agrees") is not None]
    return min([dense["agrees"], *peers])


def _row(rows: Sequence[dict], policy: str, codec: str = "raw") -> dict | None:
    """Our row of a policy and a codec that has a number; under perplexity, of the protocol `decode`."""
    for r in rows:
        mine = r["system"] == bench_cells.OURS and (r["policy"], r["codec"]) == (policy, codec)
        if mine and r["tokens_per_s"] and r.get("protocol", "decode") == "decode":
            return r
    return None


def _ratio(kind: str, what: str, row: dict | None, name: str, least: float) -> Iterator[tuple]:
    if row is not None and row[name] is not None:
        yield kind, what, row[name], least
