"""One decode step of one attention layer, SWA at 80 % KV sparsity beside dense, at 8,192 and 32,768 tokens.

The state is the library's own: `attention.step` on the route of the working set, so a step appends to the store and to
the set, attends, observes, and exchanges for the next query. K and V are drawn and no prompt is computed; the policy is
seeded with rows that are drawn. Nothing that is out of the set comes back then, while text brings about 0.2 rows a step
and sequence; `entering_rows_per_sequence` says what came.

    step       many steps in one program, the state taken over and handed on, as an engine runs them
    attend     attention over the slots alone, each after the one before it (`timing.loop`)
    observe    the mass enters the window's sums
    exchange   selection alone: the set that is best for the next query is found, and no row has to come

Steps that are timed end at the context's last token. "bytes that must be read" are K and V of the attended tokens and, for
swa, one float32 per token and sequence: the sums that the selection ranks. K and V of a set count by the slot, scales and
what else the codec keeps of a sequence included. Times are medians over repeats.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eval.card import bare, cells
from eval.card import rates as measured
from pallas_kernels import shapes, timing
from pallas_kernels.shapes import Shape

POLICIES = ("dense()", "swa(kv_sparsity=0.8,window=64)")
WARM_UP, REPEATS = 2, 5
TOLERANCE = 0.02  # of the largest element of what XLA gives


class Round(NamedTuple):
    """Cells that differ in everything but `parts`: whether the parts of a step are timed too."""

    sizes: tuple[tuple[int, int], ...]  # batch, tokens
    models: tuple[str, ...]
    codecs: tuple[str, ...]
    impls: tuple[str, ...]
    parts: bool
    policies: tuple[str, ...] = POLICIES


MODELS, CODECS, IMPLS = ("llama-3-8b", "opt-6.7b"), ("raw", "int8"), ("pallas", "xla")
FIRST, REST = ((64, 8192), (16, 32768)), ((16, 8192), (64, 32768), (1, 32768), (1, 8192))
FULL = (  # most valuable first
    Round(FIRST, MODELS, CODECS, IMPLS, True),
    Round(REST, MODELS, CODECS, IMPLS, False),
    Round((*FIRST, *REST), MODELS, ("int8(axis=token)",), IMPLS, False),
)
DRY = (
    Round(((2, 96),), ("tiny",), ("raw",), ("xla",), True),
    Round(((2, 96),), ("tiny",), ("int8",), ("interpret",), False, POLICIES[1:]),
)
STEPS, DRY_STEPS = 16, 1  # in one program
TINY = Shape(4, 2, 16, 1, 1)


class Cell(NamedTuple):
    """What one record is of."""

    model: str
    shape: Shape
    codec: str
    impl: str
    policy: str
    parts: bool

    @property
    def name(self) -> str:
        """As in llama-3-8b/b64/c8192 raw pallas swa."""
        return f"{self.model}/b{self.shape.batch}/c{self.shape.context} {self.codec} {self.impl} {self.kind}"

    @property
    def kind(self) -> str:
        """dense or swa."""
        return self.policy.partition("(")[0]


def run(emit, left, dry, seed, rates: dict | None = None) -> None:
    """Measure every cell that is not on file while time is left; see `cells.each`.

    rates: {"copy_gb_per_s"} of this device, for the share of it that was reached; None: as part b measures it.
    """
    bare.prepare()
    if rates is None:
        rates = {"copy_gb_per_s": measured.known(emit, "bfloat16", dry).copy_bytes_per_s / 1e9}
    steps, seconds = DRY_STEPS if dry else STEPS, {}
    cells.each(
        emit,
        left,
        (
            (cell.name, functools.partial(measure, cell, steps, seed, rates, seconds))
            for cell in wanted(DRY if dry else FULL)
        ),
    )


def wanted(rounds: tuple[Round, ...]) -> Iterator[Cell]:
    """All cells; dense comes before swa, which is compared with it."""
    for sizes, models, codecs, impls, parts, policies in rounds:
        for (batch, tokens), model, codec, impl in itertools.product(sizes, models, codecs, impls):
            shape = TINY if model == "tiny" else shapes.named(f"{model}/b1/c1")
            shape = shape._replace(batch=batch, context=tokens)
            for policy in policies:
                yield Cell(model, shape, codec, impl, policy, parts)


def measure(cell: Cell, steps: int, seed: int, rates: dict | None, seconds: dict) -> dict:
    """The fields of a cell; `seconds` holds the steps of this process by cell, and gets this one."""
    from alisa_jax import codecs, policies
    from alisa_jax.kv.state import tree_bytes

    policy, codec = policies.parse(cell.policy), codecs.parse(cell.codec).resolve("bfloat16")
    B, S = cell.shape.batch, cell.shape.context
    start = S - steps * (WARM_UP + REPEATS)
    check(policy, codec, cell.shape)
    began = time.perf_counter()
    state = jax.block_until_ready(fill(policy, codec, cell.shape, jnp.full((B,), start, jnp.int32), jnp.uint32(seed)))
    found = {"fill_s": time.perf_counter() - began}
    state = state.replace(spec=dataclasses.replace(state.spec, impl=cell.impl))
    slots, kv_bytes = state.ws.pos.shape[-1], tree_bytes((state.ws.k, state.ws.v))
    state_bytes = tree_bytes(state)
    drawn = draw(cell.shape, steps, jnp.uint32(seed + 1))

    state, step, counts = repeated(functools.partial(decode_steps, steps=steps), state, drawn)
    attended, loads = counts["attended_tokens"], counts["entering_rows"]
    sums_bytes = 4 * B * S if policy.selects else 0
    must = round(kv_bytes * attended / slots) + sums_bytes
    found |= named("step", step, steps)
    found |= {
        "model": cell.model,
        "batch": B,
        "context_tokens": S,
        "codec": cell.codec,
        "attention_impl": cell.impl,
        "policy": cell.policy,
        "attended_tokens": attended,
        "slots": slots,
        "entering_rows_per_sequence": loads,
        "must_read_bytes": must,
        "sums_bytes": sums_bytes,
        "state_bytes": state_bytes,
        "step_temporary_bytes": step["temporary_bytes"],  # a cache that is copied shows here
    }
    seconds[cell.name] = found["step_ms"]
    if policy.selects and cell.parts:
        for name, part in (("observe", observe), ("exchange", exchange)):
            state, times, _ = repeated(functools.partial(part_steps, part=part, steps=steps), state)
            found |= named(name, times, steps)
    if policy.selects:
        dense = cell._replace(policy=POLICIES[0]).name
        found["step_ratio_to_dense"] = found["step_ms"] / seconds[dense] if dense in seconds else None
    reads = {"step": must}
    if cell.parts:
        times, right = attend(cell, state, drawn[0][0], steps)
        found |= named("attend", times, steps) | right
        reads["attend"] = must - sums_bytes
    for name, count in reads.items():
        gb_per_s = count / found[f"{name}_ms"] / 1e6
        found[f"{name}_gb_per_s"] = gb_per_s
        if rates and rates.get("copy_gb_per_s"):
            found[f"{name}_copy_share"] = gb_per_s / rates["copy_gb_per_s"]
    return found


def check(policy, codec, shape: Shape) -> None:
    """Raise `timing.TooLarge` where the state and the K and V that fill it exceed the device's memory."""
    from alisa_jax.kv.state import tree_bytes

    given = jax.ShapeDtypeStruct((shape.batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32)
    state = tree_bytes(jax.eval_shape(functools.partial(fill, policy, codec, shape), *given))
    rows = 2 * 2 * shape.batch * shape.context * shape.n_kv_heads * shape.head_dim
    if state + rows > (limit := limit_bytes()):
        raise timing.TooLarge(
            f"{state / 1e9:.3g} GB of state and {rows / 1e9:.3g} GB of K and V that fill it exceed the device's "
            f"{limit / 1e9:.3g} GB"
        )


def limit_bytes() -> float:
    """What the device may hold, where it says so."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))


# ---- a layer that is filled and not computed


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def fill(policy, codec, shape: Shape, length, seed):
    """The state after `length` [B] tokens whose K and V are drawn, with room up to the context."""
    from alisa_jax import attention
    from alisa_jax.kv.state import LayerSpec
    from eval.speed import seeded

    N, K, H, B, S = shape
    spec = LayerSpec(policy, codec, "working_set")
    dims = attention.dims_of(spec, B, N, K, S, H)
    k, v = (timing.uniform(seed + i, (B, S, K, H), jnp.bfloat16) for i in range(2))
    rows = seeded.rows(policy, dims, length, jax.random.key(seed))
    return attention.fill(attention.init(spec, dims, H), k, v, length, rows, N)


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw(shape: Shape, steps: int, seed):
    """q [steps, B, N, H], k and v [steps, B, K, H]; a sequence's queries share half of their variance."""
    N, K, H, B, _ = shape
    one = lambda i, *heads: timing.uniform(seed + i, (*heads, H), jnp.float32)
    q = (one(0, 1, B, N) + one(1, steps, B, N)) * jnp.float32(0.5**0.5)
    return tuple(x.astype(jnp.bfloat16) for x in (q, one(2, steps, B, K), one(3, steps, B, K)))


# ---- programs of many steps: (carry, *given) -> (carry, what they counted)


def decode_steps(state, q, k, v, steps: int):
    """`steps` decode steps; the mean of what a query attends, and of the rows that come for the next."""
    from alisa_jax import attention

    def step(i, carry):
        state, _, attended, loads = carry
        out, state, taps = attention.step(state, q[i], k[i], v[i])
        loads = loads + jnp.mean(taps.loads.astype(jnp.float32))
        return state, out, attended + jnp.mean(taps.attended), loads

    zero = jnp.zeros((), jnp.float32)
    state, out, attended, loads = jax.lax.fori_loop(0, steps, step, (state, jnp.zeros_like(q[0]), zero, zero))
    return state, {"attended_tokens": attended / steps, "entering_rows": loads / steps, "out": jnp.sum(out)}


def part_steps(state, part, steps: int):
    """`part` of the state, `steps` times in turn."""
    return jax.lax.fori_loop(0, steps, lambda _, state: part(state), state), {}


def observe(state):
    """The mass of a query, here the same for all slots, enters the statistics."""
    mass = jnp.where(state.ws.pos >= 0, jnp.float32(1.0), jnp.float32(0.0))
    slot = jnp.zeros(state.ws.pos.shape[:2], jnp.int32)
    return state.replace(stats=state.spec.policy.observe(state.stats, mass, state.ws.pos, slot, state.length - 1))


def exchange(state):
    """The set for the next query."""
    from alisa_jax import attention

    ((state,),), _ = attention.exchange_sets([(state,)], [state.ws.bias])
    return state


def repeated(program, carry, given=()):
    """Compile `program`, which takes `carry` over, and run it: the last carry, seconds of REPEATS runs, and counts.

    Counts are means over the timed runs.
    """
    compiled = jax.jit(program, donate_argnums=0).lower(carry, *given).compile()
    seconds, counts = [], []
    for _ in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        carry, count = jax.block_until_ready(compiled(carry, *given))
        seconds.append(time.perf_counter() - start)
        counts.append(count)
    counts = counts[WARM_UP:]
    means = {name: sum(float(one[name]) for one in counts) / len(counts) for name in counts[0]}
    memory = compiled.memory_analysis()
    temporary = {"temporary_bytes": None if memory is None else int(memory.temp_size_in_bytes)}
    return carry, cells.spread(seconds[WARM_UP:]) | temporary, means


def attend(cell: Cell, state, q, calls: int) -> tuple[dict, dict]:
    """Seconds of `calls` attentions over the slots of `state`, which is used up, and how far the last is from XLA's.

    A NaN makes it wrong.
    """
    from alisa_jax.attention import compute

    codec, K = state.spec.codec, cell.shape.n_kv_heads
    q = q.reshape(q.shape[0], K, -1, q.shape[-1])
    slots = lambda impl, q, k, v, bias: compute.slots(codec, q, k, v, bias, impl)
    args = (q, state.ws.k, state.ws.v, state.ws.bias)
    function = functools.partial(slots, cell.impl)
    outs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))
    (args, outs), times, _ = repeated(lambda carry: (timing.loop(function, calls)(*carry), {}), (args, outs))
    got, want = outs[0].out, jax.jit(functools.partial(slots, "xla"))(*args)[0].out
    error = float(jnp.max(jnp.abs(want - got)) / jnp.max(jnp.abs(want)))
    return times, {"attend_error_to_xla": error, "right": error <= TOLERANCE}


def named(name: str, times: dict, steps: int) -> dict:
    """Milliseconds of one step of `name`: median, least and most."""
    keys = (("time_s", "ms"), ("time_min_s", "ms_min"), ("time_max_s", "ms_max"))
    return {f"{name}_{ms}": 1e3 * times[key] / steps for key, ms in keys}
