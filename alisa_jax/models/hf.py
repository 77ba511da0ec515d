"""The Hugging Face layout of OPT and LLaMA: `config.json` and the names of tensors, both ways.

Pure functions on dictionaries and strings; files are read and written in `checkpoint.py`. Both spellings of
the rotary settings are read: `rope_theta` at the top with an optional `rope_scaling`, and the newer
`rope_parameters` (or `rope_scaling`) that holds `rope_theta` too. A setting that would change the arithmetic
and is not implemented is refused, never ignored.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from alisa_jax.models.config import ARCHITECTURES, ModelConfig, RopeScaling


class CheckpointError(ValueError):
    """A model folder or model name that cannot be used; the message is one sentence that says why."""


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`.

    Raises CheckpointError for an unsupported architecture or setting and for a missing or wrong value.
    """
    arch = raw.get("model_type")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"model_type {arch!r} is not a supported architecture; supported are {', '.join(ARCHITECTURES)}."
        )
    if raw.get("quantization_config") is not None:
        raise CheckpointError(
            "the checkpoint is quantised (quantization_config is set); supported are plain float32, float16 "
            "and bfloat16 weights."
        )
    try:
        return _llama_from_hf(raw) if arch == "llama" else _opt_from_hf(raw)
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
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
    if c.arch == "llama":
        return raw | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "intermediate_size": c.d_ff,
            "num_key_value_heads": c.n_kv_heads,
            "head_dim": c.head_dim,
            "hidden_act": c.act,
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta,
            "rope_scaling": _rope_scaling_to_hf(c.rope_scaling),
            "attention_bias": c.attention_bias,
            "mlp_bias": c.mlp_bias,
        }
    if c.attention_bias != c.mlp_bias or c.norm_eps != _OPT_NORM_EPS:
        raise CheckpointError(
            f"an opt folder can only say attention_bias = mlp_bias and norm_eps = {_OPT_NORM_EPS}; given are "
            f"attention_bias={c.attention_bias}, mlp_bias={c.mlp_bias}, norm_eps={c.norm_eps}."
        )
    return raw | {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "ffn_dim": c.d_ff,
        "word_embed_proj_dim": c.d_model,
        "do_layer_norm_before": True,
        "activation_function": c.act,
        "enable_bias": c.attention_bias,
    }


def tensor_name(arch: str, part: str, module: str, leaf: str, layer: int | None = None) -> str:
    """Hugging Face name of one parameter; `part` is embed, blocks or unembed, `leaf` its name in the module.

    A leaf called "kernel" is stored transposed there ([out, in]); all others have the same shape.
    """
    name = _NAMES[arch][part][module]
    if layer is not None:
        name = f"{_LAYERS[arch]}.{layer}.{name}"
    return f"{name}.{'bias' if leaf == 'bias' else 'weight'}"


_OPT_NORM_EPS = 1e-5
_LAYERS = types.MappingProxyType({"llama": "model.layers", "opt": "model.decoder.layers"})
_NAMES = types.MappingProxyType(
    {
        "llama": {
            "embed": {"tokens": "model.embed_tokens"},
            "blocks": {
                "attn_norm": "input_layernorm",
                "q": "self_attn.q_proj",
                "k": "self_attn.k_proj",
                "v": "self_attn.v_proj",
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
            "unembed": {"norm": "model.decoder.final_layer_norm", "head": "lm_head"},
        },
    }
)


def _need(raw: Mapping[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise CheckpointError(f"the configuration has no {key}.")
    return raw[key]


def _size(raw: Mapping[str, Any], key: str) -> int:
    value = _need(raw, key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{key} is {value!r}; it must be a whole number of at least 1.")
    return value


def _or(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of `key`, or `default` where it is absent or null."""
    value = raw.get(key)
    return default if value is None else value


def _head_dim(d_model: int, n_heads: int) -> int:
    if d_model % n_heads:
        raise CheckpointError(
            f"hidden_size {d_model} is not a multiple of num_attention_heads {n_heads}, and there is no head_dim."
        )
    return d_model // n_heads


def _llama_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    d_model, n_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    max_positions = _or(raw, "max_position_embeddings", 2048)
    theta, scaling = _rope_from_hf(raw, max_positions)
    head_dim = raw.get("head_dim")
    return ModelConfig(
        arch="llama",
        vocab_size=_size(raw, "vocab_size"),
        d_model=d_model,
        n_layers=_size(raw, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=_or(raw, "num_key_value_heads", n_heads),
        head_dim=_head_dim(d_model, n_heads) if head_dim is None else head_dim,
        d_ff=_size(raw, "intermediate_size"),
        max_positions=max_positions,
        norm_eps=_or(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=_or(raw, "tie_word_embeddings", False),
        act=_or(raw, "hidden_act", "silu"),
        attention_bias=_or(raw, "attention_bias", False),
        mlp_bias=_or(raw, "mlp_bias", False),
    )


def _opt_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    d_model, n_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    if not _or(raw, "do_layer_norm_before", True):
        raise CheckpointError(
            "an opt model with do_layer_norm_before=false (norms after each half, as in opt-350m) is not "
            "supported; supported are the sizes that normalise before."
        )
    width = _or(raw, "word_embed_proj_dim", d_model)
    if width != d_model:
        raise CheckpointError(
            f"an opt model with projected embeddings (word_embed_proj_dim {width}, hidden_size {d_model}) is "
            "not supported; the two must be equal."
        )
    for key, allowed in (("layer_norm_elementwise_affine", True), ("_remove_final_layer_norm", False)):
        if _or(raw, key, allowed) != allowed:
            raise CheckpointError(
                f"an opt model with {key}={str(not allowed).lower()} is not supported; "
                f"it must be {str(allowed).lower()}."
            )
    bias = _or(raw, "enable_bias", True)
    return ModelConfig(
        arch="opt",
        vocab_size=_size(raw, "vocab_size"),
        d_model=d_model,
        n_layers=_size(raw, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=_head_dim(d_model, n_heads),
        d_ff=_size(raw, "ffn_dim"),
        max_positions=_or(raw, "max_position_embeddings", 2048),
        norm_eps=_OPT_NORM_EPS,
        tie_embeddings=_or(raw, "tie_word_embeddings", True),
        act=_or(raw, "activation_function", "relu"),
        attention_bias=bias,
        mlp_bias=bias,
    )


def _rope_from_hf(raw: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either spelling; `rope_parameters` wins where both are given."""
    rope = _or(raw, "rope_parameters", _or(raw, "rope_scaling", {}))
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"the rotary settings are {rope!r}; they must be an object or null.")
    theta = float(_or(rope, "rope_theta", _or(raw, "rope_theta", 10000.0)))
    partial = _or(rope, "partial_rotary_factor", _or(raw, "partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise CheckpointError(f"partial_rotary_factor {partial} is not supported; it must be 1.")
    kind = _or(rope, "rope_type", _or(rope, "type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(_need(rope, "factor")))
    if kind == "llama3":
        original = _or(raw, "original_max_position_embeddings", max_positions)
        return theta, RopeScaling(
            "llama3",
            float(_need(rope, "factor")),
            float(_need(rope, "low_freq_factor")),
            float(_need(rope, "high_freq_factor")),
            int(_or(rope, "original_max_position_embeddings", original)),
        )
    raise CheckpointError(f"rotary scaling {kind!r} is not supported; supported are default, linear, llama3.")


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
