"""Attention maps of a whole text under a policy, one layer at a time.

    def see(layer, maps, length): print(layer, maps.weights.shape)
    logprobs = attentions(Engine(model, "swa(kv_sparsity=0.8)"), ["some text"], see)

The run is that of `Engine.score(protocol="prefill_mask")`, layer by layer (`layerwise`), so one
layer's maps are held at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from alisa_jax.analysis import layerwise
from alisa_jax.attention import maps
from alisa_jax.attention.maps import Maps
from alisa_jax.engine import step
from alisa_jax.kv.buckets import bucket


def attentions(engine, sequences, see: Callable[[int, Maps, np.ndarray], None]) -> list[np.ndarray]:
    """Call `see(layer, maps, length)` for every layer of `engine`'s model, first to last.

    sequences: texts or token ids. maps: NumPy arrays [B, *, T, T], T the longest sequence, see
    `alisa_jax.attention.maps.Maps`. length: [B]; rows and columns from there on are padding.
    Returns the log-probability in nats of every token but the first, [len - 1] float32 for each
    sequence, as `Engine.score` does. Raises ValueError, before anything runs, for what
    `Engine.score` refuses.
    """
    batch = engine.batch(sequences)
    T, length = int(batch.length.max()), batch.length
    engine.validate(T)
    engine.check_calibration(length)
    if engine.codec.raw_keys or any(spec.rotation is not None for spec in engine.layers):
        raise ValueError(
            f"maps are of keys that carry their positions; {engine.policy} with {engine.codec} "
            "places them anew"
        )
    tokens = batch.padded(bucket(T))

    def shown(layer, found):
        see(layer, Maps(*(np.asarray(one)[:, :, :T, :T] for one in found)), length)

    x = layerwise.run(engine.model, tokens, maps.maps, engine.layers, shown)
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    ends = {name: engine.model.params[name] for name in ("embed", "unembed")}
    logprobs = np.asarray(_judge(engine.model.decoder, ends, x, targets))
    return [row[: n - 1] for row, n in zip(logprobs, length, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _judge(decoder, params, x, targets):
    return step.judge_all(decoder, params, x, targets)[0]
