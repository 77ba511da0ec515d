"""A pass layer by layer: the same as block after block, compiled once for layers alike, one layer's finds at a time."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.analysis import layerwise
from alisa_jax.models import Decoder, Model, ModelConfig

TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
SPECS = (1.0, 0.5, 1.0)
traced = []


@pytest.fixture(scope="module")
def model():
    config = ModelConfig("llama", 11, 12, 3, 4, 2, 6, 10, 31)
    rng, shapes = np.random.default_rng(3), jax.eval_shape(Decoder(config).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    return Model(Decoder(config), params, None, "random", None, (), "random")


def attend(spec, q, k, v):
    traced.append(spec)
    return spec * q, k


@pytest.mark.parametrize("rotated", [True, False])
def test_a_pass_is_block_after_block_and_alike_layers_share_a_program(model, rotated):
    decoder = model.decoder
    found = []
    last = []
    traced.clear()

    def see(layer, k):
        assert layer == len(found) and (not last or last.pop()() is None)  # those of the layer before are freed
        last.append(weakref.ref(k))
        found.append(np.array(k))

    x = layerwise.run(model, TOKENS, attend, SPECS, see, rotate=rotated)
    assert traced == [1.0, 0.5]

    at = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32)[None], TOKENS.shape)
    want = decoder.embed(model.params, jnp.asarray(TOKENS), at)
    for spec, block, got in zip(SPECS, model.params["blocks"], found, strict=True):
        want, k = decoder.block(block, want, at, lambda q, k, v, spec=spec: (spec * q, k), rotate=rotated)
        np.testing.assert_allclose(got, k, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-4)
