"""`plan`: the bytes, the phases and every controller's modelled throughput of one run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from types import MappingProxyType

from alisa_jax import placement
from alisa_jax.codecs import Asked
from alisa_jax.models.checkpoint import Model
from alisa_jax.models.config import ModelConfig
from alisa_jax.placement import Alisa, Controller, Waves
from alisa_jax.placement.modelled import planner
from alisa_jax.placement.modelled.cost import Hardware
from alisa_jax.placement.modelled.simulate import ENTERING_TOKENS, Simulated
from alisa_jax.planning import arguments
from alisa_jax.planning.planned import Planned
from alisa_jax.planning.request import READS, TRAFFICS, Request, Run
from alisa_jax.planning.workload import ELEMENT_BYTES

DENSE = ("resident", "waves", "accelerate", "flexgen")
_OF_EACH = ("device_peak_bytes", "host_peak_bytes", "load_bytes", "store_bytes", "p1", "p2")


def plan(
    model: str | os.PathLike | Model | ModelConfig,
    hardware: str | os.PathLike | Hardware,
    *,
    batch: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 512,
    kv_sparsity: float = 0.8,
    window: int | str = "k",
    codec: str | Asked = "raw",
    dtype: str = "float16",
    device_kv_bytes: float | str | None = None,
    host_kv_bytes: float | str | None = None,
    placement: str | Controller | Iterable[str | Controller] = (),
    read: str = "rows",
    traffic: str = "delta",
    entering_tokens: float = ENTERING_TOKENS,
    selection_us: float = 50.0,
    matmul_efficiency: float = 0.6,
    read_efficiency: float = 0.8,
) -> Planned:
    """What a run would need and reach: whether it fits, where its tokens would live, tokens/s.

        print(alisa_jax.plan("opt_30b", "h100_80gb", batch=64, device_kv_bytes="0.8x"))

    No weights are read and nothing runs: all numbers are modelled. `batch` prompts of
    `prompt_tokens` tokens go on for `new_tokens` each.

    Args:
      model: a shape such as "opt_30b", what `alisa_jax.load` takes (a hub's `config.json` is
        downloaded, and no weights), a loaded model, or a configuration.
      hardware: a device such as "h100_80gb" (`DEVICES`), the file of a profile, or a `Hardware`.
      kv_sparsity, window: of SWA; 0 attends densely.
      codec: how K and V are stored. dtype: of weights and of raw K and V.
      device_kv_bytes, host_kv_bytes: budgets of the cache, as numbers or as in "2GB" and "0.33x", a
        share of the dense KV. None: what weights and activations leave of the device; the host's
        memory.
      placement: further controllers to price under SWA, such as "alisa(lag=1)". A name that is
        priced anyway, such as "flexgen", becomes "flexgen_swa".
      read: "rows" if single rows can be read from host pages, or "pages". traffic: what the search
        for phases assumes, "delta" (entering tokens travel) or "paper" (all selected ones do).
      entering_tokens: tokens that enter a selection at a step, per layer and sequence.
      selection_us: microseconds that selecting adds to a layer of a step.
      matmul_efficiency, read_efficiency: reached shares of published rates.

    Raises ValueError, in one sentence that begins with the argument's name, for an argument that is
    wrong, and for a run that the budgets do not allow.
    """
    start = time.perf_counter()
    name, config = arguments.model(model)
    dtype = arguments.one_of("dtype", dtype, tuple(ELEMENT_BYTES))
    codec, stored = arguments.codec(codec, dtype)
    request = Request(
        model=name,
        config=config,
        hardware=arguments.hardware(hardware),
        codec=codec,
        stored=stored,
        batch=arguments.whole("batch", batch),
        prompt_tokens=arguments.whole("prompt_tokens", prompt_tokens),
        new_tokens=arguments.whole("new_tokens", new_tokens),
        kv_sparsity=arguments.number("kv_sparsity", kv_sparsity, 0.0),
        window=str(window),
        dtype=dtype,
        device_kv_bytes=device_kv_bytes,
        host_kv_bytes=host_kv_bytes,
        controllers=arguments.controllers(placement),
        read=arguments.one_of("read", read, READS),
        traffic=arguments.one_of("traffic", traffic, TRAFFICS),
        entering_tokens=arguments.number("entering_tokens", entering_tokens, 0.0),
        selection_us=arguments.number("selection_us", selection_us, 0.0),
        matmul_efficiency=arguments.number("matmul_efficiency", matmul_efficiency, 0.001, 1.0),
        read_efficiency=arguments.number("read_efficiency", read_efficiency, 0.001, 1.0),
    )
    return answer(request, start)


def answer(request: Request, start: float) -> Planned:
    """The plan of a checked request; start: when it was asked for, by `time.perf_counter`."""
    run = request.run(request.batch)
    least = request.check(run)
    n = request.new_tokens
    problem = planner.problem(
        run.sparse, run.cost, request.kv_sparsity, request.traffic, request.entering_tokens
    )
    found = planner.search(problem)
    runs = _priced(run, found, request)
    values = {
        **run.needs,
        "least_device_kv_bytes": least,
        "fits": run.fits,
        "p1": found.p1,
        "p2": found.p2,
        "alpha": found.alpha if found.p1 < n else 0.0,
        "beta": found.beta if found.p2 < n else 0.0,
        "search_total_s": found.seconds,
        "search_excess_tokens": found.excess_tokens,
        **_values(runs),
        "offload_wins_from_batch": _crossover(request.run, request.batch),
    }
    return Planned(
        cell=MappingProxyType(request.cell),
        values=MappingProxyType(values),
        runs=MappingProxyType(runs),
        wall_s=time.perf_counter() - start,
    )


def _priced(run: Run, found: planner.Phases, request: Request) -> dict[str, Simulated | str]:
    """Each controller's modelled run, or the sentence with which it refuses."""
    cases = {name: (placement.parse(name), run.dense) for name in DENSE}
    cases["alisa"] = (Alisa(), run.sparse)
    cases["alisa_searched"] = (_searched(found, request.new_tokens), run.sparse)
    cases["alisa_paper"] = (Alisa(traffic="paper"), run.sparse)
    for text, one in request.controllers.items():
        cases[f"{text}_swa" if text in cases else text] = (one, run.sparse)
    return {name: run.price(*case) for name, case in cases.items()}


