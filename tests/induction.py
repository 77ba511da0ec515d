"""A known model for the evaluation scripts: it copies what followed the latest earlier place of the same token."""

import json
import math
from types import SimpleNamespace

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = "the cat sat on the mat and the dog did not, " * 40


class InductionEngine:
    """Says what followed the latest earlier place of the same token within `reach` tokens (p = 1/2)."""

    def __init__(self, vocab_size: int, reach: int, codec: str, calls: list, stop_at: int | None):
        self.vocab_size, self.reach, self.codec, self.calls, self.stop_at = vocab_size, reach, codec, calls, stop_at

    def guess(self, tokens, t):
        earlier = [p for p in range(max(0, t - self.reach), t) if tokens[p] == tokens[t]]
        return tokens[earlier[-1] + 1] if earlier else -1

    def score(self, sequences, protocol="decode", progress=False, last=None):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(sequences)
        hits = [np.asarray([self.guess(s, t) == s[t + 1] for t in range(len(s) - 1)]) for s in sequences]
        return SimpleNamespace(
            logprobs=[np.where(h, math.log(0.5), -math.log(self.vocab_size)).astype(np.float32) for h in hits],
            correct=hits,
            attended_frac=np.asarray([0.5, 0.5], np.float32),
            clipped_frac=np.asarray([0.0, 0.0 if self.codec == "raw" else 0.0004]),
            kv_bytes_per_token=64.0,
            stats_bytes_per_token=0.0,
            compiles=1,
            wall_s=0.0,
            placement=None,
            implementation="induction",
            implementation_reason="asked for",
            decoded_tokens=sum(len(s) - 1 for s in sequences),
        )


def make_tokenizer() -> Tokenizer:
    """Of 280 tokens, made from TEXT; <bos> is 0."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=["<bos>"], show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def make_model():
    """What `alisa_jax.load` gives, as far as the scripts look into it."""
    tokenizer = make_tokenizer()
    decoder = SimpleNamespace(config=SimpleNamespace(vocab_size=tokenizer.get_vocab_size()))

    def encode(text):
        return [0, *tokenizer.encode(text, add_special_tokens=False).ids]

    return SimpleNamespace(tokenizer=tokenizer, bos_id=0, eos_ids=(), name="tiny", decoder=decoder, encode=encode)


def write_inputs(folder, max_positions: int) -> list[str]:
    """A model folder and a text in `folder`; returns the flags that name them."""
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps({"max_position_embeddings": max_positions}))
    (folder / "tiny" / "model.safetensors").write_bytes(b"weights")
    (folder / "text.txt").write_text(TEXT)
    return [f"--model={folder / 'tiny'}", f"--text={folder / 'text.txt'}"]
