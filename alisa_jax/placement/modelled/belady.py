"""Belady's oracle: the fewest rows that any placement must load, given what each step attends.

Where rows have to go, the oracle lets go of those whose next use is farthest (Belady, IBM Systems
Journal 5(2), 1966). It knows the future, and no controller does: it is a lower bound beside what
they load.

A row is one token of one layer and sequence. Each rule is as weak as it can be, so that no
placement that holds as many rows, the capacity, does better:

    prompt      behind it the device holds any of its rows, up to the capacity
    wanted      all rows that a step wants are on the device together
    own token   a step writes it on the device, for free; it needs no room while the step runs, and
                is kept within the capacity or let go behind it
    let go      free, as every row is on the host as well
    load        a row that is wanted and not on the device costs one, be it copied or recomputed

From one use to the next a row is kept, or loaded once. At each step the capacity less what is
wanted is room for rows that are kept meanwhile. The most are kept where, at each step that has too
many, those that are used last go.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alisa_jax.placement.plan import PAGE_TOKENS, Layout, Setting


def held_rows(setting: Setting, layout: Layout, heads: int = 1) -> int:
    """Rows of one layer and sequence that the device has room for under `layout`.

    They are slots of the working set, which each of `heads` selection heads fills by itself, and
    rows of the ring. A sequence that stays whole needs no bound: nothing of it is loaded.
    """
    return setting.slots * heads + PAGE_TOKENS * layout.kept_pages


def least_rows(wanted: Sequence[Sequence[int]], prompt_tokens: int, capacity: int) -> int:
    """The rows that the oracle loads for one layer and sequence.

    wanted[i]: the positions, ascending, that step i + 1 attends besides its own token, which is at
    position prompt_tokens + i. capacity: rows that the device holds at once, as of `held_rows`.
    Raises ValueError where a step wants a token that is not there yet, or more than `capacity`.
    """
    steps = len(wanted)
    last = np.zeros(prompt_tokens + steps, np.int64)  # the step that used or wrote a token
    last[prompt_tokens:] = np.arange(1, steps + 1)
    begins, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for step, positions in enumerate(wanted, 1):
        rows = np.asarray(positions, np.int64)
        _check(rows, step, prompt_tokens + step - 1, capacity)
        before = last[rows]
        begins.append(before[before < step - 1])
        ends.append(np.full(len(begins[-1]), step))
        last[rows] = step
    rooms = [capacity - len(positions) for positions in wanted]
    return _lost(np.concatenate(begins), np.concatenate(ends), rooms)


def _lost(begins: np.ndarray, ends: np.ndarray, rooms: Sequence[int]) -> int:
    """How many intervals must go so that at each step no more are open than there is room for.

    An interval is open at the steps between `begins` and `ends`; step i + 1 has room for rooms[i].
    """
    order = np.argsort(begins, kind="stable")
    starts = np.searchsorted(begins[order], np.arange(len(rooms) + 1))
    ends = ends[order]
    closing = np.zeros(len(rooms) + 1, np.int64)  # how many of those that are open end at each step
    held = 0
    lost = 0
    for step, room in enumerate(rooms, 1):
        opened = ends[starts[step - 1] : starts[step]]
        np.add.at(closing, opened, 1)
        held += len(opened) - int(closing[step])
        if held > room:
            farthest = closing[:step:-1]
            farthest -= np.diff(np.minimum(np.cumsum(farthest), held - room), prepend=0)
            lost += held - room
            held = room
    return lost


def _check(rows: np.ndarray, step: int, tokens: int, capacity: int) -> None:
    if len(rows) > capacity:
        raise ValueError(
            f"step {step} wants {len(rows)} rows together, and the device holds {capacity}"
        )
    if (np.diff(rows) <= 0).any():
        raise ValueError(f"step {step} wants positions that do not ascend")
    if len(rows) and not 0 <= rows[0] <= rows[-1] < tokens:
        raise ValueError(
            f"step {step} wants positions {rows[0]} to {rows[-1]}, and there are {tokens} tokens "
            "before its own"
        )
