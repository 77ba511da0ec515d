"""What is asked of `plan`, and the runs that it comes to: one for each batch that is tried."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from alisa_jax.codecs import Codec
from alisa_jax.models.config import ModelConfig
from alisa_jax.placement import Alisa, Controller, Resident, Setting
from alisa_jax.placement.bytes_text import as_text, read_bytes
from alisa_jax.placement.controllers.alisa import least_device_bytes
from alisa_jax.placement.modelled.cost import Cost, Hardware, Shape, kv_bytes
from alisa_jax.placement.modelled.simulate import Simulated, Trace, simulate, swa_trace
from alisa_jax.planning import workload

SCRIPT = "eval.plan"  # the record is the command's, whoever asks
READS = ("rows", "pages")
TRAFFICS = ("delta", "paper")
# Settings that identify a record, in its order.
_CELL = (
    "prompt_tokens",
    "new_tokens",
    "kv_sparsity",
    "window",
    "dtype",
    "read",
    "traffic",
    "entering_tokens",
    "selection_us",
    "matmul_efficiency",
    "read_efficiency",
)


@dataclass(frozen=True)
class Run:
    """A batch with everything that prices it.

    sparse, dense: the settings under SWA and under dense attention. trace, by_layer: what is
    selected, in all layers alike and in each of its own; None where all is attended. needs: bytes
    by the names of a record.
    """

    sparse: Setting
    dense: Setting
    cost: Cost
    trace: Trace | None
    by_layer: Trace | None
    needs: Mapping[str, float]

    @property
    def fits(self) -> bool:
        """Whether the dense cache fits the device."""
        try:
            Resident().check(self.dense)
        except ValueError:
            return False
        return True

    def price(self, controller: Controller, setting: Setting) -> Simulated | str:
        """The modelled run of a controller, or the sentence with which it refuses."""
        try:
            found = simulate(controller, setting, self.cost, self.trace)
            if found.p2 < setting.new_tokens and not controller.reads_wanted:
                found = simulate(controller, setting, self.cost, self.by_layer)
            return found
        except ValueError as error:
            return str(error)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `plan`, checked one by one, with the objects that their names stand for.

    Raises ValueError, in one sentence that begins with an argument, for what does not go together.
    """

    model: str
    config: ModelConfig
    hardware: Hardware
    codec: str
    stored: Codec
    batch: int
    prompt_tokens: int
    new_tokens: int
    kv_sparsity: float
    window: str
    dtype: str
    device_kv_bytes: float | str | None
    host_kv_bytes: float | str | None
    controllers: Mapping[str, Controller]
    read: str
    traffic: str
    entering_tokens: float
    selection_us: float
    matmul_efficiency: float
    read_efficiency: float

    def __post_init__(self):
        positions, context = self.config.max_positions, self.prompt_tokens + self.new_tokens
        if context > positions:
            raise ValueError(
                f"new_tokens: the model has {positions} positions, and {context} are asked for"
            )
        policy = self.policy
        try:
            policy.validate(context)
        except ValueError as error:
            raise ValueError(f"kv_sparsity: {error}") from error
        needed = self.stored.frozen_after
        if self.prompt_tokens <= needed:
            raise ValueError(
                f"codec: {self.codec} takes its range from the first {needed} tokens of a "
                f"sequence, so prompts need more than {needed}, got {self.prompt_tokens}"
            )
        if self.entering_tokens > self.prompt_tokens:
            raise ValueError(
                f"entering_tokens must be at most the prompt, {self.prompt_tokens} tokens"
            )
        self._budgets(1.0, 1.0)  # refuses what is no size

    @functools.cached_property
    def policy(self):
        """SWA, or dense attention."""
        return workload.policy(self.kv_sparsity, self.window)

    @functools.cached_property
    def shape(self) -> Shape:
        """The model in numbers."""
        return workload.shape(self.config, self.stored, self.dtype)

    @functools.cached_property
    def cost(self) -> Cost:
        """What a step costs."""
        return Cost(
            self.hardware,
            self.shape,
            self.matmul_efficiency,
            self.read_efficiency,
            selection_s=self.selection_us * 1e-6,
        )

    @functools.cached_property
    def traces(self) -> tuple[Trace | None, Trace | None]:
        """What SWA selects, in all layers alike and in each of its own."""
        if not self.kv_sparsity:
            return None, None
        counts = self.policy.counts(self.prompt_tokens + self.new_tokens)
        trace = functools.partial(
            swa_trace,
            lambda n: int(counts.local[n]),
            lambda n: int(counts.top[n]),
            self.entering_tokens,
        )
        return trace(), trace(layers=self.config.n_layers)

    @property
    def cell(self) -> dict:
        """The fields that identify a record."""
        return {
            "script": SCRIPT,
            "model": self.model,
            "hardware": self.hardware.name,
            "codec": self.codec,
            **{name: getattr(self, name) for name in _CELL},
            "batch": self.batch,
        }

    def run(self, batch: int) -> Run:
        """The run of `batch` sequences. A share of the dense KV is of that of `self.batch`."""
        size = (batch, self.prompt_tokens, self.new_tokens)
        sparse = workload.setting(self.config, self.stored, self.policy, *size)
        dense = workload.setting(self.config, self.stored, workload.policy(0.0), *size)
        activations = self.shape.activation_bytes(batch, self.prompt_tokens)
        whole = kv_bytes(dense)
        left = self.hardware.device_bytes - self.shape.weight_bytes - activations
        device, host = self._budgets(left, whole / batch * self.batch)
        limits = dict(device_kv_bytes=device, host_kv_bytes=host, gather=self.read == "rows")
        needs = {
            "device_bytes": self.hardware.device_bytes,
            "weight_bytes": self.shape.weight_bytes,
            "activation_bytes": activations,
            "kv_bytes": whole,
            "working_set_bytes": batch * sparse.layers * sparse.slots * sparse.token_bytes,
            "statistics_bytes": batch * sparse.stats_bytes,
            "device_kv_bytes": device,
            "host_kv_bytes": host,
        }
        sparse = dataclasses.replace(sparse, **limits)
        dense = dataclasses.replace(dense, **limits)
        return Run(sparse, dense, self.cost, *self.traces, needs)

    def _budgets(self, left: float, dense_kv_bytes: float) -> tuple[float, float]:
        """Of the device and of the host, in bytes; left: what the device has for the cache."""
        device, host = left, self.hardware.host_bytes
        if self.device_kv_bytes is not None:
            device = read_bytes(self.device_kv_bytes, dense_kv_bytes, "device_kv_bytes: ")
        if self.host_kv_bytes is not None:
            host = read_bytes(self.host_kv_bytes, dense_kv_bytes, "host_kv_bytes: ")
        return device, host

    def check(self, run: Run) -> float:
        """The least device budget. Raises ValueError where SWA or a controller cannot run."""
        needs = run.needs
        if self.device_kv_bytes is None and needs["device_kv_bytes"] <= 0:
            both = needs["weight_bytes"] + needs["activation_bytes"]
            raise ValueError(
                f"hardware: weights and activations need {as_text(both)}, and the device has "
                f"{as_text(needs['device_bytes'])}"
            )
        try:
            Alisa().check(run.sparse)
        except ValueError as error:
            name = "host_kv_bytes" if "host_kv_bytes" in str(error) else "device_kv_bytes"
            raise ValueError(
                f"{name}: {error} (working set {as_text(needs['working_set_bytes'])}, statistics "
                f"{as_text(needs['statistics_bytes'])}; a smaller window has smaller statistics)"
            ) from error
        for controller in self.controllers.values():
            try:
                controller.check(run.sparse)
            except ValueError as error:
                raise ValueError(f"placement: {error}") from error
        return least_device_bytes(run.sparse)
