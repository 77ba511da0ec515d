"""Placed runs of policies that select and at times attend everything (`refresh_every`).

A step at which a sequence that is away attends everything goes layer by layer: rows come from the
host into a store of all of its tokens, which is gone when the next layer runs. All other steps are
those of `RowRun`; its rings, which do not hold what a refresh attends, know none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.attention.parts import Leaves
from alisa_jax.engine.offload.by_rows import Requests, RowRun, rounds, rows_at
from alisa_jax.engine.offload.tokens import Columns
from alisa_jax.kv.cache import KVState
from alisa_jax.kv.state import tree_bytes
from alisa_jax.placement.plan import ALL


class RefreshRun(RowRun):
    """A placed run of layers that select, and refresh."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        setting = self.setting
        policy = self.placement.engine.layers[self.placement.placed[0]].policy
        steps = np.arange(setting.new_tokens)[:, None]
        cached = np.asarray(setting.prompt_tokens[self.whole :], np.int32)[None] + steps - 1
        found = policy.refresh(jnp.asarray(cached.ravel(), jnp.int32))
        # [new_tokens, B] bool: the away sequences that attend everything at each step
        self.due = np.asarray(found).reshape(cached.shape)

    def advance(self) -> Columns:
        if self.due[self.made].any():
            return self._refresh(self.made)
        return super().advance()

    def _chunk(self, n: int) -> Columns:
        ahead = np.flatnonzero(self.due[self.made :].any(axis=1))
        return super()._chunk(min(n, int(ahead[0])) if len(ahead) else n)

    def _refresh(self, now: int) -> Columns:
        """One step, layer by layer."""
        programs = self.programs
        placement = self.placement
        if self.lag:
            self._read_due(self.waiting)
        self.settle(now)
        rows = self._rows(now)
        lengths = self._lengths()
        x = programs.embed(self.params, self.token[:, None], jnp.asarray(lengths)[:, None])
        kv = list(self.kv.layers)
        self.kv = KVState(())  # the layers' states are donated one by one
        outs = []
        taps = []
        for layer, spec in enumerate(placement.engine.layers):
            full = None
            if layer in placement.placed:
                full = self._full(kv[layer][-1], placement.placed.index(layer), *rows)
            block = self.params["blocks"][layer]
            x, kv[layer], out, tap = programs.refresh_layer(spec, block, x, kv[layer], full)
            outs.append(out)
            taps.append(tap)
            jax.block_until_ready((x, kv[layer]))
            self.meter.hold("device", -tree_bytes(full))
        self.kv, self.waiting = programs.exchange(tuple(kv), tuple(outs))
        shares = [np.asarray(attended) / (lengths + 1) for attended, _ in taps]
        self.new.streamed(self.made, [clipped for _, clipped in taps], shares)
        columns = self._first(programs.unembed(self.params, x))
        self._read_due(self.waiting)
        return columns

    def _rows(self, now: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences [n], of the away part, and positions [n] of the rows that a plan has loaded."""
        lengths = self._lengths()
        due = np.flatnonzero(self.due[now])
        need = {(ALL, self.whole + b): tuple(range(lengths[self.whole + b])) for b in due.tolist()}
        plan = self.decide(now, need, need)
        ranges = self._ranges(plan.load)
        stops = {b: ranges.get(b, (0, 0))[1] for b in due.tolist()}
        if any(stop != self.spans[self.whole + b].host for b, stop in stops.items()):
            raise RuntimeError("the plan leaves rows out that a refresh attends")
        sequence = np.repeat(due, [stops[b] for b in due.tolist()])
        pos = np.concatenate([np.arange(stop) for stop in stops.values()])
        return sequence.astype(np.int32), pos.astype(np.int32)

    def _full(self, state, i: int, sequence: np.ndarray, pos: np.ndarray) -> Leaves:
        """All rows of the away part of the i-th placed layer that its next step may attend."""
        full = self.programs.unrolled(state)
        self._hold(tree_bytes(full))
        layer = np.full(len(pos), i, np.int32)
        asked = Requests(layer, sequence, pos, np.zeros((len(pos), 1), np.int32))
        most = self.setting.layers * (self.setting.batch - self.whole)
        for some in rounds(asked, most, self.setting.gather):
            for leaves, index in self.mover.fetch(some.layer, some.sequence, some.pos):
                size = tree_bytes(leaves)
                self._hold(size)
                places = rows_at(some.sequence, index), rows_at(some.pos, index)
                full = jax.block_until_ready(self.programs.spread(full, leaves, *places))
                del leaves
                self.meter.hold("device", -size)
        return full
