"""Placed runs of policies that select.

Rows that a working set wants and the device does not have are *pending* after a step. They are
loaded or recomputed before the next step (lag 0), or while it runs, without them (lag 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from alisa_jax.engine.offload.run import PlacedRun
from alisa_jax.engine.offload.tokens import Columns
from alisa_jax.kv.buckets import bucket
from alisa_jax.kv.state import tree_bytes
from alisa_jax.placement.plan import ALL, PAGE_TOKENS, Plan, Positions, Rows


class Requests(NamedTuple):
    """n tokens for slots of the away part, in the order of placed layer, sequence and position."""

    layer: np.ndarray  # [n] int32
    sequence: np.ndarray  # [n] int32, of the away part
    pos: np.ndarray  # [n] int32
    slots: np.ndarray  # [n, P] int32, -1 for a selection head that does not hold the token

    def where(self, chosen: np.ndarray) -> Requests:
        """Those where `chosen` [n] is true."""
        return Requests(*(x[chosen] for x in self))

    def by_key(self, first: int) -> Positions:
        """{(layer, sequence): positions}; sequence 0 of the away part is `first` of the batch."""
        key = np.stack([self.layer, self.sequence], axis=1)
        cuts = np.flatnonzero((np.diff(key, axis=0) != 0).any(axis=1)) + 1
        runs = [run for run in np.split(self.pos, cuts) if len(run)]
        starts = np.concatenate([[0], cuts])
        return {
            (int(self.layer[i]), first + int(self.sequence[i])): tuple(run.tolist())
            for i, run in zip(starts, runs)
        }


def requests(pos: np.ndarray, slot: np.ndarray) -> Requests:
    """Tokens `pos` [L, B, P, E] (-1: none) in slots `slot` of their selection head, as one list."""
    layer, sequence, head, e = np.nonzero(pos >= 0)
    found = pos[layer, sequence, head, e]
    order = np.lexsort((found, sequence, layer))
    key = np.stack([layer, sequence, found], axis=1)[order].astype(np.int32)
    new = np.ones(len(key), bool)
    new[1:] = (np.diff(key, axis=0) != 0).any(axis=1)
    slots = np.full((int(new.sum()), pos.shape[2]), -1, np.int32)
    slots[np.cumsum(new) - 1, head[order]] = slot[layer, sequence, head, e][order]
    return Requests(*key[new].T, slots)


def rounds(rows: Requests, pages: int, gather: bool) -> Iterable[Requests]:
    """`rows` in pieces that staging has room for.

    A piece is `pages` pages of single rows, or, without `gather`, all rows of `pages` whole pages:
    a page that lay in two pieces would travel twice, and its plan says once.
    """
    page = np.stack([rows.layer, rows.sequence, rows.pos // PAGE_TOKENS], axis=1)
    new = (np.diff(page, axis=0) != 0).any(axis=1)
    place = (
        np.arange(len(rows.pos)) // PAGE_TOKENS
        if gather
        else np.concatenate([[0], np.cumsum(new)])[: len(rows.pos)]
    )
    for i in range(0, int(place.max(initial=-1)) + 1, pages):
        yield rows.where((place >= i) & (place < i + pages))


NOTHING = Requests(*(np.zeros(0, np.int32) for _ in range(3)), np.zeros((0, 1), np.int32))


class RowRun(PlacedRun):
    """A placed run of layers that select: single rows are loaded or recomputed when wanted."""

    layout_of_pages = "tokens"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lag = getattr(self.controller, "lag", 0)
        self.pending = NOTHING

    def advance(self) -> Columns:
        now, quiet = self.made, self.quiet_until(self.made)
        away = any(span.host for span in self.spans)
        asks = self.controller.reads_wanted and away
        if self.lag and away:
            return self._step_behind(now)
        if quiet == now or asks or self._waits():
            self.settle(now)
            away = any(span.host for span in self.spans)
            asks = self.controller.reads_wanted and away
        n = 1 if asks or (self.lag and away) else max(1, self.quiet_until(now + 1) - now)
        columns = self._chunk(n)
        self._read_due(self.waiting)
        return columns

    def settle(self, now: int) -> None:
        """Obey the plan of a step until no slot waits for a row, and no exchange has broken off."""
        asks = self.controller.reads_wanted and any(span.host for span in self.spans)
        more = self._more()
        held = self._held() if asks else None
        self._bring(self._ask(now, held), held)
        while more:
            self.kv, self.waiting = self.programs.resume(self.kv)
            more = self._read_due(self.waiting)
            if len(self.pending.pos):
                self._bring(self._ask(now, self.pending if asks else None), None)

    def _more(self) -> bool:
        return False if self.waiting is None else bool(self.waiting.more)

    def _waits(self) -> bool:
        return bool(len(self.pending.pos)) or self._more()

    def _step_behind(self, now: int) -> Columns:
        """lag 1: rows pending since the last step arrive during this one, for the next."""
        held = self._held() if self.controller.reads_wanted else None
        self.pending, before = NOTHING, self.waiting
        plan = self._ask(now, held)
        columns = self._chunk(1)
        if held is not None:
            self._bring(plan, held)
        elif before is not None:
            self._read_due(before)
            if len(self.pending.pos):
                self._bring(self._ask(now, None), None)
        return columns

    def moved_host(self) -> None:
        host = jnp.asarray([span.host for span in self.spans[self.whole :]], jnp.int32)
        self.kv = self.programs.move_host(self.kv, host)

    def _ask(self, now: int, held: Requests | None) -> Plan:
        wanted = {} if held is None else held.by_key(self.whole)
        return self.decide(now, wanted, self.pending.by_key(self.whole))

    def _held(self) -> Requests:
        """What the next query attends besides its own token."""
        pos = np.asarray(self.programs.held(self.kv))
        return requests(pos, np.broadcast_to(np.arange(pos.shape[3], dtype=np.int32), pos.shape))

    def _read_due(self, waiting) -> bool:
        """Note what is pending; returns whether an exchange broke off."""
        self.pending = NOTHING
        if waiting is None:
            return False
        pos = np.asarray(waiting.pos)
        if (pos >= 0).any():
            self.pending = requests(pos, np.asarray(waiting.slot))
        return bool(waiting.more)

    def _bring(self, plan: Plan, held: Requests | None) -> None:
        """Load and recompute what `plan` says, into the slots that wait for it or hold it."""
        asked = self.pending if held is None else held
        S = max(self.setting.final_tokens)
        loaded = np.zeros((self.setting.layers, self.setting.batch - self.whole, S), bool)
        for row in plan.load:
            layers = slice(None) if row.layer == ALL else slice(row.layer, row.layer + 1)
            b = row.sequence - self.whole
            loaded[
                layers,
                slice(None) if row.sequence == ALL else slice(b, b + 1),
                row.start : row.stop,
            ] = True
        dropped = np.asarray([span.dropped for span in self.spans[self.whole :]], np.int32)
        load = loaded[asked.layer, asked.sequence, asked.pos]
        again = (asked.pos < dropped[asked.sequence]) & bool(plan.recompute)
        at = self.pending.layer, self.pending.sequence, self.pending.pos
        if not (loaded[at] | (self.pending.pos < dropped[self.pending.sequence])).all():
            raise RuntimeError("the plan leaves rows out that are waited for")
        for rows in rounds(
            asked.where(load), self.setting.layers * loaded.shape[1], self.setting.gather
        ):
            self._load(rows)
        if again.any():
            self._recompute(asked.where(again), plan.recompute)

    def _load(self, rows: Requests) -> None:
        for leaves, index in self.mover.fetch(rows.layer, rows.sequence, rows.pos):
            size = tree_bytes(leaves)
            self._hold(size)
            layer = rows_at(rows.layer, index)
            sequence = rows_at(rows.sequence, index)
            pos = rows_at(rows.pos, index)
            slot = rows_at(rows.slots, index)
            self.kv = self.programs.deliver(
                not self.lag, self.kv, leaves, layer, sequence, pos, slot
            )
            del leaves
            self.meter.hold("device", -size)

    def _recompute(self, rows: Requests, prefixes: Iterable[Rows]) -> None:
        stops = {b: stop for b, (_, stop) in self._ranges(prefixes).items()}
        sequences = np.unique(rows.sequence)
        L, P = self.setting.layers, rows.slots.shape[1]
        which = np.searchsorted(sequences, rows.sequence)
        place = _ranks(rows.layer * len(sequences) + which)
        away = self.setting.batch - self.whole
        # rounded up, so that few shapes are compiled
        n, E = min(away, _round(len(sequences), 4)), max(16, _round(int(place.max()) + 1, 2))
        T = bucket(max(stops[b] for b in sequences.tolist()))
        tokens, length = np.zeros((n, T), np.int32), np.ones(n, np.int32)
        pos, slot = np.full((L, n, E), -1, np.int32), np.full((L, n, E, P), -1, np.int32)
        for i, b in enumerate(sequences.tolist()):
            length[i] = stops[b]
            tokens[i, : stops[b]] = self.prompts[self.whole + b, : stops[b]]
        pos[rows.layer, which, place] = rows.pos
        slot[rows.layer, which, place] = rows.slots
        named = np.pad(sequences.astype(np.int32), (0, n - len(sequences)), constant_values=-1)
        self.kv = self.programs.recompute(
            not self.lag, self.params, self.kv, tokens, length, named, pos, slot
        )
        self.meter.recomputed_rows += len(rows.pos)
        self.meter.recomputed_tokens += int(length[: len(sequences)].sum())


def rows_at(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`x[index]` as int32, and -1 where `index` [R] is below 0."""
    none = np.expand_dims(index < 0, tuple(range(1, x.ndim)))
    return np.where(none, -1, x[index]).astype(np.int32)


def _ranks(key: np.ndarray) -> np.ndarray:
    """How many earlier entries of ascending `key` [n] are equal to each."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(key)) + 1])
    return np.arange(len(key)) - np.repeat(starts, np.diff(np.append(starts, len(key))))


def _round(number: int, base: int) -> int:
    """The next power of `base`."""
    power = 1
    while power < number:
        power *= base
    return power
