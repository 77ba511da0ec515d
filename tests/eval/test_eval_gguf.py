"""`--model=FILE.gguf`: the scripts take a file wherever they take a folder."""

import json

import numpy as np
import pytest

from alisa_jax.models import Decoder, ModelConfig, load
from alisa_jax.models.slots import expected_tensors
from eval import generate
from eval.modelled import shapes
from eval.script import inputs
from eval.script.common import UserError
from eval.speed import systems
from tests import ggufs

CONFIG = ModelConfig(
    arch="llama",
    vocab_size=257,
    d_model=32,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    head_dim=16,
    d_ff=32,
    max_positions=41,
    norm_eps=1e-5,
    tie_embeddings=True,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A model of bytes, most of it in blocks."""
    rng = np.random.default_rng(3)
    expected = expected_tensors(Decoder(CONFIG)).items()
    tensors = {name: rng.standard_normal(slots[0].value.shape, np.float32) for name, slots in expected}
    tokens = [*map(chr, (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(256, 324))), "<|end|>"]
    words = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 256,
    }
    words["tokenizer.ggml.tokens"][0] = "ab"  # the file needs what it merges; "!" is then no token
    path = tmp_path_factory.mktemp("model") / "bytes.gguf"
    return ggufs.write(path, tensors, CONFIG, "Q8_0", general=words)


def test_a_file_is_known_before_its_weights_are_read(file, tmp_path):
    card = inputs.card(str(file))
    assert (card.name, card.max_positions) == ("bytes", 41)
    assert shapes.config(str(file)) == CONFIG
    assert inputs.resolved(str(file), "auto") == "float32" and systems.has_tokenizer(str(file))
    content = bytearray(file.read_bytes())
    content[-40] ^= 1  # a weight
    other = tmp_path / "bytes.gguf"
    other.write_bytes(content)
    assert inputs.card(str(other)).sha256 not in (None, card.sha256)


def test_a_prompt_is_continued_by_the_model_of_a_file(file, capsys):
    generate.main(
        ["generate", f"--model={file}", "--prompt=abc", "--max_new_tokens=3", "--compile_cache=none", "--json"]
    )
    record = json.loads(capsys.readouterr().out)
    assert record["model"] == "bytes" and record["prompt_tokens"] == len(load(file).encode("abc")) == 2


def test_a_damaged_file_is_a_mistake_in_one_sentence(file, tmp_path):
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:1000])
    for look in (inputs.card, shapes.config):
        with pytest.raises(UserError, match="--model: .*short.gguf is truncated or damaged"):
            look(str(short))
