"""A dense pass over blocks of text, layer by layer: the statistics of `alisa_jax.calibration`.

    calibration = calibrate(model, blocks)      # blocks: [n, T] token ids
    calibration.save("calibration.json")

Every block counts alike: least and greatest values are those of all blocks, sums grow over all of
them and are divided once. (In the authors' code of Double Sparsity the mean of |q k| is that of the
last batch alone.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from alisa_jax.analysis import layerwise
from alisa_jax.attention import compute, turned_prompt
from alisa_jax.calibration import Calibration
from alisa_jax.engine.batch import Batch

MINIMA = ("k_min", "v_min")
MAXIMA = ("k_max", "v_max")
SUMS = ("q_abs", "k_abs", "qk_abs")


def calibrate(model, blocks, batch: int = 8, data: str = "", progress: bool = False) -> Calibration:
    """Statistics of `model` over `blocks`, [n, T] token ids, each block a sequence by itself.

    batch: blocks that run together. data: what the blocks were cut from. Raises ValueError, before
    anything runs, for blocks of different lengths, ids that the model lacks and blocks longer than
    its context.
    """
    tokens, config = Batch.from_lists(blocks), model.decoder.config
    T = tokens.tokens.shape[1]
    if (tokens.length != T).any() or T > config.max_positions:
        raise ValueError(
            f"blocks are of one length, at most {config.max_positions} tokens; got "
            f"{tokens.length.min()} to {T}"
        )
    if tokens.tokens.max() >= config.vocab_size:
        raise ValueError(f"token ids must be below {config.vocab_size}; got {tokens.tokens.max()}")
    starts = range(0, len(tokens.tokens), batch)
    total: dict[str, np.ndarray] = {}
    for start in tqdm(starts, "batches", disable=None if progress else True, leave=False):
        found = _look(model, tokens.tokens[start : start + batch])
        for names, join in ((MINIMA, np.minimum), (MAXIMA, np.maximum), (SUMS, np.add)):
            for name in names:
                total[name] = join(total[name], found[name]) if name in total else found[name]
    n_tokens = tokens.tokens.size
    for name in SUMS:
        total[name] /= n_tokens
    return Calibration(**total, n_tokens=n_tokens, model=model.name, data=data)


def _look(model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Least and greatest values and sums over a batch of blocks, float64 [L, heads, H]."""
    layers: list[dict[str, jax.Array]] = []
    rotations = [model.decoder.cache_rotation] * model.decoder.config.n_layers
    layerwise.run(
        model, tokens, _attend, rotations, lambda _, found: layers.append(found), rotate=False
    )
    return {
        name: np.stack([np.asarray(layer[name], np.float64) for layer in layers])
        for name in layers[0]
    }


def _attend(rotation, q, k, v) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Dense attention over projected q, k and v, and their statistics."""
    seen_q, seen_k = turned_prompt(q, rotation), turned_prompt(k, rotation)
    out = compute.causal(seen_q, seen_k, v, jnp.full(q.shape[:1], q.shape[1], jnp.int32))
    return out, _statistics(q, k, v, seen_q, seen_k)


def _statistics(q, k, v, seen_q, seen_k) -> dict[str, jax.Array]:
    """Float32 [heads, H] statistics of q [B, T, N, H], k and v [B, T, K, H] as projected.

    seen_q, seen_k: q and k as attention sees them.
    """
    q = q.astype(jnp.float32)
    k = k.astype(jnp.float32)
    v = v.astype(jnp.float32)
    seen_q = seen_q.astype(jnp.float32)
    seen_k = seen_k.astype(jnp.float32)
    seen_k = jnp.repeat(seen_k, q.shape[2] // k.shape[2], axis=2)
    tokens = (0, 1)
    return {
        "k_min": jnp.min(k, tokens),
        "k_max": jnp.max(k, tokens),
        "v_min": jnp.min(v, tokens),
        "v_max": jnp.max(v, tokens),
        "q_abs": jnp.sum(jnp.abs(q), tokens),
        "k_abs": jnp.sum(jnp.abs(k), tokens),
        "qk_abs": jnp.sum(jnp.abs(seen_q * seen_k), tokens),
    }
