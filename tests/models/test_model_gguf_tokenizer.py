"""The tokenizers of GGUF files: ids are those of the tokenizer that the file was made of, or of SentencePiece's own rule."""

import itertools
import json

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from alisa_jax.models import CheckpointError
from alisa_jax.models.gguf_tokenizer import text_side

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CORPUS = [
    "def f(x):\n    return x[1:23] + 4567890  # isn't it\r\n\r\nclass A:\n\tpass\n\n\n",
    "The quick brown fox doesn't jump over 12 lazy dogs in 2024, they'll say. THE QUICK Brown fOx WE'RE 3.14159!",
    "中文分词测试，日本語のテキスト、한국어 문장. naïve café Ελληνικά русский",
    "  spaces   and\ttabs \u00a0 no-break … “quotes” — dashes (parens) {braces} <a href='b'>c</a> // path/to/file\n",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "\n\n  \n x",
    "for i in range(100):\n    print(f'{i:>5}')\r\n",
    "你好，世界！1234567 ２０２４年 ½ ² Ⅷ",
    "👩‍👩‍👧‍👦 emoji 🎉🎉 and \x00 control \x7f",
    "e\u0301 and \u00e9 and \u1e9b\u0323",  # composed and not
    "a<|end|>b <|end|> <think> c</think>\n<|begin|>",
    "WE'RE we're 'S 's  'll",
    "camelCaseWords HTTPServer2Go ΑΒΓδεζ ǅ",
    "x  " * 5,
]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def split_at(pattern):
    return [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# As the tokenizer.json of these models has it: (steps before the merges, normalizer, whole pieces first).
SOURCES = {
    "gpt-2": ([GPT2], None, False),
    "default": ([GPT2], None, False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), GPT2], None, False),
    "starcoder": ([pre_tokenizers.Digits(individual_digits=True), GPT2], None, False),
    "llama-bpe": (split_at(rf"{SHORT}|{WORDS}|\p{{N}}{{1,3}}|{REST}"), None, True),
    "qwen2": (split_at(rf"{SHORT}|{WORDS}|\p{{N}}|{REST}"), normalizers.NFC(), False),
    "tekken": (
        split_at(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        None,
        True,
    ),
}
ADDED = {"<|begin|>": CONTROL, "<|end|>": CONTROL, "<think>": USER_DEFINED, "</think>": USER_DEFINED}


