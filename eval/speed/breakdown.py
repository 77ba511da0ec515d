"""Where the time of one attention module goes: a single decode query per sequence, split by operation.

The paper's Figure 11 times one attention module (no projections) at b = 64 and length 128. Here it is done in two ways
on the same device, in the same layouts and types, each operation as a program of its own.

The paper's way: the kept tokens are gathered into packed arrays at every step, and the window is summed from scratch.

    selection    Algorithm 1, lines 3 and 4: sums [B, 1, n] -> the c kept positions         not drawn in the figure
    gather       line 6: c rows of K and of V, token-major [B, S, N, H] -> head-major [B, N, c, H]
    qk, softmax, awv   lines 7 and 8: B N c H multiply-adds, B N c exponentials, B N c H multiply-adds
    local_sum    line 2: c rows of c weights for each head, summed over rows and heads      B N c^2 additions

c = floor(r n), as the figure's labels imply, and n where it is dense, which does without selection, gather and sum. The
weights that are summed are those of this query, repeated c times: a sum takes as long whatever is added.

Ours: the working set is kept, its M slots are attended, and a step moves only what changes.

    append       the new token's K and V go to the store and to a slot
    attend       QK, softmax and AV over all slots in one program, and the mass of each slot
    observe      the mass enters the window's sums: one row comes, one row goes
    exchange     the set for the next query, and the rows that this moves
    step         all of it in one program, `attention.step`, as an engine runs it

Queries, keys and values are those of one layer of a trained model that reads text densely: what random ones select does
not move as it does on text. Heads and channels are repeated until there are N of H, queries scaled so that the logits stay
what they are. The timed steps of ours are centred on n. Every time is taken by the host's clock until the result is ready,
launch included. Bytes are inputs read once and outputs written once; what a program keeps in between is not counted.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax import attention, policies
from alisa_jax.attention import compute
from alisa_jax.codecs import Raw
from alisa_jax.kv.state import LayerSpec
from alisa_jax.policies import base, budget, swap
from eval.script.common import UserError
from eval.speed import timing

WARM_UP = 3
LOGIT_BYTES = INDEX_BYTES = 4  # float32, int32
PAPER_WAY = ("qk", "softmax", "awv", "local_sum", "gather")  # the operations of the figure
SEPARATE = (*PAPER_WAY, "selection")
PARTS = ("append", "attend", "observe", "exchange")


class Shape(NamedTuple):
    """One query of each of `batch` sequences against `tokens` past tokens."""

    batch: int
    tokens: int
    heads: int
    head_dim: int


class Amount(NamedTuple):
    """What an operation cannot do without."""

    bytes: int
    macs: int = 0
    adds: int = 0


class Past(NamedTuple):
    """Queries, keys and values of consecutive tokens, each [B, T, N, H] float32 in the host's memory."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


def kept_tokens(tokens: int, kv_sparsity: float) -> int:
    """floor(r n): 102, 76, 51, 25 and 12 of 128 tokens at 20, 40, 60, 80 and 90 %, as the labels of Figure 11 imply."""
    return int(budget.kept_frac(kv_sparsity) * tokens + 1e-9)


def context_tokens(tokens: int, repeats: int) -> int:
    """Tokens that `measure` needs: the timed steps are centred on `tokens`."""
    return tokens + repeats // 2 + 1


def dtype() -> str:
    """float32 on a CPU, which computes nothing narrower faster; bfloat16 elsewhere."""
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def recorded(model, rows: np.ndarray, layer: int) -> Past:
    """What the attention of `layer` is given when `model` reads `rows` [B, T] densely; kv heads repeated to query heads."""
    decoder, B, T = model.decoder, *rows.shape

    @jax.jit
    def read(params, tokens):
        at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        x = decoder.embed(params, tokens, at)
        for block in params["blocks"][: layer + 1]:
            x, seen = decoder.block(
                block, x, at, lambda *qkv: (compute.causal(*qkv, jnp.full((B,), T, jnp.int32)), qkv)
            )
        return seen

    q, k, v = (np.asarray(x, np.float32) for x in read(model.params, jnp.asarray(rows, jnp.int32)))
    groups = q.shape[2] // k.shape[2]
    return Past(q, np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2))


