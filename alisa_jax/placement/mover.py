"""Rows between device memory and pinned host memory: the only module that chooses a memory kind.

On the host there are pages: 16 tokens of one layer and of one group of sequences whose prompts are
equally long (a group fills, loses and wants its pages together; ragged batches have many groups). A
page is a tuple of arrays, those that K and then V are made of in the codec, in pinned memory,
written once and never changed; it is freed whole. Layout "tokens" is [n, 16, K, *], for rows that
are wanted one by one; "slots" is [n, K, 16, *], for pages that are streamed.

Reads take what `self_test` found to work: `rows`, where the host's memory can be read in place and
only the wanted rows travel; else `pages`, which travel whole. Bytes are counted as the sizes of the
arrays that travel, without the zeros that fill up what is streamed by `rows`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from alisa_jax.placement.plan import PAGE_TOKENS
from alisa_jax.placement.staging import Staging

Leaves = tuple[jax.Array, ...]
Reads = Literal["rows", "pages"]
HOST_KIND = "pinned_host"


class HostReport(NamedTuple):
    """What works here: memory kinds of the device, and how host pages are read."""

    kinds: tuple[str, ...]
    reads: Reads


def self_test() -> HostReport:
    """Send pages of every element type to the host and back, and compare bits.

    Raises RuntimeError where there is no pinned host memory or a page comes back changed.
    """
    device = jax.devices()[0]
    kinds = tuple(sorted(memory.kind for memory in device.addressable_memories()))
    if HOST_KIND not in kinds:
        raise RuntimeError(
            f"{device} has no {HOST_KIND} memory, only {', '.join(kinds)}: use the controller "
            "resident"
        )
    in_place = True
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8):
        bits = np.random.default_rng(0).integers(
            0, 256, 3 * PAGE_TOKENS * 2 * 8 * jnp.dtype(dtype).itemsize, np.uint8
        )
        page = jnp.asarray(bits.view(jnp.dtype(dtype)).reshape(3, PAGE_TOKENS, 2, 8))
        there = jax.device_put(page, _place(HOST_KIND))
        back = jax.device_put(there, _place("device"))
        if there.sharding.memory_kind != HOST_KIND or _bits(back) != bits.tobytes():
            raise RuntimeError(
                f"a {jnp.dtype(dtype).name} page did not come back from {HOST_KIND} memory as it "
                "went"
            )
        in_place &= _in_place(there) and _bits(there) == bits.tobytes()
    return HostReport(kinds, "rows" if in_place else "pages")


class Meter:
    """Live bytes on both sides, their peaks, and what travelled; RuntimeError beyond a budget."""

    def __init__(self, device_kv_bytes: float, host_kv_bytes: float):
        self.budgets = {"device": device_kv_bytes, "host": host_kv_bytes}
        self.live = {"device": 0, "host": 0}
        self.peak = {"device": 0, "host": 0}
        self.load_bytes = self.store_bytes = 0
        self.loaded_rows = self.stored_rows = self.recomputed_rows = self.recomputed_tokens = 0

    def hold(self, side: str, more: int) -> None:
        """`more` bytes are live on `side`, fewer where it is negative."""
        self.live[side] += more
        self.peak[side] = max(self.peak[side], self.live[side])
        if self.live[side] > self.budgets[side]:
            raise RuntimeError(
                f"{self.live[side]} KV bytes on the {side}, whose budget is "
                f"{self.budgets[side]:.0f}"
            )


class Mover:
    """The host pages of one run.

    groups: sequences of the away part, counted from its first. layout: "tokens" or "slots".
    """

    def __init__(self, groups: Sequence[Sequence[int]], layout: str, reads: Reads, meter: Meter):
        self.groups = groups
        self.layout = layout
        self.reads = reads
        self.meter = meter
        self.of = {b: (g, j) for g, members in enumerate(groups) for j, b in enumerate(members)}
        self.pages: dict[tuple[int, int, int], Leaves] = {}  # (layer, group, page)
        # the same memory, of pages that were read
        self.views: dict[tuple[int, int, int], tuple[np.ndarray, ...]] = {}
        self.staging = Staging()

    def store(self, pages: Iterable[tuple[int, int, int, Leaves]]) -> None:
        """Send (layer, group, page, leaves) to the host, all in one transfer, without waiting."""
        pages = list(pages)
        sent = jax.device_put([leaves for *_, leaves in pages], _place(HOST_KIND))
        for (layer, group, page, _), leaves in zip(pages, sent, strict=True):
            if (layer, group, page) in self.pages:
                raise RuntimeError(
                    f"page {page} of layer {layer}, group {group} is already on the host"
                )
            self.pages[layer, group, page] = leaves
            size = _size(leaves)
            self.meter.store_bytes += size
            self.meter.stored_rows += PAGE_TOKENS * len(self.groups[group])
            self.meter.hold("host", size)

    def drop(self, layers: int, group: int, page: int) -> None:
        """Delete a page of all layers."""
        for layer in range(layers):
            self.views.pop((layer, group, page), None)
            self.meter.hold("host", -_size(self.pages.pop((layer, group, page))))

    def fetch(
        self, layer: np.ndarray, sequence: np.ndarray, pos: np.ndarray
    ) -> list[tuple[Leaves, np.ndarray]]:
        """Send rows of `layer`, `sequence`, `pos` [n] to the device, all in one transfer.

        The transfer is not waited for. Returns pieces: leaves [R, K, *], and for each of their rows
        its index below n, or -1. Layout "tokens" only.
        """
        self.meter.loaded_rows += len(pos)
        return (self._fetch_rows if self.reads == "rows" else self._fetch_pages)(
            *self._touched(layer, sequence, pos)
        )

    def gather(self, layer: int, pos: np.ndarray) -> Leaves:
        """Send rows of single heads of a layer: leaves [B, K, M, *] of tokens `pos` [B, K, M].

        B: the sequences of the away part. -1: nothing is sent, and what lies there is arbitrary. A
        token counts as one loaded row, however many of its heads travel. Layout "tokens" only. Read
        by `rows`, the memory is written again for another layer after `release(layer)`. Read as
        `pages`, one page at a time is on the device beside the leaves.
        """
        b, head, slot = np.nonzero(pos >= 0)
        found = pos[b, head, slot]
        self.meter.loaded_rows += np.unique(b * (pos.max(initial=0) + 1) + found).size
        touched, member, offset = self._touched(np.full_like(b, layer), b, found)
        like = next(iter(self.pages.values()))
        shapes = [(*pos.shape, *leaf.shape[3:]) for leaf in like]
        if self.reads == "pages":
            leaves = tuple(jnp.zeros(shape, x.dtype) for shape, x in zip(shapes, like, strict=True))
            for key, index in touched:
                sent = jax.device_put(self.pages[key], _place("device"))
                self.meter.load_bytes += _size(sent)
                row = np.full(pos.shape, -1, np.int32)
                row[b[index], head[index], slot[index]] = (
                    member[index] * PAGE_TOKENS + offset[index]
                )
                leaves = jax.block_until_ready(_spread(leaves, sent, row))
            return leaves
        rows = [
            self.staging.lend(layer, shape, x.dtype) for shape, x in zip(shapes, like, strict=True)
        ]
        for key, index in touched:
            for row, leaf in zip(rows, self._view(key), strict=True):
                at = b[index], head[index], slot[index]
                row[at] = leaf[member[index], offset[index], head[index]]
        self.meter.load_bytes += len(found) * sum(
            row.itemsize * math.prod(row.shape[3:]) for row in rows
        )
        return tuple(jax.device_put(rows, _place("device")))

    def _touched(self, layer, sequence, pos):
        """Of rows [n]: [((layer, group, page), indices)], and the member and offset of each."""
        homes = np.array([self.of[b] for b in range(len(self.of))])
        group = homes[sequence, 0]
        page, offset = np.divmod(pos, PAGE_TOKENS)
        order = np.lexsort((page, group, layer))
        key = np.stack([layer, group, page], axis=1)[order]
        cuts = np.flatnonzero((np.diff(key, axis=0) != 0).any(axis=1)) + 1
        touched = [
            (tuple(key[chosen[0]].tolist()), order[chosen])
            for chosen in np.split(np.arange(len(pos)), cuts)
            if len(chosen)
        ]
        return touched, homes[sequence, 1], offset

    def stream(self, layer: int, group: int, first: int, stop: int, room: int) -> Leaves:
        """Pages first .. stop - 1 of a layer and group to the device, as leaves [n, K, T, *].

        Layout "slots" only. Read by `rows`, T is that of `room` pages, with zeros behind those that
        are asked for, and the memory is written again for another stream after `release(layer)`.
        Read as `pages`, T is theirs.
        """
        keys = [(layer, group, page) for page in range(first, stop)]
        self.meter.loaded_rows += PAGE_TOKENS * len(keys) * len(self.groups[group])
        if self.reads == "pages":
            sent = jax.device_put([self.pages[key] for key in keys], _place("device"))
            self.meter.load_bytes += sum(map(_size, sent))
            return _joined(sent)
        views = [self._view(key) for key in keys]
        self.meter.load_bytes += sum(leaf.nbytes for leaves in views for leaf in leaves)
        return tuple(
            jax.device_put(self.staging.gather(layer, views, PAGE_TOKENS * room), _place("device"))
        )

    def _view(self, key: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
        """A page as NumPy sees it, where it lies; to ask JAX for it takes as long as to copy it."""
        if key not in self.views:
            self.views[key] = tuple(map(np.asarray, self.pages[key]))
        return self.views[key]

    def release(self, layer: int) -> None:
        """What was streamed of `layer` has been used, and no array of it is used again."""
        self.staging.release(layer)

    def _fetch_rows(self, touched, member, offset):
        rows = [
            np.empty((len(member), *leaf.shape[2:]), leaf.dtype)
            for leaf in self.pages[touched[0][0]]
        ]
        for key, index in touched:
            for row, leaf in zip(rows, self._view(key), strict=True):
                row[index] = leaf[member[index], offset[index]]
        pieces, start = [], 0
        for size in powers(len(member)):
            pieces.append(
                ([row[start : start + size] for row in rows], np.arange(start, start + size))
            )
            start += size
        sent = jax.device_put([leaves for leaves, _ in pieces], _place("device"))
        self.meter.load_bytes += sum(map(_size, sent))
        return [(tuple(leaves), index) for leaves, (_, index) in zip(sent, pieces, strict=True)]

    def _fetch_pages(self, touched, member, offset):
        sent = jax.device_put([self.pages[key] for key, _ in touched], _place("device"))
        self.meter.load_bytes += sum(map(_size, sent))
        found = []
        for leaves, (_, index) in zip(sent, touched, strict=True):
            rows = np.full(leaves[0].shape[0] * PAGE_TOKENS, -1)
            rows[member[index] * PAGE_TOKENS + offset[index]] = index
            found.append((_flat(leaves), rows))
        return found


def powers(number: int) -> list[int]:
    """`number` as a sum of falling powers of two: transfers of few shapes, without padding."""
    return [1 << bit for bit in range(number.bit_length() - 1, -1, -1) if number >> bit & 1]


@jax.jit
def _joined(pages: list[Leaves]) -> Leaves:
    return tuple(jnp.concatenate(leaves, axis=2) for leaves in zip(*pages, strict=True))


@functools.partial(jax.jit, donate_argnums=0)
def _spread(leaves: Leaves, page: Leaves, row: jax.Array) -> Leaves:
    """leaves [B, K, M, *] with rows `row` [B, K, M] of a page [n, 16, K, *]; -1: as they were."""
    head = jax.lax.broadcasted_iota(jnp.int32, row.shape, 1)
    found = []
    for old, new in zip(leaves, page, strict=True):
        taken = new.reshape(-1, *new.shape[2:])[jnp.maximum(row, 0), head]
        there = (row >= 0).reshape(*row.shape, *[1] * (old.ndim - 3))
        found.append(jnp.where(there, taken, old))
    return tuple(found)


@jax.jit
def _flat(leaves: Leaves) -> Leaves:
    return tuple(leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves)


@functools.cache
def _place(kind: str) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def _size(leaves: Iterable[jax.Array]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _bits(array: jax.Array) -> bytes:
    return np.asarray(array).tobytes()


def _in_place(array: jax.Array) -> bool:
    try:
        return np.asarray(array).ctypes.data == array.unsafe_buffer_pointer()
    except Exception:  # a backend that gives no pointer is one that cannot be read in place
        return False
