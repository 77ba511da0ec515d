"""Attention of one layer: decode, prefill, compute, exchange, the masked reference, maps."""

from alisa_jax.attention.layer import (
    ROUTES,
    Taps,
    check,
    decode,
    dims_of,
    freeze,
    grow,
    init,
    masked_row,
    prompt_dims,
    turn_of,
)
from alisa_jax.attention.prompt import prefill, prefill_rows, turned_prompt

__all__ = [
    "ROUTES",
    "Taps",
    "check",
    "decode",
    "dims_of",
    "freeze",
    "grow",
    "init",
    "masked_row",
    "prefill",
    "prefill_rows",
    "prompt_dims",
    "turn_of",
    "turned_prompt",
]
