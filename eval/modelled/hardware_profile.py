"""Measures what the cost model needs of this machine: copies both ways between memory kinds, a matmul, a read.

Medians over `REPEATS` after warm-up; each repeat copies or reads a fresh array. The host's budget is what the operating
system says is available; a device that does not tell its memory (a CPU) gets half of that. On a CPU the copies are memory
copies and say nothing of a link.
"""

import os
import statistics
import time
from collections.abc import Callable

REPEATS = 5


def profile(copy_bytes: int = 2**26, side: int = 2048) -> dict:
    """The fields of `Hardware` as measured, for arrays of `copy_bytes` bytes and products of `side` x `side` matrices."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    device = jax.devices()[0]
    on_device = SingleDeviceSharding(device, memory_kind="device")
    on_host = SingleDeviceSharding(device, memory_kind="pinned_host")
    dtype = jnp.float32 if device.platform == "cpu" else jnp.float16
    elements = copy_bytes // 4
    make = jax.jit(lambda seed: jnp.arange(elements, dtype=jnp.float32) + seed)
    here = [jax.block_until_ready(make(jnp.float32(i))) for i in range(REPEATS + 1)]
    there = [jax.block_until_ready(jax.device_put(x, on_host)) for x in here]
    to_host = copy_bytes / _median(lambda i: jax.device_put(here[i], on_host))
    to_device = copy_bytes / _median(lambda i: jax.device_put(there[i], on_device))
    total = jax.jit(jnp.sum)
    read = copy_bytes / _median(lambda i: total(here[i]))
    square = jnp.ones((side, side), dtype)
    matmul = jax.jit(lambda x: x @ x)
    flops = 2.0 * side**3 / _median(lambda i: matmul(square))
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return {
        "name": f"this_machine: {device.device_kind}",
        "device_bytes": float(limit or memory / 2),
        "host_bytes": float(memory if limit else memory / 2),
        "matmul_flops_per_s": flops,
        "read_bytes_per_s": read,
        "to_device_bytes_per_s": to_device,
        "to_host_bytes_per_s": to_host,
        "gathered_frac": 1.0,
        "measured": True,
    }


def _median(run: Callable) -> float:
    """Median seconds of `run(i)` for i = 1 .. REPEATS; i = 0 warms up."""
    import jax

    seconds = []
    for i in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(i))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
