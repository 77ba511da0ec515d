"""Attention of one layer: its states, decode and exchange, prompts, compute, reference, maps."""

from alisa_jax.attention.lane import (
    Lane,
    begin,
    extend,
    fill,
    fill_rows,
    finish,
    prefill,
    prefill_rows,
    turned_prompt,
    written,
)
from alisa_jax.attention.layer import Taps, cut, decode, exchange_sets, masked_row, step, turn_of
from alisa_jax.attention.states import (
    ROUTES,
    check,
    dims_of,
    freeze,
    grow,
    init,
    prompt_dims,
)

__all__ = [
    "ROUTES",
    "Lane",
    "Taps",
    "begin",
    "check",
    "cut",
    "decode",
    "dims_of",
    "exchange_sets",
    "extend",
    "fill",
    "fill_rows",
    "finish",
    "freeze",
    "grow",
    "init",
    "masked_row",
    "prefill",
    "prefill_rows",
    "prompt_dims",
    "step",
    "turn_of",
    "turned_prompt",
    "written",
]
