"""`python -m eval.calibrate`: what is read, what is written, mistakes in one sentence; the bundled model's statistics."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import alisa_jax
from alisa_jax.analysis.calibrate import calibrate as statistics
from alisa_jax.calibration import Calibration
from alisa_jax.models import checkpoint
from alisa_jax.models.decoder import Decoder, ModelConfig
from eval import calibrate
from eval.script import common
from eval.text import windows

WORDS = ("<bos>", "the", "cat", "sat", "mat", "dog")
NAMES = ("k_min", "k_max", "v_min", "v_max", "q_abs", "k_abs", "qk_abs")
CONFIG = ModelConfig("llama", len(WORDS), 8, 1, 2, 1, 4, 12, 32)


class Bench:
    """A tiny model with a tokenizer of words, a text of 300 of them, and `call(*flags)` -> exit code."""

    def __init__(self, folder):
        self.folder, self.out, self.loads = folder, folder / "out.json", 0
        self.tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="dog"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 32}))
        (folder / "model.safetensors").write_bytes(b"weights")
        self.words = np.random.default_rng(4).integers(1, len(WORDS), 300)
        (folder / "text.txt").write_text(" ".join(WORDS[i] for i in self.words))
        rng, shapes = np.random.default_rng(1), jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0))
        params = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape, np.float32)), shapes)
        self.model = checkpoint.Model(Decoder(CONFIG), params, self.tokenizer, "tiny", 0, (), "tiny")

    def load(self, name):
        self.loads += 1
        return self.model

    def call(self, *flags):
        argv = ["calibrate", f"--model={self.folder}", f"--text={self.folder / 'text.txt'}", "--block_tokens=16"]
        return common.run(lambda a: calibrate.main(a, self.load), [*argv, f"--out={self.out}", *flags])

    def blocks(self, *flags):
        """What the script would read, without a run."""
        argv = ["calibrate", f"--model={self.folder}", f"--out={self.folder / 'none'}", "--block_tokens=16", *flags]
        setup, _ = calibrate.config([*argv, f"--text={self.folder / 'text.txt'}"])
        return calibrate.blocks(calibrate.read(setup.text), self.model, setup)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_the_file_holds_the_statistics_of_the_blocks_that_were_asked_for(bench, capsys):
    assert bench.call("--order=running", "--tokens=64", "--batch=3", "--json") == 0
    (line,), err = (lambda out: (out.out.splitlines(), out.err))(capsys.readouterr())
    blocks = np.concatenate(
        [np.zeros((4, 1), np.int32), bench.words[:60].reshape(4, 15)], axis=1
    )  # each begins with BOS
    want, got, record = statistics(bench.model, blocks), Calibration.load(bench.out), json.loads(line)
    for name in NAMES:
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-7)
    assert (got.n_tokens, got.model) == (64, "tiny")
    assert got.data == "4 running blocks of 16 tokens of text.txt, seed 0"
    expected = {
        "script": "eval.calibrate",
        "model": bench.folder.name,
        "n": 64,
        "blocks": 4,
        "batch": 3,
        "out": "out.json",
    }
    assert {name: record[name] for name in expected} == expected
    top = np.argmax(want.qk_abs[0], axis=-1)[:, None]  # a quarter of 4 channels
    held = (np.take_along_axis(want.qk_abs[0], top, -1)[:, 0] / want.qk_abs[0].sum(-1)).mean()
    assert record["held_frac_by_qk_per_layer"] == pytest.approx([held], rel=1e-4)
    assert record["held_frac_by_k_per_layer"][0] <= held * (1 + 1e-6) and "held by qk" in err


def test_blocks_are_drawn_by_the_seed_or_run_as_the_text_does(bench, monkeypatch):
    monkeypatch.setattr(calibrate, "PIECE_CHARACTERS", 40)
    running = bench.blocks("--order=running", "--tokens=160")
    np.testing.assert_array_equal(running, bench.blocks("--order=running", "--tokens=160", "--seed=1"))
    one, same, other = (bench.blocks("--tokens=160", f"--seed={seed}") for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert running.shape == one.shape == (10, 16) and (one != other).any() and (one != running).any()
    assert len(bench.blocks()) >= 300 // 15  # by default as much as there is


def test_documents_are_joined_and_their_ends_are_no_tokens(bench):
    (bench.folder / "text.txt").write_text(windows.DOCUMENT_END.join(["the cat " * 10, " sat mat\n" * 10]))
    np.testing.assert_array_equal(
        bench.blocks("--order=running"), [[0, *[1, 2] * 7, 1], [0, 2, 1, 2, 1, 2, *[3, 4] * 5]]
    )


def test_a_file_that_is_there_is_not_written_over_unless_asked(bench, capsys):
    bench.out.write_text("mine")
    assert bench.call() == common.EXIT_MISTAKE and bench.out.read_text() == "mine" and bench.loads == 0
    assert "is there already; --rerun writes it anew" in capsys.readouterr().err
    assert bench.call("--rerun", "--digits=3") == 0 and Calibration.load(bench.out).n_tokens == 16 * 20
    assert sorted(path.name for path in bench.folder.glob("*.part")) == []


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--out="], "give --out, the file to write"),
        (["--out=."], "--out: '.' is a folder: give the file to write"),
        (["--tokens=15"], "--tokens must be at least the 16 of one block, got 15"),
        (["--block_tokens=33"], "--block_tokens must be in 2..32, the context of "),
        (["--text=nowhere"], "cannot read the text 'nowhere'"),
        (["--model=random:opt_125m"], "random:opt_125m has no tokenizer"),
        (["--order=sorted"], "--order=sorted"),
        (["--seed=-1"], "--seed must be in 0..4294967295, got -1"),
        (["--tokens=640"], "40 blocks of 16 tokens are asked for, and text.txt has 300 tokens, which make 20"),
        (["extra"], "unexpected argument 'extra'"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_and_nothing_is_written(bench, capsys, flags, sentence):
    assert bench.call(*flags) == common.EXIT_MISTAKE
    err = capsys.readouterr().err
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1
    assert not bench.out.exists()


def test_a_text_of_less_than_a_block_is_told(bench, capsys):
    (bench.folder / "text.txt").write_text("the cat sat")
    assert bench.call() == common.EXIT_MISTAKE
    assert "text.txt has 3 tokens, which make 0" in capsys.readouterr().err


def test_the_bundled_statistics_are_those_of_the_bundled_model():
    """A look at a little of another text: alike in size, and the same channels come first."""
    kept = Calibration.load(checkpoint.BUNDLED / "calibration.json")
    model = alisa_jax.load("bundled")
    kept.check(model.decoder.config)
    assert kept.n_tokens == 131072 and kept.model == "bundled" and "stdlib-train" in kept.data
    tokens = model.tokenizer.encode(windows.read(windows.BUNDLED).characters[:12000], add_special_tokens=False).ids
    looked = statistics(model, np.array(tokens[: 4 * 512]).reshape(4, 512))
    for name in ("q_abs", "k_abs", "qk_abs"):
        one, other = (np.asarray(getattr(x, name), np.float64) for x in (kept, looked))
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.99, name
    best = [np.argsort(-x.qk_abs, axis=-1)[..., :16] for x in (kept, looked)]
    shared = [len(set(a) & set(b)) for a, b in zip(*(x.reshape(-1, 16) for x in best), strict=True)]
    assert np.mean(shared) > 14
    for part in ("k", "v"):  # nearly nothing lies outside the ranges of 131072 tokens
        low, high = (getattr(kept, f"{part}_{end}") for end in ("min", "max"))
        inside = (getattr(looked, f"{part}_min") >= low - 1) & (getattr(looked, f"{part}_max") <= high + 1)
        assert inside.mean() > 0.99
