"""Tensors and `config.json` of one folder: they describe one model, or load says where they do not."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from alisa_jax.models import CheckpointError, CheckpointWarning, Decoder, ModelConfig, load, save
from tests.sentences import one_sentence

LLAMA = ModelConfig(
    arch="llama",
    vocab_size=29,
    d_model=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    d_ff=20,
    max_positions=40,
)
OPT = ModelConfig(
    arch="opt",
    vocab_size=29,
    d_model=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    head_dim=6,
    d_ff=20,
    max_positions=40,
    act="relu",
)
NEOX = dataclasses.replace(OPT, arch="gpt_neox", act="gelu", mlp_bias=True, rotary_frac=1.0)
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


def written(config, folder, params, **changes):
    """The folder of `config`, whose config.json is changed afterwards."""
    save(config, params, folder, "float32")
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))
    return folder


def edited(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def noise(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize(
    "added, said",
    [
        (["model.layers.0.self_attn.q_norm.weight"], "model.layers.0.self_attn.q_norm.weight."),
        (["lm_head.bias"], "lm_head.bias."),
        (["b", "a", "d", "c", "e"], "a, b, c and 2 more."),
        (["model.layers.1.self_attn.q_proj.bias"], "model.layers.1.self_attn.q_proj.bias."),
        (["norm.weight"], "norm.weight."),
    ],
)
def test_tensors_that_nothing_reads_are_refused(folder, random_params, added, said):
    written(LLAMA, folder, random_params(LLAMA))
    edited(folder, lambda tensors: tensors.update({name: noise(24) for name in added}))
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert one_sentence(error) and str(error.value).endswith(f"its configuration does not read: {said}")


def test_a_configuration_with_fewer_layers_than_the_file_is_refused(folder, random_params):
    written(LLAMA, folder, random_params(LLAMA), num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="does not read: model.layers.1.* and 6 more") as error:
        load(folder)
    assert one_sentence(error)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 2**30}, "holds 21 tensors, and its configuration has 1073741824 layers"),
        (
            {"head_dim": 2**30},
            "of more than 29 rows or columns, and its configuration has heads of 1073741824 channels",
        ),
        ({"vocab_size": 2**31 - 1}, r"has shape \(29, 24\), and the configuration needs \(2147483647, 24\)"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648; it must be a whole number of at least 1, below 2"),
    ],
)
def test_an_absurd_size_is_refused_before_anything_is_made_of_it(folder, random_params, changes, message):
    written(LLAMA, folder, random_params(LLAMA), **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert one_sentence(error)


@pytest.mark.parametrize(
    "config, names",
    [
        (LLAMA, ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.position_ids"]),
        (OPT, ["model.decoder.version", "decoder.version"]),
        (
            NEOX,
            [f"gpt_neox.layers.1.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")],
        ),
    ],
)
def test_constants_that_old_files_hold_are_left_out_silently(folder, random_params, config, names):
    params = random_params(config)
    written(config, folder, params)
    edited(folder, lambda tensors: tensors.update({name: noise(3) for name in names}))
    assert equal(load(folder).params, params)


HEADS = [
    (LLAMA, TABLE, HEAD),
    (OPT, "model.decoder.embed_tokens.weight", HEAD),
    (NEOX, "gpt_neox.embed_in.weight", "embed_out.weight"),
]
TIED = pytest.mark.parametrize("config, table, head", HEADS, ids=["llama", "opt", "gpt_neox"])


@TIED
def test_a_head_that_differs_from_the_table_of_a_tied_model_is_used_and_that_is_said(
    folder, random_params, config, table, head
):
    params = random_params(config)
    written(config, folder, params, tie_word_embeddings=True)
    with pytest.warns(CheckpointWarning, match=f"{head} with other values than {table}.*; both are read"):
        model = load(folder)
    assert not model.decoder.config.tie_embeddings and equal(model.params, params)


@TIED
def test_a_head_that_equals_the_table_of_a_tied_model_is_tied(folder, random_params, config, table, head):
    written(config, folder, random_params(config), tie_word_embeddings=True)
    edited(folder, lambda tensors: tensors.update({head: tensors[table].copy()}))
    model = load(folder)
    assert model.decoder.config.tie_embeddings and "head" not in model.params["unembed"]


@TIED
def test_a_tied_model_that_was_saved_under_the_name_of_its_head_loads(folder, random_params, config, table, head):
    tied = dataclasses.replace(config, tie_embeddings=True)
    params = random_params(tied)
    written(tied, folder, params)
    edited(folder, lambda tensors: tensors.update({head: tensors.pop(table)}))
    model = load(folder)
    assert model.decoder == Decoder(tied) and equal(model.params, params)


def test_neither_table_nor_head_and_an_untied_model_without_its_head_are_refused(folder, random_params):
    written(LLAMA, folder, random_params(LLAMA))
    edited(folder, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(CheckpointError, match=f"no tensor {HEAD}"):
        load(folder)
    edited(folder, lambda tensors: tensors.pop(TABLE))
    written_config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(written_config))
    with pytest.raises(CheckpointError, match=f"no tensor {TABLE}"):
        load(folder)


@pytest.mark.parametrize(
    "config, has, unsaid",
    [
        (LLAMA, {"attention_bias": True}, {"attention_bias": False}),
        (LLAMA, {"qkv_bias": True}, {"model_type": "llama"}),
        (LLAMA, {"mlp_bias": True}, {"mlp_bias": "absent"}),
        (LLAMA, {"attention_bias": True, "mlp_bias": True}, {"model_type": "mistral", "sliding_window": None}),
        (LLAMA, {"attention_bias": True}, {"model_type": "qwen2"}),
        (LLAMA, {"attention_bias": True, "qk_norm": True}, {"attention_bias": False}),
        (OPT, {"attention_bias": True, "mlp_bias": True}, {"enable_bias": False}),
        (NEOX, {"attention_bias": True}, {"attention_bias": False}),
    ],
)
def test_biases_that_the_configuration_does_not_name_are_read_and_that_is_said(
    folder, random_params, config, has, unsaid
):
    config = dataclasses.replace(config, **has)
    params = random_params(config)
    written(config, folder, params, **unsaid)
    if unsaid.get("model_type") == "qwen2":  # calls the biases of q, k and v its own
        has = has | {"qkv_bias": False}
    with pytest.warns(CheckpointWarning, match="has biases that its configuration does not name"):
        model = load(folder)
    assert {field: getattr(model.decoder.config, field) for field in has} == has and equal(model.params, params)
    save(model.decoder.config, model.params, folder / "again", "float32")
    assert equal(load(folder / "again").params, params)


def test_what_no_folder_can_say_is_not_written(folder, random_params):
    config = dataclasses.replace(LLAMA, qkv_bias=True, mlp_bias=True)
    with pytest.raises(CheckpointError, match="no folder can say attention_bias=False, qkv_bias=True, mlp_bias=True"):
        save(config, random_params(config), folder)


def test_a_missing_context_is_that_of_transformers_and_that_is_said(folder, random_params):
    written(LLAMA, folder, random_params(LLAMA), max_position_embeddings="absent")
    with pytest.warns(CheckpointWarning, match="no max_position_embeddings; 2048 are assumed"):
        assert load(folder).decoder.config.max_positions == 2048


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 5\n"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_pointer_of_git_lfs_is_named_as_such(folder, random_params, file):
    written(LLAMA, folder, random_params(LLAMA))
    (folder / file).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{file} is a pointer of git-lfs and not the file itself") as error:
        load(folder)
    assert one_sentence(error)


def test_a_bin_and_a_shard_that_are_pointers_of_git_lfs_are_named(folder, random_params):
    written(LLAMA, folder, random_params(LLAMA))
    (folder / "model.safetensors").unlink()
    (folder / "part.safetensors").write_text(POINTER)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {TABLE: "part.safetensors"}}))
    with pytest.raises(CheckpointError, match="part.safetensors is a pointer of git-lfs"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pointer of git-lfs"):
        load(folder)


def test_what_shards_hold_counts_and_not_what_the_index_leaves_out(folder, random_params):
    params = random_params(LLAMA)
    written(LLAMA, folder, params)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {TABLE: "part.safetensors"}}))
    assert equal(load(folder).params, params)
    shutil.copy(folder / "part.safetensors", folder / "twice.safetensors")
    index.write_text(json.dumps({"weight_map": {TABLE: "part.safetensors", HEAD: "twice.safetensors"}}))
    with pytest.raises(CheckpointError, match="both part.safetensors and twice.safetensors hold ") as error:
        load(folder)
    assert one_sentence(error)


def test_tensors_are_checked_before_any_is_read(folder, random_params, monkeypatch):
    written(LLAMA, folder, random_params(LLAMA))
    edited(folder, lambda tensors: tensors.update({"model.norm.weight": noise(23)}))
    monkeypatch.setattr("alisa_jax.models.weights.Safetensors.read", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="model.norm.weight has shape"):
        load(folder)


MEMORY = """
import sys, jax, alisa_jax
from alisa_jax.models import load

def memory_bytes(field):
    with open("/proc/self/status") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith(field)))

before = memory_bytes("VmRSS")
model = load(sys.argv[1], "float32")
held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print((memory_bytes("VmHWM") - before) / held)
"""


@pytest.mark.slow
@pytest.mark.full(sample=1)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process its peak")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_in_float32_peaks_below_1_6_times_the_weights(folder, dtype):
    """The shape of SmolLM2-135M in small: a fifth of it is the token table."""
    config = dataclasses.replace(
        LLAMA, vocab_size=16384, d_model=384, n_layers=10, n_heads=6, head_dim=64, d_ff=1024, tie_embeddings=True
    )
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    save(config, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), folder, dtype)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, check=True)
    assert 1.0 < float(done.stdout) <= 1.6
