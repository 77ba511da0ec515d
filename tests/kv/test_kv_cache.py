"""`KVState`: sequences picked, repeated and cropped go on, to the last bit, as if they had never been anything else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax.engine import step
from alisa_jax.kv.cache import KVState
from alisa_jax.kv.state import tree_bytes
from tests.sentences import one_sentence

pytestmark = pytest.mark.slow

LENGTHS, S, ROOM = (21, 9, 14), 32, 32
BEFORE = AFTER = 3  # steps
PICKED = [2, 0, 2]  # as many as there are: the programs serve both
CASES = [
    ("swa(kv_sparsity=0.6)", "raw"),
    ("h2o(kv_sparsity=0.6)", "int8(calibration_tokens=5)"),
    ("double_sparsity(kv_sparsity=0.6)", "int8(axis=token)"),
    ("swa(kv_sparsity=0.6)", "skvq(group=3,window=5,sinks=2,reorder=false)"),
    ("h2o(kv_sparsity=0.6)", "skvq(group=3,window=5,sinks=2,reorder=false,span=head)"),
    ("snapkv(capacity=9,window=4,kernel=3)", "int8(calibration_tokens=5)"),
    ("merge", "raw"),
    ("dense", "int8(axis=token)"),
]


class Side:
    """An engine, and the step that its programs repeat."""

    def __init__(self, model, policy, codec, route="auto"):
        self.engine = alisa_jax.Engine(model, policy, codec, route=route)
        self.model = model
        self.step = jax.jit(functools.partial(step.decode, model.decoder))

    def read(self, tokens, length):
        """The logits after prompts tokens [B, S], length [B], and their cache."""
        read = (jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32))
        return self.engine.programs.prefill(self.model.params, *read, ROOM)

    def decode(self, kv, tokens):
        """The logits [n, B, V] of steps with tokens [n, B], and the cache behind them."""
        found = []
        for token in tokens:
            logits, kv, _ = self.step(self.model.params, kv, jnp.asarray(token, jnp.int32))
            found.append(np.asarray(logits))
        return np.stack(found), kv


@pytest.fixture(scope="module")
def side(random_model):
    return functools.cache(lambda *parts: Side(random_model(), *parts))


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(7)
    return rng.integers(0, 37, (3, S)), rng.integers(0, 37, (BEFORE + AFTER, 3))


def same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.full(sample=2)
@pytest.mark.parametrize("policy, codec", CASES)
def test_picked_sequences_go_on_as_alone_in_that_order(side, texts, policy, codec):
    one, (prompts, later), lengths = side(policy, codec), texts, np.array(LENGTHS)
    _, kv = one.read(prompts, lengths)
    _, kv = one.decode(kv, later[:BEFORE])
    _, wanted = one.read(prompts[PICKED], lengths[PICKED])
    wanted_logits, wanted = one.decode(wanted, later[:, PICKED])
    picked = kv.select(PICKED)
    logits, after = one.decode(picked, later[BEFORE:, PICKED])
    np.testing.assert_array_equal(logits, wanted_logits[BEFORE:])
    same(after, wanted)
    assert after.lengths.tolist() == (lengths + BEFORE + AFTER)[PICKED].tolist()
    two = kv.select(np.array([2, 0]))
    assert two.lengths.tolist() == (lengths + BEFORE)[[2, 0]].tolist()
    same(two.select([0, 1, 0]), picked)
    each = kv.select([1]).repeat(3)
    same(each, kv.select([1, 1, 1]))
    same(two.repeat(2), kv.select([2, 2, 0, 0]))
    logits, _ = one.decode(each, later[BEFORE:, [1, 1, 1]])
    assert (logits == logits[:, :1]).all()


def test_sequences_that_still_calibrate_are_picked_with_their_ranges(side, texts):
    one, tokens = side("dense", "int8(calibration_tokens=6)"), texts[1]
    _, kv = one.decode(one.engine.init(3, S), tokens[:4])
    _, wanted = one.decode(one.engine.init(3, S), tokens[:, PICKED])
    _, found = one.decode(kv.select(PICKED), tokens[4:, PICKED])
    same(found, wanted)


@pytest.mark.full(sample=1, per=("route", "codec"))
@pytest.mark.parametrize("codec", ["raw", "int8(axis=token)", "int8(calibration_tokens=5)"])
@pytest.mark.parametrize("route", ["working_set", "indexed", "masked"])
def test_a_cropped_cache_never_saw_the_later_tokens(side, texts, route, codec):
    one, (prompts, later) = side("dense", codec, route), texts
    then = later[BEFORE:]

    def check(kv, wanted, lengths):
        assert kv.lengths.tolist() == wanted.lengths.tolist() == list(lengths)
        assert kv.bytes == wanted.bytes
        (found, kv), (logits, wanted) = (one.decode(x, then) for x in (kv, wanted))
        np.testing.assert_array_equal(found, logits)
        if route != "indexed":  # else there is no set
            for (part,), (other,) in zip(kv.layers, wanted.layers, strict=True):
                same((part.ws.pos, part.ws.bias), (other.ws.pos, other.ws.bias))

    _, kv = one.read(prompts, LENGTHS)
    check(kv.crop(13), one.read(prompts, (13, 9, 13))[1], (13, 9, 13))  # the shorter one stays
    check(kv.crop(99), kv, LENGTHS)
    _, kv = one.decode(kv, later[:BEFORE])
    check(kv.crop(8), one.read(prompts, (8, 8, 8))[1], (8, 8, 8))
    _, begun = one.read(prompts, (9, 9, 9))  # and back into what was decoded
    _, kv = one.decode(begun, later[:BEFORE])
    check(kv.crop(10), one.decode(begun, later[:1])[1], (10, 10, 10))


def test_lengths_and_bytes_are_those_of_the_arrays(side):
    one = side("swa(kv_sparsity=0.6)", "raw")
    shapes = jax.eval_shape(lambda: one.engine.init(3, S))
    kv = one.engine.init(3, S)
    assert kv.lengths.tolist() == [0, 0, 0]
    homes = [home for (part,) in kv.layers for home in (part.ws, part.store)]
    content = sum(x.nbytes for home in homes for x in jax.tree.leaves((home.k, home.v)))
    assert kv.bytes == shapes.bytes == (content, tree_bytes(kv) - content)
    assert min(kv.bytes) > 0 and sum(kv.bytes) == sum(x.nbytes for x in jax.tree.leaves(kv))


def refused(verb, *args):
    with pytest.raises(ValueError) as error:
        verb(*args)
    assert one_sentence(f"{error.value}.")
    return str(error.value)


@pytest.mark.parametrize(
    "rows, says",
    [
        ([-1], "rows must be in 0..2; got [-1]"),
        ([0, 3], "rows must be in 0..2; got [0, 3]"),
        ([], "a list of sequence numbers; got []"),
        ([True, False, True], "a list of sequence numbers; got [True, False, True]"),
        ([1.0], "a list of sequence numbers; got [1.0]"),
        ([[0, 1]], "a list of sequence numbers; got [[0, 1]]"),
        (1, "a list of sequence numbers; got 1"),
    ],
)
def test_rows_that_are_not_there_are_refused(side, rows, says):
    assert says in refused(side("dense", "raw").engine.init(3, S).select, rows)


@pytest.mark.parametrize("n", [0, -2, 1.5, True, "2"])
def test_a_number_of_copies_that_cannot_be_is_refused(side, n):
    assert f"n must be a whole number of at least 1; got {n!r}" == refused(
        side("dense", "raw").engine.init(3, S).repeat, n
    )


@pytest.mark.parametrize(
    "policy, codec, length, says",
    [
        ("dense", "raw", 0, "at least 1; got 0"),
        ("dense", "raw", -1, "at least 1; got -1"),
        ("dense", "raw", 2.5, "a whole number of tokens, at least 1; got 2.5"),
        ("dense", "raw", True, "a whole number of tokens, at least 1; got True"),
        ("dense", "raw", "9", "a whole number of tokens, at least 1; got '9'"),
        ("dense", "int8(calibration_tokens=6)", 5, "at least the 6 tokens"),
        ("swa(kv_sparsity=0.6)", "raw", 5, "only dense caches are cropped"),
        ("streaming(kv_sparsity=0.6)", "raw", 5, "only dense caches are cropped"),
        ("dense", "skvq(group=3,window=5,sinks=2,reorder=false)", 5, "has dropped the raw form"),
    ],
)
def test_what_cannot_be_taken_back_is_refused(side, policy, codec, length, says):
    assert says in refused(side(policy, codec).engine.init(3, S).crop, length)


def test_a_cache_in_parts_is_refused(side):
    kv = side("dense", "raw").engine.init(3, S)
    placed = KVState(tuple((part, part) for (part,) in kv.layers))
    for verb, argument in (("select", [0]), ("repeat", 2), ("crop", 5)):
        assert refused(getattr(placed, verb), argument).startswith(f"{verb} is of caches that are on the device whole")


def test_numbers_of_numpy_are_numbers(side):
    kv = side("dense", "raw").engine.init(3, S)
    assert kv.repeat(np.int64(2)).lengths.shape == (6,)
    assert kv.crop(np.int32(5)).lengths.tolist() == [0, 0, 0]
