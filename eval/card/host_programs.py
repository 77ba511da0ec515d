"""Programs that read rows of an array in pinned memory, or write a page of it, without a transfer of the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import compute_on

from eval.card.cells import rate, timed
from eval.card.memory import DEVICE, HOST, Sizes, bits, compile_of, kind_of, place, pointer, table, where


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
    before = pointer(there)
    held = [compiled(there, page, at)]
    in_place = None if before is None else pointer(held[0]) == before
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
