"""The `config.json` of Hugging Face folders, both ways.

| model_type | variants that are read and written |
| --- | --- |
| llama | grouped-query attention, biases, rotary scaling default, linear, llama3 or yarn |
| mistral | as llama, up to its window |
| qwen2 | as llama with biases of q, k and v alone; Qwen2 and Qwen2.5 |
| qwen3 | as llama with norms of q and k, head by head |
| opt | norms before or after each half, with or without biases, projected embeddings (opt-350m) |
| gpt_neox | parallel or sequential residuals, any even rotated share, attention biases, scalings |

All of them with a tied or an untied head and the activations of `ACTIVATIONS`; gpt_neox with the
scalings of llama. Pure functions on dictionaries; files are read and written in `checkpoint.py`.
Where a setting is absent it has the value that transformers gives it. A setting that would change
the arithmetic and is not implemented is refused, never ignored.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from alisa_jax.models.config import FAMILIES, ModelConfig
from alisa_jax.models.context import CONTEXTS, context_of, stated_positions
from alisa_jax.models.rotary import rope_from_hf, rope_scaling_to_hf
from alisa_jax.models.settings import (
    CheckpointError,
    choice,
    flag,
    number,
    shown,
    size,
    value,
)

# What checkpoints call the functions of `layers.activation`; the spellings of one function differ
# in rounding alone. The first of each is the one that is written.
ACTIVATIONS = types.MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "relu": "relu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
    }
)


_OPT_NORM_EPS = 1e-5


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`.

    Warns of what `context_of` warns of. Raises CheckpointError for an unsupported architecture or
    setting, a missing or a wrong value.
    """
    arch = raw.get("model_type")
    if not isinstance(arch, str) or arch not in CONTEXTS:
        raise CheckpointError(
            f"model_type {shown(arch)} is not a supported architecture; supported are "
            f"{', '.join(CONTEXTS)}."
        )
    if raw.get("quantization_config") is not None:
        raise CheckpointError(
            "the checkpoint is quantised (quantization_config is set); supported are plain "
            "float32, float16 and bfloat16 weights."
        )
    try:
        return _READERS.get(arch, _llama_from_hf)(raw)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"the configuration is not usable: {error}") from error


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """`config.json` as a dictionary, in the spelling that every version of transformers reads."""
    c = config
    raw = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    act = next(name for name, meant in ACTIVATIONS.items() if meant == c.act)
    if c.arch == "llama":
        return (
            raw
            | _family_to_hf(c)
            | {
                "intermediate_size": c.d_ff,
                "num_key_value_heads": c.n_kv_heads,
                "head_dim": c.head_dim,
                "hidden_act": act,
                "rms_norm_eps": c.norm_eps,
                "rope_theta": c.rope_theta,
                "rope_scaling": rope_scaling_to_hf(c.rope_scaling),
            }
        )
    if c.arch == "gpt_neox":
        if not c.mlp_bias:
            raise CheckpointError(
                "a gpt_neox folder can only say mlp_bias = true; given is mlp_bias=False."
            )
        return raw | {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "intermediate_size": c.d_ff,
            "hidden_act": act,
            "layer_norm_eps": c.norm_eps,
            "rotary_emb_base": c.rope_theta,
            "rotary_pct": c.rotary_frac,
            "rope_scaling": rope_scaling_to_hf(c.rope_scaling),
            "use_parallel_residual": c.parallel_residual,
            "attention_bias": c.attention_bias,
        }
    if c.attention_bias != c.mlp_bias or c.norm_eps != _OPT_NORM_EPS:
        raise CheckpointError(
            "an opt folder can only say attention_bias = mlp_bias and norm_eps = "
            f"{_OPT_NORM_EPS}; given are attention_bias={c.attention_bias}, "
            f"mlp_bias={c.mlp_bias}, norm_eps={c.norm_eps}."
        )
    return raw | {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "ffn_dim": c.d_ff,
        "word_embed_proj_dim": c.table_dim,
        "do_layer_norm_before": c.norm_before,
        "activation_function": act,
        "enable_bias": c.attention_bias,
    }


