"""`sparse_decode` and `packed_decode` on int8 codes, with the scales folded into the products.

A value x stands as a code c: x = (c - zero) * scale, with one scale and zero point

    per token and kv head       z_m = scale_m (q . (c_m - zero_m))
                                out = sum_m (p_m scale_m) (c_m - zero_m)
    per channel of a kv head    z_m = (q * scale) . c_m - (q * scale) . zero
                                out = scale * (sum_m p_m c_m - zero), sum p = 1

so no tile of unpacked values exists, in memory or in a register: codes become float on their way
into the product, per token without their zero point (a whole number of at most 255, exact in
bfloat16), and scales multiply logits, weights, queries or outputs. Per channel all of that is done
once per query and once per output, outside the loop, and the kernel is the one for plain rows.

A call reads 2 B K M H bytes of codes (and 6 B K M of scales and zero points per token), against
twice that in bfloat16; FLOPs are as in `sparse_decode`. Products run in the type of q.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backend, online
from pallas_kernels import packed_decode as packed
from pallas_kernels import sparse_decode as sparse
from pallas_kernels.partial import Partial
from pallas_kernels.tilings import DecodeTiling as Tiling


class PerToken(NamedTuple):
    """Codes with a scale and zero point for each token and kv head."""

    codes: jax.Array  # [B, S, K, H] or [B, K, M, H] int8
    scale: jax.Array  # [B, S, K] or [B, K, M], any float
    zero: jax.Array  # [B, S, K] or [B, K, M], whole numbers of int8 or float


class PerChannel(NamedTuple):
    """Codes with a scale and zero point per channel of a kv head, for all tokens of a sequence."""

    codes: jax.Array  # [B, S, K, H] or [B, K, M, H] int8
    scale: jax.Array  # [B, K, H], any float
    zero: jax.Array  # [B, K, H], whole numbers of int8 or float


Int8 = PerToken | PerChannel


def unpack(x: Int8, token_axis: int) -> jax.Array:
    """The values that codes stand for, float32."""
    scale = x.scale.astype(jnp.float32)
    zero = x.zero.astype(jnp.float32)
    if isinstance(x, PerToken):
        scale, zero = scale[..., None], zero[..., None]
    else:
        scale, zero = jnp.expand_dims(scale, token_axis), jnp.expand_dims(zero, token_axis)
    return (x.codes.astype(jnp.float32) - zero) * scale


def sparse_reference(q, k: Int8, v: Int8, index, bias=None, *, mass: bool = True):
    """Read, then attend: `sparse_decode.reference` of the unpacked values, in float32."""
    return sparse.reference(
        q.astype(jnp.float32), unpack(k, 1), unpack(v, 1), index, bias, mass=mass
    )


def packed_reference(q, k: Int8, v: Int8, bias=None, *, mass: bool = True):
    """Read, then attend: `packed_decode.reference` of the unpacked values, in float32."""
    return packed.reference(q.astype(jnp.float32), unpack(k, 2), unpack(v, 2), bias, mass=mass)


def sparse_decode_int8(
    q,
    k: Int8,
    v: Int8,
    index,
    bias=None,
    *,
    mass: bool = True,
    impl: str = "auto",
    tiling: Tiling | None = None,
) -> tuple[Partial, jax.Array | None]:
    """`sparse_decode` of q [B, N, H], unscaled, over rows `index` [B, P, M] of codes [B, S, K, H].

    Raises as it does.
    """
    online.check(q, k.codes, v.codes, index, 1, index.shape[-1])
    if bias is not None and bias.shape != index.shape:
        raise ValueError(f"index and bias have one shape; got {index.shape} and {bias.shape}")
    choice = _choice(impl, q, k, v, 1)
    if choice.impl == "xla":
        return sparse_reference(q, k, v, index, bias, mass=mass)
    bias = sparse.masked(index, bias, k.codes.shape[1])
    return _decode(q, k, v, index, bias, "sparse_decode", 1, mass, choice.impl, tiling)


def packed_decode_int8(
    q,
    k: Int8,
    v: Int8,
    bias=None,
    *,
    mass: bool = True,
    impl: str = "auto",
    tiling: Tiling | None = None,
) -> tuple[Partial, jax.Array | None]:
    """`packed_decode` of q [B, N, H], unscaled, over codes [B, K, M, H] under `bias` [B, P, M].

    Raises as it does.
    """
    bias = packed.bias_of(k.codes, bias)
    online.check(q, k.codes, v.codes, bias, 2, k.codes.shape[2])
    choice = _choice(impl, q, k, v, 2)
    if choice.impl == "xla":
        return packed_reference(q, k, v, bias, mass=mass)
    return _decode(q, k, v, None, bias, "packed_decode", 2, mass, choice.impl, tiling)


def _choice(impl: str, q, k: Int8, v: Int8, token_axis: int) -> backend.Choice:
    """Check scales and zero points, and choose."""
    B, _, _, H = k.codes.shape
    K = k.codes.shape[3 - token_axis]
    for name, x in (("k", k), ("v", v)):
        shape = x.codes.shape[:3] if isinstance(x, PerToken) else (B, K, H)
        if (
            type(x) is not type(k)
            or x.codes.dtype != jnp.int8
            or x.scale.shape != shape
            or x.zero.shape != shape
        ):
            raise ValueError(
                "k and v are both PerToken or both PerChannel, codes int8, scale and zero "
                f"{shape}; {name} is {type(x).__name__} of {x.codes.dtype.name} with "
                f"{x.scale.shape} and {x.zero.shape}"
            )
    return backend.choose(impl, online.why_not(online.ROWS, q=q, k=k.codes, v=v.codes))


def _decode(q, k: Int8, v: Int8, index, bias, kernel, token_axis, mass, impl, tiling):
    B, N, H = q.shape
    run = dict(
        kernel=kernel, token_axis=token_axis, kind=q.dtype, mass=mass, impl=impl, tiling=tiling
    )
    if isinstance(k, PerToken):
        return online.decode(
            q, k.codes, v.codes, index, bias, (k.scale, k.zero, v.scale, v.zero), **run
        )
    # [B, K, H] -> [B, N, H]
    heads = lambda x: jnp.repeat(x.astype(jnp.float32), N // x.shape[1], axis=1)
    q = q.astype(jnp.float32) * heads(k.scale)
    part, weights = online.decode(q, k.codes, v.codes, index, bias, None, **run)
    lse = part.lse - jnp.sum(q * heads(k.zero), axis=-1) * jnp.float32(H**-0.5)
    out = (part.out - heads(v.zero)) * heads(v.scale)
    return Partial(jnp.where(lse[..., None] == -jnp.inf, jnp.float32(0.0), out), lse), weights
