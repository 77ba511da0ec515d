"""The attention that each token of a prompt got: a second pass after `flash_prefill`.

With z, first, length and lse as there, and w_tj = exp(z_tj - lse_t) for the query at position t,

    rows[b, p, r, j] = sum of w_tj over the heads of group p, for t = length[b] - W + r
    sum[b, p, j] = sum of rows[b, p, r, j] over r

q [B, C, N, H]; k [B, T, K, H]; lse [B, C, N]; length, first [B] int32. Queries that are not given,
before 0 and outside first .. first + C - 1, have no weights. So sums of the chunks of a prompt add
up to the prompt's sum, and the last W queries, first = length - W, give all of its rows.

Rows take 2 B N H W T FLOPs (half of that for W = T), read B (W N + T K) H elements and write
4 B P W T bytes. The sum of C queries after f tokens takes 2 B N H C (f + C / 2) FLOPs, reads
B (C N + T K) H elements and writes 4 B N T bytes. Given the lse no tile of weights depends on
another. For rows a program makes one tile of queries and keys and passes over the heads of its
group; for the sum it keeps a tile of keys and passes over the queries of one head, and the heads of
a group are added afterwards. Both add in registers: there are no atomics.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import backend, online, prompts
from pallas_kernels.partial import weight
from pallas_kernels.tilings import PrefillTiling as Tiling

_LOG2_E = math.log2(math.e)


def reference(
    q,
    k,
    lse,
    length=None,
    *,
    first=None,
    queries: int | None = None,
    heads: int = 1,
    reduce: str = "rows",
):
    """`prompt_mass` in plain jnp, a block of queries after the other."""
    B, C, N, _ = q.shape
    T, K = k.shape[1:3]
    P = heads
    W = _last(q, k, queries, reduce)
    length, first = prompts.lengths(k, length), prompts.firsts(q, k, first)
    if first is not None and reduce == "sum":
        return _chunk_sum(q, k, lse, length, first, W, P)
    size = min(W, prompts.QUERY_BLOCK)
    count = -(-W // size)
    ahead = count * size - W  # rows of the first block that nobody asked for
    keys = jnp.swapaxes(k, 1, 2)

    def block(total, i):
        row = i * size - ahead + jax.lax.broadcasted_iota(jnp.int32, (B, size), 1)
        at = jnp.where(row >= 0, length[:, None] - W + row, -1)
        queries = prompts.gathered(q, at, length, K, k.dtype, first, lse)
        w = weight(prompts.logits(queries, keys), queries.lse)
        w = jnp.sum(w.reshape(B, P, N // P, size, T), axis=2)
        return (total, w) if reduce == "rows" else (total + jnp.sum(w, axis=2), None)

    zero = jnp.zeros((B, P, T if reduce == "sum" else 0), jnp.float32)
    total, rows = jax.lax.scan(block, zero, jnp.arange(count, dtype=jnp.int32))
    if reduce == "sum":
        return total
    return jnp.moveaxis(rows, 0, 2).reshape(B, P, count * size, T)[:, :, ahead:]


def _chunk_sum(q, k, lse, length, first, W: int, P: int):
    """The sum [B, P, T] over given queries: blocks of keys behind them are not looked at."""
    B, C, N, _ = q.shape
    T, K = k.shape[1:3]
    size = min(C, prompts.QUERY_BLOCK)

    def block(total, i):
        at = first[:, None] + i * size + jax.lax.broadcasted_iota(jnp.int32, (B, size), 1)
        at = jnp.where(at >= length[:, None] - W, at, -1)
        queries = prompts.gathered(q, at, length, K, k.dtype, first, lse)

        def visit(total, start, key):
            z = prompts.logits(queries, prompts.key_block(k, start, key.size), key)
            w = weight(z, queries.lse).reshape(B, P, N // P * size, key.size)
            new = jax.lax.dynamic_slice_in_dim(total, start, key.size, 2) + jnp.sum(w, axis=2)
            return jax.lax.dynamic_update_slice_in_dim(total, new, start, 2)

        return prompts.over_keys(queries, T, visit, total), None

    zero = jnp.zeros((B, P, T), jnp.float32)
    return jax.lax.scan(block, zero, jnp.arange(-(-C // size), dtype=jnp.int32))[0]


def _mass_kernel(*refs, C, T, H, G, W, Q, heads, summed):
    """Weights of a tile of keys.

    Summed over the `heads` of a group for a tile of queries, or over all queries of a head.
    """
    length_ref, *first_ref, q_ref, k_ref, lse_ref, out_ref = refs
    rows, _, Hp = k_ref.shape
    length = length_ref[...]
    start = length - W + pl.program_id(1) * Q
    begin = 0  # position of the first query that is given, and
    shift = 0  # that of row 0, which may be negative
    if first_ref:
        shift = first_ref[0][...]
        begin = jnp.maximum(shift, 0)
        length = jnp.minimum(length, shift + C)
    first = pl.program_id(0) * rows
    key = first + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
    channel = jax.lax.broadcasted_iota(jnp.int32, (rows, Hp), 1)
    channels = jax.lax.broadcasted_iota(jnp.int32, (Q, Hp), 1)
    head = pl.program_id(2) * heads
    low = jnp.maximum(jnp.maximum(start, first), begin) if summed else start  # the first query

    def keys(head):
        place = (
            jax.lax.broadcasted_iota(jnp.int32, (rows, Hp), 0),
            jnp.full((rows, Hp), head // G),
            channel,
        )
        return backend.load(k_ref.at[place], mask=(key < length)[:, None] & (channel < H), other=0)

    k = keys(head) if summed else None

    def tile(n, total):
        h, k_tile = (head, k) if summed else (head + n, keys(head + n))
        at = (low + n * Q if summed else low) + jax.lax.broadcasted_iota(jnp.int32, (Q,), 0)
        real = (at >= begin) & (at < length)
        row = jnp.where(real, at - shift, 0)
        place = jnp.broadcast_to(row[:, None], (Q, Hp)), jnp.full((Q, Hp), h), channels
        q = backend.load(q_ref.at[place], mask=real[:, None] & (channels < H), other=0)
        norm = backend.load(lse_ref.at[(row, jnp.full((Q,), h))], mask=real, other=0.0)
        z = backend.dot(q.astype(k_tile.dtype), k_tile, trans_b=True) * (H**-0.5 * _LOG2_E)
        seen = real[:, None] & (key[None] <= at[:, None])
        return total + jnp.where(seen, jnp.exp2(z - norm[:, None] * _LOG2_E), 0.0)

    if summed:
        steps = jnp.maximum(length - low + Q - 1, 0) // Q
    else:
        # none where all keys are in the future
        steps = (jnp.minimum(low + Q, length) > first).astype(jnp.int32) * heads
    total = jax.lax.fori_loop(0, steps, tile, jnp.zeros((Q, rows), jnp.float32))
    if summed:
        backend.store(out_ref, jnp.sum(total, axis=0), mask=key < T)
    else:
        row = pl.program_id(1) * Q + jax.lax.broadcasted_iota(jnp.int32, (Q,), 0)
        backend.store(out_ref, total, mask=(row < W)[:, None] & (key < T)[None])


def prompt_mass(
    q,
    k,
    lse,
    length=None,
    *,
    first=None,
    queries: int | None = None,
    heads: int = 1,
    reduce: str = "rows",
    impl: str = "auto",
    tiling: Tiling | None = None,
) -> jax.Array:
    """Softmax weights of each prompt's last W = `queries` queries, summed over heads of P groups.

    q [B, C, N, H] unscaled, k [B, T, K, H], length and first [B] as `flash_prefill` got them, lse
    [B, C, N] float32 as it returned it. queries: may exceed C; None: C for rows, all that are given
    for the sum. heads: P; 1 for the sum over all heads, K for the query heads of each kv head, N
    for every head by itself. Returns float32: for reduce="rows" [B, P, W, T], where the last row is
    that of the query at length - 1 and rows of queries that are not given are zero; for
    reduce="sum" their sum [B, P, T]. A row that is not zero sums to N / P. impl: see `backend`.
    Raises ValueError for shapes and options that do not go together, and for a named `impl` that
    cannot run.
    """
    prompts.check(q, k, None, length, first)
    B, C, N, H = q.shape
    T, K = k.shape[1:3]
    P = heads
    if lse.shape != (B, C, N) or lse.dtype != jnp.float32:
        raise ValueError(
            f"lse is float32 [B, C, N] = {(B, C, N)}; got {lse.dtype.name} {lse.shape}"
        )
    if P < 1 or N % P:
        raise ValueError(f"heads is a number of groups that divides N = {N}; got {heads}")
    if queries is not None and queries < 1:
        raise ValueError(f"queries is 1 or more, or None for all; got {queries}")
    if reduce not in ("rows", "sum"):
        raise ValueError(f"reduce must be rows or sum; got {reduce!r}")
    choice = backend.choose(impl, online.why_not(q=q, k=k))
    if choice.impl == "xla":
        return reference(
            q, k, lse, length, first=first, queries=queries, heads=heads, reduce=reduce
        )
    summed, W = reduce == "sum", _last(q, k, queries, reduce)
    first = prompts.firsts(q, k, first)
    spans = [prompts.lengths(k, length), *([] if first is None else [first])]
    tiling, Hp = prompts.tiling_of(q, k, tiling), max(16, backend.power_of_two(H))
    Q = max(16, min(tiling.queries, backend.power_of_two(W)))
    rows = max(16, min(tiling.rows, backend.power_of_two(T)))
    if summed:
        tiles = 1
        groups = N
        shape = (B, N, T)
        made = pl.BlockSpec((None, None, rows), lambda j, i, p, b: (b, p, j))
    else:
        tiles = -(-W // Q)
        groups = P
        shape = (B, P, W, T)
        made = pl.BlockSpec((None, None, Q, rows), lambda j, i, p, b: (b, p, i, j))
    found = backend.call(
        functools.partial(
            _mass_kernel, C=C, T=T, H=H, G=N // K, W=W, Q=Q, heads=N // groups, summed=summed
        ),
        name=f"prompt_mass_{reduce}",
        impl=choice.impl,
        warps=tiling.warps,
        stages=tiling.stages,
        grid=(-(-T // rows), tiles, groups, B),
        in_specs=[
            *[pl.BlockSpec((None,), lambda j, i, p, b: (b,))] * len(spans),
            pl.BlockSpec((None, C, N, Hp), lambda j, i, p, b: (b, 0, 0, 0)),
            pl.BlockSpec((None, rows, K, Hp), lambda j, i, p, b: (b, j, 0, 0)),
            pl.BlockSpec((None, C, N), lambda j, i, p, b: (b, 0, 0)),
        ],
        out_specs=made,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    )(*spans, q, k, lse)
    return jnp.sum(found.reshape(B, P, N // P, T), axis=2) if summed else found


def _last(q, k, queries: int | None, reduce: str) -> int:
    """W: the rows that are wanted, or a bound that no prompt exceeds for a sum of all."""
    if queries is not None:
        return queries
    return q.shape[1] if reduce == "rows" else k.shape[1]
