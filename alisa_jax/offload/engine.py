"""`Placed`: generation whose cache does not fit on the device, placed by a controller.

One loop serves every controller. Before a step the controller gets a `View` and answers with a
`Plan`; a run (`offload.run`) obeys it through the `Mover`, then steps until there is something to
decide again: while nothing has to move, many steps run inside one program. Prompts go layer by
layer, and what does not stay leaves before the next layer begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alisa_jax import placement
from alisa_jax.engine.progress import progress_bar
from alisa_jax.engine.prompts import condensed
from alisa_jax.offload import settings
from alisa_jax.offload.by_layers import LayerRun
from alisa_jax.offload.by_rows import RowRun
from alisa_jax.offload.programs import PlacedPrograms
from alisa_jax.placement import mover
from alisa_jax.placement.plan import Controller, Setting


@dataclass(frozen=True, kw_only=True)
class PlacedResult:
    """What `Placed.generate` returns.

    Bytes are of K, V and all else that a cache keeps: working sets, statistics, staging. A row is a
    token of one layer and sequence. tokens_per_s = batch * new tokens / (prefill_s + decode_s).
    """

    tokens: list[list[int]]  # new tokens of each prompt
    margins: list[np.ndarray]  # by how much each was chosen: see `sampling.next_token`
    logprobs: list[np.ndarray]  # nats, of each new token
    prefill_s: float  # until the first new tokens are known
    decode_s: float
    wall_s: float
    load_bytes: int  # host to device
    store_bytes: int  # device to host
    loaded_rows: int
    stored_rows: int
    recomputed_rows: int  # rows that were computed anew and used
    recomputed_tokens: int  # tokens of all prefixes that this took
    device_peak_bytes: int
    host_peak_bytes: int
    p1: int  # the first step that keeps something off the device; new_tokens where none does
    p2: int  # the first step that has deleted something
    groups: int  # runs that the batch was split into
    effective_batch: int  # sequences of the largest
    decisions: int  # times that the controller was asked
    decide_s: float  # seconds of these, and of looking ahead for the next move
    compiles: int
    notes: tuple[str, ...]
    host_reads: str  # "rows" | "pages" | "" where nothing is offloaded

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over all of the time, prefill included."""
        return sum(map(len, self.tokens)) / (self.prefill_s + self.decode_s)


