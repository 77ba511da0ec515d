"""Prompts read in chunks: the engine gives what it gives for whole prompts, in few programs and in known bytes."""

import functools

import jax
import numpy as np
import pytest

import alisa_jax
from alisa_jax.engine import prompts
from alisa_jax.kv.buckets import bucket, prompt_bucket
from alisa_jax.kv.state import tree_bytes
from tests.sentences import one_sentence

pytestmark = pytest.mark.slow

LAYERS, LENGTHS, NEW = 2, (21, 9, 24), 6
SIZES = (1, 7, 64)  # one token, no multiple of a prompt, longer than any
RAW, INT8, SKVQ = "raw", "int8(calibration_tokens=6)", "skvq(group=3,window=5,sinks=2,reorder=false,span=head)"
CASES = {
    "dense": (RAW, INT8, SKVQ),
    "swa(kv_sparsity=0.6)": (RAW, INT8, SKVQ),
    "h2o(kv_sparsity=0.6)": (RAW, INT8, SKVQ),
    "snapkv(capacity=9,window=4,kernel=3)": (RAW, INT8, SKVQ),
    "merge": (RAW, INT8),
    "double_sparsity(kv_sparsity=0.6)": (RAW, INT8, SKVQ),
    "streaming(sinks=2,tokens=9,positions=cache)": (RAW, INT8, SKVQ),
    "gemfilter(layer=1,tokens=8)": (RAW, INT8, SKVQ),
}
PAIRS = [(policy, codec) for policy, some in CASES.items() for codec in some]
MARGIN = 1e-4  # nats


@pytest.fixture(scope="module")
def make(random_model):
    """`make(policy, codec)`: an engine; how it reads prompts is set by `chunk_tokens`, its programs are those of both."""
    return functools.cache(lambda policy, codec=RAW: alisa_jax.Engine(random_model(n_layers=LAYERS), policy, codec))


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(11)
    return [rng.integers(0, 37, n).tolist() for n in LENGTHS]


def read(engine, size, function):
    """`function(engine)` with prompts that are read in chunks of `size`, None for whole ones."""
    engine.chunk_tokens = size
    try:
        return function(engine)
    finally:
        engine.chunk_tokens = None


def begun(texts):
    return lambda engine: prompts.begin(engine, engine.batch(texts), NEW)


def codes_apart(kv, other) -> int:
    """How many stored values of two caches differ by more than 1e-4: those whose codes are a step apart."""
    count = 0
    for (part,), (twin,) in zip(kv.layers, other.layers, strict=True):
        values = jax.jit(part.spec.codec.values)
        held = np.asarray(part.ws.pos)[..., None] >= 0
        for x, y in ((part.ws.k, twin.ws.k), (part.ws.v, twin.ws.v)):
            count += int(((np.abs(np.asarray(values(x)) - np.asarray(values(y))) > 1e-4) & held).sum())
    return count


@pytest.mark.full(sample=2)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("policy, codec", PAIRS)
def test_chunks_give_what_whole_prompts_give(make, texts, policy, codec, size, record_property):
    engine = make(policy, codec)
    chosen, wanted = (read(engine, n, begun(texts)) for n in (size, None))
    np.testing.assert_array_equal(chosen.fed.tokens, wanted.fed.tokens)
    assert jax.tree.structure(chosen.kv) == jax.tree.structure(wanted.kv)
    assert jax.tree.map(np.shape, chosen.kv) == jax.tree.map(np.shape, wanted.kv)
    np.testing.assert_allclose(chosen.logits, wanted.logits, atol=1e-4)
    apart = codes_apart(chosen.kv, wanted.kv)
    record_property("codes_a_step_apart", apart)
    print(f"{apart} codes a step apart: {policy} {codec} in chunks of {size}")
    assert apart == 0 or codec != RAW
    made, whole = (read(engine, n, lambda e: e.generate(texts, NEW, eos_ids=())) for n in (size, None))
    for tokens, others, margins in zip(made.tokens, whole.tokens, whole.margins, strict=True):
        differ = [i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b]
        assert not differ or margins[differ[0]] < MARGIN or apart
    given = [a + b for a, b in zip(texts, whole.tokens, strict=True)]
    found, known = (read(engine, n, lambda e: e.score(given, "prompt", last=[NEW] * 3)) for n in (size, None))
    for a, b in zip(found.logprobs, known.logprobs, strict=True):
        assert np.abs(a - b).mean() < 1e-4 if apart else np.abs(a - b).max() < 1e-4


def test_a_prompt_filter_chooses_the_same_tokens_from_chunks(make, texts):
    engine = make("gemfilter(layer=1,tokens=8)")
    batch = engine.batch(texts)
    found = [read(engine, n, lambda e: prompts.condensed(e, batch)) for n in (5, None)]
    assert [one.length.tolist() for one in found] == [[8, 8, 8]] * 2
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)


def test_more_chunks_need_no_more_programs(make, texts):
    engine = make("dense")

    def programs(size, given):
        before = engine.compiles
        read(engine, size, begun(given))
        return engine.compiles - before

    assert programs(12, texts) == 4  # begin, extend, finish (layers are alike) and the last logits: 2 chunks
    assert programs(3, texts) == 1  # 8 chunks
    longer = [row + row[:7] for row in texts]
    assert prompt_bucket(31) == prompt_bucket(max(LENGTHS)) and programs(3, longer) == 0  # 11
    assert programs(3, [row[:2] for row in texts]) == 0


@pytest.mark.parametrize("policy", ["dense", "swa(kv_sparsity=0.6)", "h2o(kv_sparsity=0.6)"])
def test_the_bytes_of_lanes_count(make, policy):
    engine, tokens = make(policy), max(LENGTHS)
    lanes = jax.eval_shape(
        lambda: engine.programs.begin(3, bucket(tokens), prompt_bucket(tokens), engine.dtype)
    )  # as `prompts.begin` begins
    more, plain = (read(engine, n, lambda e: e.state_bytes(3, tokens)) for n in (4, None))
    rows = tree_bytes([(lane.k, lane.v) for lane in lanes.layers])
    assert np.subtract(more, plain).tolist() == [rows, tree_bytes(lanes) - rows]
    assert rows == 2 * LAYERS * 3 * prompt_bucket(tokens) * 2 * 6 * 4


def test_chunks_of_no_whole_number_of_tokens_are_refused(random_model):
    for given in (0, -3, 2.5, True, "4"):
        with pytest.raises(ValueError, match=f"whole number of at least 1, or None.*got {given!r}") as error:
            alisa_jax.Engine(random_model(), "dense", chunk_tokens=given)
        assert one_sentence(f"{error.value}.")


def test_placed_runs_read_whole_prompts(random_model):
    with pytest.raises(ValueError, match="give chunk_tokens=None, not 4") as error:
        alisa_jax.Engine(random_model(), "dense", placement="waves", chunk_tokens=4)
    assert one_sentence(f"{error.value}.")
