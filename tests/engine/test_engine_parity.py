"""The engine against transformers, and against a published perplexity: CPU, float32."""

import warnings

import numpy as np
import pytest

import alisa_jax

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

LLAMA = dict(vocab_size=61, hidden_size=66, intermediate_size=37, num_hidden_layers=2, num_attention_heads=6)
OPT = dict(vocab_size=61, hidden_size=33, ffn_dim=41, num_hidden_layers=2, num_attention_heads=3)
POST = dict(do_layer_norm_before=False, word_embed_proj_dim=19)
NEOX = dict(vocab_size=61, hidden_size=48, intermediate_size=41, num_hidden_layers=2, num_attention_heads=3)
GQA = dict(num_key_value_heads=2, head_dim=22)
CASES = {
    "llama_gqa_untied": (transformers.LlamaForCausalLM, LLAMA | GQA | dict(tie_word_embeddings=False)),
    "llama_gqa_tied": (transformers.LlamaForCausalLM, LLAMA | GQA | dict(tie_word_embeddings=True)),
    "opt": (transformers.OPTForCausalLM, OPT),
    "opt_norm_after_projected": (transformers.OPTForCausalLM, OPT | POST),
    "gpt_neox": (transformers.GPTNeoXForCausalLM, NEOX),
}
CONTEXT = 97  # not a bucket: the last bucket (128) is longer than the table of positions


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES, scope="module")
def pair(request, tmp_path_factory):
    """(transformers model with random weights that matter, engine of the folder that it was saved to)."""
    cls, sizes = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = cls(cls.config_class(**sizes, max_position_embeddings=CONTEXT)).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for value in reference.parameters():
                noise = torch.randn_like(value)
                value.copy_(2.0 * noise * value.shape[1] ** -0.5 if value.ndim == 2 else value + 0.3 * noise)
        reference.save_pretrained(folder)
    return reference, alisa_jax.Engine(alisa_jax.load(folder), "dense")


def logprobs_of(reference, sequence):
    """Log-probability of each next token and the next-token logits, from one pass without a cache."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = reference(torch.tensor([sequence]), use_cache=False).logits[0].double()
    logp = torch.log_softmax(logits, -1)[:-1]
    return logp.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0].numpy(), logits.numpy()


def test_greedy_tokens_equal_transformers_over_64_steps(pair):
    reference, engine = pair
    prompts = [np.random.default_rng(n).integers(3, 61, n).tolist() for n in (33, 20)]
    made = engine.generate(prompts, 64, eos_ids=())
    for prompt, tokens, margins in zip(prompts, made.tokens, made.margins, strict=True):
        _, logits = logprobs_of(reference, prompt + tokens)
        logits = logits[len(prompt) - 1 : -1]  # each is the best continuation of all before it, by induction
        assert tokens == logits.argmax(-1).tolist()
        two = np.sort(logits, axis=-1)[:, -2:]
        assert np.abs(two[:, 1] - two[:, 0] - margins).max() <= 1e-4
        assert len(tokens) == 64 and len(set(tokens)) > 5  # one token over and over would agree for free


@pytest.mark.parametrize("protocol", ["decode", "prefill_mask"])
def test_logprobs_agree_with_transformers_up_to_the_last_position(pair, protocol):
    reference, engine = pair
    sequences = [np.random.default_rng(n).integers(3, 61, n).tolist() for n in (CONTEXT, 51)]
    scores = engine.score(sequences, protocol)
    for sequence, got, correct in zip(sequences, scores.logprobs, scores.correct, strict=True):
        want, logits = logprobs_of(reference, sequence)
        assert want.std() > 0.3
        assert np.abs(got - want).max() <= 1e-4
        np.testing.assert_array_equal(correct, logits[:-1].argmax(-1) == sequence[1:])


@pytest.mark.usefixtures("optimised")
def test_dense_perplexity_equals_transformers_and_the_published_value(trained, stories, story_ids, engine):
    assert sum(len(s) - 1 for s in story_ids) == 10_749
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    want = np.concatenate([logprobs_of(reference, s)[0] for s in story_ids])
    scores = engine("dense").score(story_ids, "prefill_mask")
    got = np.concatenate(scores.logprobs)
    assert np.abs(got - want).max() <= 1e-4
    perplexity = np.exp(-got.mean(dtype=np.float64))
    assert perplexity == pytest.approx(np.exp(-want.mean()), rel=1e-3)
    assert perplexity == pytest.approx(4.083, rel=1e-3)
