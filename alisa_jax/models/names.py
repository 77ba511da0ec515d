"""The names of tensors in Hugging Face folders, as every version of transformers reads them.

Most parameters are one tensor. The q, k and v of GPT-NeoX lie in one, head by head: its output axis
is [N, 3, H], and `split` and `join` go between the two.
"""

from __future__ import annotations

import types
from collections.abc import Sequence

import numpy as np


def tensor_name(arch: str, part: str, module: str, leaf: str, layer: int | None = None) -> str:
    """Hugging Face name of one parameter.

    part: embed, blocks or unembed. leaf: its name in the module. Parameters that lie in one tensor
    have one name, and `modules` lists them in the order in which they lie there.
    """
    name = _NAMES[arch][part][module]
    if layer is not None:
        name = f"{_LAYERS[arch]}.{layer}.{name}"
    return f"{name}.{'bias' if leaf == 'bias' else 'weight'}"


def modules(arch: str, part: str) -> tuple[str, ...]:
    """The modules that a part can have."""
    return tuple(_NAMES[arch][part])


def spellings(name: str) -> tuple[str, ...]:
    """The names that a folder may give the tensor `name`, the usual one first.

    A folder of the bare stack, without a head, leaves out the first word; newer transformers call
    any head lm_head.
    """
    bare = name.removeprefix("model.").removeprefix("gpt_neox.")
    return tuple(dict.fromkeys((name, bare, name.replace("embed_out.", "lm_head."))))


def split(stored: np.ndarray, parts: int, head_dim: int) -> list[np.ndarray]:
    """[N parts H, ...] as it is stored -> `parts` arrays [N H, ...]."""
    if parts == 1:
        return [stored]
    rest = stored.shape[1:]
    heads = stored.reshape(-1, parts, head_dim, *rest)
    return [heads[:, part].reshape(-1, *rest) for part in range(parts)]


def join(arrays: Sequence[np.ndarray], head_dim: int) -> np.ndarray:
    """Arrays [N H, ...] -> [N parts H, ...], the inverse of `split`."""
    if len(arrays) == 1:
        return arrays[0]
    rest = arrays[0].shape[1:]
    return np.stack([a.reshape(-1, head_dim, *rest) for a in arrays], axis=1).reshape(-1, *rest)


_LAYERS = types.MappingProxyType(
    {"llama": "model.layers", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}
)
_NAMES = types.MappingProxyType(
    {
        "llama": {
            "embed": {"tokens": "model.embed_tokens"},
            "blocks": {
                "attn_norm": "input_layernorm",
                "q": "self_attn.q_proj",
                "k": "self_attn.k_proj",
                "v": "self_attn.v_proj",
                "q_norm": "self_attn.q_norm",
                "k_norm": "self_attn.k_norm",
                "o": "self_attn.o_proj",
                "mlp_norm": "post_attention_layernorm",
                "gate": "mlp.gate_proj",
                "up": "mlp.up_proj",
                "down": "mlp.down_proj",
            },
            "unembed": {"norm": "model.norm", "head": "lm_head"},
        },
        "opt": {
            "embed": {
                "tokens": "model.decoder.embed_tokens",
                "project_in": "model.decoder.project_in",
                "positions": "model.decoder.embed_positions",
            },
            "blocks": {
                "attn_norm": "self_attn_layer_norm",
                "q": "self_attn.q_proj",
                "k": "self_attn.k_proj",
                "v": "self_attn.v_proj",
                "o": "self_attn.out_proj",
                "mlp_norm": "final_layer_norm",
                "up": "fc1",
                "down": "fc2",
            },
            "unembed": {
                "norm": "model.decoder.final_layer_norm",
                "project_out": "model.decoder.project_out",
                "head": "lm_head",
            },
        },
        "gpt_neox": {
            "embed": {"tokens": "gpt_neox.embed_in"},
            "blocks": {
                "attn_norm": "input_layernorm",
                "q": "attention.query_key_value",
                "k": "attention.query_key_value",
                "v": "attention.query_key_value",
                "o": "attention.dense",
                "mlp_norm": "post_attention_layernorm",
                "up": "mlp.dense_h_to_4h",
                "down": "mlp.dense_4h_to_h",
            },
            "unembed": {"norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
        },
    }
)
