"""Figure 8: quality against KV sparsity under dense, local, strided, SWA, and SWA with K and V in INT8.

One cell is a method at a sparsity. It scores one ragged batch, token by token through the decode path: windows of text,
spread evenly over it (perplexity), and, for a model that is trained for them, generated recall episodes, each of its own
seed (accuracy), each sequence alone from an empty cache. Attended and clipped fractions and bytes per token are those of
the whole batch. At 0 % every method but INT8 selects all tokens: of these only SWA is run, as a check of its whole path
against dense. With tasks, multiple choice by log-likelihood follows, as in `eval.accuracy`.

Differences from dense, from local and of INT8 are taken window by window and episode by episode; what is above two
standard errors of such a paired difference is said, and nothing is said of the rest. With this many comparisons at so few
windows, some will be above by chance.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from eval import accuracy
from eval.drawing import quality
from eval.figures import base
from eval.quality import paired
from eval.script import common, hashes, inputs, resume
from eval.script.common import UserError
from eval.script.resume import Found, Setup
from eval.script.tables import Table, Versus
from eval.text import episodes, tasks, windows

TITLE = "Quality against KV sparsity"
NAME = "fig8"
METHODS = MappingProxyType({"local": "raw", "strided": "raw", "swa": "raw", "swa+int8": "int8"})  # and their codecs
BATCH = 8  # sequences of a task that run together


def grid(config: dict) -> list[tuple[str, float, str, str]]:
    """(method, sparsity, policy, codec) of every cell, dense first."""
    cells = [
        (method, s, inputs.policy(f"{method.removesuffix('+int8')}(kv_sparsity={s:g})"), inputs.codec(METHODS[method]))
        for method, sparsities in config["sparsities"].items()
        for s in sparsities
    ]
    return [("dense", 0.0, inputs.policy("dense"), inputs.codec("raw")), *cells]


def sizes(config: dict, model: str, card: inputs.Card) -> paired.Sizes:
    """What is measured, as far as the model's context goes."""
    context = min(config["context_tokens"], card.max_positions)
    drawn = config["episodes"] if config.get("episodes_for") in (None, model) else 0
    return paired.Sizes(context, config["windows"], tuple(n for n in config["episode_lengths"] if n <= context), drawn)


def check(setup: Setup) -> None:
    """Raises UserError for a model without tokenizer, and sequences that policies or codecs cannot serve."""
    config, card = setup.config(NAME), setup.card()
    if setup.model.startswith("random:"):
        raise UserError(f"fig8: {setup.model} has no tokenizer, which a text needs; --only names other figures")
    wanted = sizes(config, setup.model, card)
    for _, _, policy, codec in grid(config):
        inputs.check_policy(policy, wanted.context_tokens)
        inputs.check_codec(codec, wanted.shortest, "windows and episodes")
    for name, path in setup.tasks:
        if path is not None:
            tasks.check_shots(tasks.read(name, path), config["shots"])


def records(setup: Setup) -> Found:
    """The cells of the sample, then those of each task."""
    config, card = setup.config(NAME), setup.card()
    source = windows.read(setup.text)
    sample = paired.draw(setup.load, setup.model, card, source, sizes(config, setup.model, card), setup.seed)
    named = {"script": "eval.reproduce", "figure": NAME}
    cells = [
        {**named, "method": m, "kv_sparsity": s, "policy": p, "codec": c, "protocol": "decode", **sample.fields}
        for m, s, p, c in grid(config)
    ]
    made, reused, interrupted = paired.run(
        cells, sample, setup.make_engine, setup.results, rerun=setup.rerun, jobs=setup.jobs
    )
    found = Found([r for r in made if r is not None], reused, interrupted)
    if interrupted or not setup.tasks:
        return found
    tasked = _tasks(setup, config, card, sample.model, named)
    return Found(found.records + tasked.records, reused + tasked.reused)


def _tasks(setup: Setup, config: dict, card: inputs.Card, model, named: dict) -> Found:
    """Accuracy of every task under every method and sparsity."""
    made, ids = {}, {}
    cells = []
    for name, path in setup.tasks:
        task = tasks.read(name, path) if path is not None else tasks.from_hub(name)
        tasks.check_shots(task, config["shots"])
        made[name] = tasks.Choices(task, model, config["shots"], setup.seed, config["task_items"])
        ids[name] = {"ids_sha256": hashes.of_ids(made[name].sequences)}
        longest = max(map(len, made[name].sequences))
        if longest > card.max_positions:
            raise UserError(
                f"--task={name}: {longest} tokens with {config['shots']} shots, and the context of {card.name} is"
                f" {card.max_positions}"
            )
        cells += [
            {**named, **card.fields(), **made[name].fields, **ids[name], "method": m, "kv_sparsity": s}
            | {
                "policy": p,
                "codec": c,
                "placement": "resident",
                "protocol": "decode",
                "batch": BATCH,
                "seed": setup.seed,
            }
            for m, s, p, c in grid(config)
            if min(map(len, made[name].sequences)) > inputs.calibration_tokens(c)
        ]

    @functools.cache
    def engine(policy: str, codec: str):
        return inputs.engine(setup.make_engine, model, policy, codec)

    def run(cell: dict) -> tuple[dict, dict]:
        values, how, _ = accuracy.evaluate(
            engine(cell["policy"], cell["codec"]), made[cell["task"]], BATCH, cell["protocol"]
        )
        return values, how

    return resume.collect(setup, cells, run, "tasks")


