"""`ResidentRun`: prompts and decode steps of a batch whose cache stays on the device."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from alisa_jax.engine import prompts, step
from alisa_jax.engine.batch import Batch
from alisa_jax.engine.sampling import Draw, now
from alisa_jax.kv.buckets import bucket, next_bucket
from alisa_jax.kv.state import tree_bytes
from alisa_jax.placement.mover import Meter


class ResidentRun:
    """States that grow, layer by layer, at the borders of context buckets.

    new_tokens: the most that follow the prompts. eos: stop tokens [E]; -1 for none. drawn: a `Draw`
    before the first new token, or None for greedy ones. `first` is the run's first sequence in the
    batch.
    """

    host_reads = ""
    first = 0

    def __init__(self, engine, batch: Batch, new_tokens: int, eos, drawn: Draw | None):
        self.engine = engine
        self.prompts = batch
        self.batch = len(batch.length)
        self.new_tokens = new_tokens
        self.eos = eos
        self.drawn = drawn
        self.meter = Meter(math.inf, math.inf)
        self.notes: list[str] = []
        self.recall = {}
        self.p1 = self.p2 = new_tokens
        self.decisions = 0
        self.decide_s = 0.0
        self.made = 0

    def begin(self) -> tuple[np.ndarray, ...]:
        """Read the prompts: tokens, margins and log-probabilities [B, 1] of the first new ones."""
        programs = self.engine.programs
        begun = prompts.begin(self.engine, self.prompts, self.new_tokens)
        self.kv = begun.kv
        if begun.lane_bytes:  # beside the first state that is made of a lane
            reading = begun.lane_bytes + tree_bytes(self.kv.layers[0])
            self.meter.hold("device", reading)
            self.meter.hold("device", -reading)
        self.meter.hold("device", tree_bytes(self.kv))
        self.longest = int(begun.fed.length.max())
        self.S = bucket(self.longest)
        first = programs.next_token(begun.logits, now(self.drawn, 0), jnp.int32(0))
        self.token = first[0]
        self.made = 1
        return tuple(np.asarray(x)[:, None] for x in first)  # waits for the device

    def step(self, done: np.ndarray, most: int) -> tuple[np.ndarray, ...]:
        """Up to `most` new tokens [B, n] of each sequence; done [B] bool: ended already."""
        room = self.S - (self.longest + self.made - 1)
        if room == 0:
            self._grow()
            room = self.S - (self.longest + self.made - 1)
        n = min(step.CHUNK_STEPS, most, room, self.new_tokens - self.made)
        out, self.kv = self.engine.programs.generate(
            self.engine.model.params,
            self.kv,
            self.token,
            jnp.asarray(done),
            self.eos,
            jnp.int32(n),
            now(self.drawn, self.made),
        )
        self.token = out.token
        taken = int(out.steps)
        self.made += taken
        return tuple(np.asarray(x)[:, :taken] for x in (out.tokens, out.margins, out.logprobs))

    def end(self) -> None:
        """Free the states."""
        del self.kv

    def _grow(self) -> None:
        self.S = next_bucket(self.S)
        layers = list(self.kv.layers)
        old = tree_bytes(self.kv)
        last = tree_bytes(layers[-1])
        # only `layers` holds them now: an old layer is freed before the next one grows
        del self.kv
        more = prompts.room(self.engine, self.new_tokens - self.made)
        self.kv = self.engine.programs.grow_each(layers, self.S, more)
        new = tree_bytes(self.kv)
        self.meter.hold("device", new - old + last)
        self.meter.hold("device", -last)
