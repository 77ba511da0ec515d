"""`python -m eval.perplexity` on a small known model: values, records, resuming, mistakes in one sentence."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from eval import perplexity
from eval.script import common

pytestmark = pytest.mark.slow

TEXT = "the cat sat on the mat; naïve café 日本 🙂 and the dog did not.\n" * 12
VALUES = ("token_perplexity", "n", "stderr", "bits_per_byte", "word_perplexity", "attended_frac_per_layer")


class BigramEngine:
    """p(next | token) from a fixed table, the policy's text in the seed; counts its calls."""

    def __init__(self, vocab_size: int, policy: str, calls: list, stop_at: int | None = None):
        logits = np.random.default_rng(list(policy.encode())).normal(size=(vocab_size, vocab_size))
        self.table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        self.calls, self.stop_at = calls, stop_at

    def score(self, sequences, protocol="decode", progress=False, last=None):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append([len(s) for s in sequences])
        pairs = [(np.asarray(s[:-1]), np.asarray(s[1:])) for s in sequences]
        return SimpleNamespace(
            logprobs=[self.table[a, b].astype(np.float32) for a, b in pairs],
            correct=[self.table[a].argmax(-1) == b for a, b in pairs],
            attended_frac=np.asarray([1.0, 0.25], np.float32),
            clipped_frac=np.asarray([0.0, 0.0005 * len(sequences)]),
            kv_bytes_per_token=64.0,
            stats_bytes_per_token=4.0,
            compiles=2,
            wall_s=0.0,
            implementation="bigram",
            implementation_reason="asked for",
            placement=None,
            decoded_tokens=sum(len(s) - 1 for s in sequences),
        )


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<bos>"], show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made


