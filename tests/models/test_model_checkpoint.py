"""Folders: what is read back is what was written, and every defect is named in one sentence."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from alisa_jax.models import SHAPES, CheckpointError, Decoder, ModelConfig, RopeScaling, checkpoint, load, save
from tests.sentences import one_sentence

LLAMA = ModelConfig(
    arch="llama",
    vocab_size=61,
    d_model=23,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=14,
    d_ff=37,
    max_positions=97,
    norm_eps=1e-3,
    rope_theta=700.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
)
OPT = ModelConfig(
    arch="opt",
    vocab_size=61,
    d_model=33,
    n_layers=2,
    n_heads=3,
    n_kv_heads=3,
    head_dim=11,
    d_ff=41,
    max_positions=97,
    tie_embeddings=True,
    act="relu",
    attention_bias=True,
    mlp_bias=True,
)
NEOX = ModelConfig(
    arch="gpt_neox",
    vocab_size=61,
    d_model=42,
    n_layers=2,
    n_heads=3,
    n_kv_heads=3,
    head_dim=14,
    d_ff=37,
    max_positions=97,
    act="gelu",
    attention_bias=True,
    mlp_bias=True,
    rotary_frac=0.3,
    parallel_residual=True,
)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama_params():
    return Decoder(LLAMA).init(jax.random.key(3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, llama_params):
    folder = tmp_path_factory.mktemp("whole")
    save(LLAMA, llama_params, folder, "float32", bos_id=1, eos_ids=(2, 5))
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of a good folder, to be damaged."""
    return shutil.copytree(whole, tmp_path / "copy")


def edit_json(path, **changes):
    content = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "absent"}
    path.write_text(json.dumps(content))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def equal(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return all(jax.tree.leaves(same))


def in_dtype(params, dtype):
    """Rounded by NumPy, so that no conversion of JAX is needed to compare."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params)


@pytest.mark.parametrize(
    "config, dtype",
    [
        (LLAMA, "float32"),
        (LLAMA, "bfloat16"),
        (dataclasses.replace(LLAMA, tie_embeddings=True), "float16"),
        (OPT, "float16"),
        (OPT, "bfloat16"),
        (dataclasses.replace(OPT, norm_before=False, embed_dim=17), "float16"),
        (dataclasses.replace(OPT, norm_before=False), "float32"),
        (NEOX, "bfloat16"),
        (dataclasses.replace(NEOX, attention_bias=False, tie_embeddings=True), "float32"),
    ],
)
def test_load_returns_what_save_wrote(config, dtype, tmp_path, random_params):
    params = in_dtype(random_params(config, 7), dtype)
    save(config, params, tmp_path, dtype)
    model = load(tmp_path, dtype)
    assert model.decoder == Decoder(config) and equal(model.params, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
    assert (model.tokenizer, model.bos_id, model.eos_ids) == (None, None, ())
    assert model.name == tmp_path.name and model.source == str(tmp_path.resolve())


def test_stored_bfloat16_bits_survive(folder):
    bits = np.arange(23 * 37, dtype=np.uint16).reshape(23, 37) * 37 % 0x7F00
    stored = bits.view(ml_dtypes.bfloat16)
    edit_tensors(folder, lambda tensors: tensors.update({DOWN: stored}))
    edit_json(folder / "config.json", torch_dtype="bfloat16")
    read = np.asarray(load(folder, "bfloat16").params["blocks"][1]["down"]["weight"])
    np.testing.assert_array_equal(read.view(np.uint16), bits)


def test_dtype_argument_wins_over_the_file(whole, llama_params):
    for dtype in ("bfloat16", jnp.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        model = load(whole, dtype)
        assert equal(model.params, in_dtype(llama_params, "bfloat16"))


def held(model):
    (found,) = {leaf.dtype.name for leaf in jax.tree.leaves(model.params)}
    return found


@pytest.mark.parametrize("stated", ["bfloat16", "float16", "float32"])
def test_auto_is_float32_on_a_cpu_and_the_files_type_elsewhere(folder, monkeypatch, stated):
    edit_json(folder / "config.json", torch_dtype=stated)
    assert held(load(folder)) == held(load(folder, "auto")) == held(load(folder, None)) == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert held(load(folder)) == held(load(folder, "auto")) == stated
    assert held(load("bundled")) == "float32"  # whose file is bfloat16 to be small


def test_without_a_stated_type_the_token_table_decides(folder, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    edit_json(folder / "config.json", torch_dtype="absent")
    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"].astype(np.float16)}
        ),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(load(folder).params)} == {jnp.dtype("float16")}


def test_special_ids_and_tokenizer_are_read(tmp_path, llama_params):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    save(LLAMA, llama_params, tmp_path, "bfloat16", tokenizer, bos_id=1, eos_ids=(2, 5))
    model = load(tmp_path)
    assert (model.bos_id, model.eos_ids) == (1, (2, 5))
    assert model.tokenizer.encode("b a c", add_special_tokens=False).ids == [1, 0, 2]
    assert model.encode("a c") == [1, 0, 2] and model.encode("b a c") == [1, 0, 2]  # a BOS of the text is one


def test_generation_config_wins_and_config_stands_in(folder):
    edit_json(folder / "config.json", eos_token_id=7, bos_token_id=3)
    assert (load(folder).bos_id, load(folder).eos_ids) == (1, (2, 5))
    (folder / "generation_config.json").unlink()
    assert (load(folder).bos_id, load(folder).eos_ids) == (3, (7,))


def shard(folder):
    """Split the one file into two and an index."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, held in files.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_folders_give_the_same_parameters(folder, llama_params):
    shard(folder)
    assert equal(load(folder).params, llama_params)


def test_names_without_the_model_prefix_are_read(folder, llama_params):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(folder, strip)
    assert equal(load(folder).params, llama_params)


@pytest.fixture(scope="module")
def neox(tmp_path_factory, random_params):
    folder = tmp_path_factory.mktemp("neox")
    save(NEOX, random_params(NEOX), folder, "float32")
    return folder


def test_query_key_and_value_are_taken_apart_head_by_head(neox, tmp_path):
    """Row n 3H + i H + h of the one tensor is channel h of head n of the i-th of q, k, v."""
    folder, N, H = shutil.copytree(neox, tmp_path / "copy"), 3, 14
    name = "gpt_neox.layers.1.attention.query_key_value"
    row = np.arange(3 * N * H, dtype=np.float32)
    stored = {f"{name}.weight": row[:, None] * 100 + np.arange(42, dtype=np.float32), f"{name}.bias": row}
    edit_tensors(folder, lambda tensors: tensors.update(stored))
    block = load(folder).params["blocks"][1]
    for i, module in enumerate("qkv"):
        for n in range(N):
            for h in range(H):
                at = (n * 3 + i) * H + h
                assert block[module]["bias"][n * H + h] == at
                np.testing.assert_array_equal(block[module]["weight"][n * H + h], at * 100 + np.arange(42))


def test_a_gpt_neox_head_may_have_either_name(neox, tmp_path):
    folder = shutil.copytree(neox, tmp_path / "copy")
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("embed_out.weight")}))
    assert equal(load(folder).params, load(neox).params)


