"""`python -m eval.accuracy`: prompts word by word, values on known models and against transformers, resuming, mistakes."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from eval import accuracy
from eval.script import common
from eval.text import planted, recall, tasks, windows

pytestmark = pytest.mark.slow

COPA = [
    {"query": "The cup fell, therefore", "choices": ["it broke.", "the small red cup flew away."], "gold": 0},
    {"query": "He slept, because", "choices": ["he was very tired of all.", "no."], "gold": 0},
    {"query": "Rain came, therefore", "choices": ["we got wet.", "it was dry."], "gold": 0},
    {"query": "She won, because", "choices": ["she lost.", "she ran as fast as the wind."], "gold": 1},
    {"query": "The sun rose, therefore", "choices": ["é night fell.", "day came."], "gold": 1},
]
WINOGRANDE = [
    {"context_options": ["Ann met Bea so Ann", "Ann met Bea so Bea"], "continuation": "waved.", "gold": 1},
    {"context_options": ["The cat or the dog", "The cat or the bird"], "continuation": "hid.", "gold": 0},
    {"context_options": ["Tom saw Jim and Tom", "Tom saw Jim and Jim"], "continuation": "ran.", "gold": 0},
]
VALUES = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n", "attended_frac_per_layer")


def lines_of(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def scores_of(sequences, table_of, last):
    """What `Engine.score` returns, from `table_of(ids)` -> log-probabilities [len - 1, V] of the next token."""
    rows = [(table_of(s), np.asarray(s[1:])) for s in sequences]
    if last is not None:
        rows = [(p[len(b) - n :], b[len(b) - n :]) for (p, b), n in zip(rows, last, strict=True)]
    return SimpleNamespace(
        logprobs=[p[np.arange(len(b)), b].astype(np.float32) for p, b in rows],
        correct=[p.argmax(-1) == b for p, b in rows],
        attended_frac=np.asarray([1.0, 0.25], np.float32),
        clipped_frac=np.zeros(2),
        kv_bytes_per_token=64.0,
        stats_bytes_per_token=4.0,
        compiles=2,
        wall_s=0.0,
        implementation="known",
        implementation_reason="asked for",
        placement=None,
        decoded_tokens=sum(len(s) - 1 for s in sequences),
    )


class BigramEngine:
    """p(next | token) from a fixed table, the policy's text in the seed."""

    def __init__(self, vocab_size: int, policy: str, bench=None):
        logits = np.random.default_rng(list(policy.encode())).normal(size=(vocab_size, vocab_size))
        self.table, self.bench = logits - np.log(np.exp(logits).sum(-1, keepdims=True)), bench

    def score(self, sequences, protocol="decode", progress=False, last=None):
        if len(self.bench.calls) == self.bench.stop_at:
            raise KeyboardInterrupt
        self.bench.calls.append([len(s) for s in sequences])
        return scores_of(sequences, lambda ids: self.table[np.asarray(ids[:-1])], last)


