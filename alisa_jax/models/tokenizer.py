"""The text side of a model: its tokenizer, what stands before a text, and its chat template.

`read` takes these files of a folder, all of them optional:

| file | what it says |
| --- | --- |
| tokenizer.json | the whole tokenizer |
| vocab.json, merges.txt | without it: byte-level BPE, whose rules follow the tokenizer's class |
| tokenizer_config.json | class, names of special tokens, added tokens, chat template |
| special_tokens_map.json, added_tokens.json | the same, in folders that were written long ago |
| chat_template.jinja | the chat template, before that of tokenizer_config.json |

The ids are those of transformers 5: what stands before and behind a text is what the post-processor
of `tokenizer.json` adds, and without that file what `add_bos_token` and `add_eos_token` of
`tokenizer_config.json` say. `bos_token_id` of `config.json` says nothing about it. Three cases
differ from transformers 5 on purpose:

* `tokenizer.json` is taken as it stands. transformers 5 builds some classes, such as LlamaTokenizer
  and GPT2Tokenizer, from the vocabulary alone, and loses a leading space or the splitting of digits
  with which the model was trained.
* A text that begins with the BOS token has it once.
* `truncation` and `padding` are off, unless a caller asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from alisa_jax.models import chat
from alisa_jax.models.hf import CheckpointError
from alisa_jax.models.weights import read_json, refuse_pointer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
SENTENCEPIECE, TEMPLATE = "tokenizer.model", "chat_template.jinja"
# transformers then takes tokenizer.json as it stands, too
AS_IT_STANDS = MappingProxyType({"tokenizer_class": "PreTrainedTokenizerFast"})
FILES = (TOKENIZER, TOKENIZER_CONFIG, VOCAB, MERGES, SENTENCEPIECE, SPECIAL_MAP, ADDED, TEMPLATE)

END = "<|endoftext|>"
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
CLASS_OF = MappingProxyType(  # where no file names the class
    {
        "opt": "GPT2Tokenizer",
        "gpt2": "GPT2Tokenizer",
        "gpt_neox": "GPTNeoXTokenizer",
        "qwen2": "Qwen2Tokenizer",
        "qwen3": "Qwen2Tokenizer",
    }
)
DEFAULTS = MappingProxyType(  # special tokens of a class where the folder names none
    {
        "GPT2Tokenizer": {"bos_token": END, "eos_token": END, "unk_token": END},
        "GPTNeoXTokenizer": {
            "bos_token": END,
            "eos_token": END,
            "unk_token": END,
            "pad_token": "<|padding|>",
        },
        "Qwen2Tokenizer": {"eos_token": END, "unk_token": END, "pad_token": END},
        "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    }
)
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextSide(NamedTuple):
    """A tokenizer and what goes with it."""

    tokenizer: tokenizers.Tokenizer  # truncation and padding are off
    bos_id: int | None  # what stands before an encoded text; None: nothing
    bos_token: str | None  # as chat templates see it, whether or not it stands before a text
    eos_token: str | None
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Token ids with all that the post-processor adds; a BOS that the text has is not added."""
        encoding = self.tokenizer.encode(text)
        ids, added = encoding.ids, encoding.special_tokens_mask
        twice = self.bos_id is not None and ids[:2] == [self.bos_id] * 2 and not added[1]
        return ids[1:] if twice else ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The messages as one text; see `chat.render`."""
        named = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        special = {name: token for name, token in named.items() if token is not None}
        return chat.render(
            self.chat_template, messages, special, add_generation_prompt, continue_final_message
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of `render`, to which nothing is added: a template writes its own BOS."""
        text = self.render(messages, add_generation_prompt)
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def make(
    tokenizer: tokenizers.Tokenizer,
    bos_token: str | None = None,
    eos_token: str | None = None,
    chat_template: str | None = None,
) -> TextSide:
    """The text side of `tokenizer`, whose truncation and padding are switched off for good.

    Raises CheckpointError where more than one token stands before a text.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    before, _ = around(tokenizer)
    if len(before) > 1:
        raise CheckpointError(
            f"the tokenizer puts {len(before)} tokens before a text; at most one can be served."
        )
    return TextSide(
        tokenizer, before[0] if before else None, bos_token, eos_token, chat_template or None
    )


def around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of the tokens that the post-processor puts before a text, and of those behind it."""
    if tokenizer.post_processor is None:
        return [], []
    one = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    made = tokenizer.post_processor.process(one)
    at = made.sequence_ids.index(0)
    return made.ids[:at], made.ids[at + 1 :]


