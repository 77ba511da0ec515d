"""Names of the hub, against a hub that is a folder here: no test reaches for the network."""

import fnmatch
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from alisa_jax.models import CheckpointError, ModelConfig, hub, load, save
from alisa_jax.models.checkpoint import config_of
from eval.script import inputs
from eval.script.common import UserError
from tests.models import tokenizer_kinds as kinds
from tests.sentences import one_sentence

CONFIG = ModelConfig(
    arch="llama",
    vocab_size=31,
    d_model=22,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    head_dim=10,
    d_ff=19,
    max_positions=97,
)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG)


class RepositoryNotFoundError(OSError):
    """As the hub's library calls it."""


class GatedRepoError(RepositoryNotFoundError):
    """As the hub's library calls it."""


class RevisionNotFoundError(OSError):
    """As the hub's library calls it."""


class FakeHub:
    """Repositories below a folder; `calls` lists what was asked for, `error` is raised instead of an answer."""

    def __init__(self, folder):
        self.folder, self.calls, self.error = folder, [], None

    def snapshot_download(self, repo_id, revision=None, allow_patterns=None, ignore_patterns=None):
        self.calls.append((repo_id, revision))
        if self.error is not None:
            raise self.error
        remote = self.folder / "remote" / repo_id
        if not remote.is_dir():
            raise RepositoryNotFoundError(f"404 Client Error.\nRepository Not Found for {repo_id}.")
        snapshot = self.folder / "cache" / repo_id.replace("/", "--") / (revision or "main") / "0123abcd"
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in sorted(p for p in remote.rglob("*") if p.is_file()):
            name = path.relative_to(remote).as_posix()
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                shutil.copyfile(path, snapshot / name)
        return str(snapshot)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    made = FakeHub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=made.snapshot_download))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return made


@pytest.fixture
def tiny(fake, params):
    """The hub with one model and much that is not needed."""
    remote = fake.folder / "remote" / "owner" / "tiny-1.0"
    save(CONFIG, params, remote, "float32")
    (remote / "onnx").mkdir()
    for name in ("README.md", "pytorch_model.bin", "training_args.bin", "tf_model.h5", "onnx/model.safetensors"):
        (remote / name).write_bytes(b"not needed")
    return remote


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


