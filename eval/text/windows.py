"""Text to windows: which tokens a window holds, which it scores, and how many bytes and words those are.

A window is a sequence of at most `context` tokens; it starts with the model's BOS token where there is one,
and runs alone from an empty cache. Windows start every `stride` tokens of the text until one reaches its end
(the last may be shorter), and a window scores only the tokens that no earlier window has scored. So each
token of the text is scored once, with three exceptions that the count `n` of a record shows: the first token
where there is no BOS, and, at `stride == context`, one token at each border, which nothing in its window
precedes or which no window holds.

Bytes are UTF-8 bytes and words are runs of non-whitespace. Both follow the tokenizer's offsets: a token owns
the characters between the end of the token before and its own end, and the words that begin there. A
character that is spread over several tokens belongs to the first of them, and the text is never cut inside
one.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from eval.script.common import UserError

BUNDLED = "bundled:heldout"
DOCUMENT_END = "<|endoftext|>"


@dataclass(frozen=True)
class Window:
    """Text tokens [start, stop) are fed, after BOS where there is one; [score, stop) are scored."""

    start: int
    score: int
    stop: int


@dataclass(frozen=True)
class Source:
    """A text as read: its name without folders, its SHA-256 in hexadecimal digits, and its characters."""

    name: str
    sha256: str
    characters: str

    @property
    def fields(self) -> dict:
        """What identifies the windows of `sample` in a record."""
        cut = {"windows_of": "documents"} if DOCUMENT_END in self.characters else {}
        return {"data": self.name, "data_sha256": self.sha256, **cut}


@dataclass(frozen=True)
class Text:
    """A tokenised text; counts are per token, so any run of tokens knows its own size."""

    tokens: np.ndarray  # [n] int32
    byte_count: np.ndarray  # [n] int64
    word_count: np.ndarray  # [n] int64


def read(path: str) -> Source:
    """Read a UTF-8 file or `bundled:heldout`; raises UserError for a missing, empty or non-UTF-8 file.

    A byte-order mark is no text. The hash is that of the file's bytes; for `bundled:heldout` it is the one the training
    record names.
    """
    if path == BUNDLED:
        from eval.text import episodes

        corpus = episodes.corpus()
        return Source("stdlib-heldout", corpus.heldout_sha256, "".join(text for _, text in corpus.heldout))
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the text {path!r}: {error.strerror}") from None
    try:
        characters = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the text {path!r} is not UTF-8: byte {error.start} cannot be decoded") from None
    if not characters.strip():
        raise UserError(f"the text {path!r} is empty")
    return Source(Path(path).name, hashlib.sha256(data).hexdigest(), characters)


def without_bos(characters: str, tokenizer) -> str:
    """The text without the BOS that it begins with, where the tokenizer puts one before every text: windows have it."""
    from alisa_jax.models import tokenizer as text_side

    before, _ = text_side.around(tokenizer)
    return characters.removeprefix(tokenizer.id_to_token(before[0])) if before else characters


def tokenize(characters: str, tokenizer, max_tokens: int | None = None) -> Text:
    """Encode without special tokens, keep at most the first `max_tokens`, cut back to a whole character."""
    characters = without_bos(characters, tokenizer)
    encoding = tokenizer.encode(characters, add_special_tokens=False)
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(offsets[:, 1])
    keep = len(ends)
    if max_tokens is not None and max_tokens < keep:
        keep = max_tokens
        while keep and offsets[keep, 0] < ends[keep - 1]:
            keep -= 1
    elif keep:
        ends[-1] = len(characters)  # what a normaliser dropped at the end belongs to the last token
    edges = np.concatenate([np.zeros(1, np.int64), ends])
    code_points = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
    widths = 1 + (code_points > 0x7F).astype(np.int64) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    byte_at = np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])
    word_starts = np.asarray([m.start() for m in re.finditer(r"\S+", characters)], np.int64)
    return Text(
        tokens=np.asarray(encoding.ids, np.int32)[:keep],
        byte_count=np.diff(byte_at[edges])[:keep],
        word_count=np.diff(np.searchsorted(word_starts, edges))[:keep],
    )


def plan(n_tokens: int, context: int, stride: int, bos: bool) -> list[Window]:
    """The windows of a text of `n_tokens`. Raises UserError where the text has no whole window."""
    body = context - bos  # text tokens of a full window
    if context < 2 or not 1 <= stride <= context:
        raise UserError(f"stride must be in 1..context and context at least 2, got stride={stride}, context={context}")
    if n_tokens < body:
        raise UserError(f"the text has {n_tokens} tokens, less than the {body} of one window with context={context}")
    windows, start, scored = [], 0, 0
    while True:
        stop = min(start + body, n_tokens)
        score = max(start + (not bos), scored)
        if score < stop:
            windows.append(Window(start, score, stop))
        if stop == n_tokens:
            return windows
        start, scored = start + stride, stop


def spread(windows: Sequence, count: int) -> list:
    """`count` of the windows, or of whatever else, at equal distances, so that a small sample sees the whole text."""
    return [windows[i] for i in np.unique(np.linspace(0, len(windows) - 1, count).round().astype(int))]


def sample(source: Source, tokenizer, context: int, stride: int, count: int, bos: bool) -> tuple[Text, list[Window]]:
    """A text and at most `count` whole windows, spread evenly over it.

    Where the text has document ends, each window is the beginning of another document that fills it, and the text
    is these documents: a window with a piece of one story and a piece of the next is neither. Raises UserError as `plan`.
    """
    documents = [without_bos(document.strip(), tokenizer) for document in source.characters.split(DOCUMENT_END)]
    if len(documents) == 1:
        text = tokenize(source.characters, tokenizer)
        windows = plan(len(text.tokens), context, stride, bos)
        return text, spread([w for w in windows if w.stop - w.start == windows[0].stop - windows[0].start], count)
    body = context - bos
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    fitting = [d for d, e in zip(documents, encoded, strict=True) if len(e.ids) >= body]
    if not fitting:
        raise UserError(f"none of the {len(documents)} documents of {source.name} has the {body} tokens of a window")
    texts = [tokenize(document, tokenizer) for document in spread(fitting, count)]
    starts = np.cumsum([0, *(len(text.tokens) for text in texts[:-1])]).tolist()
    joined = Text(*(np.concatenate([getattr(text, f.name) for text in texts]) for f in fields(Text)))
    return joined, [Window(start, start + (not bos), start + body) for start in starts]


def sequence(text: Text, window: Window, bos_id: int | None) -> list[int]:
    """The token ids to feed for one window."""
    body = text.tokens[window.start : window.stop].tolist()
    return body if bos_id is None else [int(bos_id), *body]
