"""A decoder run without a cache: dense causal attention over the whole sequence, recomputed at every call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.models import Decoder


def causal(q, k, v):
    """Dense causal attention in float32, q [B, T, N, H], k and v [B, T, K, H]; aux is (k, v)."""
    B, T, N, H = q.shape
    groups = N // k.shape[2]
    wide_k, wide_v = (jnp.repeat(x.astype(jnp.float32), groups, axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), wide_k) * H**-0.5
    logits = jnp.where(jnp.tril(jnp.ones((T, T), bool))[None, None], logits, -jnp.inf)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits, axis=-1), wide_v)
    return out.astype(q.dtype), (k, v)


def forward(decoder, params, tokens):
    """tokens [B, T] int32 -> logits [B, T, V]."""
    x = decoder.embed(params, tokens)
    for block in params["blocks"]:
        x, _ = decoder.block(block, x, None, causal)
    return decoder.unembed(params, x)


@pytest.fixture(scope="session")
def causal_attend():
    return causal


@pytest.fixture(scope="session")
def dense_forward():
    return jax.jit(forward, static_argnums=0)


@pytest.fixture(scope="session")
def random_params():
    """(config, seed) -> parameters of normal float32 numbers; made by NumPy, so that nothing is compiled."""

    def make(config, seed=3):
        rng, shapes = np.random.default_rng(seed), jax.eval_shape(Decoder(config).init, jax.random.key(0))
        return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)

    return make


@pytest.fixture(scope="session")
def causal_forward():
    """`dense_forward` step by step, for models that run once each: nothing is compiled but single operations."""
    return forward
