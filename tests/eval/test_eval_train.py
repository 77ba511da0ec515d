"""Training: it learns, it resumes exactly, what it exports loads, and bad input ends in one sentence."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.models import checkpoint
from alisa_jax.models.decoder import Decoder, ModelConfig
from eval import train
from eval.script import common
from eval.text import episodes
from eval.training import curriculum, learning

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLED_CONFIG = str(REPOSITORY / "configs" / "train" / "pylib_1m.py")
MODEL = dict(
    arch="llama",
    vocab_size=320,
    d_model=24,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=14,
    d_ff=40,
    max_positions=48,
    tie_embeddings=True,
)
CONFIG = dict(
    model=MODEL,
    stages=(
        dict(steps=8, length=48, batch=4, copy=0.5, lookup=0.0, ids=64),
        dict(steps=12, length=48, batch=4, copy=0.25, lookup=0.25, ids=318),
    ),
    learning_rate=1e-2,
    warmup_steps=2,
    decay_steps=6,
    weight_decay=0.01,
    beta2=0.98,
    clip_norm=1.0,
    answer_weight=2.0,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A small stand-in for the standard library: 60 files of repetitive source."""
    root = tmp_path_factory.mktemp("library")
    for i in range(60):
        lines = [f"def function_{j}(value):\n    return value + {i * j}\n" for j in range(20)]
        (root / f"module{i}.py").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(f"CONFIG = {CONFIG!r}\n")
    return curriculum.load_config(str(path))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, config, library):
    """An uninterrupted run: (workdir, params, tokenizer, heldout, record)."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, *train.train(config, workdir, seed=3, log_every=4, save_every=4, library=library)


def assert_same_arrays(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, two)


def test_the_loss_falls(whole_run):
    history = whole_run[-1]["history"]
    assert [row["step"] for row in history] == [4, 8, 12, 16, 20]
    assert history[-1]["text_nats"] < history[0]["text_nats"] - 1


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(whole_run, tmp_path, config, library):
    run = dict(seed=3, log_every=4, save_every=4, library=library)
    first = train.train(config, tmp_path, stop_at=9, **run)
    assert first[-1]["steps"] == 9
    params, _, _, record = train.train(config, tmp_path, **run)
    assert_same_arrays(params, whole_run[1])
    assert record["steps"] == 20 and record["trained_tokens"] == 20 * 4 * 48


def test_a_run_may_go_on_with_another_future_but_not_with_another_past(tmp_path, config, library):
    run = dict(seed=3, log_every=4, save_every=4, library=library)
    train.train(config, tmp_path, stop_at=8, **run)
    first, second = config.stages
    longer = dataclasses.replace(config, stages=(first, dataclasses.replace(second, copy=0.5, steps=16)))
    assert train.train(longer, tmp_path, stop_at=8, **run)[-1]["steps"] == 8
    other = dataclasses.replace(config, stages=(dataclasses.replace(first, copy=0.25), second))
    for refused, seed in [(other, 3), (dataclasses.replace(config, learning_rate=1e-3), 3), (config, 4)]:
        with pytest.raises(ValueError, match="another config, seed or text"):
            train.train(refused, tmp_path, **run | {"seed": seed})


def test_the_past_of_a_config_is_what_its_steps_depend_on(config):
    first, second = config.stages
    longer = dataclasses.replace(config, stages=(first, dataclasses.replace(second, steps=16)))
    assert config.past(14) == longer.past(14) and config.decay_begin == 14
    assert config.past(15) != longer.past(15)
    assert config.past(8) == dataclasses.replace(config, stages=(first,), decay_steps=0).past(8)
    assert config.tokens(11) == 11 * 4 * 48 and config.stage_at(7) == first and config.stage_at(8) == second


def test_a_batch_is_a_function_of_seed_and_step(config):
    stream = np.arange(500, dtype=np.int32) % 300 + 2
    stage = config.stages[1]
    one, two = (curriculum.make_batch(config, stage, stream, 7, 11) for _ in range(2))
    assert_same_arrays(one, two)
    assert (one[0] != curriculum.make_batch(config, stage, stream, 7, 12)[0]).any()


def test_a_batch_has_the_shares_of_its_stage_and_weighs_answers_only_in_recall(config):
    stream = np.arange(500, dtype=np.int32) % 300 + 2
    stage = dataclasses.replace(config.stages[1], batch=20, copy=0.25, lookup=0.25)
    tokens, weights, is_text = curriculum.make_batch(config, stage, stream, 0, 0)
    assert is_text.sum() == 10 and tokens.shape == weights.shape == (20, 48)
    assert (weights[is_text][:, 1:] == 1).all() and (weights[:, 0] == 0).all()
    assert set(np.unique(weights[~is_text])) == {0, config.answer_weight}


def test_recall_draws_from_the_first_ids_only(config):
    stage = dataclasses.replace(config.stages[0], copy=1.0)
    stream = np.full(500, 319, np.int32)
    tokens, _, _ = curriculum.make_batch(config, stage, stream, 0, 0)
    assert ((tokens < 2 + 64) | (tokens == 319)).all()


def test_blocks_of_queries_equal_plain_causal_attention():
    rng = np.random.default_rng(0)
    T, N, K, H = learning.QUERY_BLOCK * 2 + 5, 6, 3, 4
    q, k, v = (rng.standard_normal((2, T, n, H)).astype(np.float32) for n in (N, K, K))
    got = np.asarray(jax.jit(learning.causal_attend)(q, k, v)[0])
    for b, n, t in [(0, 0, 0), (0, 5, 1), (1, 2, 127), (1, 3, 128), (0, 1, T - 1)]:
        keys, values = k[b, : t + 1, n // 2].astype(np.float64), v[b, : t + 1, n // 2].astype(np.float64)
        weight = np.exp(keys @ q[b, t, n].astype(np.float64) / H**0.5)
        np.testing.assert_allclose(got[b, t, n], weight @ values / weight.sum(), rtol=1e-4, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def initial(decoder):
    return learning.initial_params(decoder, jax.random.key(0))


def test_losses_are_cross_entropies_of_the_next_token(config):
    decoder = Decoder(config.model)
    params = initial(decoder)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 320, (2, 9)), jnp.int32)
    nats, hits = jax.jit(learning.token_losses, static_argnums=0)(decoder, params, tokens)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], (2, 9))

    @jax.jit
    def forward(params):
        x = decoder.embed(params, tokens, positions)
        for layer in range(2):
            x, _ = decoder.block(params["blocks"][layer], x, positions, learning.causal_attend)
        return decoder.unembed(params, x)

    logits, tokens, nats, hits = (np.asarray(x) for x in (forward(params), tokens, nats, hits))
    logits = logits.astype(np.float64)
    for b in range(2):
        for t in range(8):
            row = logits[b, t]
            expected = np.log(np.exp(row).sum()) - row[tokens[b, t + 1]]
            assert abs(float(nats[b, t]) - expected) < 1e-5
            assert bool(hits[b, t]) == (row.argmax() == int(tokens[b, t + 1]))


@pytest.fixture(scope="module")
def start():
    """The bundled model's (decoder, initial parameters)."""
    decoder = Decoder(curriculum.load_config(BUNDLED_CONFIG).model)
    return decoder, initial(decoder)


