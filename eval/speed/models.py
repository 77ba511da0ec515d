"""The models that benchmarks run: random weights of any shape, and a trained model for longer contexts than its own."""

from __future__ import annotations

import dataclasses

import jax

from alisa_jax.models import Decoder, Model, RopeScaling
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.pages import on_large_pages
from eval.script.common import UserError


def random_weights(config: ModelConfig, dtype: str, seed: int, name: str) -> Model:
    """A model of the shape `config` without a tokenizer, its weights on large pages as `load` puts them."""
    decoder = Decoder(config)
    params = on_large_pages(decoder.init(jax.random.key(seed), dtype))
    return Model(decoder, params, None, name, None, (), name)


def stretched(model: Model, tokens: int, flag: str = "--trace") -> Model:
    """`model` for `tokens` tokens: linear interpolation of rotary positions where these are more than it has.

    Raises UserError, which begins with `flag`, for a model whose positions are learned or scaled already.
    """
    config = model.decoder.config
    if tokens <= config.max_positions:
        return model
    if config.arch == "opt" or config.rope_scaling is not None:
        raise UserError(f"{flag}: {model.name} reads {config.max_positions} tokens at most, and {tokens} are asked for")
    scaling = RopeScaling("linear", float(-(-tokens // config.max_positions)))
    longer = dataclasses.replace(config, max_positions=tokens, rope_scaling=scaling)
    return dataclasses.replace(model, decoder=Decoder(longer))
