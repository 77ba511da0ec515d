"""Where each parameter of a decoder lies in the tensors of a folder."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from alisa_jax.models import names
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder, Params


class Slot(NamedTuple):
    """One parameter of a tensor."""

    path: tuple  # (part, [layer,] module)
    leaf: str
    value: Any  # array or shape, as held here


def expected_tensors(decoder: Decoder) -> dict[str, list[Slot]]:
    """Every tensor of a folder and the shapes of its parameters."""
    return slots_of(decoder.config, jax.eval_shape(decoder.init, jax.random.key(0)))


def slots_of(config: ModelConfig, params: Params) -> dict[str, list[Slot]]:
    """Name of a tensor -> its parameters, in the order in which they lie in it."""
    slots: dict[str, list[Slot]] = {}

    def add(part: str, layer: int | None, held: dict) -> None:
        for module in (module for module in names.modules(config.arch, part) if module in held):
            path = (part, module) if layer is None else (part, layer, module)
            for leaf, value in held[module].items():
                name = names.tensor_name(config.arch, part, module, leaf, layer)
                slots.setdefault(name, []).append(Slot(path, leaf, value))

    add("embed", None, params["embed"])
    for layer, held in enumerate(params["blocks"]):
        add("blocks", layer, held)
    add("unembed", None, params["unembed"])
    return slots
