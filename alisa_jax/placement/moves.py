"""From where tokens should be to the rows that a plan lists: what offloading controllers share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from alisa_jax.placement.plan import (
    ALL,
    PAGE_TOKENS,
    Layout,
    Positions,
    Rows,
    Setting,
    Span,
    Tier,
    View,
)


def full_pages(tokens: int) -> int:
    """`tokens` rounded down to whole pages."""
    return tokens // PAGE_TOKENS * PAGE_TOKENS


def moves_between(view: View, spans: Sequence[Span]) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    """(store, drop): the rows that take the tokens from `view.spans` to `spans`.

    What is deleted without having been on the host goes from the device straight to nowhere.
    """
    store, drop = {}, {}
    pairs = list(zip(view.spans, spans))
    for old, new in set(pairs):  # most sequences are alike
        store[old, new] = ((max(old.host, new.dropped), new.host, Tier.DEVICE, Tier.HOST),)
        drop[old, new] = (
            (old.dropped, min(new.dropped, old.host), Tier.HOST, Tier.NOWHERE),
            (max(old.dropped, old.host), new.dropped, Tier.DEVICE, Tier.NOWHERE),
        )
    return _folded([store[pair] for pair in pairs]), _folded([drop[pair] for pair in pairs])


def fetch(
    view: View, spans: Sequence[Span], wanted: Positions | None
) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    """(load, recompute) of the `wanted` positions that are off the device.

    None: of all tokens, a layer at a time. A deleted token is recomputed by a prefill of the prefix
    that ends with it, through all layers.
    """
    if wanted is None:
        load = [((s.dropped, s.host, Tier.HOST, Tier.STAGING),) for s in spans]
        again = [((0, s.dropped, Tier.NOWHERE, Tier.STAGING),) for s in spans]
        return _folded(load), _folded(again)
    load, prefix = [], [0] * len(spans)
    alike = len(set(spans)) == 1
    target = Tier.STAGING if view.setting.chosen else Tier.WORKING
    for (layer, sequence, *head), positions in wanted.items():
        sequences = range(len(spans)) if sequence == ALL else (sequence,)
        for one in sequences[:1] if alike else sequences:
            name = sequence if alike else one
            away = positions[: bisect_left(positions, min(spans[one].host, view.lengths[one]))]
            lost = bisect_left(away, spans[one].dropped)
            load += [
                Rows(start, stop, Tier.HOST, target, layer, name, *head)
                for start, stop in runs(away[lost:])
            ]
            for b in sequences if alike else (one,):
                prefix[b] = max(prefix[b], away[lost - 1] + 1 if lost else 0)
    return tuple(load), _folded([((0, stop, Tier.NOWHERE, Tier.WORKING),) for stop in prefix])


def runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending positions as ranges (start, stop)."""
    start = stop = positions[0] if positions else 0
    for p in positions:
        if p != stop:
            yield start, stop
            start = p
        stop = p + 1
    if positions:
        yield start, stop


def refuse_store(name: str, setting: Setting) -> None:
    """Raise ValueError when the policy keeps nothing that could be offloaded."""
    if setting.evicts:
        raise ValueError(
            f"{name} keeps tokens on the host until they are wanted, and the policy evicts what "
            "it does not keep: give a policy that selects (dense, swa), or the controller "
            "resident or waves"
        )


def refuse_device(name: str, setting: Setting, least: float, budget: float | None = None) -> None:
    """Raise ValueError when the device budget is below `least` bytes."""
    budget = setting.device_kv_bytes if budget is None else budget
    if least > budget:
        raise ValueError(
            f"{name} needs device_kv_bytes of at least {_ceil(least)} here; got {int(budget)}"
        )


def refuse_host(name: str, setting: Setting, least: float) -> None:
    """Raise ValueError when the host budget is below `least` bytes."""
    if least > setting.host_kv_bytes:
        raise ValueError(
            f"{name} needs host_kv_bytes of at least {_ceil(least)} here; got "
            f"{int(setting.host_kv_bytes)}"
        )


def host_bytes(setting: Setting, spans: Iterable[Span]) -> float:
    """Bytes of the host pages."""
    return (
        setting.layers
        * setting.page_bytes
        * sum((s.host - s.dropped) // PAGE_TOKENS for s in spans)
    )


def device_bytes(setting: Setting, layout: Layout, ahead: int) -> float:
    """Device bytes of a run, the same from its first step to its last.

    They are what is fixed, the store as laid out, and staging for sequences that are not whole.
    """
    stay, away = layout.whole, setting.batch - layout.whole
    rings = setting.layers * setting.page_bytes * away * layout.kept_pages
    staging = setting.staging_bytes(ahead, slice(stay, None))
    return setting.fixed_bytes + setting.store_bytes(setting.final_tokens[:stay]) + rings + staging


def largest(fits: Callable[[int], bool], stop: int) -> int:
    """The largest n in 0 .. stop with `fits(n)`, where `fits` holds up to some n; 0 always fits."""
    low, high = 0, stop
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _folded(by_sequence: Sequence[Iterable[tuple]]) -> tuple[Rows, ...]:
    """(start, stop, source, target) of each sequence as rows, without the empty ones.

    Where all sequences are alike, one row stands for ALL.
    """
    given = list(map(tuple, by_sequence))
    kept = {ranges: tuple(one for one in ranges if one[0] < one[1]) for ranges in set(given)}
    if len(set(kept.values())) == 1:
        return tuple(Rows(*one) for one in kept[given[0]])
    return tuple(Rows(*one, sequence=b) for b, ranges in enumerate(given) for one in kept[ranges])


def _ceil(number: float) -> int:
    return -int(-number // 1)
