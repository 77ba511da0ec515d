"""Multiple-choice tasks: read from a file or the hub, checked, put into words, and judged by log-likelihood.

A file has one JSON object per line. `piqa`, `copa` and `openbookqa`: "query", "choices" (two texts or more) and "gold", the
index of the right choice from 0. `winogrande`: "context_options", the sentence up to and with each filled-in word, one
common "continuation", and "gold". Without a file the validation split of the hub's copy is read (OpenBookQA: test) and put
into the same form. The prompts are those of lm-evaluation-harness:

    piqa         "Question: ", the goal, a new line, "Answer:"               each solution, after a space
    copa         the premise without its full stop, "because" | "therefore"  each alternative, its first letter small
    openbookqa   the stem of the question                                    each choice
    winogrande   the sentence with each word in its blank                    the rest of the sentence (partial scoring)

The query of a file is taken as it stands; for piqa it begins with "Question: ", and "Answer:" is put after it. `shots`
worked examples stand before an item, each with an empty line after it. Those of item i are other items of the same data,
drawn without repetition by a generator of the seed and i, so they depend on neither limit nor batch. Nothing is ever cut.

Text to tokens: a prompt with its continuation is encoded as one text, and its tokens beyond as many as the prompt alone has
are the continuation. Spaces that end a prompt go to the continuation. `acc` takes the choice whose continuation has the
largest sum of log-probabilities, `acc_norm` that of the largest sum over the UTF-8 bytes of the continuation, without the
space before it (in WinoGrande the two are the same); the first of equals is taken. For ASCII that is the harness's acc_norm;
elsewhere the harness divides by characters, and calls the quotient by bytes acc_bytes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum, isfinite
from pathlib import Path
from types import MappingProxyType

import numpy as np

from eval.script import common
from eval.script.common import UserError

BETWEEN_EXAMPLES = "\n\n"
HUB = MappingProxyType(  # name on the hub, configuration, split
    {
        "piqa": ("baber/piqa", None, "validation"),
        "copa": ("aps/super_glue", "copa", "validation"),
        "openbookqa": ("allenai/openbookqa", "main", "test"),
        "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    }
)
NAMES = tuple(HUB)


@dataclass(frozen=True)
class Item:
    """One question: `contexts` [n] and `continuations` [n], one of each per choice, of which `label` is right."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    label: int
    where: str  # file and line, for messages

    @property
    def example(self) -> str:
        """The item with its right answer, as a worked example."""
        return f"{self.contexts[self.label]} {self.continuations[self.label]}"

    @property
    def partial(self) -> bool:
        """Whether the choices are in the contexts, with one continuation common to them."""
        return len(set(self.contexts)) > 1

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts that differ between the choices."""
        return self.contexts if self.partial else self.continuations


@dataclass(frozen=True)
class Task:
    """A task as read: its name, the name and the SHA-256 of its data, and its items."""

    name: str
    data: str
    sha256: str
    items: tuple[Item, ...]


def read(name: str, path: str) -> Task:
    """The task `name` from a file of JSON lines; raises UserError that names the line."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--task_file: cannot read {path!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--task_file: {path!r} is not UTF-8: byte {error.start} cannot be decoded") from None
    name_of = Path(path).name
    lines = [(f"{name_of}, line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"--task_file: {path!r} is empty")
    items = tuple(_item(name, _object(line, where), where) for where, line in lines)
    return Task(name, name_of, hashlib.sha256(data).hexdigest(), items)


def _object(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object, but {line.strip():.60}")
    return row


def _item(name: str, row: Mapping, where: str) -> Item:
    """One object in the form of the files to an item; raises UserError that says which field is wrong."""
    if name == "winogrande":
        contexts = _texts(row, "context_options", where)
        return Item(contexts, (_text(row, "continuation", where),) * len(contexts), _label(row, contexts, where), where)
    query, choices = _text(row, "query", where), _texts(row, "choices", where)
    if name == "piqa":
        query = query.rstrip("\n") + "\nAnswer:"
    return Item((query,) * len(choices), choices, _label(row, choices, where), where)


def _field(row: Mapping, key: str, where: str):
    if key not in row:
        raise UserError(f"{where}: the field {key!r} is missing; it has {', '.join(row) or 'none'}")
    return row[key]


def _text(row: Mapping, key: str, where: str) -> str:
    value = _field(row, key, where)
    if not _is_text(value):
        raise UserError(f"{where}: {key!r} must be a text and not empty, got {json.dumps(value):.60}")
    return value


def _texts(row: Mapping, key: str, where: str) -> tuple[str, ...]:
    value = _field(row, key, where)
    if not isinstance(value, list) or len(value) < 2 or not all(_is_text(v) for v in value):
        raise UserError(
            f"{where}: {key!r} must be a list of two texts or more, none of them empty, got {json.dumps(value):.60}"
        )
    return tuple(value)


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _label(row: Mapping, choices: Sequence[str], where: str) -> int:
    value = _field(row, "gold", where)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise UserError(f"{where}: 'gold' must be in 0..{len(choices) - 1}, got {json.dumps(value):.60}")
    return value


def from_hub(name: str) -> Task:
    """The task `name` by the `datasets` library; raises UserError where it is absent or cannot load the data."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--task={name} without a --task_file needs the datasets library: pip install 'alisa-jax[tasks]'"
        ) from None
    path, configuration, split = HUB[name]
    try:
        rows = [_from_hub(name, row) for row in datasets.load_dataset(path, configuration, split=split)]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--task={name}: {path} could not be loaded ({first}); a --task_file needs no network"
        ) from None
    digest = hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode())
    items = tuple(_item(name, row, f"{path}, row {i}") for i, row in enumerate(rows))
    return Task(name, f"{path}:{split}", digest.hexdigest(), items)


def _from_hub(name: str, row: Mapping) -> dict:
    """One row as the hub has it to the form of the files."""
    if name == "piqa":
        return {"query": f"Question: {row['goal']}\n", "choices": [row["sol1"], row["sol2"]], "gold": row["label"]}
    if name == "copa":
        word = {"cause": "because", "effect": "therefore"}[row["question"]]
        choices = [text[:1].lower() + text[1:] for text in (row["choice1"], row["choice2"])]
        return {"query": f"{row['premise'].strip()[:-1]} {word}", "choices": choices, "gold": row["label"]}
    if name == "openbookqa":
        texts, letters = row["choices"]["text"], list(row["choices"]["label"])
        return {"query": row["question_stem"], "choices": list(texts), "gold": letters.index(row["answerKey"].strip())}
    before, _, after = row["sentence"].partition("_")
    options = [before + row["option1"], before + row["option2"]]
    return {"context_options": options, "continuation": after.strip(), "gold": int(row["answer"]) - 1}


def examples(task: Task, index: int, shots: int, seed: int) -> list[int]:
    """Which items stand before item `index`, in their order: `shots` different ones and never itself."""
    drawn = np.random.default_rng([seed, index]).choice(len(task.items) - 1, shots, replace=False) if shots else ()
    return [int(i) + (i >= index) for i in drawn]


def check_shots(task: Task, shots: int) -> None:
    """Raise UserError where the task has not as many other items as there are examples."""
    if shots >= len(task.items):
        raise UserError(f"--shots must be in 0..{len(task.items) - 1} for the items of {task.data}, got {shots}")


def encode(model, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of the two texts joined, and how many of them, at the end, are the continuation.

    What the tokenizer puts behind a text, an EOS, is left out: it is no part of the continuation.
    """
    from alisa_jax.models import tokenizer as text_side

    _, behind = text_side.around(model.tokenizer)
    context_tokens = len(model.encode(context.rstrip())) - len(behind)
    whole = model.encode(context + continuation)
    whole = whole[: len(whole) - len(behind)]
    return whole, len(whole) - context_tokens


@dataclass(frozen=True, eq=False)
class Choices:
    """The first `limit` items of a task (None: all), put into words for `model`; one sequence for every choice."""

    task: Task
    model: object
    shots: int
    seed: int
    limit: int | None

    @property
    def fields(self) -> dict:
        """What identifies the task in a record."""
        return {
            "task": self.task.name,
            "data": self.task.data,
            "data_sha256": self.task.sha256,
            "shots": self.shots,
            "limit": self.limit,
        }

    @property
    def items(self) -> tuple[Item, ...]:
        """The items that are scored."""
        return self.task.items[: self.limit]

    @cached_property
    def prefixes(self) -> list[str]:
        """The worked examples before each item, as one text."""
        drawn = [examples(self.task, i, self.shots, self.seed) for i in range(len(self.items))]
        return ["".join(self.task.items[j].example + BETWEEN_EXAMPLES for j in row) for row in drawn]

    @cached_property
    def encoded(self) -> list[tuple[list[int], int]]:
        """As `encode` gives it, item after item and choice after choice; raises UserError for what cannot be scored."""
        made = []
        for prefix, item in zip(self.prefixes, self.items, strict=True):
            for context, continuation in zip(item.contexts, item.continuations, strict=True):
                ids, scored = encode(self.model, prefix + context, " " + continuation)
                if not 0 < scored < len(ids):
                    raise UserError(f"{item.where}: the tokenizer leaves no token of {continuation!r:.60} to score")
                made.append((ids, scored))
        return made

    @property
    def sequences(self) -> list[list[int]]:
        """Token ids, item after item and choice after choice."""
        return [ids for ids, _ in self.encoded]

    @property
    def last(self) -> list[int]:
        """How many tokens at the end of each sequence are scored."""
        return [scored for _, scored in self.encoded]

    @property
    def alike(self) -> list[list[int]]:
        """The sequences of each item."""
        numbers = iter(range(len(self.encoded)))
        return [[next(numbers) for _ in item.contexts] for item in self.items]

    @property
    def names(self) -> list[str]:
        """What each sequence is called in a message."""
        shots = f" with {self.shots} shots" if self.shots else ""
        return [item.where + shots for item in self.items for _ in item.contexts]

    def judge(self, logprobs: Sequence[np.ndarray], correct) -> tuple[dict, list[dict]]:
        """The values of a record, and a sample for each item. `logprobs[i]`: of all tokens of sequence i but its first."""
        del correct
        rows = zip(logprobs, self.encoded, strict=True)
        sums = iter([fsum(np.asarray(row, np.float64)[len(row) - scored :]) for row, (_, scored) in rows])
        samples = []
        for prefix, item in zip(self.prefixes, self.items, strict=True):
            lls = [next(sums) for _ in item.contexts]
            if not all(map(isfinite, lls)):
                raise UserError(f"{item.where}: the model gave a log-likelihood that is not finite")
            sizes = [len(text.encode()) for text in item.continuations]
            samples.append(
                {
                    "where": item.where,
                    "prompt": prefix if item.partial else prefix + item.contexts[0],
                    "choices": item.choices,
                    "continuation": item.continuations[0] if item.partial else None,
                    "loglikelihoods": lls,
                    "continuation_bytes": sizes,
                    "chosen": int(np.argmax(lls)),
                    "chosen_norm": int(np.argmax(np.divide(lls, sizes))),
                    "label": item.label,
                }
            )
        values = {
            **share("acc", [s["chosen"] == s["label"] for s in samples]),
            **share("acc_norm", [s["chosen_norm"] == s["label"] for s in samples]),
            "n": len(samples),
            "chance": fsum(1 / len(item.choices) for item in self.items) / len(samples),
            "scored_tokens": sum(scored for _, scored in self.encoded),
        }
        return values, samples


def share(name: str, hits: Sequence[float], counts: Sequence[float] | None = None) -> dict:
    """`name`, hits over counts (of 1 each), and `name`_stderr over items: sqrt(p (1 - p) / (n - 1)) for counts of 1."""
    counts = [1] * len(hits) if counts is None else counts
    return {name: fsum(hits) / fsum(counts), f"{name}_stderr": common.ratio_stderr(hits, counts)}