class Copier:
    """Names the token that followed the newest earlier occurrence of the present one, where that is at most `reach` back."""

    def __init__(self, vocab_size: int, reach: int):
        self.vocab_size, self.reach = vocab_size, reach

    def score(self, sequences, protocol="decode", progress=False, last=None):
        return scores_of(sequences, self.guess, last)

    def guess(self, ids):
        out = np.full((len(ids) - 1, self.vocab_size), -9.0)
        for t in range(len(ids) - 1):
            for s in range(t - 1, max(-1, t - self.reach), -1):
                if ids[s] == ids[t]:
                    out[t, ids[s + 1]] = -0.5
                    break
        return out


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each byte, and BOS = 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({"<bos>": 0, **{c: i for i, c in enumerate(alphabet, start=1)}}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<bos>"])
    return made


@pytest.fixture
def model(tokenizer):
    def encode(text):
        return [0, *tokenizer.encode(text, add_special_tokens=False).ids]

    decoder = SimpleNamespace(config=SimpleNamespace(vocab_size=tokenizer.get_vocab_size()))
    return SimpleNamespace(tokenizer=tokenizer, bos_id=0, eos_ids=(), name="tiny", encode=encode, decoder=decoder)


@pytest.fixture
def bench(tmp_path, tokenizer, model):
    """A model folder with a context of 256, task files, and `call(*flags)` -> exit code, with a known model."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    (folder / "model.safetensors").write_bytes(b"weights")
    for name, rows in (("copa", COPA), ("winogrande", WINOGRANDE)):
        (tmp_path / f"{name}.jsonl").write_text(lines_of(rows))
    setup = SimpleNamespace(folder=folder, path=tmp_path, calls=[], loads=[], stop_at=None)
    setup.copa = ["--task=copa", f"--task_file={tmp_path / 'copa.jsonl'}"]
    setup.winogrande = ["--task=winogrande", f"--task_file={tmp_path / 'winogrande.jsonl'}"]

    def load(name):
        setup.loads.append(name)
        return model

    def bigram(model, policy, codec):
        return BigramEngine(tokenizer.get_vocab_size(), policy, setup)

    def call(*flags, make=bigram):
        argv = ["accuracy", f"--model={folder}", *flags]
        return common.run(lambda a: accuracy.main(a, load, make), argv)

    setup.call = call
    return setup


def records_of(capsys):
    out = capsys.readouterr()
    return [json.loads(line) for line in out.out.splitlines()], out.err


# Reading and wording.


def words(made: tasks.Choices, tokenizer) -> list[tuple[str, str]]:
    """(prompt, what is scored) of each sequence, decoded."""
    return [(tokenizer.decode(ids[1 : len(ids) - n]), tokenizer.decode(ids[len(ids) - n :])) for ids, n in made.encoded]


WORDING = {
    "piqa": (
        [
            {"query": "Question: boil an egg\n", "choices": ["in water", "in sand"], "gold": 0},
            {"query": "Question: cut wood\n", "choices": ["a spoon", "a saw"], "gold": 1},
        ],
        "Question: cut wood\nAnswer: a saw\n\nQuestion: boil an egg\nAnswer:",
        [" in water", " in sand"],
    ),
    "copa": (
        [COPA[0], COPA[3]],
        "She won, because she ran as fast as the wind.\n\nThe cup fell, therefore",
        [" it broke.", " the small red cup flew away."],
    ),
    "openbookqa": (
        [
            {"query": "Predators eat ", "choices": ["lions", "humans", "bunnies"], "gold": 2},
            {"query": "Ice is", "choices": ["hot", "cold"], "gold": 1},
        ],
        "Ice is cold\n\nPredators eat",
        ["  lions", "  humans", "  bunnies"],
    ),
}


@pytest.mark.parametrize("name", WORDING)
def test_prompts_of_choices_read_as_written_by_hand(name, tmp_path, model, tokenizer):
    rows, prompt, scored = WORDING[name]
    (tmp_path / "t.jsonl").write_text(lines_of(rows))
    task = tasks.read(name, str(tmp_path / "t.jsonl"))
    made = tasks.Choices(task, model, shots=1, seed=0, limit=1)
    assert words(made, tokenizer) == [(prompt, text) for text in scored]
    plain = tasks.Choices(task, model, shots=0, seed=0, limit=1)
    assert words(plain, tokenizer)[0] == (prompt.split("\n\n")[1], scored[0])


def test_winogrande_scores_the_rest_of_the_sentence_after_each_word(tmp_path, model, tokenizer):
    (tmp_path / "w.jsonl").write_text(lines_of(WINOGRANDE[:2]))
    made = tasks.Choices(tasks.read("winogrande", str(tmp_path / "w.jsonl")), model, shots=1, seed=0, limit=None)
    assert words(made, tokenizer) == [
        ("The cat or the dog hid.\n\nAnn met Bea so Ann", " waved."),
        ("The cat or the dog hid.\n\nAnn met Bea so Bea", " waved."),
        ("Ann met Bea so Bea waved.\n\nThe cat or the dog", " hid."),
        ("Ann met Bea so Bea waved.\n\nThe cat or the bird", " hid."),
    ]


def test_examples_are_other_items_without_repetition_and_depend_on_seed_and_item_alone(tmp_path):
    (tmp_path / "t.jsonl").write_text(lines_of([COPA[0] | {"query": f"{i} so"} for i in range(40)]))
    task = tasks.read("copa", str(tmp_path / "t.jsonl"))
    drawn = [tasks.examples(task, i, 5, seed=1) for i in range(40)]
    assert all(len(set(row)) == 5 and i not in row and 0 <= min(row) and max(row) < 40 for i, row in enumerate(drawn))
    assert {j for row in drawn for j in row} == set(range(40))  # the first and the last are drawn as well
    assert drawn != [tasks.examples(task, i, 5, seed=2) for i in range(40)]
    assert sorted(tasks.examples(task, 7, 39, seed=1)) == [i for i in range(40) if i != 7]


HUB_ROWS = {
    "piqa": (
        {"goal": "cut wood", "sol1": "a spoon", "sol2": "a saw", "label": 1},
        "Question: cut wood\nAnswer:",
        " a saw",
    ),
    "copa": (
        {"premise": "The cup fell.", "choice1": "It broke.", "choice2": "It flew.", "question": "effect", "label": 0},
        "The cup fell therefore",
        " it broke.",
    ),
    "openbookqa": (
        {"question_stem": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": "B"},
        "Ice is",
        " cold",
    ),
    "winogrande": (
        {"sentence": "Ann met Bea so _ waved.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        "Ann met Bea so Bea",
        " waved.",
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_of_the_hub_are_worded_as_those_of_files(name, model, tokenizer, monkeypatch):
    row, prompt, right = HUB_ROWS[name]
    asked = []

    def load_dataset(path, configuration, split):
        asked.append((path, configuration, split))
        return [row, row]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = tasks.from_hub(name)
    made = tasks.Choices(task, model, shots=0, seed=0, limit=1)
    assert words(made, tokenizer)[task.items[0].label] == (prompt, right)
    assert asked == [tasks.HUB[name]] and task.data == f"{tasks.HUB[name][0]}:{tasks.HUB[name][2]}"


@pytest.mark.parametrize("name", HUB_ROWS)
def test_the_datasets_library_itself_gives_the_same_words(name, model, tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    row, prompt, right = HUB_ROWS[name]
    split = tasks.HUB[name][2]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{split}.jsonl").write_text(lines_of([row] * 3))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "HUB", {name: (str(tmp_path / "data"), None, split)})
    task = tasks.from_hub(name)
    made = tasks.Choices(task, model, shots=0, seed=0, limit=1)
    assert words(made, tokenizer)[task.items[0].label] == (prompt, right) and len(task.items) == 3


def test_an_eos_that_the_tokenizer_puts_behind_a_text_is_not_scored(model, tokenizer):
    plain = tasks.encode(model, "the cat ", "sat")
    closing = Tokenizer.from_str(tokenizer.to_str())
    closing.post_processor = processors.TemplateProcessing(
        single="<bos> $A <bos>", special_tokens=[("<bos>", 0)]
    )  # here the end of text is the BOS
    closed = SimpleNamespace(tokenizer=closing, encode=lambda text: closing.encode(text).ids)
    assert tasks.encode(closed, "the cat ", "sat") == plain == (model.encode("the cat sat"), 4)


# Values on a known model.


def by_hand(table, tokenizer, context, continuation):
    """Sum of the log-probabilities of " " + continuation after the context, byte by byte."""
    ids = [tokenizer.encode(c).ids for c in context + " " + continuation]
    n = len((" " + continuation).encode())
    flat = [0, *itertools.chain.from_iterable(ids)]
    return math.fsum(table[a, b] for a, b in list(itertools.pairwise(flat))[-n:])


def test_acc_and_acc_norm_equal_those_worked_out_by_hand(bench, tokenizer, capsys):
    assert bench.call(*bench.copa, "--shots=0", "--batch=3", "--json", f"--samples={bench.path / 's.jsonl'}") == 0
    (record,), _ = records_of(capsys)
    table = BigramEngine(tokenizer.get_vocab_size(), "dense").table
    sums = [[by_hand(table, tokenizer, row["query"], c) for c in row["choices"]] for row in COPA]
    chosen = [max(range(2), key=lambda i, s=s: s[i]) for s in sums]
    norm = [
        max(range(2), key=lambda i, s=s, row=row: s[i] / len(row["choices"][i].encode()))
        for s, row in zip(sums, COPA, strict=True)
    ]
    assert chosen != norm  # the two rules differ on these items
    acc = sum(c == row["gold"] for c, row in zip(chosen, COPA, strict=True)) / 5
    assert record["acc"] == acc and record["n"] == 5 and record["chance"] == 0.5
    assert record["acc_norm"] == sum(c == row["gold"] for c, row in zip(norm, COPA, strict=True)) / 5
    assert math.isclose(record["acc_stderr"], math.sqrt(acc * (1 - acc) / 4), rel_tol=1e-12)
    samples = [json.loads(line) for line in (bench.path / "s.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([s["loglikelihoods"] for s in samples], sums, rtol=1e-5)
    assert [(s["chosen"], s["chosen_norm"], s["label"]) for s in samples] == [
        (c, n, row["gold"]) for c, n, row in zip(chosen, norm, COPA, strict=True)
    ]
    assert [s["prompt"] for s in samples] == [row["query"] for row in COPA]
    assert [s["choices"] for s in samples] == [row["choices"] for row in COPA]
    assert [s["where"] for s in samples] == [f"copa.jsonl, line {n}" for n in range(1, 6)]
    assert samples[4]["continuation_bytes"] == [len("é night fell.") + 1, len("day came.")]


def test_partial_scoring_of_winogrande_equals_a_sum_by_hand(bench, tokenizer, capsys):
    """In a bigram model only the token before the blank's end differs: the score is that of " " after its last letter."""
    path = bench.path / "s.jsonl"
    assert bench.call(*bench.winogrande, "--shots=2", "--json", f"--samples={path}") == 0
    (record,), _ = records_of(capsys)
    table = BigramEngine(tokenizer.get_vocab_size(), "dense").table
    sums = [[by_hand(table, tokenizer, c, r["continuation"]) for c in r["context_options"]] for r in WINOGRANDE]
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    np.testing.assert_allclose([s["loglikelihoods"] for s in samples], sums, rtol=1e-5)
    space, last = tokenizer.encode(" ").ids[0], [tokenizer.encode(c).ids[0] for c in "gd"]
    lls = samples[1]["loglikelihoods"]  # "... the dog" against "... the bird"
    assert math.isclose(lls[0] - lls[1], table[last[0], space] - table[last[1], space], abs_tol=1e-5)
    right = [s.index(max(s)) == row["gold"] for s, row in zip(sums, WINOGRANDE, strict=True)]
    assert record["acc"] == record["acc_norm"] == sum(right) / 3
    assert samples[0]["choices"] == WINOGRANDE[0]["context_options"] and samples[0]["continuation"] == "waved."
    assert samples[0]["prompt"].count("\n\n") == 2 and "Ann met Bea" not in samples[0]["prompt"]


def test_the_first_of_equal_choices_is_taken(model):
    item = tasks.Item(("a", "a", "a"), ("xy", "xy", "zz"), 1, "t.jsonl, line 1")
    made = tasks.Choices(tasks.Task("copa", "t.jsonl", "0", (item,)), model, 0, 0, None)
    values, (sample,) = made.judge([np.full(len(ids) - 1, -1.0, np.float32) for ids in made.sequences], None)
    assert sample["chosen"] == sample["chosen_norm"] == 0 and values["acc"] == 0.0 and values["acc_stderr"] is None


def test_neither_batch_nor_limit_changes_an_item(bench, capsys):
    kept = []
    for extra in (["--batch=1"], ["--batch=7"], ["--batch=7", "--limit=2"]):
        path = bench.path / f"{len(kept)}.jsonl"
        assert bench.call(*bench.copa, "--shots=2", f"--samples={path}", *extra) == 0
        kept.append([json.loads(line) | {"cell": ""} for line in path.read_text().splitlines()])
    assert kept[0] == kept[1] and kept[0][:2] == kept[2] and len(kept[0]) == 5
    capsys.readouterr()


def test_the_longest_items_run_first_and_in_batches_of_at_most_the_size_asked_for(bench, capsys):
    assert bench.call(*bench.copa, "--shots=0", "--batch=5") == 0
    longest = [max(c[i : i + 2]) for c in bench.calls for i in range(0, len(c), 2)]
    assert longest == sorted(longest, reverse=True) and [len(c) for c in bench.calls] == [4, 4, 2]
    capsys.readouterr()


def test_batches_hold_every_sequence_once_and_cut_only_what_does_not_fit():
    alike = [[0, 1, 2], [3], [4, 5, 6, 7, 8], [9, 10]]
    groups = accuracy.batches([3, 9, 2, 5, 4, 4, 4, 4, 4, 8, 1], alike, batch=4)
    assert groups == [[0, 1, 2], [9, 10, 3], [4, 5, 6, 7], [8]]


def test_a_record_says_what_ran_on_what_and_how(bench, capsys):
    flags = [
        "--policy=swa(kv_sparsity=0.80)",
        "--shots=3",
        "--seed=3",
        "--limit=4",
        "--codec=int8(axis=token)",
        "--json",
    ]
    assert bench.call(*bench.copa, *flags) == 0
    (record,), err = records_of(capsys)
    expected = {
        "script": "eval.accuracy",
        "model": "tiny",
        "task": "copa",
        "data": "copa.jsonl",
        "shots": 3,
        "limit": 4,
        "n": 4,
        "policy": "swa(kv_sparsity=0.8)",
        "codec": "int8(axis=token)",
        "placement": "resident",
        "protocol": "decode",
        "batch": 8,
        "seed": 3,
        "implementation": "known",
        "basis": "measured",
        "attended_frac": 0.625,
        "kv_bytes_per_token": 64.0,
        "compiles": 2,
    }
    assert {key: record[key] for key in expected} == expected
    assert len(record["data_sha256"]) == len(record["model_sha256"]) == 64
    assert "swa(kv_sparsity=0.8)" in err and "copa.jsonl" in err and "3 shots" in err and "62.5 %" in err


def test_a_log_likelihood_that_is_not_finite_is_an_error_and_not_a_record(bench, capsys, monkeypatch):
    score = BigramEngine.score

    def broken(self, *args, **kwargs):
        scores = score(self, *args, **kwargs)
        scores.logprobs[0][-1] = np.nan
        return scores

    monkeypatch.setattr(BigramEngine, "score", broken)
    out = bench.path / "r.jsonl"
    assert bench.call(*bench.copa, f"--out={out}") == common.EXIT_MISTAKE
    assert "not finite" in capsys.readouterr().err and out.read_text() == ""


# Generated tasks.


def test_needles_stand_at_their_depth_in_real_text_and_are_asked_for_at_the_end(model, tokenizer):
    characters = "the quick brown fox jumps over the lazy dog again and again " * 10
    source = windows.Source("t", "0" * 64, characters)
    hay = tokenizer.encode(characters).ids
    depths = (0.0, 0.3, 1.0)
    made = planted.needles(model, source, (40, 64), depths, 2, seed=5)
    assert len(made.drawn) == 2 * 2 * 3 and made.depths == list(depths) * 4
    for i, (e, depth) in enumerate(zip(made.drawn, made.depths, strict=True)):
        tokens = e.tokens.tolist()
        assert len(tokens) == (40 if i < 6 else 64) and tokens[0] == 0
        needle, rest = tokens[-6:], tokens[1:-6]
        at = round(depth * (len(rest) - 6))
        assert rest[at : at + 6] == needle and len(set(needle)) == 6
        text = rest[:at] + rest[at + 6 :]
        assert not set(text) & set(needle)
        assert any(hay[s : s + len(text)] == text for s in range(len(hay)))
        assert e.answers.tolist() == [False] * (len(tokens) - 4) + [True] * 4
        first = made.drawn[i - i % 3].tokens[1:]
        assert first[6:-6].tolist() == text and first[:6].tolist() == needle  # one draw for all depths
    assert len({tuple(e.tokens[-6:].tolist()) for e in made.drawn}) == 4


def test_a_model_with_a_short_reach_finds_the_needles_within_it_and_no_others(bench, tokenizer, capsys):
    """A needle at depth d of h haystack tokens stands 6 + h - round(d h) tokens before its question."""
    flags = ["--task=needle", "--lengths=64,128", "--depths=0,0.5,0.9,1", "--items=3", "--json"]
    text = bench.path / "text.txt"
    text.write_text("what is here is plain small text, and there is much of it. " * 20)
    make = lambda model, policy, codec: Copier(tokenizer.get_vocab_size(), 999 if policy == "dense" else 40)
    assert bench.call(*flags, f"--text={text}", "--policy=dense", "--policy=local(tokens=40)", make=make) == 0
    (dense, local), err = records_of(capsys)
    every = dict.fromkeys(("0", "0.5", "0.9", "1"), 1.0)
    assert dense["acc"] == dense["exact_match"] == 1.0 and dense["n"] == 4 * 24 and dense["items"] == 24
    assert dense["acc_by_length_and_depth"] == {"64": every, "128": every}
    # haystacks of 51 and 115 tokens: the distances are 57, 31, 11, 6 and 121, 63, 17, 6
    assert local["acc_by_length_and_depth"] == {"64": every | {"0": 0.0}, "128": every | {"0": 0.0, "0.5": 0.0}}
    assert local["acc"] == local["exact_match"] == 5 / 8
    assert local["acc_stderr"] > 0 and dense["acc_stderr"] == 0.0
    # over 6 draws (all depths of a needle are one), of which 3 have 12 right of 16 and 3 have 8
    assert math.isclose(local["acc_stderr"], math.sqrt(6 / 5 * 6 * 2**2) / 96, rel_tol=1e-12)
    assert local["data"] == "text.txt" and local["depths_frac"] == [0.0, 0.5, 0.9, 1.0]
    rows = [line.split() for line in err.splitlines() if line.startswith(("64 ", "128 "))]
    assert rows[2] == "64 0.0 % 100.0 % 100.0 % 100.0 %".split() and len(rows) == 4


def test_recall_and_copy_are_solved_by_a_model_that_copies_and_by_no_other(bench, tokenizer, capsys):
    flags = ["--task=recall", "--task=copy", "--lengths=64,96", "--items=2", "--json"]
    make = lambda model, policy, codec: Copier(tokenizer.get_vocab_size(), 999 if policy == "dense" else 2)
    path = bench.path / "s.jsonl"
    policies = ["--policy=dense", "--policy=local(tokens=2)"]
    assert bench.call(*flags, *policies, f"--samples={path}", make=make) == 0
    records, _ = records_of(capsys)
    assert [(r["task"], r["policy"][:5], r["acc"]) for r in records] == [
        ("recall", "dense", 1.0),
        ("recall", "local", 0.0),
        ("copy", "dense", 1.0),
        ("copy", "local", 0.0),
    ]
    assert records[0]["acc_by_length"] == {"64": 1.0, "96": 1.0} and records[0]["exact_match"] == 1.0
    assert records[1]["data_sha256"] == records[0]["data_sha256"] != records[2]["data_sha256"]
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(samples) == 4 * 4 and sum(len(s["right"]) for s in samples[:4]) == records[0]["n"]
    first = samples[0]
    answers = [first["tokens"][t] for t in first["answer_positions"]]
    assert all(a in first["tokens"][:t] for a, t in zip(answers, first["answer_positions"], strict=True))
    assert math.isclose(first["loglikelihood"], -0.5 * len(answers)) and all(first["right"])


def test_answers_are_judged_at_their_own_positions():
    answers = np.array([False, False, True, False, True, True])
    episode = recall.Episode("lookup", np.arange(6, dtype=np.int32), answers)
    made = planted.Planted("recall", "generated", {}, [episode] * 2, [None] * 2)
    logprobs = np.array([-1.0, -2.0, -4.0, -8.0, -16.0], np.float32)  # of tokens 1 .. 5
    right = [np.array([True, False, True, True, True]), np.array([False, True, False, True, True])]
    values, samples = made.judge([logprobs] * 2, right)
    assert [s["right"] for s in samples] == [[False, True, True], [True, True, True]]
    assert samples[0]["answer_positions"] == [2, 4, 5] and samples[0]["loglikelihood"] == -2.0 - 8.0 - 16.0
    assert values["acc"] == 5 / 6 and values["n"] == 6 and values["exact_match"] == 0.5 and values["items"] == 2
    assert values["acc_by_length"] == {"6": 5 / 6}


# Resuming and samples.


def test_finished_cells_are_not_run_again_and_a_new_policy_is(bench, capsys):
    flags = [*bench.copa, *bench.winogrande, "--shots=1", f"--out={bench.path / 'r.jsonl'}", "--json"]
    assert bench.call(*flags) == 0
    first, ran = records_of(capsys)[0], len(bench.calls)
    assert bench.call(*flags, "--policy=dense", "--policy=local(tokens=4)") == 0
    again, err = records_of(capsys)
    assert len(bench.calls) == 2 * ran and "2 of 4 cells were already in" in err
    assert [again[0], again[2]] == first and [r["task"] for r in again] == ["copa"] * 2 + ["winogrande"] * 2
    assert again[1]["acc"] != again[0]["acc"] or again[1]["acc_norm"] != again[0]["acc_norm"]
    for changed in ("--shots=0", "--seed=1", "--limit=2", "--protocol=prefill_mask", "--rerun"):
        before = len(bench.calls)
        assert bench.call(*flags, changed) == 0
        assert len(bench.calls) > before
    before = len(bench.calls)
    (bench.path / "copa.jsonl").write_text(lines_of(COPA[::-1]))
    assert bench.call(*flags) == 0
    assert len(bench.calls) == before + 2  # 10 sequences of the changed file, in two batches
    capsys.readouterr()


def test_an_interrupted_run_goes_on_with_the_cell_it_was_in(bench, capsys):
    out, path = bench.path / "r.jsonl", bench.path / "s.jsonl"
    flags = [*bench.copa, "--batch=4", "--shots=1", f"--out={out}", f"--samples={path}", "--json"]
    flags += ["--policy=dense", "--policy=local(tokens=4)"]
    assert bench.call(*flags) == 0
    whole, lines = records_of(capsys)[0], path.read_text()
    assert len(bench.calls) == 6 and len(lines.splitlines()) == 10
    out.unlink()
    path.unlink()
    bench.calls.clear()
    bench.stop_at = 4
    assert bench.call(*flags) == common.EXIT_INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 1 and len(path.read_text().splitlines()) == 5
    bench.stop_at = None
    bench.calls.clear()
    assert bench.call(*flags) == 0
    resumed, _ = records_of(capsys)
    assert len(bench.calls) == 3 and path.read_text() == lines
    assert [[r[key] for key in VALUES] for r in resumed] == [[r[key] for key in VALUES] for r in whole]


def test_a_cell_without_its_samples_runs_again_and_no_cell_stands_twice(bench, capsys):
    path = bench.path / "new" / "s.jsonl"
    flags = [*bench.copa, "--shots=1", f"--out={bench.path / 'r.jsonl'}"]
    assert bench.call(*flags) == 0 and len(bench.calls) == 2
    assert bench.call(*flags, f"--samples={path}") == 0 and len(bench.calls) == 4
    lines = path.read_text()
    assert len(lines.splitlines()) == 5
    assert bench.call(*flags, f"--samples={path}") == 0 and len(bench.calls) == 4
    assert bench.call(*flags, f"--samples={path}", "--rerun") == 0 and len(bench.calls) == 6
    assert path.read_text() == lines
    capsys.readouterr()


# Mistakes.


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lines_of(COPA[:2]) + '{"query": "a', "bad.jsonl, line 3: not JSON"),
        (lines_of(COPA[:1]) + "\n[1, 2]\n", "bad.jsonl, line 3: not a JSON object, but [1, 2]"),
        (lines_of([COPA[0] | {"gold": 2}]), "bad.jsonl, line 1: 'gold' must be in 0..1, got 2"),
        (lines_of([COPA[0] | {"gold": "1"}]), "'gold' must be in 0..1, got \"1\""),
        (lines_of([COPA[0] | {"gold": True}]), "'gold' must be in 0..1, got true"),
        (lines_of([COPA[0], {"query": "a", "gold": 0}]), "line 2: the field 'choices' is missing; it has query, gold"),
        (lines_of([{"choices": ["a", "b"], "gold": 0}]), "line 1: the field 'query' is missing"),
        (lines_of([{"query": "a", "choices": ["a", "b"]}]), "line 1: the field 'gold' is missing"),
        (lines_of([COPA[0] | {"choices": ["a"]}]), "'choices' must be a list of two texts or more, none of them empty"),
        (lines_of([COPA[0] | {"choices": ["a", " "]}]), "'choices' must be a list of two texts or more"),
        (lines_of([COPA[0] | {"query": 3}]), "'query' must be a text and not empty, got 3"),
        (lines_of([COPA[0] | {"query": "\ud800"}]), "'query' must be a text and not empty"),
        (lines_of(WINOGRANDE), "line 1: the field 'query' is missing; it has context_options, continuation, gold"),
        ("\n", "is empty"),
        (lines_of(COPA[:4]), "--shots must be in 0..3 for the items of bad.jsonl, got 4"),
    ],
)
def test_a_mistake_in_a_task_file_is_one_sentence_before_the_model_is_loaded(bench, capsys, content, sentence):
    (bench.path / "bad.jsonl").write_text(content)
    assert bench.call("--task=copa", f"--task_file={bench.path / 'bad.jsonl'}") == common.EXIT_MISTAKE
    out = capsys.readouterr()
    assert out.out == "" and sentence in out.err and len(out.err.strip().splitlines()) == 1
    assert not bench.loads and not bench.calls


