"""`python -m eval.guess`: what it counts of a tiny model, and mistakes in one sentence."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import alisa_jax
from alisa_jax.models import checkpoint
from alisa_jax.models.decoder import Decoder, ModelConfig
from eval import guess
from eval.script import common

pytestmark = pytest.mark.slow

CONFIG = ModelConfig("llama", 7, 8, 2, 4, 2, 4, 12, 64)
POLICY = "double_sparsity(kv_sparsity=0.5,channels=1,dense_layers=0)"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """`bench(*flags)` -> exit code."""
    folder = tmp_path_factory.mktemp("guess")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(7)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64, "torch_dtype": "float32"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    rng, shapes = np.random.default_rng(1), jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0))
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in rng.integers(0, 7, 200)))
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape, np.float32)), shapes)
    model = checkpoint.Model(Decoder(CONFIG), params, words, "tiny", None, (), "tiny")
    given = [f"--model={folder}", f"--text={folder / 'text.txt'}", "--tokens=40", "--new_tokens=5", "--windows=2"]
    return lambda *flags: common.run(lambda a: guess.main(a, lambda name: model), ["guess", *given, *flags]), model


def test_recall_bytes_and_nats_are_those_of_the_runs(bench, capsys):
    call, model = bench
    assert call(f"--policy={POLICY}", "--json") == 0
    out = capsys.readouterr()
    record = json.loads(out.out)
    engine = alisa_jax.Engine(model, POLICY, "raw", "flexgen(cache_device_frac=0.0)")
    setting = engine.placement.setting((35, 35), 5)
    assert record["stream_bytes"] == 4 * 2 * 2 * setting.token_bytes * 32  # steps, layers, windows
    assert record["load_frac"] == record["load_bytes"] / record["stream_bytes"] < 0.6
    assert record["layers"] == [1] and record["recall_per_layer"] == [record["guess_recall"]]
    assert 0 < record["guess_recall"] < 1 and record["n"] == 10 and record["windows"] == 2
    assert len({record[f"{name}_nats"] for name in ("guess", "true", "dense")}) == 3
    assert f"load / stream {record['load_frac']:.3f}" in out.err


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--policy=swa(kv_sparsity=0.5)", "does not choose by its query"),
        ("--placement=accelerate", "accelerate has no layer in flight here"),
        ("--tokens=65", "--tokens must be at most 64"),
        ("--tokens=6", "--tokens must be above --new_tokens + 1, got 6 and 5"),
        ("--calibration=none.json", "--calibration: 'none.json': No such file"),
    ],
)
def test_mistakes_are_named_in_one_sentence(bench, capsys, flag, says):
    assert bench[0](f"--policy={POLICY}", flag) == common.EXIT_MISTAKE
    assert says in capsys.readouterr().err
