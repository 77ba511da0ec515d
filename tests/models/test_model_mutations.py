"""Folders changed at random: each loads to the logits of transformers, or is refused in one sentence.

transformers draws what a folder lacks, and says so; then, and where it refuses a folder, `load` has to refuse it too. Three
times the oracle reads another folder than `load`: null is as good as absent, a whole number is a number, and biases that the
file has are read, where transformers leaves them out.
"""

import json
import math
import warnings

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.models import CheckpointError, CheckpointWarning, load
from tests.sentences import one_sentence

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    import safetensors.torch

SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GATED = {"intermediate_size": 20, "num_key_value_heads": 2}
FAMILIES = {
    "llama": ("Llama", GATED | {"tie_word_embeddings": True}),
    "llama_biased": ("Llama", GATED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", GATED | {"sliding_window": None}),
    "qwen2": ("Qwen2", GATED),
    "qwen3": ("Qwen3", GATED | {"head_dim": 8}),
    "opt": ("OPT", {"ffn_dim": 20, "word_embed_proj_dim": 24}),
    "gpt_neox": ("GPTNeoX", {"intermediate_size": 20, "rotary_pct": 1.0}),
}
EPSILONS = ("rms_norm_eps", "layer_norm_eps")
COMMON = (*tuple(SIZES)[:5], "tie_word_embeddings", "model_type")
ROTARY = ("rope_parameters", "rope_scaling", "rope_theta")
OF_LLAMA = ("num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "hidden_act", *ROTARY)
OF_QWEN = (*OF_LLAMA, "sliding_window", "use_sliding_window", "layer_types", "max_window_layers")
KEYS = {
    "llama": (*OF_LLAMA, "attention_bias", "mlp_bias"),
    "mistral": (*OF_LLAMA, "sliding_window"),
    "qwen2": OF_QWEN,
    "qwen3": (*OF_QWEN, "attention_bias"),
    "opt": ("ffn_dim", "activation_function", "enable_bias", "do_layer_norm_before", "word_embed_proj_dim"),
    "gpt_neox": ("intermediate_size", "layer_norm_eps", "hidden_act", "use_parallel_residual", "attention_bias")
    + (*ROTARY, "rotary_pct", "rotary_emb_base"),
}
VALUES = (
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    4,
    8,
    24,
    20,
    -1,
    2.0,
    0.5,
    1e-3,
    "2",
    "gelu",
    "silu",
    "quick_gelu",
    [],
    {},
    [2],
)
VALUES += (10**6, 2**40, math.inf, math.nan, ["full_attention", "sliding_attention"], ["full_attention"] * 2, "absent")
ORIGINAL = {"original_max_position_embeddings": 10}
ROPES = (
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 3},
    {"factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "truncate": None} | ORIGINAL,
    {"rope_type": "yarn", "factor": None, "mscale": 2, "mscale_all_dim": 1.0} | ORIGINAL,
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL,
    {"rope_type": "default", "rope_theta": 77.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_theta": "100"},
    {"rope_type": ["linear"], "factor": 2.0},
    {"full_attention": {"rope_type": "default", "rope_theta": 50.0}},
)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64)
WAYS = ("half", "twice", "turned", "empty")
NEW = ("x", "model.layers.5.mlp.up_proj.weight", "model.rotary_emb.inv_freq", "lm_head.bias", "score.weight")
NEW += ("model.layers.0.self_attn.q_proj.bias", "gpt_neox.layers.0.attention.masked_bias", "model.norm.bias")
BIASED = (("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"))
BIASED += (("up_proj", "gate_proj", "down_proj"), ("q_proj",))


@st.composite
def mutations(draw):
    """(family, one or two changes of its folder)."""
    family = draw(st.sampled_from(list(FAMILIES)))
    one, which = family.removesuffix("_biased"), st.integers(0, 99)
    keys = st.sampled_from((*COMMON, *KEYS[one]))
    change = st.one_of(
        st.tuples(st.just("set"), keys, st.sampled_from(VALUES)),
        st.tuples(st.just("set"), st.sampled_from(ROTARY[:2]), st.sampled_from(ROPES)),
        st.tuples(st.just("drop"), which),
        st.tuples(
            st.just("rename"), which, st.sampled_from([("model.", ""), ("layers.1", "layers.2"), ("weight", "x")])
        ),
        st.tuples(st.just("add"), st.sampled_from(NEW)),
        st.tuples(st.just("shape"), which, st.sampled_from(WAYS)),
        st.tuples(st.just("cast"), which, st.sampled_from(DTYPES)),
        st.tuples(st.just("head"), st.booleans(), st.sampled_from(["other", "same", "alone", "none"])),
        st.tuples(st.just("biases"), st.sampled_from(BIASED)),
        st.tuples(st.just("bare")),
    )
    return family, draw(st.lists(change, min_size=1, max_size=2))


def changed(raw, tensors, change):
    """What the folder holds after one change, which the dictionaries take."""
    kind, *rest = change
    if kind == "set":
        key, value = rest
        raw[key] = value
        if value == "absent":
            del raw[key]
        return
    names = sorted(tensors)
    if kind == "add":
        tensors.setdefault(rest[0], torch.ones(24))
    elif kind == "head":
        head_of(raw, tensors, *rest)
    elif kind == "biases":
        for name in names:
            if any(name.endswith(f"{module}.weight") for module in rest[0]):
                tensors.setdefault(name.replace("weight", "bias"), torch.linspace(-1, 1, len(tensors[name])))
    elif kind == "bare":
        for name in names:
            tensors[name.removeprefix("model.").removeprefix("gpt_neox.")] = tensors.pop(name)
    else:
        name = names[rest[0] % len(names)]
        held = tensors.pop(name)
        if kind == "rename":
            tensors[name.replace(*rest[1])] = held
        elif kind == "cast":
            tensors[name] = held.to(rest[1])
        elif kind == "shape":
            ways = {
                "half": held[: len(held) // 2],
                "twice": torch.cat([held, held]),
                "turned": held.t(),
                "empty": held[:0],
            }
            tensors[name] = ways[rest[1]].contiguous()


def head_of(raw, tensors, tied, how):
    """A head that is the token table or not, beside a flag that says so or not."""
    raw["tie_word_embeddings"] = tied
    table = next((name for name in tensors if "embed_tokens" in name or "embed_in" in name), None)
    head = "embed_out.weight" if table is not None and "embed_in" in table else "lm_head.weight"
    if table is None or how == "none":
        tensors.pop(head, None)
    elif how == "alone":
        tensors[head] = tensors.pop(table)
    else:
        tensors[head] = tensors[table].flip(0) if how == "other" else tensors[table].clone()


def for_oracle(raw, tensors):
    """The folder from which transformers reads what `load` reads of this one; see above."""
    raw = {key: float(value) if key in EPSILONS and type(value) is int else value for key, value in raw.items()}
    raw = {key: value for key, value in raw.items() if value is not None or key in ("sliding_window", "pad_token_id")}
    tensors, family = dict(tensors), raw["model_type"]

    def all_have(*modules):
        names = [f"layers.{layer}.{module}.bias" for layer in range(2) for module in modules]
        return all(any(held.endswith(name) for held in tensors) for name in names)

    if family == "opt":
        raw = {key: value for key, value in raw.items() if key not in ROTARY}  # it has none to check
        if all_have(*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "fc1", "fc2"):
            raw["enable_bias"] = True
    qkv = all_have(*(f"self_attn.{name}_proj" for name in "qkv"))
    mlp = all_have(*(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
    out = all_have("self_attn.o_proj")
    if family in ("llama", "mistral", "qwen2") and (mlp or (qkv and (out or family != "qwen2"))):
        raw |= {"model_type": "llama", "attention_bias": qkv, "mlp_bias": mlp}
    if family == "qwen3":
        hypothesis.assume(not mlp)  # no folder of transformers has both
        raw["attention_bias"] = qkv
    if raw.get("attention_bias") and family != "gpt_neox" and not out:
        for name in [name for name in tensors if name.endswith("o_proj.weight")]:
            tensors.setdefault(name.replace("weight", "bias"), torch.zeros(24))
    return raw, tensors


def reference(folder, raw, tensors, tokens):
    """Logits of transformers, or why there are none."""
    (folder / "config.json").write_text(json.dumps(raw))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model, said = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
            if said["missing_keys"] or said["mismatched_keys"]:
                return f"transformers draws {said['missing_keys']} {said['mismatched_keys']}"
            return model.eval()(torch.tensor(tokens)).logits.numpy()
    except Exception as error:  # of any kind
        return f"transformers refuses: {error}"


@pytest.fixture(scope="module", autouse=True)
def quiet():
    threads, level = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity(level)
    torch.set_num_threads(threads)


class Bench:
    """Families by name, a folder to write to, and the forward pass. Hypothesis prints it, so it is a name alone."""

    def __init__(self, folder, forward):
        self.folder, self.forward = folder, forward
        self.models = {family: self.model(*made) for family, made in FAMILIES.items()}

    def __repr__(self):
        return "bench"

    def model(self, kind, own):
        """(configuration, tensors) of a random model."""
        torch.manual_seed(0)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            config = getattr(transformers, f"{kind}Config")(**(SIZES | own))
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
            for value in model.parameters():
                noise = torch.randn_like(value)
                value.copy_(noise * value.shape[1] ** -0.5 if value.ndim == 2 else value + 0.3 * noise)
            model.save_pretrained(self.folder)
        raw = json.loads((self.folder / "config.json").read_text())
        return raw, safetensors.torch.load_file(self.folder / "model.safetensors")

    def check(self, family, changes):
        """The changed folder is refused in one sentence, or gives the logits of transformers."""
        raw, tensors = (dict(part) for part in self.models[family])
        for change in changes:
            if tensors:
                changed(raw, tensors, change)
        (self.folder / "config.json").write_text(json.dumps(raw))
        safetensors.torch.save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)
                model = load(self.folder, "float32")
        except CheckpointError as error:
            text = str(error)
            assert one_sentence(text)
            hypothesis.event("refused")
            return
        hypothesis.event("loaded")
        count = min(11, model.decoder.config.max_positions)
        tokens = np.random.default_rng(0).integers(3, 29, (1, count), dtype=np.int64)
        got = np.asarray(self.forward(model.decoder, model.params, jnp.asarray(tokens, jnp.int32)))
        want = reference(self.folder, *for_oracle(raw, tensors), tokens)
        assert isinstance(want, np.ndarray), want
        apart = float(np.abs(got - want).max())
        most = max(1.0, float(np.abs(want).max()))
        assert apart <= 1e-4 * most


@pytest.fixture(scope="module")
def bench(tmp_path_factory, quiet, causal_forward):
    return Bench(tmp_path_factory.mktemp("mutated"), causal_forward)


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(mutations())
def test_a_changed_folder_loads_to_transformers_logits_or_is_refused(bench, mutated):
    bench.check(*mutated)


@pytest.mark.full
@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(mutations())
def test_many_changed_folders_load_to_transformers_logits_or_are_refused(bench, mutated):
    bench.check(*mutated)
