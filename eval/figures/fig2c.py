"""Figure 2c: seconds and memory of decode steps with a KV cache, and with the whole text run again at every step.

At step j, s + j tokens are past, s the prompt. With a cache one token is fed to the engine's own program of a decode step,
whose arrays are those of the context bucket (`kv/buckets.py`); without one the program of a prompt runs on all s + j + 1
tokens, padded to their bucket, and keeps nothing. Both programs exist once a bucket, so both curves step up where one ends.

Memory is what the arrays and programs say themselves: weights and cache are the bytes of live arrays, and the temporaries
are XLA's own account of the program that runs (`memory_analysis`). What the process holds beside these is not in it.
"""

import functools
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax import attention
from alisa_jax.engine import step
from alisa_jax.kv.buckets import bucket
from alisa_jax.kv.cache import KVState
from alisa_jax.kv.state import tree_bytes
from eval.drawing import costs
from eval.figures import base
from eval.modelled import shapes
from eval.script import common, inputs, resume
from eval.script.common import UserError
from eval.script.resume import Found, Setup
from eval.script.tables import Table, Versus, device
from eval.speed import timing

TITLE = "Decode steps with and without a KV cache"
SERIES = ("with cache", "without cache")
PUBLISHED = "alisa_fig2c"
WARM_UP = 1


def check(setup: Setup) -> None:
    """Raise UserError for a model that is not there or reads too few tokens."""
    config, name = setup.config("fig2c"), _model(setup)
    model, _ = shapes.config(name), inputs.card(name)
    needed = config["prompt_tokens"] + config["new_tokens"]
    if needed > model.max_positions:
        raise UserError(f"--model: {name} reads {model.max_positions} tokens at most, and {needed} are needed")


def records(setup: Setup) -> Found:
    """One record with a cache, one without."""
    config, card, device = setup.config("fig2c"), inputs.card(_model(setup), setup.dtype), jax.devices()[0]
    cells = [
        {
            "script": "eval.reproduce",
            "figure": "fig2c",
            **card.fields(),
            "series": series,
            **{name: config[name] for name in ("batch", "prompt_tokens", "new_tokens", "buckets", "every", "repeats")},
            "seed": setup.seed,
            "measured_on": f"{device.platform}: {device.device_kind}",
        }
        for series in SERIES
    ]

    @functools.cache
    def engine():
        return inputs.engine(setup.make_engine, inputs.model(setup.load, _model(setup)), "dense", "raw")

    def run(cell: dict) -> tuple[dict, dict]:
        measure = cached if cell["series"] == SERIES[0] else uncached
        values = measure(engine(), config, setup.seed)
        values["bucket_tokens"] = [bucket(config["prompt_tokens"] + j + 1) for j in values["step"]]
        return values, {"warmup": WARM_UP}

    return resume.collect(setup, cells, run, "fig2c")


def cached(engine, config: dict, seed: int) -> dict:
    """Every step by the engine's program of a decode step: lists of steps, seconds, and bytes by home."""
    tokens, s, n = _tokens(engine, config, seed), config["prompt_tokens"], config["new_tokens"]
    params, B = engine.model.params, config["batch"]
    chunk = jax.jit(functools.partial(step.generate_chunk, engine.model.decoder), donate_argnums=1)
    grow = jax.jit(
        lambda kv, S: KVState(tuple((attention.grow(state, S),) for (state,) in kv.layers)), static_argnums=1
    )
    more = jnp.zeros((B,), jnp.bool_), jnp.full((1,), -1, jnp.int32), jnp.int32(1)
    met = _buckets(config)
    S = met[0]
    kv, run, temporary = engine.init(B, S), None, 0
    found = {name: [] for name in ("step", "time_s", "cache_bytes", "temporary_bytes")}
    for at in range(s + n):
        if run is None or at == S:
            if run is not None:
                S = next(size for size in met if size > S)
                kv = grow(kv, S)
            run = chunk.lower(params, kv, tokens[:, at], *more).compile()
            temporary = _temporary(run)
            for _ in range(WARM_UP):  # on a state of its own: a step changes the one it is given
                jax.block_until_ready(run(params, jax.tree.map(jnp.copy, kv), tokens[:, at], *more))
        (_, kv), seconds = timing.timed(run, params, kv, tokens[:, at], *more)
        if at >= s and bucket(at + 1) == S:
            values = at - s, seconds, tree_bytes(kv), temporary
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
    return found | {"weight_bytes": tree_bytes(params)}


