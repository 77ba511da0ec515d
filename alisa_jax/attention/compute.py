"""Attention over given tokens, by XLA or by the kernels of `pallas_kernels`, with equal results.

Functions for the layers above. Each takes `impl`, "xla", "pallas" or "interpret", which an
engine chooses once for all of its layers (`choose`):

    slots      one query per head over head-major rows: a working set            packed_decode
    by_index   one query per head over rows of a store, by index                 sparse_decode
    store      one query per head over all rows of a store                       sparse_decode
    prompt     the queries of prompts, all or a chunk of each                    flash_prefill
    mass       what tokens got of the last or all of these queries               prompt_mass

Shapes: q [B, K, G, H], of prompts [B, C, N, H], unscaled. Logits, softmax statistics and mass:
all float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from alisa_jax.codecs.base import Codec, Content, Turn
from pallas_kernels import (
    backend,
    flash_prefill,
    int8_decode,
    online,
    packed_decode,
    partial,
    prompt_mass,
    sparse_decode,
)
from pallas_kernels.backend import Choice
from pallas_kernels.partial import Partial, merge, softmax

IMPLS = backend.IMPLS
_PAGE_TOKENS = 32  # rows of a store that XLA attends at once, if they divide it
_LEAST_PAGE_TOKENS = 16


def choose(impl: str, codec: Codec, dtype, head_dim: int, xla_only: str | None = None) -> Choice:
    """Resolve `impl` ("auto" included) on this device for a model of type `dtype`, and say why.

    xla_only: the reason why no kernel can run, if one is known. Raises ValueError, in one sentence,
    for an unknown name and for a named implementation that cannot run.
    """
    if xla_only is not None:
        return backend.choose(impl, xla_only)
    q = jax.ShapeDtypeStruct((1, 1, head_dim), jnp.dtype(dtype))
    for side in ("k", "v"):
        content = codec.content(
            jax.eval_shape(lambda side=side: codec.empty((1, 1, 32, head_dim), "slots", side))
        )
        if content is None:
            return backend.choose(impl, f"the kernels do not read what {codec} stores")
        codes = content.codes
    return backend.choose(impl, online.why_not(online.ROWS, q=q, k=codes, v=codes))


def slots(
    codec: Codec,
    q,
    k,
    v,
    bias,
    impl: str = "xla",
    turn: Turn | None = None,
    heads: int | None = None,
) -> tuple[Partial, jax.Array]:
    """Dense attention over head-major packed rows with a bias per slot.

    q [B, K, G, H]; k, v packed [B, K, M, H]; bias [B, P, M] float32. turn: rotates k first (XLA
    only). heads: defaults to P; XLA also takes N = K G.

    Returns Partial(out [B, K, G, H], lse [B, K, G]) and the mass [B, heads, M]: softmax weights
    summed over the query heads of each group.
    """
    if impl == "xla":
        return _slots(codec, q, k, v, bias, turn, heads)
    if turn is not None or heads not in (None, bias.shape[1]):
        raise ValueError(
            f"keys are turned, and single query heads told apart, by xla alone; got impl={impl!r}"
        )
    contents = codec.content(k), codec.content(v)
    plain = contents[0].axis is None
    run = packed_decode.packed_decode if plain else int8_decode.packed_decode_int8
    piece, mass = run(_heads(q), *map(_rows, contents), bias, impl=impl)
    return _grouped(piece, q.shape), mass


def by_index(
    codec: Codec, q, k, v, pos, bias, impl: str = "xla", turn: Turn | None = None
) -> tuple[Partial, jax.Array]:
    """As `slots`, over rows `pos` [B, P, M] (-1: none) of token-major k and v [B, S, K, H]."""
    if impl == "xla":
        return _slots(
            codec,
            q,
            codec.take(k, pos),
            codec.take(v, pos),
            jnp.where(pos >= 0, bias, -jnp.inf),
            turn,
        )
    if turn is not None:
        raise ValueError(f"keys are turned by xla alone; got impl={impl!r}")
    contents = codec.content(k), codec.content(v)
    plain = contents[0].axis is None
    run = sparse_decode.sparse_decode if plain else int8_decode.sparse_decode_int8
    piece, mass = run(_heads(q), *map(_rows, contents), pos, bias, impl=impl)
    return _grouped(piece, q.shape), mass


def store(
    codec: Codec, q, k, v, bias, impl: str = "xla", turn: Turn | None = None
) -> tuple[Partial, jax.Array]:
    """As `slots`, over all rows of token-major k and v [B, S, K, H]; bias [B, P, S]."""
    if impl != "xla":
        at = jax.lax.broadcasted_iota(jnp.int32, bias.shape, 2)
        return by_index(codec, q, k, v, at, bias, impl)
    S = bias.shape[-1]
    P = bias.shape[1]
    size = math.gcd(S, _PAGE_TOKENS)
    if size < _LEAST_PAGE_TOKENS:
        raise ValueError(
            f"a store that a refresh reads holds a multiple of {_LEAST_PAGE_TOKENS} tokens; got a "
            f"context of {S}"
        )
    scaled = q.astype(jnp.float32) * jnp.float32(q.shape[-1] ** -0.5)

    def page(carry, i):
        start = i * size
        here = jax.lax.dynamic_slice_in_dim(bias, start, size, axis=2)
        k_page = codec.slice_tokens(k, start, size)
        v_page = codec.slice_tokens(v, start, size)
        page_turn = None
        if turn is not None:
            places = jax.lax.dynamic_slice_in_dim(turn.places, start, size, axis=2)
            page_turn = turn._replace(places=places)
        piece, _ = _slots(codec, q, k_page, v_page, here, page_turn)
        return merge(carry, piece), _logits(codec, scaled, k_page, page_turn) + here[:, :, None, :]

    zero = partial.empty(q.shape[:-1], q.shape[-1])
    full, z = jax.lax.scan(page, zero, jnp.arange(S // size, dtype=jnp.int32))
    z = jnp.moveaxis(z, 0, 3).reshape(*q.shape[:-1], S)  # [B, K, G, S]
    p = jnp.exp(z - full.lse[..., None])
    return full, jnp.sum(p, axis=(1, 2))[:, None] if P == 1 else jnp.sum(p, axis=2)


def prompt(q, k, v, length, impl: str = "xla", first=None) -> Partial:
    """Dense causal attention over prompts, or over a chunk of each.

    q [B, C, N, H] of the tokens at positions first .. first + C - 1; k and v [B, T, K, H] of all
    tokens from 0 on; length [B]: tokens of each prompt. first: [B] int32, None for 0. Returns
    Partial(out [B, C, N, H] of q's type, lse [B, C, N] float32); queries before 0 or behind a
    prompt have out = 0 and lse = -inf.
    """
    piece = flash_prefill.flash_prefill(q, k, v, length, first=first, impl=impl)
    return piece._replace(out=piece.out.astype(q.dtype))


def mass(
    q,
    k,
    lse,
    length,
    heads: int,
    reduce: str,
    W: int | None = None,
    impl: str = "xla",
    first=None,
) -> jax.Array:
    """What each token of prompts got from queries q, for which `prompt` returned `lse`.

    Float32, summed over the query heads of each of P = `heads` groups; `reduce` selects its form:

        "rows"   [B, P, W, T], of the last W queries below `length`; the last query's row comes
                 last, and rows of queries that are not in q are zero
        "sum"    [B, P, T], summed over the queries in q, of which W limits it to the last W
    """
    options = dict(first=first, queries=W, heads=heads, reduce=reduce, impl=impl)
    return prompt_mass.prompt_mass(q, k, lse, length, **options)


def causal(q, k, v, length, impl: str = "xla", first=None) -> jax.Array:
    """Dense causal attention over prompts, as in `prompt`: out [B, C, N, H] alone."""
    return prompt(q, k, v, length, impl, first).out


def _slots(codec, q, k, v, bias, turn=None, heads=None) -> tuple[Partial, jax.Array]:
    (B, K, G, H), M = q.shape, bias.shape[-1]
    heads = bias.shape[1] if heads is None else heads
    z = _logits(codec, q.astype(jnp.float32) * jnp.float32(H**-0.5), k, turn) + bias[:, :, None, :]
    e, total, lse = softmax(z)
    p = e / total
    piece = Partial(codec.mix(p, v), lse)
    if heads == K * G and heads > 1:
        return piece, p.reshape(B, heads, M)
    return piece, jnp.sum(p, axis=(1, 2))[:, None] if heads == 1 else jnp.sum(p, axis=2)


def _logits(codec, q, k, turn):
    return codec.logits(q, k) if turn is None else codec.turned_logits(q, k, turn)


def _rows(content: Content):
    """The operand of the kernels for one of K and V."""
    if content.axis is None:
        return content.codes
    kind = int8_decode.PerToken if content.axis == "token" else int8_decode.PerChannel
    return kind(content.codes, content.scale, content.zero)


def _heads(q: jax.Array) -> jax.Array:
    return q.reshape(q.shape[0], -1, q.shape[-1])


def _grouped(piece: Partial, shape: tuple[int, ...]) -> Partial:
    return Partial(piece.out.reshape(shape), piece.lse.reshape(shape[:-1]))
