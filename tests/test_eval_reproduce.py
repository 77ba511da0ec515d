"""`python -m eval.reproduce` on a small known model: table, records, figure, and recall accuracy."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from eval import common, recall, reproduce

TEXT = "the cat sat on the mat and the dog did not, " * 40
SIZES = reproduce.Sizes(sparsities=(0.0, 0.5), context_tokens=48, windows=3, episode_lengths=(24, 48), episodes=2)
N_CELLS = 7


class InductionEngine:
    """Says what followed the latest earlier place of the same token within `reach` tokens (p = 1/2)."""

    def __init__(self, vocab_size: int, policy: str, calls: list, stop_at: int | None):
        self.vocab_size, self.calls, self.stop_at = vocab_size, calls, stop_at
        self.reach = 10**6 if policy in ("dense", "local(kv_sparsity=0.0)") or "swa" in policy else 4

    def guess(self, tokens, t):
        earlier = [p for p in range(max(0, t - self.reach), t) if tokens[p] == tokens[t]]
        return tokens[earlier[-1] + 1] if earlier else -1

    def score(self, sequences, protocol="decode", progress=False):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(sequences)
        hits = [np.asarray([self.guess(s, t) == s[t + 1] for t in range(len(s) - 1)]) for s in sequences]
        return SimpleNamespace(
            logprobs=[np.where(h, math.log(0.5), -math.log(self.vocab_size)).astype(np.float32) for h in hits],
            correct=hits,
            attended_frac=np.asarray([0.5, 0.5], np.float32),
            kv_bytes_per_token=64.0,
            stats_bytes_per_token=0.0,
            compiles=1,
            wall_s=0.0,
            implementation="induction",
        )


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=["<bos>"], show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made


@pytest.fixture
def model(tokenizer):
    config = SimpleNamespace(vocab_size=tokenizer.get_vocab_size())
    decoder = SimpleNamespace(config=config)
    return SimpleNamespace(tokenizer=tokenizer, bos_id=0, eos_ids=(), name="tiny", decoder=decoder)


@pytest.fixture
def bench(tmp_path, model):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "text.txt").write_text(TEXT)
    setup = SimpleNamespace(calls=[], stop_at=None, out=tmp_path / "r.jsonl", png=tmp_path / "r.png")

    def make_engine(model, policy, codec):
        return InductionEngine(model.decoder.config.vocab_size, policy, setup.calls, setup.stop_at)

    def call(*flags):
        argv = ["x", f"--model={folder}", f"--text={tmp_path / 'text.txt'}", f"--out={setup.out}", *flags]
        return common.run(lambda a: reproduce.main(a, lambda name: model, make_engine, SIZES), argv)

    setup.call = call
    return setup


def test_every_method_and_sparsity_has_a_row_a_record_and_a_point(bench, capsys):
    assert bench.call("--json") == 0
    out = capsys.readouterr()
    records = [json.loads(line) for line in out.out.splitlines()]
    assert len(records) == N_CELLS
    pairs = {(r["method"], r["kv_sparsity"]) for r in records}
    assert pairs == {("dense", 0.0), *((m, s) for m in ("local", "strided", "swa") for s in (0.0, 0.5))}
    by = {(r["method"], r["kv_sparsity"]): r for r in records}
    assert by["swa", 0.5]["token_perplexity"] == by["dense", 0.0]["token_perplexity"]
    assert by["local", 0.5]["recall_accuracy_frac"] < by["dense", 0.0]["recall_accuracy_frac"]
    assert by["local", 0.5]["policy"] == "local(kv_sparsity=0.5)" and by["swa", 0.5]["windows"] == 3
    assert "Figure 8" in out.err and "LLaMA-7B" in out.err and "another model" in out.err
    assert bench.png.read_bytes().startswith(b"\x89PNG") and "figure:" in out.err


def test_all_sequences_of_a_cell_are_one_batch_and_the_same_in_every_cell(bench):
    assert bench.call() == 0
    assert len(bench.calls) == N_CELLS
    assert all(call == bench.calls[0] for call in bench.calls)
    assert sorted(map(len, bench.calls[0])) == [24] * 4 + [48] * 7


def test_a_second_run_measures_nothing_and_prints_the_same_table(bench, capsys):
    assert bench.call() == 0
    first, ran = capsys.readouterr().out, len(bench.calls)
    assert bench.call() == 0
    again = capsys.readouterr()
    assert len(bench.calls) == ran and again.out == first and f"{N_CELLS} of {N_CELLS} cells" in again.err
    assert bench.call("--rerun") == 0
    assert len(bench.calls) == 2 * ran


def test_an_interrupted_run_shows_missing_cells_as_a_dash_and_goes_on(bench, capsys):
    bench.stop_at = 3
    assert bench.call() == common.EXIT_INTERRUPTED
    out = capsys.readouterr().out
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("swa")] == [
        ["swa", "0", "%"],
        ["swa", "50", "%"],
    ]
    assert all(line.split()[3] == "-" for line in out.splitlines() if line.startswith("swa"))
    assert not bench.png.exists()
    bench.stop_at = None
    assert bench.call() == 0
    assert len(bench.calls) == N_CELLS and bench.png.exists()


def test_without_matplotlib_the_script_says_so_and_ends_well(bench, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert bench.call() == 0
    assert "no figure: matplotlib is not installed" in capsys.readouterr().err
    assert not bench.png.exists()


def test_a_figure_that_cannot_be_written_is_told_in_one_sentence(bench, tmp_path, capsys):
    assert bench.call(f"--figure={tmp_path / 'absent' / 'f.png'}") == common.EXIT_MISTAKE
    assert "cannot write the figure" in capsys.readouterr().err


def test_recall_counts_only_the_answers():
    answers = np.asarray([False, False, False, True, True])
    one = recall.Episode("copy", np.arange(5), answers)
    two = recall.Episode("lookup", np.arange(5), answers)
    values = recall.accuracies([one, two], [np.asarray([1, 1, 0, 1], bool), np.asarray([0, 0, 1, 1], bool)])
    assert values["recall_accuracy_frac"] == 0.75 and values["recall_n"] == 4
    assert values["recall_copy_accuracy_frac"] == 0.5 and values["recall_lookup_accuracy_frac"] == 1.0
    assert values["recall_copy_accuracy_frac_by_length"] == {"5": 0.5}
    assert values["recall_copy_accuracy_frac_stderr"] is None
    assert math.isclose(values["recall_accuracy_frac_stderr"], 0.25)


def test_episodes_are_the_same_for_a_seed_and_use_no_special_token(model):
    first, again = (recall.draw(model, ("copy", "lookup"), (32,), 3, seed=5) for _ in range(2))
    other = recall.draw(model, ("copy", "lookup"), (32,), 3, seed=6)
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))
    assert any((a.tokens != b.tokens).any() for a, b in zip(first, other, strict=True))
    assert all(e.tokens[0] == 0 and (e.tokens[1:] != 0).all() and len(e.tokens) == 32 for e in first)


def test_an_induction_model_answers_copies_and_cannot_without_reach(model):
    drawn = recall.draw(model, ("copy",), (64,), 4, seed=0)
    for policy, expected in [("dense", 1.0), ("strided(kv_sparsity=0.5)", 0.0)]:
        engine = InductionEngine(model.decoder.config.vocab_size, policy, [], None)
        correct = engine.score([e.tokens.tolist() for e in drawn]).correct
        values = recall.accuracies(drawn, correct)
        if expected:
            assert values["recall_accuracy_frac"] == 1.0
        else:
            assert values["recall_accuracy_frac"] < 0.5


def test_the_default_cells_are_the_four_methods_and_six_sparsities():
    cells = reproduce.Sizes().cells()
    assert cells[0] == ("dense", 0.0, "dense") and len(cells) == 19
    assert {s for _, s, _ in cells} == {0.0, 0.2, 0.4, 0.6, 0.8, 0.9}
    assert ("swa", 0.8, "swa(kv_sparsity=0.8)") in cells
