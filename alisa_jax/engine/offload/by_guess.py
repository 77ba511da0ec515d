"""Placed runs of policies whose query chooses: the rows of the next layer come by a guess of it.

Double Sparsity's offloaded variant (arXiv 2408.07092). Keys and values of all tokens are on the
host, what the policy chooses by on the device. While a layer runs, its input goes through the next
layer's norm and query projection too: inputs of neighbouring layers are much alike. What this
guess of the query chooses of the next layer is fetched meanwhile, and attended there by the true
query. The first layer's query is known, and so is each one's where a plan has no layer ahead.

Differences from the authors' code: it chooses by the true query in the layers 0, 1 and the last as
well, here `dense_layers` (2) and the first; its device keeps no newest tokens, here they stay until
their page is full, or as long as the controller keeps them, and are chosen like any other.

While nothing is off the device, many steps run inside one program, by their true queries.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.attention.parts import Leaves
from alisa_jax.engine.offload.run import PlacedRun
from alisa_jax.engine.offload.tokens import Columns
from alisa_jax.kv.cache import KVState
from alisa_jax.placement.plan import ALL, POSITION_BYTES, Plan, Positions, Rows


class Fetched(NamedTuple):
    """What a layer is to attend."""

    pos: jax.Array  # [B, K, M] int32, of the away part
    leaves: Leaves  # [B, K, M, *]: its rows, where they were not on the device
    bytes: int


class GuessRun(PlacedRun):
    """A placed run of layers that choose by their query, with the next layers' rows in flight.

    recall: of each layer that was guessed, [2]: the chosen tokens that the true query chooses too,
    and all of them, both without the query's own; kept where `Placement.counts_recall` is set.
    """

    layout_of_pages = "tokens"

    def advance(self) -> Columns:
        now, quiet = self.made, self.quiet_until(self.made)
        away = any(span.host for span in self.spans)
        if not away and quiet > now:
            return self._chunk(quiet - now)
        x = self._through(self.decide(now, {}, {}))
        return self._first(self.programs.unembed(self.params, x))

    def moved_host(self) -> None:
        host = jnp.asarray([span.host for span in self.spans[self.whole :]], jnp.int32)
        self.kv = self.programs.move_host(self.kv, host)

    def _through(self, plan: Plan) -> jax.Array:
        """One step, layer by layer: x [B, 1, D] behind the last."""
        programs = self.programs
        blocks = self.params["blocks"]
        at = jnp.asarray(self._lengths())[:, None]
        x = programs.embed(self.params, self.token[:, None], at)
        kv = list(self.kv.layers)
        self.kv = KVState(())  # the layers' states are donated one by one
        flight: dict[int, Fetched] = {}
        clipped = []
        shares = []
        for layer in range(len(kv)):
            first = layer + plan.ahead if layer else 0
            due = range(first, min(layer + plan.ahead + 1, len(kv)))
            asked = {
                i: programs.choose(blocks[i], x, kv[i][-1])
                for i in due
                if i in self.placement.placed
            }
            guessed = layer in flight
            if layer in asked:
                flight[layer] = self._fetch(layer, asked.pop(layer))
            mine = flight.pop(layer, None)
            if guessed and self.placement.counts_recall:
                self._count(layer, mine.pos, programs.choose(blocks[layer], x, kv[layer][-1]))
            given = (None, ()) if mine is None else (mine.pos, mine.leaves)
            x, kv[layer], *told = programs.chosen_layer(blocks[layer], x, kv[layer], *given)
            for i, pos in asked.items():
                flight[i] = self._fetch(i, pos)
            clipped.append(told[0])
            shares.append(told[1])
            jax.block_until_ready((x, kv[layer]))
            if mine is not None:
                self.meter.hold("device", -mine.bytes)
                self.mover.release(self.placement.placed.index(layer))
            del mine, given
        self.kv = KVState(tuple(kv))
        self.new.streamed(self.made, clipped, shares)
        return x

    def _fetch(self, layer: int, chosen: jax.Array) -> Fetched:
        """Ask the controller for the `chosen` tokens [B, K, M], and send what it says."""
        i = self.placement.placed.index(layer)
        setting = self.setting
        pos = np.asarray(chosen)
        wanted = self._wanted(i, pos)
        plan = self.decide(self.made, wanted, wanted)
        size = int(pos[:, 0].size * (setting.token_bytes + POSITION_BYTES * setting.heads))
        self._hold(size)
        whole_page = 0 if setting.gather else int(setting.page_bytes)
        self._hold(whole_page)
        leaves = self.mover.gather(i, self._loaded(i, pos, plan.load))
        self.meter.hold("device", -whole_page)
        return Fetched(chosen, leaves, size)

    def _wanted(self, i: int, pos: np.ndarray) -> Positions:
        """`pos` [B, K, M] without the queries' own tokens, as a controller reads it."""
        lengths = self._lengths()[self.whole :]
        return {
            (i, self.whole + b, head): tuple(row[(row >= 0) & (row < lengths[b])].tolist())
            for b, heads in enumerate(pos)
            for head, row in enumerate(heads)
        }

    def _loaded(self, i: int, pos: np.ndarray, load: tuple[Rows, ...]) -> np.ndarray:
        """`pos` [B, K, M] with -1 for what is on the device."""
        listed = np.zeros((*pos.shape[:2], max(self.setting.final_tokens) + 1), bool)
        for row in load:
            if row.layer in (ALL, i):
                b = slice(None) if row.sequence == ALL else row.sequence - self.whole
                listed[b, slice(None) if row.head == ALL else row.head, row.start : row.stop] = True
        host = np.array([span.host for span in self.spans[self.whole :]])[:, None, None]
        away = (pos >= 0) & (pos < host)
        if (away & ~np.take_along_axis(listed, pos, axis=2)).any():
            raise RuntimeError("the plan leaves rows out that are waited for")
        return np.where(away, pos, -1)

    def _count(self, layer: int, guess: jax.Array, true: jax.Array) -> None:
        """Note how many of the tokens of a guess [B, K, M] the true query chooses."""
        own = self._lengths()[self.whole :]
        counts = self.recall.setdefault(layer, np.zeros(2, np.int64))
        for b, pairs in enumerate(zip(np.asarray(guess), np.asarray(true), strict=True)):
            for some, others in zip(*pairs, strict=True):
                some = some[(some >= 0) & (some != own[b])]
                counts += np.isin(some, others).sum(), len(some)
