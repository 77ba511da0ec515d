"""The model of the paper's systems: how a run of Figure 9 or 12 is priced from a few fitted numbers.

A decode step of b sequences takes a + c b seconds, whichever system runs it; copies add to that, as in Equation 5:

    a    launches: seconds a layer, one number for OPT and one for LLaMA, on either GPU
    c    weight operations of a token at a rate of the GPU
    link bytes per second between CPU and GPU, one number a GPU

Four systems run as this project's controllers, with their copies in plain sight: `accelerate` (with seconds a layer for the
hooks of its host code), `flexgen` with 10 % of the sequences on the device (Figure 12a) or as many of these as fit, `waves`
for vLLM. ALISA is read literally, Equations 3 to 5 as they are printed; with u = 4 b l h / B, the seconds of one position,

    Phase I     j < p1          a + c b + SWA (Figure 11: what a layer takes longer than dense attention)
    Phase II    p1 <= j < p2    the same + u (alpha (s + j) + round(r (s + j)))
    Phase III   p2 <= j         the same + u round(r (1 - beta) (s + j)) + T, the recomputation's time

Phase III offloads no more, because what it would send is deleted. The paper does not say so; with alpha (s + j) in Phase III
too, recomputing never pays. p1 is Figure 12a's at any batch (the paper: the sequence length triggers it), or the step at
which the GPU is full where that is sooner; p2 minimises Equation 5. Rows of INT8, with their codec, travel at a rate of
their own, never above the link's.

`eval.modelled.paper_fits` says what each number is fitted on.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from alisa_jax import placement
from alisa_jax.placement.modelled.cost import Cost, paper_objective_s, paper_traffic_s
from alisa_jax.placement.modelled.simulate import Simulated, simulate, swa_trace
from alisa_jax.placement.plan import Setting
from alisa_jax.planning import workload
from eval.modelled import machines, shapes

RAW, INT8 = "raw", "int8(axis=token)"


class Place(NamedTuple):
    """A model of Figure 9, its shape, and the page of configs/hardware of the GPU it ran on."""

    model: str
    shape: str
    machine: str

    @property
    def gpu(self) -> str:
        return self.machine[:4]

    @property
    def family(self) -> str:
        return self.shape.partition("_")[0]


# Which V100 stands behind which bar is not published: 16 GB for the 7B models, 32 GB for 13B is the reading used here.
MODELS = (
    Place("OPT-6.7B", "opt_6.7b", "v100_16gb"),
    Place("OPT-13B", "opt_13b", "v100_32gb"),
    Place("OPT-30B", "opt_30b", "h100_80gb"),
    Place("LLaMA-7B", "llama_7b", "v100_16gb"),
    Place("LLaMA-13B", "llama_13b", "v100_32gb"),
    Place("LLaMA-33B", "llama_33b", "h100_80gb"),
)
OPT_30B, LLAMA_33B = MODELS[2], MODELS[5]
FIGURE_11 = MappingProxyType({"v100": "OPT-6.7B", "h100": "OPT-30B"})
SYSTEMS = ("hf_accelerate", "flexgen", "vllm", "alisa")


class Seconds(NamedTuple):
    """Of a run, or a part: compute, recomputation included, and copies; they add up."""

    compute_s: float
    memory_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.memory_s


@dataclass(frozen=True)
class Fits:
    """The fitted numbers; see `eval.modelled.paper_fits`. Of each GPU (v100, h100), of each family (layer_s), or common
    to all.
    """

    link_bytes_per_s: Mapping[str, float]
    layer_s: Mapping[str, float]
    flops_per_s: Mapping[str, float]
    row_bytes_per_s: float
    alpha: float
    beta: float
    recompute_passes: float  # dense passes of a token at the GPU's published rate, for each sequence and Phase III step
    accelerate_layer_s: float = 0.0
    vllm_sequences: Mapping[str, int] = dataclasses.field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Schedule:
    """ALISA's run: seconds of each step, copies apart."""

    p1: int
    p2: int
    compute_s: Sequence[float]
    memory_s: Sequence[float]

    def until(self, step: int) -> Seconds:
        """Steps 0 .. step - 1."""
        return Seconds(math.fsum(self.compute_s[:step]), math.fsum(self.memory_s[:step]))

    @property
    def seconds(self) -> Seconds:
        return self.until(len(self.compute_s))


def step_s(place: Place, fits: Fits) -> tuple[float, float]:
    """(a, c) of a model on its GPU."""
    shape = shapes.shape(shapes.config(place.shape), shapes.codec(RAW, "float16"), "float16")
    return fits.layer_s[place.family] * shape.layers, shape.weight_flops / fits.flops_per_s[place.gpu]


def run(
    place: Place, batch: int, published: dict, fits: Fits | None = None, codec: str = RAW, kv_sparsity: float = 0.0
) -> tuple[Setting, Cost]:
    """The paper's workload under SWA (0: dense), with what weights and activations leave of the device.

    Without fits neither steps nor copies have a price yet.
    """
    config, stored, work = shapes.config(place.shape), shapes.codec(codec, "float16"), published["workload"]
    shape, machine = shapes.shape(config, stored, "float16"), machines.hardware(place.machine)
    policy = workload.policy(kv_sparsity)
    setting = workload.setting(config, stored, policy, batch, work["prompt_tokens"], work["new_tokens"])
    left = machine.device_bytes - shape.weight_bytes - shape.activation_bytes(batch, work["prompt_tokens"])
    setting = dataclasses.replace(setting, device_kv_bytes=left, host_kv_bytes=machine.host_bytes)
    if fits is None:
        return setting, Cost(machine, shape, step_s=(0.0, 0.0))
    link = fits.link_bytes_per_s[place.gpu]
    rows = 1.0 if codec == RAW else min(1.0, fits.row_bytes_per_s / link)
    machine = dataclasses.replace(machine, to_device_bytes_per_s=link, to_host_bytes_per_s=link, gathered_frac=rows)
    more = swa_s(place, kv_sparsity, published) if kv_sparsity else 0.0
    return setting, Cost(machine, shape, step_s=step_s(place, fits), selection_s=more)


