"""The `config.json` of Hugging Face folders, both ways.

| model_type | variants that are read and written |
| --- | --- |
| llama | grouped-query attention, biases, rotary scaling default, linear or llama3 |
| opt | norms before or after each half, with or without biases, projected embeddings (opt-350m) |
| gpt_neox | parallel or sequential residuals, any even rotated share, attention biases, scalings |

All of them with a tied or an untied head and the activations of `ACTIVATIONS`; gpt_neox with the
scalings of llama. Pure functions on dictionaries; files are read and written in `checkpoint.py`.
Both spellings of the rotary settings are read: `rope_theta` at the top (`rotary_emb_base` and
`rotary_pct` for gpt_neox) with an optional `rope_scaling`, and the newer `rope_parameters` (or
`rope_scaling`) that holds them all. A setting that would change the arithmetic and is not
implemented is refused, never ignored.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from alisa_jax.models.config import ARCHITECTURES, ModelConfig, RopeScaling

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


class CheckpointError(ValueError):
    """A model folder or name that cannot be used; the message says why in one sentence."""


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`.

    Raises CheckpointError for an unsupported architecture or setting, a missing or a wrong value.
    """
    arch = raw.get("model_type")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"model_type {arch!r} is not a supported architecture; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    if raw.get("quantization_config") is not None:
        raise CheckpointError(
            "the checkpoint is quantised (quantization_config is set); supported are plain "
            "float32, float16 and bfloat16 weights."
        )
    try:
        return _READERS[arch](raw)
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
    act = next(name for name, meant in ACTIVATIONS.items() if meant == c.act)
    if c.arch == "llama":
        return raw | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "intermediate_size": c.d_ff,
            "num_key_value_heads": c.n_kv_heads,
            "head_dim": c.head_dim,
            "hidden_act": act,
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta,
            "rope_scaling": _rope_scaling_to_hf(c.rope_scaling),
            "attention_bias": c.attention_bias,
            "mlp_bias": c.mlp_bias,
        }
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
            "rope_scaling": _rope_scaling_to_hf(c.rope_scaling),
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


_OPT_NORM_EPS = 1e-5


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
            f"hidden_size {d_model} is not a multiple of num_attention_heads {n_heads}, and there "
            "is no head_dim."
        )
    return d_model // n_heads


def _act(raw: Mapping[str, Any], key: str, default: str) -> str:
    name = _or(raw, key, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{key} {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def _llama_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    d_model, n_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    max_positions = _or(raw, "max_position_embeddings", 2048)
    theta, scaling, share = _rope_from_hf(raw, max_positions)
    if share not in (None, 1.0):
        raise CheckpointError(
            f"partial_rotary_factor {share} is not supported for a llama model; it must be 1."
        )
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
        act=_act(raw, "hidden_act", "silu"),
        attention_bias=_or(raw, "attention_bias", False),
        mlp_bias=_or(raw, "mlp_bias", False),
    )


def _opt_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    d_model, n_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    before, width = _or(raw, "do_layer_norm_before", True), _or(raw, "word_embed_proj_dim", d_model)
    for key, allowed in (
        ("layer_norm_elementwise_affine", True),
        ("_remove_final_layer_norm", False),
    ):
        if _or(raw, key, allowed) != allowed and (before or key != "_remove_final_layer_norm"):
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
        act=_act(raw, "activation_function", "relu"),
        attention_bias=bias,
        mlp_bias=bias,
        norm_before=before,
        embed_dim=None if width == d_model else width,
    )


def _neox_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    d_model, n_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    max_positions = _or(raw, "max_position_embeddings", 2048)
    theta, scaling, share = _rope_from_hf(raw, max_positions)
    return ModelConfig(
        arch="gpt_neox",
        vocab_size=_size(raw, "vocab_size"),
        d_model=d_model,
        n_layers=_size(raw, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=_head_dim(d_model, n_heads),
        d_ff=_size(raw, "intermediate_size"),
        max_positions=max_positions,
        norm_eps=_or(raw, "layer_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=_or(raw, "tie_word_embeddings", False),
        act=_act(raw, "hidden_act", "gelu"),
        attention_bias=_or(raw, "attention_bias", True),
        mlp_bias=True,
        rotary_frac=0.25 if share is None else share,
        parallel_residual=_or(raw, "use_parallel_residual", True),
    )


_READERS = types.MappingProxyType(
    {"llama": _llama_from_hf, "opt": _opt_from_hf, "gpt_neox": _neox_from_hf}
)


def _rope_from_hf(
    raw: Mapping[str, Any], max_positions: int
) -> tuple[float, RopeScaling | None, float | None]:
    """(theta, scaling, rotated share where stated) of any spelling; `rope_parameters` wins."""
    rope = _or(raw, "rope_parameters", _or(raw, "rope_scaling", {}))
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"the rotary settings are {rope!r}; they must be an object or null.")
    theta = float(
        _or(rope, "rope_theta", _or(raw, "rotary_emb_base", _or(raw, "rope_theta", 10000.0)))
    )
    share = _or(
        rope, "partial_rotary_factor", _or(raw, "rotary_pct", raw.get("partial_rotary_factor"))
    )
    kind = _or(rope, "rope_type", _or(rope, "type", "default"))
    if kind == "default":
        return theta, None, share
    if kind == "linear":
        return theta, RopeScaling("linear", float(_need(rope, "factor"))), share
    if kind == "llama3":
        original = _or(raw, "original_max_position_embeddings", max_positions)
        scaling = RopeScaling(
            "llama3",
            float(_need(rope, "factor")),
            float(_need(rope, "low_freq_factor")),
            float(_need(rope, "high_freq_factor")),
            int(_or(rope, "original_max_position_embeddings", original)),
        )
        return theta, scaling, share
    raise CheckpointError(
        f"rotary scaling {kind!r} is not supported; supported are default, linear, llama3."
    )


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
