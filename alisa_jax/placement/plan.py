"""What a controller knows and what it answers: numbers in, a plan out; nothing here holds an array.

Tokens are numbered by position. Step 0 is the prefill, which writes the prompt; step j > 0 reads
what is cached and writes one token more, so that s + j tokens are cached after it (s the prompt),
and the last of n new tokens is made by step n - 1. Where the K and V of a token are:

    DEVICE     the newest tokens: rows of the store, in pages of 16 tokens per layer and sequence
    WORKING    slots of the working set, on the device: copies of the rows that a policy selects
    STAGING    device memory that holds the rows of one layer until its attention is done
    HOST       immutable pages of 16 tokens per layer and sequence; only full pages go there
    NOWHERE    deleted, or not yet computed

Arrays on the device are rectangular and made once, as large as the run ends: a sequence has room
for as many pages as the longest one beside it, and bytes count that room.

A step obeys its plan in the order store, drop, load, recompute, then attends, then writes its
token; only the prefill writes first, a layer at a time, and a layer's rows leave before the next
layer runs. A store moves rows (the device pages are free afterwards), a load copies them, a drop
deletes them.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

ALL = -1  # every layer, sequence or head
PAGE_TOKENS = 16
POSITION_BYTES = 4


class Tier(enum.StrEnum):
    """A place for rows, see the table above."""

    DEVICE = "device"
    WORKING = "working"
    STAGING = "staging"
    HOST = "host"
    NOWHERE = "nowhere"


class Rows(NamedTuple):
    """Positions start .. stop - 1 of (layer | ALL, sequence | ALL, head | ALL), from tier to tier.

    Positions beyond a sequence's length are ignored.
    """

    start: int
    stop: int
    source: Tier
    target: Tier
    layer: int = ALL
    sequence: int = ALL
    head: int = ALL


@dataclass(frozen=True)
class Plan:
    """What to move at one step, in the order of the fields.

    ahead: layers whose loads are in flight while one computes (the layer-at-a-time driver); 0:
    loads come first. lag: 1 where the loads were chosen a step earlier, so that they hide behind
    that step. notes: sentences for the reader, such as a clamped deletion.
    """

    store: tuple[Rows, ...] = ()
    drop: tuple[Rows, ...] = ()
    load: tuple[Rows, ...] = ()
    recompute: tuple[Rows, ...] = ()
    ahead: int = 0
    lag: int = 0
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing moves: the engine may run on without asking."""
        return not (self.store or self.drop or self.load or self.recompute)


class Span(NamedTuple):
    """Where a sequence's tokens are: [0, dropped) NOWHERE, [dropped, host) HOST, then DEVICE."""

    dropped: int = 0
    host: int = 0


class Layout(NamedTuple):
    """How the store lies on the device for a whole run.

    whole: the first `whole` sequences keep every token there, in room for the longest of them at
    its end. kept_pages: each other sequence keeps a ring of so many pages per layer, its newest
    tokens; 0 where all are whole, and only there. The row of a token is its position modulo
    16 kept_pages, so a token must have been stored before the one 16 kept_pages later is written.
    """

    whole: int
    kept_pages: int


