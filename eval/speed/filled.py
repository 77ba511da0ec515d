"""What `eval.growth` measures: decode steps at a context that no prompt was read for, decisions, and searches.

A run begins as that of `Engine.generate` under a placement, but its layers are filled and not computed: K and V are drawn,
the same for all systems of a context, and a policy that is seeded from attention is given rows that are drawn too. Pages,
rings, working sets and budgets are those that a prompt of this length leaves (`parts.fill` makes them). From there on every
step is the run's own.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from tqdm import tqdm

from alisa_jax import Engine, attention, placement, policies
from alisa_jax.attention import parts
from alisa_jax.engine.offload.run import PlacedRun
from alisa_jax.kv.state import LayerSpec
from alisa_jax.models import Model
from alisa_jax.placement import mover
from alisa_jax.placement.modelled import planner
from alisa_jax.placement.modelled.cost import Cost
from alisa_jax.placement.modelled.simulate import swa_trace, walk
from alisa_jax.placement.plan import PAGE_TOKENS
from eval.modelled import machines, shapes
from eval.script import inputs
from eval.script.common import UserError
from eval.speed import limits, models, seeded, systems, timing, traces
from eval.speed.systems import System, Work
from eval.text import windows

PASSES = 2  # over the same tokens: the first compiles, the second is timed


# ---- what a trained model selects


def recorded(name: str, policy: str, work: Work, source: windows.Source, load: Callable = inputs.load) -> traces.Trace:
    """What the trained model `name` selects under `policy` in the steps of `work`."""
    tokens = work.prompt_tokens[0] + work.new_tokens - 1
    model = models.stretched(inputs.model(load, name), tokens)
    sequences = traces.cut(source, model, tokens, len(work.prompt_tokens))
    if not sequences or len(sequences[0]) < tokens:
        raise UserError(f"--text: {source.name} has no {tokens} tokens in a row, which --trace needs")
    return traces.record(model, policies.parse(policy), sequences, work.prompt_tokens[0])


# ---- steps


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def fill(spec: LayerSpec, layout, N: int, K: int, H: int, x, length, host, key):
    """A layer's parts after prompts of `length` [B] tokens whose K and V are drawn, and the rows of the last part.

    x [B, T, D] of the prompts gives the sizes and the type; what lies below `host` [B] does not stay on the device.
    """
    B, T, _ = x.shape
    first, second, third = jax.random.split(key, 3)
    k, v = (jax.random.normal(one, (B, T, K, H), x.dtype) for one in (first, second))

    def rows(part):
        dims = attention.dims_of(spec, part.stop - part.first, N, K, part.context, H)
        return seeded.rows(spec.policy, dims, length[part.first : part.stop], third)

    return parts.fill(spec, layout, k, v, length, host, rows, N)


def filling(engine, seed: int) -> Callable:
    """The `read_layer` of a `PlacedRun` that fills a layer and hands x on."""
    c, number = engine.model.decoder.config, itertools.count()

    def read_layer(spec, layout, cuts, block, x, length, host):
        del block
        key = jax.random.fold_in(jax.random.key(seed), next(number))
        states, kept = fill(spec, layout, c.n_heads, c.n_kv_heads, c.head_dim, x, length, host, key)
        kept = jax.tree.map(np.asarray, kept) if cuts else None
        pages = [
            [parts.prompt_page(spec, kept, cut.sequences, page, PAGE_TOKENS) for page in range(cut.first, cut.stop)]
            for cut in cuts
        ]
        return x, states, pages

    return read_layer


def begun(engine, work: Work, seed: int) -> tuple[PlacedRun, list[np.ndarray]]:
    """A run of `engine` behind prompts that were filled, and its first new tokens [B, 1]."""
    rng = np.random.default_rng([seed, 1])
    length = np.asarray(work.prompt_tokens, np.int32)
    tokens = rng.integers(0, work.config.vocab_size, (len(length), int(length.max()))).astype(np.int32)
    setting = engine.placement.check(work.prompt_tokens, work.new_tokens)
    meter = mover.Meter(setting.device_kv_bytes, setting.host_kv_bytes)
    run = engine.placement.run(setting, meter, tokens, length, read_layer=filling(engine, seed))
    return run, [run.begin()[0]]


def rounds(
    engines: Mapping[System, Engine], work: Work, steps: int, seed: int
) -> dict[System, tuple[PlacedRun, np.ndarray, list[dict]]]:
    """All steps of `work` under every system, in rounds of `steps` steps, in turn.

    Returns the runs, their new tokens [B, n], and what each round took.

    The new tokens of `work` are one and a multiple of `steps`.
    """
    runs = {system: begun(one, work, seed) for system, one in engines.items()}
    found = {system: [] for system in runs}
    for stop in range(1 + steps, work.new_tokens + 1, steps):
        for system, (run, tokens) in runs.items():
            before = _counts(run)
            began = time.perf_counter()
            while run.made < stop:
                tokens.append(run.step(most=stop - run.made)[0])
            seconds = time.perf_counter() - began
            after = _counts(run)
            found[system].append({name: after[name] - before[name] for name in after} | {"seconds": seconds})
    return {s: (run, np.concatenate(tokens, axis=1), found[s]) for s, (run, tokens) in runs.items()}


def _counts(run: PlacedRun) -> dict:
    meter, names = run.meter, ("loaded_rows", "load_bytes", "store_bytes")
    counts = {name: getattr(meter, name) for name in names}
    return counts | {"decide_s": run.decide_s, "decisions": run.decisions, "compiles": run.placement.engine.compiles}


def steps(model: Model, chosen: Sequence[System], work: Work, size: int, seed: int, trace, impl: dict) -> dict:
    """Values of every system at the end of its context, by system; trace: a `Trace` for those that select by swa, or None.

    Each round is `size` steps. A system that the device budget refuses is OOM, and its note says why.
    """
    given = {s: work if placement.parse(s.controller).offloads else unlimited(work) for s in chosen}
    refused = {system: systems.refusal(system, given[system]) for system in chosen}
    layers = work.config.n_layers
    engines = {
        s: timing.build(
            model,
            traces.policy(s.policy, trace if selects(s) else None, layers),
            s.codec,
            s.controller,
            given[s].device_kv_bytes,
            given[s].host_kv_bytes,
            **impl,
        )
        for s in chosen
        if refused[s] is None
    }
    done = None
    for _ in tqdm(range(PASSES), desc="passes", disable=None, leave=False):
        done = None  # the arrays of the pass before make room
        done = rounds(engines, work, size, seed)
    sequences = {s: tokens for s, (_, tokens, _) in done.items()}
    found = {}
    for system in chosen:
        if refused[system] is not None:
            found[system] = {"seconds_per_step": "OOM", "note": refused[system]}
            continue
        run, _, took = done[system]
        alike = next(s for s in engines if s.policy == system.policy)
        found[system] = summarise(took, size) | {
            "agrees": float(np.mean(sequences[system] == sequences[alike])),
            "tokens_sha256": timing.digest(sequences[system].tolist()),
            "device_peak_bytes": run.meter.peak["device"],
            "host_peak_bytes": run.meter.peak["host"],
            "note": "; ".join(run.notes) or None,
            **({} if trace is None or not selects(system) else trace.fields()),
            **timing.about(engines[system]),
        }
    return found


def summarise(took: Sequence[Mapping], size: int) -> dict:
    """Medians of a run's rounds of `size` steps, by step; compiles are those of all rounds."""
    seconds = [one["seconds"] / size for one in took]
    values = {
        "seconds_per_step": statistics.median(seconds),
        "seconds_per_step_quartiles": [float(x) for x in np.percentile(seconds, [25, 75])],
        "decide_s_per_step": statistics.median(one["decide_s"] / size for one in took),
        "compiles": sum(one["compiles"] for one in took),
    }
    names = ("loaded_rows", "load_bytes", "store_bytes", "decisions")
    return values | {f"{name}_per_step": sum(one[name] for one in took) / (size * len(took)) for name in names}


