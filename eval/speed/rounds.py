"""The rounds of `eval.bench`: each suite sets up its systems, runs them in turn and turns the times into values."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from tqdm import tqdm

from eval.script import common, inputs
from eval.script.common import UserError
from eval.speed import cells, limits, ours
from eval.speed import peers as bench_peers
from eval.speed.cells import Cell, System
from eval.speed.limits import Rates
from eval.text import windows


@dataclass
class Runs:
    """What one side did in its turns; without seconds where `reason` says why."""

    seconds: list[float] = field(default_factory=list)  # of the timed rounds
    outcomes: list = field(default_factory=list)  # of all rounds, the warm-up first
    compiles: int = 0  # during the timed rounds
    warmup_compiles: int = 0
    warmup_s: float = 0.0
    reason: str | None = None


def in_turn(sides: Mapping, jobs: Sequence[Callable], warmups: int, forgiven: Callable = lambda name: False) -> dict:
    """Let every side do the first `warmups` of `jobs` untimed, then the others, one side after the other: name -> Runs.

    A job is called with a side and returns when its outcome is ready. An error of a side that is `forgiven` ends it alone.
    """
    runs = {name: Runs() for name in sides}
    for turn, job in enumerate(tqdm(jobs, desc="rounds", disable=None, leave=False)):
        for name, side in sides.items():
            one, warm = runs[name], turn < warmups
            if one.reason is not None:
                continue
            before, began = side.compiles, time.perf_counter()
            try:
                outcome = job(side)
            except Exception as error:
                if not forgiven(name):
                    raise
                one.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                continue
            took, compiles = time.perf_counter() - began, side.compiles - before
            one.outcomes.append(outcome)
            if warm:
                one.warmup_s += took
                one.warmup_compiles += compiles
            else:
                one.seconds.append(took)
                one.compiles += compiles
    return runs


def decode(cell: Cell, systems: Mapping[str, System], values, machine: Rates) -> dict[str, dict]:
    """Values of every system in a cell of the suite decode."""
    start = cell.start(1 + cell.rounds + bool(values.profile))
    model, trace = ours.model(cell.model, cell.context, values.seed), None
    if cell.replays(systems, values.trace):
        trace = ours.trace(values.trace, cell, start, values.text)
    engines = {n: ours.engine(model, s, trace, values.attention_impl) for n, s in systems.items() if s.ours}
    for engine in engines.values():
        _serves(engine, cell, start)
    sides = {name: ours.Decoding(engine, cell, start) for name, engine in engines.items()}
    sides |= _peers(model, systems, lambda other, s: bench_peers.Decoding(other, s, cell, start))
    sides = {name: sides[name] for name in systems}
    shape = model.decoder.config
    for layer in tqdm(range(shape.n_layers), desc="caches", disable=None, leave=False):
        qkv = cells.drawn(shape, cell, start, values.seed, layer)
        for side in sides.values():
            side.fill(layer, *qkv)
    runs = in_turn(sides, [_advance] * (1 + cell.rounds), 1, lambda name: not systems[name].ours)
    _profile(values.profile, cell, {name: sides[name] for name in engines})
    at = range(start + cell.steps, start + (1 + cell.rounds) * cell.steps)  # of the timed steps
    reference = ours.engine(model, System(cells.OURS), None, values.attention_impl)
    found = {}
    for name, system in systems.items():
        engine = engines.get(name, reference)
        attended = limits.attended_tokens([layer.policy for layer in engine.layers], at)
        limit = limits.decode(model.decoder, engine.layers, cell.batch, attended, machine)
        more = {"start_tokens": start, "attended_tokens": attended}
        if trace is not None and system.policy == cells.SWA:
            more |= trace.fields()
        found[name] = timed(
            runs[name], sides[name], cell.steps, cell.batch * cell.steps, limit, "seconds_per_step", more
        )
    return agreed(found, runs, systems)


def prefill(cell: Cell, systems: Mapping[str, System], values, machine: Rates) -> dict[str, dict]:
    """Values of every system in a cell of the suite prefill."""
    model = ours.model(cell.model, cell.context, values.seed)
    shape = cell.batch, cell.context
    tokens = np.random.default_rng([values.seed, *shape]).integers(0, model.decoder.config.vocab_size, shape, np.int32)
    engines = {n: ours.engine(model, s, None, values.attention_impl) for n, s in systems.items() if s.ours}
    for engine in engines.values():
        _serves(engine, cell, cell.context)
    sides = {name: ours.Prefilling(engine, tokens) for name, engine in engines.items()}
    sides |= _peers(model, systems, lambda other, s: bench_peers.Prefilling(other, s, tokens))
    sides = {name: sides[name] for name in systems}
    runs = in_turn(sides, [_advance] * (1 + cell.rounds), 1, lambda name: not systems[name].ours)
    _profile(values.profile, cell, {name: sides[name] for name in engines})
    limit = limits.prefill(model.decoder, *shape, machine)
    found = {n: timed(runs[n], side, 1, cell.batch * cell.context, limit, "prefill_s", {}) for n, side in sides.items()}
    return agreed(found, runs, systems)


def perplexity(cell: Cell, systems: Mapping[str, System], values, machine: Rates) -> dict[str, dict]:
    """Values of every system in a cell of the suite perplexity: a round is a group of windows."""
    model = ours.model(cell.model, cell.context, values.seed)
    text = windows.tokenize(windows.read(values.text).characters, inputs.tokenizer(model), cell.tokens)
    plan = windows.plan(len(text.tokens), cell.context, cell.context - 1, model.bos_id is not None)
    sequences = [ids for w in plan if len(ids := windows.sequence(text, w, model.bos_id)) > 1]
    groups = [sequences[i : i + cell.batch] for i in range(0, len(sequences), cell.batch)]
    first = {(len(group), max(map(len, group))): group for group in groups}  # one group of each shape warms up
    sides, engines = {}, {}
    for name, system in systems.items():
        if system.ours:
            engines[name] = ours.engine(model, system, None, values.attention_impl)
            sides[name] = ours.Scoring(engines[name], system.protocol)
    sides |= _peers(model, systems, bench_peers.Scoring)
    sides = {name: sides[name] for name in systems}
    jobs = [lambda side, group=group: side.score(group) for group in (*first.values(), *groups)]
    runs = in_turn(sides, jobs, len(first), lambda name: not systems[name].ours)
    count = sum(len(ids) - 1 for ids in sequences)
    reference = ours.engine(model, System(cells.OURS), None, values.attention_impl)
    found = {}
    for name, one in runs.items():
        if one.reason is not None:
            found[name] = {"tokens_per_s": None, "note": one.reason}
            continue
        engine, system = engines.get(name, reference), systems[name]
        limit_s = sum(
            limits.scoring(model.decoder, engine.layers, group, system.protocol == "decode", machine)
            for group in groups
        )
        total, nll = sum(one.seconds), sum(one.outcomes[len(first) :]) / count
        each = [s / sum(len(ids) - 1 for ids in group) for s, group in zip(one.seconds, groups, strict=True)]
        found[name] = {
            "tokens_per_s": count / total,
            "score_s": total,
            "seconds_per_token_quartiles": [float(x) for x in np.percentile(each, [25, 75])],
            "n": count,
            "groups": len(groups),
            "nll_nats_per_token": nll,
            "warmup_s": one.warmup_s,
            "limit_s": limit_s,
            "limit_frac": limit_s / total,
            "compiles": one.compiles,
            "warmup_compiles": one.warmup_compiles,
            "note": None,
            **sides[name].values(),
        }
    peer = found.get("forward", {}).get("nll_nats_per_token")
    for name, got in found.items():
        if peer is not None and systems[name].policy == "dense" and "nll_nats_per_token" in got:
            got["nll_difference"] = abs(got["nll_nats_per_token"] - peer)
            got["agrees"] = float(got["nll_difference"] <= 1e-3)
    return found


SUITES = MappingProxyType({"decode": decode, "prefill": prefill, "perplexity": perplexity})


def timed(runs: Runs, side, parts: int, tokens: int, limit, what: str, more: dict) -> dict:
    """Values of a side whose rounds have `parts` equal parts and make `tokens` tokens; `what` names a part's seconds."""
    if runs.reason is not None:
        return {"tokens_per_s": None, "note": runs.reason}
    each = np.asarray(runs.seconds) / parts
    median = float(np.median(each))
    return {
        "tokens_per_s": tokens / parts / median,
        what: median,
        f"{what}_quartiles": [float(x) for x in np.percentile(each, [25, 75])],
        "limit_s": limit.seconds,
        "limit_frac": limit.seconds / median,
        "limit_of": limit.of,
        "limit_bytes": limit.read_bytes,
        "limit_flops": limit.flops,
        "compiles": runs.compiles,
        "warmup_compiles": runs.warmup_compiles,
        "warmup_s": runs.warmup_s,
        "note": None,
        **side.values(),
        **more,
    }


