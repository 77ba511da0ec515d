"""Statistics of a model: the file and its checks, and the dense pass that makes them."""

import json
import re

import jax
import numpy as np
import pytest

from alisa_jax.analysis.calibrate import calibrate
from alisa_jax.calibration import Calibration
from alisa_jax.models.checkpoint import Model
from alisa_jax.models.decoder import Decoder, ModelConfig

L, N, K, H, V = 2, 4, 2, 6, 29
CONFIG = ModelConfig("llama", V, 16, L, N, K, H, 24, 32)
NAMES = ("k_min", "k_max", "v_min", "v_max", "q_abs", "k_abs", "qk_abs")


def made(seed=0, **changes):
    rng = np.random.default_rng(seed)
    one = lambda heads: rng.random((L, heads, H))
    arrays = dict(zip(NAMES, (-one(K), one(K), -one(K), one(K), one(N), one(K), one(N)), strict=True))
    return Calibration(**{**arrays, "n_tokens": 7, "model": "tiny", "data": "a text", **changes})


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(CONFIG)
    return Model(decoder, decoder.init(jax.random.key(1)), None, "tiny", None, (), "tiny")


@pytest.fixture(scope="module")
def blocks():
    return np.random.default_rng(5).integers(0, V, (5, 11), np.int32)


def test_a_file_gives_every_float32_back_as_it_was(tmp_path):
    one = made(q_abs=np.random.default_rng(3).random((L, N, H)).astype(np.float32) * np.float32(1e-30))
    one.save(tmp_path / "deep" / "c.json")
    other = Calibration.load(tmp_path / "deep" / "c.json")
    for name in NAMES:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)
    assert (other.n_tokens, other.model, other.data) == (7, "tiny", "a text")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["c.json"]


def test_fewer_digits_cost_half_a_unit_of_the_last_and_make_a_smaller_file(tmp_path):
    one = made()
    one.save(tmp_path / "c.json", digits=3)
    assert len(one.to_json(3)) < 0.7 * len(one.to_json())
    for name in NAMES:
        np.testing.assert_allclose(
            getattr(Calibration.load(tmp_path / "c.json"), name), getattr(one, name), rtol=5.01e-3
        )


def test_nobody_writes_to_the_numbers():
    with pytest.raises(ValueError, match="read-only"):
        made().k_min[0] = 0


WRONG = {
    "k_abs has shape (2, 2, 5), and k_min has (2, 2, 6)": {"k_abs": np.ones((L, K, H - 1))},
    "qk_abs has shape (2, 2, 6), and q_abs has (2, 4, 6)": {"qk_abs": np.ones((L, K, H))},
    "the query heads a multiple of the kv heads": {"q_abs": np.ones((L, 3, H)), "qk_abs": np.ones((L, 3, H))},
    "v_min lies above v_max in a channel": {"v_min": np.full((L, K, H), 2.0)},
    "q_abs holds a number below 0": {"q_abs": -np.ones((L, N, H))},
    "k_max holds a number that is not finite": {"k_max": np.full((L, K, H), np.inf)},
    "v_max holds a number that is not finite": {"v_max": np.full((L, K, H), 1e300)},
    "k_min is an array [layers, heads, channels]; got shape (2, 2)": {"k_min": np.ones((L, K))},
    "k_min is not an array of numbers": {"k_min": [[["1"]]]},
    "k_max is not an array of numbers": {"k_max": [[[1.0], [1.0, 2.0]]]},
    "n_tokens is a whole number of at least 1; got 0": {"n_tokens": 0},
    "model is a text; got None": {"model": None},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_can_be_no_statistics_is_refused_in_one_sentence(sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        made(**WRONG[sentence])
    assert "\n" not in str(error.value)


def test_a_file_that_is_none_is_refused_in_one_sentence(tmp_path):
    path, good = tmp_path / "c.json", json.loads(made().to_json())
    cases = {
        "it is not JSON": "{",
        "its format is not": json.dumps({**good, "format": "other"}),
        "it lacks q_abs; its fields are k_min": json.dumps({k: v for k, v in good.items() if k != "q_abs"}),
        "it has more; its fields": json.dumps({**good, "more": 1}),
        "n_tokens is a whole number": json.dumps({**good, "n_tokens": 7.5}),
        "k_min holds a number that is not finite": json.dumps({**good, "k_min": np.full((L, K, H), np.nan).tolist()}),
    }
    for sentence, text in cases.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(sentence)) as error:
            Calibration.load(path)
        assert "c.json' is not a calibration: " in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no calibration at .*nowhere.*python -m eval.calibrate makes one"):
        Calibration.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="the calibration 'in' cannot be written"):
        made().save(path / "in")


