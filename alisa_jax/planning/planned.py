"""`Planned`: what `plan` answers, as fields, as a record and as a table."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alisa_jax import records
from alisa_jax.placement.bytes_text import as_text
from alisa_jax.placement.modelled.simulate import Simulated

_NEEDS = (
    "weight",
    "activation",
    "kv",
    "working_set",
    "statistics",
    "device_kv",
    "host_kv",
    "least_device_kv",
)
_SECONDS = ("prefill_s", "compute_s", "load_s", "store_s", "recompute_s")
_HEAD = (
    "controller",
    "tokens/s",
    "prefill s",
    "compute s",
    "load s",
    "store s",
    "recompute s",
    "device",
    "host",
)


@dataclass(frozen=True, eq=False)
class Planned:
    """What a run needs and would reach; all numbers are modelled. `print` shows the table.

    cell: what was asked. values: what was found, with units in the keys: bytes, phases, and
    `NAME_tokens_per_s` and more of each controller, "OOM" for one that refuses. runs: each
    controller's run with its seconds, or the sentence with which it refuses. wall_s: seconds that
    planning took.
    """

    cell: Mapping[str, Any]
    values: Mapping[str, Any] = field(repr=False)
    runs: Mapping[str, Simulated | str] = field(repr=False)
    wall_s: float

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The flat record that `eval.plan` writes: cell, values, method and environment."""
        return records.make_record(self.cell, self.values, measured=False, wall_s=self.wall_s)

    def __str__(self) -> str:
        values, n = self.values, self.cell["new_tokens"]
        needs = ", ".join(
            f"{name.replace('_', ' ')} {as_text(values[f'{name}_bytes'])}" for name in _NEEDS
        )
        phases = "everything stays on the device"
        if values["p1"] < n:
            phases = f"p1 {values['p1']}, p2 {values['p2']} of {n}, "
            phases += f"alpha {values['alpha']:.2f}, beta {values['beta']:.2f}"
        if values["search_excess_tokens"]:
            excess = f"{values['search_excess_tokens']:.0f} tokens"
            phases += f" (budgets are exceeded by {excess} summed over the steps)"
        wins = values["offload_wins_from_batch"]
        return "\n".join(
            [
                f"{self.cell['model']} on {self.cell['hardware']}, batch {self.cell['batch']}: "
                "all numbers are modelled",
                needs,
                f"dense KV {'fits' if values['fits'] else 'does not fit'} on the device",
                f"searched phases: {phases}",
                *_aligned([_HEAD, *(_line(name, run) for name, run in self.runs.items())]),
                "offloaded sparsity does not win at any batch tried"
                if wins is None
                else f"offloaded sparsity wins from batch {wins}",
                *self._notes(),
            ]
        )

    def _notes(self) -> list[str]:
        """What is wrong with the budget, what the controllers say, and why some refuse."""
        values = self.values
        left = values["device_bytes"] - values["weight_bytes"] - values["activation_bytes"]
        over = (
            "the device budget is more than weights and activations leave of the device, "
            f"{as_text(max(left, 0.0))}"
        )
        done = [run for run in self.runs.values() if not isinstance(run, str)]
        refused = {name: run for name, run in self.runs.items() if isinstance(run, str)}
        notes = sorted({note for run in done for note in run.notes})
        notes = [over, *notes] if values["device_kv_bytes"] > left else notes
        return notes + [f"{name.replace('_', ' ')}: {why}" for name, why in refused.items()]


def _line(name: str, run: Simulated | str) -> tuple[str, ...]:
    label = name.replace("_", " ")
    if isinstance(run, str):
        return (label, "OOM", *["-"] * (len(_HEAD) - 2))
    seconds = (f"{getattr(run, part):.2f}" for part in _SECONDS)
    peaks = as_text(run.device_peak_bytes), as_text(run.host_peak_bytes)
    return (label, f"{run.tokens_per_s:.1f}", *seconds, *peaks)


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose first is the head: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *others = lines
    rows = [head, tuple("-" * width for width in widths), *others]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
