"""The loop that the decode kernels share: one query per head against rows, tile by tile.

For a tile of rows with logits z the running maximum m, normaliser l and output o become

    m' = max(m, max z)          l' = exp(m - m') l + sum p
    p  = exp(z - m')            o' = exp(m - m') o + p V

so that out = o / l and lse = m + log l at the end. A grid program handles all G query heads of a kv
head, which read the same rows; with `splits` programs a row list each does its share, and the
pieces are joined by `partial.merge_axis`. Logits are written out as float32 (4 bytes a row and
head, beside 2 H element bytes of K and V), and the mass of a row is exp(z - lse), taken afterwards,
since no program knows the lse of all.

Rows that are not attended (bias -inf, index out of range) are not read. G = 1 runs on the plain
arithmetic units, which memory outruns; with more heads the products are matrix products, whose 16
rows G is padded to. Matrix products of float32 keep their operands in registers, so their tiles
have 32 rows at most.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import backend
from pallas_kernels.partial import Partial, empty, mass_of, merge_axis
from pallas_kernels.tilings import DecodeTiling, tiling_for

FLOATS = ("float32", "bfloat16", "float16")
ROWS = (*FLOATS, "int8")  # of K and V that one query reads


def why_not(allowed: tuple[str, ...] = FLOATS, **arrays) -> str | None:
    """What the kernels do not serve about these arrays, as the end of a sentence; or None.

    arrays: one of them is q. allowed: the types of all but q, which is a float.
    """
    H = arrays["q"].shape[-1]
    if H > backend.MAX_HEAD_DIM:
        return (
            f"the kernels serve head dimensions up to {backend.MAX_HEAD_DIM}, and this one is {H}"
        )
    for name, x in arrays.items():
        served = FLOATS if name == "q" else allowed
        if x.dtype.name not in served:
            return f"the kernels serve {name} of {', '.join(served)}, and it is {x.dtype.name}"
        if wrong := backend.unaddressable(x):
            return f"{name} has {wrong}"
    return None


def check(q, k, v, bias, token_axis: int, rows: int | None = None) -> None:
    """Raise ValueError, naming what was given, where shapes do not go together.

    rows: length that bias must have.
    """
    kv_axis = 3 - token_axis
    if q.ndim != 3 or k.ndim != 4:
        raise ValueError(f"q is [B, N, H] and k has four axes; got {q.shape} and {k.shape}")
    if k.shape != v.shape:
        raise ValueError(f"k and v have one shape; got {k.shape} and {v.shape}")
    B, N, H = q.shape
    K = k.shape[kv_axis]
    if (k.shape[0], k.shape[3]) != (B, H) or N % K:
        raise ValueError(
            f"q [B, N, H] and k [B, *, *, H] share B and H, and K divides N; got {q.shape} and "
            f"{k.shape}"
        )
    if rows is not None and (
        bias.ndim != 3 or bias.shape[0] != B or bias.shape[1] not in (1, K) or bias.shape[2] != rows
    ):
        raise ValueError(
            f"index and bias are [B, 1, {rows}] or [B, {K}, {rows}] with B = {B}; got {bias.shape}"
        )


def decode(
    q,
    k,
    v,
    index,
    bias,
    scales,
    *,
    kernel: str,
    token_axis: int,
    kind,
    mass: bool,
    impl: str,
    tiling: DecodeTiling | None,
) -> tuple[Partial, jax.Array | None]:
    """Launch the loop.

    q [B, N, H], unscaled; kind: the type that matrix products with int8 codes run in; k, v
    token-major (token_axis 1) or head-major (2); index [B, P, M] int32, or None: row m is row m;
    bias [B, P, M] float32; scales: None, or scale and zero of k, then of v, each [B, S, K] or
    [B, K, M]: row r of k stands for `(k[r] - zero[r]) * scale[r]`. Returns
    `Partial(out [B, N, H], lse [B, N])` and the mass [B, P, M], None unless wanted.
    """
    B, N, H = q.shape
    S, K = k.shape[token_axis], k.shape[3 - token_axis]
    G = N // K
    _, P, M = bias.shape
    if M == 0:
        return empty((B, N), H), jnp.zeros((B, P, 0), jnp.float32) if mass else None
    Gp, Hp = 1 if G == 1 else max(16, backend.power_of_two(G)), max(16, backend.power_of_two(H))
    tiling = tiling or tiling_for(kernel, backend.chip(), H)
    wide = G > 1 and jnp.dtype(kind if k.dtype == jnp.int8 else k.dtype).itemsize == 4
    rows = max(16, min(tiling.rows, 32 if wide else tiling.rows, backend.power_of_two(M)))
    tiles = -(-M // rows)
    splits = min(tiles, tiling.splits or max(1, -(-2 * backend.cores() // (B * K))))
    each = -(-tiles // splits)
    splits = -(-tiles // each)

    query = pl.BlockSpec((None, None, Gp, Hp), lambda b, h, s: (b, h, 0, 0))
    listed = pl.BlockSpec((None, None, M), lambda b, h, s: (b, h if P > 1 else 0, 0))
    if token_axis == 1:
        content = pl.BlockSpec((None, S, None, H), lambda b, h, s: (b, 0, h, 0))
        scale = pl.BlockSpec((None, S, None), lambda b, h, s: (b, 0, h))
    else:
        content = pl.BlockSpec((None, None, S, H), lambda b, h, s: (b, h, 0, 0))
        scale = pl.BlockSpec((None, None, S), lambda b, h, s: (b, h, 0))
    args = [
        (query, (q.astype(jnp.float32) * jnp.float32(H**-0.5)).reshape(B, K, G, H)),
        (content, k),
        (content, v),
        (listed, bias),
    ]
    args += [] if index is None else [(listed, index)]
    args += [] if scales is None else [(scale, x) for x in scales]
    outs = [
        (
            pl.BlockSpec((None, None, None, Gp, Hp), lambda b, h, s: (b, h, s, 0, 0)),
            (B, K, splits, G, H),
        ),
        (pl.BlockSpec((None, None, None, Gp), lambda b, h, s: (b, h, s, 0)), (B, K, splits, G)),
    ]
    outs += (
        [(pl.BlockSpec((None, None, Gp, M), lambda b, h, s: (b, h, 0, 0)), (B, K, G, M))]
        if mass
        else []
    )
    body = functools.partial(
        _kernel,
        G=G,
        H=H,
        S=S,
        M=M,
        rows=rows,
        tiles=each,
        indexed=index is not None,
        scaled=scales is not None,
        kind=kind,
    )
    found = backend.call(
        body,
        name=kernel,
        impl=impl,
        warps=tiling.warps,
        stages=tiling.stages,
        grid=(B, K, splits),
        in_specs=[spec for spec, _ in args],
        out_specs=[spec for spec, _ in outs],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for _, shape in outs],
    )(*(x for _, x in args))
    part = merge_axis(Partial(*found[:2]), 2)
    part = Partial(part.out.reshape(B, N, H), part.lse.reshape(B, N))
    return part, mass_of(found[2].reshape(B, N, M), part.lse, P) if mass else None


def _kernel(q_ref, k_ref, v_ref, bias_ref, *refs, G, H, S, M, rows, tiles, indexed, scaled, kind):
    index_ref, refs = (refs[0], refs[1:]) if indexed else (None, refs)
    scale_refs, (out_ref, lse_ref, *z_ref) = (refs[:4], refs[4:]) if scaled else (None, refs)
    Gp, Hp = q_ref.shape
    head = jax.lax.broadcasted_iota(jnp.int32, (Gp,), 0) < G
    channel = jax.lax.broadcasted_iota(jnp.int32, (1, Hp), 1)
    channels = jax.lax.broadcasted_iota(jnp.int32, (rows, Hp), 1)
    q = backend.load(q_ref, mask=head[:, None] & (channel < H), other=0.0)

    def centred(content_ref, scale_refs, place, row, keep, wanted):
        """A tile of rows, without their zero points, and the scale of each row, if any."""
        x = backend.load(content_ref.at[place], mask=wanted, other=0)
        x = x if x.dtype != jnp.int8 else x.astype(jnp.float32 if Gp == 1 else kind)
        if not scaled:
            return x, None
        scale_ref, zero_ref = scale_refs
        scale = backend.load(scale_ref.at[row], mask=keep, other=0)
        zero = backend.load(zero_ref.at[row], mask=keep, other=0)
        return x - zero.astype(x.dtype)[:, None], scale.astype(jnp.float32)[None]

    first = pl.program_id(2) * tiles

    def tile(j, carry):
        o, m, l = carry
        start = (first + j) * rows
        at = start + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
        span = pl.ds(start, rows)
        bias = backend.load(bias_ref.at[span], mask=at < M, other=-jnp.inf)
        row = backend.load(index_ref.at[span], mask=at < M, other=-1) if indexed else at
        keep = (row >= 0) & (row < S) & (bias > -jnp.inf)
        row = jnp.where(keep, row, 0)
        place = jnp.broadcast_to(row[:, None], (rows, Hp)), channels
        wanted = keep[:, None] & (channels < H)
        k, scale = centred(k_ref, scale_refs and scale_refs[:2], place, row, keep, wanted)
        z = _logits(q, k) if scale is None else _logits(q, k) * scale
        z = jnp.where(keep[None], z + jnp.where(keep, bias, 0.0)[None], -jnp.inf)
        if z_ref:
            backend.store(z_ref[0].at[:, span], z, mask=head[:, None] & (at < M)[None])
        m2 = jnp.maximum(m, jnp.max(z, axis=1))
        base = jnp.where(m2 == -jnp.inf, 0.0, m2)
        p, old = jnp.exp(z - base[:, None]), jnp.exp(m - base)
        l = old * l + jnp.sum(p, axis=1)
        v, scale = centred(v_ref, scale_refs and scale_refs[2:], place, row, keep, wanted)
        return o * old[:, None] + _mix(p if scale is None else p * scale, v), m2, l

    start = (
        jnp.zeros((Gp, Hp), jnp.float32),
        jnp.full((Gp,), -jnp.inf, jnp.float32),
        jnp.zeros((Gp,), jnp.float32),
    )
    o, m, l = jax.lax.fori_loop(0, tiles, tile, start)
    backend.store(
        out_ref, o / jnp.where(l == 0, 1.0, l)[:, None], mask=head[:, None] & (channel < H)
    )
    backend.store(lse_ref, m + jnp.log(l), mask=head)


def _logits(q, k):
    """q [G, H] float32 and a tile of keys [rows, H] -> [G, rows] float32."""
    if q.shape[0] == 1:
        return jnp.sum(q * k.astype(jnp.float32), axis=1)[None]
    return backend.dot(q.astype(k.dtype), k, trans_b=True)


def _mix(p, v):
    """Weights p [G, rows] float32 and a tile of values [rows, H] -> [G, H] float32."""
    if p.shape[0] == 1:
        return jnp.sum(p[0][:, None] * v.astype(jnp.float32), axis=0)[None]
    return backend.dot(p.astype(v.dtype), v)
