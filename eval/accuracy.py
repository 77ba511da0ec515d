"""Accuracy of a model under one or more KV policies: multiple choice by log-likelihood, and generated recall tasks.

    python -m eval.accuracy --task=needle --policy=dense --policy='swa(kv_sparsity=0.8)'
    python -m eval.accuracy --model=FOLDER --task=piqa --task_file=piqa.jsonl --task=copa --task_file=copa.jsonl \\
        --policy=dense --policy='swa(kv_sparsity=0.8)' --out=accuracy.jsonl --samples=samples.jsonl

It prints a row for each task and policy, and for `needle` a grid of lengths and depths for each policy; the bundled model
finds nearly all needles under `dense`. `piqa`, `copa`, `openbookqa` and `winogrande` come from one `--task_file` each, in
the order of the tasks, or from the `datasets` library (the extra `tasks`). They use `--shots` and `--limit`;
`eval/text/tasks.py` defines their forms, prompts and worked examples. `recall`, `copy`, `needle` and `shift` are generated
and use `--lengths`, `--items` and `--depths` (`eval/text/planted.py`).

    acc         choices: items whose right choice has the largest log-likelihood; generated tasks: right answer tokens
    acc_norm    choices: as acc, with the log-likelihood over the bytes of the choice
    exact       generated tasks: items of which every answer token is right

Every choice is scored as its own sequence, from an empty cache. Under `decode` the choices of an item share the steps of
their context, unless that differs from choice to choice (winogrande). `attended` and bytes per token average over all
decoded tokens. ± is one standard error over items, for needles over draws; `chance` is the accuracy of guessing. Nothing is
ever cut: a sequence longer than the model's context is an error before anything is scored.

Protocols: `decode` goes token by token through the decode path. `prefill_mask` is one pass with the causal selection mask
row by row. `prompt` does what `generate` does: it reads the tokens before the answers as a dense prompt, the policy takes
what it keeps from it, and the answers are decoded; it is the protocol for methods that compress a prompt. With
--question=after the prompt of a generated task ends before the question, so the policy chooses without knowing it.
`--placement` says where the cache lives, within `--device_kv_bytes` and `--host_kv_bytes` (not with prefill_mask).
`--samples` writes one line per item of each cell; a cell that is finished in `--out` runs again if that file lacks it.
"""

import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from eval.script import common, hashes, inputs, measure
from eval.script.common import UserError
from eval.text import planted, tasks, windows

