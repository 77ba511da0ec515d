"""Systems that run on the device at hand in place of the paper's: the measured rows of Figures 1 and 9.

A system is one of `eval.speed.systems`; it is built, run and measured as `eval.throughput` does. Under random weights SWA
hardly changes what it selects, so there it replays what it selects in the bundled model (`eval/speed/traces.py`).
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from alisa_jax import placement
from alisa_jax.placement import mover
from eval.modelled import shapes
from eval.script import inputs, tables
from eval.script.common import UserError
from eval.script.resume import Found, Setup
from eval.speed import systems, timing, traces
from eval.speed.systems import System, Work
from eval.text import windows

TRACE = "bundled"
COPIES = (
    "On a CPU the host's memory is the device's, so a copy is no PCIe link: bytes carry over, seconds of copies do not."
)


@dataclass(frozen=True)
class Job:
    """A run: `part` names it in the figure."""

    part: str
    system: System
    work: Work


def job(setup: Setup, part: str, system: str, batch: int, device_kv_bytes: float, size: Mapping) -> Job:
    """`batch` prompts of size["prompt_tokens"] tokens and size["new_tokens"] new ones; no limit on the host."""
    config, dtype = shapes.config(setup.model), inputs.resolved(setup.model, setup.dtype)
    tokens = size["prompt_tokens"] + size["new_tokens"]
    if tokens > config.max_positions:
        raise UserError(f"--model: {setup.model} has {config.max_positions} positions, and {part} needs {tokens}")
    prompts = (size["prompt_tokens"],) * batch
    return Job(part, systems.parse(system), Work(config, dtype, prompts, size["new_tokens"], device_kv_bytes))


def kv_bytes(setup: Setup, batch: int, size: Mapping) -> float:
    """The dense raw cache of a run at its end."""
    tokens = size["prompt_tokens"] + size["new_tokens"] - 1
    return systems.dense_kv_bytes(shapes.config(setup.model), inputs.resolved(setup.model, setup.dtype), batch, tokens)


def check(setup: Setup, jobs: Sequence[Job]) -> None:
    """Raise UserError where the model, the text or the machine cannot serve the jobs, whatever the budgets."""
    inputs.card(setup.model)
    for one in jobs:
        systems.refusal(one.system, one.work)
    if _reads(setup):
        windows.read(setup.text)
    if any(placement.parse(one.system.controller).offloads for one in jobs):
        try:
            mover.self_test()
        except RuntimeError as error:
            raise UserError(f"the device at hand offers no host memory to offload to: {error}") from None


def collect(setup: Setup, figure: str, jobs: Sequence[Job], repeats: int) -> Found:
    """The record of every job; those of equal prompts and lengths take turns. What the budget refuses is OOM."""
    source = windows.read(setup.text) if _reads(setup) else None
    cells = [_cell(setup, figure, one, repeats, source) for one in jobs]
    device = jax.devices()[0]
    here = {"platform": device.platform, "device_kind": device.device_kind}
    find = lambda cell: None if setup.results is None or setup.rerun else setup.results.find(cell | here)
    records = [find(cell) for cell in cells]
    reused, waiting = sum(record is not None for record in records), []
    for i, one in enumerate(jobs):
        reason = None if records[i] else systems.refusal(one.system, one.work)
        if reason is not None:
            records[i] = inputs.record(setup.results, cells[i], timing.oom(reason), None, {})
        elif records[i] is None:
            waiting.append(i)
    model = inputs.model(setup.load, setup.model) if waiting else None
    while waiting:
        work = jobs[waiting[0]].work
        turn = {jobs[i].system: i for i in waiting if jobs[i].work == work}
        waiting = [i for i in waiting if i not in turn.values()]

        def keep(system: System, values: dict, wall_s: float, turn=turn) -> None:
            i = turn[system]
            records[i] = inputs.record(setup.results, cells[i], values, wall_s, {"warmup": 1})

        built, prompts = _built(setup, model, list(turn), work, source), _prompts(setup, work, model, source)
        _compile(list(built.values()), prompts, work.new_tokens, setup.jobs)
        timing.measure(built, prompts, work.new_tokens, repeats, keep)
    return Found(records, reused)


def caption(records: Sequence[dict]) -> str:
    """Model, data and device of measured records."""
    one = records[0]
    trace = next((f", SWA selects as in {r['trace']}" for r in records if r["trace"] is not None), "")
    data = one["prompts"] if one["data"] is None else one["data"]
    runs = "one run" if one["repeats"] == 1 else f"medians of {one['repeats']} runs"
    return (
        f"Measured: {one['model']} in {one['dtype']} ({data}{trace}) on {tables.device(records)}, {runs} after a warm-up; "
        f"tokens/s = {timing.FORMULA['tokens_per_s_formula']}."
    )


def _reads(setup: Setup) -> bool:
    """A text is read: for the prompts, or for a trace."""
    return systems.has_tokenizer(setup.model) or _traced(setup)


def _traced(setup: Setup) -> bool:
    return setup.model.startswith("random:")


def _cell(setup: Setup, figure: str, one: Job, repeats: int, source) -> dict:
    traced = _traced(setup) and one.system.policy.startswith("swa")
    text = source if traced or systems.has_tokenizer(setup.model) else None
    return {
        "script": "eval.reproduce",
        "figure": figure,
        "part": one.part,
        **setup.card().fields(),
        **one.system.fields(),
        "dtype": one.work.dtype,
        "batch": len(one.work.prompt_tokens),
        "prompt_tokens": one.work.prompt_tokens[0],
        "new_tokens": one.work.new_tokens,
        "device_kv_bytes": one.work.device_kv_bytes,
        "prompts": "text" if systems.has_tokenizer(setup.model) else "drawn ids",
        "data": None if text is None else text.name,
        "data_sha256": None if text is None else text.sha256,
        "trace": TRACE if traced else None,
        "repeats": repeats,
        "seed": setup.seed,
    }


def _built(setup: Setup, model, turn: Sequence[System], work: Work, source) -> dict:
    traced = traces.recorded(TRACE, turn, work, source, setup.load) if _traced(setup) else {}
    policy = {one: traces.policy(one.policy, traced.get(one.policy), work.config.n_layers) for one in turn}
    budgets = work.device_kv_bytes, work.host_kv_bytes
    return {one: timing.build(model, policy[one], one.codec, one.controller, *budgets) for one in turn}


def _compile(built: Sequence, prompts: Sequence, new: int, jobs: int) -> None:
    """Run systems once, `jobs` at a time: what takes long is compiling, and that is not timed."""

    def once(one) -> None:
        try:
            one.generate(prompts, new)
        except jax.errors.JaxRuntimeError:  # as when two at a time do not fit; `timing.measure` runs each alone
            pass

    if jobs > 1:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(once, built))


def _prompts(setup: Setup, work: Work, model, source) -> list[list[int]]:
    """Token ids: windows of the text, or drawn ones where the model has no tokenizer."""
    batch, tokens = len(work.prompt_tokens), work.prompt_tokens[0]
    if not systems.has_tokenizer(setup.model):
        rng = np.random.default_rng([setup.seed, 1])
        return [rng.integers(0, work.config.vocab_size, tokens).tolist() for _ in range(batch)]
    cut = traces.cut(source, model, tokens, batch)
    if len(cut) < batch:
        raise UserError(f"--text: {source.name} has {len(cut)} windows of {tokens} tokens, fewer than {batch}")
    return cut
