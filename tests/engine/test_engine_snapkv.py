"""A cache that is cut at the end of the prompt and then grows: `Engine` against the whole text under a mask, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax import attention
from alisa_jax.engine import prompts
from alisa_jax.engine.batch import Batch
from alisa_jax.kv.buckets import bucket, next_bucket
from tests import oracle
from tests.policies.snapkv_oracle import chosen

SPEC = "snapkv(capacity=24,window=8,kernel=3)"
LENGTHS, NEW, T = (60, 25, 5), 30, 96  # cut, cut by one token, below the window; the batch goes on from 64 to 96 tokens


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(n_layers=2)


@pytest.fixture(scope="module")
def engine(model):
    return alisa_jax.Engine(model, SPEC)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(6)
    return [rng.integers(0, 37, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def generated(engine, texts):
    return engine.generate(texts, NEW)


def masked_attention(policy, n, q, k, v):
    """Attention of q [t, N, H] over k, v [t, K, H], of which n are a prompt: [t, N, H], float64."""
    size, N, K = *q.shape[:2], k.shape[1]
    out, weights = oracle.causal(q[:n], k[:n], v[:n])
    sets, later = chosen(policy, weights, K), []
    for t in range(n, size):
        allowed = np.array([[i in sets[h * K // N] or n <= i <= t for i in range(size)] for h in range(N)])
        later.append(oracle.attention(q[t], k, v, allowed)[0])
    return np.concatenate([out, np.array(later)])


def logprobs(model, policy, ids, n):
    """Log-probabilities of all tokens after the first n, which are the prompt."""
    decoder, params, size = model.decoder, model.params, len(ids)
    at = jnp.arange(T, dtype=jnp.int32)[None]
    x = decoder.embed(params, jnp.asarray([ids + [0] * (T - size)], jnp.int32), at)

    def attend(q, k, v):
        out = np.zeros(q.shape, np.float32)
        out[0, :size] = masked_attention(policy, n, *(np.asarray(a)[0, :size] for a in (q, k, v)))
        return jnp.asarray(out), ()

    for layer in range(decoder.config.n_layers):
        x, _ = decoder.block(params["blocks"][layer], x, at, attend)
    of = np.asarray(jax.nn.log_softmax(decoder.unembed(params, x)[0]))
    return of[np.arange(n - 1, size - 1), ids[n:]]


def test_generation_after_ragged_prompts_is_that_of_each_prompt_alone_under_its_mask(model, engine, texts, generated):
    for text, new, got in zip(texts, generated.tokens, generated.logprobs, strict=True):
        assert len(new) == NEW
        np.testing.assert_allclose(got, logprobs(model, engine.policy, text + new, len(text)), atol=1e-4)


def test_dropping_changed_what_the_model_says(model, texts, generated):
    """Otherwise this file would prove little."""
    dense = alisa_jax.policies.SnapKV(tokens=60)
    for text, new, got in zip(texts[:2], generated.tokens, generated.logprobs, strict=False):
        assert np.abs(got - logprobs(model, dense, text + new, len(text))).max() > 0.01


def test_scoring_after_a_prompt_gives_the_log_probabilities_of_generation(engine, texts, generated):
    whole = [text + new for text, new in zip(texts, generated.tokens, strict=True)]
    found = engine.score(whole, protocol="prompt", last=[NEW] * 3)
    for got, want in zip(found.logprobs, generated.logprobs, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    # Each of the tokens that are fed attends what was kept, all tokens since, and itself.
    share = [(min(n, 24) + i + 1) / (n + i + 1) for n in LENGTHS for i in range(NEW - 1)]
    np.testing.assert_allclose(found.attended_frac, np.mean(share), rtol=1e-5)


def test_choices_that_share_a_prompt_score_as_each_by_itself(model, engine, texts):
    rng = np.random.default_rng(7)
    last, of = [3, 33, 9], [0, 0, 1]
    whole = [texts[i] + rng.integers(0, 37, k).tolist() for i, k in zip(of, last, strict=True)]
    found = engine.score(whole, protocol="prompt", last=last)
    for i, got, ids in zip(of, found.logprobs, whole, strict=True):
        np.testing.assert_allclose(got, logprobs(model, engine.policy, ids, LENGTHS[i]), atol=1e-4)


def test_after_the_prompt_the_set_has_the_capacity_and_room_and_grows_with_the_bucket(engine, texts):
    """Room comes by 32 slots, so that few programs are compiled, and is no more than the tokens that are to come."""
    begun = prompts.begin(engine, Batch.from_lists(texts), 1000)
    (K, H), S = (2, 6), bucket(max(LENGTHS))
    assert begun.room == 32 and S - max(LENGTHS) <= 32
    longer = prompts.begin(engine, Batch.from_lists([texts[0] * 5]), 3)
    assert longer.room == 32 < bucket(5 * len(texts[0])) - 5 * len(texts[0])
    for (state,) in begun.kv.layers:
        assert state.ws.k.shape == (3, K, 24 + 32, H) and state.store is None
        assert (np.asarray(state.ws.pos) >= 0).sum(-1).tolist() == [[24, 24], [24, 24], [5, 5]]
        grown = jax.eval_shape(lambda one: attention.grow(one, next_bucket(S)), state)
        assert grown.ws.k.shape == (3, K, 24 + 32 + next_bucket(S) - S, H)
        assert jax.eval_shape(lambda one: attention.grow(one, next_bucket(S), 5), state).ws.k.shape == (
            3,
            K,
            24 + 32 + 5,
            H,
        )


def test_with_the_same_room_a_cache_has_the_same_bytes_whatever_its_prompt(engine):
    """Capacity and room, by 2 layers, K and V, 2 heads of 6 float32."""
    sizes = {S: jax.eval_shape(lambda S=S: engine.init(1, S, 32)).bytes[0] for S in (96, 480, bucket(4096))}
    assert set(sizes.values()) == {(24 + 32) * 2 * 2 * 2 * 6 * 4}
