"""The context of the model that a `config.json` describes, in tokens."""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping
from typing import Any

from alisa_jax.models.config import FAMILIES
from alisa_jax.models.settings import CheckpointError, CheckpointWarning, flag, size, value

# Every model_type that is read, with the context that transformers assumes where none is stated.
CONTEXTS = types.MappingProxyType(
    {
        "llama": 2048,
        "opt": 2048,
        "gpt_neox": 2048,
        "mistral": 131072,
        "qwen2": 32768,
        "qwen3": 32768,
    }
)
_WINDOW = 4096  # of mistral and qwen where a file states none
_LAYERS = frozenset({"full_attention", "sliding_attention"})


def context_of(raw: Mapping[str, Any]) -> int:
    """The longest context: the positions, or the sliding window of attention where that is less.

    Within the window attention is that of the other models. Warns where the window ends the
    context, and where no positions are stated. Raises CheckpointError for a wrong value.
    """
    stated = stated_positions(raw)
    window = _window(raw)
    if value(raw, "max_position_embeddings") is None:
        _warn(
            f"the configuration has no max_position_embeddings; {stated} are assumed, as "
            f"transformers does for {raw['model_type']}."
        )
    if window is None or window >= stated:
        return stated
    _warn(
        f"the model attends to the last {window} tokens alone (sliding_window), which is not "
        f"implemented; its context is {window} tokens here, not {stated}."
    )
    return window


def stated_positions(raw: Mapping[str, Any]) -> int:
    """`max_position_embeddings`, or what is assumed for the family."""
    family = raw.get("model_type")
    known = isinstance(family, str) and family in CONTEXTS
    return size(raw, "max_position_embeddings", *([CONTEXTS[family]] if known else []))


def _window(raw: Mapping[str, Any]) -> int | None:
    """How many tokens some layer attends to; None: each attends to all."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        return None
    none = "sliding_window" in raw and raw["sliding_window"] is None
    window = None if none else size(raw, "sliding_window", _WINDOW)
    if family == "mistral":
        return window
    first = size(raw, "max_window_layers", 28, least=0)  # so many layers attend to all
    kinds = value(raw, "layer_types", [])
    if not isinstance(kinds, list) or any(
        not isinstance(kind, str) or kind not in _LAYERS for kind in kinds
    ):
        raise CheckpointError("layer_types must be a list of full_attention and sliding_attention.")
    if not flag(raw, "use_sliding_window", False) or none:
        if "sliding_attention" in kinds:
            raise CheckpointError("layer_types has sliding_attention, and no window is in use.")
        return None
    if kinds:
        return window if "sliding_attention" in kinds else None
    return window if first < size(raw, "num_hidden_layers") else None


def _warn(text: str) -> None:
    warnings.warn(text, CheckpointWarning, stacklevel=3)