def selects(system: System) -> bool:
    """Whether the policy of `system` is swa."""
    return isinstance(policies.parse(system.policy), policies.Swa)


def unlimited(work: Work) -> Work:
    """`work` without budgets."""
    return dataclasses.replace(work, device_kv_bytes=math.inf, host_kv_bytes=math.inf)


def attended_frac(policy: str, tokens: int) -> float:
    """The share of `tokens` cached tokens that a query attends besides itself."""
    return (limits.attended_tokens([policies.parse(policy)], [tokens]) - 1) / tokens


# ---- controllers and planner: plain Python, no arrays


def decisions(system: System, work: Work, repeats: int) -> dict:
    """Seconds that the controller of `system` takes to decide a step of `work`, median over steps and `repeats`.

    What an SWA wants is made up at the rate of trained models (`simulate.swa_trace`), each layer for itself.
    """
    if (reason := systems.refusal(system, work)) is not None:
        return {"decide_s": "OOM", "note": reason}
    controller, setting = placement.parse(system.controller), systems.setting(system, work)
    trace = None
    if setting.selects:
        counts = policies.parse(system.policy).counts(max(setting.final_tokens))
        trace = swa_trace(lambda n: int(counts.local[n]), lambda n: int(counts.top[n]), layers=setting.layers)
    views = [view for view, _, _ in walk(controller, setting, trace) if view.step]
    seconds = [_timed(controller.decide, view)[1] for _ in range(repeats) for view in views]
    rows = statistics.median(sum(map(len, (view.entering or {}).values())) for view in views)
    return {
        "decide_s": statistics.median(seconds),
        "decide_s_quartiles": [float(x) for x in np.percentile(seconds, [25, 75])],
        "entering_rows": float(rows),
        "wanted_rows": float(statistics.median(sum(map(len, (view.wanted or {}).values())) for view in views)),
        "note": None,
    }


def search(work: Work, policy: str, hardware: str, repeats: int) -> dict:
    """Seconds of the planner's search for `work` under an swa, and what it found; the machine only sets prices."""
    system = System("alisa", policy, "raw")
    setting = systems.setting(system, work)
    cost = Cost(machines.hardware(hardware), shapes.shape(work.config, shapes.codec("raw", work.dtype), work.dtype))
    problem = planner.problem(setting, cost, policies.parse(policy).kv_sparsity)
    seconds = []
    for _ in range(repeats):
        found, taken = _timed(planner.search, problem)
        seconds.append(taken)
    return {
        "search_s": statistics.median(seconds),
        "search_s_quartiles": [float(x) for x in np.percentile(seconds, [25, 75])],
        "p1": found.p1,
        "p2": found.p2,
        "alpha": found.alpha,
        "beta": found.beta,
        "excess_tokens": found.excess_tokens,
    }


def check_host(chosen: Sequence[System]) -> None:
    """Refuse controllers that offload where the machine cannot."""
    if any(placement.parse(system.controller).offloads for system in chosen):
        try:
            mover.self_test()
        except RuntimeError as error:
            raise UserError(f"--offload_dense, --offload_sparse: {error}") from None


def _timed(function: Callable, given) -> tuple:
    began = time.perf_counter()
    found = function(given)
    return found, time.perf_counter() - began
