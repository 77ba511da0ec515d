"""Text to ids and back for every kind of tokenizer, against transformers reading the same folder."""

import dataclasses
import itertools
import shutil

import hypothesis
import pytest
from tokenizers import AddedToken, pre_tokenizers, processors

from alisa_jax.models import CheckpointError, ModelConfig, load, save
from alisa_jax.models import tokenizer as text_side
from tests.models import tokenizer_kinds as kinds
from tests.models.tokenizer_kinds import BOS, EOS, START, STOP, TEXTS, UNK, write_json
from tests.sentences import one_sentence

CONFIG = ModelConfig(
    arch="llama",
    vocab_size=430,
    d_model=22,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    head_dim=10,
    d_ff=19,
    max_positions=97,
)
QUICK = hypothesis.settings(max_examples=25)


@pytest.fixture(scope="module")
def auto():
    """`AutoTokenizer.from_pretrained` of transformers."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of each kind by base and ends."""
    home = tmp_path_factory.mktemp("kinds")
    pairs = itertools.product(kinds.BASES, kinds.ENDS)
    return {pair: kinds.kind(*pair).write(home / "-".join(pair)) for pair in pairs}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, random_params):
    """A folder of weights whose config.json and generation_config.json name a BOS."""
    folder = tmp_path_factory.mktemp("model")
    save(CONFIG, random_params(CONFIG), folder, "float32", bos_id=1, eos_ids=(2,))
    return folder


@pytest.fixture
def loaded(model_folder, tmp_path):
    """`loaded(kind, **config)`: the folder with the kind's tokenizer, and the model that is read from it."""

    def make(kind, name="loaded"):
        folder = shutil.copytree(model_folder, tmp_path / name)
        kind.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", kind.config)
        return folder, load(folder)

    return make


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as error:
        text_side.read(folder)
    assert one_sentence(error)


def same(folder, auto, texts=TEXTS):
    """Every text has transformers' ids, and those become transformers' text again; returns both sides."""
    ours, theirs = text_side.read(folder), auto(folder)
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    return ours, theirs


@pytest.mark.parametrize("base", kinds.BASES)
def test_ids_and_texts_of_every_kind_are_those_of_transformers(folders, auto, base):
    for ends in kinds.ENDS:
        ours, theirs = same(folders[base, ends], auto)
        assert ours.bos_id == (theirs.bos_token_id if ends.startswith("bos") else None)
        assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)


@pytest.mark.parametrize("base", kinds.BASES)
def test_ids_of_any_text_are_those_of_transformers(folders, auto, base):
    pairs = [(text_side.read(folders[base, ends]), auto(folders[base, ends])) for ends in ("none", "bos_eos")]

    @QUICK
    @hypothesis.given(kinds.texts())
    def check(text):
        for ours, theirs in pairs:
            ids = theirs(text)["input_ids"]
            plain = theirs(text, add_special_tokens=False)["input_ids"]
            begun = ours.bos_id is not None and plain[:1] == [ours.bos_id]
            assert ours.encode(text) == (ids[1:] if begun else ids)
            assert ours.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)

    check()


@pytest.mark.parametrize("base", kinds.BASES)
def test_a_text_that_begins_with_bos_has_it_once(loaded, base):
    for ends in ("bos", "bos_eos", "none"):
        _, model = loaded(kinds.kind(base, ends), ends)
        tail = [2] if ends == "bos_eos" else []
        for text in (BOS, f"{BOS}hello", f"{BOS} hello", f"{BOS}{STOP}"):
            ids = model.encode(text)
            assert ids == model.tokenizer.encode(text, add_special_tokens=False).ids + tail
            assert ids[0] == 1 and ids.count(1) == 1
        if ends == "none":
            assert model.encode("hello")[:1] != [1]
        else:  # what follows the text's own BOS is the text's
            assert model.encode(BOS + BOS)[:3] == [1, 1, *tail][:3]