def _searched(found: planner.Phases, new_tokens: int) -> Controller:
    """The controller with the phases of a search.

    All stays on the device, or nothing is deleted, where it found that.
    """
    if found.p1 >= new_tokens:
        return Alisa()
    if found.p2 >= new_tokens:
        return Alisa(alpha=found.alpha, p1=found.p1)
    return Alisa(alpha=found.alpha, beta=found.beta, p1=found.p1, p2=found.p2)


def _crossover(make: Callable[[int], Run], batch: int) -> int | None:
    """The smallest batch from which offloaded sparsity is not slower than the device alone.

    make: a batch to its run. None: at none that was tried, up to 8 `batch` and 512.
    """

    def wins(size: int) -> bool:
        run = make(size)
        if run.needs["device_kv_bytes"] <= 0:
            return False
        alone, ours = run.price(Waves(), run.dense), run.price(Alisa(), run.sparse)
        if isinstance(ours, str):
            return False
        return isinstance(alone, str) or ours.total_s <= alone.total_s

    top = min(max(512, batch), 8 * batch)
    size = 1
    while not wins(size):
        if size == top:
            return None
        size = min(2 * size, top)
    low = size // 2
    while size - low > 1:
        middle = (low + size) // 2
        low, size = (low, middle) if wins(middle) else (middle, size)
    return size


def _values(runs: dict[str, Simulated | str]) -> dict:
    """Flat values of each controller."""
    values = {}
    for name, run in runs.items():
        refused = isinstance(run, str)
        values[f"{name}_tokens_per_s"] = "OOM" if refused else run.tokens_per_s
        for field in _OF_EACH:
            values[f"{name}_{field}"] = None if refused else getattr(run, field)
    return values
