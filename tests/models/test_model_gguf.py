"""GGUF files: what is read is what the folder of the same model gives, and every defect is named in one sentence."""

import dataclasses
import shutil
import sys

import gguf
import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from alisa_jax.models import CheckpointError, ModelConfig, RopeScaling, load, save
from alisa_jax.models.gguf import GgufFile
from alisa_jax.ops.rope import inverse_frequencies
from tests import ggufs
from tests.sentences import one_sentence

CONFIG = ModelConfig(
    arch="llama",
    vocab_size=61,
    d_model=64,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    d_ff=32,
    max_positions=97,
    norm_eps=1e-5,
    rope_theta=700.0,
)
DEFECTS = {  # what `ggufs.write` is given, and what is said
    "architecture": ({"arch": "gemma3"}, "has the architecture 'gemma3'; supported in GGUF files are llama"),
    "experts": ({"metadata": {"expert_count": 8}}, "has llama.expert_count = 8, which is not supported"),
    "unknown setting": ({"metadata": {"logit_scale": 0.5}}, "has llama.logit_scale = 0.5, which is not supported"),
    "window": ({"metadata": {"attention.sliding_window": 5}}, "llama.attention.sliding_window = 5, which is not"),
    "partial rotation": ({"metadata": {"rope.dimension_count": 8}}, "dimension_count = 8, and heads of 16 channels"),
    "long rope": ({"metadata": {"rope.scaling.type": "longrope"}}, "rotary scaling 'longrope' is not supported"),
    "no context": ({"metadata": {"context_length": None}}, "does not say llama.context_length"),
    "no epsilon": ({"metadata": {"attention.layer_norm_rms_epsilon": None}}, "does not say llama.attention.layer_norm"),
    "no heads": ({"metadata": {"attention.head_count": None}}, "has no num_attention_heads"),
    "heads of layers": ({"metadata": {"attention.head_count": [6, 6]}}, r"num_attention_heads is \[6, 6\]; it must be"),
    "layers": ({"metadata": {"block_count": 2**31}}, "block_count = 2147483648, and the tensors of 2 layers"),
    "words": (
        {"general": {"tokenizer.ggml.tokens": [f"word{i}" for i in range(62)]}},
        "has 62 tokens, and a table of 61",
    ),
    "pieces": ({"general": {"split.count": 3}}, "is one of 3 pieces of a model"),
    "unknown tensor": (
        {"extra": {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}},
        "holds the tensor blk.0.ffn_gate_inp.weight, which no supported model has",
    ),
    "rotary divisors": (
        {"extra": {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}},
        "are not those of a LLaMA-3.1",
    ),
    "type": ({"extra": {"output.weight": np.zeros((61, 64), np.float64)}}, "is stored as F64; supported are F32, F16"),
}


def equal(ours, expected):
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)), ours, expected
    )
    return jax.tree.structure(ours) == jax.tree.structure(expected) and all(jax.tree.leaves(same))


def tensors(folder):
    return {
        name: np.asarray(x, np.float32) for name, x in safetensors.numpy.load_file(folder / "model.safetensors").items()
    }


@pytest.fixture
def folder_of(tmp_path, random_params):
    """A configuration -> the Hugging Face folder of a random model, in float32."""

    def make(config):
        folder = tmp_path / "folder"
        save(config, random_params(config), folder)
        return folder

    return make


