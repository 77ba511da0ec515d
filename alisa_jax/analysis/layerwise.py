"""One pass over whole texts, layer by layer: between two layers only the hidden states stay.

    x = layerwise.run(model, tokens, attend, specs, see)

What `attend` makes of q, k and v tells one analysis from another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax


def run(
    model,
    tokens,  # [B, T] int32, at positions 0 .. T - 1
    attend: Callable[..., tuple[jax.Array, Any]],
    specs: Sequence[Hashable],  # of each layer
    see: Callable[[int, Any], None],
    rotate: bool = True,
) -> jax.Array:
    """Call `see(layer, aux)` after every layer, first to last; returns x [B, T, D] of the last.

    attend(spec, q, k, v) -> (out, aux), with q, k and v as in `Decoder.block`, which also says what
    `rotate` does. Layers of equal specs share one compiled function, and so do calls with the same
    `attend`: give it as a function of a module.
    """
    decoder = model.decoder
    params = model.params
    x = _embed(decoder, {"embed": params["embed"]}, tokens)
    for layer, (spec, block) in enumerate(zip(specs, params["blocks"], strict=True)):
        x, aux = _layer(decoder, attend, spec, rotate, block, x)
        see(layer, aux)
        del aux  # before the next layer makes its own
    return x


@functools.partial(jax.jit, static_argnums=0)
def _embed(decoder, params, tokens):
    return decoder.embed(params, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _layer(decoder, attend, spec, rotate, block, x):
    return decoder.block(block, x, None, functools.partial(attend, spec), rotate)