class Placed:
    """Runs `engine`'s model, policy and codec with its cache placed by `controller`.

    controller: a spec such as "alisa(traffic=paper)", or the object. device_kv_bytes,
    host_kv_bytes: budgets for everything that the cache keeps on each side. Raises `spec.SpecError`
    for an unknown controller, RuntimeError where the machine cannot offload.
    """

    def __init__(
        self,
        engine,
        controller="resident",
        device_kv_bytes: float = math.inf,
        host_kv_bytes: float = math.inf,
    ):
        if engine.chunk_tokens is not None:
            raise ValueError(
                "placement reads prompts layer by layer, so that what does not stay leaves before "
                f"the next layer; give chunk_tokens=None, not {engine.chunk_tokens}"
            )
        self.engine = engine
        self.controller: Controller = (
            placement.parse(controller) if isinstance(controller, str) else controller
        )
        self.device_kv_bytes, self.host_kv_bytes = device_kv_bytes, host_kv_bytes
        self.host = mover.self_test() if self.controller.offloads else None
        self.placed = settings.placed_layers(engine.layers)
        self.programs = PlacedPrograms(engine, self.placed)

    def under(
        self, controller, device_kv_bytes: float = math.inf, host_kv_bytes: float = math.inf
    ) -> Placed:
        """The same engine, and what it has compiled, under another controller and other budgets."""
        other = Placed(self.engine, controller, device_kv_bytes, host_kv_bytes)
        other.programs = self.programs
        return other

    def setting(self, prompt_tokens: Sequence[int], new_tokens: int) -> Setting:
        """The run in numbers, from shapes alone. Raises ValueError if no controller can run it."""
        gather = self.host is None or self.host.reads == "rows"
        config, layers = self.engine.model.decoder.config, self.engine.layers
        budgets = self.device_kv_bytes, self.host_kv_bytes
        return settings.setting_of(config, layers, prompt_tokens, new_tokens, *budgets, gather)

    def check(self, prompt_tokens: Sequence[int], new_tokens: int) -> Setting:
        """The setting. Raises ValueError, naming the least value that would do, if refused."""
        setting = self.setting(prompt_tokens, new_tokens)
        settings.check(self.controller, setting)
        return setting

    def generate(self, prompts, max_new_tokens: int, progress: bool = False) -> PlacedResult:
        """Greedy continuation of a ragged batch by `max_new_tokens` tokens each.

        prompts: as of `Engine.generate`. Raises ValueError, before anything runs, for what the
        controller refuses and for what `Engine.generate` refuses.
        """
        return self._run(prompts, max_new_tokens, None, progress)

    def score(self, sequences, prompt_tokens: int, progress: bool = False) -> PlacedResult:
        """Log-probabilities of the tokens from `prompt_tokens` on of sequences of one length.

        The first `prompt_tokens` are a dense prompt, the others are fed one by one.
        `PlacedResult.logprobs` has an entry for each later token, `PlacedResult.tokens` repeats
        them. Raises ValueError as `generate` does, and for sequences of different lengths.
        """
        batch = self.engine.batch(sequences)
        if len(set(batch.length.tolist())) > 1 or not 1 <= prompt_tokens < batch.length[0]:
            raise ValueError(
                f"score needs sequences of one length, longer than prompt_tokens={prompt_tokens}; "
                f"got lengths {batch.length.tolist()}"
            )
        prompts = [row[:prompt_tokens].tolist() for row in batch.tokens]
        return self._run(
            prompts, int(batch.length[0]) - prompt_tokens, batch.tokens[:, prompt_tokens:], progress
        )

    def _run(
        self, prompts, new_tokens: int, forced: np.ndarray | None, progress: bool
    ) -> PlacedResult:
        start, compiles = time.perf_counter(), self.engine.compiles
        batch = self.engine.batch(prompts)
        if new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {new_tokens}")
        self.engine.validate_prompts(batch.length, new_tokens)
        reading = time.perf_counter()
        batch = condensed(self.engine, batch)
        reading = time.perf_counter() - reading
        setting = self.check(batch.length.tolist(), new_tokens)
        kind = RowRun if setting.selects else LayerRun
        runs, first = [], 0
        meter = mover.Meter(self.device_kv_bytes, self.host_kv_bytes)
        with progress_bar(progress, new_tokens * setting.batch, str(self.controller)) as shown:
            for part in self.controller.groups(setting):
                rows = slice(first, first + part.batch)
                text = None if forced is None else forced[rows]
                run = kind(self, part, meter, batch.tokens[rows], batch.length[rows], text, first)
                first = rows.stop
                run.run(lambda tokens, batch=part.batch: shown.update(tokens * batch))
                runs.append(run)
        columns = [
            [row for run in runs for row in np.concatenate(run.columns[i], axis=1)]
            for i in range(3)
        ]
        return PlacedResult(
            tokens=[row.tolist() for row in columns[0]],
            margins=columns[1],
            logprobs=columns[2],
            prefill_s=reading + sum(run.prefill_s for run in runs),
            decode_s=sum(run.decode_s for run in runs),
            wall_s=time.perf_counter() - start,
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
            effective_batch=max(run.setting.batch for run in runs),
            decisions=sum(run.decisions for run in runs),
            decide_s=sum(run.decide_s for run in runs),
            compiles=self.engine.compiles - compiles,
            notes=tuple(dict.fromkeys(note for run in runs for note in run.notes)),
            host_reads=self.host.reads if self.host is not None and meter.stored_rows else "",
        )
