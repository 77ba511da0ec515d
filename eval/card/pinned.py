"""Pinned host memory on the card at hand: kinds, bandwidth each way, reads of single rows, overlap with compute.

    kinds        which memories there are, and what the library's mover chooses (`mover.self_test`)
    A to B SIZE  one array, as the mover sends it: `jax.device_put` with the memory kind of a device; numpy is the memory
                 of the process, read by `np.asarray`
    mover        pages of K and V of a batch: stored, fetched by rows or as pages, streamed
    overlap      seconds of products alone, of a transfer alone, and of both: (t_c + t_x - t_both) / min(t_c, t_x)
    rows         rows of an array in pinned memory, read inside a compiled program, at positions in a row or at random
    update       a page of an array in pinned memory, written inside a compiled program that takes the array over

The last two may end the process on a GPU, so they come last. jax and NumPy suffice.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from eval.card import bare, cells, host_programs
from eval.card.cells import rate, timed
from eval.card.memory import (
    DEVICE,
    DRY,
    FULL,
    HOST,
    OTHER_HOST,
    Sizes,
    array,
    bits,
    drawn,
    kind_of,
    place,
    pointer,
    put,
    same,
    source_of,
    text,
    where,
)

WAYS = ((DEVICE, HOST), (HOST, DEVICE), ("numpy", DEVICE), (DEVICE, "numpy"), ("numpy", HOST), (HOST, "numpy"))
PATTERNS = ("random", "in a row")


def run(emit, left, dry, seed) -> None:
    """Measure everything that is not on file while time is left; see `cells.each`."""
    sizes = DRY if dry else FULL
    cells.each(emit, left, calm(sizes, left, seed))
    cells.each(emit, left, wild(sizes, left, seed))


def calm(sizes: Sizes, left, seed: int) -> Iterator:
    """(cell, function) of everything that is a transfer outside a program."""
    yield "kinds", kinds
    yield "mover self_test", self_test
    for size in sizes.transfers:
        for source, target in WAYS:
            yield f"{source} to {target} {text(size)}", functools.partial(transfer, source, target, size, left, seed)
    for target in (DEVICE, HOST, "numpy"):
        source = DEVICE if target != DEVICE else HOST
        yield f"overlap {source} to {target}", functools.partial(overlap, source, target, sizes, left, seed)
    yield f"overlap numpy to {DEVICE}", functools.partial(overlap, "numpy", DEVICE, sizes, left, seed)
    yield "mover store", functools.partial(store, sizes, left, seed)
    for reads in ("rows", "pages"):
        for pattern in PATTERNS:
            yield f"mover fetch {reads} {pattern}", functools.partial(fetch, reads, pattern, sizes, left, seed)
        yield f"mover stream {reads}", functools.partial(stream, reads, sizes, left, seed)
    for size in sizes.transfers:
        for source, target in ((DEVICE, OTHER_HOST), (OTHER_HOST, DEVICE)):
            yield f"{source} to {target} {text(size)}", functools.partial(transfer, source, target, size, left, seed)


def wild(sizes: Sizes, left, seed: int) -> Iterator:
    """(cell, function) of programs that have an operand in pinned memory."""
    for way in host_programs.READS:
        for pattern in PATTERNS:
            if way != "slice" or pattern == "in a row":
                yield f"rows {way} {pattern}", functools.partial(host_programs.read, way, pattern, sizes, left, seed)
    for way in host_programs.WRITES:
        yield f"update {way}", functools.partial(host_programs.write, way, sizes, left, seed)


# ---- what there is


def kinds() -> dict:
    """Memory kinds of the device, and whether NumPy sees a pinned array where it lies."""
    device = jax.devices()[0]
    there = jax.device_put(jnp.arange(1024, dtype=jnp.int32), place(HOST))
    return {
        "kinds": ", ".join(sorted(memory.kind for memory in device.addressable_memories())),
        "default_kind": device.default_memory().kind,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "jax": jax.__version__,
        "numpy_in_place": np.asarray(there).ctypes.data == pointer(there),
        "host_limit_gb": os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"),
        "cpu_count": os.cpu_count(),
    }


def self_test() -> dict:
    """What the mover found to work: `reads` is "rows" or "pages"."""
    flax, start = bare.prepare(), time.perf_counter()
    report = mover().self_test()
    return {"reads": report.reads, "time_s": time.perf_counter() - start, "flax": flax}


# ---- whole arrays


def transfer(source: str, target: str, size: int, left, seed: int) -> dict:
    """An array of `size` bytes from one memory to another; `right`: it comes back with the same bits."""
    first = array(seed, size)
    times, there = timed(lambda given: put(given, target), left, source_of(first, source, target))
    back = jax.device_put(there, place(DEVICE))
    return rate(times, size) | {"right": bool(same(first, back)), "kind": kind_of(there)}


def overlap(source: str, target: str, sizes: Sizes, left, seed: int) -> dict:
    """A transfer and products of matrices that take as long, each alone, and both issued together in either order."""
    x = drawn(seed, (sizes.side, sizes.side))
    w = drawn(seed + 1, (sizes.side, sizes.side), sizes.side**-0.5)
    products = jax.jit(lambda x, w, n: jax.lax.fori_loop(0, n, lambda _, x: x @ w, x))
    count, size = jnp.int32(8), sizes.transfers[0]
    compute = lambda: products(x, w, count)
    move = lambda given: put(given, target)
    single = max(timed(lambda _: compute(), left)[0]["time_min_s"] / 8, 1e-7)
    count = jnp.int32(max(1, round(sizes.target_s / single)))
    took = timed(move, left, source_of(array(seed, size), source, target))[0]["time_min_s"]
    size = min(sizes.largest, max(2**12, round(size * sizes.target_s / took) // 2**12 * 2**12))
    before = source_of(array(seed, size), source, target)

    def both(given, compute_first: bool, issue_s: list[float]):
        made = [compute()] if compute_first else []
        start = time.perf_counter()
        made.append(move(given))
        issue_s.append(time.perf_counter() - start)
        return made if compute_first else [*made, compute()]

    t_c, t_x = timed(lambda _: compute(), left)[0], timed(move, left, before)[0]
    found = {"compute_s": t_c["time_s"], "transfer_s": t_x["time_s"], "moved_bytes": size}
    for name, compute_first in (("compute_first", True), ("transfer_first", False)):
        issue_s: list[float] = []
        times, _ = timed(functools.partial(both, compute_first=compute_first, issue_s=issue_s), left, before)
        hidden = t_c["time_s"] + t_x["time_s"] - times["time_s"]
        found |= {
            f"{name}_s": times["time_s"],
            f"{name}_overlap_frac": hidden / min(t_c["time_s"], t_x["time_s"]),
            f"{name}_issue_s": float(np.median(issue_s)),  # until the call that transfers returned
            "repeats": times["repeats"],
        }
    return found


# ---- as the mover moves pages


def mover():
    """`alisa_jax.placement.mover`, with or without flax."""
    bare.prepare()
    from alisa_jax.placement import mover

    return mover


def filled(reads: str, layout: str, sizes: Sizes, seed: int):
    """A mover with all pages of one layer on the host, what was sent there, and their K and V in NumPy.

    K and V are [sequences, tokens, K, H].
    """
    module = mover()
    tokens = module.PAGE_TOKENS * sizes.pages
    shape = (2, sizes.sequences, tokens, sizes.heads, sizes.head_dim)
    both = drawn(seed, shape)

    @jax.jit
    def cut(both):
        paged = both.reshape(2, sizes.sequences, sizes.pages, -1, *shape[3:])
        paged = jnp.swapaxes(paged, 3, 4) if layout == "slots" else paged
        return [tuple(paged[side, :, page] for side in range(2)) for page in range(sizes.pages)]

    pages = [(0, 0, page, leaves) for page, leaves in enumerate(jax.block_until_ready(cut(both)))]
    meter = module.Meter(float("inf"), float("inf"))
    home = module.Mover([list(range(sizes.sequences))], layout, reads, meter)
    home.store(pages)
    jax.block_until_ready(list(home.pages.values()))
    return home, pages, np.asarray(both)


def store(sizes: Sizes, left, seed: int) -> dict:
    """Every page of a batch to the host in one transfer."""
    home, pages, both = filled("pages", "tokens", sizes, seed)

    def send(_):
        home.store(pages)
        return list(home.pages.values())

    def clear():
        for _, group, page, _ in pages:
            home.drop(1, group, page)

    times, sent = timed(send, left, clear)
    right = all(
        np.array_equal(bits(leaf), bits(want))
        for mine, (*_, leaves) in zip(sent, pages)
        for leaf, want in zip(mine, leaves)
    )
    return rate(times, both.nbytes) | {"right": right, "pages": len(pages)}


def fetch(reads: str, pattern: str, sizes: Sizes, left, seed: int) -> dict:
    """K and V of single rows to the device; `moved_bytes` are those that were asked for, `sent_bytes` those that went."""
    home, _, both = filled(reads, "tokens", sizes, seed)
    tokens = both.shape[2]
    chosen = where(pattern, sizes.sequences * tokens, sizes.rows, seed)
    sequence, pos = np.divmod(chosen, tokens)
    times, pieces = timed(lambda _: home.fetch(np.zeros_like(pos), sequence, pos), left)
    right = sum(int(np.sum(index >= 0)) for _, index in pieces) == len(pos)
    for leaves, index in pieces:
        for leaf, side in zip(leaves, both):
            got, want = np.asarray(leaf)[index >= 0], side[sequence, pos][index[index >= 0]]
            right &= np.array_equal(bits(got), bits(want))
    sent_bytes = sum(leaf.nbytes for leaves, _ in pieces for leaf in leaves)
    return rate(times, len(pos) * both.itemsize * sizes.row) | {"right": right, "sent_bytes": sent_bytes}


def stream(reads: str, sizes: Sizes, left, seed: int) -> dict:
    """All pages of a layer to the device, joined."""
    home, _, both = filled(reads, "slots", sizes, seed)

    def ask(_):
        return home.stream(0, 0, 0, sizes.pages, sizes.pages)

    times, leaves = timed(ask, left, lambda: home.release(0))
    right = all(np.array_equal(bits(leaf), bits(np.swapaxes(side, 1, 2))) for leaf, side in zip(leaves, both))
    return rate(times, both.nbytes) | {"right": right}
