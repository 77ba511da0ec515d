"""GemFilter end to end: what the engine gives is what dense gives on tokens that float64 NumPy has chosen by hand."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax.engine import prompts
from alisa_jax.models import Decoder
from alisa_jax.policies import gemfilter
from tests import oracle

LAYERS, TOKENS, LAYER = 2, 12, 1
SPEC = f"gemfilter(layer={LAYER},tokens={TOKENS})"
LENGTHS = (57, 40, 33, 12, 5)
T = 64  # tokens that the oracle reads, padding included, and the engine's bucket
NEW, LAST = 6, 4


@pytest.fixture(scope="module")
def model(random_model):
    """Two layers, 4 query heads over 2 kv heads."""
    return random_model(n_layers=LAYERS)


@pytest.fixture(scope="module")
def engine(model):
    """`engine(policy)`: made once."""
    return functools.cache(lambda policy: alisa_jax.Engine(model, policy))


@pytest.fixture(scope="module")
def ids(model):
    """Prompts, and the tokens that follow them."""
    rng = np.random.default_rng(5)
    draw = lambda n: rng.integers(0, model.decoder.config.vocab_size, n).tolist()
    return [draw(n) for n in LENGTHS], [draw(LAST) for _ in LENGTHS]


@functools.cache
def read(model, tokens, at):
    """A text read at the rotary positions `at`, attention by hand: x [n, D] in the end, and (q, k) of each layer."""
    decoder, seen, n = model.decoder, [], len(tokens)
    padded = lambda ids: jnp.asarray([[*ids, *[0] * (T - n)]], jnp.int32)  # behind the text, which does not see it
    x = decoder.embed(model.params, padded(tokens), padded(at))

    def attend(q, k, v):
        q, k, v = (np.asarray(y[0], np.float64) for y in (q, k, v))
        seen.append((q[:n], k[:n]))
        return jnp.asarray(oracle.causal(q, k, v)[0][None], jnp.float32), ()

    for layer in range(LAYERS):
        x, _ = decoder.block(model.params["blocks"][layer], x, padded(at), attend)
    return x[0, :n], seen


def by_hand(model, tokens, layer, keep=TOKENS, pool=5, pooling="avg"):
    """Ascending positions of the tokens that the last query of `layer` scores best."""
    n = len(tokens)
    if n <= keep:
        return list(range(n))
    q, k = read(model, tuple(tokens), tuple(range(n)))[1][layer]
    raw = np.einsum("nh,tnh->t", q[-1], np.repeat(k, len(q[-1]) // k.shape[1], axis=1))
    near = [raw[max(0, i - pool // 2) : i + pool // 2 + 1] for i in range(n)]
    score = np.array([x.max() if pooling == "max" else x.sum() / pool for x in near])
    order = np.argsort(-score, kind="stable")
    if pooling == "avg":  # neighbours share their maximum
        assert score[order[keep - 1]] - score[order[keep]] > 1e-4, "too close to be told apart in float32"
    return sorted(order[:keep].tolist())


@pytest.fixture(scope="module")
def chosen(model, ids):
    """What each prompt is by the layer `LAYER`."""
    return [[row[p] for p in by_hand(model, row, LAYER)] for row in ids[0]]


@pytest.mark.parametrize("layer, options", [(0, {}), (1, {}), (1, dict(pool=3, pooling="max"))], ids=str)
def test_the_tokens_that_are_fed_are_those_chosen_by_hand(model, engine, ids, layer, options):
    text = ",".join(f"{key}={value}" for key, value in options.items())
    one = engine(f"gemfilter(layer={layer},tokens={TOKENS}{',' * bool(text)}{text})")
    fed = prompts.condensed(one, one.batch(ids[0]))
    for row, tokens, n in zip(ids[0], fed.tokens, fed.length, strict=True):
        assert tokens[:n].tolist() == [row[p] for p in by_hand(model, row, layer, **options)]


def test_a_ragged_batch_continues_as_dense_does_on_the_chosen_tokens(engine, ids, chosen):
    assert all(len(row) == min(n, TOKENS) for row, n in zip(chosen, LENGTHS, strict=True))
    found, wanted = engine(SPEC).generate(ids[0], NEW), engine("dense").generate(chosen, NEW)
    assert found.tokens == wanted.tokens
    for name in ("margins", "logprobs"):
        for a, b in zip(getattr(found, name), getattr(wanted, name), strict=True):
            np.testing.assert_array_equal(a, b)
    whole = engine("dense").generate(ids[0], NEW)
    assert sum(a != b for a, b in zip(found.tokens, whole.tokens, strict=True)) >= 2, (
        "nothing was left out that mattered"
    )


@pytest.mark.slow
def test_prompts_one_by_one_give_what_their_batch_gives(engine, ids):
    together = engine(SPEC).generate(ids[0], NEW)
    for i, row in enumerate(ids[0][1:], 1):
        alone = engine(SPEC).generate([row], NEW)
        assert alone.tokens[0] == together.tokens[i]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-5)


def test_scoring_after_a_prompt_is_densely_that_of_the_chosen_tokens(engine, ids, chosen):
    found, wanted = (
        engine(policy).score([a + b for a, b in zip(heads, ids[1], strict=True)], "prompt", last=[LAST] * len(LENGTHS))
        for policy, heads in ((SPEC, ids[0]), ("dense", chosen))
    )
    for a, b in zip(found.logprobs, wanted.logprobs, strict=True):
        assert a.shape == (LAST,)
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate(found.correct), np.concatenate(wanted.correct))
    np.testing.assert_array_equal(found.attended_frac, np.ones(LAYERS))


def test_the_chosen_tokens_are_read_at_positions_from_0(model, engine, ids):
    row, following = max(zip(*ids, strict=True), key=lambda pair: np.ptp(by_hand(model, pair[0], LAYER)))
    kept = by_hand(model, row, LAYER)
    assert np.ptp(kept) > TOKENS, "a run of neighbours is the same at any positions"
    tokens, n = [row[p] for p in kept], len(kept)
    scored = engine(SPEC).score([row + following], "prompt", last=[LAST]).logprobs[0]

    def first(at):
        """Log-probability of the token after the prompt."""
        x, _ = read(model, tuple(tokens), tuple(at))
        logits = np.asarray(model.decoder.unembed(model.params, x[None, -1:]), np.float64)[0, 0]
        return logits[following[0]] - np.log(np.exp(logits).sum())

    assert scored[0] == pytest.approx(first(range(n)), abs=1e-4)
    assert abs(scored[0] - first(kept)) > 1e-3, "where the tokens stood in the prompt is forgotten"


def test_with_as_many_tokens_as_the_prompt_the_output_is_the_models_own(engine, ids):
    plain = engine("dense").generate(ids[0], NEW)
    found = engine(f"gemfilter(layer={LAYER},tokens={max(LENGTHS)})").generate(ids[0], NEW)
    assert found.tokens == plain.tokens
    assert found.compiles == 3, "the prompt, its next token, a chunk: no layer was read for it"
    for a, b in zip(found.logprobs, plain.logprobs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("protocol", ["decode", "prefill_mask"])
def test_what_is_read_without_a_prompt_is_dense(engine, ids, protocol):
    found, wanted = (engine(policy).score([row[:20] for row in ids[0]], protocol) for policy in (SPEC, "dense"))
    for a, b in zip(found.logprobs, wanted.logprobs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_last_token_is_not_sure_to_be_kept(model, engine):
    one, n = engine(SPEC), LENGTHS[0]
    rows = np.random.default_rng(9).integers(0, model.decoder.config.vocab_size, (len(LENGTHS), n)).tolist()
    length = jnp.full(len(rows), n, jnp.int32)
    at = one.programs.filter_prompt(model.params, jnp.asarray(one.batch(rows).padded(T)), length, LAYER)
    kept = gemfilter.last_kept(at, length)
    assert kept.tolist() == [n - 1 in by_hand(model, row, LAYER) for row in rows]
    assert 0 < float(kept.mean()) < 1


def test_the_engine_resolves_the_layer_and_refuses_one_that_is_not_there(engine):
    assert engine("gemfilter").policy.layer == 1  # of 2
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.1, the layers of the model; got 2"):
        engine("gemfilter(layer=2)")


@pytest.fixture(scope="module")
def bundled():
    """The first layer of the bundled model, which is quick to compile, and its tokenizer."""
    model = alisa_jax.load("bundled")
    decoder = Decoder(dataclasses.replace(model.decoder.config, n_layers=1))
    params = model.params | {"blocks": model.params["blocks"][:1]}
    return alisa_jax.Engine(dataclasses.replace(model, decoder=decoder, params=params), "gemfilter(layer=0,tokens=6)")


@pytest.mark.slow
def test_texts_hold_the_whole_prompt_and_stop_strings_end_what_is_new(bundled):
    texts = ["def fibonacci(n):\n    if n < 2:\n        return n\n    return fib", "import os\nimport"]
    assert len(bundled.model.encode(texts[0])) > 6
    free = bundled.generate(texts, 10, eos_ids=())
    for text, whole, new, tokens in zip(texts, free.texts, free.completions, free.tokens, strict=True):
        assert whole == text + new and len(tokens) == 10 and new
    stop = free.completions[0][len(free.completions[0]) // 2 :][:2]
    pieces = [[], []]
    stopped = bundled.generate(texts, 10, eos_ids=(), stop=stop, on_text=lambda i, piece: pieces[i].append(piece))
    for i, text in enumerate(texts):
        at = free.completions[i].find(stop)
        wanted = free.completions[i] if at < 0 else free.completions[i][:at]
        assert stopped.completions[i] == wanted == "".join(pieces[i]) and stopped.texts[i] == text + wanted
        assert stopped.finish_reasons[i] == ("length" if at < 0 else "stop_string")
    assert stopped.finish_reasons[0] == "stop_string"


def test_a_placed_run_feeds_what_the_layer_chose(random_model):
    model = random_model(n_layers=3)
    prompt = np.random.default_rng(8).integers(0, 37, 90).tolist()
    engine = alisa_jax.Engine(model, "gemfilter(layer=1,tokens=16)")
    placed, here = engine.under("waves").generate([prompt], 9), engine.generate([prompt], 9)
    assert placed.tokens == here.tokens
    np.testing.assert_allclose(placed.logprobs[0], here.logprobs[0], atol=1e-5)
    dense = alisa_jax.Engine(model, "dense").generate([prompt], 9)
    assert np.abs(dense.logprobs[0] - here.logprobs[0]).max() > 0.1


def test_a_codec_calibrates_on_what_is_fed_and_a_context_is_what_is_fed(random_model):
    model = random_model(n_layers=3)
    prompt = np.random.default_rng(8).integers(0, 37, 90).tolist()
    engine = alisa_jax.Engine(model, "gemfilter(layer=1,tokens=16)", "int8(calibration_tokens=32)")
    with pytest.raises(ValueError, match="first 32 tokens of each sequence; sequence 0 has 16"):
        engine.generate([prompt], 4)
    assert engine.compiles == 0
    limit = model.decoder.config.max_positions
    engine = alisa_jax.Engine(model, "gemfilter(layer=1,tokens=16)")
    engine.validate(16 + 9, limit)
    with pytest.raises(ValueError, match=f"context is {limit} tokens; got {limit + 1}"):
        engine.validate(16 + 9, limit + 1)