def agreed(found: dict[str, dict], runs: Mapping[str, Runs], systems: Mapping[str, System]) -> dict[str, dict]:
    """`found` with the share of tokens that are those of our dense row, and of that row those of the first peer."""
    whole = {name: np.stack(one.outcomes) for name, one in runs.items() if one.reason is None}
    peers = [name for name in whole if not systems[name].ours]
    for name, tokens in whole.items():
        other = whole.get("dense") if name != "dense" else whole.get(next(iter(peers), None))
        found[name]["agrees"] = None if other is None else float(np.mean(tokens == other))
    return found


def _advance(side):
    return side.advance()


def _peers(model, systems: Mapping[str, System], make: Callable) -> dict:
    """make(transformers model, system) for every peer."""
    wanted = {name: system for name, system in systems.items() if not system.ours}
    other = bench_peers.model(model) if wanted else None
    return {name: make(other, system) for name, system in wanted.items()}


def _serves(engine, cell: Cell, tokens: int) -> None:
    """Raise UserError unless the engine can begin with `tokens` tokens of the cell."""
    try:
        engine.check_calibration(np.array([tokens]))
        for layer in engine.layers:
            layer.policy.validate(cell.context)
    except ValueError as error:
        raise UserError(f"{cell.title}: {error}") from None


def _profile(folder: str | None, cell: Cell, sides: Mapping) -> None:
    """A trace of one more round of each of our sides."""
    for name, side in sides.items() if folder else ():
        where = Path(folder) / "".join(c if c.isalnum() else "_" for c in f"{cell.title} {name}")
        with jax.profiler.trace(str(where)):
            side.advance()
        common.say(f"a trace of {name} is in {where}")