def test_at_first_half_of_the_heads_of_layer_0_attend_to_the_previous_token(start):
    decoder, params = start
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 2048, (1, 40)), jnp.int32)
    positions = jnp.arange(40, dtype=jnp.int32)[None]

    @jax.jit
    def seen(params):
        x = decoder.embed(params, tokens, positions)
        return decoder.block(params["blocks"][0], x, positions, lambda q, k, v: (q, (q, k)))[1]

    q, k = (np.asarray(x[0]) for x in seen(params))
    logits = np.einsum("tnh,snh->nts", q, np.repeat(k, 2, axis=1)) / 8
    apart = [np.mean([logits[:2, t, t - n] for t in range(8, 40)]) for n in range(8)]
    assert apart[1] > max(apart[0], apart[2]) + 1 and apart[2] > apart[3] > apart[5] > apart[7]


def test_at_first_the_layers_above_match_equal_tokens_and_copy(start):
    _, params = start
    q, k, v, o = (np.asarray(params["blocks"][2][name]["weight"]).T for name in "qkvo")
    for head in range(4):
        mine, its = slice(head * 64, head * 64 + 64), slice(head // 2 * 64, head // 2 * 64 + 64)
        assert np.trace(q[:, mine] @ k[:, its].T) > 0.6 * np.linalg.norm(k[:, its]) ** 2
        assert np.corrcoef(o[mine].ravel(), v[:, its].T.ravel())[0, 1] > 0.6


def test_what_is_exported_loads_in_bfloat16_with_its_record(whole_run, tmp_path, config):
    _, params, tokenizer, heldout, trained = whole_run
    record = train.export(config, params, tokenizer, heldout, trained, tmp_path)
    model = checkpoint.load(tmp_path)
    assert model.bos_id == curriculum.BOS_ID and model.eos_ids == (curriculum.EOS_ID,)
    assert_same_arrays(model.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    text = "def function_3(value):\n    return value\n"
    assert model.tokenizer.decode(model.tokenizer.encode(text).ids) == text
    assert json.loads((tmp_path / "training.json").read_text()) == json.loads(json.dumps(record))
    assert record["text"]["heldout_files"] and len(record["text"]["heldout_sha256"]) == 64
    assert [row["length"] for row in record["evaluation"]] == [48]
    assert 0 < record["evaluation"][0]["heldout_nats_per_token"] < np.log(320)


def test_accuracy_is_the_share_of_answers_that_argmax_predicts(config, monkeypatch):
    def always_right(decoder, params, tokens):
        return jnp.zeros(tokens[:, 1:].shape), tokens[:, 1:] % 2 == 0

    monkeypatch.setattr(learning, "token_losses", always_right)
    heldout = np.arange(400, dtype=np.int32) % 300 + 2
    result = learning.evaluate(Decoder(config.model), None, heldout, 48, 7, seed=0)
    assert result["heldout_tokens"] == 8 * 47 and result["heldout_nats_per_token"] == 0
    assert result["copy_random_answers"] > 50 and 0.3 < result["copy_random_accuracy"] < 0.7


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"learning_rte": 1.0}, "does not define a CONFIG"),
        ({"stages": ({**CONFIG["stages"][0], "copy": 0.9, "lookup": 0.2},)}, "sum to at most 1"),
        ({"stages": ({**CONFIG["stages"][0], "length": 64},)}, "none longer than max_positions=48"),
        ({"stages": ({**CONFIG["stages"][0], "steps": 0},)}, "steps >= 1"),
        ({"stages": ({**CONFIG["stages"][0], "ids": 40},)}, "needs ids >= length"),
        ({"decay_steps": 30}, "too few to warm up and decay in"),
        ({"model": {**MODEL, "arch": "mamba"}}, "arch"),
    ],
)
def test_a_bad_config_is_refused_in_one_sentence(change, sentence, tmp_path):
    (tmp_path / "bad.py").write_text(f"CONFIG = { ({**CONFIG, **change})!r}\n")
    with pytest.raises(ValueError, match=sentence):
        curriculum.load_config(str(tmp_path / "bad.py"))