PROTOCOLS = ("decode", "prefill_mask", "prompt")
QUESTIONS = ("prompt", "after")


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked as far as they can be without model and files; raises UserError.

    task_file: {task: file}. limit: None for all.
    """
    values = common.shared_flags(model="bundled", text=windows.BUNDLED, out=None)
    where = {"flag_values": values}
    flags.DEFINE_multi_string("task", ["needle"], f"Of {', '.join(tasks.NAMES + planted.NAMES)}; repeatable.", **where)
    flags.DEFINE_multi_string("task_file", [], "JSON lines for a task that is read; one for each of them.", **where)
    flags.DEFINE_integer("shots", 4, "Worked examples before each item of a task that is read.", 0, **where)
    flags.DEFINE_integer("limit", 0, "First items of each task that is read; 0 for all.", 0, **where)
    flags.DEFINE_list("lengths", ["128", "256", "512"], "Tokens of the sequences of generated tasks.", **where)
    flags.DEFINE_list("depths", ["0", "0.25", "0.5", "0.75", "1"], "Where needles are, 0..1.", **where)
    flags.DEFINE_integer("items", 4, "Generated items of each length; of needles, at each depth.", 1, **where)
    flags.DEFINE_multi_string("policy", ["dense"], "Policy spec; may be given several times.", **where)
    flags.DEFINE_string("codec", "raw", "How K and V are stored.", **where)
    flags.DEFINE_enum("protocol", "decode", PROTOCOLS, "How the policy is applied.", **where)
    flags.DEFINE_enum("question", "prompt", QUESTIONS, "Under protocol prompt: where the question is.", **where)
    flags.DEFINE_integer("batch", 8, "Sequences that run together.", 1, **where)
    flags.DEFINE_string(
        "samples", None, "JSON-lines file of single items: what was asked and what was chosen.", **where
    )
    common.placement_flags(values)
    common.dtype_flag(values)
    common.impl_flag(values)
    common.parse(values, argv, __doc__)
    names = tuple(dict.fromkeys(values.task))
    for name in names:
        if name not in tasks.NAMES + planted.NAMES:
            raise UserError(f"--task: unknown task {name!r}; known: {', '.join(tasks.NAMES + planted.NAMES)}")
    read = [name for name in names if name in tasks.NAMES]
    if values.task_file and len(values.task_file) != len(read):
        what = f"{', '.join(read)} are read from files" if read else "no --task is read from a file"
        raise UserError(f"--task_file goes with each task that is read: {what}, got {len(values.task_file)} files")
    if values.question == "after" and (values.protocol != "prompt" or read):
        raise UserError("--question=after goes with --protocol=prompt and generated tasks alone")
    if not 0 <= values.seed < 2**32:
        raise UserError(f"--seed must be in 0..{2**32 - 1}, got {values.seed}")
    if values.model.startswith("random:"):
        raise UserError(f"--model: {values.model} has no tokenizer, which a task needs")
    values.task = names
    values.task_file = dict(zip(read, values.task_file, strict=False))
    values.limit = values.limit or None
    values.lengths = _numbers("--lengths", values.lengths, int)
    values.depths = _numbers("--depths", values.depths, float)
    values.policy = tuple(dict.fromkeys(inputs.policy(text) for text in values.policy))
    values.codec = inputs.codec(values.codec)
    values.placement = inputs.placement(values)
    return values


def _numbers(flag: str, given: Sequence[str], kind: type) -> tuple:
    try:
        found = tuple(dict.fromkeys(kind(text) for text in given))
    except ValueError:
        found = ()
    if not found:
        raise UserError(f"{flag} must be numbers with commas between them, got {','.join(given)!r}")
    return found


def main(argv: Sequence[str], load: Callable = inputs.load, make_engine: Callable = inputs.make_engine) -> None:
    """flags -> config -> load -> loop -> records. The arguments beside `argv` are for tests."""
    values = config(argv)
    inputs.check_impl(values.attention_impl)
    card = inputs.card(values.model, values.dtype)
    if set(values.task) & set(planted.NAMES):
        planted.check_lengths(values.lengths, values.depths, card.max_positions, card.name)
    source = windows.read(values.text) if "needle" in values.task else None
    read = {name: _read(name, values) for name in values.task if name in tasks.NAMES}
    results, samples = inputs.results(values.out), Samples(values.samples)
    model = inputs.model(inputs.loading(load, values.dtype), values.model)
    inputs.tokenizer(model)
    made = [_made(name, values, read, source, model) for name in values.task]
    for task in made:
        check(task, values, card)

    @functools.cache
    def engine(policy: str):
        placed = common.placement_fields(values)
        return inputs.engine(make_engine, model, policy, values.codec, values.attention_impl, placed)

    cells = [(task, cell(task, policy, values, card)) for task in made for policy in values.policy]
    records, reused = [], 0
    for task, fields in tqdm(cells, desc="cells", disable=None, leave=False):
        found = None if results is None or values.rerun or not samples.has(fields) else results.find(fields)
        reused += found is not None
        if found is None:
            began = time.perf_counter()
            one = engine(fields["policy"])
            placed = common.placement_fields(values) != common.RESIDENT
            got, ran, lines = evaluate(one, task, values.batch, values.protocol, values.question, placed)
            samples.put(fields, lines)
            found = inputs.record(results, fields, got, time.perf_counter() - began, ran)
        records.append(found)

    if reused:
        common.say(f"{reused} of {len(records)} cells were already in {values.out}; --rerun measures them again")
    common.emit(records, report(records), values.json)


def _read(name: str, values) -> tasks.Task:
    task = tasks.read(name, values.task_file[name]) if name in values.task_file else tasks.from_hub(name)
    tasks.check_shots(task, values.shots)
    return task


def _made(name: str, values, read, source, model):
    """The task `name` as sequences of tokens: `Choices` or `Planted`."""
    if name in read:
        return tasks.Choices(read[name], model, values.shots, values.seed, values.limit)
    if name == "needle":
        return planted.needles(model, source, values.lengths, values.depths, values.items, values.seed)
    return planted.draw(name, model, values.lengths, values.items, values.seed)


def check(task, values, card: inputs.Card) -> None:
    """Raise UserError, which names the item, where a sequence fits neither the model's context nor codec nor policies."""
    needed = inputs.calibration_tokens(values.codec)
    sizes = [len(ids) for ids in task.sequences]
    for name, size in zip(task.names, sizes, strict=True):
        if size > card.max_positions:
            raise UserError(
                f"{name} has {size} tokens, and the context of {card.name} is {card.max_positions}: nothing is cut,"
                f" so give fewer --shots, a smaller --limit or another model"
            )
        if size <= needed:
            raise UserError(
                f"--codec: {values.codec} takes its range from the first {needed} tokens of a sequence, and {name} has"
                f" {size}: give fewer calibration_tokens, or axis=token"
            )
    for policy in values.policy:
        inputs.check_policy(policy, max(sizes))


def cell(task, policy: str, values, card: inputs.Card) -> dict:
    """The fields that identify a record."""
    return {
        "script": "eval.accuracy",
        **card.fields(),
        **task.fields,
        "ids_sha256": hashes.of_ids(task.sequences),
        "policy": policy,
        "codec": values.codec,
        **common.placement_fields(values),
        "protocol": values.protocol,
        **({"question": values.question} if values.protocol == "prompt" else {}),
        "batch": values.batch,
        "seed": values.seed,
        **common.impl_field(values.attention_impl),
    }


