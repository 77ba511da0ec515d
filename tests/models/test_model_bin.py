"""`pytorch_model.bin`: bit for bit what safetensors gives, and every defect is named in one sentence."""

import json
import pickle
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from alisa_jax.models import CheckpointError, ModelConfig, load, save
from tests.sentences import one_sentence

torch = pytest.importorskip("torch")

CONFIG = ModelConfig(
    arch="gpt_neox",
    vocab_size=31,
    d_model=22,
    n_layers=2,
    n_heads=1,
    n_kv_heads=1,
    head_dim=22,
    d_ff=37,
    max_positions=97,
    act="gelu",
    attention_bias=True,
    mlp_bias=True,
    rotary_frac=0.2,
    parallel_residual=True,
)
DOWN = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG)


@pytest.fixture
def folder(params, tmp_path):
    save(CONFIG, params, tmp_path / "model", "float32")
    return tmp_path / "model"


def tensors_of(folder):
    """The tensors of a safetensors folder, as torch tensors with the same bits."""
    made = {}
    for name, array in safetensors.numpy.load_file(folder / "model.safetensors").items():
        bits = torch.from_numpy(array.view(np.int16 if array.itemsize == 2 else np.int32).copy())
        made[name] = bits.view(getattr(torch, array.dtype.name))
    return made


def to_bin(folder, change=lambda tensors: tensors, **options):
    """Replace the safetensors file by a .bin."""
    content = change(tensors_of(folder))
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin", **options)


def equal(a, b):
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bits_of_a_bin_are_those_of_safetensors(params, tmp_path, dtype, zipped):
    save(CONFIG, params, tmp_path, dtype)
    want = load(tmp_path, dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(want)} == {np.dtype(jax.numpy.dtype(dtype))}
    to_bin(tmp_path, _use_new_zipfile_serialization=zipped)
    assert equal(load(tmp_path, dtype).params, want)


def test_every_bit_pattern_of_bfloat16_survives(folder):
    bits = (np.arange(22 * 37) * 79 % 2**16).astype(np.uint16).reshape(22, 37)  # NaN and infinities among them
    change = lambda tensors: tensors | {DOWN: torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)}
    to_bin(folder, change)
    weight = np.asarray(load(folder, "bfloat16").params["blocks"][1]["down"]["weight"])
    np.testing.assert_array_equal(weight.view(np.uint16), bits)


def shard(folder):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, held in files.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_give_the_same_parameters(folder, params):
    shard(folder)
    assert equal(load(folder).params, params)


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "pytorch_model-2.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-2.bin is missing\."):
        load(folder)


def test_safetensors_wins_where_both_exist(folder, params):
    torch.save({name: x + 1 for name, x in tensors_of(folder).items()}, folder / "pytorch_model.bin")
    assert equal(load(folder).params, params)


def test_shared_tensors_parameters_and_old_buffers_do_no_harm(folder, params):
    def change(tensors):
        tensors[DOWN] = torch.nn.Parameter(tensors[DOWN])
        whole = torch.stack([tensors["gpt_neox.final_layer_norm.weight"]] * 2)  # two tensors of one storage
        tensors["gpt_neox.final_layer_norm.weight"] = whole[1]
        for layer in range(2):
            name = f"gpt_neox.layers.{layer}.attention."
            tensors[name + "bias"] = torch.ones(1, 1, 97, 97, dtype=torch.bool).tril()
            tensors[name + "masked_bias"] = torch.tensor(-1e9)
            tensors[name + "rotary_emb.inv_freq"] = torch.ones(2)
        return tensors | {"epoch": 3}

    to_bin(folder, change)
    assert equal(load(folder).params, params)


def test_a_transposed_tensor_is_read_in_its_own_order(folder, params):
    to_bin(folder, lambda tensors: tensors | {DOWN: tensors[DOWN].t().contiguous().t()})
    assert equal(load(folder).params, params)


class Command:
    def __reduce__(self):
        return (print, ("the pickle ran",))


def replace_by(content):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return damage


def cut(folder):
    to_bin(folder)
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


REFUSED = "needs more than weights to be read, which is refused because it could run code"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: to_bin(folder, lambda tensors: tensors | {"hook": Command()}), REFUSED),
        (replace_by(pickle.dumps(Command(), 2)), REFUSED),
        (cut, "pytorch_model.bin is truncated or damaged"),
        (replace_by(b""), "pytorch_model.bin is truncated or damaged"),
        (replace_by(b"PK\x03\x04 and no more"), "pytorch_model.bin is truncated or damaged"),
        (lambda folder: to_bin(folder, lambda tensors: [*tensors.values()]), "holds a list; it must hold a dictionary"),
        (lambda folder: to_bin(folder, lambda tensors: tensors | {DOWN: "lost"}), f"no tensor {DOWN}"),
        (
            lambda folder: to_bin(folder, lambda tensors: tensors | {DOWN: tensors[DOWN].t()}),
            rf"{DOWN} has shape \(37, 22\), and the configuration needs \(22, 37\)",
        ),
        (
            lambda folder: to_bin(folder, lambda tensors: tensors | {DOWN: tensors[DOWN].double()}),
            f"{DOWN} is stored as float64; supported are float32, float16, bfloat16",
        ),
        (
            lambda folder: to_bin(folder, lambda tensors: tensors | {DOWN: tensors[DOWN].to_sparse()}),
            f"{DOWN} is stored as sparse_coo",
        ),
    ],
)
def test_a_bin_that_cannot_be_used_is_refused_in_one_sentence(folder, damage, message, capsys):
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert one_sentence(error) and str(folder) in str(error.value)
    assert capsys.readouterr().out == ""  # no pickle ran


def test_without_torch_the_extra_and_safetensors_are_named(folder, params, monkeypatch):
    shutil.copytree(folder, folder.with_name("other"))
    to_bin(folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"install 'alisa-jax\[torch\]'.* safetensors") as error:
        load(folder)
    assert one_sentence(error)
    assert equal(load(folder.with_name("other")).params, params)  # safetensors need no torch