@pytest.mark.parametrize("ends", ["none", "byte_level"])
def test_config_json_puts_no_bos_before_a_text(loaded, auto, ends):
    folder, model = loaded(kinds.kind("smollm", ends))
    assert model.bos_id is None and model.eos_ids == (2,)
    assert model.encode("Hello world") == auto(folder)("Hello world")["input_ids"]


def test_the_post_processor_wins_over_another_id_in_config_json(loaded):
    folder, _ = loaded(kinds.kind("llama2", "bos"))
    for name in ("config.json", "generation_config.json"):  # as folders of LLaMA 1 say
        content = text_side.read_json(folder / name)
        write_json(folder / name, content | {"bos_token_id": 0, "eos_token_id": 1})
    model = load(folder)
    assert model.bos_id == 1 and model.encode("a")[0] == 1


def test_save_writes_a_tokenizer_that_puts_its_bos_before_a_text(tmp_path, random_params):
    params = random_params(CONFIG)
    for ends, bos_id, wanted in (("none", 1, 1), ("none", 3, 3), ("bos", 1, 1), ("bos", 2, 2), ("bos", None, 1)):
        given = kinds.kind("gpt2", ends).tokenizer
        before = given.to_str()
        save(CONFIG, params, tmp_path, "float32", given, bos_id=bos_id)
        model = load(tmp_path)
        assert given.to_str() == before  # that of the caller is as it was
        assert model.bos_id == wanted == model.encode("a")[0] and model.encode("a").count(wanted) == 1
    sizes = dict(arch="gpt_neox", n_kv_heads=2, head_dim=11, rotary_frac=0.4, act="gelu", mlp_bias=True)
    neox = dataclasses.replace(CONFIG, **sizes, attention_bias=True, parallel_residual=True)  # whose class adds nothing
    save(neox, random_params(neox), tmp_path / "neox", "float32", given, bos_id=1)
    assert load(tmp_path / "neox").bos_id == 1
    with pytest.raises(CheckpointError, match="bos_id=9999 is no token of the tokenizer"):
        save(CONFIG, params, tmp_path, "float32", given, bos_id=9999)


@pytest.mark.parametrize("base", ["gpt2", "unigram"])
def test_truncation_and_padding_of_the_file_are_off(loaded, auto, base):
    kind = kinds.kind(base, "bos")
    kind.tokenizer.enable_truncation(16)
    kind.tokenizer.enable_padding(length=64, pad_id=0, pad_token=UNK)
    folder, model = loaded(kind)
    text = kinds.CORPUS[1] * 40
    assert model.tokenizer.truncation is None and model.tokenizer.padding is None
    assert len(model.encode(text)) > 1000
    assert model.encode(text) == auto(folder)(text)["input_ids"]
    assert model.encode("a") == auto(folder)("a")["input_ids"]


FLAGS = ({}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True})


@pytest.mark.parametrize(
    "base, model_type, name",
    [
        ("llama3", "llama", "PreTrainedTokenizerFast"),
        ("llama3", "llama", "TokenizersBackend"),
        ("llama3", "llama", "LlamaTokenizerFast"),
        ("llama3", "llama", None),
        ("gpt2", "llama", "GPT2Tokenizer"),
        ("gpt2", "opt", "GPT2TokenizerFast"),
        ("gpt2", "opt", None),
        ("qwen2", "qwen2", "Qwen2Tokenizer"),
        ("qwen2", "qwen2", None),
        ("qwen2", "qwen3", "Qwen2TokenizerFast"),
        ("llama2", "mistral", "LlamaTokenizer"),
    ],
)
def test_beside_tokenizer_json_flags_add_nothing(tmp_path, auto, base, model_type, name):
    for ends, flags in itertools.product(("none", "bos"), FLAGS):
        kind = kinds.with_config(kinds.kind(base, ends), tokenizer_class=name, **flags)
        ours, _ = same(kind.write(tmp_path / f"{ends}{len(flags)}", model_type=model_type), auto)
        assert ours.bos_id == (1 if ends == "bos" else None)


