"""`config.json`: every spelling reads alike, and what would change the arithmetic is refused."""

import dataclasses
import json

import pytest

from alisa_jax.models import CheckpointError, CheckpointWarning, ModelConfig, RopeScaling
from alisa_jax.models.hf import config_from_hf, config_to_hf

LLAMA = ModelConfig(
    arch="llama",
    vocab_size=61,
    d_model=23,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=14,
    d_ff=37,
    max_positions=97,
    norm_eps=1e-3,
    rope_theta=700.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
)
OPT = ModelConfig(
    arch="opt",
    vocab_size=61,
    d_model=33,
    n_layers=2,
    n_heads=3,
    n_kv_heads=3,
    head_dim=11,
    d_ff=41,
    max_positions=97,
    tie_embeddings=True,
    act="relu",
    attention_bias=True,
    mlp_bias=True,
)
NEOX = ModelConfig(
    arch="gpt_neox",
    vocab_size=61,
    d_model=48,
    n_layers=2,
    n_heads=3,
    n_kv_heads=3,
    head_dim=16,
    d_ff=41,
    max_positions=97,
    norm_eps=1e-3,
    rope_theta=700.0,
    act="gelu",
    attention_bias=True,
    mlp_bias=True,
    rotary_frac=0.25,
    parallel_residual=True,
)


def edited(config, changes):
    raw = config_to_hf(config, "float16") | changes
    return {key: value for key, value in raw.items() if value != "absent"}


OLD = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "torch_dtype": "float16"}
NEW = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}, "dtype": "float16"}
MIXED = {"rope_scaling": {"rope_theta": 5e5, "type": "linear", "factor": 4.0}, "dtype": "float16"}


@pytest.mark.parametrize("spelling", [OLD, NEW, MIXED])
def test_every_spelling_of_the_rotary_settings_reads_alike(spelling):
    config = config_from_hf(edited(LLAMA, {"rope_theta": "absent", "rope_scaling": "absent"} | spelling))
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 4.0))


def test_llama3_scaling_falls_back_on_the_context_that_the_file_states():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = config_from_hf(edited(LLAMA, {"rope_scaling": scaling}))
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 97)