def test_the_statistics_of_another_model_are_refused():
    made().check(CONFIG)
    with pytest.raises(
        ValueError, match="of tiny, with 2 layers, 4 query and 2 kv heads of 6 channels; the model has 3"
    ):
        made().check(ModelConfig("llama", V, 16, 3, N, K, H, 24, 32))


def turned(x, theta=10000.0):
    """x [B, T, heads, H], its pairs (c, c + H / 2) as complex numbers turned by t theta^(-2c/H)."""
    half = H // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def test_the_statistics_of_the_first_layer_are_those_of_numpy(model, blocks):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    x = params["embed"]["tokens"]["table"][blocks]
    block = params["blocks"][0]
    n = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * block["attn_norm"]["scale"]
    q, k, v = (
        (n @ block[name]["weight"].T).reshape(*blocks.shape, heads, H) for name, heads in (("q", N), ("k", K), ("v", K))
    )
    own = np.stack([turned(q)[:, :, i] * turned(k)[:, :, i // (N // K)] for i in range(N)], axis=2)
    every, got = (0, 1), calibrate(model, blocks, batch=2)
    want = {"k_min": k.min(every), "k_max": k.max(every), "v_min": v.min(every), "v_max": v.max(every)}
    want |= {"q_abs": abs(q).mean(every), "k_abs": abs(k).mean(every), "qk_abs": abs(own).mean(every)}
    for name in NAMES:
        np.testing.assert_allclose(getattr(got, name)[0], want[name], rtol=2e-5, atol=1e-6, err_msg=name)
    assert (got.sizes, got.n_tokens, got.model) == ((L, N, K, H), blocks.size, "tiny")


@pytest.mark.parametrize("batch", [1, 2])
def test_two_blocks_give_the_least_the_greatest_and_the_mean_of_both(model, blocks, batch):
    """In the authors' code of Double Sparsity every batch overwrites the one before."""
    one, other = (calibrate(model, blocks[i : i + 1]) for i in (0, 1))
    both = calibrate(model, blocks[:2], batch=batch)
    assert np.abs(one.qk_abs - other.qk_abs).max() > 0.01 * one.qk_abs.max()
    for name in NAMES:
        a, b, got = (getattr(c, name) for c in (one, other, both))
        join = {"min": np.minimum, "max": np.maximum, "abs": lambda x, y: (x + y) / 2}[name[-3:]]
        np.testing.assert_allclose(got, join(a, b), rtol=1e-5, atol=1e-7, err_msg=name)


def test_every_block_counts_once_however_they_are_batched(model, blocks):
    whole, parts = calibrate(model, blocks, batch=5), calibrate(model, blocks, batch=2)
    for name in NAMES:
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), rtol=1e-5, atol=1e-7, err_msg=name)
    again = calibrate(model, np.concatenate([blocks, blocks]), batch=5)
    np.testing.assert_allclose(again.qk_abs, whole.qk_abs, rtol=1e-5)
    assert again.n_tokens == 2 * whole.n_tokens


def test_blocks_that_the_model_cannot_read_are_refused(model):
    for blocks, sentence in (
        ([[1, 2], [1]], "blocks are of one length, at most 32 tokens; got 1 to 2"),
        ([[1] * 33], "at most 32 tokens; got 33 to 33"),
        ([[1, V]], "token ids must be below 29; got 29"),
    ):
        with pytest.raises(ValueError, match=sentence):
            calibrate(model, blocks)