def test_a_name_of_the_hub_is_loaded_and_kept_as_the_name(fake, tiny, params):
    model = load("owner/tiny-1.0")
    assert model.name == "owner/tiny-1.0" and same(model.params, params)
    assert {path.name for path in fake.folder.glob("cache/**/*") if path.is_file()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_the_configuration_of_a_name_brings_no_weights(fake, tiny):
    assert config_of("owner/tiny-1.0") == CONFIG
    assert [path.name for path in fake.folder.glob("cache/**/*") if path.is_file()] == ["config.json"]
    with pytest.raises(CheckpointError, match="the hub has no model of that name"):
        config_of("owner/unknown")


def test_a_revision_is_asked_for(fake, tiny, params):
    assert same(load("owner/tiny-1.0@step3000").params, params)
    load("owner/tiny-1.0")
    assert fake.calls == [("owner/tiny-1.0", "step3000"), ("owner/tiny-1.0", None)]


def test_a_local_folder_of_that_name_wins(fake, tiny, params):
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    save(CONFIG, other, "owner/tiny-1.0")
    model = load("owner/tiny-1.0")
    assert same(model.params, other) and model.name == "tiny-1.0" and fake.calls == []


@pytest.mark.parametrize("parts", [False, True])
def test_the_files_of_a_tokenizer_are_taken_with_it(fake, tiny, parts):
    kind = kinds.kind("gpt2", "bos")
    kind.write(tiny.parent / "kind")
    if parts:  # as OPT's repositories
        kind.tokenizer.model.save(str(tiny))
        config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
        kinds.write_json(tiny / "tokenizer_config.json", config)
        kinds.write_json(tiny / "special_tokens_map.json", {"bos_token": "</s>", "eos_token": "</s>"})
        kinds.write_json(tiny / "added_tokens.json", {"<tool>": 420})
    else:
        shutil.copyfile(tiny.parent / "kind" / "tokenizer.json", tiny / "tokenizer.json")
        kinds.write_json(tiny / "tokenizer_config.json", kind.config)
    (tiny / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tiny / "tokenizer.model").write_bytes(b"not needed beside the others")
    model = load("owner/tiny-1.0")
    assert model.encode("Hello <s>") == load(tiny).encode("Hello <s>")
    assert (model.bos_id, model.encode("Hello")[0]) == ((2, 2) if parts else (1, 1))
    assert model.text.chat_template == "{{ messages[0].content }}"
    if parts:
        assert model.encode("a<tool>")[-1] == 420


def test_a_sentencepiece_model_alone_is_refused(fake, tiny):
    (tiny / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(CheckpointError, match="has tokenizer.model and no tokenizer.json; write one") as error:
        load("owner/tiny-1.0")
    assert one_sentence(error)


def test_bin_files_are_taken_where_there_are_no_others(fake, tiny, params):
    torch = pytest.importorskip("torch")
    import safetensors.torch

    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    (tiny / "model.safetensors").unlink()
    torch.save(tensors, tiny / "pytorch_model.bin")
    assert same(load("owner/tiny-1.0").params, params)
    assert not list(fake.folder.glob("cache/**/training_args.bin"))


def test_bin_files_are_not_downloaded_where_torch_is_missing(fake, tiny, monkeypatch):
    (tiny / "model.safetensors").unlink()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"owner/tiny-1.0 has .* install 'alisa-jax\[torch\]'") as error:
        load("owner/tiny-1.0")
    assert one_sentence(error) and not list(fake.folder.glob("cache/**/*.bin"))


@pytest.mark.parametrize(
    "raised, message",
    [
        (None, "the hub has no model of that name, or it is private"),
        (GatedRepoError("403\nAccess is restricted."), "accounts with permission only"),
        (RevisionNotFoundError("404\nNo such revision."), "no such revision"),
        (ConnectionError("no route to host\nat all"), r"the hub could not be reached .* \(ConnectionError\)"),
    ],
)
def test_a_name_that_cannot_be_had_says_what_was_tried_and_what_is_allowed(fake, raised, message):
    fake.error = raised
    with pytest.raises(CheckpointError, match=message) as error:
        load("owner/unknown")
    text = str(error.value)
    assert one_sentence(text) and text.startswith("'owner/unknown' is no folder here") and hub.ALLOWED in text
    with pytest.raises(UserError, match=f"--model: 'owner/unknown' is no folder here, .*{message}"):
        inputs.card("owner/unknown")


def test_without_the_extra_the_sentence_names_it(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"'owner/tiny-1.0' is no folder here.* 'alisa-jax\[hub\]'") as error:
        load("owner/tiny-1.0")
    assert one_sentence(error)


@pytest.mark.parametrize("name", ["absent", "./owner/name", "/owner/name", "a/b/c", "owner/", "../name", "~/name"])
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(fake, name):
    with pytest.raises(CheckpointError, match="is not a folder; give a local Hugging Face folder"):
        load(name)
    assert fake.calls == []


def test_cards_know_names_of_the_hub_and_hash_its_weights(fake, tiny):
    card = inputs.card("owner/tiny-1.0")
    assert (card.name, card.max_positions) == ("owner/tiny-1.0", 97) and len(card.sha256) == 64
    assert card.sha256 == inputs.card(str(tiny)).sha256  # the same files, wherever they lie
    content = bytearray((tiny / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tiny / "model.safetensors").write_bytes(content)
    assert inputs.card("owner/tiny-1.0").sha256 != card.sha256


def test_cards_hash_bin_files_where_there_are_no_others(tiny):
    with_safetensors = inputs.card(str(tiny)).sha256
    (tiny / "pytorch_model.bin").write_bytes(b"other bytes")
    assert inputs.card(str(tiny)).sha256 == with_safetensors
    (tiny / "model.safetensors").unlink()
    without = inputs.card(str(tiny)).sha256
    (tiny / "pytorch_model.bin").write_bytes(b"other_bytes")
    assert len({with_safetensors, without, inputs.card(str(tiny)).sha256}) == 3