def seconds(system: str, place: Place, batch: int, published: dict, fits: Fits) -> Seconds | None:
    """A bar of Figure 9 in seconds; None where the memory of the device is not enough."""
    if system == "alisa":
        return alisa(place, batch, published["workload"]["kv_sparsity"], published, fits).seconds
    setting, cost = run(place, batch, published, fits)
    if system == "flexgen":
        return added(flexgen(setting, cost))
    if system == "vllm":
        most = min(fits.vllm_sequences.get(place.gpu, batch), batch)
        room = min(setting.device_kv_bytes, setting.store_bytes(setting.final_tokens[:most]))
        return added(_simulated(placement.Waves(), dataclasses.replace(setting, device_kv_bytes=room), cost))
    hooks = (setting.new_tokens - 1) * setting.layers * fits.accelerate_layer_s
    return added(_simulated(placement.Accelerate(), setting, cost), hooks)


def flexgen(setting: Setting, cost: Cost, device_frac: float = 0.1) -> Simulated | None:
    """FlexGen with this share of the sequences on the device, rounded down, or as many of these as fit."""
    stay = range(int(setting.batch * device_frac + 1e-9), -1, -1)
    found = (_simulated(placement.FlexGen(some / setting.batch), setting, cost) for some in stay)
    return next((one for one in found if one is not None), None)


def added(found: Simulated | None, more_s: float = 0.0) -> Seconds | None:
    """Nothing hides behind anything: the sums of Equation 5, and `more_s` of compute."""
    if found is None:
        return None
    return Seconds(found.compute_s + found.recompute_s + more_s, found.load_s + found.store_s)


def _simulated(controller: placement.Controller, setting: Setting, cost: Cost, trace=None) -> Simulated | None:
    """None where the controller refuses the setting: the memory is not enough."""
    try:
        controller.check(setting)
    except ValueError:
        return None
    return simulate(controller, setting, cost, trace)


def alisa(
    place: Place,
    batch: int,
    kv_sparsity: float,
    published: dict,
    fits: Fits,
    codec: str = INT8,
    recompute: bool = True,
) -> Schedule:
    """ALISA read literally; see above. recompute: with a Phase III, where it pays. Raw rows travel at the link's rate."""
    setting, cost = run(place, batch, published, fits, codec)
    n, s, r = setting.new_tokens, setting.prompt_tokens[0], 1.0 - kv_sparsity
    position = batch * setting.layers * setting.token_bytes
    rate = cost.hardware.to_device_bytes_per_s * cost.hardware.gathered_frac
    step = cost.decode_s(batch, 0.0) + setting.layers * swa_s(place, kv_sparsity, published)
    alone = [cost.prefill_s(setting.prompt_tokens), *[step] * (n - 1)]
    passes = fits.recompute_passes * batch * cost.shape.weight_flops / cost.hardware.matmul_flops_per_s
    again = [one + passes for one in alone]
    two = [paper_traffic_s(position, fits.alpha, r, s + j, rate) for j in range(n)]
    three = [paper_traffic_s(position, 0.0, r * (1.0 - fits.beta), s + j, rate) for j in range(n)]
    p1 = min(published["fig12a_steps"]["80"]["p1"], full_step(setting))
    time = lambda p2: paper_objective_s(alone, two[:p2] + three[p2:], again, p1, p2)
    p2 = min(range(p1 + 1, n + 1), key=time) if recompute else n
    return Schedule(p1, p2, alone[:p2] + again[p2:], [0.0] * p1 + two[p1:p2] + three[p2:])


def full_step(setting: Setting) -> int:
    """The first step whose tokens the device does not hold: where Phase I has to end. The paper has no pages."""
    position = setting.batch * setting.layers * setting.token_bytes
    return max(0, int(setting.device_kv_bytes / position) - setting.prompt_tokens[0] + 1)


def swa_s(place: Place, kv_sparsity: float, published: dict) -> float:
    """Seconds that SWA adds to the attention of a layer, from Figure 11's totals (batch 64, 128 tokens)."""
    times = published["fig11_us"][FIGURE_11[place.gpu]]
    return 1e-6 * (times[percent(kv_sparsity)] - times["dense"])


def percent(kv_sparsity: float) -> str:
    """The key of a sparsity in the published numbers."""
    return str(round(100 * kv_sparsity))


def delta(
    place: Place, batch: int, kv_sparsity: float, published: dict, fits: Fits, codec: str = INT8
) -> Seconds | None:
    """This project's `alisa(traffic=delta)` with the same step and rates: what enters the selection travels, once, and a
    working set and the statistics of SWA take their room on the device. None: that is not enough."""
    setting, cost = run(place, batch, published, fits, codec, kv_sparsity)
    half = lambda tokens: int(tokens * (1.0 - kv_sparsity) / 2 + 0.5)
    return added(_simulated(placement.Alisa(), setting, cost, swa_trace(half, half)))