MISTAKES = [
    (
        ["--task=hellaswag"],
        "unknown task 'hellaswag'; known: piqa, copa, openbookqa, winogrande, recall, copy, needle",
    ),
    (["--task=copa", "--task_file=absent.jsonl"], "cannot read 'absent.jsonl'"),
    (["--task=copa", "--task=piqa", "--task_file=a"], "copa, piqa are read from files, got 1 files"),
    (["--task_file=a"], "no --task is read from a file, got 1 files"),
    (["--task=piqa"], "--task=piqa without a --task_file needs the datasets library: pip install 'alisa-jax[tasks]'"),
    (["--shots=-1"], "--shots"),
    (["--lengths=64,300"], "--lengths must be in 32..256, the context of tiny, got 300"),
    (["--lengths=8"], "--lengths must be in 32..256"),
    (["--lengths=long"], "--lengths must be numbers with commas between them, got 'long'"),
    (["--depths=1.5", "--lengths=64"], "--depths must be in 0..1, got 1.5"),
    (["--policy=swo(kv_sparsity=0.8)"], "unknown name 'swo'"),
    (["--codec=int9"], "unknown name 'int9'"),
    (["--protocol=prefill"], "should be one of <decode|prefill_mask|prompt>"),
    (["--seed=-1"], "--seed must be in 0..4294967295, got -1"),
    (["--model=absent"], "no model at 'absent'"),
    (["--model=random:nano"], "--model: random:nano has no tokenizer, which a task needs"),
    (["--task=recall", "--lengths=64", "--samples=/dev/null/s.jsonl"], "--samples: cannot write to"),
    (["--task=recall", "--lengths=64", "--out=/dev/null/r.jsonl"], "--out: cannot write results"),
    (["--tasks=copa"], "Unknown command line flag 'tasks'"),
]


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_before_the_model_is_loaded(bench, capsys, monkeypatch, flags, sentence):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert bench.call(*flags) == common.EXIT_MISTAKE
    out = capsys.readouterr()
    assert out.out == "" and sentence in out.err and "Traceback" not in out.err
    assert len(out.err.strip().splitlines()) == 1
    assert not bench.loads and not bench.calls