def evaluate(
    engine, task, batch: int, protocol: str, question: str = "prompt", placed: bool = False
) -> tuple[dict, dict, list[dict]]:
    """Score every sequence of `task`, the longest items first; returns (values, how they were got, samples).

    placed: a placement may refuse a batch, and is asked before anything runs.
    """
    sequences, last = task.sequences, task.last
    if last is None and protocol == "prompt":
        last = task.ends(question)
    logprobs, correct, scores = [None] * len(sequences), [None] * len(sequences), []
    groups = batches([len(ids) for ids in sequences], task.alike, batch)
    wanted_of = lambda group: None if last is None else [last[i] for i in group]
    if placed:
        given = [[sequences[i] for i in group] for group in groups]
        inputs.check_placed(engine, given, protocol, None if last is None else [wanted_of(group) for group in groups])
    for group in tqdm(groups, desc="batches", disable=None, leave=False):
        wanted = wanted_of(group)
        score = engine.score([sequences[i] for i in group], protocol=protocol, last=wanted)
        for i, row, right in zip(group, score.logprobs, score.correct, strict=True):
            logprobs[i], correct[i] = row, right
        scores.append(score)
    values, lines = task.judge(logprobs, correct)
    return (
        {**values, **measure.footprint(scores), "longest_tokens": max(map(len, sequences))},
        measure.how(scores),
        lines,
    )


def batches(sizes: Sequence[int], alike: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
    """Sequences of `sizes` tokens in groups of at most `batch`, the longest first; those that are `alike` stay together.

    What is alike and more than `batch` is cut.
    """
    pieces = [some[i : i + batch] for some in alike for i in range(0, len(some), batch)]
    groups = []
    for piece in sorted(pieces, key=lambda some: -max(sizes[i] for i in some)):
        if not groups or len(groups[-1]) + len(piece) > batch:
            groups.append([])
        groups[-1] += piece
    return groups


class Samples:
    """A file of samples, one line for each item, in which every cell stands at most once; None: no file."""

    def __init__(self, path: str | None):
        self.path = None if path is None else Path(path)
        self.lines: list[tuple[str, str]] = []  # cell, line
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+", encoding="utf-8") as file:
                file.seek(0)
                self.lines = [(json.loads(line)["cell"], line) for line in file]
        except OSError as error:
            raise UserError(f"--samples: cannot write to {path!r}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--samples: {path!r} holds something that is no sample; give another file") from None

    @staticmethod
    def _name(fields: dict) -> str:
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def has(self, fields: dict) -> bool:
        """Whether the samples of the cell `fields` are there, or are not asked for."""
        return self.path is None or self._name(fields) in {name for name, _ in self.lines}

    def put(self, fields: dict, samples: Sequence[dict]) -> None:
        """Write the samples of a cell, in place of older ones; the file is replaced in one step."""
        if self.path is None:
            return
        name, keys = self._name(fields), ("task", "policy", "codec", "protocol", "seed")
        head = {"cell": name, **{key: fields[key] for key in keys}}
        new = [(name, json.dumps({**head, "index": i, **s}) + "\n") for i, s in enumerate(samples)]
        self.lines = [(other, line) for other, line in self.lines if other != name] + new
        common.write(self.path, "".join(line for _, line in self.lines))


def report(records: Sequence[dict]) -> str:
    """The tables for people; the settings that all rows share stand above."""
    head = "task policy acc acc_norm exact n chance attended KV_B/token ran s".split()
    rows, below, data = [], [], {}
    for r in records:
        attended = common.number(r["attended_frac"], ".1f", 100) + " %"
        row = [r["task"], r["policy"], *(_percent(r, key) for key in ("acc", "acc_norm", "exact_match")), str(r["n"])]
        row += [common.number(r.get("chance"), ".2f"), attended, common.number(r["kv_bytes_per_token"], ".0f")]
        rows.append([*row, r["implementation"], common.number(r["wall_s"], ".1f")])
        asked = f"{r['shots']} shots" if "shots" in r else f"{r['items']} items"
        data[r["task"]] = (
            f"{r['task']}: {r['data']} ({r['data_sha256'][:12]}), {asked}, at most {r['longest_tokens']} tokens"
        )
        if "acc_by_length_and_depth" in r:
            below.append(common.table(*planted.grid(r["acc_by_length_and_depth"], f"needle, {r['policy']}")))
    r = records[0]
    above = (
        f"{r['model']}, protocol {r['protocol']}, codec {r['codec']}, placement {r['placement']}, seed {r['seed']}; "
    )
    above += "± is one standard error"
    return "\n".join([above, *data.values(), common.table(head, rows, left=2), *below])


def _percent(record: dict, key: str) -> str:
    text = common.number(record.get(key), ".1f", 100, record.get(f"{key}_stderr"))
    return text if text == "-" else f"{text} %"


if __name__ == "__main__":
    sys.exit(common.run(main))