def tables_of(records: Sequence[dict]) -> tuple[dict, dict[str, dict]]:
    """Records of the sample by (method, sparsity), and for each task its records by the same."""
    sample = {(r["method"], r["kv_sparsity"]): r for r in records if "task" not in r}
    by_task: dict[str, dict] = {}
    for r in records:
        if "task" in r:
            by_task.setdefault(r["task"], {})[r["method"], r["kv_sparsity"]] = r
    return sample, by_task


def panel(data: Sequence[str], model: str) -> dict:
    """The paper's panel for one of the data sets `data`: that of the model with this name where there is one."""
    mine = [p for p in base.paper("alisa_fig8")["panels"] if p["data"] in data]
    named = [p for p in mine if p["model"].lower() in model.lower()]
    return (named or [p for p in mine if p["model"] == "LLaMA-7B"] or mine)[0]


def published(of: Mapping, method: str, sparsity: float) -> float | None:
    """The paper's value in a panel; ALISA lies on SWA where its marker is hidden."""
    if sparsity == 0:
        return of["dense"]
    at = base.paper("alisa_fig8")["kv_sparsity"]
    if sparsity not in at or method not in of:
        return None
    value = of[method][at.index(sparsity)]
    return of["swa"][at.index(sparsity)] if value is None and method == "swa+int8" else value


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """Values beside the paper's, paired differences, and the tasks."""
    sample, by_task = tables_of(records)
    found = [_values(sample), _paired(sample)]
    return found + [_task(name, cells) for name, cells in by_task.items()]


def _values(records: Mapping[tuple[str, float], dict]) -> Table:
    first = next(iter(records.values()))
    of = panel(("wikitext2",), first["model"])
    recalled = "recall_accuracy_frac" in first
    kinds = episodes.KINDS if recalled else ()
    head = ["method", "sparsity", "token ppl", "bits/byte", *(["recall"] if recalled else []), *kinds]
    head += ["attended", "KV B/tok", "stats B/tok", "clipped", f"paper ppl ({of['model']})", "ppl / dense", "paper's"]
    dense, rows, versus = records["dense", 0.0]["token_perplexity"], [], []
    for (method, sparsity), r in records.items():
        theirs = published(of, method, sparsity)
        ratio, of_theirs = r["token_perplexity"] / dense, None if theirs is None else theirs / of["dense"]
        row = [method, f"{100 * sparsity:.0f} %", common.number(r["token_perplexity"], ".3f", 1, r["stderr"])]
        row.append(common.number(r["bits_per_byte"], ".3f"))
        if recalled:
            row.append(common.number(r["recall_accuracy_frac"], ".1f", 100, r["recall_accuracy_frac_stderr"]))
            row += [common.number(r[f"recall_{kind}_accuracy_frac"], ".1f", 100) for kind in kinds]
        row += [common.number(r["attended_frac"], ".1f", 100), common.number(r["kv_bytes_per_token"], ".0f")]
        row.append(common.number(r["stats_bytes_per_token"], ".0f"))
        row.append(common.number(r["clipped_frac"], ".3f", 100) if METHODS.get(method) == "int8" else "-")
        row += [common.number(theirs, "g"), common.number(ratio, ".2f"), common.number(of_theirs, ".2f")]
        rows.append(row)
        if sparsity and of_theirs is not None:
            what = f"perplexity over dense, {method} at {100 * sparsity:.0f} %, {of['model']}"
            versus.append(Versus(what, "ratio", ratio, of_theirs, "measured"))
    caption = (
        f"Figure 8, perplexity: {first['model']} on {first['data']} ({first['data_sha256'][:12]}), decode protocol, K and V"
        f" raw but for swa+int8: {first['windows']} windows of {first['window_tokens']} tokens, n = {first['n']}."
    )
    if recalled:
        lengths = ", ".join(map(str, first["episode_lengths"]))
        caption += (
            f" Recall: {first['recall_episodes']} episodes of {lengths} tokens, n = {first['recall_n']} answers, in %."
        )
    caption += f" ± is one standard error over windows, over episodes. Paper: {of['model']} on WikiText-2."
    return Table(caption, head, rows, 2, versus, _why(first, of))


