"""Placed runs of policies that select.

Rows that a working set wants and the device does not have are *due* after a step. They are loaded or recomputed before the
next step (lag 0), or while it runs, without them (lag 1).
"""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from alisa_jax.engine.runs import Base
from alisa_jax.kv.buckets import bucket
from alisa_jax.kv.state import tree_bytes
from alisa_jax.placement.plan import ALL, PAGE_TOKENS, Plan, Rows

Key = tuple[int, int, int]  # placed layer, sequence of the away part, position


class Selecting(Base):
    """See above."""

    layout_of_pages = "tokens"

    def __init__(self, *args):
        super().__init__(*args)
        self.lag = getattr(self.controller, "lag", 0)
        self.due: dict[Key, np.ndarray] = {}  # the slots [P] that wait for a row
        self.slots = self.due  # of those that the plan is about
        self.waiting = None

    def step(self) -> None:
        now, quiet = self.made, self.quiet_until(self.made)
        away = any(span.host for span in self.spans)
        asks = self.controller.reads_wanted and away
        if self.lag and away:
            return self._step_behind(now)
        more = False if self.waiting is None else bool(self.waiting.more)
        if quiet == now or asks or self.due or more:
            plan = self.decide(now, *self._wishes(asks))
            self._bring(plan)
            while more:
                self.kv, self.waiting = self.programs.resume(self.kv)
                more = self._read_due()
                if self.due:
                    self._bring(self.decide(now, *self._wishes(False)))
            away = any(span.host for span in self.spans)
            asks = self.controller.reads_wanted and away
        n = 1 if asks or (self.lag and away) else max(1, self.quiet_until(now + 1) - now)
        out, self.waiting = self._chunk(n)
        taken = int(out.steps)
        self._read_due()
        self._take(self._columns(out, taken))
        return None

    def _step_behind(self, now: int) -> None:
        """lag 1: rows that became due at the last step come while this one runs, and count from the next one on."""
        asks = self.controller.reads_wanted
        wishes = self._wishes(True) if asks else ({}, {})
        plan = self.decide(now, *wishes)
        before = self.waiting
        out, self.waiting = self._chunk(1)
        if asks:
            self._bring(plan)
        elif before is not None:
            self._read_due(before)
            if self.due:
                self._bring(self.decide(now, *self._wishes(False)))
        self._take(self._columns(out, 1))

    def moved_host(self) -> None:
        host = jnp.asarray([span.host for span in self.spans[self.whole :]], jnp.int32)
        self.kv = self.programs.move_host(self.kv, host)

    def _read_due(self, waiting=None) -> bool:
        """Note what is due; returns whether an exchange broke off."""
        self.due, waiting = {}, self.waiting if waiting is None else waiting
        if waiting is None:
            return False
        pos, slot = np.asarray(waiting.pos), np.asarray(waiting.slot)
        P = pos.shape[2]
        for layer, b, head, e in np.argwhere(pos >= 0).tolist():
            slots = self.due.setdefault((layer, b, int(pos[layer, b, head, e])), np.full(P, -1, np.int32))
            slots[head] = slot[layer, b, head, e]
        return bool(waiting.more)

    def _wishes(self, everything: bool) -> tuple[dict | None, dict]:
        """(wanted, entering) of a view: positions by (layer, sequence)."""
        entering: dict[tuple[int, int], list[int]] = {}
        for layer, b, p in sorted(self.due):
            entering.setdefault((layer, self.whole + b), []).append(p)
        wanted = None
        if everything:
            self.slots = _by_position(np.asarray(self.programs.held(self.kv)))
            wanted = {}
            for layer, b, p in sorted(self.slots):
                wanted.setdefault((layer, self.whole + b), []).append(p)
            wanted = {key: tuple(value) for key, value in wanted.items()}
        else:
            self.slots = self.due
        return wanted or {}, {key: tuple(value) for key, value in entering.items()}

    def _bring(self, plan: Plan) -> None:
        """Load and recompute what `plan` says, into the slots that wait for it."""
        rows = sorted(
            {
                (layer, b - self.whole, p)
                for row in plan.load
                for layer in (range(self.setting.layers) if row.layer == ALL else (row.layer,))
                for b in (range(self.whole, self.setting.batch) if row.sequence == ALL else (row.sequence,))
                for p in range(row.start, row.stop)
                if (layer, b - self.whole, p) in self.slots
            }
        )
        lost = [key for key in self.slots if key[2] < self.spans[self.whole + key[1]].dropped] if plan.recompute else []
        missing = set(self.due) - set(rows) - set(lost)
        if missing:
            raise RuntimeError(
                f"the plan leaves rows out that are waited for: (layer, sequence, position) {min(missing)}"
            )
        room = self.setting.layers * (self.setting.batch - self.whole) * PAGE_TOKENS
        for start in range(0, len(rows), room):
            self._load(rows[start : start + room])
        if lost:
            self._recompute(lost, plan.recompute)

    def _load(self, rows: list[tuple[int, int, int]]) -> None:
        for leaves, index in self.mover.fetch(rows):
            size = tree_bytes(leaves)
            self._hold(size)
            chosen = [rows[i] if i >= 0 else (-1, -1, -1) for i in index.tolist()]
            layer, sequence, pos = (jnp.asarray(column, jnp.int32) for column in zip(*chosen, strict=True))
            none = np.full_like(self.slots[rows[0]], -1)
            slot = jnp.asarray(np.stack([self.slots[key] if key[0] >= 0 else none for key in chosen]))
            self.kv = self.programs.deliver(not self.lag, self.kv, leaves, layer, sequence, pos, slot)
            del leaves
            self.meter.hold("device", -size)

    def _recompute(self, lost: list[tuple[int, int, int]], prefixes: Iterable[Rows]) -> None:
        stops = {b: stop for b, (_, stop) in self._ranges(prefixes).items()}
        sequences = sorted({b for _, b, _ in lost})
        L, P = self.setting.layers, len(self.slots[lost[0]])
        by: dict[tuple[int, int], list[int]] = {}
        for layer, b, p in sorted(lost):
            by.setdefault((layer, sequences.index(b)), []).append(p)
        n, E = _round(len(sequences)), _round(max(map(len, by.values())))
        T = bucket(max(stops[b] for b in sequences))
        tokens, length = np.zeros((n, T), np.int32), np.ones(n, np.int32)
        pos, slot = np.full((L, n, E), -1, np.int32), np.full((L, n, E, P), -1, np.int32)
        for i, b in enumerate(sequences):
            length[i] = stops[b]
            tokens[i, : stops[b]] = self.tokens[self.whole + b, : stops[b]]
        for (layer, i), positions in by.items():
            pos[layer, i, : len(positions)] = positions
            for e, p in enumerate(positions):
                slot[layer, i, e] = self.slots[layer, sequences[i], p]
        which = np.pad(np.asarray(sequences, np.int32), (0, n - len(sequences)), constant_values=-1)
        arrays = map(jnp.asarray, (tokens, length, which, pos, slot))
        self.kv = self.programs.recompute(not self.lag, self.params, self.kv, *arrays)
        self.meter.recomputed_rows += len(lost)
        self.meter.recomputed_tokens += int(length[: len(sequences)].sum())


def _by_position(held: np.ndarray) -> dict[Key, np.ndarray]:
    """The slots [P] of each token of `held` [L, B, P, M], -1 for a head that does not hold it."""
    found: dict[Key, np.ndarray] = {}
    for layer, b, head, slot in np.argwhere(held >= 0).tolist():
        slots = found.setdefault((layer, b, int(held[layer, b, head, slot])), np.full(held.shape[2], -1, np.int32))
        slots[head] = slot
    return found


def _round(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
