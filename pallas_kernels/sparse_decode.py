"""One new token attends the rows of a token-major store that an index list names.

For sequence b, query head n of kv head h = n // G, and row r = index[b, p, m] of the list p of h,

    z_m = q . k[b, r, h] / sqrt(H) + bias[b, p, m]
    out = sum_m softmax(z)_m v[b, r, h]
    lse = log sum_m exp(z_m)
    mass[b, p, m] = sum of softmax(z)_m over the heads that read list p

q [B, N, H]; k, v [B, S, K, H]; index [B, P, M] int32, P = 1 (all heads share a list) or K (each kv
head has its own). Rows may repeat, then each counts, and come in any order; an index outside [0, S)
names no row; bias is -inf for a row that is not attended, log n for one that stands for n tokens.

A call reads 2 B K M H elements of K and V where every listed row is attended, and does 4 B N M H
FLOPs: 2 G / element bytes of them for each byte, so for G up to 8 memory is what limits it on every
GPU that there is. It also reads index and bias (8 B P M bytes) and writes and rereads the logits
(8 B N M bytes) when the mass is wanted. Kernel: `online.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import backend, online
from pallas_kernels.partial import Partial, mass_of, softmax
from pallas_kernels.tilings import DecodeTiling as Tiling


def reference(q, k, v, index, bias=None, *, mass: bool = True) -> tuple[Partial, jax.Array | None]:
    """The equations above in plain jnp; the rows are gathered first."""
    B, N, H = q.shape
    S, K = k.shape[1:3]
    bias = masked(index, bias, S)
    at = jnp.where((index >= 0) & (index < S), index, 0)
    at = jnp.broadcast_to(at, (B, K, at.shape[2]))
    b = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
    h = jax.lax.broadcasted_iota(jnp.int32, at.shape, 1)
    return attend_rows(q, k[b, at, h], v[b, at, h], bias, mass)


def attend_rows(q, k, v, bias, mass: bool) -> tuple[Partial, jax.Array | None]:
    """Attention of q [B, N, H] on head-major rows k, v [B, K, M, H] under bias [B, P, M].

    In plain jnp: what the references of decode kernels share.
    """
    B, N, H = q.shape
    K, M = k.shape[1:3]
    P = bias.shape[1]
    heads = (q.astype(jnp.float32) * jnp.float32(H**-0.5)).reshape(B, K, N // K, H)
    bias = bias[:, :, None]
    z = jnp.einsum("bkgh,bkmh->bkgm", heads.astype(k.dtype), k, preferred_element_type=jnp.float32)
    # a row that nobody attends may hold anything
    z = jnp.where(bias > -jnp.inf, z + bias, -jnp.inf)
    e, total, lse = softmax(z)
    p = (e / total).astype(v.dtype)
    seen = jnp.where((bias > -jnp.inf)[:, :, 0, :, None], v, jnp.zeros((), v.dtype))
    out = jnp.einsum("bkgm,bkmh->bkgh", p, seen, preferred_element_type=jnp.float32).reshape(
        B, N, H
    )
    lse = lse.reshape(B, N)
    return Partial(out, lse), mass_of(z.reshape(B, N, M), lse, P) if mass else None


def sparse_decode(
    q,
    k,
    v,
    index,
    bias=None,
    *,
    mass: bool = True,
    impl: str = "auto",
    tiling: Tiling | None = None,
) -> tuple[Partial, jax.Array | None]:
    """Attention of q [B, N, H], unscaled, over the rows `index` [B, P, M] of k and v [B, S, K, H].

    bias: [B, P, M] float32, None for zeros. Returns `Partial(out [B, N, H], lse [B, N])` float32
    and the mass [B, P, M] float32 (None unless wanted); a sequence without rows has out = 0 and
    lse = -inf. impl: see `backend`. Raises ValueError for shapes that do not go together and for a
    named `impl` that cannot run.
    """
    online.check(q, k, v, index, 1, index.shape[-1])
    if bias is not None and bias.shape != index.shape:
        raise ValueError(f"index and bias have one shape; got {index.shape} and {bias.shape}")
    choice = backend.choose(impl, online.why_not(online.ROWS, q=q, k=k, v=v))
    if choice.impl == "xla":
        return reference(q, k, v, index, bias, mass=mass)
    return online.decode(
        q,
        k,
        v,
        index,
        masked(index, bias, k.shape[1]),
        None,
        kernel="sparse_decode",
        token_axis=1,
        kind=q.dtype,
        mass=mass,
        impl=choice.impl,
        tiling=tiling,
    )


def masked(index, bias, S: int):
    """The bias with -inf where the index names no row."""
    bias = jnp.zeros(index.shape, jnp.float32) if bias is None else bias
    return jnp.where((index >= 0) & (index < S), bias, -jnp.inf)
