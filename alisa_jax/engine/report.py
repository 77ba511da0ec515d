"""What the placement of a call's cache cost: bytes that were held, rows that moved, phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PlacementReport:
    """In `Generated.placement` and `Scores.placement`.

    Bytes are of K, V and all else that a cache keeps: working sets, statistics, staging. A row is a
    token of one layer and sequence. While a resident cache
    grows, the layer that grows counts twice.
    """

    load_bytes: int  # host to device
    store_bytes: int  # device to host
    loaded_rows: int
    stored_rows: int
    recomputed_rows: int  # rows that were computed anew and used
    recomputed_tokens: int  # tokens of all prefixes that this took
    device_peak_bytes: int
    host_peak_bytes: int
    p1: int  # the first step that keeps something off the device; the new tokens where none does
    p2: int  # the first step that has deleted something
    groups: int  # runs that the batch was split into
    effective_batch: int  # sequences of the largest
    decisions: int  # times that the controller was asked
    decide_s: float  # seconds of these, and of looking ahead for the next move
    notes: tuple[str, ...]
    host_reads: str  # "rows" | "pages" | "" where nothing is offloaded
    # of the tokens that guessed queries chose, the share that the true ones choose too: by layer of
    # those that were guessed, and their mean; empty and None unless `Placement.counts_recall`
    guess_recall_per_layer: tuple[float, ...] = ()
    guess_recall: float | None = None


def report(runs: Sequence) -> PlacementReport:
    """Of the runs of one call, which share a meter."""
    meter = runs[0].meter
    recall = {}
    for run in runs:
        for layer, counts in run.recall.items():
            recall[layer] = recall.get(layer, 0) + counts
    recalls = tuple(float(recall[layer][0] / recall[layer][1]) for layer in sorted(recall))
    return PlacementReport(
        load_bytes=meter.load_bytes,
        store_bytes=meter.store_bytes,
        loaded_rows=meter.loaded_rows,
        stored_rows=meter.stored_rows,
        recomputed_rows=meter.recomputed_rows,
        recomputed_tokens=meter.recomputed_tokens,
        device_peak_bytes=meter.peak["device"],
        host_peak_bytes=meter.peak["host"],
        p1=min(run.p1 for run in runs),
        p2=min(run.p2 for run in runs),
        groups=len(runs),
        effective_batch=max(run.batch for run in runs),
        decisions=sum(run.decisions for run in runs),
        decide_s=sum(run.decide_s for run in runs),
        notes=tuple(dict.fromkeys(note for run in runs for note in run.notes)),
        host_reads=runs[0].host_reads if meter.stored_rows else "",
        guess_recall_per_layer=recalls,
        guess_recall=sum(recalls) / len(recalls) if recalls else None,
    )
