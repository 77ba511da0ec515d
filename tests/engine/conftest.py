"""A trained model, its stories as token ids, and engines that are made (and compiled) once for all tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax.models import Decoder, Model, ModelConfig


@pytest.fixture(scope="session")
def trained(stories):
    """stories260K: 5 layers, 8 query heads over 4 kv heads of 8, context 512, V = 512."""
    return alisa_jax.load(stories)


@pytest.fixture(scope="session")
def story_ids(trained, test_data):
    """The first 24 ASCII stories of at least 384 tokens, cut to 512: the windows of the reference perplexity."""
    with open(test_data / "text" / "tinystories.txt", encoding="utf-8") as file:
        texts = [t.strip() for t in file.read(400_000).split("<|endoftext|>")[:-1]]
    ids = [trained.encode(t) for t in texts if t.isascii()]
    return [i[:512] for i in ids if len(i) >= 384][:24]


@pytest.fixture(scope="session")
def engine(trained):
    """`engine(policy, route="auto", layers=5)`: the trained model, or its first layers (quicker to compile).

    The same call gives the same engine.
    """

    @functools.cache
    def make(policy, route, layers):
        decoder = Decoder(dataclasses.replace(trained.decoder.config, n_layers=layers))
        params = trained.params | {"blocks": trained.params["blocks"][:layers]}
        model = dataclasses.replace(trained, decoder=decoder, params=params)
        return alisa_jax.Engine(model, policy, route=route)

    return lambda policy, route="auto", layers=5: make(policy, route, layers)


@pytest.fixture(scope="session")
def random_model():
    """`random_model(**sizes)`: a LLaMA model with random weights, one layer and 2 kv heads unless told otherwise."""

    @functools.cache
    def make(**sizes):
        base = dict(vocab_size=37, d_model=22, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=26)
        decoder = Decoder(ModelConfig(arch="llama", **(base | dict(max_positions=1100) | sizes)))
        rng = np.random.default_rng(3)

        def draw(like):
            scale, mean = (like.shape[0] ** -0.5, 0.0) if len(like.shape) == 2 else (0.2, 1.0)
            return jnp.asarray(rng.normal(mean, scale, like.shape), like.dtype)

        params = jax.tree.map(draw, jax.eval_shape(decoder.init, jax.random.key(0)))
        return Model(decoder, params, None, "random", None, (), "random")

    return make
