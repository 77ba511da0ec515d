"""A run of equal prompts in numbers: its model, its policy, and the `Setting` of a controller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from alisa_jax import policies
from alisa_jax.codecs import Codec
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder
from alisa_jax.placement.modelled.cost import Shape, statistics_bytes
from alisa_jax.placement.plan import PAGE_TOKENS, Setting, pages

ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"float16": 2, "bfloat16": 2, "float32": 4})


def shape(config: ModelConfig, codec: Codec, dtype: str) -> Shape:
    """The numbers of a model whose weights are `dtype` and whose cache `codec` stores."""
    decoder = Decoder(config)
    return Shape(
        weight_bytes=decoder.count_params() * ELEMENT_BYTES[dtype],
        weight_flops=decoder.flops_per_token(0),
        attention_flops=decoder.flops_per_token(1) - decoder.flops_per_token(0),
        layers=config.n_layers,
        d_model=config.d_model,
        d_ff=config.d_ff,
        vocab_size=config.vocab_size,
        kv_token_bytes=codec.token_bytes(config.n_kv_heads, config.head_dim),
        element_bytes=ELEMENT_BYTES[dtype],
    )


def policy(kv_sparsity: float, window: int | str = "k") -> policies.Policy:
    """SWA at this sparsity, with its window ("k", "2k" or a number of rows); dense for 0.

    Raises ValueError, which begins with the name of the argument.
    """
    if not 0.0 <= kv_sparsity < 1.0:
        raise ValueError(f"kv_sparsity must be at least 0 and below 1, got {kv_sparsity}")
    if not kv_sparsity:
        return policies.Dense()
    rows = int(window) if str(window).isdecimal() else window
    try:
        return policies.Swa(kv_sparsity=kv_sparsity, window=rows)
    except ValueError as error:
        raise ValueError(f"window: {error}") from None


def setting(
    config: ModelConfig,
    codec: Codec,
    policy: policies.Policy,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
) -> Setting:
    """A run of `batch` equal prompts under a policy and a codec, without budgets.

    Working set and statistics are as large as the context at the end, in pages.
    """
    context = PAGE_TOKENS * pages(prompt_tokens + new_tokens - 1)
    heads, L = (config.n_kv_heads, config.head_dim), config.n_layers
    selects = isinstance(policy, policies.Swa)
    slots = policy.capacity(context) if selects else 0
    statistics = 0.0
    if selects:
        rows = int(policy.counts(context).width.max())
        held = L * slots * 8  # position and bias of each slot
        statistics = statistics_bytes(rows, context, L) + held
    return Setting(
        layers=L,
        prompt_tokens=(prompt_tokens,) * batch,
        new_tokens=new_tokens,
        token_bytes=codec.token_bytes(*heads),
        device_kv_bytes=math.inf,
        slots=slots,
        sequence_bytes=L * codec.sequence_bytes(*heads) * (2 if selects else 1),
        stats_bytes=statistics,
        selects=selects,
        evicts=False,
    )
