"""Logits and greedy tokens against transformers: CPU, float32, random weights large enough to matter."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.analysis.attention_maps import attentions
from alisa_jax.engine import Engine
from alisa_jax.models import load, save

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
    "rope_theta": 500.0,
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 66,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 97,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
OPT_SIZES = {
    "vocab_size": 61,
    "hidden_size": 33,
    "ffn_dim": 41,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 97,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
NEOX_SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 41,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 97,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = {
    "llama_gqa_untied": ("llama", {"head_dim": 22, "tie_word_embeddings": False}),
    "llama_gqa_tied": ("llama", {"head_dim": 14, "tie_word_embeddings": True}),
    "llama_mha": ("llama", {"hidden_size": 60, "num_key_value_heads": 6, "rms_norm_eps": 1e-3}),
    "llama_llama3_rope": ("llama", {"head_dim": 26, "rope_parameters": LLAMA3}),
    "llama_linear_rope": (
        "llama",
        {"head_dim": 10, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0}},
    ),
    "llama_biases": ("llama", {"head_dim": 22, "attention_bias": True, "mlp_bias": True}),
    "llama_yarn": ("llama", {"head_dim": 26, "rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5}}),
    "opt_tied": ("opt", {}),
    "opt_untied_gelu": ("opt", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "opt_without_biases": ("opt", {"enable_bias": False}),
    "opt_norm_after": ("opt", {"do_layer_norm_before": False}),
    "opt_norm_after_projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 17}),
    "opt_projected_untied": ("opt", {"word_embed_proj_dim": 43, "tie_word_embeddings": False}),
    "neox_parallel": ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 700.0}),
    "neox_parallel_tied_gelu_new": ("gpt_neox", {"tie_word_embeddings": True, "hidden_act": "gelu_new"}),
    "neox_sequential": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0, "layer_norm_eps": 1e-3}),
    "neox_without_attention_bias": ("gpt_neox", {"attention_bias": False, "hidden_act": "relu"}),
    "neox_sequential_linear_rope": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "hidden_act": "gelu_fast",
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 3.0,
                "rope_theta": 700.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "neox_yarn": ("gpt_neox", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5, "truncate": False}}),
}
MODELS = {
    "llama": (SIZES, transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "opt": (OPT_SIZES, transformers.OPTConfig, transformers.OPTForCausalLM),
    "gpt_neox": (NEOX_SIZES, transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Small products run faster on one thread, much faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torch_model(arch, changes, seed=0):
    """A random transformers model whose every parameter differs from its neutral value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes, config, model = MODELS[arch]
        model = model(config(**(sizes | changes)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn_like(value)
            if value.ndim == 2:
                value.copy_(noise * value.shape[1] ** -0.5)
            else:
                value.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.eval()


def torch_logits(model, tokens):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def from_pretrained(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(params=CASES, scope="module")
def pair(request, tmp_path_factory):
    """(transformers model, our model read from the folder that transformers wrote)."""
    reference = torch_model(*CASES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.save_pretrained(folder)
    return reference, load(folder)


def test_logits_agree_with_transformers(pair, dense_forward):
    reference, model = pair
    tokens = np.random.default_rng(1).integers(3, 61, (2, 89), dtype=np.int32)
    want = torch_logits(reference, tokens)
    assert want.std() > 0.3  # flat logits would agree for free
    got = np.asarray(dense_forward(model.decoder, model.params, jnp.asarray(tokens)))
    assert np.abs(got - want).max() <= 1e-4


def test_greedy_tokens_equal_transformers_over_64_steps(pair, dense_forward):
    reference, model = pair
    prompt = np.random.default_rng(2).integers(3, 61, (2, 7), dtype=np.int32)
    want, got = prompt, np.pad(prompt, ((0, 0), (0, 64)))
    for step in range(7, 71):
        best = torch_logits(reference, want)[:, -1].argmax(-1).astype(np.int32)
        want = np.concatenate([want, best[:, None]], axis=1)
        logits = dense_forward(model.decoder, model.params, jnp.asarray(got))  # what follows is not seen
        got[:, step] = np.asarray(logits)[:, step - 1].argmax(-1)
    np.testing.assert_array_equal(got, want)


def test_transformers_reads_the_folder_that_save_writes(pair, tmp_path):
    reference, model = pair
    save(model.decoder.config, model.params, tmp_path, "float32")
    tokens = np.random.default_rng(3).integers(3, 61, (2, 43), dtype=np.int32)
    again = torch_logits(from_pretrained(tmp_path), tokens)
    assert np.abs(again - torch_logits(reference, tokens)).max() <= 1e-5


def test_parameter_count_equals_transformers(pair):
    reference, model = pair
    assert model.decoder.count_params() == reference.num_parameters()


def test_stories260k_logits_agree_with_transformers(stories, dense_forward):
    model = load(stories)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    tokens = np.asarray([model.tokenizer.encode(text).ids], np.int32)
    assert tokens[0, 0] == model.bos_id == 1
    got = np.asarray(dense_forward(model.decoder, model.params, jnp.asarray(tokens)))
    assert np.abs(got - torch_logits(from_pretrained(stories), tokens)).max() <= 1e-4


def test_attention_maps_of_stories260k_agree_with_transformers(stories):
    engine = Engine(load(stories))
    ids = engine.model.encode("Once upon a time there was a little girl who liked to play outside with her dog.")
    layers = []
    attentions(engine, [ids], lambda layer, maps, length: layers.append(maps))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        stories, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        wanted = reference(torch.tensor([ids]), output_attentions=True).attentions
    assert len(wanted) == len(layers) == 5
    for mine, theirs in zip(layers, wanted, strict=True):
        np.testing.assert_allclose(mine.weights, theirs.numpy(), atol=1e-5)
        assert (mine.weights == mine.dense).all()