def _why(first: Mapping, of: Mapping) -> list[str]:
    if of["model"].lower() in first["model"].lower():
        return []
    return [
        f"{first['model']} stands in for {of['model']}: another model, tokenizer and text, so that only the perplexity over"
        " dense can be compared; where local and strided attention collapse in the paper, it is models of 7 to 33 billion"
        " parameters that do."
    ]


def references(records: Mapping[tuple[str, float], dict], method: str, sparsity: float) -> dict[str, dict]:
    """The records that a cell is compared with, by name."""
    named = {"dense": ("dense", 0.0)} if method != "dense" else {}
    if method.startswith("swa"):
        named["local"] = ("local", sparsity) if sparsity else ("dense", 0.0)
        named["strided"] = ("strided", sparsity)
    if method == "swa+int8":
        named["swa"] = ("swa", sparsity)
    return {name: records[key] for name, key in named.items() if key in records}


def _paired(records: Mapping[tuple[str, float], dict]) -> Table:
    names = ("dense", "local", "strided", "swa")
    recalled = "recall_accuracy_frac" in next(iter(records.values()))
    metrics = [("perplexity", ".4f", 1, "nats/token"), *([("recall", ".1f", 100, "recall")] if recalled else [])]
    head = ["method", "sparsity", *(f"{unit} from {n}" for *_, unit in metrics for n in names)]
    rows = []
    for method, sparsity in [key for key in records if key[0] != "dense"]:
        others, row = references(records, method, sparsity), [method, f"{100 * sparsity:.0f} %"]
        for metric, form, scale, _ in metrics:
            for name in names:
                d = paired.difference(records[method, sparsity], others[name], metric) if name in others else None
                row.append(paired.show(d, form, scale).rstrip())
        rows.append(row)
    caption = (
        "Paired differences, ± one standard error: ln of the ratio of perplexities, and recall in points. * is above two"
        " standard errors."
    )
    return Table(caption, head, rows, 2, (), claims(records))


def claims(records: Mapping[tuple[str, float], dict]) -> list[str]:
    """Which differences are above two standard errors, one sentence for each method, reference and metric."""
    recalled = "recall_accuracy_frac" in next(iter(records.values()))
    found = []
    for metric in paired.METRICS if recalled else ("perplexity",):
        for name in ("dense", "local", "strided", "swa"):
            for method in METHODS:
                higher, lower = [], []
                for sparsity in [s for m, s in records if m == method]:
                    other = references(records, method, sparsity).get(name)
                    d = None if other is None else paired.difference(records[method, sparsity], other, metric)
                    if d is not None and d.shown:
                        (higher if d.value > 0 else lower).append(f"{100 * sparsity:.0f}")
                shown = [f"{word} at {', '.join(at)} %" for word, at in (("higher", higher), ("lower", lower)) if at]
                if shown:
                    found.append(f"{metric}: {method} is {' and '.join(shown)} than {name}")
    return [*(found or ["no difference"]), "all else is within two standard errors, and left open by this sample"]


def _task(name: str, records: Mapping[tuple[str, float], dict]) -> Table:
    first = next(iter(records.values()))
    of = panel((name,), first["model"])
    rows, versus = [], []
    for (method, sparsity), r in records.items():
        theirs = published(of, method, sparsity)
        row = [method, f"{100 * sparsity:.0f} %"]
        row += [common.number(r[key], ".1f", 100, r[f"{key}_stderr"]) for key in ("acc", "acc_norm")]
        rows.append([*row, common.number(r["attended_frac"], ".1f", 100), common.number(theirs, "g")])
        if theirs is not None:
            what = f"{name} accuracy, {method} at {100 * sparsity:.0f} %, {of['model']}"
            versus.append(Versus(what, "%", 100 * r["acc"], theirs, "measured"))
    caption = (
        f"Figure 8, {name}: {first['model']}, {first['data']} ({first['data_sha256'][:12]}), {first['shots']} shots,"
        f" n = {first['n']}, chance {100 * first['chance']:.0f} %; accuracies in %. Paper: {of['model']}."
    )
    if not any(method == "swa+int8" for method, _ in records):
        caption += " swa+int8 is not here: some sequences are shorter than the tokens that INT8 takes its range from."
    head = ("method", "sparsity", "acc", "acc_norm", "attended", f"paper ({of['model']})")
    return Table(caption, head, rows, 2, versus, _why(first, of))


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """Perplexity, recall and tasks against sparsity."""
    sample, by_task = tables_of(records)
    return quality.quality(sample, tuple(METHODS), path, by_task)
