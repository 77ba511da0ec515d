"""GGUF files against transformers: blocks by its own code for torch, logits and greedy tokens, ids of texts."""

import dataclasses
import warnings

import numpy as np
import pytest

from alisa_jax.engine import Engine
from alisa_jax.models import Decoder, ModelConfig, load
from alisa_jax.models.gguf import GgufFile
from alisa_jax.models.slots import expected_tensors
from tests import ggufs
from tests.models.test_model_gguf_tokenizer import SOURCES, TEXTS, byte_level, sentencepiece

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CONFIG = ModelConfig(
    arch="llama",
    vocab_size=64,
    d_model=256,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    head_dim=32,
    d_ff=256,
    max_positions=97,
    norm_eps=1e-5,
    rope_theta=700.0,
)
MIXED = {"q_proj": "Q4_K", "k_proj": "Q6_K", "v_proj": "Q5_1", "o_proj": "Q4_0", "gate": "Q5_K", "up": "Q4_1"}


def tensors(config, scale=0.1):
    """Random tensors by name; the norms are near 1."""
    rng = np.random.default_rng(3)
    return {
        name: (rng.standard_normal(slots[0].value.shape) * scale + ("norm" in name)).astype(np.float32)
        for name, slots in expected_tensors(Decoder(config)).items()
    }


def of_transformers(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()


@pytest.mark.parametrize("kind", [*ggufs.HALVES, "Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_the_numbers_that_transformers_reads(kind, tmp_path):
    from transformers.integrations.gguf import dequant

    name = "model.layers.0.mlp.up_proj.weight"
    exact = {"model.embed_tokens.weight": np.zeros((64, 256), np.float32)}
    exact[name] = np.random.default_rng(1).standard_normal((7, 512), np.float32)
    file = GgufFile(ggufs.write(tmp_path / "model.gguf", exact, CONFIG, lambda of: kind if of == name else "F32"))
    info = file.infos["blk.0.ffn_up.weight"]
    assert info.kind == kind
    raw = np.fromfile(file.path, np.uint8, info.n_bytes, offset=info.start).reshape(7, -1)
    theirs = dequant.dequantize(torch.from_numpy(raw.copy()), int(ggufs.KINDS[kind])).reshape(7, 512).numpy()
    np.testing.assert_allclose(file.read(name), theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_greedy_tokens_are_those_of_transformers(tied, tmp_path, dense_forward):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)

    def kind(name):
        return next((kind for part, kind in MIXED.items() if part in name), "Q8_0")

    path = ggufs.write(tmp_path / "model.gguf", tensors(config), config, kind)
    model, theirs = load(path), of_transformers(path)
    tokens = np.random.default_rng(7).integers(0, 64, (2, 31), dtype=np.int32)
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        expected = theirs(ids).logits.numpy()
        seen = torch.ones_like(ids[:1])  # else it takes token 0 for padding
        made = theirs.generate(ids[:1], attention_mask=seen, max_new_tokens=24, do_sample=False, pad_token_id=0)
    ours = np.asarray(dense_forward(model.decoder, model.params, tokens))
    assert expected.std() > 0.3
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    greedy = Engine(model).generate([tokens[0].tolist()], max_new_tokens=24).tokens[0]
    assert list(greedy) == made[0, 31:].tolist()


def theirs_and_ours(tmp_path, metadata):
    """(tokenizer of transformers, the model here) of a file with this vocabulary."""
    config = dataclasses.replace(
        CONFIG, vocab_size=len(metadata["tokenizer.ggml.tokens"]), n_layers=1, tie_embeddings=True
    )
    path = ggufs.write(tmp_path / "model.gguf", tensors(config), config, "Q8_0", general=metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    return theirs, load(path)


# Of smollm and starcoder transformers does not know that they split digits, of qwen2 not that it composes characters.
@pytest.mark.parametrize("pre", sorted(SOURCES.keys() - {"smollm", "starcoder", "default"}))
@pytest.mark.parametrize("bos", [False, True])
def test_byte_level_ids_are_those_of_transformers(pre, bos, tmp_path):
    _, metadata = byte_level(pre)
    theirs, model = theirs_and_ours(tmp_path, metadata | {"tokenizer.ggml.add_bos_token": bos})
    for text in (text for text in TEXTS if "\u0301" not in text):
        assert model.tokenizer.encode(text).ids == theirs(text).input_ids, text
    assert model.eos_ids == (theirs.eos_token_id,)
    assert model.bos_id == (theirs.bos_token_id if bos else None)


def test_sentencepiece_ids_are_those_of_transformers(tmp_path):
    """But for texts that begin with a space or hold special tokens, where it puts no space of its own, as the models do."""
    _, metadata = sentencepiece()
    theirs, model = theirs_and_ours(tmp_path, metadata)
    texts = [text for text in TEXTS if text and text[0] != " " and "<think>" not in text]
    assert len(texts) > 8
    for text in texts:
        assert model.tokenizer.encode(text).ids == theirs(text).input_ids, text


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_qwen_file_gives_the_logits_of_transformers(family, tmp_path, dense_forward):
    """Rows of q and k lie as transformers has them; biases and norms of q and k are read."""
    fields = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}[family]
    heads = {
        "n_heads": 2,
        "n_kv_heads": 1,
        "head_dim": 128,
    }  # transformers takes Qwen3's for 128 whatever the file says
    config = dataclasses.replace(CONFIG, family=family, **heads, **fields)
    path = ggufs.write(tmp_path / "model.gguf", tensors(config), config, arch=family)
    model, theirs = load(path), of_transformers(path)
    assert model.decoder.config == config
    tokens = np.random.default_rng(5).integers(0, 64, (2, 31), dtype=np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert expected.std() > 0.3
    np.testing.assert_allclose(dense_forward(model.decoder, model.params, tokens), expected, atol=1e-4)
