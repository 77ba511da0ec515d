"""`Engine.generate` on a trained model: a ragged batch is its prompts one by one; stop tokens; repeatability."""

import numpy as np
import pytest

import alisa_jax
from alisa_jax import Batch

SWA = "swa(kv_sparsity=0.6)"
OPTIONS = "swa(kv_sparsity=0.7,window=2k,shared_heads=false,refresh_every=8,dense_layers=1)"
LAYERS = {"dense": 5, SWA: 5}  # the whole model, whose texts are known; else the first 2
# Lengths of the prompts and number of new tokens. The bucket of 1 .. 32 tokens is 32, of 161 .. 224 it is 224.
WIDE = ((1, 3, 5, 9, 17, 24, 28, 32), 30)  # the batch crosses 32, the shortest prompts alone do not
CROSSING = ((161, 163, 166, 168, 171, 175, 179, 184), 50)  # the batch crosses 224, four of its prompts alone do not
INSIDE = (CROSSING[0], 40)
CASES = {
    "dense": WIDE,
    "local(kv_sparsity=0.6)": INSIDE,
    "strided(kv_sparsity=0.6)": INSIDE,
    "strided(kv_sparsity=0.6,anchor=query)": INSIDE,
    SWA: INSIDE,
    OPTIONS: CROSSING,
}


@pytest.fixture(scope="module")
def some(engine):
    """`some(policy)`: the engine of as many layers as the policy is tried on."""
    return lambda policy: engine(policy, layers=LAYERS.get(policy, 2))


@pytest.fixture(scope="module")
def together(some, story_ids):
    """`together(policy)`: (prompts, number of new tokens, the batch's result)."""
    done = {}

    def get(policy):
        if policy not in done:
            lengths, new = CASES[policy]
            prompts = [s[:n] for s, n in zip(story_ids, lengths)]
            done[policy] = prompts, new, some(policy).generate(prompts, new, eos_ids=())
        return done[policy]

    return get


def agreed(tokens, margins, other_tokens, other_margins):
    """How many tokens two runs share at least: all before the first whose two best logits are within 1e-4."""
    close = np.minimum(margins, other_margins) <= 1e-4
    n = int(close.argmax()) if close.any() else len(close)
    assert tokens[:n] == other_tokens[:n]
    assert np.abs(margins[:n] - other_margins[:n]).max(initial=0.0) < 1e-3
    return n


@pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=[] if p == SWA else [pytest.mark.slow, pytest.mark.full(sample=2)]) for p in CASES],
)
def test_a_ragged_batch_gives_what_its_prompts_give_one_by_one(some, together, policy):
    prompts, new, batch = together(policy)
    checked = 0
    for prompt, tokens, margins in zip(prompts, batch.tokens, batch.margins, strict=True):
        alone = some(policy).generate([prompt], new, eos_ids=())
        assert len(tokens) == len(alone.tokens[0]) == new
        checked += agreed(tokens, margins, alone.tokens[0], alone.margins[0])
    assert checked > 0.8 * len(prompts) * new


def test_generation_follows_the_text_that_is_known_of_this_model(together):
    _, _, batch = together("dense")
    assert batch.texts[0].startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(some, together, side):
    prompts, new, batch = together(SWA)
    T = max(map(len, prompts)) + 5
    tokens, mask = np.full((len(prompts), T), 7), np.zeros((len(prompts), T), np.int32)
    for i, prompt in enumerate(prompts):
        place = slice(T - len(prompt), T) if side == "left" else slice(0, len(prompt))
        tokens[i, place], mask[i, place] = prompt, 1
    again = some(SWA).generate(Batch.from_padded(tokens, mask), new, eos_ids=())
    assert again.tokens == batch.tokens
    assert again.compiles == 0


def test_a_sequence_ends_with_its_first_stop_token(some, together, trained):
    prompts, new, free = together(SWA)
    stop = trained.encode("dog.")[-1]
    stopped = some(SWA).generate(prompts, new, eos_ids=[stop])
    lengths = [row.index(stop) + 1 if stop in row else new for row in free.tokens]
    assert len(set(lengths)) > 3 and min(lengths) < new  # they end at different steps
    assert stopped.tokens == [row[:n] for row, n in zip(free.tokens, lengths)]
    for margins, all_margins, n in zip(stopped.margins, free.margins, lengths, strict=True):
        np.testing.assert_array_equal(margins, all_margins[:n])
    for i in range(0, 8, 3):
        alone = some(SWA).generate([prompts[i]], new, eos_ids=[stop])
        n = agreed(stopped.tokens[i], stopped.margins[i], alone.tokens[0][: lengths[i]], alone.margins[0][: lengths[i]])
        assert n < lengths[i] or len(alone.tokens[0]) == lengths[i]


def test_a_stop_token_right_after_the_prompt_is_all_that_is_returned(some, together):
    prompts, new, free = together(SWA)
    first = sorted({row[0] for row in free.tokens})
    # Nothing is left to do, so no step runs and nothing is traced, whatever the number of stop ids.
    stopped = some(SWA).generate(prompts, new, eos_ids=first)
    assert stopped.tokens == [row[:1] for row in free.tokens]
    assert stopped.compiles == 0


def test_the_same_call_gives_the_same_bits(some, together):
    prompts, new, first = together(SWA)
    second = some(SWA).generate(prompts, new, eos_ids=())
    assert second.tokens == first.tokens
    for a, b in zip(first.margins, second.margins, strict=True):
        np.testing.assert_array_equal(a, b)
    assert second.compiles == 0


def test_a_fresh_engine_gives_the_same_bits(random_model):
    model = random_model()
    prompts = [np.random.default_rng(n).integers(0, 37, n).tolist() for n in (70, 41)]
    a, b = (alisa_jax.Engine(model, "swa(kv_sparsity=0.5)").generate(prompts, 9) for _ in range(2))
    assert a.compiles == b.compiles == 3  # the prompt, its next token, a chunk
    assert a.tokens == b.tokens
    np.testing.assert_array_equal(a.margins, b.margins)