def test_the_config_of_the_bundled_model_is_within_its_limits():
    config = curriculum.load_config(BUNDLED_CONFIG)
    assert isinstance(config.model, ModelConfig)
    assert Decoder(config.model).count_params(embedding=False) <= 1_500_000
    assert config.stages[0].length <= 128 and config.context == config.model.max_positions == 1024
    lengths = [stage.length for stage in config.stages]
    assert lengths == sorted(lengths)


def test_the_bundled_model_is_what_its_config_and_its_record_say():
    model, config = checkpoint.load("bundled"), curriculum.load_config(BUNDLED_CONFIG)
    record = json.loads((checkpoint.BUNDLED / "training.json").read_text())
    assert model.decoder.config == config.model
    stated = json.loads(json.dumps(dataclasses.asdict(config)))
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}  # of fields that the record is older than
    later = {name: defaults[name] for name in stated["model"].keys() - record["config"]["model"].keys()}
    assert record["config"] | {"model": later | record["config"]["model"]} == stated
    assert record["steps"] == config.total_steps and record["trained_tokens"] == config.tokens(config.total_steps)
    assert record["non_embedding_params"] == model.decoder.count_params(embedding=False)
    assert model.tokenizer.get_vocab_size() == config.model.vocab_size
    assert sum(file.stat().st_size for file in checkpoint.BUNDLED.iterdir()) < 8e6
    assert all(map(episodes.is_held_out, record["text"]["heldout_files"]))


def test_the_bundled_model_recalls_what_is_in_its_context():
    model = checkpoint.load("bundled", dtype="float32")
    for kind in episodes.KINDS:
        pairs = [
            episodes.recall_episode(np.random.default_rng([1, i]), np.arange(2, 2048), 256, kind, bos_id=model.bos_id)
            for i in range(4)
        ]
        tokens, answers = (np.stack(part) for part in zip(*pairs))
        _, hits = jax.jit(learning.token_losses, static_argnums=0)(model.decoder, model.params, jnp.asarray(tokens))
        assert np.asarray(hits)[answers[:, 1:]].mean() > 0.95


def test_the_command_line_names_a_missing_config_and_ends_with_an_error(tmp_path):
    command = [sys.executable, "-m", "eval.train", "--config=nowhere.py", f"--workdir={tmp_path}", "--json"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and result.stdout == ""
    assert "no training config at 'nowhere.py'" in result.stderr


def test_the_loss_curve_of_the_bundled_model_is_drawn_and_a_missing_record_is_told(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "curve.png"
    assert common.run(train.main, ["train", f"--out={checkpoint.BUNDLED}", f"--figure={figure}"]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG") and len(figure.read_bytes()) > 10_000
    assert common.run(train.main, ["train", f"--out={tmp_path}", f"--figure={figure}"]) == common.EXIT_MISTAKE
    assert "no training record" in capsys.readouterr().err