@pytest.mark.parametrize("name", ["GPTNeoXTokenizer", "GPTNeoXTokenizerFast", None])
def test_the_class_of_gpt_neox_adds_nothing(tmp_path, auto, name):
    kind = kinds.kind("gpt2", "bos")
    kind.tokenizer.normalizer = kinds.normalizers.NFC()  # as the class has it
    for flags in FLAGS:
        told = kinds.with_config(kind, tokenizer_class=name, **flags)
        ours, _ = same(told.write(tmp_path / "told", model_type="gpt_neox"), auto)
        assert ours.bos_id is None
    told = kinds.with_config(kind, tokenizer_class="PreTrainedTokenizerFast")
    assert same(told.write(tmp_path / "told", model_type="gpt_neox"), auto)[0].bos_id == 1


def test_special_and_added_tokens_that_only_the_configuration_knows_become_ids(tmp_path, auto):
    texts = (*TEXTS, "a<new>b", "x <tool> y", "<|extra|><|extra|>", "p<pad>q", "im <mask> d")
    entry = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    config = {
        "added_tokens_decoder": {
            "1": entry | {"content": BOS, "lstrip": True},
            "430": entry | {"content": "<new>"},
            "429": entry | {"content": "<tool>", "special": False, "normalized": True, "rstrip": True},
        },
        "extra_special_tokens": ["<|extra|>"],
        "pad_token": "<pad>",
        "mask_token": {"__type": "AddedToken", "content": "<mask>"}
        | {k: v for k, v in entry.items() if k != "special"},
    }
    kind = kinds.with_config(kinds.kind("gpt2", "bos"), **config)
    ours, _ = same(kind.write(tmp_path / "new"), auto, texts)
    assert ours.tokenizer.decode(ours.encode("a<new>b")) == "ab"
    old = kind.write(tmp_path / "old")
    write_json(old / "tokenizer_config.json", kinds.kind("gpt2", "bos").config)
    write_json(old / "special_tokens_map.json", {"pad_token": "<pad>", "additional_special_tokens": ["<|extra|>"]})
    write_json(old / "added_tokens.json", {"<new>": 430, "<pad>": 429})
    same(old, auto, texts)


def split_up(folder, kind, config, model_type, **files):
    """The folder of a kind with vocab.json and merges.txt in the place of tokenizer.json."""
    kind.write(folder, model_type=model_type)
    kind.tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    if config is None:
        (folder / "tokenizer_config.json").unlink()
    else:
        write_json(folder / "tokenizer_config.json", config)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


OPT = {"bos_token": EOS, "eos_token": EOS, "unk_token": EOS, "pad_token": "<pad>", "add_prefix_space": False}


