"""Causal attention of prompts, whole or a chunk of queries after the other.

For sequence b of length[b] tokens, query head n of kv head h = n // (N / K), and query row i, which
stands at position t = first[b] + i, 0 <= t < length[b]:

    z_ij = q[b, i, n] . k[b, j, h] / sqrt(H) for j <= t
    lse[b, i, n] = log sum_j exp(z_ij)
    out[b, i, n] = sum_j exp(z_ij - lse[b, i, n]) v[b, j, h]

q [B, C, N, H]; k, v [B, T, K, H]; length, first [B] int32. Keys from min(length, first + C) on are
not read. No C x T array is ever held.

For C queries after f tokens `flash_prefill` does 4 B N H C (f + C / 2) FLOPs, moves
B (C N + 2 (f + C) K) H elements and writes 4 B C N (H + 1) bytes: 2 B N H T^2 FLOPs and
B T (N + 2 K) H elements for full prompts. K and V are read again for each tile of queries, as a
rule from cache; queries are in the hundreds, so arithmetic is the limit. A program keeps a tile of
queries of one head and passes over the keys before it with the running softmax of `online.py`. Key
tiles that end before the first query need no mask, those that begin after the last are skipped; the
longest programs start first.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import backend, online, prompts
from pallas_kernels.partial import Partial, empty, merge, softmax
from pallas_kernels.tilings import PrefillTiling as Tiling

_LOG2_E = math.log2(math.e)

# ---- in plain jnp


def reference(q, k, v, length=None, *, first=None) -> Partial:
    """`flash_prefill` in plain jnp, a block of queries after the other.

    A long prompt is cut in `_parts`, whose queries pass over the keys up to the part's end, so that
    few keys behind a query are looked at. Chunks pass over blocks of keys.
    """
    first = prompts.firsts(q, k, first)
    length = prompts.lengths(k, length)
    return _whole(q, k, v, length) if first is None else _chunk(q, k, v, length, first)


def _whole(q, k, v, length) -> Partial:
    B, T, N, _ = q.shape
    K = k.shape[2]
    size = min(T, prompts.QUERY_BLOCK)
    real = jnp.arange(T, dtype=jnp.int32)[None] < length[:, None]
    # padding may hold anything, and 0 * nan is nan
    v = jnp.where(real[..., None, None], v, jnp.zeros((), v.dtype))
    # not in the loop, where it would be done for each block
    keys = jnp.swapaxes(k, 1, 2)
    values = jnp.swapaxes(v, 1, 2)
    count = -(-T // size)
    parts, found = _parts(count), []
    for part in range(parts):
        low, high = count * part // parts, count * (part + 1) // parts
        end = min(T, high * size)

        def block(_, i, end=end):
            at = i * size + jax.lax.broadcasted_iota(jnp.int32, (B, size), 1)
            queries = prompts.gathered(q, at, length, K, k.dtype)
            piece = _attended(prompts.logits(queries, keys[:, :, :end]), values[:, :, :end])
            return None, _by_token(piece, N)

        found.append(jax.lax.scan(block, None, jnp.arange(low, high, dtype=jnp.int32))[1])
    outs, lses = zip(*found, strict=True)
    out = jnp.concatenate(outs) if parts > 1 else outs[0]
    lse = jnp.concatenate(lses) if parts > 1 else lses[0]
    return _in_order(Partial(out, lse), T)


def _chunk(q, k, v, length, first) -> Partial:
    B, C, N, H = q.shape
    K = k.shape[2]
    size = min(C, prompts.QUERY_BLOCK)
    length = jnp.minimum(length, first + C)

    def block(_, i):
        at = first[:, None] + i * size + jax.lax.broadcasted_iota(jnp.int32, (B, size), 1)
        queries = prompts.gathered(q, at, length, K, k.dtype, first)

        def visit(before, start, key):
            z = prompts.logits(queries, prompts.key_block(k, start, key.size), key)
            real = (key[None] < length[:, None])[:, None, :, None]
            values = jnp.where(real, prompts.key_block(v, start, key.size), jnp.zeros((), v.dtype))
            return merge(before, _attended(z, values))

        none = empty((B, K, N // K, size), H)
        return None, _by_token(prompts.over_keys(queries, k.shape[1], visit, none), N)

    count = -(-C // size)
    found = jax.lax.scan(block, None, jnp.arange(count, dtype=jnp.int32))[1]
    return _in_order(found, C)


def _attended(z, values) -> Partial:
    """Attention with logits z [B, K, G, Q, T] over values [B, K, T, H]."""
    e, total, lse = softmax(z)
    out = jnp.einsum(
        "bkgqt,bkth->bkgqh", e.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return Partial(out / total, lse)


def _by_token(piece: Partial, N: int) -> Partial:
    """[B, K, G, Q, ...] as [B, Q, N, ...]."""
    B, _, _, Q, H = piece.out.shape
    out = jnp.moveaxis(piece.out, 3, 1)
    lse = jnp.moveaxis(piece.lse, 3, 1)
    return Partial(out.reshape(B, Q, N, H), lse.reshape(B, Q, N))


def _in_order(blocks: Partial, tokens: int) -> Partial:
    """Blocks of queries [blocks, B, Q, ...] as [B, tokens, ...]."""

    def joined(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]

    return Partial(joined(blocks.out), joined(blocks.lse))


def _parts(blocks: int) -> int:
    """In how many parts a prompt of so many blocks of queries is cut: each is a loop to compile."""
    return 1 if blocks < 8 else 4


# ---- the kernel


def _attend_kernel(*refs, C, H, rows, tiles):
    """One tile of queries of one head.

    After the first tile of keys every maximum is finite, also in rows of queries that do not exist:
    key 0 is before every query, or taken to be.
    """
    length_ref, *first_ref, q_ref, k_ref, v_ref, out_ref, lse_ref = refs
    Q, Hp = q_ref.shape
    length = length_ref[...]
    low = (tiles - 1 - pl.program_id(0)) * Q
    high = low + Q
    row = low + jax.lax.broadcasted_iota(jnp.int32, (Q,), 0)
    at = row
    real = at < length
    if first_ref:
        first = first_ref[0][...]
        length = jnp.minimum(length, first + C)
        real = (first + row >= 0) & (first + row < length)
        low, high = jnp.maximum(first + low, 0), first + high
        at = jnp.maximum(first + row, 0)
    channel = jax.lax.broadcasted_iota(jnp.int32, (1, Hp), 1) < H
    q = backend.load(q_ref, mask=real[:, None] & channel, other=0).astype(k_ref.dtype)

    def tile(j, carry, masked: bool):
        o, m, l = carry
        span = pl.ds(j * rows, rows)
        key = j * rows + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
        wanted = (
            channel & (key < length)[:, None] if masked else jnp.broadcast_to(channel, (rows, Hp))
        )
        z = backend.dot(q, backend.load(k_ref.at[span], mask=wanted, other=0), trans_b=True) * (
            H**-0.5 * _LOG2_E
        )
        if masked:
            z = jnp.where((key[None] <= at[:, None]) & (key < length)[None], z, -jnp.inf)
        m2 = jnp.maximum(m, jnp.max(z, axis=1))
        p, old = jnp.exp2(z - m2[:, None]), jnp.exp2(m - m2)
        v = backend.load(v_ref.at[span], mask=wanted, other=0)
        o = o * old[:, None] + backend.dot(p.astype(v.dtype), v)
        return o, m2, old * l + jnp.sum(p, axis=1)

    end = jnp.where(low < length, (jnp.minimum(high, length) + rows - 1) // rows, 0)
    plain = jnp.minimum((low + 1) // rows, end)  # tiles that end before every query
    carry = (
        jnp.zeros((Q, Hp), jnp.float32),
        jnp.full((Q,), -jnp.inf, jnp.float32),
        jnp.zeros((Q,), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, plain, functools.partial(tile, masked=False), carry)
    o, m, l = jax.lax.fori_loop(plain, end, functools.partial(tile, masked=True), carry)
    l = jnp.where(l == 0, 1.0, l)
    out = jnp.where(real[:, None], o / l[:, None], 0.0)
    backend.store(out_ref, out, mask=(row < C)[:, None] & channel)
    backend.store(
        lse_ref, jnp.where(real, m * (1.0 / _LOG2_E) + jnp.log(l), -jnp.inf), mask=row < C
    )


# ---- what is called


def flash_prefill(
    q, k, v, length=None, *, first=None, impl: str = "auto", tiling: Tiling | None = None
) -> Partial:
    """Causal attention of q [B, C, N, H], unscaled, over k and v [B, T, K, H].

    length: [B] int32, tokens of each prompt; None: T. first: [B] int32, position of each sequence's
    first query, which may be negative; None: 0, and C <= T. Returns
    `Partial(out [B, C, N, H], lse [B, C, N])` float32; queries before position 0 and behind a
    prompt have out = 0 and lse = -inf. Products of half-precision inputs run in their type, all
    else in float32. impl: see `backend`. Raises ValueError for shapes that do not go together and
    for a named `impl` that cannot run.
    """
    prompts.check(q, k, v, length, first)
    choice = backend.choose(impl, online.why_not(q=q, k=k, v=v))
    if choice.impl == "xla":
        return reference(q, k, v, length, first=first)
    B, C, N, H = q.shape
    T, K = k.shape[1:3]
    G = N // K
    tiling, Hp = prompts.tiling_of(q, k, tiling), max(16, backend.power_of_two(H))
    Q = max(16, min(tiling.queries, backend.power_of_two(C)))
    rows = max(16, min(tiling.rows, backend.power_of_two(T)))
    tiles = -(-C // Q)
    first = prompts.firsts(q, k, first)
    spans = [prompts.lengths(k, length), *([] if first is None else [first])]
    number = pl.BlockSpec((None,), lambda i, n, b: (b,))
    query = pl.BlockSpec((None, Q, None, Hp), lambda i, n, b: (b, tiles - 1 - i, n, 0))
    whole = pl.BlockSpec((None, T, None, Hp), lambda i, n, b: (b, 0, n // G, 0))
    return Partial(
        *backend.call(
            functools.partial(_attend_kernel, C=C, H=H, rows=rows, tiles=tiles),
            name="flash_prefill",
            impl=choice.impl,
            warps=tiling.warps,
            stages=tiling.stages,
            grid=(tiles, N, B),
            in_specs=[*[number] * len(spans), query, whole, whole],
            out_specs=[query, pl.BlockSpec((None, Q, None), lambda i, n, b: (b, tiles - 1 - i, n))],
            out_shape=[
                jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, q.shape[:3])
            ],
        )(*spans, q, k, v)
    )