def test_a_fused_tensor_of_a_wrong_shape_is_named(neox, tmp_path):
    folder = shutil.copytree(neox, tmp_path / "copy")
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros((42, 42), np.float32)}))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(42, 42\), and the configuration needs \(126, 42\)"):
        load(folder)


def test_tensors_that_are_not_needed_are_left_alone(folder, llama_params):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(7, np.float32)}
    edit_tensors(folder, lambda tensors: tensors.update(extra))
    assert equal(load(folder).params, llama_params)


def test_stories260k_loads(stories):
    model = load(stories)
    assert model.decoder.count_params() == 260_032 and model.decoder.config.tie_embeddings
    assert (model.name, model.bos_id, model.eos_ids) == ("stories260K", 1, (1, 2))
    assert model.tokenizer.get_vocab_size() == 512


def test_random_weights_depend_on_the_seed_alone(monkeypatch):
    monkeypatch.setattr(checkpoint, "SHAPES", {"tiny": LLAMA})
    first, again, other = load("random:tiny"), load("random:tiny"), load("random:tiny", seed=1)
    assert equal(first.params, again.params) and not equal(first.params, other.params)
    assert (first.name, first.source, first.tokenizer) == ("random:tiny", "random:tiny", None)
    low = load("random:tiny", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(low.params)} == {jnp.dtype("bfloat16")}


def overwrite(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def damage_no_weights(folder):
    (folder / "model.safetensors").unlink()


def damage_missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(DOWN))


def damage_shape(folder):
    edit_tensors(folder, lambda tensors: tensors.update({DOWN: np.zeros((37, 23), np.float32)}))


def damage_stored_type(folder):
    edit_tensors(folder, lambda tensors: tensors.update({DOWN: np.zeros((23, 37), np.int32)}))


def damage_truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-11])


def damage_missing_shard(folder):
    shard(folder)
    (folder / "part-2.safetensors").unlink()