@pytest.fixture
def written(tmp_path, folder_of):
    """(configuration, arguments of `ggufs.write`) -> a file with a random model."""

    def make(config=CONFIG, **how):
        return ggufs.write(tmp_path / "model.gguf", tensors(folder_of(config)), config, **how)

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_file_is_the_model_of_the_folder_it_was_made_of(kind, tied, tmp_path, folder_of):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    folder = folder_of(config)
    path = ggufs.write(tmp_path / "some.name.gguf", tensors(folder), config, kind)
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
    model = load(path, dtype)
    assert model.decoder.config == config
    assert equal(model.params, load(folder, dtype).params)
    assert {x.dtype.name for x in jax.tree.leaves(load(path).params)} == {"float32"}
    assert (model.name, model.tokenizer, model.eos_ids) == ("some.name", None, ())
    assert model.source == str(tmp_path / "some.name.gguf") and model.calibration() is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_quantised_weights_are_the_nearest_that_their_blocks_can_say(kind, tmp_path, folder_of):
    folder = folder_of(CONFIG)
    exact = tensors(folder)
    file = GgufFile(ggufs.write(tmp_path / "model.gguf", exact, CONFIG, kind))
    name = "model.layers.1.self_attn.k_proj.weight"
    array, of = file.read(name), exact[name].reshape(-1, 32)
    # Half a step of a block, and what float16 and the clipping of the largest code take from its scale.
    steps = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127, "MXFP4": 2}[kind]
    span = np.ptp(of, axis=1) if kind.endswith("_1") else np.abs(of).max(axis=1)
    error = np.abs(array.reshape(-1, 32) - of).max(axis=1)
    assert array.dtype == np.float32 and (error <= span / steps * 1.01).all()
    assert (error > 0).any()


def test_quantised_weights_are_held_in_the_type_that_is_asked_for(written):
    file = written(kind=lambda name: "Q8_0" if "proj" not in name else "Q4_0")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load(file).params)} == {"float32"}
    half = load(file, "bfloat16").params
    assert equal(half, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), load(file).params))


def test_a_large_tensor_is_dequantised_in_parts_without_a_seam(tmp_path, monkeypatch):
    from alisa_jax.models import gguf as module

    config = dataclasses.replace(CONFIG, vocab_size=1009)
    table = np.random.default_rng(0).standard_normal((1009, 64), np.float32)
    path = ggufs.write(tmp_path / "model.gguf", {"model.embed_tokens.weight": table}, config, "Q5_1")
    whole = gguf.dequantize(gguf.quantize(table, ggufs.KINDS.Q5_1), ggufs.KINDS.Q5_1)
    monkeypatch.setattr(module, "_AT_ONCE", 512)
    assert np.array_equal(GgufFile(path).read("model.embed_tokens.weight"), whole)


def test_biases_are_read_and_turned_as_their_rows_are(written, folder_of):
    config = dataclasses.replace(CONFIG, attention_bias=True, mlp_bias=True)
    model = load(written(config))
    assert model.decoder.config == config
    assert equal(model.params, load(folder_of(config)).params)


def test_heads_and_vocabulary_are_known_without_the_keys_that_old_files_lack(written):
    config = dataclasses.replace(CONFIG, n_heads=4, n_kv_heads=4)
    left_out = ("attention.key_length", "attention.value_length", "attention.head_count_kv", "vocab_size")
    assert load(written(config, metadata=dict.fromkeys(left_out))).decoder.config == config