@pytest.fixture
def bench(tmp_path, tokenizer):
    """A model folder with a context of 64, a text, and `call(*flags)` -> exit code, with the known model."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    setup = SimpleNamespace(
        folder=folder, text=tmp_path / "text.txt", calls=[], loads=[], dtypes=[], stop_at=None, bos_id=0
    )

    def load(name, dtype=None):
        setup.loads.append(name)
        setup.dtypes += [dtype] if dtype else []
        return SimpleNamespace(tokenizer=tokenizer, bos_id=setup.bos_id, eos_ids=(), name="tiny")

    def make_engine(model, policy, codec):
        return BigramEngine(tokenizer.get_vocab_size(), policy, setup.calls, setup.stop_at)

    def call(*flags):
        argv = ["perplexity", f"--model={folder}", f"--text={setup.text}", *flags]
        return common.run(lambda a: perplexity.main(a, load, make_engine), argv)

    setup.call = call
    return setup


def records_of(capsys):
    out = capsys.readouterr()
    return [json.loads(line) for line in out.out.splitlines()], out.err


@pytest.mark.parametrize("bos_id", [0, None])
def test_values_equal_those_of_the_whole_text_worked_out_by_hand(bench, tokenizer, capsys, bos_id):
    bench.bos_id = bos_id
    assert bench.call("--context=32", "--stride=7", "--max_tokens=0", "--batch=3", "--json") == 0
    (record,), _ = records_of(capsys)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    whole = ids if bos_id is None else [bos_id, *ids]  # a bigram model does not see where windows begin
    table = BigramEngine(tokenizer.get_vocab_size(), "dense", []).table
    nll = -sum(table[a, b] for a, b in itertools.pairwise(whole))
    n = len(whole) - 1
    assert record["n"] == n
    assert math.isclose(record["token_perplexity"], math.exp(nll / n), rel_tol=1e-6)
    if bos_id is not None:
        assert math.isclose(record["bits_per_byte"], nll / math.log(2) / len(TEXT.encode()), rel_tol=1e-6)
        assert math.isclose(record["word_perplexity"], math.exp(nll / len(TEXT.split())), rel_tol=1e-5)
    assert max(max(lengths) for lengths in bench.calls) == 32
    assert [len(lengths) for lengths in bench.calls][:-1] == [3] * (len(bench.calls) - 1)


def test_a_record_says_what_ran_on_what_and_how(bench, capsys):
    assert bench.call("--policy=swa(kv_sparsity=0.80)", "--context=32", "--stride=16", "--seed=3", "--json") == 0
    (record,), err = records_of(capsys)
    expected = {
        "model": "tiny",
        "data": "text.txt",
        "policy": "swa(kv_sparsity=0.8)",
        "codec": "raw",
        "placement": "resident",
        "protocol": "decode",
        "window_tokens": 32,
        "stride_tokens": 16,
        "seed": 3,
        "implementation": "bigram",
        "implementation_reason": "asked for",
        "basis": "measured",
        "attended_frac_per_layer": [1.0, 0.25],
        "attended_frac": 0.625,
        "kv_bytes_per_token": 64.0,
        "stats_bytes_per_token": 4.0,
    }
    assert {key: record[key] for key in expected} == expected
    assert record["compiles"] == 2 * len(bench.calls)
    assert record["stderr"] > 0 and len(record["data_sha256"]) == len(record["model_sha256"]) == 64
    assert "swa(kv_sparsity=0.8)" in err and "windows of 32 tokens every 16" in err


def test_without_json_the_table_is_on_stdout_and_one_window_has_no_stderr(bench, capsys):
    assert bench.call("--context=32", "--max_tokens=31", "--policy=dense", "--policy=local(tokens=4)") == 0
    out = capsys.readouterr().out
    assert "local(tokens=4)" in out and "1 windows of 32 tokens every 31" in out
    rows = [line for line in out.splitlines() if line.startswith(("dense ", "local"))]
    assert len(rows) == 2 and all("±" not in row for row in rows)


def test_a_codec_that_quantises_has_a_clipped_column_and_field(bench, capsys):
    """Weighted by the tokens that each batch predicted: here 2 x 63 of a batch of two and 62 of one alone."""
    flags = ["--context=64", "--max_tokens=188", "--stride=63", "--batch=2"]
    assert bench.call(*flags, "--codec=int8(axis=token)", f"--out={bench.text.parent / 'r.jsonl'}") == 0
    table = capsys.readouterr().out
    record = json.loads((bench.text.parent / "r.jsonl").read_text())
    assert bench.calls == [[64, 64], [63]]
    per_layer = [0.0, (126 * 0.001 + 62 * 0.0005) / 188]
    np.testing.assert_allclose(record["clipped_frac_per_layer"], per_layer, rtol=1e-9)
    assert math.isclose(record["clipped_frac"], per_layer[1] / 2, rel_tol=1e-9)
    assert "clipped" in table and f"{100 * record['clipped_frac']:.4f} %" in table
    assert bench.call(*flags) == 0
    assert "clipped" not in capsys.readouterr().out


def test_a_last_window_too_short_to_calibrate_on_is_left_out_and_told(bench, capsys):
    flags = ["--context=64", "--max_tokens=150", "--json"]
    assert bench.call(*flags, "--codec=int8(calibration_tokens=24)") == 0
    (record,), err = records_of(capsys)
    assert bench.calls == [[64, 64, 25]] and record["windows"] == 3 and record["n"] == 150
    bench.calls.clear()
    assert bench.call(*flags, "--codec=int8(calibration_tokens=25)") == 0
    (record,), err = records_of(capsys)
    assert bench.calls == [[64, 64]] and record["windows"] == 2 and record["n"] == 126
    assert "the last window is left out: it has 25 tokens" in err and "the first 25 of a window" in err


def test_the_same_command_gives_the_same_values(bench, capsys):
    both = []
    for _ in range(2):
        assert bench.call("--context=32", "--json") == 0
        both.append(records_of(capsys)[0][0])
    assert all(both[0][key] == both[1][key] for key in VALUES)


def test_finished_cells_are_not_run_again_unless_asked(bench, tmp_path, capsys):
    flags = ["--context=32", f"--out={tmp_path / 'new' / 'r.jsonl'}", "--json"]
    assert bench.call(*flags) == 0
    first, ran = records_of(capsys)[0], len(bench.calls)
    assert bench.call(*flags, "--policy=dense", "--policy=local(tokens=4)") == 0
    again, err = records_of(capsys)
    assert len(bench.calls) == 2 * ran and again[0] == first[0] and "1 of 2 cells were already in" in err
    assert bench.call(*flags, "--rerun") == 0
    assert len(bench.calls) == 3 * ran
    (bench.folder / "model.safetensors").write_bytes(b"trained further")
    assert bench.call(*flags) == 0
    assert len(bench.calls) == 4 * ran
    assert bench.call(*flags, "--stride=8") == 0
    assert len(bench.calls) > 5 * ran


def test_what_a_text_is_read_as_makes_a_new_cell(bench, tmp_path, capsys):
    """A repaired tokenizer, by its file or by how it is read; other settings of the model; another type."""
    flags = ["--context=32", f"--out={tmp_path / 'r.jsonl'}", "--json"]
    runs = []

    def run(*more) -> dict:
        bench.calls.clear()
        assert bench.call(*flags, *more) == 0
        runs.append(len(bench.calls) > 0)
        return records_of(capsys)[0][0]

    first = run()
    assert first["dtype"] == "float32" and first["model_hash"] == "all bytes" and len(first["ids_sha256"]) == 64
    assert run("--dtype=float32") == first
    bench.bos_id = None
    run()
    for name in ("tokenizer.json", "generation_config.json", "calibration.json"):
        (bench.folder / name).write_text("{}")
        run()
    moved = tmp_path / "elsewhere" / bench.folder.name
    shutil.copytree(bench.folder, moved)
    run(f"--model={moved}")
    assert run("--dtype=bfloat16")["dtype"] == "bfloat16"
    assert runs == [True, False, True, True, True, True, False, True] and bench.dtypes == ["float32", "bfloat16"]


def test_an_interrupted_run_goes_on_with_the_cell_it_was_in(bench, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    flags = [
        "--context=32",
        "--batch=4",
        f"--out={out}",
        "--policy=dense",
        "--policy=local(tokens=4)",
        "--json",
    ]
    assert bench.call(*flags) == 0
    per_cell, whole = len(bench.calls) // 2, records_of(capsys)[0]
    assert per_cell >= 2
    out.unlink()
    bench.calls.clear()
    bench.stop_at = per_cell + 1
    assert bench.call(*flags) == common.EXIT_INTERRUPTED
    assert "interrupted" in capsys.readouterr().err and len(out.read_text().splitlines()) == 1
    with open(out, "a") as file:
        file.write('{"script": "eval.perp')  # what a kill in the middle of a write would leave
    bench.stop_at = None
    bench.calls.clear()
    assert bench.call(*flags) == 0
    resumed, _ = records_of(capsys)
    assert len(bench.calls) == per_cell
    assert [[r[key] for key in VALUES] for r in resumed] == [[r[key] for key in VALUES] for r in whole]
    assert len(out.read_text().splitlines()) == 2


MISTAKES = [
    ("--policy=swo(kv_sparsity=0.8)", "unknown name 'swo'"),
    ("--policy=swa(sparsity=0.8)", "unknown key 'sparsity'"),
    ("--policy=swa(kv_sparsity=1.0)", "kv_sparsity"),
    ("--policy=local(kv_sparsity=-0.1)", "kv_sparsity"),
    ("--codec=int9", "unknown name 'int9'"),
    ("--attention_impl=pallas", "--attention_impl: impl=pallas cannot run: it needs a GPU, and the device is cpu"),
    ("--attention_impl=triton", "<auto|xla|pallas|interpret>"),
    ("--codec=int8(axis=row)", "axis"),
    ("--codec=int8(axis=token,headroom=1.0)", "headroom goes with axis=channel"),
    (
        "--codec=int8",
        "int8 takes its range from the first 64 tokens of a sequence, so windows need more than 64, got 64",
    ),
    ("--protocol=prefill", "should be one of <decode|prefill_mask>"),
    ("--polcy=dense", "Unknown command line flag 'polcy'"),
    ("dense", "unexpected argument 'dense'"),
    ("--context=65", "--context must be in 2..64, the context of tiny, got 65"),
    ("--context=1", "--context must be in 2..64"),
    ("--stride=0", "--stride"),
    ("--stride=65", "--stride must be in 1..64, the context, got 65"),
    ("--batch=0", "--batch"),
    ("--text=absent.txt", "cannot read the text 'absent.txt'"),
    ("--model=absent", "no model at 'absent'"),
    ("--model=random:gpt9", "unknown random model 'gpt9'"),
    ("--out=/dev/null/r.jsonl", "--out: cannot write results"),
]


@pytest.mark.parametrize(("flag", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_before_the_model_is_loaded(bench, capsys, flag, sentence):
    assert bench.call(flag) == common.EXIT_MISTAKE
    out = capsys.readouterr()
    assert out.out == "" and sentence in out.err and "Traceback" not in out.err
    assert len(out.err.strip().splitlines()) == 1
    assert not bench.loads and not bench.calls


def test_a_text_shorter_than_a_window_writes_nothing(bench, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    assert bench.call("--context=64", "--max_tokens=20", f"--out={out}") == common.EXIT_MISTAKE
    assert "less than the 63 of one window with context=64" in capsys.readouterr().err
    assert not bench.calls and out.read_text() == ""


def test_a_model_without_a_number_is_an_error_and_not_a_record(bench, tmp_path, capsys, monkeypatch):
    score = BigramEngine.score

    def broken(self, *args, **kwargs):
        scores = score(self, *args, **kwargs)
        scores.logprobs[0][-1] = np.nan
        return scores

    monkeypatch.setattr(BigramEngine, "score", broken)
    out = tmp_path / "r.jsonl"
    assert bench.call("--context=64", f"--out={out}") == common.EXIT_MISTAKE
    assert "not finite" in capsys.readouterr().err and out.read_text() == ""


def test_the_command_itself_tells_an_unknown_flag_in_one_sentence():
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-m", "eval.perplexity", "--sparsity=0.8"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == common.EXIT_MISTAKE and done.stdout == ""
    assert "Unknown command line flag 'sparsity'" in done.stderr and "Traceback" not in done.stderr


def test_help_prints_the_flags_and_the_paste_ready_command(capsys):
    assert common.run(perplexity.main, ["perplexity", "--help"]) == 0
    out = capsys.readouterr().out
    assert "python -m eval.perplexity --policy=dense" in out and "--stride" in out


def test_a_broken_model_folder_is_told_without_a_traceback(bench, capsys):
    def load(name):
        raise ValueError("tensor 'model.norm.weight' is missing")

    argv = ["perplexity", f"--model={bench.folder}", f"--text={bench.text}"]
    assert common.run(lambda a: perplexity.main(a, load), argv) == common.EXIT_MISTAKE
    assert capsys.readouterr().err == "error: --model: tensor 'model.norm.weight' is missing\n"
    (bench.folder / "config.json").write_text("{")
    assert bench.call() == common.EXIT_MISTAKE
    assert "no model configuration" in capsys.readouterr().err


# The library itself, on a small trained model.


@pytest.fixture(scope="module")
def story_file(stories, tmp_path_factory):
    """Four pure-ASCII stories, about 1,000 tokens."""
    text = (stories.parent / "text" / "tinystories.txt").read_text(encoding="utf-8")
    chosen = [s.strip() for s in text.split("<|endoftext|>") if s.isascii() and len(s) > 600][:4]
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n".join(chosen), encoding="utf-8")
    return path


@pytest.mark.parametrize("protocol", perplexity.PROTOCOLS)
def test_dense_perplexity_equals_that_of_transformers_on_the_same_windows(stories, story_file, capsys, protocol):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    context, stride = 128, 96
    argv = ["perplexity", f"--model={stories}", f"--text={story_file}", f"--context={context}"]
    argv += [f"--stride={stride}", "--max_tokens=600", f"--protocol={protocol}", "--json"]
    assert common.run(perplexity.main, argv) == 0
    (record,), _ = records_of(capsys)

    tokenizer = Tokenizer.from_file(str(stories / "tokenizer.json"))
    ids = tokenizer.encode(story_file.read_text(), add_special_tokens=False).ids[:600]
    oracle = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    nll, scored = 0.0, 0
    for start in range(0, 600, stride):
        window = ids[start : start + context - 1]
        with torch.no_grad():
            logits = oracle(torch.tensor([[1, *window]])).logits[0, :-1].double()
        rows = torch.log_softmax(logits, -1)[range(len(window)), window].tolist()
        nll -= sum(rows[scored - start :])
        scored = start + len(window)
        if scored == 600:
            break
    assert record["n"] == scored == 600
    assert math.isclose(record["token_perplexity"], math.exp(nll / 600), rel_tol=1e-3)


def test_a_fresh_process_gives_the_same_values_and_only_records_on_stdout(stories, story_file, capsys):
    flags = [f"--model={stories}", f"--text={story_file}", "--json", "--context=64", "--max_tokens=126"]
    flags += ["--policy=dense", "--policy=swa(kv_sparsity=0.8)"]
    assert common.run(perplexity.main, ["perplexity", *flags]) == 0
    here, _ = records_of(capsys)
    command = [sys.executable, "-m", "eval.perplexity", *flags]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    runs = [here, [json.loads(line) for line in done.stdout.splitlines()]]
    assert [r["policy"] for r in runs[0]] == ["dense", "swa(kv_sparsity=0.8)"]
    assert [[r[key] for key in VALUES] for r in runs[0]] == [[r[key] for key in VALUES] for r in runs[1]]
    dense, swa = runs[0]
    assert dense["attended_frac"] == 1.0 and swa["attended_frac"] < 0.5
    assert swa["token_perplexity"] != dense["token_perplexity"]


def test_a_truncated_checkpoint_is_told_in_one_sentence(stories, story_file, tmp_path, capsys):
    folder = tmp_path / "cut"
    shutil.copytree(stories, folder, copy_function=shutil.copyfile)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50_000])
    out = tmp_path / "r.jsonl"
    argv = ["perplexity", f"--model={folder}", f"--text={story_file}", "--context=64", f"--out={out}"]
    assert common.run(perplexity.main, argv) == common.EXIT_MISTAKE
    err = capsys.readouterr().err
    assert "model.safetensors" in err and len(err.strip().splitlines()) == 1 and out.read_text() == ""
