"""eval.card.layer in dry mode: every cell, its counts against hand-made numbers, mistakes, what does not fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import codecs, policies
from eval.card import layer
from pallas_kernels import timing
from tests.eval.test_card_pinned import NEVER, Emit

DENSE, SWA, INT8 = (f"tiny/b2/c96 {kind}" for kind in ("raw xla dense", "raw xla swa", "int8 interpret swa"))
TIMED = range(91, 96)  # positions of the queries: the last steps of 96 tokens


@pytest.fixture(scope="module")
def dry() -> dict:
    emit = Emit()
    layer.run(emit, NEVER, True, 0, rates={"copy_gb_per_s": 2.0})
    return emit.found()


def test_every_cell_is_there(dry):
    assert list(dry) == [DENSE, SWA, INT8]
    assert not [record for record in dry.values() if "error" in record]


def test_the_shapes_of_the_models_are_measured_dense_before_swa():
    names = [cell.name for cell in layer.wanted(layer.FULL)]
    assert names[:2] == ["llama-3-8b/b64/c8192 raw pallas dense", "llama-3-8b/b64/c8192 raw pallas swa"]
    assert len(set(names)) == len(names) == 2 * 2 * 2 * 3 * 6
    for batch in (1, 16, 64):
        for tokens in (8192, 32768):
            assert f"opt-6.7b/b{batch}/c{tokens} int8 xla swa" in names


def test_attention_of_the_set_is_right(dry):
    assert dry[DENSE]["right"] and dry[SWA]["right"]


def test_attended_tokens_and_bytes_are_those_of_the_policy(dry):
    counts = policies.parse(layer.POLICIES[1]).counts(96)
    swa = np.mean([counts.local[n] + counts.top[n] + 1 for n in TIMED])
    dense = np.mean([n + 1 for n in TIMED])
    assert dry[DENSE]["attended_tokens"] == pytest.approx(dense)
    assert dry[SWA]["attended_tokens"] == dry[INT8]["attended_tokens"] == pytest.approx(swa, rel=1e-6)
    token = 2 * layer.TINY.n_kv_heads * layer.TINY.head_dim * 2  # K and V in bfloat16
    assert dry[DENSE]["must_read_bytes"] == round(2 * dense * token)
    assert dry[SWA]["must_read_bytes"] == round(2 * swa * token) + 4 * 2 * 96
    assert dry[INT8]["must_read_bytes"] < dry[SWA]["must_read_bytes"]


def test_rates_and_ratios_are_of_the_medians(dry):
    record = dry[SWA]
    assert record["step_ratio_to_dense"] == pytest.approx(record["step_ms"] / dry[DENSE]["step_ms"])
    assert dry[INT8]["step_ratio_to_dense"] is None
    assert record["step_gb_per_s"] == pytest.approx(record["must_read_bytes"] / record["step_ms"] / 1e6)
    assert record["step_copy_share"] == pytest.approx(record["step_gb_per_s"] / 2.0)
    assert all(record[f"{part}_ms"] > 0 for part in ("attend", "observe", "exchange"))


def test_a_filled_layer_holds_what_was_drawn():
    shape = layer.TINY._replace(batch=2, context=96)
    policy, codec = policies.parse(layer.POLICIES[0]), codecs.parse("raw").resolve("bfloat16")
    state = layer.fill(policy, codec, shape, jnp.full((2,), 89, jnp.int32), jnp.uint32(0))
    for seed, side in enumerate((state.ws.k, state.ws.v)):
        drawn = timing.uniform(jnp.uint32(seed), (2, 96, 2, 16), jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(side)[:, :, :89], np.swapaxes(np.asarray(drawn), 1, 2)[:, :, :89])
    assert (np.asarray(state.ws.bias)[..., :89] == 0).all() and np.isneginf(np.asarray(state.ws.bias)[..., 89:]).all()


def test_what_raises_is_recorded_and_the_rest_goes_on(monkeypatch):
    def measure(cell, *_):
        if cell.kind == "dense":
            raise MemoryError("none is left")
        return {"step_ms": 1.0}

    monkeypatch.setattr(layer, "measure", measure)
    emit = Emit()
    layer.run(emit, NEVER, True, 0, rates={})
    found = emit.found()
    assert found[DENSE]["error"] == "MemoryError: none is left"
    assert found[SWA]["step_ms"] == found[INT8]["step_ms"] == 1.0


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(layer, "limit_bytes", lambda: 1e5)
    monkeypatch.setattr(layer, "repeated", None)
    emit = Emit(done=[DENSE, INT8])
    layer.run(emit, NEVER, True, 0, rates={})
    assert emit.found()[SWA]["error"].startswith("TooLarge: ")