def damage_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def damage_index_lies(folder):
    shard(folder)
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"] | {DOWN: "part-1.safetensors"}
    weight_map["model.norm.weight"] = "part-1.safetensors"
    weight_map["lm_head.weight"] = "part-2.safetensors"
    edit_json(path, weight_map=weight_map)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (overwrite("config.json", b'{"model_type": "llama",'), "config.json is not readable as JSON"),
        (overwrite("config.json", b"[]"), "config.json holds a list"),
        (overwrite("config.json", b'{"model_type": "\xff\xfe"}'), "config.json is not readable as JSON"),
        (damage_no_weights, "neither model.safetensors nor model.safetensors.index.json"),
        (damage_missing_tensor, f"no tensor {DOWN}"),
        (damage_shape, f"{DOWN} has shape \\(37, 23\\), and the configuration needs \\(23, 37\\)"),
        (damage_stored_type, f"{DOWN} is stored as I32; supported are F32, F16, BF16"),
        (damage_truncated, "model.safetensors is truncated or damaged"),
        (overwrite("model.safetensors", b""), "model.safetensors is truncated or damaged"),
        (damage_missing_shard, "part-2.safetensors is missing"),
        (damage_index, "index.json has no weight_map"),
        (damage_index_lies, "safetensors has no tensor .*, which model.safetensors.index.json says"),
        (overwrite("tokenizer.json", b"{}"), "tokenizer.json is not a readable tokenizer"),
    ],
)
def test_a_damaged_folder_is_named_in_one_sentence(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert one_sentence(error)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "'mamba' is not a supported architecture; supported are llama, opt"),
        ({"torch_dtype": "float64"}, "dtype 'float64' is not supported"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2.input_layernorm.weight"),
        ({"vocab_size": 67}, "model.embed_tokens.weight has shape \\(61, 23\\)"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert one_sentence(error) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("random:opt_126m", "did you mean 'opt_125m'"),
        ("random:", "known are opt_125m, "),
        ("no_such_model", "is not a folder; give a local Hugging Face folder, 'owner/name' .*, or 'random:NAME'"),
    ],
)
def test_an_unknown_name_lists_what_is_known(name, message):
    with pytest.raises(CheckpointError, match=message) as error:
        load(name)
    assert one_sentence(error) and "llama3_8b" in str(error.value)


def test_the_configuration_of_a_folder_needs_no_weights(folder):
    config = load(folder).decoder.config
    (folder / "model.safetensors").unlink()
    assert checkpoint.config_of(folder) == checkpoint.config_of(str(folder)) == config
    assert checkpoint.config_of("opt_125m") == checkpoint.config_of("random:opt_125m") == SHAPES["opt_125m"]


@pytest.mark.parametrize("damage", [{"model_type": "mamba"}, {"num_hidden_layers": 0}, None])
def test_a_configuration_is_refused_as_load_refuses_it(folder, damage):
    if damage is None:
        (folder / "config.json").unlink()
    else:
        edit_json(folder / "config.json", **damage)
    found = []
    for look in (load, checkpoint.config_of):
        with pytest.raises(CheckpointError) as error:
            look(folder)
        found.append(str(error.value))
    assert found[0] == found[1]
    with pytest.raises(CheckpointError, match="'no_such_model' is no folder; known shapes: opt_125m, ") as error:
        checkpoint.config_of("no_such_model")
    assert one_sentence(error)


def test_a_file_is_not_a_folder(whole):
    with pytest.raises(CheckpointError, match="is a file, and no .gguf; give a local Hugging Face folder"):
        load(whole / "config.json")


def test_an_unknown_dtype_lists_what_is_known(whole):
    for dtype in ("int8", np.float64, 3):
        with pytest.raises(CheckpointError, match="supported are float32, float16, bfloat16"):
            load(whole, dtype)


def test_values_beyond_float16_are_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({DOWN: np.full((23, 37), 1e6, np.float32)}))
    with pytest.raises(CheckpointError, match=f"{DOWN} has values beyond the range of float16"):
        load(folder, "float16")


def test_save_refuses_parameters_of_another_shape(tmp_path, llama_params):
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight needs shape \(41, 23\)"):
        save(dataclasses.replace(LLAMA, d_ff=41), {**llama_params}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_save_says_that_a_folder_cannot_be_written(tmp_path, llama_params):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(LLAMA, llama_params, tmp_path / "file")


def test_an_interrupted_save_leaves_no_folder_that_looks_whole(tmp_path, llama_params, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        save(LLAMA, llama_params, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saved_files_have_the_mode_of_new_files(tmp_path):
    save(LLAMA, Decoder(LLAMA).init(jax.random.key(0)), tmp_path / "model")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}
