"""Seconds until a prompt is read: dense, GemFilter at several layers, and methods that read prompts densely.

    python -m eval.bench_prefill --layers=1 --layers=3 --layers=5 --layers=8 --out=bench_prefill.jsonl
    python -m eval.bench_prefill --model=random:pythia_70m --lengths=3776 --layers=1 --layers=2

The cost depends on shapes alone, so weights and tokens are random, and the model gets as many positions as the longest
prompt needs. `Engine.generate` reads a prompt and returns one new token; `prefill_s` ends when that token is known, so it
includes the choice of the prompt's tokens and the way of their ids through the host. For each length all policies run once
untimed, which compiles, then --repeats times in turn; dense on a prompt of --tokens tokens takes part.

    expected    (layer + 1) / L x dense + dense on --tokens tokens        what the method's authors compute
    least       layer / L x dense + dense on --tokens tokens              `layer` computes only queries and keys here

Both take the medians of the same turns. A policy that reads the whole prompt (`--also`) is expected to take as long as
dense. `dense x` is the median of dense over that of the policy. Prompts are padded to context buckets, so lengths and
--tokens that are buckets (224, 480, 960, 1920, 3776, ...) waste nothing.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from alisa_jax import policies
from alisa_jax.kv.buckets import bucket
from eval.modelled import shapes
from eval.script import common, inputs
from eval.script.common import UserError
from eval.speed import models
from eval.text import windows

DENSE, SHORT = "dense", "dense on --tokens tokens"
EXPECTED = "(reads_layer + 1) / n_layers * dense_prefill_s + short_prefill_s"


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked one by one; raises UserError."""
    values = common.shared_flags("random:opt_125m", windows.BUNDLED, None)
    del values.text  # none is read
    where, one = {"flag_values": values}, {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_multi_integer("lengths", [960, 1920], "Tokens of a prompt (repeatable).", **one)
    flags.DEFINE_multi_integer("layers", None, "A layer that chooses (repeatable; default: GemFilter's own).", **where)
    flags.DEFINE_integer("tokens", 224, "Tokens that are chosen.", **one)
    flags.DEFINE_multi_string("also", None, "A policy that reads prompts whole (repeatable; default: snapkv).", **where)
    flags.DEFINE_integer("batch", 1, "Prompts that are read together.", **one)
    flags.DEFINE_integer("repeats", 5, "Timed runs of each; the table shows medians.", lower_bound=5, **where)
    common.dtype_flag(values)
    common.impl_flag(values)
    common.parse(values, argv, __doc__)
    if not values.model.startswith("random:"):
        raise UserError(f"--model must be random:NAME, as only its shape matters here, got {values.model!r}")
    values.dtype = inputs.resolved(values.model, values.dtype)
    for length in values.lengths:
        if length <= values.tokens:
            raise UserError(f"--lengths must be above --tokens, {values.tokens}, for a choice to be made, got {length}")
    return values


def systems(values, shape) -> dict[str, policies.Policy]:
    """Canonical texts of the policies, and what each is for a model of `shape`; dense is the first."""
    asked = [f"gemfilter(layer={layer},tokens={values.tokens})" for layer in values.layers or ()]
    whole = values.also or [f"snapkv(capacity={max(values.tokens, 64)})"]  # more than its window
    asked = [DENSE, *(asked or [f"gemfilter(tokens={values.tokens})"]), *whole]
    found = {}
    for text in map(inputs.policy, asked):
        try:
            found[text] = policies.parse(text).resolve(shape, None)
        except ValueError as error:
            raise UserError(f"{text}: {error}") from None
    for text in map(inputs.policy, whole):
        if found[text].reads_layer(max(values.lengths)) is not None:
            raise UserError(f"--also is for policies that read the whole prompt; give --layers for {text}")
    return found


def main(argv: Sequence[str], make: Callable | None = None) -> None:
    """flags -> policies -> runs in turn -> records. make(policy) gives what runs it; for tests."""
    values = config(argv)
    inputs.check_impl(values.attention_impl)
    card, shape = inputs.card(values.model), shapes.config(values.model)
    shape = dataclasses.replace(shape, max_positions=max(shape.max_positions, max(values.lengths) + 1))
    chosen = systems(values, shape)
    results = inputs.results(values.out)
    cells = {length: {text: _cell(values, card, length, text) for text in chosen} for length in values.lengths}
    here, done = inputs.here(), {}
    for length, row in cells.items():
        done[length] = [None if results is None or values.rerun else results.find(cell | here) for cell in row.values()]
    waiting = [length for length, old in done.items() if None in old]  # times of one length belong together
    if len(waiting) < len(cells):
        common.say(f"{len(cells) - len(waiting)} of {len(cells)} lengths were in {values.out}; --rerun runs them again")
    make = make or (_maker(values, shape) if waiting else None)
    engines = {text: make(text) for text in chosen} if waiting else {}
    for length in waiting:
        common.say(f"{length} tokens: {len(chosen) + 1} kinds of runs, {values.repeats + 1} times in turn")
        runs, done[length] = measure(engines, shape.vocab_size, values, length), []
        for text, policy in chosen.items():
            found = summarise(runs, text, policy.reads_layer(length), shape.n_layers, length, values.tokens)
            ran = {name: getattr(engines[text], name) for name in ("implementation", "implementation_reason")}
            how = ran | {"warmup": 1, "repeats": values.repeats, "compiles": runs[text].compiles}
            done[length].append(inputs.record(results, cells[length][text], found, runs[text].wall_s, how))
    found = [record for row in done.values() for record in row]
    common.emit(found, report(found), values.json)


def _maker(values, shape) -> Callable:
    """make(policy): an engine of that policy; all have one model."""
    model = models.random_weights(shape, values.dtype, values.seed, values.model)
    return lambda policy: inputs.engine(inputs.make_engine, model, policy, "raw", values.attention_impl)


class Runs(NamedTuple):
    """What was measured of one policy at one length."""

    seconds: list[float]  # `prefill_s` of every timed run
    compiles: int  # programs that the timed runs compiled
    wall_s: float  # all of its runs


def measure(engines: Mapping, vocab_size: int, values, length: int) -> dict[str, Runs]:
    """The runs of each policy on prompts of `length` tokens, and of `SHORT`, in turn."""
    draw = np.random.default_rng([values.seed, length]).integers
    prompts, short = (draw(0, vocab_size, (values.batch, n)).tolist() for n in (length, values.tokens))
    jobs = {text: (engine, prompts) for text, engine in engines.items()} | {SHORT: (engines[DENSE], short)}
    made = {name: [] for name in jobs}
    with tqdm(total=len(jobs) * (values.repeats + 1), desc="runs", unit="run", disable=None, leave=False) as bar:
        for _ in range(values.repeats + 1):
            for name, (engine, what) in jobs.items():
                made[name].append(engine.generate(what, 1))
                bar.update()
    return {
        name: Runs([r.prefill_s for r in runs[1:]], sum(r.compiles for r in runs[1:]), sum(r.wall_s for r in runs))
        for name, runs in made.items()
    }


def summarise(runs: Mapping[str, Runs], text: str, layer: int | None, n_layers: int, length: int, tokens: int) -> dict:
    """Values of one policy at one length; layer: the one that it reads, or None where it reads the prompt whole."""
    median = {name: statistics.median(one.seconds) for name, one in runs.items()}
    dense, short = median[DENSE], median[SHORT]
    values = {
        "prefill_s": median[text],
        "prefill_s_quartiles": [float(x) for x in np.percentile(runs[text].seconds, [25, 75])],
        "dense_prefill_s": dense,
        "speedup": dense / median[text],
        "n_layers": n_layers,
        "bucket_tokens": bucket(length),
    }
    if layer is None:
        return values | {"expected_s": dense}
    return values | {
        "reads_layer": layer,
        "short_bucket_tokens": bucket(tokens),
        "short_prefill_s": short,
        "expected_s": (layer + 1) / n_layers * dense + short,
        "expected_s_formula": EXPECTED,
        "least_s": layer / n_layers * dense + short,
    }


def report(found: Sequence[dict]) -> str:
    """The table for people; the settings that all rows share stand above."""
    head = "prompt policy prefill_s quartiles expected_s least_s dense_x expected_x".split()
    rows = []
    for r in found:
        quartiles = " - ".join(common.number(x, ".3f") for x in r["prefill_s_quartiles"])
        row = [str(r["prompt_tokens"]), r["policy"], common.number(r["prefill_s"], ".3f"), quartiles]
        row += [common.number(r["expected_s"], ".3f"), common.number(r.get("least_s"), ".3f")]
        rows.append([*row, f"{r['speedup']:.2f}x", f"{r['dense_prefill_s'] / r['expected_s']:.2f}x"])
    r = found[0]
    above = (
        f"{r['model']}, {r['n_layers']} layers, {r['dtype']}, B = {r['batch']}, {r['device_kind']}, {r['cpu_count']} cores; "
        f"medians of {r['repeats']} runs in turn"
    )
    return f"{above}\n{common.table(head, rows, left=2)}"


def _cell(values, card: inputs.Card, length: int, policy: str) -> dict:
    """The fields that identify a record."""
    return {
        "script": "eval.bench_prefill",
        **card.fields(),
        "policy": policy,
        "codec": "raw",
        "placement": "resident",
        "dtype": values.dtype,
        "batch": values.batch,
        "prompt_tokens": length,
        "tokens": values.tokens,
        "seed": values.seed,
        **common.impl_field(values.attention_impl),
    }


if __name__ == "__main__":
    sys.exit(common.run(main))
