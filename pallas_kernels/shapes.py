"""Named shapes of real models at real sizes: what tests lower and the benchmark times.

A name is `MODEL/bBATCH/cCONTEXT`, for example `opt-6.7b/b64/c640`. Heads and head dimensions are
those that the models were published with; the sizes cover the ALISA paper's workloads
(context 640, batch 4 to 64) and long contexts.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import NamedTuple


class Heads(NamedTuple):
    """Attention of one layer of a model."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


class Shape(NamedTuple):
    """One layer of a model, so many sequences, so many tokens each."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    batch: int
    context: int

    def kept(self, kv_sparsity: float) -> int:
        """Tokens of the context that are attended at `kv_sparsity`, at least one."""
        return max(1, round(self.context * (1.0 - kv_sparsity)))


MODELS = MappingProxyType(
    {
        "opt-6.7b": Heads(32, 32, 128),
        "opt-13b": Heads(40, 40, 128),
        "opt-30b": Heads(56, 56, 128),
        "llama-2-7b": Heads(32, 32, 128),
        "llama-2-13b": Heads(40, 40, 128),
        "llama-3-8b": Heads(32, 8, 128),
        "pythia-12b": Heads(40, 40, 128),
    }
)
BATCHES = (4, 16, 64)
CONTEXTS = (640, 2048, 8192, 32768)
_NAME = re.compile(r"([\w.-]+)/b(\d+)/c(\d+)")


def named(name: str) -> Shape:
    """The shape that `name` stands for. Raises ValueError, naming what there is."""
    found = _NAME.fullmatch(name)
    if not found or found[1] not in MODELS or int(found[2]) < 1 or int(found[3]) < 1:
        raise ValueError(
            f"a shape is MODEL/bBATCH/cCONTEXT, MODEL one of {', '.join(MODELS)}; got {name!r}"
        )
    return Shape(*MODELS[found[1]], int(found[2]), int(found[3]))


def all_names() -> tuple[str, ...]:
    """Every model at every batch and context."""
    return tuple(
        f"{model}/b{batch}/c{context}"
        for model in MODELS
        for batch in BATCHES
        for context in CONTEXTS
    )
