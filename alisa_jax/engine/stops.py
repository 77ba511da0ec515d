"""New text, token by token: what is final, what may be shown, and where a stop string ends it.

The text of a token depends on its neighbours: a character may be spread over several tokens, and
the first token of a text may lose its leading space. So the text of the new tokens is that of
prompt and new tokens together behind what it shares with the text of the prompt. It is read from a
short window of tokens that always begins with some text that is final, so a token costs the same
however long the sequence is.

Special tokens are no text, but a stop string may hold some, such as "<|im_end|>". They are marks
between characters of the text, and stop strings are searched for in the text with its marks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

HOLE = "\ufffd"  # what bytes that are no whole character read as
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Completion:
    """The text of one sequence's new tokens, cut before the first stop string.

    decode: token ids to text. prompt: token ids. stop: the stop strings, as `check_stops` gives
    them. run: see `byte_runs`. special: see `special_in`.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt: Sequence[int],
        stop=(),
        run=lambda token, before: False,
        special: Mapping[int, str] = MappingProxyType({}),
    ):
        self._decode = decode
        self._stop = stop
        self._run = run
        self._special = special
        self._marks: list[tuple[int, str]] = []  # characters before a special token, and its text
        self._open = False  # the tokens end in a run of bytes
        self._ids = list(prompt)
        # ids[start:border] precede what is not final yet
        self._start, self._border = 0, len(self._ids)
        self._base = decode(self._ids)
        self._final = ""  # text that later tokens cannot change
        self._shown = 0  # characters that `show` has given
        self.stopped = False  # a stop string is complete

    def push(self, token: int) -> bool:
        """Take in one more token; True when it completes a stop string: push none after that."""
        searched = len(self._final)
        self._ids.append(token)
        text = self._rest()
        self._open = self._run(token, self._open)
        if not text.endswith(HOLE) and not self._open:
            self._settle(text)
            now = self._final
        else:
            now = self._final + text.rstrip(HOLE)
        if token in self._special:
            self._marks.append((len(now), self._special[token]))
        ends = [i for s in self._stop if (i := self._find(now, s, searched)) is not None]
        if ends:
            self._final, self.stopped = now[: min(ends)], True
        return self.stopped

    def show(self) -> str:
        """The text that is new since the last call and that no further token can take back."""
        upto = len(self._final)
        if not self.stopped:
            marked, place = self._marked(self._final)
            most = max((held(marked, s) for s in self._stop), default=0)
            upto = place(len(marked) - most)
        piece = self._final[self._shown : upto]
        self._shown = max(self._shown, upto)
        return piece

    def end(self) -> str:
        """All of the text; what was held back is final now, and the next `show` gives it."""
        if not self.stopped:
            self._settle(self._rest())
            self.stopped = True
        return self._final

    def _find(self, text: str, stop: str, searched: int) -> int | None:
        """Where `stop` begins in `text`, of which no stop string ends before `searched`."""
        if not self._marks:
            at = text.find(stop, max(0, searched - len(stop) + 1))
            return at if at >= 0 else None
        marked, place = self._marked(text)
        at = marked.find(stop)
        return place(at) if at >= 0 else None

    def _marked(self, text: str) -> tuple[str, Callable[[int], int]]:
        """`text` with its marks, and the function from a place in it to that in `text`."""
        pieces, start = [], 0
        borders = []  # of each mark: where it begins, and where it ends, in the marked text
        for place, mark in self._marks:
            pieces += [text[start:place], mark]
            start = place
            end = sum(map(len, pieces))
            borders.append((end - len(mark), end))

        def of(at: int) -> int:
            return at - sum(min(at, end) - begin for begin, end in borders if begin < at)

        return "".join([*pieces, text[start:]]), of

    def _rest(self) -> str:
        """Text behind what is final."""
        return behind(self._base, self._decode(self._ids[self._start :]))

    def _settle(self, text: str) -> None:
        self._final += text
        if text:  # else special tokens alone: a window without text would lose a leading space
            self._start, self._border = self._border, len(self._ids)
            self._base = self._decode(self._ids[self._start :])


def behind(base: str, text: str) -> str:
    """`text` behind `base`, or behind what both share where `base` ends inside a character."""
    shared = (
        len(base)
        if text.startswith(base)
        else sum(itertools.takewhile(bool, map(str.__eq__, base, text)))
    )
    return text[shared:]


def held(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning, and not all, of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings as a tuple without repeats. Raises ValueError for what cannot be one."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for s in stops:
        if not isinstance(s, str) or not s:
            raise ValueError(f"a stop string is a text of at least one character; got {s!r}")
        if HOLE in s:
            raise ValueError(
                "a stop string cannot hold U+FFFD, which stands for bytes that are no text; got "
                f"{s!r}"
            )
    return tuple(dict.fromkeys(stops))


def special_in(tokenizer, stop: Sequence[str]) -> dict[int, str]:
    """Ids and texts of the special tokens that one of the stop strings holds."""
    return {
        i: token.content
        for i, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and any(token.content in s for s in stop)
    }


def byte_runs(tokenizer) -> Callable[[int, bool], bool]:
    """run(token, before): whether the tokens up to `token` end in a run of bytes.

    before: whether those before it do. Vocabularies with byte fallback (SentencePiece) have tokens
    such as <0x0A>. A run of them is decoded as a whole, so the text of its first bytes is final
    only when the run has ended; special tokens are no text and do not end it.
    """
    special = frozenset(
        i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
    )

    def run(token: int, before: bool) -> bool:
        return (
            before
            if token in special
            else _BYTE.fullmatch(tokenizer.id_to_token(token) or "") is not None
        )

    return run
