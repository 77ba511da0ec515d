"""Small tokenizers of every kind that checkpoints bring, trained here on a few lines, and texts that tell them apart.

Byte-level BPE with the pre-tokenizers of GPT-2, LLaMA 3, Qwen2 and SmolLM; BPE with byte fallback as SentencePiece
makes it, by a normaliser (LLaMA 2) or by Metaspace; unigram. Each has special tokens, an added token that is none, and a
post-processor or none.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "def mean(values):\n    total = 0.5\n    for v in values:\n        total += v * 1024\n    return total / len(values)\n",
    "The cat sat on the mat, and it didn't move; they'll see it in 1998 or 2024. That's 31,415 times!\r\n",
    "日本語のテキストと中文文本。 naïve café, Größe; Ελληνικά и русский\t🙂👍🏽 family 👨‍👩‍👧\n",
] * 4
TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "Hello world",
    " leading and trailing  ",
    "  two spaces first",
    "import os\r\n\r\nfor i in range(10):\r\n\tprint(f'{i:>4}', 1234567)\r\n",
    "日本語と中文，没有空格。",
    "e\u0301 is \u00e9 and \ufb01 is fi",
    "🙂👍🏽👨‍👩‍👧 \U0001f9ff",
    "she's HE'S they'LL 3.14159 1,000,000",
    "a<|im_start|>user\nhi<|im_end|>\nb",
    "a <|im_end|> b<|im_end|><|im_end|>",
    "x<think>y <think> z",
    "in </s> the <s> middle",
    "<|im_start|>first",
    "\u00a0\u3000\u200b\x00\x7f",
    "line\n\n\n   line\n \t \nend\n",
)
BOS, EOS, UNK, START, STOP, THINK = "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<think>"
SPECIAL = (UNK, BOS, EOS, START, STOP)
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
LLAMA3 = "|".join(PIECES)
QWEN2 = LLAMA3.replace("{1,3}", "")
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
ENDS = ("none", "byte_level", "bos", "bos_eos")


@dataclass(frozen=True, eq=False)
class Kind:
    """A tokenizer and what `tokenizer_config.json` says beside it."""

    name: str
    tokenizer: Tokenizer
    config: dict

    def write(self, folder: Path, **config) -> Path:
        """The tokenizer's files in `folder`; `config` is `config.json`. Returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", self.config)
        write_json(folder / "config.json", {"model_type": "llama"} | config)
        return folder


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def texts() -> st.SearchStrategy[str]:
    """Texts of any characters but surrogates, and of pieces that tokenizers treat in a special way."""
    pieces = [
        *SPECIAL,
        THINK,
        " ",
        "  ",
        "\r\n",
        "\n",
        "'s",
        "0",
        "12",
        "日本",
        "é",
        "e\u0301",
        "🙂",
        "the",
        "▁",
        "<0x0A>",
    ]
    character = st.characters(exclude_categories=["Cs"])
    return st.lists(st.one_of(st.sampled_from(pieces), st.text(character, max_size=4)), max_size=8).map("".join)


def split(pattern: str):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def byte_level(pre_tokenizer, normalizer=None, ignore_merges: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


def sentencepiece(normalizer=None, pre_tokenizer=None) -> Tokenizer:
    """BPE over characters, with a token for each byte for characters that it does not know."""
    made = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # so that words alone are merged
    tokens = [*SPECIAL[:3], *BYTES]
    known = [line for line in CORPUS if line.isascii()]
    made.train_from_iterator(known, trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False))
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    state["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(state))
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.add_special_tokens([START, STOP])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=list(SPECIAL), unk_token=UNK, show_progress=False),
    )
    return made


def llama2_normalizer():
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


BASES = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama3": lambda: byte_level(split(LLAMA3), ignore_merges=True),
    "qwen2": lambda: byte_level(split(QWEN2), normalizers.NFC()),
    "smollm": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    ),
    "llama2": lambda: sentencepiece(llama2_normalizer()),
    "metaspace": lambda: sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "unigram": unigram,
}


def post_processor(tokenizer: Tokenizer, ends: str):
    """One of ENDS as a post-processor."""
    if ends == "none":
        return None
    if ends == "byte_level":
        return processors.ByteLevel(trim_offsets=True)
    special = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    return processors.TemplateProcessing(
        single=f"{BOS} $A" + (f" {EOS}" if ends == "bos_eos" else ""), special_tokens=special
    )


def kind(base: str, ends: str) -> Kind:
    """A tokenizer of BASES with a post-processor of ENDS."""
    made = BASES[base]()
    made.add_tokens([AddedToken(THINK, special=False)])
    if (processor := post_processor(made, ends)) is not None:
        made.post_processor = processor
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    return Kind(f"{base}-{ends}", made, config)


def with_config(given: Kind, **config) -> Kind:
    """The same tokenizer, with further settings beside it."""
    return replace(given, config=given.config | config)