def uncached(engine, config: dict, seed: int) -> dict:
    """Some steps by the program of a prompt, of which only the last logits are kept; else as `cached`."""
    tokens, s, n = _tokens(engine, config, seed), config["prompt_tokens"], config["new_tokens"]
    params, B = engine.model.params, config["batch"]
    prompt = jax.jit(lambda *args: step.prefill(engine.model.decoder, engine.layers, *args)[0])
    found = {name: [] for name in ("step", "time_s", "cache_bytes", "temporary_bytes")}
    steps = [j for j in range(n) if j % config["every"] == 0 or j == n - 1 or _ends(s + j) or _ends(s + j + 1)]
    steps = [j for j in steps if bucket(s + j + 1) in _buckets(config)]
    for S, mine in itertools.groupby(steps, lambda j: bucket(s + j + 1)):
        some = jnp.pad(tokens[:, :S], ((0, 0), (0, max(0, S - tokens.shape[1]))))
        lengths = {j: jnp.full((B,), s + j + 1, jnp.int32) for j in mine}
        run = prompt.lower(params, some, next(iter(lengths.values()))).compile()
        for _ in range(WARM_UP):
            jax.block_until_ready(run(params, some, next(iter(lengths.values()))))
        for j, length in lengths.items():
            times = [timing.timed(run, params, some, length)[1] for _ in range(config["repeats"])]
            for name, value in zip(found, (j, statistics.median(times), 0, _temporary(run)), strict=True):
                found[name].append(value)
    return found | {"weight_bytes": tree_bytes(params)}


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """The first, the last and the steps beside a jump of either, with what they have grown by since step 0."""
    paper, mine = base.paper(PUBLISHED), {r["series"]: r for r in records}
    first = records[0] if records else None
    config = setup.config("fig2c")
    s, n = config["prompt_tokens"], config["new_tokens"]
    borders = {j for j in range(n) if _ends(s + j) or _ends(s + j + 1)}
    steps = sorted({0, n - 1, *borders, *paper["without_cache"]["time_s"]["step"]})
    rows, versus = [], []
    for series in SERIES:
        record, curves = mine.get(series), paper[series.replace(" ", "_")]
        last = steps[-1]
        for j in steps:
            time, memory = _time(record, j), _memory(record, j)
            grown = _over(time, _time(record, 0)), _over(memory, _memory(record, 0))
            published = [_published(curves[name], j) for name in ("time_s", "memory_gb")]
            starts = [_published(curves[name], 0) for name in ("time_s", "memory_gb")]
            theirs = [_over(x, x0) for x, x0 in zip(published, starts, strict=True)]
            rows.append(
                [
                    series,
                    str(j),
                    common.number(_at(record, "bucket_tokens", j), ".0f"),
                    common.number(time, ".1f", 1e3),
                    common.number(published[0], ".0f", 1e3),
                    *(common.number(_at(record, f"{home}_bytes", j), ".1f", 1e-6) for home in ("cache", "temporary")),
                    common.number(memory, ".1f", 1e-6),
                    common.number(published[1], ".1f"),
                    f"{common.number(grown[0], '.2f')} / {common.number(theirs[0], '.2f')}",
                    f"{common.number(grown[1], '.3f')} / {common.number(theirs[1], '.3f')}",
                ]
            )
            if j == last:
                for quantity, ours, other in zip(("seconds", "memory"), grown, theirs, strict=True):
                    versus.append(Versus(f"{series}: {quantity} of step {j} over step 0", "x", ours, other, "measured"))
    if first is None:
        caption = "Figure 2c. Nothing was run."
    else:
        caption = (
            "Figure 2c: a decode step with a KV cache, and with the whole text run again; "
            f"{first['model']} in {first['dtype']} stands in for {paper['workload']['model']}, batch {first['batch']} (the "
            f"paper's is not given), prompt of {s} tokens, on {device(records)}. Times: medians over the steps of a "
            "bucket, of which every one ran with a cache and some without. Memory: live arrays (weights, cache) and XLA's "
            "temporaries of the program that runs; growth: over step 0, ours / the paper's."
        )
    head = (
        "",
        "step",
        "bucket",
        "ms",
        "paper ms",
        "cache MB",
        "temporaries MB",
        "memory MB",
        "paper GB",
        "time",
        "memory",
    )
    jumps = ", ".join(str(j) for j in sorted(borders) if j and _ends(s + j))
    why = [
        f"Ours steps up where a context bucket is full (steps {jumps}), as a program is compiled for each bucket and pads "
        "to it; the paper's uncached curve jumps at steps 32 and 96, 64 tokens apart, as kernels with tiles of 64 rows do.",
        "The paper does not give its batch, which decides how much of the memory is cache.",
    ]
    return [Table(caption, head, rows, left=2, versus=versus, why=why)]


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """Both quantities over those of step 0."""
    paper, ours, theirs = base.paper(PUBLISHED), {}, {}
    for record in records:
        series = record["series"]
        curves = paper[series.replace(" ", "_")]
        own = {"time": [t / _time(record, 0) for t in record["time_s"]]}
        own["memory"] = [_memory(record, j) / _memory(record, 0) for j in record["step"]]
        ours[series] = {quantity: (record["step"], values) for quantity, values in own.items()}
        published = {"time": curves["time_s"], "memory": curves["memory_gb"]}.items()
        theirs[series] = {
            quantity: (curve["step"], [x / curve["values"][0] for x in curve["values"]])
            for quantity, curve in published
        }
    one = records[0]
    title = f"{one['model']}, batch {one['batch']}, prompt of {one['prompt_tokens']} tokens, on {device(records)}"
    return costs.caching(ours, theirs, f"{title}; paper: Figure 2c, {paper['workload']['model']}", path)