@pytest.mark.parametrize(
    "base, model_type, config",
    [
        ("gpt2", "opt", OPT | {"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer", "errors": "replace"}),
        ("gpt2", "opt", OPT | {"add_bos_token": True}),
        ("gpt2", "opt", OPT | {"add_bos_token": True, "add_eos_token": True, "add_prefix_space": True}),
        ("gpt2", "opt", {}),
        ("gpt2", "opt", None),
        ("gpt2", "llama", {"tokenizer_class": "GPT2Tokenizer", "bos_token": BOS, "add_bos_token": True}),
        ("gpt2", "gpt_neox", {"tokenizer_class": "GPTNeoXTokenizer"}),
        ("gpt2", "gpt_neox", {"bos_token": BOS, "eos_token": EOS}),
        ("qwen2", "qwen2", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": STOP, "bos_token": None}),
        ("qwen2", "qwen2", {"bos_token": BOS, "add_bos_token": True}),
        ("qwen2", "qwen3", {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": [START, STOP]}),
    ],
)
def test_vocab_and_merges_stand_in_for_tokenizer_json(tmp_path, auto, base, model_type, config):
    plain = split_up(tmp_path / "plain", kinds.kind(base, "none"), config, model_type)
    old = {"special_tokens_map": {"pad_token": "<pad>"}, "added_tokens": {"<pad>": 420, "<think>": 421}}
    for folder in (plain, split_up(tmp_path / "old", kinds.kind(base, "none"), config, model_type, **old)):
        ours, theirs = same(folder, auto, (*TEXTS, "a<pad>b", "<|endoftext|>"[1:]))
        assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)


def test_an_opt_folder_of_vocab_and_merges_puts_its_end_of_text_before_a_text(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "opt")
    kind = kinds.kind("gpt2", "none")
    kind.tokenizer.model.save(str(folder))
    write_json(folder / "tokenizer_config.json", OPT | {"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"})
    model = load(folder)
    assert model.bos_id == 2 and model.encode("Hello world")[0] == 2
    assert model.encode("Hello world")[1:] == kind.tokenizer.encode("Hello world").ids
    assert model.decode(model.encode("naïve 日本 🙂")) == "naïve 日本 🙂"


def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path):
    refused_folder = tmp_path / "sentencepiece"
    refused_folder.mkdir()
    (refused_folder / "tokenizer.model").write_bytes(b"\x0a\x0e")
    refused(
        refused_folder, r"has tokenizer.model and no tokenizer.json; .*AutoTokenizer.from_pretrained.*save_pretrained"
    )
    kind = kinds.kind("gpt2", "none")
    half = split_up(tmp_path / "half", kind, {}, "opt")
    (half / "merges.txt").unlink()
    refused(half, "no tokenizer.json, and its merges.txt is missing")
    refused(
        split_up(tmp_path / "class", kind, {}, "llama"), "vocab.json and the class of no name and no tokenizer.json"
    )
    broken = split_up(tmp_path / "broken", kind, {}, "opt")
    (broken / "vocab.json").write_text("{")
    refused(broken, "vocab.json is not a readable tokenizer")
    damaged = kind.write(tmp_path / "damaged")
    for content, message in ((b"{", "tokenizer.json is not a readable tokenizer"), (b"", "not a readable")):
        (damaged / "tokenizer.json").write_bytes(content)
        refused(damaged, message)
    (damaged / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(damaged, "tokenizer.json is a pointer of git-lfs and not the file itself")
    wrong = kind.write(tmp_path / "wrong")
    for config in ({"added_tokens_decoder": {"x": {}}}, {"chat_template": [1]}, {"extra_special_tokens": 5}):
        write_json(wrong / "tokenizer_config.json", config)
        refused(wrong, "the tokenizer files of .*wrong cannot be used: ")
    two = kinds.kind("gpt2", "none")
    two.tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} {START} $A", special_tokens=[(BOS, 1), (START, 3)]
    )
    refused(two.write(tmp_path / "two"), "puts 2 tokens before a text; at most one can be served")


def test_a_folder_without_a_tokenizer_has_none(model_folder):
    model = load(model_folder)
    assert model.tokenizer is None and model.text is None
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        model.encode("a")


def test_tokenizer_json_is_taken_as_it_stands(tmp_path):
    """transformers 5 builds these two classes anew, and loses the digits and the leading space."""
    kind = kinds.with_config(kinds.kind("smollm", "none"), tokenizer_class="GPT2Tokenizer")
    kind.tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True)])
    assert isinstance(kind.tokenizer.pre_tokenizer, pre_tokenizers.Sequence)
    ours = text_side.read(kind.write(tmp_path / "smollm"))
    assert len(ours.encode("2024 1998")) == 9
    kind = kinds.with_config(kinds.kind("llama2", "bos"), tokenizer_class="LlamaTokenizerFast")
    ours = text_side.read(kind.write(tmp_path / "llama2"))
    assert ours.encode(" the") != ours.encode("the") and ours.encode(" the") == kind.tokenizer.encode(" the").ids


@pytest.mark.parametrize("ends, wanted", [("none", ([], [])), ("bos", ([1], [])), ("bos_eos", ([1], [2]))])
def test_what_stands_around_a_text_is_found(ends, wanted):
    made = kinds.kind("unigram", ends).tokenizer
    assert text_side.around(made) == wanted
    if ends != "none":
        made.post_processor = processors.Sequence([processors.ByteLevel(), made.post_processor])
        assert text_side.around(made) == wanted
