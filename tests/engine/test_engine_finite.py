"""Logits that are no numbers end a run with a sentence: resident and placed, greedy and drawn, and in scoring.

The models know a token, `BAD`, whose embedding is NaN, and a chain of tokens leads to it: token t is followed by t + 1, as
the head's row of t + 1 is the embedding of t. So the step at which the numbers end is known.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import alisa_jax
from alisa_jax.models import Decoder, Model, ModelConfig
from eval import perplexity
from eval.script import common

BAD = 5
SIZES = dict(vocab_size=16, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, max_positions=96)
PROMPTS = [[10, 11], [1, 2], [13, 14, 8]]  # only the second comes to 5, as its third new token


def chain(dtype: str) -> Model:
    """Blocks that add nothing, one-hot embeddings, a head that says t + 1 after t."""
    decoder = Decoder(ModelConfig(arch="llama", **SIZES))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(decoder.init, jax.random.key(0)))
    table = np.eye(16, dtype=np.float32)
    table[BAD] = np.nan
    params["embed"]["tokens"]["table"] = table
    params["unembed"]["head"]["weight"] = np.roll(np.eye(16, dtype=np.float32), 1, axis=0)
    params["unembed"]["norm"]["scale"] = np.full(16, 8, np.float32)
    return Model(decoder, jax.tree.map(lambda x: jnp.asarray(x, dtype), params), None, "chain", None, (), "random")


@pytest.fixture(scope="module")
def engine():
    return alisa_jax.Engine(chain("float32"))


def test_the_chain_is_one(engine):
    made = engine.generate([[1, 2], [10]], 3)
    assert made.tokens == [[3, 4, 5], [11, 12, 13]] and np.isfinite(np.concatenate(made.logprobs)).all()


@pytest.mark.parametrize("sampling", [None, alisa_jax.Sampling(0.01)], ids=["greedy", "drawn"])
def test_a_generation_ends_where_its_logits_are_nan(engine, sampling):
    """Token 5 is new token 2 of prompt 1, and what comes after it, new token 3, is no number."""
    for steps, at in ((8, 3), (4, 3)):
        with pytest.raises(
            FloatingPointError, match=f"logits of chain are NaN at new token {at} of prompt 1; in float32"
        ):
            engine.generate(PROMPTS, steps, sampling=sampling)
    assert engine.generate(PROMPTS, 3, sampling=sampling).tokens[1] == [3, 4, 5]
    with pytest.raises(FloatingPointError, match="NaN at new token 0 of prompt 1"):
        engine.generate([[1], [3, 5]], 4, sampling=sampling)


def test_what_a_sequence_that_has_ended_still_computes_is_of_no_account(engine):
    made = engine.generate(PROMPTS, 8, eos_ids=[5])
    assert made.tokens[1] == [3, 4, 5] and made.finish_reasons[1] == "stop_token" and len(made.tokens[0]) == 8


@pytest.mark.parametrize("controller", ["waves", "accelerate"])
def test_a_placed_generation_ends_as_well(engine, controller):
    one = engine.under(controller)
    with pytest.raises(FloatingPointError, match="NaN at new token 3 of prompt 1"):
        one.generate([[10, 11], [1, 2]], 8)
    with pytest.raises(FloatingPointError, match="NaN at token 3 of sequence 0"):
        one.score([[1, 2, 5, 7, 8, 9]])


@pytest.mark.parametrize("protocol", ["decode", "prefill_mask", "prompt"])
def test_scores_that_are_nan_are_told(engine, protocol):
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5, 6, 7]]
    at = "[1-4]" if protocol == "prefill_mask" else "4"  # a mask multiplies by 0, which NaN goes through
    with pytest.raises(FloatingPointError, match=f"NaN at token {at} of sequence 1"):
        engine.score(sequences, protocol, last=[2, 3])
    assert np.isfinite(engine.score([[1, 2, 3, 4], [6, 7, 8, 9, 10]], protocol, last=[2, 3]).logprobs[1]).all()


def test_sixteen_bits_are_told_what_to_try():
    model = chain("float16")
    with pytest.raises(FloatingPointError, match=r"it computes in float16: load it with dtype=float32$"):
        alisa_jax.Engine(model).generate([[5]], 1)


def test_a_command_tells_it_in_one_sentence(tmp_path, capsys):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(16)}, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = dataclasses.replace(chain("float32"), tokenizer=words)
    (tmp_path / "text.txt").write_text("1 2 3 4 5 6 7 8")
    argv = ["perplexity", f"--text={tmp_path / 'text.txt'}", "--context=8", "--protocol=prefill_mask", "--json"]
    assert common.run(lambda a: perplexity.main(a, lambda _: model), argv) == common.EXIT_MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: the logits of chain are NaN at token ") and err.count("\n") == 1
