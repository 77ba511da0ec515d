"""One new token attends a working set: head-major rows, all of them, under a bias for each.

For sequence b and query head n of kv head h = n // G,

    z_m = q . k[b, h, m] / sqrt(H) + bias[b, p, m]
    out = sum_m softmax(z)_m v[b, h, m]
    lse = log sum_m exp(z_m)
    mass[b, p, m] = sum of softmax(z)_m over the heads that share bias p

q [B, N, H]; k, v [B, K, M, H]; bias [B, P, M] float32, P = 1 or K: -inf for an empty or parked
slot, which is not read, log n for one that stands for n tokens.

A call reads 2 B K M H elements of K and V where every slot is attended, and does 4 B N M H FLOPs:
2 G / element bytes of them for each byte, so memory is the limit. It also reads the bias (4 B P M
bytes) and writes and rereads the logits (8 B N M bytes) when the mass is wanted. Against
`sparse_decode` rows are neighbours: no index, and whole lines of memory also where H is small.
Kernel: `online.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import backend, online
from pallas_kernels.partial import Partial
from pallas_kernels.sparse_decode import attend_rows
from pallas_kernels.tilings import DecodeTiling as Tiling


def reference(q, k, v, bias=None, *, mass: bool = True) -> tuple[Partial, jax.Array | None]:
    """The equations above in plain jnp."""
    return attend_rows(q, k, v, bias_of(k, bias), mass)


def packed_decode(
    q, k, v, bias=None, *, mass: bool = True, impl: str = "auto", tiling: Tiling | None = None
) -> tuple[Partial, jax.Array | None]:
    """Attention of q [B, N, H], unscaled, over k and v [B, K, M, H] under `bias` [B, P, M].

    bias: float32, None for zeros. Returns `Partial(out [B, N, H], lse [B, N])` float32 and the mass
    [B, P, M] float32 (None unless wanted); a sequence without attended slots has out = 0 and
    lse = -inf. impl: see `backend`. Raises ValueError for shapes that do not go together and for a
    named `impl` that cannot run.
    """
    bias = bias_of(k, bias)
    online.check(q, k, v, bias, 2, k.shape[2])
    choice = backend.choose(impl, online.why_not(online.ROWS, q=q, k=k, v=v))
    if choice.impl == "xla":
        return reference(q, k, v, bias, mass=mass)
    return online.decode(
        q,
        k,
        v,
        None,
        bias,
        None,
        kernel="packed_decode",
        token_axis=2,
        kind=q.dtype,
        mass=mass,
        impl=choice.impl,
        tiling=tiling,
    )


def bias_of(k, bias):
    return jnp.zeros((k.shape[0], 1, k.shape[2]), jnp.float32) if bias is None else bias