def _model(setup: Setup) -> str:
    """--model where it is a folder, else the shape of the config."""
    return setup.model if Path(setup.model).is_dir() else setup.config("fig2c")["model"]


def _tokens(engine, config: dict, seed: int) -> jax.Array:
    """Token ids [batch, prompt + new], drawn: what they are changes neither time nor bytes."""
    shape = config["batch"], config["prompt_tokens"] + config["new_tokens"]
    vocabulary = engine.model.decoder.config.vocab_size
    return jnp.asarray(np.random.default_rng([seed, 2]).integers(0, vocabulary, shape), jnp.int32)


def _buckets(config: dict) -> list[int]:
    """The buckets that are measured: all that the steps meet, or the first and the last."""
    met = sorted({bucket(config["prompt_tokens"] + j + 1) for j in range(config["new_tokens"])})
    return met if config["buckets"] == "all" else sorted({met[0], met[-1]})


def _ends(tokens: int) -> bool:
    """Whether `tokens` tokens fill a bucket."""
    return bucket(tokens) == tokens


def _temporary(program) -> int:
    """Bytes that a compiled program holds beside its arguments and results; 0 where XLA does not say."""
    memory = program.memory_analysis()
    return 0 if memory is None else int(memory.temp_size_in_bytes)


def _at(record: dict | None, name: str, j: int):
    return None if record is None or j not in record["step"] else record[name][record["step"].index(j)]


def _time(record: dict | None, j: int) -> float | None:
    """Median seconds of the steps that were measured in the bucket of step j: they run one program on arrays of one size."""
    size = _at(record, "bucket_tokens", j)
    if size is None:
        return None
    return statistics.median(t for t, S in zip(record["time_s"], record["bucket_tokens"], strict=True) if S == size)


def _memory(record: dict | None, j: int) -> int | None:
    """Bytes of weights, cache and temporaries at step j."""
    parts = [_at(record, f"{home}_bytes", j) for home in ("cache", "temporary")]
    return None if None in parts else record["weight_bytes"] + sum(parts)


def _published(curve: dict, j: int) -> float | None:
    return dict(zip(curve["step"], curve["values"], strict=True)).get(j)


def _over(x: float | None, y: float | None) -> float | None:
    return None if x is None or not y else x / y