def test_data_that_the_hub_does_not_give_is_told_in_one_sentence(bench, capsys, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert bench.call("--task=copa") == common.EXIT_MISTAKE
    err = capsys.readouterr().err
    assert "aps/super_glue could not be loaded (no route to the hub)" in err and len(err.splitlines()) == 1


def test_an_item_longer_than_the_context_is_named_before_anything_runs(bench, capsys):
    rows = [*COPA, COPA[0] | {"query": "x" * 240 + ","}]
    (bench.path / "copa.jsonl").write_text(lines_of(rows))
    out = bench.path / "r.jsonl"
    assert bench.call(*bench.copa, "--shots=0", f"--out={out}") == common.EXIT_MISTAKE
    err = capsys.readouterr().err
    assert "copa.jsonl, line 6 has 271 tokens, and the context of tiny is 256" in err
    assert not bench.calls and out.read_text() == "" and len(err.strip().splitlines()) == 1
    assert bench.call(*bench.copa, "--shots=5") == common.EXIT_MISTAKE
    assert "with 5 shots has" in capsys.readouterr().err and not bench.calls
    assert bench.call(*bench.copa, "--shots=0", "--limit=5") == 0 and bench.calls


def test_an_item_too_short_for_the_codec_is_named_before_anything_runs(bench, capsys):
    assert bench.call(*bench.copa, "--shots=0", "--codec=int8(calibration_tokens=24)") == common.EXIT_MISTAKE
    err = capsys.readouterr().err
    assert "the first 24 tokens of a sequence, and copa.jsonl, line 2 has 22" in err and not bench.calls
    assert bench.call(*bench.copa, "--shots=0", "--codec=int8(calibration_tokens=21)") == 0
    capsys.readouterr()


def test_a_file_of_something_else_is_no_file_of_samples(bench, capsys):
    path = bench.path / "copa.jsonl"
    before = path.read_text()
    assert bench.call(*bench.copa, f"--samples={path}") == common.EXIT_MISTAKE
    assert "holds something that is no sample" in capsys.readouterr().err and path.read_text() == before


def test_too_little_text_for_a_needle_is_told(bench, capsys):
    (bench.path / "t.txt").write_text("too short")
    assert bench.call("--lengths=64", f"--text={bench.path / 't.txt'}") == common.EXIT_MISTAKE
    assert "a needle in 64 tokens needs a text of 51 tokens, got 9" in capsys.readouterr().err


def test_a_length_beyond_the_ids_of_the_vocabulary_is_told(bench, capsys):
    (bench.folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    assert bench.call("--task=copy", "--lengths=300") == common.EXIT_MISTAKE
    assert "--lengths: an episode of 300 tokens draws that many different ids" in capsys.readouterr().err


def test_the_command_itself_tells_an_unknown_task_in_one_sentence():
    command = [sys.executable, "-m", "eval.accuracy", "--task=arc"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == common.EXIT_MISTAKE and done.stdout == ""
    assert "unknown task 'arc'" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_help_prints_the_flags_and_the_paste_ready_command(capsys):
    assert common.run(accuracy.main, ["accuracy", "--help"]) == 0
    out = capsys.readouterr().out
    assert "python -m eval.accuracy --task=needle" in out and "--task_file" in out and "--shots" in out


# The library itself, on a small trained model.


@pytest.fixture(scope="module")
def two_layers(stories, tmp_path_factory):
    """The folder of the trained model's first two layers, which are quicker to compile."""
    folder = tmp_path_factory.mktemp("models") / stories.name
    folder.mkdir()
    for file in stories.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((stories / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": 2}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").unlink()
    held = safetensors.numpy.load_file(stories / "model.safetensors")
    kept = {name: x for name, x in held.items() if not re.match(r"model\.layers\.[2-9]", name)}
    safetensors.numpy.save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def scored(stories, two_layers, tmp_path_factory):
    """Records and samples by protocol: the 8 shortest items of two tasks, with one example each, dense and local."""
    made, names = {}, ("copa", "winogrande")
    data = tmp_path_factory.mktemp("tasks")
    for name in names:
        lines = (stories.parent / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"{name}.jsonl").write_text("".join(sorted(lines, key=len)[:8]), encoding="utf-8")
    for protocol in accuracy.PROTOCOLS:
        folder = tmp_path_factory.mktemp(protocol)
        argv = ["accuracy", f"--model={two_layers}", "--shots=1", "--batch=16", f"--protocol={protocol}"]
        for name in names:
            argv += [f"--task={name}", f"--task_file={data / name}.jsonl"]
        argv += ["--policy=dense"] + (["--policy=local(kv_sparsity=0.8)"] if protocol != "prompt" else [])
        argv += [f"--out={folder / 'r.jsonl'}", f"--samples={folder / 's.jsonl'}"]
        assert common.run(accuracy.main, argv) == 0
        made[protocol] = [
            [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in ("r.jsonl", "s.jsonl")
        ]
    return made


@pytest.fixture(scope="module")
def oracle(two_layers, scored):
    """transformers' log-likelihoods of the choices of the same items, in the order of the samples."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(two_layers)
    model = transformers.AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.float32).eval()

    def loglikelihood(prompt, continuation):
        ids = tokenizer(prompt + " " + continuation, return_tensors="pt").input_ids
        n = ids.shape[1] - len(tokenizer(prompt).input_ids)
        with torch.no_grad():
            rows = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
        return float(rows[range(len(rows)), ids[0, 1:]][-n:].sum())

    found = []
    for s in [s for s in scored["decode"][1] if s["policy"] == "dense"]:
        if s["task"] == "winogrande":
            found.append([loglikelihood(s["prompt"] + context, s["continuation"]) for context in s["choices"]])
        else:
            found.append([loglikelihood(s["prompt"], choice) for choice in s["choices"]])
    return np.array(found)


@pytest.mark.parametrize("protocol", accuracy.PROTOCOLS)
def test_dense_scores_equal_those_of_transformers_on_the_same_items(scored, oracle, protocol):
    records, samples = scored[protocol]
    mine = [s for s in samples if s["policy"] == "dense"]
    assert oracle.shape == (16, 2) and [s["task"] for s in mine] == ["copa"] * 8 + ["winogrande"] * 8
    np.testing.assert_allclose([s["loglikelihoods"] for s in mine], oracle, rtol=0, atol=1e-3)
    right = oracle.argmax(1) == [s["label"] for s in mine]
    for task, expected in (("copa", right[:8].mean()), ("winogrande", right[8:].mean())):
        (record,) = [r for r in records if r["task"] == task and r["policy"] == "dense"]
        assert record["acc"] == expected and record["n"] == 8 and record["attended_frac"] == 1.0


def test_both_protocols_give_the_same_scores_dense_and_sparse(scored):
    decode, masked = (
        np.array([s["loglikelihoods"] for s in scored[protocol][1]]) for protocol in ("decode", "prefill_mask")
    )
    np.testing.assert_allclose(decode, masked, rtol=0, atol=2e-3)
    policies = np.array([s["policy"] for s in scored["decode"][1]])
    sparse = scored["decode"][0][1]
    assert sparse["policy"] == "local(kv_sparsity=0.8)" and 0.1 < sparse["attended_frac"] < 0.5
    assert np.abs(decode[policies == "dense"] - decode[policies != "dense"]).max() > 0.1
