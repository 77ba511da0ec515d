"""The rotary settings of a `config.json`, both ways.

Both spellings are read: the base at the top (`rope_theta`; `rotary_emb_base` and `rotary_pct` for
gpt_neox) with an optional `rope_scaling`, and `rope_parameters` (or `rope_scaling`) that holds them
all. Where both objects are given `rope_scaling` counts, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alisa_jax.models.settings import CheckpointError, flag, number, section, size, value
from alisa_jax.ops.rope import ROPE_SCALINGS, RopeScaling


def rope_from_hf(
    raw: Mapping[str, Any], max_positions: int, theta_key: str, share_key: str, share: float
) -> tuple[float, RopeScaling | None, float]:
    """(theta, scaling, rotated share of a head).

    max_positions: those that the file states. theta_key and share_key: where a family has both at
    the top. share: where none is stated.
    """
    rope = section(raw, "rope_scaling") or section(raw, "rope_parameters")
    theta = number(rope, "rope_theta", number(raw, theta_key, 10000.0))
    share = number(rope, "partial_rotary_factor", number(raw, share_key, share))
    kind = value(rope, "rope_type", value(rope, "type", "default"))
    if kind == "default":
        return theta, None, share
    if kind not in ROPE_SCALINGS:
        raise CheckpointError(
            f"rotary scaling {kind!r} is not supported; supported are default, "
            f"{', '.join(ROPE_SCALINGS)}."
        )
    if kind == "linear":
        return theta, RopeScaling("linear", number(rope, "factor")), share
    key = "original_max_position_embeddings"
    original = size(raw, key, size(rope, key, max_positions))
    if kind == "llama3":
        low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
        return theta, RopeScaling("llama3", number(rope, "factor"), low, high, original), share
    factor = number(rope, "factor", max_positions / original)
    scaling = RopeScaling(
        "yarn",
        factor,
        original_max_positions=original,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        attention_factor=number(rope, "attention_factor", _attention_factor(rope, factor)),
        truncate=flag(rope, "truncate", "truncate" not in rope),  # null: no, as in transformers
    )
    return theta, scaling, share


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """That of arXiv 2309.00071, equation 22, or the quotient of two with weights of their own."""

    def of(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if value(rope, "mscale") and value(rope, "mscale_all_dim"):
        return of(number(rope, "mscale")) / of(number(rope, "mscale_all_dim"))
    return of(1.0)


def rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The object `rope_scaling` of a folder, or None."""
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    common = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
    if scaling.kind == "llama3":
        return common | {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    return common | {
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "attention_factor": scaling.attention_factor,
        "truncate": scaling.truncate,
    }
