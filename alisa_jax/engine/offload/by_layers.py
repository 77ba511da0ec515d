"""Placed runs of dense layers: each step streams what is off the device, layer by layer.

A layer attends its ring, what is streamed from the host, and, where tokens were deleted, a prefix
that is recomputed beside the step; `merge` joins the three. `plan.ahead` layers are in flight.
While nothing is off the device, many steps run inside one program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.engine.offload.run import PlacedRun, page_range
from alisa_jax.engine.offload.tokens import Columns
from alisa_jax.kv.buckets import bucket
from alisa_jax.kv.cache import KVState
from alisa_jax.kv.state import tree_bytes
from alisa_jax.placement.plan import PAGE_TOKENS, Plan, pages, stream_pages


class LayerRun(PlacedRun):
    """A placed run of layers that attend everything: host pages are streamed at every step."""

    layout_of_pages = "slots"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        members = [b for group in self.groups for b in group]
        self.order = tuple(members.index(b) for b in range(len(members)))

    def advance(self) -> Columns:
        now, quiet = self.made, self.quiet_until(self.made)
        away = any(span.host for span in self.spans)
        if not away and quiet > now:
            return self._chunk(quiet - now)
        x = self._streamed(self.decide(now, None, None))
        return self._first(self.programs.unembed(self.params, x))

    def _streamed(self, plan: Plan) -> jax.Array:
        """One step, layer by layer: x [B, 1, D] behind the last."""
        programs, L = self.programs, self.setting.layers
        spans = self.spans[self.whole :]
        host = jnp.asarray([span.host for span in spans], jnp.int32)
        dropped = jnp.asarray([span.dropped for span in spans], jnp.int32)
        x = programs.embed(self.params, self.token[:, None], jnp.asarray(self._lengths())[:, None])
        prefixes = {b: stop for b, (_, stop) in self._ranges(plan.recompute).items()}
        prefix_x, prefix_n = self._prefix(prefixes) if prefixes else (None, None)
        ranges = {b: page_range(r) for b, r in self._ranges(plan.load).items()}
        flight = [self._stream(layer, ranges) for layer in range(min(plan.ahead + 1, L))]
        kv = list(self.kv.layers)
        self.kv = KVState(())  # the layers' states are donated one by one
        clipped = []
        for layer in range(L):
            block, states = self.params["blocks"][layer], kv[layer]
            prefix = ()
            if prefixes:
                prefix_x, prefix = programs.prefix_layer(block, prefix_x, prefix_n, states[-1])
                self._hold(tree_bytes(prefix))
            staged, first = flight.pop(0)
            x, kv[layer], some = programs.dense_layer(
                self.order, block, x, states, host, dropped, staged, first, prefix
            )
            clipped.append(some)
            jax.block_until_ready((x, kv[layer]))
            self.meter.hold("device", -tree_bytes((staged, prefix)))
            del staged, prefix, states
            self.mover.release(layer)
            if layer + plan.ahead + 1 < L:
                flight.append(self._stream(layer + plan.ahead + 1, ranges))
        self.kv = KVState(tuple(kv))
        self.meter.recomputed_rows += L * sum(prefixes.values())
        self.meter.recomputed_tokens += sum(prefixes.values())
        self.new.streamed(self.made, clipped)
        return x

    def _stream(self, layer: int, ranges: dict[int, tuple[int, int]]):
        """A layer's host rows: leaves of each group, and the first position of each away sequence.

        Returns ((), zeros) where nothing is streamed.
        """
        found = {
            g: ranges[members[0]] for g, members in enumerate(self.groups) if members[0] in ranges
        }
        first = np.zeros(len(self.order), np.int32)
        if not found:
            return (), jnp.asarray(first)
        most = pages(max(self.setting.final_tokens[self.whole :]))
        room = stream_pages(max(stop - start for start, stop in found.values()), most)
        T = PAGE_TOKENS * room
        staged: dict[int, tuple[jax.Array, ...]] = {}
        for g, (start, stop) in found.items():
            first[list(self.groups[g])] = start * PAGE_TOKENS
            leaves = self.mover.stream(layer, g, start, stop, room)
            self._hold(tree_bytes(leaves))
            if leaves[0].shape[2] < T:
                wide, narrow = self.programs.widen(leaves, T), tree_bytes(leaves)
                self._hold(tree_bytes(wide))
                leaves = jax.block_until_ready(wide)
                self.meter.hold("device", -narrow)
            staged[g] = leaves
        some = next(iter(staged.values()))
        for g in set(range(len(self.groups))) - set(found):
            n = len(self.groups[g])
            staged[g] = tuple(
                jnp.zeros((n, leaf.shape[1], T, *leaf.shape[3:]), leaf.dtype) for leaf in some
            )
            self._hold(tree_bytes(staged[g]))
        return tuple(staged[g] for g in range(len(self.groups))), jnp.asarray(first)

    def _prefix(self, stops: dict[int, int]):
        """Embedded prefixes [B, T, D] of the away sequences, and their lengths."""
        n, T = len(self.order), bucket(max(stops.values()))
        tokens, length = np.zeros((n, T), np.int32), np.ones(n, np.int32)
        for b, stop in stops.items():
            tokens[b, :stop], length[b] = self.prompts[self.whole + b, :stop], stop
        return self.programs.embed(self.params, jnp.asarray(tokens)), jnp.asarray(length)
