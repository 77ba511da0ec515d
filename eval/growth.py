"""How cost grows with the context: a decode step dense and sparse, resident and offloaded; a decision; a search.

    python -m eval.growth --out=growth.jsonl --plot=growth.png
    python -m eval.growth --contexts=512 --contexts=1024 --contexts=2048 --trace=none --offload_dense=alisa

Four systems run: dense and --policy with the whole cache on the device, and both under a controller that keeps
--device_kv_frac of the dense KV there. Each decodes --repeats rounds of --steps steps and ends at a context of --contexts
tokens. The cost depends on shapes alone, so weights, K and V are random and no prompt is read (`eval/speed/filled.py`). What
an SWA selects depends on weights, so --trace makes it attend what it attends in a trained model (`eval/speed/traces.py`);
positions beyond that model's context are interpolated. Above --trace_tokens, and with --trace=none, the random model
selects, and its rows hardly move: see the columns `entering` and `rows/step`.

The model is --model with --layers layers and a vocabulary of --vocab_size tokens, because neither changes how a step grows.
By default K and V of a token take 8 layers x 2 x 768 x 4 = 49,152 bytes: 1.6 GB for one sequence of 32,768 tokens, at most
9 GB for all four systems with pages and staging, beside 0.3 GB of weights, of which a step reads 0.23 GB. With fewer than
six layers half of the KV has no room for the three layers that a dense stream has in flight.

All systems run each context twice, their rounds in turn; the first run compiles and is not timed. Seconds per step are
medians over rounds of --steps steps, 16 by default, in which one page fills and the page before leaves. `weights only` is
the dense step at the shortest context that the rounds allow. `decide` is the median time of `Controller.decide` alone,
`search` that of the planner, for --search_new_tokens new tokens and for half of the context; neither touches an array.
Growth is measured in three ways:

    slope       of log seconds over log context, over all contexts
    last slope  the same over the three longest contexts, of seconds less `weights only`
    a + b n     least squares of relative errors: a is the time at a context of 0 tokens, b the price of a token

`as designed` checks three things. Dense steps are linear: a last slope of 0.8 to 1.2. SWA's price of a token is 0.75 to 1.5
times the attended share of dense's on the device; offloaded, at most 1.5 times that share, where rows that stay are not
fetched again. Controllers are flat: a slope of at most 0.1. `traffic=paper` lists the r n rows that it fetches, so its
decisions are linear by design.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from alisa_jax import policies
from alisa_jax.placement.plan import PAGE_TOKENS
from eval.drawing import growth
from eval.modelled import machines, shapes
from eval.script import common, inputs
from eval.script.common import UserError
from eval.speed import filled, fits, models, systems
from eval.speed.systems import System, Work
from eval.text import windows

CONTEXTS = tuple(512 * 2**i for i in range(7))


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked one by one; raises UserError."""
    values = common.shared_flags("random:opt_125m", windows.BUNDLED, None)
    where, one = {"flag_values": values}, {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_multi_integer("contexts", None, "Tokens (repeatable; default: 512, 1024, ... 32768).", **one)
    flags.DEFINE_integer("layers", 8, "Layers of the model.", **one)
    flags.DEFINE_integer("vocab_size", 512, "Tokens that the model's head knows.", **one)
    flags.DEFINE_integer("batch", 1, "Sequences.", **one)
    flags.DEFINE_string("policy", "swa(kv_sparsity=0.8,window=64)", "The sparse policy, an swa.", **where)
    flags.DEFINE_string("codec", "raw", "How K and V are stored.", **where)
    flags.DEFINE_string("offload_dense", "flexgen", "The controller that offloads dense attention.", **where)
    flags.DEFINE_string("offload_sparse", "alisa", "The controller that offloads --policy.", **where)
    flags.DEFINE_float("device_kv_frac", 0.5, "Device budget of both, as a share of the dense KV.", 0.0, **where)
    flags.DEFINE_string("trace", "bundled", "The trained model whose selections are replayed, or none.", **where)
    flags.DEFINE_integer("trace_tokens", 32768, "The longest context that is replayed.", **one)
    flags.DEFINE_integer("steps", PAGE_TOKENS, "Steps of a round.", **one)
    flags.DEFINE_integer("repeats", 5, "Rounds.", **one)
    flags.DEFINE_integer("search_new_tokens", 128, "New tokens that the planner plans for.", **one)
    flags.DEFINE_string("hardware", "h100_80gb", "The machine that the planner prices.", **where)
    flags.DEFINE_bool("quick", False, "Contexts of 256 and 512 tokens, one round.", **where)
    flags.DEFINE_string("plot", None, "PNG file for the figure.", **where)
    common.dtype_flag(values)
    common.impl_flag(values)
    common.parse(values, argv, __doc__)
    if not values.model.startswith("random:"):
        raise UserError(f"--model must be random:NAME, as only its shape matters here, got {values.model!r}")
    values.dtype = inputs.resolved(values.model, values.dtype)
    values.contexts = sorted(set(values.contexts or ((256, 512) if values.quick else CONTEXTS)))
    values.repeats = 1 if values.quick else values.repeats
    for tokens in values.contexts:
        if tokens % PAGE_TOKENS or tokens <= _base(values):
            raise UserError(
                f"--contexts must be multiples of {PAGE_TOKENS} above {_base(values)}, of which --repeats x --steps are "
                f"decoded, got {tokens}"
            )
    if not values.search_new_tokens < min(values.contexts):
        raise UserError(f"--search_new_tokens must be below the contexts, got {values.search_new_tokens}")
    if not isinstance(policies.parse(inputs.policy(values.policy)), policies.Swa):
        raise UserError(f"--policy must be an swa, whose selections can be replayed, got {values.policy!r}")
    if values.trace.startswith("random:"):
        raise UserError(f"--trace: the weights of {values.trace} are random; give bundled, a trained model, or none")
    if values.plot is not None and not Path(values.plot).parent.is_dir():
        raise UserError(f"--plot: there is no folder {str(Path(values.plot).parent)!r}")
    return values


def _base(values) -> int:
    """The context of `weights only`: a page, and the steps."""
    return PAGE_TOKENS * (1 + -(-values.repeats * values.steps // PAGE_TOKENS))


class Cast(NamedTuple):
    """The systems, in the order of the table."""

    dense: System
    sparse: System
    away_dense: System
    away_sparse: System
    paper: System  # of which decisions alone are timed

    @property
    def steps(self) -> tuple[System, ...]:
        return self[:4]

    @property
    def decides(self) -> tuple[System, ...]:
        return self[2:]


def cast(values) -> Cast:
    """The systems that the flags name."""
    make = lambda controller, policy: systems.parse(f"{controller} | {policy} | {values.codec}")
    found = Cast(
        make("resident", "dense"),
        make("resident", values.policy),
        make(values.offload_dense, "dense"),
        make(values.offload_sparse, values.policy),
        make("alisa(traffic=paper)", values.policy),
    )
    if len(set(found.steps)) < 4:
        raise UserError("--offload_dense and --offload_sparse must name controllers that offload, not resident")
    return found


def main(argv: Sequence[str], measure: Callable = filled.steps, record: Callable = filled.recorded) -> None:
    """flags -> systems -> a context after the other -> records. The arguments beside `argv` are for tests."""
    values = config(argv)
    inputs.check_impl(values.attention_impl)
    card, chosen = inputs.card(values.model), cast(values)
    shape = dataclasses.replace(shapes.config(values.model), n_layers=values.layers, vocab_size=values.vocab_size)
    shape = dataclasses.replace(shape, max_positions=max(values.contexts) + 1)
    traced = None if values.trace == "none" else inputs.card(values.trace)
    source = None if traced is None else windows.read(values.text)
    machines.hardware(values.hardware)
    works = {n: _work(values, shape, n) for n in (_base(values), *values.contexts)}
    for system in chosen:  # what no budget could make possible
        systems.refusal(system, filled.unlimited(works[max(works)]))
    filled.check_host(chosen.steps)
    results = inputs.results(values.out)
    find = lambda cell: None if results is None or values.rerun else results.find(cell | inputs.here())

    found, reused, model = [], 0, None
    for tokens, work in works.items():
        cells = _step_cells(values, card, chosen, tokens, traced, source)
        made = [find(cell) for cell in cells.values()]
        reused += None not in made
        if None in made:  # times of one context belong together
            common.say(
                f"{tokens} tokens: {len(cells)} systems, {values.repeats} rounds of {values.steps} steps in turn"
            )
            began = time.perf_counter()
            model = model or models.random_weights(shape, values.dtype, values.seed, values.model)
            replays = next(iter(cells.values()))["trace"] is not None
            trace = record(values.trace, chosen.sparse.policy, work, source) if replays else None
            impl = common.impl_field(values.attention_impl)
            new = measure(model, tuple(cells), work, values.steps, values.seed, trace, impl)
            wall_s, how = time.perf_counter() - began, {"passes": filled.PASSES}
            for system in cells:
                new[system] |= {"attended_frac": filled.attended_frac(system.policy, tokens)}
            made = [inputs.record(results, cell, new[system], wall_s, how) for system, cell in cells.items()]
        found += made
        for cell, run in () if tokens == _base(values) else _plans(values, card, chosen, tokens, work):
            old, began = find(cell), time.perf_counter()
            found.append(old or inputs.record(results, cell, run(), time.perf_counter() - began, {}))
    if reused:
        common.say(f"{reused} of {len(works)} contexts were in {values.out}; --rerun runs them again")
    common.emit(found, report(found, chosen), values.json)
    if values.plot:
        common.say(growth.plot(found, chosen, Path(values.plot)))


def _work(values, shape, tokens: int) -> Work:
    """Steps that end at `tokens` tokens, with the budget of those that offload."""
    decoded = values.repeats * values.steps
    budget = values.device_kv_frac * systems.dense_kv_bytes(shape, values.dtype, values.batch, tokens)
    return Work(shape, values.dtype, (tokens - decoded,) * values.batch, decoded + 1, budget)


def _step_cells(values, card, chosen: Cast, tokens: int, traced, source) -> dict[System, dict]:
    """The cells of the systems that step at a context; of the shortest, those that are resident."""
    replays = traced is not None and tokens <= values.trace_tokens
    how = {
        "steps": values.steps,
        "rounds": values.repeats,
        "trace": traced.name if replays else None,
        "trace_sha256": traced.sha256 if replays else None,
        "data": source.name if replays else None,
        "data_sha256": source.sha256 if replays else None,
        **common.impl_field(values.attention_impl),
    }
    wanted = chosen.steps[:2] if tokens == _base(values) else chosen.steps
    return {system: _cell(values, card, system, tokens, "step") | how for system in wanted}


def _plans(values, card, chosen: Cast, tokens: int, work: Work) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Cells of decisions and searches at a context, and what runs each."""
    for system in chosen.decides:
        cell = _cell(values, card, system, tokens, "decide") | {"steps": values.steps, "rounds": values.repeats}
        yield cell, functools.partial(filled.decisions, system, work, values.repeats)
    for rule, new in (("fixed", values.search_new_tokens), ("half", tokens // 2)):
        cell = _cell(values, card, chosen.away_sparse, tokens, "search") | {"rounds": values.repeats}
        cell |= {"new_tokens_rule": rule, "new_tokens": new, "hardware": values.hardware}
        some = dataclasses.replace(work, prompt_tokens=(tokens - new,) * values.batch, new_tokens=new)
        yield cell, functools.partial(filled.search, some, chosen.sparse.policy, values.hardware, values.repeats)


def _cell(values, card, system: System, tokens: int, part: str) -> dict:
    """The fields that identify a record of any part."""
    return {
        "script": "eval.growth",
        "measured_part": part,
        **card.fields(),
        **system.fields(),
        "n_layers": values.layers,
        "vocab_size": values.vocab_size,
        "dtype": values.dtype,
        "batch": values.batch,
        "context_tokens": tokens,
        "device_kv_frac": values.device_kv_frac,
        "seed": values.seed,
    }


def report(records: Sequence[dict], chosen: Cast) -> str:
    """The tables for people: seconds and ratios by context, what the steps did, and how all of it grows."""
    found, weights_s = fits.series(records)
    first, sparse = records[0], chosen.sparse.policy
    ms = lambda value: common.number(value, ".3g", 1e3)
    by = {(r["context_tokens"], r["placement"], r["policy"]): r for r in records if r["measured_part"] == "step"}
    rows, details, whys = [], [], []
    for tokens in sorted({n for n, *_ in by}):
        mine = [by.get((tokens, s.controller, s.policy)) for s in chosen.steps]
        row = [str(tokens), *(ms(None if r is None else r["seconds_per_step"]) for r in mine)]
        pair = [r["seconds_per_step"] for r in mine[:2]]
        whole, above = fits.ratios(pair[1], pair[0], weights_s) if "OOM" not in pair else (None, None)
        rows.append([*row, *(common.number(x, ".2f") for x in (whole, above, mine[1]["attended_frac"]))])
        for r in filter(None, mine):
            name = f"{r['placement']} | {r['policy']}"
            if r["seconds_per_step"] == "OOM":
                whys.append(f"{name} at {tokens}: {r['note']}")
                continue
            entering = common.number(r.get("trace_loaded_tokens"), ".2f")
            numbers = [f"{r['loaded_rows_per_step']:.1f}", machines.bytes_text(r["load_bytes_per_step"])]
            numbers += [f"{1e6 * r['decide_s_per_step']:.0f}", str(r["compiles"]), f"{r['agrees']:.2f}"]
            details.append([name, str(tokens), entering, *numbers, r["trace"] or "-"])
    growths = []
    for one in found.values():
        own = fits.growth(one.seconds, weights_s if one.part == "step" else 0.0)
        us = [common.number(own.base_s, ".1f", 1e6), common.number(own.token_s, ".3g", 1e9)]
        design = f"{one.share:.2f} x dense" if one.design == "share" else one.design
        said = {True: "yes", False: "no", None: "-"}[fits.as_designed(one, found, weights_s)]
        growths.append([one.name, *(common.number(x, ".2f") for x in own[:2]), *us, design, said])
    plans = [[one.name, *(ms(one.seconds.get(n)) for n in sorted(found_contexts(found)))] for one in found.values()]
    plans = [row for row, one in zip(plans, found.values(), strict=True) if one.part != "step"]
    above = (
        f"{first['model']} with {first['n_layers']} layers and {first['vocab_size']} tokens, {first['dtype']}, B = "
        f"{first['batch']}, {first['device_kind']}, {first['cpu_count']} cores; offloaded with {first['device_kv_frac']:g} "
        f"of the dense KV on the device; medians of {first['rounds']} rounds of {first['steps']} steps in turn, ms a step; "
        f"weights only: {ms(weights_s)} ms"
    )
    names = [s.controller + " | " + ("dense" if s.policy == "dense" else "sparse") for s in chosen.steps]
    parts = [
        f"{above}; sparse: {sparse}",
        common.table(["context", *names, "sparse/dense", "less weights", "attended"], rows),
        common.table(
            [
                "what a step did",
                "context",
                "entering",
                "rows/step",
                "loaded",
                "decide us",
                "compiles",
                "agrees",
                "trace",
            ],
            details,
        ),
        common.table(["ms", *map(str, sorted(found_contexts(found)))], plans),
        common.table(["growth", "slope", "last slope", "a us", "b ns/token", "design", "as designed"], growths),
    ]
    return "\n\n".join(parts + whys)


def found_contexts(found: Mapping) -> set[int]:
    """All contexts of some series."""
    return {n for one in found.values() for n in one.seconds}


if __name__ == "__main__":
    sys.exit(common.run(main))
