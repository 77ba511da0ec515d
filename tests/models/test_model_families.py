"""Mistral, Qwen2 and Qwen3, with YaRN too, against transformers: CPU, float32, random weights large enough to matter."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.engine import Engine
from alisa_jax.models import CheckpointError, CheckpointWarning, load, save
from alisa_jax.models.context import context_of
from alisa_jax.models.hf import config_from_hf

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

CONTEXT = 97
SIZES = {
    "vocab_size": 61,
    "hidden_size": 66,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 4.0,
    "rope_theta": 500.0,
}
CASES = {
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 14}),
    "mistral_within_its_window": ("Mistral", {"sliding_window": CONTEXT, "head_dim": 22}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 14}),
    "qwen3_biased": ("Qwen3", {"head_dim": 14, "attention_bias": True}),
    "qwen3_yarn": ("Qwen3", {"head_dim": 26, "rope_parameters": YARN}),
}
RUN = ("mistral", "qwen2", "qwen3", "qwen3_yarn")  # whose engines are compiled


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(name, folder, seed=0):
    """(transformers model, our model of the folder that it was saved to)."""
    family, changes = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
        reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for value in reference.parameters():
                noise = torch.randn_like(value)
                value.copy_(2.0 * noise * value.shape[1] ** -0.5 if value.ndim == 2 else value + 0.3 * noise)
        reference.save_pretrained(folder)
    return reference, load(folder)


@pytest.fixture(params=CASES, scope="module")
def pair(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=RUN, scope="module")
def run(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.mktemp(request.param), seed=1)


def torch_logits(model, tokens):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.float().numpy()


def test_logits_agree_with_transformers(pair, dense_forward):
    reference, model = pair
    tokens = np.random.default_rng(1).integers(3, 61, (2, CONTEXT), dtype=np.int32)
    want = torch_logits(reference, tokens)
    assert want.std() > 0.3
    got = np.asarray(dense_forward(model.decoder, model.params, jnp.asarray(tokens)))
    assert np.abs(got - want).max() <= 1e-4
    assert model.decoder.config.max_positions == CONTEXT
    assert model.decoder.count_params() == reference.num_parameters()


def test_a_folder_that_is_written_names_the_family_and_transformers_reads_it(pair, tmp_path):
    reference, model = pair
    save(model.decoder.config, model.params, tmp_path, "float32")
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == reference.config.model_type and raw["architectures"] == [type(reference).__name__]
    assert load(tmp_path).decoder == model.decoder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = np.random.default_rng(3).integers(3, 61, (2, 43), dtype=np.int32)
    assert np.abs(torch_logits(again, tokens) - torch_logits(reference, tokens)).max() <= 1e-5


@pytest.mark.full(sample=1, per="policy")
@pytest.mark.parametrize("policy", ["dense", "streaming(sinks=4,tokens=96,positions=cache)"])
def test_greedy_tokens_equal_transformers_over_64_steps(run, policy):
    """The second stores keys before their rotation, and turns them at every step."""
    reference, model = run
    prompt = np.random.default_rng(33).integers(3, 61, CONTEXT - 64).tolist()
    (tokens,) = Engine(model, policy).generate([prompt], 64, eos_ids=()).tokens
    best = torch_logits(reference, [prompt + tokens])[0, len(prompt) - 1 : -1].argmax(-1)
    assert tokens == best.tolist() and len(tokens) == 64 and len(set(tokens)) > 5


@pytest.mark.full
def test_a_selection_is_the_same_step_by_step_and_under_a_mask(run):
    _, model = run
    engine = Engine(model, "swa(kv_sparsity=0.5)")
    tokens = [np.random.default_rng(5).integers(3, 61, 71).tolist()]
    (steps,), (mask,) = (engine.score(tokens, protocol).logprobs for protocol in ("decode", "prefill_mask"))
    np.testing.assert_allclose(steps, mask, atol=1e-4)


def raw_config(name, **changes):
    family, own = CASES[name]
    raw = json.loads(getattr(transformers, f"{family}Config")(**(SIZES | own)).to_json_string(use_diff=False))
    return {key: value for key, value in (raw | changes).items() if value != "absent"}


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    "name, changes, context",
    [
        ("mistral", {"sliding_window": 31}, 31),
        ("mistral", {"sliding_window": "absent", "max_position_embeddings": 32768}, 4096),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 31, "layer_types": [FULL, SLIDING]}, 31),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 31, "layer_types": None, "max_window_layers": 1}, 31),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 31, "layer_types": None, "max_window_layers": 0}, 31),
    ],
)
def test_the_window_ends_the_context_and_that_is_said(name, changes, context):
    with pytest.warns(CheckpointWarning, match=rf"the last {context} tokens alone .*; its context is {context} tokens"):
        config = config_from_hf(raw_config(name, **changes))
    assert config.max_positions == context


def test_attention_within_the_window_is_that_of_transformers_and_beyond_it_is_not(tmp_path, dense_forward):
    reference, model = made("mistral_within_its_window", tmp_path)
    reference.config.sliding_window = 31
    tokens = np.random.default_rng(6).integers(3, 61, (1, CONTEXT), dtype=np.int32)
    got = np.asarray(dense_forward(model.decoder, model.params, jnp.asarray(tokens)))
    apart = np.abs(got - torch_logits(reference, tokens))[0].max(-1)
    assert apart[:31].max() <= 1e-4 and apart[31:].min() > 1e-3


@pytest.mark.parametrize(
    "name, changes",
    [
        ("mistral", {"sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 31}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 31, "layer_types": None, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 31, "layer_types": [FULL, FULL]}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}),
    ],
)
def test_a_window_that_no_layer_has_does_not_shorten_the_context(name, changes):
    assert context_of(raw_config(name, **changes)) == CONTEXT


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; it must be a whole number of at least 1"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window is 'no'; it must be true or false"),
        ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types must be a list of"),
        ("qwen2", {"layer_types": [SLIDING, FULL]}, "and no window is in use"),
        ("qwen3", {"rope_parameters": {FULL: {"rope_type": "default"}}}, "settings by layer are not supported"),
        ("qwen3", {"rope_parameters": YARN | {"beta_slow": 5.0}}, "beta_slow=5.0 and beta_fast=4.0"),
        ("qwen3", {"rope_parameters": YARN | {"attention_factor": "1"}}, "attention_factor is '1'"),
        ("qwen3", {"rope_parameters": YARN | {"rope_theta": 1}}, "rope_theta is 1.0; yarn needs one above 1"),
        ("qwen3", {"num_key_value_heads": 4}, "not a multiple of n_kv_heads=4"),
        *(
            ("mistral", {"model_type": other}, f"model_type '{other}' is not a supported architecture; supported are")
            for other in ("phi3", "gemma2", "smollm3", "mixtral", "qwen2_moe", "qwen3_moe")
        ),
    ],
)
def test_what_is_not_supported_is_refused_in_one_sentence(name, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        config_from_hf(raw_config(name, **changes))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
