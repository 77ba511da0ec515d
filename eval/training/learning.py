"""How the small decoder learns: where it starts, its loss, one step of it, and what it is measured by."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alisa_jax.models.decoder import Decoder
from alisa_jax.ops.rope import rotate
from eval.text import episodes
from eval.training.curriculum import BOS_ID, FIRST_ORDINARY_ID, TrainConfig

QUERY_BLOCK = 128
TOKENS_AT_ONCE = 4096
PREVIOUS_TOKEN_LOGIT = 32.0


def initial_params(decoder: Decoder, key: jax.Array):
    """Random parameters of a LLaMA, nudged towards the circuit that recall needs, so that training finds the rest soon.

    In layer 0, half of the heads attend to the previous token: all tokens share one direction, which their queries and
    keys map to vectors that agree best one position apart. In the layers above, half of the variance of each q is that
    of its k and half of each o that of its v transposed, so that at first equal tokens attend to each other and what is
    attended is copied ("mimetic initialisation", arXiv 2305.09828, here with a positive sign for values).
    """
    c = decoder.config
    init_key, shared_key = jax.random.split(key)
    params, groups = decoder.init(init_key), c.n_heads // c.n_kv_heads
    first, *others = params["blocks"]

    shared = jax.random.normal(shared_key, (c.d_model,))
    shared = shared / jnp.linalg.norm(shared)
    fastest = jnp.arange(c.head_dim) < max(1, c.head_dim // 6)  # of the rotary frequencies
    quick = jnp.where(fastest, 1.0, 0.0)
    # After the norm a token has about (D / 2) ** 0.5 along `shared`: one apart, the logit is PREVIOUS_TOKEN_LOGIT.
    quick = quick * (2 * PREVIOUS_TOKEN_LOGIT * c.head_dim**0.5 / c.d_model / jnp.sum(quick)) ** 0.5
    later = rotate(quick[None], jnp.ones((1,), jnp.int32), decoder.rotation)
    half = max(1, c.n_kv_heads // 2)
    q, k = jnp.tile(quick, half * groups), jnp.tile(later.ravel(), half)
    for name, vector in (("q", q), ("k", k)):
        weight = first[name]["weight"]
        first[name] = {"weight": weight.at[: vector.size].add(vector[:, None] * shared[None, :])}
    table = params["embed"]["tokens"]["table"]
    params["embed"] = {"tokens": {"table": table + shared[None, :]}}

    for block in others:
        q, k, v, o = (block[name]["weight"] for name in "qkvo")
        k, v = (
            jnp.repeat(x.reshape(c.n_kv_heads, c.head_dim, c.d_model), groups, axis=0).reshape(-1, c.d_model)
            for x in (k, v)
        )
        block["q"] = {"weight": (q + k) * 0.5**0.5}
        block["o"] = {"weight": (o + v.T * (jnp.std(o) / jnp.std(v))) * 0.5**0.5}
    return params


def causal_attend(q: jax.Array, k: jax.Array, v: jax.Array):
    """q [B, T, N, H], k and v [B, T, K, H] -> (out [B, T, N, H], None): softmax(q k^T H**-0.5 + causal mask) v.

    In blocks of queries, each against the keys up to its end, which saves nearly half of the work at T = 1024.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    q = (q * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [B, K, H, T], [B, K, T, H]
    outs = []
    for begin in range(0, T, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, T)
        n = end - begin
        logits = q[:, :, :, begin:end].reshape(B, K, G * n, H) @ k[..., :end]
        hidden = jnp.arange(end)[None, :] > jnp.arange(begin, end)[:, None]
        logits = jnp.where(hidden[None, None, None], -jnp.inf, logits.reshape(B, K, G, n, end))
        probs = jax.nn.softmax(logits, axis=-1).reshape(B, K, G * n, end)
        outs.append((probs @ v[:, :, :end]).reshape(B, K, G, n, H))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), None


