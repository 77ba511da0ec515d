"""Causal attention of prompts, and a second pass that sums the attention each token got.

For sequence b of length[b] tokens, query head n of kv head h = n // (N / K), query i < length[b]:

    z_ij = q[b, i, n] . k[b, j, h] / sqrt(H) for j <= i      lse[b, i, n] = log sum_j exp(z_ij)
    out[b, i, n] = sum_j w_ij v[b, j, h]                     w_ij = exp(z_ij - lse[b, i, n])
    rows[b, p, r, j] = sum of w_ij over the heads of group p, i = length[b] - W + r
    sum[b, p, j] = sum_r rows[b, p, r, j]

q [B, T, N, H]; k, v [B, T, K, H]; length [B] int32: prompts begin at position 0, what lies behind
them is not read. The rows of the last W queries seed SWA and SnapKV, the sum over all queries H2O.
No T x T array is ever held.

`flash_prefill` does 2 B N H T^2 FLOPs for full prompts, moves B T (N + 2 K) H elements and writes
4 B T N (H + 1) bytes. K and V are read again for each tile of queries, as a rule from cache; T is
in the hundreds or more, so arithmetic is the limit. A program keeps a tile of queries of one head
and passes over the keys before it with the running softmax of `online.py`. Key tiles that end
before the first query need no mask, those that begin after the last are skipped; the longest
programs start first.

`prompt_mass` does 2 B N H W T FLOPs (half of that for W = T), reads B (W N + T K) H elements and
writes 4 B P W T bytes, or 4 B N T for the sum. Given the lse no tile of weights depends on another.
For rows a program makes one tile of queries and keys and passes over the heads of its group; for
the sum it keeps a tile of keys and passes over the queries of one head, and the heads of a group
are added afterwards. Both add in registers: there are no atomics.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import backend, online
from pallas_kernels.partial import Partial, weight
from pallas_kernels.tilings import PrefillTiling as Tiling
from pallas_kernels.tilings import tiling_for

_QUERY_BLOCK = 128  # of the references
_LOG2_E = math.log2(math.e)

# ---- in plain jnp


def reference(q, k, v, length=None) -> Partial:
    """`flash_prefill` in plain jnp, a block of queries after the other.

    A long prompt is cut in `_parts`, whose queries pass over the keys up to the part's end, so that
    few keys behind a query are looked at.
    """
    B, T, N, H = q.shape
    length = _lengths(q, length)
    size = min(T, _QUERY_BLOCK)
    real = jnp.arange(T, dtype=jnp.int32)[None] < length[:, None]
    # padding may hold anything, and 0 * nan is nan
    v = jnp.where(real[..., None, None], v, jnp.zeros((), v.dtype))
    # not in the loop, where it would be done for each block
    keys = jnp.swapaxes(k, 1, 2)
    values = jnp.swapaxes(v, 1, 2)
    count = -(-T // size)
    parts, found = _parts(count), []
    for part in range(parts):
        first, last = count * part // parts, count * (part + 1) // parts
        end = min(T, last * size)

        def block(_, i, end=end):
            at = i * size + jax.lax.broadcasted_iota(jnp.int32, (B, size), 1)
            z, _ = _logits(q, keys[:, :, :end], at, length)
            top = jnp.max(z, axis=-1, keepdims=True)
            e = jnp.exp(z - jnp.where(top == -jnp.inf, jnp.float32(0.0), top))
            total = jnp.sum(e, axis=-1, keepdims=True)
            out = jnp.einsum(
                "bkgqt,bkth->bkgqh",
                e.astype(v.dtype),
                values[:, :, :end],
                preferred_element_type=jnp.float32,
            )
            out = jnp.moveaxis(out / jnp.where(total == 0, jnp.float32(1.0), total), 3, 1)
            lse = jnp.moveaxis((top + jnp.log(total))[..., 0], 3, 1)
            return None, (out.reshape(B, size, N, H), lse.reshape(B, size, N))

        found.append(jax.lax.scan(block, None, jnp.arange(first, last, dtype=jnp.int32))[1])
    outs, lses = zip(*found, strict=True)
    out = jnp.concatenate(outs) if parts > 1 else outs[0]
    lse = jnp.concatenate(lses) if parts > 1 else lses[0]
    in_order = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T]
    return Partial(in_order(out), in_order(lse))


def _parts(blocks: int) -> int:
    """In how many parts a prompt of so many blocks of queries is cut: each is a loop to compile."""
    return 1 if blocks < 8 else 4


def mass_reference(
    q, k, lse, length=None, *, queries: int | None = None, heads: int = 1, reduce: str = "rows"
):
    """`prompt_mass` in plain jnp, a block of queries after the other."""
    B, T, N, _ = q.shape
    length, P = _lengths(q, length), heads
    W = T if queries is None else queries
    size = min(W, _QUERY_BLOCK)
    count = -(-W // size)
    ahead = count * size - W  # rows of the first block that nobody asked for
    keys = jnp.swapaxes(k, 1, 2)

    def block(total, i):
        row = i * size - ahead + jax.lax.broadcasted_iota(jnp.int32, (B, size), 1)
        z, norm = _logits(q, keys, jnp.where(row >= 0, length[:, None] - W + row, -1), length, lse)
        w = jnp.sum(weight(z, norm).reshape(B, P, N // P, size, T), axis=2)
        return (total, w) if reduce == "rows" else (total + jnp.sum(w, axis=2), None)

    zero = jnp.zeros((B, P, T if reduce == "sum" else 0), jnp.float32)
    total, rows = jax.lax.scan(block, zero, jnp.arange(count, dtype=jnp.int32))
    if reduce == "sum":
        return total
    return jnp.moveaxis(rows, 0, 2).reshape(B, P, count * size, T)[:, :, ahead:]


def _logits(q, keys, at, length, lse=None):
    """Logits [B, K, G, Q, T] float32 of queries at positions `at` [B, Q] for the keys [B, K, T, H].

    -inf where the key comes after the query, and where there is no such query. Also returns the
    rows of `lse` [B, *, N] as [B, K, G, Q, 1].
    """
    B, K, T, H = keys.shape
    N, Q = q.shape[2], at.shape[1]
    b, row = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0), jnp.clip(at, 0, q.shape[1] - 1)
    tiles = jnp.moveaxis(q[b, row].astype(keys.dtype), 1, 2).reshape(B, K, N // K * Q, H)
    z = jnp.einsum(
        "bkqh,bkth->bkqt", tiles, keys, preferred_element_type=jnp.float32
    ) * jnp.float32(H**-0.5)
    real = (at >= 0) & (at < length[:, None])
    seen = real[..., None] & (jnp.arange(T, dtype=jnp.int32)[None, None] <= at[..., None])
    norm = None if lse is None else jnp.moveaxis(lse[b, row].reshape(B, Q, K, N // K, 1), 1, 3)
    return jnp.where(seen[:, None, None], z.reshape(B, K, N // K, Q, T), -jnp.inf), norm


# ---- kernels


def _attend_kernel(length_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, T, H, rows, tiles):
    """One tile of queries of one head.

    After the first tile of keys every maximum is finite, also in rows behind the prompt, since key
    0 is before every query.
    """
    Q, Hp = q_ref.shape
    length = length_ref[...]
    first = (tiles - 1 - pl.program_id(0)) * Q
    at = first + jax.lax.broadcasted_iota(jnp.int32, (Q,), 0)
    channel = jax.lax.broadcasted_iota(jnp.int32, (1, Hp), 1) < H
    q = backend.load(q_ref, mask=(at < length)[:, None] & channel, other=0).astype(k_ref.dtype)

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

    end = jnp.where(first < length, (jnp.minimum(first + Q, length) + rows - 1) // rows, 0)
    plain = jnp.minimum((first + 1) // rows, end)  # tiles that end before every query
    carry = (
        jnp.zeros((Q, Hp), jnp.float32),
        jnp.full((Q,), -jnp.inf, jnp.float32),
        jnp.zeros((Q,), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, plain, functools.partial(tile, masked=False), carry)
    o, m, l = jax.lax.fori_loop(plain, end, functools.partial(tile, masked=True), carry)
    l = jnp.where(l == 0, 1.0, l)
    real = at < length
    out = jnp.where(real[:, None], o / l[:, None], 0.0)
    backend.store(out_ref, out, mask=(at < T)[:, None] & channel)
    backend.store(lse_ref, jnp.where(real, m * (1.0 / _LOG2_E) + jnp.log(l), -jnp.inf), mask=at < T)


def _mass_kernel(length_ref, q_ref, k_ref, lse_ref, out_ref, *, T, H, G, W, Q, heads, summed):
    """Weights of a tile of keys.

    Summed over the `heads` of a group for a tile of queries, or over all queries of a head.
    """
    rows, _, Hp = k_ref.shape
    length = length_ref[...]
    first = pl.program_id(0) * rows
    key = first + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
    channel = jax.lax.broadcasted_iota(jnp.int32, (rows, Hp), 1)
    channels = jax.lax.broadcasted_iota(jnp.int32, (Q, Hp), 1)
    head = pl.program_id(2) * heads
    start = length - W + pl.program_id(1) * Q
    low = jnp.maximum(jnp.maximum(start, first), 0) if summed else start  # the first query

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
        real = (at >= 0) & (at < length)
        row = jnp.where(real, at, 0)
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


# ---- what is called


def flash_prefill(
    q, k, v, length=None, *, impl: str = "auto", tiling: Tiling | None = None
) -> Partial:
    """Causal attention of q [B, T, N, H], unscaled, over k and v [B, T, K, H].

    length: [B] int32, tokens of each prompt; None: T. Returns
    `Partial(out [B, T, N, H], lse [B, T, N])` float32; rows behind a prompt have out = 0 and
    lse = -inf. Products of half-precision inputs run in their type, all else in float32. impl: see
    `backend`. Raises ValueError for shapes that do not go together and for a named `impl` that
    cannot run.
    """
    _check(q, k, v, length)
    choice = backend.choose(impl, online.why_not(q=q, k=k, v=v))
    if choice.impl == "xla":
        return reference(q, k, v, length)
    B, T, N, H = q.shape
    G = N // k.shape[2]
    tiling, Hp = _tiling(q, k, tiling), max(16, backend.power_of_two(H))
    Q = max(16, min(tiling.queries, backend.power_of_two(T)))
    rows = max(16, min(tiling.rows, backend.power_of_two(T)))
    tiles = -(-T // Q)
    query = pl.BlockSpec((None, Q, None, Hp), lambda i, n, b: (b, tiles - 1 - i, n, 0))
    whole = pl.BlockSpec((None, T, None, Hp), lambda i, n, b: (b, 0, n // G, 0))
    return Partial(
        *backend.call(
            functools.partial(_attend_kernel, T=T, H=H, rows=rows, tiles=tiles),
            name="flash_prefill",
            impl=choice.impl,
            warps=tiling.warps,
            stages=tiling.stages,
            grid=(tiles, N, B),
            in_specs=[pl.BlockSpec((None,), lambda i, n, b: (b,)), query, whole, whole],
            out_specs=[query, pl.BlockSpec((None, Q, None), lambda i, n, b: (b, tiles - 1 - i, n))],
            out_shape=[
                jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, q.shape[:3])
            ],
        )(_lengths(q, length), q, k, v)
    )


def prompt_mass(
    q,
    k,
    lse,
    length=None,
    *,
    queries: int | None = None,
    heads: int = 1,
    reduce: str = "rows",
    impl: str = "auto",
    tiling: Tiling | None = None,
) -> jax.Array:
    """Softmax weights of each prompt's last W = `queries` queries, summed over heads of P groups.

    q [B, T, N, H] unscaled, k [B, T, K, H] and length [B] as `flash_prefill` got them, lse
    [B, T, N] float32 as it returned it. queries: None for all T; may exceed T. heads: P; 1 for the
    sum over all heads, K for the query heads of each kv head, N for every head by itself. Returns
    float32: for reduce="rows" [B, P, W, T], where the last row is the last query's and rows before
    the first query are zero; for reduce="sum" their sum [B, P, T]. A row that is not zero sums to
    N / P. impl: see `backend`. Raises ValueError for shapes and options that do not go together,
    and for a named `impl` that cannot run.
    """
    _check(q, k, None, length)
    B, T, N, H = q.shape
    P, W = heads, T if queries is None else queries
    if lse.shape != (B, T, N) or lse.dtype != jnp.float32:
        raise ValueError(
            f"lse is float32 [B, T, N] = {(B, T, N)}; got {lse.dtype.name} {lse.shape}"
        )
    if P < 1 or N % P:
        raise ValueError(f"heads is a number of groups that divides N = {N}; got {heads}")
    if W < 1:
        raise ValueError(f"queries is 1 or more, or None for all; got {queries}")
    if reduce not in ("rows", "sum"):
        raise ValueError(f"reduce must be rows or sum; got {reduce!r}")
    choice = backend.choose(impl, online.why_not(q=q, k=k))
    if choice.impl == "xla":
        return mass_reference(q, k, lse, length, queries=queries, heads=heads, reduce=reduce)
    summed, K = reduce == "sum", k.shape[2]
    tiling, Hp = _tiling(q, k, tiling), max(16, backend.power_of_two(H))
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
            _mass_kernel, T=T, H=H, G=N // K, W=W, Q=Q, heads=N // groups, summed=summed
        ),
        name=f"prompt_mass_{reduce}",
        impl=choice.impl,
        warps=tiling.warps,
        stages=tiling.stages,
        grid=(-(-T // rows), tiles, groups, B),
        in_specs=[
            pl.BlockSpec((None,), lambda j, i, p, b: (b,)),
            pl.BlockSpec((None, T, N, Hp), lambda j, i, p, b: (b, 0, 0, 0)),
            pl.BlockSpec((None, rows, K, Hp), lambda j, i, p, b: (b, j, 0, 0)),
            pl.BlockSpec((None, T, N), lambda j, i, p, b: (b, 0, 0)),
        ],
        out_specs=made,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    )(_lengths(q, length), q, k, lse)
    return jnp.sum(found.reshape(B, P, N // P, T), axis=2) if summed else found


def _lengths(q, length):
    """[B] int32 within [0, T]."""
    B, T = q.shape[:2]
    return (
        jnp.full((B,), T, jnp.int32) if length is None else jnp.clip(length.astype(jnp.int32), 0, T)
    )


def _tiling(q, k, tiling: Tiling | None) -> Tiling:
    """`tiling`, or the table's, an eighth of its size or less in float32.

    Its products use registers: 32 queries and 32 rows of 128 channels do not fit in 255 a thread.
    """
    H = q.shape[-1]
    if tiling is not None:
        return tiling
    found = tiling_for("flash_prefill", backend.chip(), H)
    if k.dtype == jnp.float32:
        rows = min(found.rows // 2, 2048 // backend.power_of_two(H))
        return found._replace(queries=found.queries // 4, rows=rows)
    return found


def _check(q, k, v, length) -> None:
    """Raise ValueError, naming what was given, where shapes do not go together."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q is [B, T, N, H] and k is [B, T, K, H]; got {q.shape} and {k.shape}")
    if v is not None and k.shape != v.shape:
        raise ValueError(f"k and v have one shape; got {k.shape} and {v.shape}")
    (B, T, N, H), K = q.shape, k.shape[2]
    if k.shape != (B, T, K, H) or T < 1 or K < 1 or N % K:
        raise ValueError(
            f"q [B, T, N, H] and k [B, T, K, H] share B, T and H, and K divides N; got {q.shape} "
            f"and {k.shape}"
        )
    if length is not None and (
        length.shape != (B,) or not jnp.issubdtype(length.dtype, jnp.integer)
    ):
        raise ValueError(
            f"length is [B] = {(B,)} whole numbers; got {length.dtype.name} {length.shape}"
        )
