"""`Engine.score(last=...)`: choices that share the steps of their context, and states that sequences adopt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax.engine import shared, step
from alisa_jax.engine.batch import Batch

SWA = "swa(kv_sparsity=0.6)"
CASES = [
    ("dense", "raw"),
    (SWA, "int8(calibration_tokens=9)"),
    ("swa(kv_sparsity=0.6,window=2k,shared_heads=false)", "raw"),
    ("swa(kv_sparsity=0.6,decay=0.9)", "int8(axis=token)"),
    ("h2o(kv_sparsity=0.6)", "raw"),
]
CONTEXTS = (27, 9, 9, 18)  # tokens; of items with 2, 3, 1 and 2 choices


@pytest.fixture(scope="module")
def choices():
    """Sequences and how many of their last tokens are asked for; the choices of an item stand apart from one another."""
    rng = np.random.default_rng(1)
    items = [(rng.integers(0, 37, size + 1).tolist(), n) for size, n in zip(CONTEXTS, (2, 3, 1, 2), strict=True)]
    made = [(head, rng.integers(0, 37, rng.integers(1, 5)).tolist()) for head, n in items for _ in range(n)]
    order = rng.permutation(len(made))
    return [made[i][0] + made[i][1] for i in order], [len(made[i][1]) for i in order]


@pytest.mark.slow
@pytest.mark.full(sample=1, per="codec")
@pytest.mark.parametrize("policy, codec", CASES)
def test_choices_that_share_a_context_score_as_alone(random_model, choices, policy, codec):
    engine = alisa_jax.Engine(random_model(), policy, codec)
    sequences, last = choices
    found, whole = engine.score(sequences, last=last), engine.score(sequences)
    for got, all_of_it, n in zip(found.logprobs, whole.logprobs, last, strict=True):
        np.testing.assert_allclose(got, all_of_it[-n:], atol=2e-5 if "int8" not in codec else 2e-4)
    assert found.decoded_tokens == sum(CONTEXTS) + sum(last) < whole.decoded_tokens == sum(map(len, sequences)) - 8
    hits = [got == all_of_it[-n:] for got, all_of_it, n in zip(found.correct, whole.correct, last, strict=True)]
    assert np.concatenate(hits).mean() > 0.9  # near-ties may fall either way


@pytest.mark.slow
def test_one_masked_pass_gives_the_last_tokens_as_well(random_model, choices):
    engine = alisa_jax.Engine(random_model(), SWA)
    sequences, last = choices
    shared_steps, masked = engine.score(sequences, last=last), engine.score(sequences, "prefill_mask", last=last)
    assert [len(row) for row in masked.logprobs] == [len(row) for row in masked.correct] == last
    for a, b in zip(shared_steps.logprobs, masked.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_context_is_shared_only_where_that_saves_something():
    batch = Batch.from_lists([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7]])
    common, of = shared.contexts(batch, np.array([1, 2, 1]), 0)
    assert common.tokens.tolist() == [[1, 2], [1, 0]] and common.length.tolist() == [2, 1] and of.tolist() == [0, 0, 1]
    assert shared.contexts(batch, np.array([1, 3, 1]), 0) is not None
    assert shared.contexts(batch, np.array([1, 2, 2]), 0) is None, "nothing comes before all that is asked for"
    assert shared.contexts(batch, np.array([1, 2, 1]), 2) is None, "a context ends before the codec has its range"


@pytest.mark.parametrize(
    "last, part", [([1], "each of the 2"), ([1, 3], "1..2 for sequence 1; got 3"), ([0, 1], "got 0")]
)
def test_a_wrong_number_of_last_tokens_is_refused(random_model, last, part):
    with pytest.raises(ValueError, match=part):
        alisa_jax.Engine(random_model()).score([[1, 2, 3], [4, 5, 6]], last=last)


@pytest.mark.parametrize("policy", [SWA, "swa(kv_sparsity=0.6,window=2k)", "h2o(kv_sparsity=0.6)"])
def test_a_sequence_that_is_adopted_goes_on_as_where_it_came_from(random_model, policy):
    """States that are 12 and 20 steps old, of which one takes a sequence of the other; then both decode 20 tokens more."""
    model = random_model()
    engine = alisa_jax.Engine(model, policy)
    tokens = np.random.default_rng(2).integers(0, 37, (5, 40)).astype(np.int32)

    @jax.jit
    def feed(kv, token):
        logits, kv, _ = step.decode(model.decoder, model.params, kv, token)
        return logits, kv

    def run(kv, columns):
        for token in columns.T:
            logits, kv = feed(kv, jnp.asarray(token))
        return logits, kv

    _, young = run(engine.init(3, 64), tokens[:3, :12])
    _, old = run(engine.init(3, 64), tokens[2:, :20])
    mixed = engine.programs.adopt(young, old, jnp.array([0, 2, 0]), jnp.array([False, True, False]))
    after = np.stack([tokens[0, 12:32], tokens[4, 20:40], tokens[2, 12:32]])
    found, _ = run(mixed, after)
    _, again = run(engine.init(3, 64), tokens[:3, :12])
    left, _ = run(again, np.stack([after[0], after[0], after[2]]))
    right, _ = run(old, np.stack([after[1], after[1], after[1]]))
    np.testing.assert_array_equal(found[np.array([0, 2])], left[np.array([0, 2])])
    np.testing.assert_array_equal(found[1], right[2])