def test_of_two_rotary_settings_the_one_that_transformers_takes_counts():
    linear = {"rope_type": "linear", "factor": 4.0}
    both = {"rope_scaling": linear, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    assert config_from_hf(edited(LLAMA, both)).rope_scaling == RopeScaling("linear", 4.0)
    scaling = config_to_hf(LLAMA, "float32")["rope_scaling"] | {"original_max_position_embeddings": 32}
    top = {"rope_scaling": scaling, "original_max_position_embeddings": 16}
    assert config_from_hf(edited(LLAMA, top)).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
    other = {"rotary_pct": "absent", "rotary_emb_base": "absent", "partial_rotary_factor": 1.0, "rope_theta": 5.0}
    config = config_from_hf(edited(NEOX, other))  # of a llama
    assert (config.rotary_frac, config.rope_theta) == (0.25, 10000.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a whole number"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'; it must be a whole number"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1; it must be a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a finite number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number above 0"),
        ({"rope_theta": True}, "rope_theta is True; it must be a finite number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor is '4'; it must be a finite number above 0"),
        ({"hidden_act": ["silu"]}, r"hidden_act \['silu'\] is not supported"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not a supported architecture"),
    ],
)
def test_a_value_of_a_wrong_kind_is_named(changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        config_from_hf(edited(LLAMA, changes))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_old_llama_files_leave_out_what_was_fixed_then():
    raw = {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "intermediate_size": 37,
    }
    with pytest.warns(CheckpointWarning, match="no max_position_embeddings; 2048 are assumed"):
        config = config_from_hf(raw)
    assert (config.n_kv_heads, config.head_dim, config.rope_theta, config.max_positions) == (6, 10, 1e4, 2048)
    assert (config.norm_eps, config.tie_embeddings, config.act) == (1e-6, False, "silu")


NEOX_OLD = {"rotary_emb_base": 5e5, "rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 4.0}}
NEOX_NEW = {
    "rotary_emb_base": "absent",
    "rotary_pct": "absent",
    "rope_scaling": "absent",
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("spelling", [NEOX_OLD, NEOX_NEW])
def test_every_spelling_of_the_rotated_share_reads_alike(spelling):
    config = config_from_hf(edited(NEOX, spelling))
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 4.0))
    assert (config.rotary_frac, config.rotary_dims) == (0.5, 8)


def test_old_pythia_files_leave_out_what_was_fixed_then():
    raw = {
        "model_type": "gpt_neox",
        "vocab_size": 61,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 41,
    }
    with pytest.warns(CheckpointWarning, match="no max_position_embeddings; 2048 are assumed"):
        config = config_from_hf(raw)
    assert (config.head_dim, config.rotary_dims, config.rope_theta, config.max_positions) == (16, 4, 1e4, 2048)
    assert (config.norm_eps, config.tie_embeddings, config.act) == (1e-5, False, "gelu")
    assert config.parallel_residual and config.attention_bias and config.mlp_bias


@pytest.mark.parametrize(
    "name, act",
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("swish", "silu"),
        ("relu", "relu"),
    ],
)
def test_every_name_of_an_activation_is_understood_and_written_back_as_one(name, act):
    for base, key in ((LLAMA, "hidden_act"), (OPT, "activation_function"), (NEOX, "hidden_act")):
        config = config_from_hf(edited(base, {key: name}))
        assert config.act == act
        assert config_from_hf(config_to_hf(config, "float32")) == config


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        OPT,
        dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 2.0), mlp_bias=True),
        dataclasses.replace(OPT, norm_before=False, embed_dim=17),
        dataclasses.replace(OPT, embed_dim=43, act="gelu_tanh"),
        NEOX,
        dataclasses.replace(NEOX, parallel_residual=False, attention_bias=False, tie_embeddings=True),
        dataclasses.replace(NEOX, rotary_frac=1.0, act="relu", rope_scaling=LLAMA.rope_scaling),
    ],
)
def test_configurations_survive_the_round_trip(config):
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config, "bfloat16")))) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "absent"}, "None is not a supported architecture"),
        ({"quantization_config": {"bits": 4}}, "is quantised"),
        ({"hidden_size": "absent"}, "has no hidden_size"),
        ({"hidden_size": "23"}, "hidden_size is '23'"),
        ({"num_key_value_heads": 4}, "not a multiple of n_kv_heads=4"),
        ({"head_dim": None}, "hidden_size 23 is not a multiple of num_attention_heads 6"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported; supported are silu, "),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "has no factor"),
        ({"rope_scaling": 3}, "must be an object or null"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ],
)
def test_a_llama_setting_that_is_not_supported_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(edited(LLAMA, changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"word_embed_proj_dim": -17}, "word_embed_proj_dim is -17"),
        ({"activation_function": "gelu_10"}, "activation_function 'gelu_10' is not supported"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=false"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm=true"),
        ({"num_attention_heads": 4}, "not a multiple of num_attention_heads 4"),
    ],
)
def test_an_opt_variant_that_is_not_supported_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(edited(OPT, changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
        ({"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
        ({"rotary_pct": 0.2}, "head_dim is 16 of which a share of 0.2 is rotated; rotary positions need an even"),
        ({"rotary_pct": 0.0}, "rotary_pct is 0.0"),
        ({"rotary_pct": 1.5}, "rotary_frac is 1.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic' is not supported"),
        ({"intermediate_size": None}, "has no intermediate_size"),
    ],
)
def test_a_gpt_neox_setting_that_is_not_supported_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(edited(NEOX, changes))


@pytest.mark.parametrize(
    "config, message",
    [
        (dataclasses.replace(NEOX, mlp_bias=False), "mlp_bias = true"),
        (dataclasses.replace(OPT, mlp_bias=False), "attention_bias = mlp_bias"),
    ],
)
def test_what_a_folder_cannot_say_is_not_written(config, message):
    with pytest.raises(CheckpointError, match=message):
        config_to_hf(config, "float32")