def _family_to_hf(c: ModelConfig) -> dict[str, Any]:
    """What a llama model calls itself: its family, or the first that can say what it holds."""
    biases = {"attention_bias": c.attention_bias}
    plain = not (c.qkv_bias or c.qk_norm)
    said = {
        "mistral": (plain and not c.attention_bias, "MistralForCausalLM", {"sliding_window": None}),
        "qwen2": (c.qkv_bias and not c.qk_norm, "Qwen2ForCausalLM", {"use_sliding_window": False}),
        "qwen3": (
            c.qk_norm and not c.qkv_bias,
            "Qwen3ForCausalLM",
            biases | {"use_sliding_window": False},
        ),
    }
    said = {family: (can and not c.mlp_bias, *rest) for family, (can, *rest) in said.items()}
    said["llama"] = (plain, "LlamaForCausalLM", biases | {"mlp_bias": c.mlp_bias})
    for family in (c.family or "llama", "llama", "qwen2", "qwen3"):
        can, architecture, settings = said[family]
        if can:
            return {"architectures": [architecture], "model_type": family} | settings
    raise CheckpointError(
        f"no folder can say attention_bias={c.attention_bias}, qkv_bias={c.qkv_bias}, "
        f"mlp_bias={c.mlp_bias} and qk_norm={c.qk_norm} together."
    )


def _head_dim(d_model: int, n_heads: int) -> int:
    if d_model % n_heads:
        raise CheckpointError(
            f"hidden_size {d_model} is not a multiple of num_attention_heads {n_heads}, and there "
            "is no head_dim."
        )
    return d_model // n_heads


def _common(raw: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The fields that all families read alike; tied: where the file does not say."""
    return {
        "vocab_size": size(raw, "vocab_size"),
        "d_model": size(raw, "hidden_size"),
        "n_layers": size(raw, "num_hidden_layers"),
        "n_heads": size(raw, "num_attention_heads"),
        "max_positions": context_of(raw),
        "tie_embeddings": flag(raw, "tie_word_embeddings", tied),
    }


def _llama_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    family = raw["model_type"]
    common = _common(raw, tied=False)
    n_heads = common["n_heads"]
    theta, scaling, share = rope_from_hf(
        raw, stated_positions(raw), "rope_theta", "partial_rotary_factor", 1.0
    )
    if share != 1:
        raise CheckpointError(
            f"partial_rotary_factor {share} is not supported for a {family} model; it must be 1."
        )
    if value(raw, "head_dim") is not None or family == "qwen3":
        head_dim = size(raw, "head_dim", 128)
    else:
        head_dim = _head_dim(common["d_model"], n_heads)
    kv_heads = {"llama": n_heads, "mistral": 8}.get(family, 32)
    return ModelConfig(
        arch="llama",
        **common,
        n_kv_heads=size(raw, "num_key_value_heads", kv_heads),
        head_dim=head_dim,
        d_ff=size(raw, "intermediate_size"),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        act=choice(raw, "hidden_act", ACTIVATIONS, "silu"),
        attention_bias=family in ("llama", "qwen3") and flag(raw, "attention_bias", False),
        mlp_bias=family == "llama" and flag(raw, "mlp_bias", False),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        family=family if family in FAMILIES else None,
    )


def _opt_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    common = _common(raw, tied=True)
    before = flag(raw, "do_layer_norm_before", True)
    d_model = common["d_model"]
    n_heads = common["n_heads"]
    width = size(raw, "word_embed_proj_dim", d_model)
    for key, allowed in (
        ("layer_norm_elementwise_affine", True),
        ("_remove_final_layer_norm", False),
    ):
        if flag(raw, key, allowed) != allowed and (before or key != "_remove_final_layer_norm"):
            raise CheckpointError(
                f"an opt model with {key}={str(not allowed).lower()} is not supported; "
                f"it must be {str(allowed).lower()}."
            )
    bias = flag(raw, "enable_bias", True)
    return ModelConfig(
        arch="opt",
        **common,
        n_kv_heads=n_heads,
        head_dim=_head_dim(d_model, n_heads),
        d_ff=size(raw, "ffn_dim"),
        norm_eps=_OPT_NORM_EPS,
        act=choice(raw, "activation_function", ACTIVATIONS, "relu"),
        attention_bias=bias,
        mlp_bias=bias,
        norm_before=before,
        embed_dim=None if width == d_model else width,
    )


def _neox_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    common = _common(raw, tied=False)
    d_model = common["d_model"]
    n_heads = common["n_heads"]
    theta, scaling, share = rope_from_hf(
        raw, stated_positions(raw), "rotary_emb_base", "rotary_pct", 0.25
    )
    return ModelConfig(
        arch="gpt_neox",
        **common,
        n_kv_heads=n_heads,
        head_dim=_head_dim(d_model, n_heads),
        d_ff=size(raw, "intermediate_size"),
        norm_eps=number(raw, "layer_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        act=choice(raw, "hidden_act", ACTIVATIONS, "gelu"),
        attention_bias=flag(raw, "attention_bias", True),
        mlp_bias=True,
        rotary_frac=share,
        parallel_residual=flag(raw, "use_parallel_residual", True),
    )


_READERS = types.MappingProxyType({"opt": _opt_from_hf, "gpt_neox": _neox_from_hf})
