"""The tokenizer, the special ids and the chat template of a GGUF file.

| tokenizer.ggml.model | what it is | read from |
| --- | --- | --- |
| gpt2 | byte-level BPE | tokens, merges, and the name of how text is split before (`pre`) |
| llama | SentencePiece's BPE, with byte fallback | tokens, and scores that order the merges |

How a text is split is not in the file, only a name for it: the rule of each supported name is here.
Control tokens stand for themselves in a text and are special, user-defined ones are not special.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from alisa_jax.models.hf import CheckpointError
from alisa_jax.models.tokenizer import TextSide

_NORMAL, _UNKNOWN = 1, 2  # types of tokens
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of text, of a turn, of a message

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_WORDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_AFTER_WORDS}"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_AFTER_WORDS}"
)


class _Split(NamedTuple):
    """How text is split before its pieces are merged."""

    pattern: str | None = None  # None: that of GPT-2
    digits: bool = False  # each digit by itself, before the pattern
    whole: bool = False  # a piece that is a token is not put together from smaller ones
    bos: bool = False  # BOS before a text, where the file does not say
    nfc: bool = False  # composed characters


_SPLITS = types.MappingProxyType(
    {
        **dict.fromkeys(("default", "gpt-2"), _Split()),
        **dict.fromkeys(("smollm", "starcoder", "refact"), _Split(digits=True)),
        **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Split(_LLAMA3, whole=True, bos=True)),
        "qwen2": _Split(_QWEN2, nfc=True),
        "tekken": _Split(_TEKKEN, whole=True, bos=True),
    }
)


def text_side(metadata: Mapping[str, Any]) -> tuple[TextSide | None, tuple[int, ...]]:
    """(the tokenizer and what belongs to it, ids that end a text).

    None for a file without a vocabulary. Raises CheckpointError for a kind of tokenizer or a way to
    split text that is not supported, and for a vocabulary that contradicts itself.
    """
    values = _Values(metadata)
    kind = values.get("model")
    if kind in (None, "no_vocab", "none"):
        return None, values.ids(_ENDS)
    if kind not in _MAKERS:
        raise CheckpointError(
            f"its tokenizer is {kind!r}; supported in GGUF files are {', '.join(_MAKERS)}."
        )
    tokenizer, bos_by_default = _MAKERS[kind](values)
    _add_tokens(tokenizer, values)
    bos, eos = values.get("bos_token_id"), values.get("eos_token_id")
    adds_bos = bos is not None and values.get("add_bos_token", bos_by_default)
    adds_eos = eos is not None and values.get("add_eos_token", False)
    _add_ends(tokenizer, values, bos if adds_bos else None, eos if adds_eos else None)
    side = TextSide(
        tokenizer=tokenizer,
        bos_id=bos if adds_bos else None,
        bos_token=values.token(bos),
        eos_token=values.token(eos),
        chat_template=metadata.get("tokenizer.chat_template"),
    )
    return side, values.ids(_ENDS)


class _Values:
    """The keys under tokenizer.ggml, checked as they are asked for."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    @functools.cached_property
    def tokens(self) -> list[str]:
        return self._texts("tokens")

    @functools.cached_property
    def kinds(self) -> list[int]:
        kinds = self.get("token_type", [_NORMAL] * len(self.tokens))
        if not isinstance(kinds, list) or len(kinds) != len(self.tokens):
            raise CheckpointError("tokenizer.ggml.token_type does not have a type for each token.")
        return kinds

    def pairs(self) -> list[tuple[str, str]]:
        """The merges, best first."""
        pairs = [tuple(merge.split(" ")) for merge in self._texts("merges")]
        wrong = next((pair for pair in pairs if len(pair) != 2), None)
        if wrong is not None:
            raise CheckpointError(f"tokenizer.ggml.merges has {' '.join(wrong)!r}, no pair.")
        return pairs

    def token(self, index: int | None) -> str | None:
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise CheckpointError(
                f"a special token has the id {index!r}, and the file has {len(self.tokens)} tokens."
            )
        return self.tokens[index]

    def ids(self, keys: tuple[str, ...]) -> tuple[int, ...]:
        found = (self.get(key) for key in keys)
        return tuple(dict.fromkeys(index for index in found if index is not None))

    def _texts(self, key: str) -> list[str]:
        texts = self.get(key)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise CheckpointError(f"tokenizer.ggml.{key} is missing or no list of texts.")
        return texts


