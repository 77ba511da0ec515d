"""One placed run, which obeys a controller's plans: what `by_rows` and `by_layers` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax.engine import step
from alisa_jax.engine.offload import settings
from alisa_jax.engine.offload.programs import Cut
from alisa_jax.engine.offload.tokens import Columns, Drawn, Forced
from alisa_jax.kv.cache import KVState
from alisa_jax.kv.state import tree_bytes
from alisa_jax.placement.mover import Meter, Mover
from alisa_jax.placement.plan import ALL, PAGE_TOKENS, Plan, Rows, Setting, Span, View, pages


class PlacedRun:
    """The prompt, the loop, stores and drops of a run under a `Placement`.

    prompts [B, T], length [B]: token ids. new: where the tokens that follow come from; None: from
    the model, greedily. first: which sequence of the batch is the first of this run. read_layer:
    what reads a layer of the prompts, with the arguments and results of `programs.prefill_layer`;
    None for that.
    """

    layout_of_pages = ""

    def __init__(
        self,
        placement,
        setting: Setting,
        meter: Meter,
        prompts: np.ndarray,
        length: np.ndarray,
        new: Drawn | Forced | None = None,
        first: int = 0,
        read_layer: Callable | None = None,
    ):
        self.placement = placement
        self.setting = setting
        self.batch = setting.batch
        self.meter = meter
        self.first = first
        self.new = Drawn(jnp.full((1,), -1, jnp.int32), None) if new is None else new
        self.programs = placement.programs
        self.read_layer = read_layer or self.programs.prefill_layer
        self.limit = setting.new_tokens  # tokens that the step that runs may make in all
        self.controller = placement.controller
        self.params = placement.engine.model.params
        self.prompts = prompts
        self.length = length
        layout = self.controller.layout(setting)
        self.whole = layout.whole
        layers = placement.engine.layers
        self.layouts = [
            settings.layout_of(layout, setting, i in placement.placed) for i in range(len(layers))
        ]
        away = range(setting.batch - self.whole)
        sizes = [setting.prompt_tokens[self.whole + b] for b in away]
        alike = {n: tuple(b for b in away if sizes[b] == n) for n in dict.fromkeys(sizes)}
        self.groups = tuple(alike.values()) if setting.gather else tuple((b,) for b in away)
        self.mover = None
        if len(away):
            self.mover = Mover(self.groups, self.layout_of_pages, placement.host.reads, meter)
        self.host_reads = placement.host.reads if placement.host is not None else ""
        self.spans: tuple[Span, ...] = (Span(),) * setting.batch
        # pages on their way to the host, and their device bytes
        self.behind: list[tuple[list, int]] = []
        self.notes: list[str] = []
        self.recall: dict[int, np.ndarray] = {}  # see `GuessRun`
        self.p1 = self.p2 = setting.new_tokens
        self.decide_s = 0.0
        self.decisions = 0
        self.made = 0
        self.next_move = 0
        self.kv, self.token = KVState(()), None
        self.done = jnp.zeros((setting.batch,), jnp.bool_)
        self.waiting = None

    def begin(self) -> Columns:
        """Read the prompts: columns [B, 1] of the first new tokens, as `tokens` gives them."""
        return self._first(self.prefill())

    def begin_judged(self) -> Columns:
        """`begin`, behind the columns of the prompts' tokens but the first, which they judge.

        All prompts have one length.
        """
        x = self.through_layers()
        n = int(self.length[0]) - 1
        targets = np.zeros(x.shape[:2], np.int32)
        targets[:, :n] = self.prompts[:, 1 : n + 1]
        judged = self.programs.judge_all(self.params, x, jnp.asarray(targets))
        new = self._first(self.programs.last_logits(self.params, x, jnp.asarray(self.length)))
        return tuple(
            np.concatenate([np.asarray(a)[:, :n], b], axis=1)
            for a, b in zip(judged, new, strict=True)
        )

    def step(self, done: np.ndarray | None = None, most: int = step.CHUNK_STEPS) -> Columns:
        """What a plan asks for before the next step, and as many steps as need no further plan.

        done [B] bool: sequences that have ended. Returns columns [B, n] of n <= `most` new tokens.
        """
        if done is not None:
            self.done = jnp.asarray(done)
        self.limit = min(self.setting.new_tokens, self.made + most)
        return self.advance()

    def advance(self) -> Columns:
        """`step`, as the kind of run does it."""
        raise NotImplementedError

    def end(self) -> None:
        """Free the states and the host pages: the next run begins with empty memories."""
        self.kv = KVState(())
        self.mover = None
        self.behind = []
        for side in ("device", "host"):
            self.meter.hold(side, -self.meter.live[side])

    def prefill(self) -> jax.Array:
        """Read the prompts layer by layer: logits [B, V] of their last tokens."""
        x = self.through_layers()
        return self.programs.last_logits(self.params, x, jnp.asarray(self.length))

    def through_layers(self) -> jax.Array:
        """Read the prompts layer by layer: x [B, T, D] behind the last."""
        setting, placement = self.setting, self.placement
        T = PAGE_TOKENS * pages(max(setting.prompt_tokens))
        tokens = np.zeros((setting.batch, T), np.int32)
        tokens[:, : min(T, self.prompts.shape[1])] = self.prompts[:, :T]
        plan = self.decide(0, None, None)
        kept = self._ranges(plan.store)
        cuts = [
            (g, Cut(members, *page_range(kept.get(members[0], (0, 0)))))
            for g, members in enumerate(self.groups)
        ]
        cuts = [(g, cut) for g, cut in cuts if cut.first < cut.stop]
        host = jnp.asarray([span.host for span in self.spans], jnp.int32)
        length = jnp.asarray(self.length)
        x, kv = self.programs.embed(self.params, jnp.asarray(tokens)), []
        for layer, (spec, layout) in enumerate(
            zip(placement.engine.layers, self.layouts, strict=True)
        ):
            mine = cuts if layer in placement.placed else []
            block = self.params["blocks"][layer]
            chosen = tuple(cut for _, cut in mine)
            x, states, some = self.read_layer(spec, layout, chosen, block, x, length, host)
            kv.append(states)
            self.meter.hold("device", tree_bytes((states, some)))
            if some:
                i = placement.placed.index(layer)
                found = zip(mine, some, strict=True)
                self.mover.store(
                    (i, g, cut.first + j, page)
                    for (g, cut), cells in found
                    for j, page in enumerate(cells)
                )
                jax.block_until_ready(
                    [leaves for key, leaves in self.mover.pages.items() if key[0] == i]
                )
            size = tree_bytes(some)
            del some
            self.meter.hold("device", -size)
        self.kv = KVState(tuple(kv))
        return x

    def decide(self, step_: int, wanted, entering) -> Plan:
        """Ask the controller; carry out its drops and its stores of the ring; take on its spans."""
        setting = self.setting
        prompts, first = setting.prompt_tokens, step_ == 0
        lengths = (0,) * setting.batch if first else tuple(s + step_ - 1 for s in prompts)
        view = View(
            setting,
            step_,
            lengths,
            prompts if first else (1,) * setting.batch,
            self.spans,
            wanted,
            entering,
        )
        start = time.perf_counter()
        plan = self.controller.decide(view)
        self.decide_s += time.perf_counter() - start
        self.decisions += 1
        self.notes += [note for note in plan.notes if note not in self.notes]
        self._drop(plan.drop, self.spans)  # first, so that what is stored finds its room
        if not first:
            self._store(plan.store)
        spans, old = self.controller.spans(view), self.spans
        self.spans = spans
        if any(span.host for span in spans):
            self.p1 = min(self.p1, step_)
        if any(span.dropped for span in spans):
            self.p2 = min(self.p2, step_)
        if not first and [s.host for s in spans] != [s.host for s in old]:
            self.moved_host()
        return plan

    def moved_host(self) -> None:
        """The boundary between ring and host pages has moved."""

    def quiet_until(self, step_: int) -> int:
        """The first step from `step_` on at which tokens change their place, or the end."""
        setting, start = self.setting, time.perf_counter()
        while self.next_move < setting.new_tokens:
            if self.next_move >= step_:
                lengths = tuple(s + self.next_move - 1 for s in setting.prompt_tokens)
                view = View(
                    setting, self.next_move, lengths, (1,) * setting.batch, self.spans, {}, {}
                )
                if self.controller.spans(view) != self.spans:
                    break
            self.next_move += 1
        self.decide_s += time.perf_counter() - start
        return min(self.next_move, setting.new_tokens)

    def _store(self, rows: Iterable[Rows]) -> None:
        ranges = self._ranges(rows)
        for g, members in enumerate(self.groups):
            first, stop = page_range(ranges.get(members[0], (0, 0)))
            for page in range(first, stop):
                index = jnp.asarray(members, jnp.int32)
                leaves = self.programs.ring_pages(self.kv, index, jnp.int32(page))
                self._hold(tree_bytes(leaves))
                self.mover.store((i, g, page, some) for i, some in enumerate(leaves))
                sent = [self.mover.pages[i, g, page] for i in range(len(leaves))]
                self.behind.append((sent, tree_bytes(leaves)))

    def _hold(self, size: int) -> None:
        """Count `size` more device bytes; wait for pages written behind while there is no room."""
        meter = self.meter
        ready = lambda arrays: all(leaf.is_ready() for leaf in jax.tree.leaves(arrays))
        while self.behind and (
            ready(self.behind[0][0]) or meter.live["device"] + size > meter.budgets["device"]
        ):
            sent, held = self.behind.pop(0)
            jax.block_until_ready(sent)
            meter.hold("device", -held)
        meter.hold("device", size)

    def _drop(self, rows: Iterable[Rows], old: tuple[Span, ...]) -> None:
        ranges = self._ranges(row for row in rows if row.source == "host")
        for g, members in enumerate(self.groups):
            for page in range(*page_range(ranges.get(members[0], (0, 0)))):
                self.mover.drop(self.setting.layers, g, page)

    def _lengths(self) -> np.ndarray:
        """[B] int32: cached tokens before the next step."""
        return np.asarray(self.length + self.made - 1, np.int32)

    def _ranges(self, rows: Iterable[Rows]) -> dict[int, tuple[int, int]]:
        """Rows of all layers as {away sequence: (start, stop)}."""
        found: dict[int, tuple[int, int]] = {}
        for row in rows:
            sequences = (
                range(self.whole, self.setting.batch) if row.sequence == ALL else (row.sequence,)
            )
            for b in sequences:
                old = found.get(b - self.whole, (row.start, row.stop))
                found[b - self.whole] = min(old[0], row.start), max(old[1], row.stop)
        return found

    def _first(self, logits: jax.Array) -> Columns:
        """The columns [B, 1] of one step with logits [B, V]."""
        columns, self.token = self.new.first(self.programs, logits, self.made)
        self.made += 1
        return columns

    def _chunk(self, n: int) -> Columns:
        """Up to n steps in one program; `waiting` is what is pending after them."""
        n = min(n, step.CHUNK_STEPS, self.limit - self.made)
        columns, self.token, self.kv, self.waiting = self.new.steps(
            self.programs, self.params, self.kv, self.token, self.done, self.made, n
        )
        self.made += columns[0].shape[1]
        return columns


def page_range(tokens: tuple[int, int]) -> tuple[int, int]:
    """Tokens start .. stop - 1, whole pages, as pages first .. stop - 1."""
    return tokens[0] // PAGE_TOKENS, tokens[1] // PAGE_TOKENS