def check(config, layer: int, shape: Shape, repeats: int) -> None:
    """Raise UserError where a model of `config` cannot stand in for attention of this shape."""
    if not 0 <= layer < config.n_layers:
        raise UserError(f"layer must be in 0..{config.n_layers - 1}, the layers of the model, got {layer}")
    if shape.head_dim % config.head_dim:
        raise UserError(f"head_dim must be a multiple of {config.head_dim}, that of the model, got {shape.head_dim}")
    if shape.tokens <= WARM_UP + repeats // 2:
        raise UserError(
            f"tokens must be above {WARM_UP + repeats // 2}, as the timed steps are centred, got {shape.tokens}"
        )
    if (needed := context_tokens(shape.tokens, repeats)) > config.max_positions:
        raise UserError(f"--model: {needed} tokens are needed, and the model reads {config.max_positions} at most")


def stretched(past: Past, heads: int, head_dim: int) -> Past:
    """`past` with `heads` heads of `head_dim` channels: head i weighs tokens as its head i modulo its own number does."""
    times = head_dim // past.q.shape[-1]
    which = np.arange(heads) % past.q.shape[2]
    q, k, v = (np.tile(x[:, :, which], (1, 1, 1, times)) for x in past)
    return Past(q / np.float32(times**0.5), k, v)


# ---- the paper's way, an operation a function