def _byte_level(values: _Values) -> tuple[tokenizers.Tokenizer, bool]:
    """(tokenizer, whether BOS stands before a text where the file does not say)."""
    name = values.get("pre")
    if name not in _SPLITS:
        said = "does not say how text is split" if name is None else f"splits text as {name!r} does"
        raise CheckpointError(
            f"its tokenizer {said} (tokenizer.ggml.pre); supported are {', '.join(_SPLITS)}."
        )
    split, spelling = _SPLITS[name], _byte_spelling()
    letters = frozenset(spelling)
    vocab = {
        token
        if kind != _NORMAL or letters.issuperset(token)
        else "".join(spelling[byte] for byte in token.encode()): index
        for index, (token, kind) in enumerate(zip(values.tokens, values.kinds, strict=True))
    }
    tokenizer = _make(models.BPE, vocab, values.pairs(), ignore_merges=split.whole)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(split.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, split.bos


def _sentencepiece(values: _Values) -> tuple[tokenizers.Tokenizer, bool]:
    """As `_byte_level`. A space stands before each stretch of text, unless the file says no."""
    if values.get("precompiled_charsmap"):
        raise CheckpointError("its tokenizer has rules that replace characters: not supported.")
    vocab = {token: index for index, token in enumerate(values.tokens)}
    unknown = values.get("unknown_token_id")
    if unknown is None and _UNKNOWN in values.kinds:
        unknown = values.kinds.index(_UNKNOWN)
    tokenizer = _make(
        models.BPE,
        vocab,
        values.pairs() if values.get("merges") is not None else _pairs_by_score(values),
        unk_token=values.token(unknown),
        fuse_unk=True,
        byte_fallback=True,
    )
    replaced = [normalizers.Replace(" ", _SPACE)]
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if values.get("add_space_prefix", True):
        replaced.insert(0, normalizers.Prepend(_SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(replaced)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer, True


_MAKERS = types.MappingProxyType({"gpt2": _byte_level, "llama": _sentencepiece})


def _make(model: Any, vocab: dict[str, int], pairs: list, **options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(model(vocab=vocab, merges=pairs, **options))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"its tokenizer contradicts itself: {error}.") from error


def _pairs_by_score(values: _Values) -> list[tuple[str, str]]:
    """Merges for which BPE does what SentencePiece does: the pair of the best token goes first."""
    scores = values.get("scores")
    if not isinstance(scores, list) or len(scores) != len(values.tokens):
        raise CheckpointError("tokenizer.ggml.scores does not have one score for each token.")
    pieces = {
        token: index
        for index, (token, kind) in enumerate(zip(values.tokens, values.kinds, strict=True))
        if kind in (_NORMAL, _USER_DEFINED)
    }
    found = []
    for token, index in pieces.items():
        for cut in range(1, len(token)):
            left, right = pieces.get(token[:cut]), pieces.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], cut, left, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_tokens(tokenizer: tokenizers.Tokenizer, values: _Values) -> None:
    """Control and user-defined tokens stand for themselves in a text."""
    for kind, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL)
                for token, its in zip(values.tokens, values.kinds, strict=True)
                if its == kind and token
            ]
        )


def _add_ends(
    tokenizer: tokenizers.Tokenizer, values: _Values, bos: int | None, eos: int | None
) -> None:
    """Have BOS before and EOS behind what is encoded with special tokens; None: neither."""
    special = {values.token(index): index for index in (bos, eos) if index is not None}
    before = [] if bos is None else [values.token(bos)]
    behind = [] if eos is None else [values.token(eos)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *(f"{token}:1" for token in before), "$B:1"]
        + [f"{token}:1" for token in behind],
        special_tokens=list(special.items()),
    )


def _byte_spelling() -> str:
    """The character that stands for each byte in a byte-level vocabulary, by the byte.

    Printable Latin-1 characters stand for themselves, the characters from 256 on for the other
    bytes in order.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in plain else next(others)) for byte in range(256))