def token_losses(decoder: Decoder, params: Any, tokens: jax.Array):
    """(nats [B, T-1] of tokens 1.. given what precedes them, whether argmax hits them [B, T-1] bool)."""
    x = decoder.embed(params, tokens)
    for block in params["blocks"]:
        x, _ = decoder.block(block, x, None, causal_attend)
    logits = decoder.unembed(params, x[:, :-1])
    targets = tokens[:, 1:]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked, jnp.argmax(logits, axis=-1) == targets


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; weight decay on matrices only."""
    peak = config.learning_rate
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, config.warmup_steps),
            optax.linear_schedule(peak, 0.1 * peak, config.decay_steps),
        ],
        [max(config.warmup_steps, config.decay_begin)],
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def make_step(decoder: Decoder, tx: optax.GradientTransformation):
    """The jitted train step: (params, opt_state, tokens, weights, is_text) -> (params, opt_state, metrics)."""

    def loss(params, tokens, weights, is_text):
        nats, hits = token_losses(decoder, params, tokens)
        weights = weights[:, 1:]
        text = jnp.where(is_text[:, None], weights, 0.0)
        answer = jnp.where(is_text[:, None], 0.0, (weights > 0).astype(jnp.float32))
        mean = lambda value, weight: jnp.sum(value * weight) / jnp.maximum(jnp.sum(weight), 1.0)
        metrics = {
            "text_nats": mean(nats, text),
            "answer_nats": mean(nats, answer),
            "answer_accuracy": mean(hits.astype(jnp.float32), answer),
        }
        return mean(nats, weights), metrics

    def step(params, opt_state, tokens, weights, is_text):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens, weights, is_text)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its int32 step counts by Python floats
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def evaluate(decoder: Decoder, params: Any, stream: np.ndarray, length: int, count: int, seed: int) -> dict:
    """Nats per token of held-out text, and recall accuracy by kind and filler, at one length.

    Text: all whole windows of `length` tokens, end to end in `stream`, each behind a BOS. Recall: `count` episodes of each
    kind with random ids and with text as filler; accuracy is the share of answers that argmax predicts.
    Raises ValueError where `stream` holds no window.
    """
    taken = (length - 1) * (len(stream) // (length - 1))
    if not taken:
        raise ValueError(f"the held-out text has {len(stream)} tokens, fewer than one window of {length}")
    windows = np.pad(stream[:taken].reshape(-1, length - 1), ((0, 0), (1, 0)), constant_values=BOS_ID)
    losses = jax.jit(lambda params, tokens: token_losses(decoder, params, tokens))
    rows = max(1, TOKENS_AT_ONCE // length)

    def run(tokens):
        # The last batch is filled up with its first row, which is cut off again: one shape, one compilation.
        for i in range(0, len(tokens), rows):
            part = tokens[i : i + rows]
            full = np.concatenate([part, np.repeat(part[:1], rows - len(part), axis=0)])
            yield from zip(*(np.asarray(x)[: len(part)] for x in losses(params, full)), strict=True)

    result = {"length": length, "heldout_nats_per_token": float(np.mean([nats for nats, _ in run(windows)]))}
    result["heldout_tokens"] = taken
    ids = np.arange(FIRST_ORDINARY_ID, decoder.config.vocab_size)
    for kind, filler in itertools.product(episodes.KINDS, ("random", "text")):
        tokens, answers = np.empty((count, length), np.int32), np.empty((count, length), bool)
        for i in range(count):
            rng = np.random.default_rng([seed, length, i])
            start = rng.integers(0, len(stream) - length)
            words = stream[start : start + length] if filler == "text" else None
            tokens[i], answers[i] = episodes.recall_episode(rng, ids, length, kind, bos_id=BOS_ID, filler=words)
        hits = np.stack([hit for _, hit in run(tokens)])[answers[:, 1:]]
        result |= {f"{kind}_{filler}_accuracy": float(np.mean(hits)), f"{kind}_{filler}_answers": len(hits)}
    return result