def test_a_linear_scaling_is_read(written):
    file = written(metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert load(file).decoder.config.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_divisors_of_llama_3_1_are_its_scaling(factor, written):
    config = dataclasses.replace(CONFIG, head_dim=64, rope_theta=500000.0)
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    turns = 8192 * inverse_frequencies(64, 500000.0) / (2 * np.pi)  # below 1 slow, above 4 fast
    smooth = (turns - 1) / 3
    divisors = np.where(turns < 1, factor, np.where(turns > 4, 1, 1 / ((1 - smooth) / factor + smooth)))
    assert len(set(divisors)) > 3
    file = written(config, extra={"rope_freqs.weight": divisors.astype(np.float32)})
    assert load(file).decoder.config == dataclasses.replace(config, rope_scaling=scaling)


def test_divisors_of_one_change_nothing(written):
    assert load(written(extra={"rope_freqs.weight": np.ones(8, np.float32)})).decoder.config == CONFIG


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_is_not_supported_is_refused(defect, tmp_path, folder_of):
    how, message = DEFECTS[defect]
    path = ggufs.write(
        tmp_path / "model.gguf",
        tensors(folder_of(CONFIG))
        if "extra" not in how
        else {n: x for n, x in tensors(folder_of(CONFIG)).items() if n != "lm_head.weight"},
        CONFIG,
        **how,
    )
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert one_sentence(error) and str(path) in str(error.value)


def test_a_missing_tensor_is_named(tmp_path, folder_of):
    held = tensors(folder_of(CONFIG))
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        path = ggufs.write(tmp_path / "model.gguf", {n: x for n, x in held.items() if n != name}, CONFIG)
        with pytest.raises(CheckpointError, match="no tensor (token_embd.weight|model.layers.1.mlp.up_proj)") as error:
            load(path)
        assert one_sentence(error) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file: it begins with b''"),
        (b"version https://git-lfs", "is not a GGUF file: it begins with b'vers'"),
        (b"GGUF", "is truncated or damaged"),
        (b"GGUF\x01\0\0\0" + bytes(16), "has version 1 of GGUF; read are 2 and 3"),
        (b"GGUF\0\0\0\x03" + bytes(16), "is for big-endian machines"),
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\xff" * 8, "is truncated or damaged"),
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7) + b"\xff" * 8 + b"abc", "a text goes beyond its end"),
    ],
)
def test_a_file_that_is_no_gguf_is_refused(content, message, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert one_sentence(error) and str(path) in str(error.value)


def test_a_file_for_big_endian_machines_is_refused(written):
    with pytest.raises(CheckpointError, match="is for big-endian machines"):
        load(written(endian=gguf.GGUFEndian.BIG))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a file with a vocabulary of its own."""
    rng = np.random.default_rng(5)
    config = dataclasses.replace(CONFIG, vocab_size=3, n_layers=1, tie_embeddings=True)
    shapes = {"model.embed_tokens.weight": (3, 64), "model.norm.weight": (64,)}
    layer = {
        "input_layernorm": (64,),
        "post_attention_layernorm": (64,),
        "self_attn.q_proj": (96, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 96),
        "mlp.gate_proj": (32, 64),
        "mlp.up_proj": (32, 64),
        "mlp.down_proj": (64, 32),
    }
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    held = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    words = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.token_type": [1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 1,
    }
    path = ggufs.write(
        tmp_path_factory.mktemp("sound") / "model.gguf",
        held,
        config,
        lambda name: "F16" if "o_proj" in name else "Q8_0",
        general=words,
    )
    assert load(path).encode("aba") == [2, 0]
    return path


@hypothesis.given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_wherever_it_ends(sound, share):
    end = max(info.start + info.n_bytes for info in GgufFile(sound).infos.values())
    path = sound.with_name("short.gguf")
    path.write_bytes(sound.read_bytes()[: int(share * end)])
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert one_sentence(error) and str(path) in str(error.value)


def test_blocks_that_are_no_numbers_are_damage(sound):
    content = bytearray(sound.read_bytes())
    start = GgufFile(sound).infos["blk.0.ffn_up.weight"].start
    content[start : start + 2] = np.float16(np.inf).tobytes()
    path = sound.with_name("infinite.gguf")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the tensor blk.0.ffn_up.weight has blocks that are no") as error:
        load(path)
    assert one_sentence(error) and str(path) in str(error.value)


@hypothesis.given(data=st.data())
def test_a_file_with_a_wrong_byte_in_its_head_is_read_or_refused(sound, data):
    content = bytearray(sound.read_bytes())
    file = GgufFile(sound)
    head = min(info.start for info in file.infos.values())
    at = data.draw(st.integers(0, head - 1))
    content[at] = data.draw(st.integers(0, 255))
    path = sound.with_name("damaged.gguf")
    path.write_bytes(content)
    try:
        load(path)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(path) in str(error)


def test_the_package_that_reads_blocks_is_an_extra(written, monkeypatch):
    file = written()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"install 'alisa-jax\[gguf\]'") as error:
        load(file)
    assert one_sentence(error)


def test_a_folder_may_have_a_name_like_that_of_a_file(tmp_path, folder_of):
    folder = tmp_path / "folder.gguf"
    shutil.copytree(folder_of(CONFIG), folder)
    assert load(folder).decoder.config == CONFIG
