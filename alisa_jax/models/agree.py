"""Whether the tensors of a folder and its configuration describe one model.

What is there is read: biases that the configuration does not name, and the head of a model that is
called tied. What is missing, has another shape, or would be read by nothing is refused: then the
configuration is of another model, and the numbers would be.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from alisa_jax.models import names
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder
from alisa_jax.models.settings import CheckpointError, CheckpointWarning
from alisa_jax.models.slots import Slot, expected_tensors
from alisa_jax.models.weights import WeightFile, check_tensor, read_tensor

# Constants that older versions of transformers stored: angles, masks, positions and a version.
_CONSTANT = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attention\.(masked_)?bias|position_ids|decoder\.version)$"
)
_NAMED = 3  # tensors in a sentence

Where = Mapping[str, WeightFile]


def agree(
    config: ModelConfig, where: Where, source: str | Path
) -> tuple[ModelConfig, list[tuple[str, list[Slot]]]]:
    """The configuration of what `where` holds, and each of its tensors with the parameters in it.

    where: which open file holds each tensor. source: the folder or file, for messages. Tensors are
    in the order of a forward pass, the token table first. Warns where the configuration gives way.
    Raises CheckpointError for a tensor that is missing, of a wrong shape or type, or that no
    parameter is read from.
    """
    _refuse_absurd(config, where, source)
    said: list[str] = []
    biased = _with_biases(config, where)
    if biased != config:
        said.append("has biases that its configuration does not name; they are read")
    table, head = _tied_names(config, where)
    if biased.tie_embeddings and table and head and not _same(biased, where, table, head, source):
        biased = dataclasses.replace(biased, tie_embeddings=False)
        said.append(
            f"has {head} with other values than {table}, although its configuration calls the two "
            "tied; both are read"
        )
    found, unread = [], set(where)
    for name, slots in expected_tensors(Decoder(biased)).items():
        stored = _stored(name, where)
        if stored is None and biased.tie_embeddings and slots[0].path == ("embed", "tokens"):
            stored = head
        if stored is None:
            raise CheckpointError(f"{source} has no tensor {name}, which its configuration needs.")
        shape = slots[0].value.shape
        check_tensor(where[stored], stored, (len(slots) * shape[0], *shape[1:]), source)
        found.append((stored, slots))
        unread.discard(stored)
    if biased.tie_embeddings:
        unread.discard(head)
    _refuse([name for name in where if name in unread and not _CONSTANT.search(name)], source)
    for text in said:
        warnings.warn(f"{source} {text}.", CheckpointWarning, stacklevel=2)
    return biased, found


def _refuse_absurd(config: ModelConfig, where: Where, source: str | Path) -> None:
    """Refuse what would take long, or much memory, before a shape could be compared."""
    if config.n_layers > len(where):
        raise CheckpointError(
            f"{source} holds {len(where)} tensors, and its configuration has {config.n_layers} "
            "layers."
        )
    widest = max(max(file.describe(name)[0], default=1) for name, file in where.items())
    if config.head_dim > widest:
        raise CheckpointError(
            f"{source} holds no tensor of more than {widest} rows or columns, and its "
            f"configuration has heads of {config.head_dim} channels."
        )


def _stored(name: str, where: Where) -> str | None:
    return next((spelling for spelling in names.spellings(name) if spelling in where), None)


def _with_biases(config: ModelConfig, where: Where) -> ModelConfig:
    """`config` with the biases that every layer has."""

    def all_have(modules: Iterable[str]) -> bool:
        return all(
            _stored(names.tensor_name(config.arch, "blocks", module, "bias", layer), where)
            for layer in range(config.n_layers)
            for module in modules
        )

    if not config.attention_bias and all_have("qkv"):
        both = all_have("o")
        if both or config.arch == "llama":
            config = dataclasses.replace(config, attention_bias=both, qkv_bias=not both)
    mlp = {"gate", "up", "down"}.intersection(names.modules(config.arch, "blocks"))
    if not config.mlp_bias and all_have(mlp):
        config = dataclasses.replace(config, mlp_bias=True)
    return config


def _tied_names(config: ModelConfig, where: Where) -> tuple[str | None, str | None]:
    """What the folder calls the token table and the head."""
    table = names.tensor_name(config.arch, "embed", "tokens", "table")
    head = names.tensor_name(config.arch, "unembed", "head", "weight")
    return _stored(table, where), _stored(head, where)


def _same(config: ModelConfig, where: Where, table: str, head: str, source: str | Path) -> bool:
    shape = (config.vocab_size, config.table_dim)
    first = read_tensor(where[table], table, shape, source).astype(np.float32, copy=False)
    second = read_tensor(where[head], head, shape, source).astype(np.float32, copy=False)
    return np.array_equal(first, second)


def _refuse(unread: list[str], source: str | Path) -> None:
    if unread:
        more = len(unread) - _NAMED
        raise CheckpointError(
            f"{source} has tensors that a model of its configuration does not read: "
            f"{', '.join(unread[:_NAMED])}{f' and {more} more' if more > 0 else ''}."
        )
