"""Every method at the same bytes of KV cache: quality, tasks that find where each one fails, bytes and times.

    python -m eval.compare                                       the bundled model, minutes on 2 CPU cores
    python -m eval.compare --share=0.25 --codec=raw --codec=int4 --methods=swa,h2o --out=compare.jsonl --figure=compare.png
    python -m eval.compare --model=FOLDER --text=FILE --prompt_tokens=448

`--share` is a share of the bytes of K and V that dense, uncompressed attention holds at the end, of P prompt tokens and N
new ones. What a codec stores per sequence is subtracted; the rest is room for tokens in that codec's bytes. A method that
keeps all new tokens keeps N fewer of the prompt. A method that holds every token and reads a few spends the share on what a
step reads, including the labels that it searches.

    held      bytes of the arrays of K and V on the device at the end, including context buckets and spare slots
    read      bytes of K and V of the tokens that a decode step attends, including labels
    stats     bytes of scores, labels, positions and the like per token of the context; not in `held`

Rows are every policy of the registry that has a size (`Policy.sized`) with every `--codec`, and dense attention with every
codec whose own bytes fit. The protocol is `prompt` (`Engine.score`): the model reads a dense prompt, the method takes what
it keeps from it, and N tokens are decoded. `eval/quality/sample.py` defines the tasks. Differences are from dense attention
on the same windows and draws, ± one standard error of the paired difference, * above two. Below each table: the parts of
the sample (text, tasks, depths) where a method is worse than dense by more than two standard errors, and those where not.

`--placement` runs all rows under a controller; those that it refuses are listed below the tables.

Times are medians of `--repeats` warm runs of `generate` on one `--batch` of the text's prompts.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from alisa_jax import policies
from eval.drawing import compare
from eval.quality import rows as compare_rows
from eval.quality import sample as compare_sample
from eval.quality import tables
from eval.quality.rows import Entry
from eval.quality.sample import LEAST_FRAC, TASKS, Sample, Sizes, Task
from eval.script import common, inputs, measure
from eval.script.common import UserError
from eval.text import planted, windows

PROMPT_TOKENS, NEW_TOKENS = 448, 32  # together a context bucket, so that arrays have few spare slots


@dataclass(frozen=True)
class Config:
    """The command line, checked as far as it can be without model and files."""

    values: flags.FlagValues
    shares: tuple[float, ...]
    codecs: tuple[str, ...]
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    sizes: Sizes
    card: inputs.Card


def config(argv: Sequence[str]) -> Config:
    """Flags to a Config; raises UserError."""
    values = common.shared_flags(model="bundled", text=windows.BUNDLED, out=None)
    where = {"flag_values": values}
    flags.DEFINE_multi_float("share", [0.5, 0.25, 0.125], "Bytes of K and V over dense, uncompressed.", **where)
    flags.DEFINE_multi_string("codec", ["raw"], "Codec that policies are combined with; repeatable.", **where)
    flags.DEFINE_list("methods", [], "Policies by name, comma-separated. Default: all.", **where)
    flags.DEFINE_list("tasks", list(TASKS), f"Of {', '.join(TASKS)}, comma-separated.", **where)
    flags.DEFINE_integer("prompt_tokens", None, f"P. Default: {PROMPT_TOKENS}, or what the context leaves.", **where)
    flags.DEFINE_integer("new_tokens", NEW_TOKENS, "N.", 8, **where)
    flags.DEFINE_integer("windows", 16, "Windows of the text.", 1, **where)
    flags.DEFINE_integer("items", 4, "Needles at each depth; times the depths, items of the other tasks.", 1, **where)
    flags.DEFINE_list("depths", ["0.5", "1"], "Where needles are, 0..1.", **where)
    flags.DEFINE_integer("batch", 8, "Sequences that run together.", 1, **where)
    flags.DEFINE_integer("repeats", 3, "Timed runs; 0 for no times.", 0, **where)
    flags.DEFINE_string("figure", None, "PNG file; needs matplotlib.", **where)
    flags.DEFINE_string("page", None, "Markdown file of the tables.", **where)
    common.placement_flags(values)
    common.dtype_flag(values)
    common.impl_flag(values)
    common.parse(values, argv, __doc__)
    values.placement = inputs.placement(values)
    for share in values.share:
        if not 0 < share <= 1:
            raise UserError(f"--share must be above 0 and at most 1, got {share:g}")
    for flag, given, known in (("methods", values.methods, policies.POLICIES), ("tasks", values.tasks, TASKS)):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"--{flag}: unknown name {unknown[0]!r}; known: {', '.join(known)}")
    try:
        depths = tuple(dict.fromkeys(float(text) for text in values.depths))
    except ValueError:
        depths = ()
    if not depths:
        raise UserError(f"--depths must be numbers with commas between them, got {','.join(values.depths)!r}")
    card = inputs.card(values.model, values.dtype)
    most = card.max_positions - values.new_tokens
    prompt = min(PROMPT_TOKENS, most) if values.prompt_tokens is None else values.prompt_tokens
    if not 32 <= prompt <= most:
        raise UserError(f"--prompt_tokens must be in 32..{most}, what --new_tokens leaves of the context, got {prompt}")
    planted.check_lengths((), depths, card.max_positions, card.name)
    return Config(
        values,
        tuple(dict.fromkeys(values.share)),
        tuple(dict.fromkeys(inputs.codec(text) for text in values.codec)),
        tuple(values.methods) or tuple(policies.POLICIES),
        tuple(name for name in TASKS if name in values.tasks),
        Sizes(prompt, values.new_tokens, values.windows, values.items, depths),
        card,
    )


def main(argv: Sequence[str], load: Callable = inputs.load, make_engine: Callable = inputs.make_engine) -> None:
    """flags -> config -> load -> loop -> records. The arguments beside `argv` are for tests."""
    setup = config(argv)
    values, sizes = setup.values, setup.sizes
    inputs.check_impl(values.attention_impl)
    source = windows.read(values.text)
    results = inputs.results(values.out)
    model = inputs.model(inputs.loading(load, values.dtype), values.model)
    sample = compare_sample.draw(model, source, sizes, setup.tasks, values.seed)
    entries, refused = compare_rows.candidates(model, setup.shares, setup.codecs, setup.methods, sizes)
    reused = 0

    def measured(entry: Entry, dense: dict | None = None) -> dict | None:
        """The record of a row, from file or from a run; None where the engine refuses the pair."""
        nonlocal reused
        tasks = [task for task in sample.tasks if dense is None or task.name in dense["told_apart"]]
        fields = cell(setup, source, sample, [task.name for task in tasks], entry)
        found = None if results is None or values.rerun else results.find(fields)
        reused += found is not None
        if found is not None:
            return found
        began = time.perf_counter()
        try:
            engine = inputs.engine(
                make_engine, model, entry.policy, entry.codec, values.attention_impl, common.placement_fields(values)
            )
            engine.validate(sizes.tokens, sizes.prompt_tokens)
            engine.check_calibration(np.array([sizes.prompt_tokens - planted.QUESTION_TOKENS]))
            if engine.placement is not None:
                fed = engine.policy.feeds(np.full(values.batch, sizes.prompt_tokens))
                engine.placement.check(fed.tolist(), sizes.new_tokens)
        except (UserError, ValueError) as error:
            refused[str(entry)] = str(error).removeprefix("--policy: ")
            return None
        got, ran = evaluate(engine, sample, tasks, setup)
        got |= compare_rows.traffic(got, dense, entry, model, sizes)
        return inputs.record(results, fields, got, time.perf_counter() - began, ran)

    first = Entry("dense", "raw")
    dense = measured(first)
    if dense is None:
        raise UserError(f"{first}: {refused[str(first)]}")
    for name in dense["tasks"]:
        if name not in dense["told_apart"]:
            right = f"{100 * dense[f'{name}_accuracy_frac']:.0f} %"
            common.say(
                f"{name} is left out: dense attention gets {right} of it right, too little to tell methods apart"
            )
    records = {first: dense}
    for entry in tqdm(entries, desc="cells", disable=None, leave=False):
        if (record := measured(entry, dense)) is not None:
            records[entry] = record
    if reused:
        common.say(f"{reused} of {len(records)} cells were already in {values.out}; --rerun measures them again")
    rows = {share: compare_rows.listed(records, share) for share in setup.shares}
    common.emit(records.values(), tables.text(rows, dense, refused), values.json)
    if values.page:
        common.write(Path(values.page), tables.page(rows, dense, refused))
    if values.figure:
        common.say(compare.plot(rows, dense, Path(values.figure)))


def evaluate(engine, sample: Sample, tasks: Sequence[Task], setup: Config) -> tuple[dict, dict]:
    """Score the sample and time its prompts; returns (values, how they were got)."""
    sizes, values = setup.sizes, setup.values
    text = _score(engine, sample.sequences, [sizes.new_tokens] * len(sample.sequences), values.batch)
    got, scores = compare_sample.text_values(sample, [row for s in text for row in s.logprobs]), list(text)
    for task in tqdm(tasks, desc="tasks", disable=None, leave=False):
        found = _score(engine, task.sequences, task.last, values.batch)
        got |= compare_sample.task_values(task, [row for s in found for row in s.correct])
        scores += found
    got["told_apart"] = [t.name for t in tasks if got[f"{t.name}_accuracy_frac"] >= LEAST_FRAC]
    prompts = [ids[: sizes.prompt_tokens] for ids in sample.sequences[: values.batch]]
    times = times_of(engine, prompts, sizes.new_tokens, values.repeats)
    return {**got, **measure.footprint(text), **times}, {
        **measure.how(scores),
        "warmup": min(1, values.repeats),
        "repeats": values.repeats,
    }


def _score(engine, sequences, last, batch: int) -> list:
    groups = [slice(i, i + batch) for i in range(0, len(sequences), batch)]
    return [engine.score(sequences[group], protocol="prompt", last=last[group]) for group in groups]


def times_of(engine, prompts: Sequence[Sequence[int]], new: int, repeats: int) -> dict:
    """Median seconds of a prefill and of a decode step over warm runs; None without runs."""
    runs = [engine.generate(prompts, new, eos_ids=()) for _ in range(repeats + 1 if repeats else 0)][1:]
    return {
        "prefill_s": statistics.median(run.prefill_s for run in runs) if runs else None,
        "decode_step_s": statistics.median(run.decode_s for run in runs) / (new - 1) if runs else None,
        "timed_sequences": len(prompts),
    }


def cell(setup: Config, source: windows.Source, sample: Sample, tasks: Sequence[str], entry: Entry) -> dict:
    """The fields that identify a record."""
    values, sizes = setup.values, setup.sizes
    return {
        "script": "eval.compare",
        **setup.card.fields(),
        **source.fields,
        "policy": entry.policy,
        "codec": entry.codec,
        "share": entry.share,
        **common.placement_fields(values),
        "protocol": "prompt",
        "prompt_tokens": sizes.prompt_tokens,
        "new_tokens": sizes.new_tokens,
        "windows_asked": sizes.windows,
        "items_each": sizes.items,
        "depths_frac": sizes.depths,
        "tasks": tuple(tasks),
        "sample_sha256": sample.sha256,
        "batch": values.batch,
        "timed_runs": values.repeats,
        "seed": values.seed,
        **common.impl_field(values.attention_impl),
    }


if __name__ == "__main__":
    sys.exit(common.run(main))