def with_bos(tokenizer: tokenizers.Tokenizer, bos_id: int | None) -> tokenizers.Tokenizer:
    """`tokenizer`, or a copy of it that puts `bos_id` before a text. Raises CheckpointError."""
    if bos_id is None or around(tokenizer)[0] == [bos_id]:
        return tokenizer
    token = tokenizer.id_to_token(bos_id)
    if token is None:
        raise CheckpointError(f"bos_id={bos_id} is no token of the tokenizer.")
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = _template((token, bos_id), None)
    return copy


def read(folder: Path, config: Mapping[str, Any] | None = None) -> TextSide | None:
    """The text side of a folder, or None for a folder without a tokenizer.

    config: the content of its `config.json`, which is read where it is not given. Raises
    CheckpointError, in one sentence, for a damaged file and for a tokenizer that transformers has
    to convert first.
    """
    if not any((folder / name).exists() for name in (TOKENIZER, VOCAB, MERGES)):
        if (folder / SENTENCEPIECE).exists():
            raise CheckpointError(_convert(folder, SENTENCEPIECE))
        return None
    said = _json(folder / TOKENIZER_CONFIG)
    if config is None:
        config = _json(folder / "config.json")
    try:
        return _read(folder, said, _class(said, config))
    except CheckpointError:
        raise
    except Exception as error:  # fields of a wrong type, and the bare Exception of the library
        raise CheckpointError(
            f"the tokenizer files of {folder} cannot be used: {type(error).__name__}, {error}."
        ) from error


def _read(folder: Path, said: Mapping[str, Any], kind: str) -> TextSide:
    whole = (folder / TOKENIZER).exists()
    if whole:
        tokenizer = _from_file(tokenizers.Tokenizer.from_file, folder / TOKENIZER)
    else:
        tokenizer = _byte_level(folder, kind, said)
    bos, eos = _add_special_tokens(tokenizer, folder, kind, said)
    if kind == "GPTNeoXTokenizer" and whole:
        tokenizer.post_processor = None  # the class adds nothing, whatever the file says
    elif not whole:
        ends = [
            (str(token), tokenizer.token_to_id(str(token))) if token and said.get(flag) else None
            for token, flag in ((bos, "add_bos_token"), (eos, "add_eos_token"))
        ]
        tokenizer.post_processor = _template(*ends)
    tokenizer.encode_special_tokens = bool(said.get("split_special_tokens", False))
    names = (None if token is None else str(token) for token in (bos, eos))
    return make(tokenizer, *names, _chat_template(folder, said))