@dataclass(frozen=True)
class Setting:
    """What is known of a run before it starts.

    prompt_tokens: one length per sequence. token_bytes: K and V of one token in one layer and one
    home. slots: slots of the working set per layer and sequence; 0 where attention reads the store
    itself. sequence_bytes, stats_bytes: further device bytes of one sequence over all layers:
    constants of the codec, and statistics of the policy. device_kv_bytes, host_kv_bytes: budgets
    for everything that a cache keeps there. selects: a policy chooses tokens; evicts: what it does
    not choose is gone; refreshes: it attends all at times. stays: why no token can leave the
    device, in one sentence; "" where they can. gather: single rows can be read from host pages;
    False: whole pages travel. chosen: where the query itself chooses, layer by layer, the most
    tokens that it attends, its own included; else 0. heads: kv heads that then choose each for
    itself, so that a row on the link is that of one head.

    Raises ValueError where a number is out of its range.
    """

    layers: int
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    token_bytes: float
    device_kv_bytes: float
    host_kv_bytes: float = math.inf
    slots: int = 0
    sequence_bytes: float = 0.0
    stats_bytes: float = 0.0
    selects: bool = False
    evicts: bool = False
    refreshes: bool = False
    stays: str = ""
    gather: bool = True
    chosen: int = 0
    heads: int = 1

    def __post_init__(self):
        for name in ("layers", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.prompt_tokens or min(self.prompt_tokens) < 1:
            raise ValueError(
                "prompt_tokens needs one length of at least 1 per sequence; got "
                f"{self.prompt_tokens}"
            )
        if not self.token_bytes > 0:
            raise ValueError(f"token_bytes must be above 0; got {self.token_bytes}")

    @property
    def batch(self) -> int:
        return len(self.prompt_tokens)

    @property
    def final_tokens(self) -> tuple[int, ...]:
        """Tokens of each sequence that are cached at the end; the last new one is not."""
        return tuple(s + self.new_tokens - 1 for s in self.prompt_tokens)

    @property
    def page_bytes(self) -> float:
        """A page of one layer and sequence."""
        return PAGE_TOKENS * self.token_bytes

    @property
    def fixed_bytes(self) -> float:
        """Device bytes that placement leaves alone: working set, codec constants, statistics."""
        slots = self.layers * self.slots * self.token_bytes
        return self.batch * (slots + self.sequence_bytes + self.stats_bytes)

    @property
    def ahead(self) -> int:
        """Layers in flight where a controller fetches ahead: rows of a set come before a step."""
        return int(self.chosen > 0 or not self.selects)

    def store_bytes(self, tokens: Iterable[int]) -> float:
        """Bytes of the store for sequences of `tokens` tokens, all layers; 0 where there is none.

        The array is rectangular: each sequence has the pages of the longest.
        """
        tokens = tuple(tokens)
        return (
            0.0
            if self.evicts
            else self.layers * self.page_bytes * len(tokens) * pages(max(tokens, default=0))
        )

    def staging_bytes(self, ahead: int, sequences: slice = slice(None)) -> float:
        """Device bytes that offloading `sequences` needs for rows on their way.

        Dense: a layer of the final context and `ahead` more, and one more where streamed rows are
        laid out anew, because sequences are not equally long or there are many pages. Selecting: a
        page for each layer and sequence (more rows than that travel in rounds), and the prompt of
        the layer in flight, or all tokens of a layer that refreshes. Chosen by the query: that
        page, and the larger of such a prompt and the chosen rows, with their positions, of a layer
        and of `ahead` more. Every sequence counts as many pages as the longest of them.
        """
        prompts = self.prompt_tokens[sequences]
        longest = max(prompts, default=0)
        if not self.selects:
            # 64 pages: from there on `stream_pages` rounds up
            widened = len(set(prompts)) > 1 or pages(longest + self.new_tokens - 1) > 64
            return (
                (ahead + 1 + widened)
                * self.page_bytes
                * len(prompts)
                * pages(longest + self.new_tokens - 1)
            )
        rows = (ahead + 1) * self.chosen * (self.token_bytes + POSITION_BYTES * self.heads)
        whole = self.page_bytes * pages(longest + (self.new_tokens - 1) * self.refreshes)
        return len(prompts) * (self.page_bytes * self.layers + max(whole, rows))

    def part(self, first: int, stop: int) -> Setting:
        """The same run for sequences first .. stop - 1."""
        return dataclasses.replace(self, prompt_tokens=self.prompt_tokens[first:stop])


# (layer | ALL, sequence | ALL), or these and a head, to positions, ascending
Positions = Mapping[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class View:
    """What a controller may know at a step.

    lengths: tokens of each sequence that are cached; at step 0 none. new: tokens that this step
    writes; at step 0 the prompts. spans: where they are before the step. wanted: what this step
    attends besides its own token; None: everything. entering: of these, what the working set does
    not hold yet; empty at step 1, because the prefill seeds the set. Where the query chooses, a
    step asks for each layer by itself, there is no such set, and the two are the same.
    """

    setting: Setting
    step: int
    lengths: tuple[int, ...]
    new: tuple[int, ...]
    spans: tuple[Span, ...]
    wanted: Positions | None = None
    entering: Positions | None = None

    @property
    def after(self) -> tuple[int, ...]:
        """Tokens of each sequence after this step."""
        return tuple(a + b for a, b in zip(self.lengths, self.new))


class Controller:
    """Base of all controllers: frozen dataclasses whose `decide` is a pure function of the view.

    offloads: it needs a store to offload. reads_wanted: once something is off the device, the plan
    of a step of a run that selects depends on `view.wanted`; False: on lengths, spans and
    `view.entering` alone. (A dense run has no `wanted`: every step moves everything.)
    """

    offloads: ClassVar[bool] = True

    @property
    def reads_wanted(self) -> bool:
        return False

    def check(self, setting: Setting) -> None:
        """Raise ValueError, naming the least value that would do, if `setting` cannot be run."""
        raise NotImplementedError

    def groups(self, setting: Setting) -> tuple[Setting, ...]:
        """The runs that the batch is split into, one after another."""
        return (setting,)

    def layout(self, setting: Setting) -> Layout:
        """How the store of one of the `groups` lies on the device, from its first step to its last.

        Read it where `check` accepts the setting.
        """
        raise NotImplementedError

    def decide(self, view: View) -> Plan:
        """The plan of one step."""
        raise NotImplementedError

    def spans(self, view: View) -> tuple[Span, ...]:
        """Where everything is after the step's stores and drops."""
        return view.spans


def pages(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


def stream_pages(number: int, most: int) -> int:
    """Room in pages for `number` streamed ones, at most `most`.

    Rounded up by less than a 32nd where there are many, so that long runs meet few sizes.
    """
    step = 1 << max(0, number.bit_length() - 6)
    return min(most, -(-number // step) * step)


def views(setting: Setting):
    """(step, lengths, new) of every step of a run."""
    yield 0, (0,) * setting.batch, setting.prompt_tokens
    for step in range(1, setting.new_tokens):
        yield step, tuple(s + step - 1 for s in setting.prompt_tokens), (1,) * setting.batch


def moved_bytes(rows: Iterable[Rows], setting: Setting, lengths: tuple[int, ...]) -> float:
    """Bytes that `rows` are on the link, where sequences have `lengths` tokens.

    Stores are whole pages. Loads are rows where the setting gathers, those of one head a share of
    them; else whole pages, each once.
    """
    if setting.gather:
        rows = tuple(rows)
        single = count_rows((row for row in rows if row.head != ALL), setting, lengths)
        whole = count_rows(rows, setting, lengths) - single
        return setting.token_bytes * whole + setting.token_bytes / setting.heads * single
    touched: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        for sequence, length in enumerate(lengths):
            stop = min(row.stop, length)
            if row.sequence in (ALL, sequence) and row.start < stop:
                touched.setdefault((row.layer, sequence), set()).update(
                    range(row.start // PAGE_TOKENS, pages(stop))
                )
    total = 0
    for (layer, sequence), ids in touched.items():
        beside = touched.get((ALL, sequence), set()) if layer != ALL else set()
        total += (setting.layers if layer == ALL else 1) * len(ids - beside)
    return total * setting.page_bytes


def count_rows(rows: Iterable[Rows], setting: Setting, lengths: tuple[int, ...]) -> int:
    """Tokens that `rows` name, in each layer anew, where sequences have `lengths` tokens."""
    return sum(
        _layers(row, setting) * sum(max(0, min(row.stop, n) - row.start) for n in _of(row, lengths))
        for row in rows
    )


def _layers(row: Rows, setting: Setting) -> int:
    return setting.layers if row.layer == ALL else 1


def _of(row: Rows, lengths: tuple[int, ...]) -> tuple[int, ...]:
    return lengths if row.sequence == ALL else (lengths[row.sequence],)
