"""int8 with one scale and zero point per token and kv head: no calibration, no clipping.

The range of a token covers its H channels and 0, so that the zero point fits in 8 bits. The scale
is bfloat16, rounded up. Equations: `codecs/int8.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax
import jax
import jax.numpy as jnp

from alisa_jax.codecs import codes as products
from alisa_jax.codecs.base import Content
from alisa_jax.codecs.raw import Raw
from alisa_jax.codecs.tokenwise import TokenWise


@flax.struct.dataclass
class TokenCodes:
    """Encoded tokens; the arrays of one token lie at the same place, and move together."""

    codes: jax.Array  # [B, K, M, H] or [B, S, K, H] int8
    scale: jax.Array  # [B, K, M] or [B, S, K] bfloat16
    zero: jax.Array  # [B, K, M] or [B, S, K] int8


@dataclass(frozen=True)
class TokenInt8(TokenWise):
    """See above; `raw` is the type to which values are rounded first."""

    raw: Raw

    def token_bytes(self, K: int, H: int) -> float:
        return 2.0 * K * (H + 3)

    def content(self, packed):
        return Content("token", packed.codes, packed.scale, packed.zero)

    def values(self, packed):
        codes = packed.codes.astype(jnp.float32)
        scale = packed.scale.astype(jnp.float32)
        zero = packed.zero.astype(jnp.float32)
        return (codes - zero[..., None]) * scale[..., None]

    def logits(self, q, k):
        q = q.astype(jnp.float32)
        offset = jnp.sum(q, axis=-1, keepdims=True) * k.zero.astype(jnp.float32)[:, :, None]
        return (products.logits(q, k.codes) - offset) * k.scale.astype(jnp.float32)[:, :, None]

    def mix(self, p, v):
        folded = p * v.scale.astype(jnp.float32)[:, :, None]
        offset = jnp.sum(folded * v.zero.astype(jnp.float32)[:, :, None], axis=-1, keepdims=True)
        return products.mix(folded, v.codes) - offset

    def codes_of(self, x) -> TokenCodes:
        x = self.raw.rounded(x)
        low = jnp.minimum(x.min(-1), jnp.float32(0.0))
        high = jnp.maximum(x.max(-1), jnp.float32(0.0))
        step = jnp.maximum((high - low) / products.LEVELS, jnp.float32(products.TINY))
        scale = (step * (1 + 2.0**-8)).astype(jnp.bfloat16)  # this step or the next above it
        wide = scale.astype(jnp.float32)
        zero = products.clamp(jnp.round(-low / wide) - 128)
        codes = products.encode(x, wide[..., None], zero[..., None])
        return TokenCodes(codes, scale, zero.astype(jnp.int8))
