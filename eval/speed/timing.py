"""The values of a system: from timed runs that take turns, or from one modelled run; and the seconds of a call."""

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np
from tqdm import tqdm

from alisa_jax import Engine, Generated, placement, policies
from alisa_jax.placement.modelled.cost import Cost
from alisa_jax.placement.modelled.simulate import simulate, swa_trace
from alisa_jax.placement.plan import Setting
from eval.speed import systems, traces
from eval.speed.systems import System, Work

FORMULA = MappingProxyType({"tokens_per_s_formula": "batch * new_tokens / (prefill_s + decode_s)"})
TIMES = ("tokens_per_s", "prefill_s", "decode_s")
COUNTS = tuple(
    "load_bytes store_bytes loaded_rows stored_rows recomputed_rows recomputed_tokens device_peak_bytes host_peak_bytes p1 "
    "p2 groups effective_batch decisions host_reads".split()
)
PRICED = tuple(
    "compute_s load_s store_s recompute_s load_bytes store_bytes loaded_rows recomputed_rows device_peak_bytes "
    "host_peak_bytes p1 p2 groups off_device_frac deleted_frac".split()
)
Keep = Callable[[System, dict, float], None]  # (system, values, seconds that they took)


def build(
    model,
    policy,
    codec: str,
    controller: str,
    device_kv_bytes: float,
    host_kv_bytes: float,
    attention_impl: str = "auto",
) -> Engine:
    """A system ready to run; nothing is compiled yet.

    A resident cache without a budget would grow. It runs under `waves`, which without one is a single run: its arrays have
    their last size from the first step on, as those of all other systems.
    """
    if controller == "resident" and math.isinf(device_kv_bytes):
        controller = "waves"
    return Engine(model, policy, codec, controller, device_kv_bytes, host_kv_bytes, attention_impl=attention_impl)


def measure(
    engines: Mapping[System, Engine], prompts: Sequence[Sequence[int]], new: int, repeats: int, keep: Keep
) -> None:
    """Run every system once to warm up and `repeats` times in turn; hand over its values when its last run is done.

    A system that the device has no memory for is OOM from there on and its times are not kept.
    """
    runs: dict[System, list[Generated]] = {system: [] for system in engines}
    seconds, alive = dict.fromkeys(engines, 0.0), dict(engines)
    with tqdm(total=len(engines) * (repeats + 1), desc="runs", unit="run", disable=None, leave=False) as bar:
        for turn in range(repeats + 1):
            for system, one in list(alive.items()):
                bar.set_postfix_str(str(system))
                began = time.perf_counter()
                try:
                    runs[system].append(one.generate(prompts, new, (), progress=turn == 0))
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    del alive[system]
                    keep(system, oom(" ".join(str(error).split())), seconds[system] + time.perf_counter() - began)
                    bar.update(repeats + 1 - turn)
                    continue
                seconds[system] += time.perf_counter() - began
                bar.update()
                if turn == repeats:
                    keep(system, measured(*runs[system]) | about(one), seconds[system])


def timed(function: Callable, *args) -> tuple:
    """What a compiled function returns, and the seconds by the host's clock until it is ready; the launch counts."""
    began = time.perf_counter()
    out = jax.block_until_ready(function(*args))
    return out, time.perf_counter() - began


def oom(reason: str) -> dict:
    """The values of a system that does not fit."""
    return {"tokens_per_s": "OOM", "note": reason}


def measured(warm: Generated, *runs: Generated) -> dict:
    """Values of the timed `runs`; counts and tokens are those of the first, and a note says where others differ."""
    one, values = runs[0], {}
    for name in TIMES:
        numbers = [getattr(run, name) for run in runs]
        values |= {name: statistics.median(numbers), f"{name}_min": min(numbers), f"{name}_max": max(numbers)}
    notes = list(one.placement.notes)
    if any(run.tokens != one.tokens for run in (warm, *runs)):
        notes.append("the tokens differ between its runs")
    if compiles := sum(run.compiles for run in runs):
        notes.append(f"the timed runs compiled {compiles} programs")
    return {
        **values,
        **FORMULA,
        **{name: getattr(one.placement, name) for name in COUNTS},
        "tokens_sha256": digest(one.tokens),
        "warmup_compiles": warm.compiles,
        "compiles": compiles,
        "note": "; ".join(notes) or None,
    }


def about(engine: Engine) -> dict:
    """What ran, and the memory kinds that the device offers to a controller that offloads."""
    host = None if engine.placement is None else engine.placement.host
    kinds = None if host is None else host.kinds
    ran = {"implementation": engine.implementation, "implementation_reason": engine.implementation_reason}
    return {**ran, "memory_kinds": kinds}


def digest(tokens: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the new tokens of all sequences, one after another, as little-endian int32."""
    return hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()


def price(system: System, work: Work, cost: Cost, trace: traces.Trace | None) -> dict:
    """Values of a modelled run that the budgets allow."""
    controller, setting = placement.parse(system.controller), systems.setting(system, work)
    groups = controller.groups(setting)
    policy = policies.parse(system.policy)
    notes = ("steps that attend everything are priced as all others",) if setting.refreshes else ()
    wanted, own = None, None
    if trace is not None and isinstance(policy, policies.Swa):
        whole = setting.batch if len(groups) > 1 else controller.layout(setting).whole
        wanted = traces.wanted(trace, setting.layers, whole, policy.selection_heads(work.config.n_kv_heads))
    elif isinstance(policy, policies.Swa):
        wanted, own = _alike(policy, setting, 1), _alike(policy, setting, setting.layers)
    elif setting.selects:
        wanted = traces.computed(policy, max(setting.final_tokens))
    found = simulate(controller, setting, cost, wanted)
    if own is not None and found.p2 < setting.new_tokens and not controller.reads_wanted:
        found = simulate(controller, setting, cost, own)  # what is deleted is recomputed as soon as one layer wants it
    return {
        "tokens_per_s": found.tokens_per_s,
        "prefill_s": found.prefill_s,
        "decode_s": found.total_s - found.prefill_s,
        **FORMULA,
        **{name: getattr(found, name) for name in PRICED},
        "effective_batch": max(part.batch for part in groups),
        "note": "; ".join((*found.notes, *notes)) or None,
    }


def _alike(policy: policies.Swa, setting: Setting, layers: int):
    counts = policy.counts(max(setting.final_tokens))
    return swa_trace(lambda n: int(counts.local[n]), lambda n: int(counts.top[n]), layers=layers)