def byte_level(pre):
    """(tokenizer, metadata of a file made of it): trained here, with special and added tokens at the end."""
    steps, normalizer, whole = SOURCES[pre]
    source = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    source.pre_tokenizer = pre_tokenizers.Sequence(steps)
    source.decoder = decoders.ByteLevel()
    if normalizer is not None:
        source.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    source.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    )
    for token, kind in ADDED.items():
        added = tokenizers.AddedToken(token, normalized=False, special=kind == CONTROL)
        (source.add_special_tokens if kind == CONTROL else source.add_tokens)([added])
    vocab = source.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    merges = json.loads(source.to_str())["model"]["merges"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [ADDED.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": vocab["<|begin|>"],
        "tokenizer.ggml.eos_token_id": vocab["<|end|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    return source, metadata


@pytest.fixture(scope="module")
def made():
    found = {}
    return lambda pre: found.setdefault(pre, byte_level(pre))


@pytest.fixture(scope="module")
def sides(made):
    """Kind -> (the tokenizer of the model, the one that is read from the file)."""
    return {pre: (made(pre)[0], text_side(made(pre)[1])[0].tokenizer) for pre in SOURCES}


@pytest.mark.parametrize("pre", SOURCES)
def test_byte_level_ids_are_those_of_the_tokenizer_of_the_model(pre, made):
    source, metadata = made(pre)
    side, _ = text_side(metadata)
    for text in TEXTS:
        ids = source.encode(text).ids
        assert side.tokenizer.encode(text).ids == ids, text
        assert side.tokenizer.decode(ids) == source.decode(ids)
        assert side.tokenizer.decode(ids, skip_special_tokens=False) == source.decode(ids, skip_special_tokens=False)


@hypothesis.settings(max_examples=100)
@hypothesis.given(pre=st.sampled_from(list(SOURCES)), text=st.text() | st.text("a1 \r\n'sS<|end>é中/"))
def test_any_text_has_the_ids_of_the_tokenizer_of_the_model(pre, text, sides):
    source, ours = sides[pre]
    assert ours.encode(text).ids == source.encode(text).ids


def test_the_rules_of_different_models_do_differ(made):
    """Else the tests above would show nothing."""
    pieces = {}
    for pre, (steps, *_) in SOURCES.items():
        split = pre_tokenizers.Sequence(steps)
        pieces[pre] = tuple(tuple(piece for piece, _ in split.pre_tokenize_str(text)) for text in TEXTS)
    assert len(set(pieces.values())) == len(SOURCES) - 2  # default is gpt-2, and starcoder smollm


@pytest.mark.parametrize(
    ("pre", "flag", "adds"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("tekken", None, True),
        ("smollm", None, False),
        ("smollm", True, True),
        ("qwen2", None, False),
        ("gpt-2", None, False),
    ],
)
def test_bos_stands_before_a_text_where_the_file_or_the_kind_says_so(pre, flag, adds, made):
    source, metadata = made(pre)
    metadata = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.add_bos_token"}
    side, _ = text_side(metadata if flag is None else metadata | {"tokenizer.ggml.add_bos_token": flag})
    bos = metadata["tokenizer.ggml.bos_token_id"]
    assert side.tokenizer.encode("a b").ids == [bos] * adds + source.encode("a b").ids
    assert side.tokenizer.encode("a b", add_special_tokens=False).ids == source.encode("a b").ids
    assert (side.bos_id, side.bos_token, side.eos_token) == (bos if adds else None, "<|begin|>", "<|end|>")
    assert side.chat_template == "{{ messages }}"


def test_eos_stands_behind_a_text_where_the_file_says_so(made):
    source, metadata = made("qwen2")
    side, ends = text_side(metadata | {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_bos_token": True})
    bos = metadata["tokenizer.ggml.bos_token_id"]
    eos = metadata["tokenizer.ggml.eos_token_id"]
    assert side.tokenizer.encode("a b").ids == [bos, *source.encode("a b").ids, eos]
    assert ends == (eos,)


def test_the_ends_of_a_turn_and_of_a_message_end_a_text_as_well(made):
    _, metadata = made("gpt-2")
    more = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": metadata["tokenizer.ggml.eos_token_id"]}
    assert text_side(metadata | more)[1] == (metadata["tokenizer.ggml.eos_token_id"], 7)


def sentencepiece(prefix=True):
    """(pieces with their scores, metadata): the vocabulary of a SentencePiece BPE model, as a file has it."""
    source = tokenizers.Tokenizer(models.BPE())
    source.pre_tokenizer = pre_tokenizers.Metaspace()
    source.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=420, show_progress=False))
    vocab = source.get_vocab()
    learnt = [piece for piece in sorted(vocab, key=vocab.get) if len(piece) > 1]
    letters = [piece for piece in sorted(vocab, key=vocab.get) if len(piece) == 1 and ord(piece) < 0x3000]
    heads = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    heads += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    learnt = [piece for piece in learnt if all(ord(c) < 0x3000 for c in piece)]
    tokens = [token for token, _ in heads] + learnt + letters + ["<think>"]
    scores = [0.0] * len(heads) + [-float(i) for i in range(len(learnt) + len(letters))] + [0.0]
    kinds = [kind for _, kind in heads] + [NORMAL] * (len(learnt) + len(letters)) + [USER_DEFINED]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    scored = zip(tokens, scores, kinds, strict=True)
    return {token: (score, i) for i, (token, score, kind) in enumerate(scored) if kind == NORMAL}, metadata


def best_first(text, pieces, prefix):
    """SentencePiece's rule: of all neighbours that make a piece the best are joined, the leftmost first."""
    symbols = list(("\u2581" if prefix else "") + text.replace(" ", "\u2581")) if text else []
    while True:
        joined = [(-pieces[a + b][0], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in pieces]
        if not joined:
            break
        _, i = min(joined)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = []
    for symbol in symbols:
        ids += [pieces[symbol][1]] if symbol in pieces else [3 + byte for byte in symbol.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_its_own_rule(prefix):
    pieces, metadata = sentencepiece(prefix)
    side, ends = text_side(metadata)
    assert (side.bos_id, side.bos_token, side.eos_token, ends) == (1, "<s>", "</s>", (2,))
    for text in [text for text in TEXTS if "<think>" not in text]:
        ids = side.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == best_first(text, pieces, prefix), text
        assert side.tokenizer.encode(text).ids == [1, *ids]
        assert side.tokenizer.decode(ids) == text


def test_special_tokens_in_a_text_are_themselves_and_the_text_between_them_begins_anew():
    pieces, metadata = sentencepiece()
    side, _ = text_side(metadata)
    think = metadata["tokenizer.ggml.tokens"].index("<think>")
    ids = side.tokenizer.encode("The fox</s>12 dogs<think>x", add_special_tokens=False).ids
    parts = [best_first(part, pieces, True) for part in ("The fox", "12 dogs", "x")]
    assert ids == [*parts[0], 2, *parts[1], think, *parts[2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "its tokenizer is 'bert'; supported in GGUF files are gpt2, llama"),
        ({"pre": "chameleon"}, r"splits text as 'chameleon' does \(tokenizer.ggml.pre\); supported are default, gpt-2"),
        ({"pre": None}, "does not say how text is split"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing or no list of texts"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is missing or no list of texts"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a"]}, "tokenizer.ggml.merges has 'a', no pair"),
        ({"merges": ["no such"]}, "its tokenizer contradicts itself"),
        ({"token_type": [1]}, "token_type does not have a type for each token"),
        ({"bos_token_id": 10**6}, "a special token has the id 1000000, and the file has 484 tokens"),
    ],
)
def test_a_tokenizer_that_is_not_supported_or_wrong_is_refused(changes, message, made):
    _, metadata = made("gpt-2")
    metadata = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError, match=message) as error:
        text_side(metadata)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_scores_are_needed_where_they_order_the_merges():
    _, metadata = sentencepiece()
    with pytest.raises(CheckpointError, match="scores does not have one score for each token"):
        text_side(metadata | {"tokenizer.ggml.scores": [1.0]})


def test_a_file_without_a_vocabulary_has_no_tokenizer():
    assert text_side({"tokenizer.ggml.model": "no_vocab"}) == text_side({}) == (None, ())
