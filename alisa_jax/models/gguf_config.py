"""The metadata of a GGUF file as the `config.json` that a Hugging Face folder would have.

Each key of the file's architecture is read, or known to change nothing; any other would change the
arithmetic unseen, and is refused.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np

from alisa_jax.models.gguf import ROPE_FREQS, GgufFile
from alisa_jax.models.hf import CheckpointError
from alisa_jax.ops.rope import RopeScaling, inverse_frequencies

_TYPES = types.MappingProxyType({"F16": "float16", "BF16": "bfloat16"})  # of others: float32
_MODEL_TYPES = types.MappingProxyType({"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"})
_READ = types.MappingProxyType(
    {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.freq_base": "rope_theta",
    }
)
# Keys that are checked below: the value that is allowed besides none at all.
_ALLOWED = types.MappingProxyType(
    {
        "expert_count": 0,
        "expert_used_count": 0,
        "attention.causal": True,
        "use_parallel_residual": False,
        "rope.scale_linear": 1.0,
    }
)
_CHECKED = frozenset({"vocab_size", "rope.dimension_count", "attention.value_length"})
_SILENT = frozenset({"tensor_data_layout", "rope.scaling.finetuned"})
_SCALING = frozenset({"type", "factor", "original_context_length"})
# What every released LLaMA-3.1 to 3.3 has: low_freq_factor, high_freq_factor and the context that
# it was trained with. A file holds what they lead to and not the values.
_LLAMA3 = (1.0, 4.0, 8192)


def read(path: Path) -> dict[str, Any]:
    """`to_hf` of the file at `path`."""
    return to_hf(GgufFile(path))


def to_hf(file: GgufFile) -> dict[str, Any]:
    """What `config_from_hf` reads; "torch_dtype" is the type in which the token table is read.

    Raises CheckpointError for what is not supported or missing.
    """
    arch = file.metadata.get("general.architecture")
    if arch not in _MODEL_TYPES:
        raise CheckpointError(
            f"{file} has the architecture {arch!r}; supported in GGUF files are "
            f"{', '.join(_MODEL_TYPES)}."
        )
    given = {
        key.removeprefix(f"{arch}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{arch}.")
    }
    known = _READ.keys() | _ALLOWED.keys() | _CHECKED | _SILENT
    for key, value in given.items():
        scaling = key.removeprefix("rope.scaling.")
        allowed = _ALLOWED.get(key, value)
        if (key not in known and (scaling == key or scaling not in _SCALING)) or value != allowed:
            raise CheckpointError(f"{file} has {arch}.{key} = {value!r}, which is not supported.")
    raw = {name: given[key] for key, name in _READ.items() if key in given}
    raw |= {"model_type": _MODEL_TYPES[arch], "hidden_act": "silu"}
    held = set(file.keys())
    if "model.embed_tokens.weight" not in held:
        raise CheckpointError(f"{file} has no tensor token_embd.weight.")
    _check_sizes(file, given.get("block_count"))
    table, kind = file.describe("model.embed_tokens.weight")
    raw["vocab_size"], raw["torch_dtype"] = table[0], _TYPES.get(kind, "float32")
    raw["tie_word_embeddings"] = "lm_head.weight" not in held
    raw["attention_bias"] = any(name.endswith("self_attn.q_proj.bias") for name in held)
    raw["mlp_bias"] = any(name.endswith("mlp.up_proj.bias") for name in held)
    # llama.cpp's own values, for files that leave them out
    raw.setdefault("rope_theta", 10000.0)
    if "max_position_embeddings" not in raw:
        raise CheckpointError(f"{file} does not say {arch}.context_length.")
    if "rms_norm_eps" not in raw:
        raise CheckpointError(f"{file} does not say {arch}.attention.layer_norm_rms_epsilon.")
    head_dim = _head_dim(raw)
    for key in ("rope.dimension_count", "attention.value_length"):
        if given.get(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{file} has {arch}.{key} = {given[key]}, and heads of {head_dim} channels; "
                "supported is only as many."
            )
    raw["rope_scaling"] = _rope_scaling(file, given, head_dim, raw["rope_theta"])
    return raw


def _check_sizes(file: GgufFile, layers: Any) -> None:
    """Raise CheckpointError where the tensors are not of `layers` layers and of every token."""
    names = (name.split(".") for name in file.keys())
    held = 1 + max((int(name[2]) for name in names if name[1] == "layers"), default=-1)
    if layers is not None and layers != held:
        raise CheckpointError(
            f"{file} has block_count = {layers}, and the tensors of {held} layers."
        )
    rows = file.describe("model.embed_tokens.weight")[0][0]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise CheckpointError(f"{file} has {len(tokens)} tokens, and a table of {rows}.")


def _head_dim(raw: dict[str, Any]) -> int | None:
    if "head_dim" in raw:
        return raw["head_dim"]
    width, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        return None  # said by `config_from_hf`
    return width // heads


def _rope_scaling(
    file: GgufFile, given: dict[str, Any], head_dim: int | None, theta: float
) -> dict[str, Any] | None:
    kind = given.get("rope.scaling.type", "none")
    if ROPE_FREQS in file.infos:
        if kind != "none":
            raise CheckpointError(
                f"{file} has {ROPE_FREQS} and a rotary scaling {kind!r}; supported is one of them."
            )
        return _llama3(file, head_dim, theta)
    if kind == "none":
        return None
    scaling = {"rope_type": kind}
    if "rope.scaling.factor" in given:
        scaling["factor"] = given["rope.scaling.factor"]
    if "rope.scaling.original_context_length" in given:
        original = given["rope.scaling.original_context_length"]
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3(file: GgufFile, head_dim: int | None, theta: float) -> dict[str, Any] | None:
    """The scaling that leads to the divisors of the rotary frequencies which the file holds."""
    divisors = file.read_stored(ROPE_FREQS).astype(np.float64)
    if np.all(divisors == 1):
        return None
    low, high, original = _LLAMA3
    factor = float(divisors.max())
    if head_dim and divisors.shape == (head_dim // 2,) and factor > 0:
        scaling = RopeScaling("llama3", factor, low, high, original)
        plain = inverse_frequencies(head_dim, theta)
        wanted = plain / inverse_frequencies(head_dim, theta, scaling)
        if np.allclose(divisors, wanted, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(
        f"{file}: the divisors of the rotary frequencies in {ROPE_FREQS} are not those of a "
        "LLaMA-3.1, which alone are supported."
    )
