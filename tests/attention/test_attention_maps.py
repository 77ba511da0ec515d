"""Attention maps of a whole text: against float64 NumPy decoding, transformers, `Engine.score`, and sequences one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax import codecs
from alisa_jax.analysis.attention_maps import attentions
from alisa_jax.attention import maps
from alisa_jax.kv.state import LayerSpec
from alisa_jax.models import Decoder, Model, ModelConfig
from alisa_jax.policies import parse
from tests import oracle, replay

pytestmark = pytest.mark.slow

RULES = {
    "dense": oracle.Dense(),
    "local(kv_sparsity=0.7)": oracle.Local(0.7),
    "strided(kv_sparsity=0.7)": oracle.Strided(0.7),
    "swa(kv_sparsity=0.6)": oracle.Swa(0.6),
    "swa(kv_sparsity=0.6,window=5,shared_heads=false)": oracle.Swa(0.6, window=5, heads_share=False),
    "swa(kv_sparsity=0.7,refresh_every=7,spare_slots=0)": oracle.Swa(0.7, refresh_every=7),
}
T = 40  # tokens of the random streams: 2 sequences, 6 query heads over 3 kv heads


@functools.cache
def mapped(text: str, codec: str = "raw"):
    """The maps of the random streams, as NumPy arrays, and the output."""
    chosen = codecs.parse(codec).resolve("float32")
    spec = LayerSpec(parse(text), chosen, "masked")
    run = jax.jit(functools.partial(maps.maps, spec), compiler_options=replay.QUICK)
    out, found = run(*(jnp.asarray(x[:, :T]) for x in replay.STREAM))
    return np.asarray(out), maps.Maps(*map(np.asarray, found))


@pytest.mark.parametrize("text", RULES)
def test_maps_equal_the_float64_decode_row_by_row(text):
    out, found = mapped(text)
    for b in range(replay.B):
        q, k, v = (x[b, :T] for x in replay.STREAM)
        want_out, sets = oracle.decode(RULES[text], q, k, v)
        P = len(sets[0])
        kept = np.array([[[j in sets[i][p] for j in range(T)] for i in range(T)] for p in range(P)])
        assert found.kept[b].shape == kept.shape and (found.kept[b] == kept).all()
        np.testing.assert_allclose(out[b], want_out, atol=2e-5)
        for i in range(T):
            allowed = np.repeat(kept[:, i], replay.N // P, axis=0)
            np.testing.assert_allclose(found.weights[b, :, i], oracle.attention(q[i], k, v, allowed)[1], atol=1e-6)
        np.testing.assert_allclose(found.dense[b], np.moveaxis(oracle.causal(q, k, v)[1], 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("text", "codec"),
    [*((text, "raw") for text in RULES), ("h2o(kv_sparsity=0.6)", "raw"), ("swa(kv_sparsity=0.6)", "int8(axis=token)")],
)
def test_rows_sum_to_one_and_nothing_outside_the_selection_is_attended(text, codec):
    _, found = mapped(text, codec)
    each = np.repeat(found.kept, replay.N // found.kept.shape[1], axis=1)
    np.testing.assert_allclose(found.weights.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(found.dense.sum(axis=-1), 1, atol=1e-6)
    assert (found.weights[~each] == 0).all() and (found.dense[..., ~np.tri(T, dtype=bool)] == 0).all()
    assert not found.kept[..., ~np.tri(T, dtype=bool)].any() and found.kept[..., np.arange(T), np.arange(T)].all()
    assert found.kept.mean() < 0.45 or text == "dense", "the policy left something out"


@pytest.mark.parametrize(("spec", "raw_rows"), [("int8(axis=token)", 0), ("int8(calibration_tokens=16)", 16)])
def test_coded_keys_are_attended_as_they_are_stored_and_raw_ones_before_the_codec_is_frozen(spec, raw_rows):
    codec = codecs.parse(spec).resolve("float32")
    q, k, _ = (x[:, :T] for x in replay.STREAM)
    keys = jnp.asarray(np.moveaxis(k, 1, 2))
    eye = jnp.broadcast_to(jnp.eye(replay.H, dtype=jnp.float32), (replay.B, replay.K, replay.H, replay.H))
    read = jax.jit(lambda x, y: codec.logits(y, codec.fill(codec.empty(x.shape, "slots", "k"), x, "slots")))
    stored = read(keys, eye)  # [B, K, H, T]
    stored = np.moveaxis(np.asarray(stored), 3, 1)
    assert np.abs(stored - k).max() > 1e-3, "a codec that loses nothing tests nothing"
    found = mapped("dense", spec)[1].dense
    for b in range(replay.B):
        raw, coded = (np.moveaxis(oracle.causal(q[b], x, x)[1], 0, 1) for x in (k[b], stored[b]))
        np.testing.assert_allclose(found[b, :, :raw_rows], raw[:, :raw_rows], atol=1e-6)
        np.testing.assert_allclose(found[b, :, raw_rows:], coded[:, raw_rows:], atol=2e-5)


# ---- on models


@functools.cache
def small() -> Model:
    """Two layers, 4 query heads over 2 kv heads, random weights, context 96."""
    sizes = dict(vocab_size=37, d_model=22, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=26, max_positions=96)
    decoder = Decoder(ModelConfig(arch="llama", **sizes))
    params = jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, jax.jit(decoder.init)(jax.random.key(1)))
    return Model(decoder, params, tokenizer=None, bos_id=None, eos_ids=(), name="small", source=None)


def seen(engine, sequences):
    """Maps of every layer, and log-probabilities."""
    layers = []
    logprobs = attentions(engine, sequences, lambda layer, found, length: layers.append(found))
    return layers, logprobs


TEXT = np.random.default_rng(5).integers(0, 37, 60).tolist()


@pytest.mark.parametrize("policy", ["swa(kv_sparsity=0.7,shared_heads=false,dense_layers=1)", "h2o(kv_sparsity=0.6)"])
def test_a_ragged_batch_gives_the_maps_of_its_sequences_one_by_one(policy):
    engine = alisa_jax.Engine(small(), policy)
    texts = [TEXT[:60], TEXT[7:48], TEXT[20:53]]
    layers, logprobs = seen(engine, texts)
    assert layers[0].weights.shape == (3, 4, 60, 60) and len(layers) == 2
    for i, text in enumerate(texts):
        n = len(text)
        alone, other = seen(engine, [text] * 3)  # nothing longer beside it
        np.testing.assert_allclose(logprobs[i], other[2], rtol=1e-5)
        for mine, one in zip(layers, alone, strict=True):
            for name in ("weights", "dense"):
                np.testing.assert_allclose(getattr(mine, name)[i, :, :n, :n], getattr(one, name)[2], atol=1e-5)
            assert (mine.kept[i, :, :n, :n] == one.kept[2]).all()
    dense = [(layer.kept[0] == np.tri(60, dtype=bool)).all() for layer in layers]
    assert dense == [policy.startswith("swa"), False], "layer 0 of dense_layers=1 attends all tokens"


def test_the_run_is_that_of_score():
    engine, texts = (
        alisa_jax.Engine(small(), "swa(kv_sparsity=0.7,shared_heads=false,dense_layers=1)"),
        [TEXT[:60], TEXT[7:48]],
    )
    layers, logprobs = seen(engine, [*texts, TEXT[20:53]])
    score = engine.score([*texts, TEXT[20:53]], protocol="prefill_mask")
    for mine, scored in zip(logprobs, score.logprobs, strict=True):
        np.testing.assert_allclose(mine, scored, rtol=1e-4)  # rows of the dense layer are scored together
    shares = [
        np.concatenate(
            [
                one.kept[b, :, : n - 1].sum(axis=-1).mean(axis=0) / np.arange(1, n)
                for b, n in ((0, 60), (1, 41), (2, 33))
            ]
        )
        for one in layers
    ]
    np.testing.assert_allclose(score.attended_frac, [share.mean() for share in shares], rtol=1e-5)


def test_what_the_engine_refuses_is_refused_before_anything_runs():
    engine = alisa_jax.Engine(small(), "dense", "int8(calibration_tokens=16)")
    never = lambda *_: pytest.fail("a layer has run")
    with pytest.raises(ValueError, match="the model's context is 96 tokens; got 97"):
        attentions(engine, [[1] * 97], never)
    with pytest.raises(ValueError, match="takes its range from the first 16 tokens"):
        attentions(engine, [[1] * 12], never)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 37\)"):
        attentions(engine, [[1, 37]], never)
