"""`Placement`: the controller of an engine, its budgets, and the runs that obey it.

Before a step the controller gets a `View` and answers with a `Plan`; a run (`run.py`) obeys it
through the `Mover`, then steps until there is something to decide again: while nothing has to move,
many steps run inside one program. Prompts go layer by layer, and what does not stay leaves before
the next layer begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax

from alisa_jax.codecs import Raw
from alisa_jax.engine import prompts
from alisa_jax.engine.batch import Batch
from alisa_jax.engine.offload import settings
from alisa_jax.engine.offload.by_guess import GuessRun
from alisa_jax.engine.offload.by_layers import LayerRun
from alisa_jax.engine.offload.by_rows import RowRun
from alisa_jax.engine.offload.programs import PlacedPrograms
from alisa_jax.engine.offload.refreshes import RefreshRun
from alisa_jax.engine.offload.run import PlacedRun
from alisa_jax.engine.offload.tokens import Drawn, Forced
from alisa_jax.engine.sampling import Draw, of_rows
from alisa_jax.placement import mover
from alisa_jax.placement.bytes_text import read_bytes
from alisa_jax.placement.plan import Controller, Setting


class Placement:
    """Where `engine`, a model with a policy and a codec, keeps its cache.

    controller, device_kv_bytes, host_kv_bytes: as of `Engine`. programs: those of another placement
    of the same engine. Raises ValueError for what no controller can place, RuntimeError where the
    machine cannot offload.
    """

    def __init__(
        self,
        engine,
        controller: Controller,
        device_kv_bytes: float | str = math.inf,
        host_kv_bytes: float | str = math.inf,
        programs: PlacedPrograms | None = None,
    ):
        if engine.chunk_tokens is not None:
            raise ValueError(
                "placement reads prompts layer by layer, so that what does not stay leaves before "
                f"the next layer; give chunk_tokens=None, not {engine.chunk_tokens}"
            )
        self.engine = engine
        self.controller = controller
        self.device_kv_bytes = device_kv_bytes
        self.host_kv_bytes = host_kv_bytes
        self.counts_recall = False  # of guessed queries: for analysis, as each layer chooses twice
        self._budgets(1.0)
        self.host = mover.self_test() if controller.offloads else None
        self.placed = settings.placed_layers(engine.layers)
        self.programs = programs or PlacedPrograms(engine, self.placed)

    def setting(self, prompt_tokens: Sequence[int], new_tokens: int) -> Setting:
        """The run in numbers, from shapes alone; prompts as they are read, behind a filter.

        Raises ValueError if no controller can run it.
        """
        config = self.engine.model.decoder.config
        raw = Raw(self.engine.dtype.name).token_bytes(config.n_kv_heads, config.head_dim)
        tokens = len(prompt_tokens) * (max(prompt_tokens) + new_tokens - 1)
        return settings.setting_of(
            config,
            self.engine.layers,
            prompt_tokens,
            new_tokens,
            *self._budgets(config.n_layers * raw * tokens),
            self.host is None or self.host.reads == "rows",
        )

    def check(self, prompt_tokens: Sequence[int], new_tokens: int) -> Setting:
        """The setting. Raises ValueError, naming the least value that would do, if refused."""
        setting = self.setting(prompt_tokens, new_tokens)
        settings.check(self.controller, setting)
        return setting

    def runs(
        self, batch: Batch, new_tokens: int, eos: jax.Array, drawn: Draw | None
    ) -> list[PlacedRun]:
        """What continues `batch`, as of `Engine.runs`: a run for each group of the controller."""
        return self.split(batch, new_tokens, lambda rows: Drawn(eos, of_rows(drawn, rows)))

    def split(
        self, batch: Batch, new_tokens: int, new: Callable[[slice], Drawn | Forced]
    ) -> list[PlacedRun]:
        """The runs of a batch; new(rows): where the new tokens of these sequences come from.

        Prompts are filtered here, where the policy filters them.
        """
        fed = prompts.condensed(self.engine, batch)
        setting = self.check(fed.length.tolist(), new_tokens)
        meter = mover.Meter(setting.device_kv_bytes, setting.host_kv_bytes)
        runs = []
        first = 0
        for part in self.controller.groups(setting):
            rows = slice(first, first + part.batch)
            given = fed.tokens[rows], fed.length[rows]
            runs.append(self.run(part, meter, *given, new(rows), first))
            first = rows.stop
        return runs

    def run(self, setting: Setting, *args, **kwargs) -> PlacedRun:
        """One run of `setting`; the other arguments as of `PlacedRun`."""
        kind = GuessRun if setting.chosen else RowRun if setting.selects else LayerRun
        if setting.refreshes and self.controller.layout(setting).kept_pages:
            kind = RefreshRun
        return kind(self, setting, *args, **kwargs)

    def _budgets(self, dense_kv_bytes: float) -> tuple[float, ...]:
        """The budgets in bytes. Raises ValueError for what is no size."""
        names = ("device_kv_bytes", "host_kv_bytes")
        return tuple(read_bytes(getattr(self, x), dense_kv_bytes, f"{x}: ") for x in names)