def _class(said: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The tokenizer's class as transformers chooses it, or "" for none in particular."""
    usual = CLASS_OF.get(str(config.get("model_type")), "")
    if config.get("model_type") == "qwen2":
        return usual  # whatever the folder says
    name = said.get("tokenizer_class") or config.get("tokenizer_class") or usual
    return str(name).removesuffix("Fast")


def _byte_level(folder: Path, kind: str, said: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of `vocab.json` and `merges.txt`."""
    for name in (VOCAB, MERGES):
        if not (folder / name).exists():
            raise CheckpointError(f"{folder} has no {TOKENIZER}, and its {name} is missing.")
    if kind not in ("GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer"):
        raise CheckpointError(_convert(folder, f"{VOCAB} and the class {kind or 'of no name'}"))
    bpe = _from_file(lambda path: models.BPE.from_file(path, str(folder / MERGES)), folder / VOCAB)
    made = tokenizers.Tokenizer(bpe)
    space = bool(said.get("add_prefix_space", False))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    made.decoder = decoders.ByteLevel()
    if kind != "GPT2Tokenizer":
        made.normalizer = normalizers.NFC()
    if kind == "Qwen2Tokenizer":
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN2_PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
            ]
        )
    return made


def _add_special_tokens(
    tokenizer: tokenizers.Tokenizer, folder: Path, kind: str, said: Mapping[str, Any]
) -> tuple[AddedToken | None, AddedToken | None]:
    """Give the tokenizer the special and added tokens that it lacks, in transformers' order.

    Returns the BOS and the EOS token.
    """
    told = dict(said)
    if isinstance(said.get("added_tokens_decoder"), dict):
        added = {int(i): _token(given) for i, given in said["added_tokens_decoder"].items()}
    else:
        told |= _json(folder / SPECIAL_MAP)
        special = {_text(token) for token in (*told.values(), *_extra(told))}
        added = {
            i: AddedToken(text, normalized=text not in special, special=text in special)
            for text, i in _json(folder / ADDED).items()
        } | tokenizer.get_added_tokens_decoder()
    named = {
        name: token
        for name, token in DEFAULTS.get(kind, {}).items()
        # the class is also named by folders whose vocabulary has none of these
        if kind != "LlamaTokenizer" or tokenizer.token_to_id(token) is not None
    }
    named |= {
        name: token
        for name, token in told.items()
        if name.endswith("_token") and (token is None or _text(token) is not None)
    }
    same = {str(token): token for token in added.values()}
    named = {
        name: same.get(_text(token)) or _token(token, special=True)
        for name in (*NAMED, *(name for name in named if name not in NAMED))
        if _text(token := named.get(name))
    }
    held = tokenizer.get_added_tokens_decoder().values()
    known = {repr(token) for token in held}  # other flags take the place of those of the file
    new = {str(t): t for _, t in sorted(added.items()) if repr(t) not in known}
    texts = {str(token) for token in held}
    for token in (*named.values(), *_extra(told)):
        if _text(token) not in texts:
            new.setdefault(_text(token), _token(token, special=True))
    for token in named.values():
        if str(token) in new:
            new[str(token)].special = True
    tokenizer.add_tokens(list(new.values()))
    return named.get("bos_token"), named.get("eos_token")


def _extra(told: Mapping[str, Any]) -> list:
    """Special tokens that have no name of their own."""
    given = told.get("extra_special_tokens") or told.get("additional_special_tokens") or []
    return list(given.values() if isinstance(given, dict) else given)


def _text(given: Any) -> str | None:
    """The text of a token that is given as a text, an object or an AddedToken."""
    if isinstance(given, dict):
        given = given.get("content")
    return str(given) if isinstance(given, (str, AddedToken)) else None


def _token(given: Any, special: bool = False) -> AddedToken:
    if isinstance(given, AddedToken):
        return given
    if isinstance(given, dict):
        known = ("lstrip", "normalized", "rstrip", "single_word", "special")
        flags = {name: bool(given[name]) for name in known if name in given}
        return AddedToken(str(given.get("content", "")), **{"special": special} | flags)
    return AddedToken(str(given), special=special)


def _template(bos: tuple[str, int] | None, eos: tuple[str, int] | None):
    """A post-processor that puts `bos` before a text and `eos` behind it; None: nothing."""
    parts = [bos and bos[0], "$A", eos and eos[0]]
    special = dict.fromkeys(token for token in (bos, eos) if token)
    return processors.TemplateProcessing(
        single=[part for part in parts if part], special_tokens=list(special)
    )


def _chat_template(folder: Path, said: Mapping[str, Any]) -> str | None:
    path = folder / TEMPLATE
    if path.is_file():
        return _from_file(lambda name: Path(name).read_text(encoding="utf-8"), path)
    given = said.get("chat_template")
    if isinstance(given, list):
        given = {each.get("name"): each.get("template") for each in given}
    if isinstance(given, dict):
        given = given.get("default")
    return given if isinstance(given, str) else None


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _from_file(make: Callable[[str], Any], path: Path):
    refuse_pointer(path)
    try:
        return make(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a readable tokenizer: {error}.") from error


def _convert(folder: Path, what: str) -> str:
    return (
        f"{folder} has {what} and no {TOKENIZER}; write one with transformers: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}), "
        "which needs sentencepiece for a tokenizer.model."
    )
