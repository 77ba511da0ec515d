"""Pinned host memory on the card at hand: kinds, bandwidth each way, reads of single rows, overlap with compute.

    kinds        which memories there are, and what the library's mover chooses (`mover.self_test`)
    A to B SIZE  one array, as the mover sends it: `jax.device_put` with the memory kind of a device; numpy is the memory
                 of the process, read by `np.asarray`
    mover        pages of K and V of a batch: stored, fetched by rows or as pages, streamed
    overlap      seconds of products alone, of a transfer alone, and of both: (t_c + t_x - t_both) / min(t_c, t_x)
    rows         rows of an array in pinned memory, read inside a compiled program, at positions in a row or at random
    update       a page of an array in pinned memory, written inside a compiled program that takes the array over

The last two may end the process on a GPU, so they come last and are marked as begun. jax and NumPy suffice.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import compute_on
from jax.sharding import SingleDeviceSharding

from eval.card import bare, cells
from eval.card.cells import rate, timed
from pallas_kernels import timing

DEVICE, HOST, OTHER_HOST = "device", "pinned_host", "unpinned_host"
WAYS = ((DEVICE, HOST), (HOST, DEVICE), ("numpy", DEVICE), (DEVICE, "numpy"), ("numpy", HOST), (HOST, "numpy"))
PATTERNS = ("random", "in a row")
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


class Sizes(NamedTuple):
    """What is moved: bfloat16 everywhere."""

    transfers: tuple[int, ...]  # bytes
    heads: int
    head_dim: int
    sequences: int
    pages: int  # of 16 tokens, of each sequence
    rows: int  # that are read at once, K and V together
    side: int  # of the matrices of the products
    target_s: float  # that the products and the transfer of an overlap take
    largest: int  # bytes of that transfer

    @property
    def row(self) -> int:
        """Elements of K and V of one token."""
        return 2 * self.heads * self.head_dim

    @property
    def row(self) -> int:
        return 2 * self.heads * self.head_dim


FULL = Sizes((2**28, 2**30, 2**24, 2**20), 8, 128, 16, 128, 1000, 4096, 0.01, 2**30)
DRY = Sizes((2**12, 2**14), 2, 4, 2, 3, 20, 32, 1e-4, 2**14)


def run(emit, left, dry, seed) -> None:
    """Measure everything that is not on file while time is left; see `cells.each`."""
    sizes = DRY if dry else FULL
    cells.each(emit, left, calm(sizes, left, seed))
    cells.each(emit, left, wild(sizes, left, seed), marked=True)


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
    for way in READS:
        for pattern in PATTERNS:
            if way != "slice" or pattern == "in a row":
                yield f"rows {way} {pattern}", functools.partial(read, way, pattern, sizes, left, seed)
    for way in WRITES:
        yield f"update {way}", functools.partial(write, way, sizes, left, seed)


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
        "numpy_in_place": np.asarray(there).ctypes.data == there.unsafe_buffer_pointer(),
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
        np.array_equal(bits(leaf), bits(want)) for mine, (*_, leaves) in zip(sent, pages) for leaf, want in zip(mine, leaves)
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


# ---- programs with an operand in pinned memory


def _rows(h, i):
    return h.at[i].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _host(x):
    return jax.device_put(x, jax.memory.Space.Host)


def _device(x):
    return jax.device_put(x, jax.memory.Space.Device)


def _gather(h, i):
    return _device(_rows(h, _host(i)))


def _gather_on_host(h, i):
    # called compute_on2 where compute_on is still a context
    on = getattr(compute_on, "compute_on2", compute_on.compute_on)
    on_host = on(_rows, compute_type="device_host", out_memory_spaces=jax.memory.Space.Host)
    return _device(on_host(h, _host(i)))


def _row_by_row(h, i):
    def one(j, out):
        row = _device(jax.lax.dynamic_slice_in_dim(h, _host(i[j]), 1))
        return jax.lax.dynamic_update_slice_in_dim(out, row, j, 0)

    return jax.lax.fori_loop(0, len(i), one, jnp.zeros((len(i), h.shape[1]), h.dtype))


def _slice(h, i):
    return _device(jax.lax.dynamic_slice_in_dim(h, _host(i[0]), len(i)))


def _whole(h, i):
    return _device(h)[i]


READS = {
    "whole": _whole,
    "slice": _slice,
    "gather": _gather,
    "gather on host": _gather_on_host,
    "row by row": _row_by_row,
}


def read(way: str, pattern: str, sizes: Sizes, left, seed: int) -> dict:
    """Rows of an array [tokens, 2 K H] in pinned memory, to the device, by one of READS."""
    values, there = table(sizes, seed)
    chosen = where(pattern, len(values), sizes.rows, seed)
    index = jax.device_put(jnp.asarray(chosen, jnp.int32), place(DEVICE))
    compiled, compile_s = compile_of(jax.jit(READS[way], out_shardings=place(DEVICE)), there, index)
    times, got = timed(lambda _: compiled(there, index), left)
    found = rate(times, len(chosen) * sizes.row * values.itemsize)
    right = np.array_equal(bits(got), bits(values[chosen]))
    return found | {"compiles": True, "compile_s": compile_s, "right": right, "kind": kind_of(got)}


def _write_host(h, x, at):
    return jax.lax.dynamic_update_slice_in_dim(h, _host(x), _host(at), 0)


def _write_static(h, x, at):
    del at
    return jax.lax.dynamic_update_slice(h, _host(x), (0, 0))


def _write_through(h, x, at):
    return jax.lax.dynamic_update_slice_in_dim(_device(h), x, at, 0)


WRITES = {"by traced start": _write_host, "by fixed start": _write_static, "through the device": _write_through}


def write(way: str, sizes: Sizes, left, seed: int) -> dict:
    """A page from the device into an array in pinned memory that is taken over, by one of WRITES."""
    values, there = table(sizes, seed)
    page = jax.device_put(jnp.full((16, sizes.row), 7, values.dtype), place(DEVICE))
    at = jax.device_put(jnp.int32(0 if way == "by fixed start" else 16), place(DEVICE))
    program = jax.jit(WRITES[way], donate_argnums=0, out_shardings=place(HOST))
    compiled, compile_s = compile_of(program, there, page, at)
    before = there.unsafe_buffer_pointer()
    held = [compiled(there, page, at)]
    in_place = held[0].unsafe_buffer_pointer() == before
    want = np.array(values)
    want[int(at) : int(at) + 16] = 7
    right = np.array_equal(bits(held[0]), bits(want))
    held = [table(sizes, seed)[1]]  # what NumPy has looked at is not taken over

    def again(_):
        held[0] = compiled(held[0], page, at)
        return held[0]

    times, _ = timed(again, left)
    found = rate(times, page.nbytes) | {"compiles": True, "compile_s": compile_s}
    return found | {"right": right, "in_place": in_place, "kind": kind_of(held[0])}


# ---- helpers


@functools.cache
def place(kind: str) -> SingleDeviceSharding:
    """The memory `kind` of the first device."""
    return SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def put(x, target: str):
    """`x` in a memory kind, or in NumPy."""
    return np.asarray(x) if target == "numpy" else jax.device_put(x, place(target))


def source_of(first: jax.Array, source: str, target: str):
    """A function that gives `first` in `source`, a new array each time where NumPy keeps what it has read."""
    start = put(first, source)
    return (lambda: jax.device_put(first + 0, place(source))) if target == "numpy" else lambda: start


@functools.partial(jax.jit, static_argnums=(1, 2))
def drawn(seed, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    """bfloat16 on the device, of variance `scale` squared."""
    limit = scale * 3**0.5
    return timing.uniform(jnp.asarray(seed, jnp.uint32), shape, jnp.bfloat16, -limit, limit)


def array(seed: int, size: int) -> jax.Array:
    """bfloat16 of `size` bytes on the device, in rows of 2,048 bytes."""
    return drawn(seed, (size // 2048, 1024))


def table(sizes: Sizes, seed: int) -> tuple[np.ndarray, jax.Array]:
    """K and V of all tokens [tokens, 2 K H], in NumPy and in pinned memory."""
    shape = (16 * sizes.pages * sizes.sequences, sizes.row)
    values = drawn(seed, shape)
    return np.array(values), jax.block_until_ready(jax.device_put(values, place(HOST)))


def where(pattern: str, tokens: int, rows: int, seed: int) -> np.ndarray:
    """`rows` positions below `tokens`."""
    rng = np.random.default_rng(seed)
    if pattern == "random":
        return rng.permutation(tokens)[:rows]
    return np.arange(rows) + int(rng.integers(tokens - rows + 1))


def compile_of(program, *args):
    """`program` compiled for `args`, and the seconds that this took."""
    start = time.perf_counter()
    compiled = program.lower(*args).compile()
    return compiled, time.perf_counter() - start


@jax.jit
def same(a: jax.Array, b: jax.Array) -> jax.Array:
    """Whether two bfloat16 arrays have the same bits."""
    return jnp.array_equal(*(jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (a, b)))


def bits(x) -> np.ndarray:
    """bfloat16 as uint16, so that equal means equal in every bit."""
    return np.ascontiguousarray(np.asarray(x)).view(np.uint16)


def kind_of(x) -> str:
    """The memory kind of an array."""
    return "numpy" if isinstance(x, np.ndarray) else x.sharding.memory_kind


def text(size: int) -> str:
    """A number of bytes as in 16 MiB."""
    unit, name = next(pair for pair in UNITS if size >= pair[0])
    return f"{size // unit} {name}"