def selection(sums: jax.Array, kept: int) -> jax.Array:
    """sums [B, 1, n] -> positions [B, 1, kept] int32: the ceil(kept / 2) last tokens, and those with the largest sums."""
    n, local = sums.shape[-1], -(-kept // 2)
    recent = base.positions(n) >= n - local
    want = jnp.full((sums.shape[0], 1, 1), kept - local, jnp.int32)
    return base.slots_of(recent | swap.top_mask(jnp.where(recent, -jnp.inf, sums), want), kept)


def gather(codec, x, pos) -> jax.Array:
    """Rows `pos` [B, 1, c] of token-major x [B, S, N, H], which is K or V, as a head-major array [B, N, c, H]."""
    return codec.take(x, pos)


def qk(codec, q, k) -> jax.Array:
    """q [B, N, 1, H], k [B, N, c, H] -> logits [B, N, 1, c] float32."""
    return codec.logits(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k)


def softmax(z) -> jax.Array:
    """Over the last axis."""
    return jax.nn.softmax(z, axis=-1)


def awv(codec, p, v) -> jax.Array:
    """p [B, N, 1, c], v [B, N, c, H] -> [B, N, 1, H] float32."""
    return codec.mix(p, v)


def local_sum(rows) -> jax.Array:
    """Weights [B, N, c, c] of c rows -> [B, c], summed over rows and heads."""
    return jnp.sum(rows, axis=(1, 2))


def separate(state, shape: Shape, kept: int, q: jax.Array, repeats: int) -> tuple[dict[str, list[float]], jax.Array]:
    """Seconds of each operation of the paper's way on the first n tokens of `state`, and what attention gives [B, N, 1, H].

    q [B, N, 1, H]. A dense `state` has no sums to select by: its slots are attended as they lie.
    """
    codec, found = state.spec.codec, {}

    def run(name: str, function: Callable, *args):
        function, found[name] = jax.jit(function), []
        for _ in range(WARM_UP + repeats):
            out = None  # a call finds the memory of the call before it free
            out, seconds = timing.timed(function, *args)
            found[name].append(seconds)
        found[name] = found[name][WARM_UP:]
        return out

    if state.store is None:
        k, v = (jax.block_until_ready(x[:, :, : shape.tokens]) for x in (state.ws.k, state.ws.v))
    else:
        sums = state.stats.sums.hi[:, :, : shape.tokens]
        pos = run("selection", functools.partial(selection, kept=kept), sums)
        k = run("k", functools.partial(gather, codec), state.store.k, pos)
        v = run("v", functools.partial(gather, codec), state.store.v, pos)
        found["gather"] = [sum(pair) for pair in zip(found.pop("k"), found.pop("v"), strict=True)]
    z = run("qk", functools.partial(qk, codec), q, k)
    p = run("softmax", softmax, z)
    out = run("awv", functools.partial(awv, codec), p, v)
    if state.store is not None:
        del k, v
        run("local_sum", local_sum, jax.block_until_ready(jnp.tile(p, (1, 1, kept, 1))))
    return found, out


# ---- ours


def beginning(policy, past: Past, start: int, context: int) -> Callable:
    """A function that makes the state after a dense prompt of `start` tokens of `past`, with room for `context`."""
    B, _, N, H = past.q.shape
    kind, codec = dtype(), Raw(dtype())
    spec = LayerSpec(policy, codec, "working_set")
    dims = attention.dims_of(spec, B, N, N, context)

    @jax.jit
    def prompt(q, k, v):
        return attention.prefill(attention.init(spec, dims, H), q, k, v, jnp.full((B,), start, jnp.int32))[1]

    return lambda: jax.block_until_ready(prompt(*(jnp.asarray(x[:, :context], kind) for x in past)))


def append(state, k, v):
    """The state with a token more, k and v [B, N, H], and its slot [B, 1]."""
    codec = state.spec.codec
    codes = codec.encode_token(state.ws.k, k), codec.encode_token(state.ws.v, v)
    store = None if state.store is None else state.store.append(codec, *codes, state.length)
    ws, slot = state.ws.append(codec, *codes, state.length)
    return state.replace(ws=ws, store=store), slot


def attended(state, q):
    """q [B, N, H] -> out [B, N, 1, H] float32 and the mass [B, 1, M] of the slots."""
    spec, ws = state.spec, state.ws
    part, mass = compute.slots(spec.codec, q[:, :, None], ws.k, ws.v, ws.bias, spec.impl)
    return part.out, mass


def observe(state, slot, mass):
    """The state when its policy has taken in the step."""
    stats = state.spec.policy.observe(state.stats, mass, state.ws.pos, slot, state.length)
    return state.replace(stats=stats, length=state.length + 1)


def exchange(state):
    """The state with the set for the next query, and the rows that were moved for it [B]."""
    ((state,),), ((loads,),) = attention.exchange_sets([(state,)], [state.ws.bias])
    return state, loads


def own_parts(state, columns: Iterable[tuple[jax.Array, ...]]) -> tuple[dict[str, list[float]], list, object]:
    """Feed q, k, v [B, N, H] of each step in parts: seconds of each, (out, loads) of each step, and the last state."""
    taken, shown = {name: [] for name in PARTS}, []
    run = {"append": append, "observe": observe, "exchange": exchange}
    run = {name: jax.jit(function, donate_argnums=0) for name, function in run.items()} | {"attend": jax.jit(attended)}

    def timed(name: str, *args):
        out, seconds = timing.timed(run[name], *args)
        taken[name].append(seconds)
        return out

    for q, k, v in columns:
        state, slot = timed("append", state, k, v)
        out, mass = timed("attend", state, q)
        state = timed("observe", state, slot, mass)
        state, loads = timed("exchange", state)
        shown.append((out, loads))
    return taken, shown, state


def own_steps(state, columns: Iterable[tuple[jax.Array, ...]]) -> tuple[list[float], list]:
    """The same in one program a step: seconds, and (out, loads) of each step."""

    def step(state, q, k, v):
        out, state, taps = attention.step(state, q, k, v)
        return state, (out, taps.loads)

    step, seconds, shown = jax.jit(step, donate_argnums=0), [], []
    for column in columns:
        (state, seen), taken = timing.timed(step, state, *column)
        seconds.append(taken)
        shown.append(seen)
    return seconds, shown


def amounts(shape: Shape, kept: int, slots: int, context: int, loads: float, element_bytes: int) -> dict[str, Amount]:
    """What each operation moves and does; `loads`: rows of a step that an exchange moves, over the whole batch."""
    B, n, N, H = shape
    row, weights = element_bytes * N * H, LOGIT_BYTES * B * N
    query, out = element_bytes * B * N * H, LOGIT_BYTES * B * N * H
    macs = B * N * kept * H
    return {
        "qk": Amount(query + B * kept * row + weights * kept, macs),
        "softmax": Amount(2 * weights * kept),
        "awv": Amount(weights * kept + B * kept * row + out, macs),
        "local_sum": Amount(weights * kept**2 + LOGIT_BYTES * B * kept, adds=B * N * kept**2),
        "selection": Amount(B * (LOGIT_BYTES * n + INDEX_BYTES * kept)),
        "gather": Amount(2 * 2 * B * kept * row + INDEX_BYTES * B * kept),
        "append": Amount(2 * (2 if kept < n else 1) * B * row + 2 * B * row),
        # the bias comes in, the mass goes out
        "attend": Amount(query + 2 * B * slots * row + out + 2 * LOGIT_BYTES * B * slots, 2 * B * N * slots * H),
        # mass, slots of tokens, sums as pairs and the leaving row come in; a row and the sums go out
        "observe": Amount(LOGIT_BYTES * B * (slots + 7 * context), adds=2 * B * context),
        "exchange": Amount(LOGIT_BYTES * B * (2 * slots + 2 * context) + round(2 * 2 * loads * row)),
    }


def measure(shape: Shape, kv_sparsity: float, past: Past, repeats: int) -> dict:
    """Values of one cell: seconds (median, quartiles), bytes, multiply-adds and additions of each operation and of our step.

    kv_sparsity 0 is dense. past: of at least `context_tokens` tokens and of any heads.
    """
    policy = policies.Swa(kv_sparsity=kv_sparsity) if kv_sparsity else policies.Dense()
    kept = kept_tokens(shape.tokens, kv_sparsity)
    context = context_tokens(shape.tokens, repeats)
    start = shape.tokens - repeats // 2 - WARM_UP
    past, kind = stretched(past, shape.heads, shape.head_dim), dtype()
    columns = [tuple(jnp.asarray(x[:, t], kind) for x in past) for t in range(start, start + WARM_UP + repeats)]

    begin = beginning(policy, past, start, context)
    step_s, _ = own_steps(begin(), columns)
    parts_s, shown, state = own_parts(begin(), columns)
    slots, element_bytes = state.ws.pos.shape[-1], state.ws.k.dtype.itemsize
    separate_s, _ = separate(state, shape, kept, columns[WARM_UP + repeats // 2][0][:, :, None], repeats)
    loads = [float(np.asarray(moved).sum()) for _, moved in shown[WARM_UP:]]

    used = [name for name in PARTS if policy.selects or name in ("append", "attend")]
    parts_s = {name: parts_s[name][WARM_UP:] for name in used}
    seconds = separate_s | parts_s | {"step": step_s[WARM_UP:]}
    seconds["parts"] = [sum(one) for one in zip(*parts_s.values(), strict=True)]
    needs = amounts(shape, kept, slots, context, statistics.mean(loads), element_bytes)
    whole = [needs[name] for name in used]
    needs["step"] = needs["parts"] = Amount(*(sum(column) for column in zip(*whole, strict=True)))
    values = {
        "kept_tokens": kept,
        "slots": slots,
        "gathered_rows": kept if kv_sparsity else 0,
        "moved_rows": statistics.mean(loads) / shape.batch,
        "paper_way_s": sum(statistics.median(separate_s[name]) for name in PAPER_WAY if name in separate_s),
    }
    for name, times in seconds.items():
        values |= {
            f"{name}_s": statistics.median(times),
            f"{name}_s_quartiles": [float(x) for x in np.percentile(times, [25, 75])],
            f"{name}_bytes": needs[name].bytes,
            f"{name}_macs": needs[name].macs,
            f"{name}_adds": needs[name].adds,
        }
    return values
