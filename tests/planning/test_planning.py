"""`alisa_jax.plan`: what it takes, what it refuses, and what it answers beside direct runs of the cost model.

`tests/eval/test_eval_plan.py` has what holds of its records, which are those of the command.
"""

import dataclasses
import json
import re

import numpy as np
import pytest

import alisa_jax
from alisa_jax import placement
from alisa_jax.codecs import Int8
from alisa_jax.models.shapes import SHAPES
from alisa_jax.placement.modelled.simulate import simulate
from alisa_jax.planning import pricing

pytestmark = pytest.mark.slow

SMALL = dict(prompt_tokens=64, new_tokens=65)


def asked(model="opt_125m", hardware="t4_16gb", **settings) -> alisa_jax.Planned:
    return alisa_jax.plan(model, hardware, **(SMALL | settings))


@pytest.fixture(scope="module")
def small():
    return asked()


def same(one, other) -> bool:
    return dict(one.values) == dict(other.values) and dict(one.runs) == dict(other.runs)


def test_bytes_are_those_of_the_shape(small):
    values, c = small.values, SHAPES["opt_125m"]
    rows = 64 + 65 - 1  # the last token is not cached
    assert values["kv_bytes"] == c.n_layers * rows * 2 * c.n_kv_heads * c.head_dim * 2
    positions = c.max_positions + 2  # OPT's table begins at 2
    block = 4 * c.d_model * (c.d_model + 1) + 2 * c.d_model * c.d_ff + c.d_ff + c.d_model + 4 * c.d_model
    parameters = c.vocab_size * c.d_model + positions * c.d_model + c.n_layers * block + 2 * c.d_model
    assert values["weight_bytes"] == 2 * parameters
    left = values["device_bytes"] - values["weight_bytes"] - values["activation_bytes"]
    assert values["device_kv_bytes"] == left and values["host_kv_bytes"] == alisa_jax.DEVICES["t4_16gb"].host_bytes


def test_a_model_is_a_name_a_folder_a_model_or_a_configuration(small, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(opt_125m()))
    shape = SHAPES["opt_125m"]
    for model, name in ((shape, "opt_125m"), ("random:opt_125m", "random:opt_125m"), (tmp_path, str(tmp_path))):
        found = asked(model)
        assert same(found, small) and found.cell["model"] == name
    other = asked(dataclasses.replace(shape, n_layers=3))
    assert other.cell["model"] == "opt, 3 layers of 768" and other.values["kv_bytes"] * 4 == small.values["kv_bytes"]


def test_a_loaded_model_is_planned_by_its_configuration():
    model = alisa_jax.load("bundled")
    assert same(asked(model), asked("bundled")) and asked(model).cell["model"] == "bundled"


def test_hardware_is_a_name_a_file_or_an_object(small, tmp_path):
    device = alisa_jax.DEVICES["t4_16gb"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(vars(device)))
    assert same(asked(hardware=device), small) and same(asked(hardware=path), small)
    slower = alisa_jax.Hardware("mine", 16 * 2**30, 208 * 10**9, 65e12, 320e9, 1e9, 1e9)
    offloaded = dict(batch=4, device_kv_bytes="0.8x")
    on_t4, on_mine = (asked(hardware=one, **offloaded) for one in (device, slower))
    assert on_mine.cell["hardware"] == "mine"
    assert on_mine.values["flexgen_tokens_per_s"] < on_t4.values["flexgen_tokens_per_s"]


def test_budgets_are_numbers_or_texts():
    whole = asked(batch=4).values["kv_bytes"]
    found = asked(batch=4, device_kv_bytes="0.8x", host_kv_bytes="2GB")
    assert same(found, asked(batch=4, device_kv_bytes=0.8 * whole, host_kv_bytes=2 * 10**9))
    assert found.values["device_kv_bytes"] == pytest.approx(0.8 * whole) and found.values["host_kv_bytes"] == 2e9
    assert found.values["fits"] is False and isinstance(found.runs["resident"], str)


def test_a_device_without_a_limit_holds_everything(small):
    for text in ("inf", float("inf")):
        found = asked(device_kv_bytes=text, host_kv_bytes=text)
        assert found.values["fits"] and found.runs == small.runs and "device kv any" in str(found)
        assert "the device budget is more than weights and activations leave of the device" in str(found)
    assert "the device budget" not in str(small)


def test_settings_may_be_objects_and_numbers_of_numpy(small):
    found = asked(batch=np.int64(1), kv_sparsity=np.float64(0.8), window="k", entering_tokens=np.float64(0.2))
    assert found.record | {"wall_s": 0} == small.record | {"wall_s": 0}
    assert asked(window=9).cell == asked(window="9").cell
    assert asked(codec=Int8(axis="token")).record["codec"] == "int8(axis=token)"
    lagging = asked(placement=placement.Alisa(lag=1)).runs["alisa(lag=1)"]
    assert lagging == asked(placement="alisa(lag=1)").runs["alisa(lag=1)"]
    assert lagging == asked(placement=["alisa(lag=1)"]).runs["alisa(lag=1)"]


def test_where_tokens_are_deleted_each_layer_has_a_selection_of_its_own(monkeypatch):
    small_host = dict(batch=4, device_kv_bytes="0.8x", host_kv_bytes="0.4x")
    found = asked(**small_host).runs["alisa"]
    monkeypatch.setattr(pricing, "answer", lambda request, start: request)
    run = asked(**small_host).run(4)
    folded, layered = (simulate(placement.Alisa(), run.sparse, run.cost, one) for one in (run.trace, run.by_layer))
    assert layered.recompute_s > folded.recompute_s
    assert found == run.price(placement.Alisa(), run.sparse) == layered
    paper = placement.Alisa(traffic="paper")
    assert run.price(paper, run.sparse) == simulate(paper, run.sparse, run.cost, run.trace)


def test_the_answer_prints_as_a_table_and_is_a_record(small):
    lines = str(small).splitlines()
    assert lines[0] == "opt_125m on t4_16gb, batch 1: all numbers are modelled"
    head, rule, *rows = lines[4 : 6 + len(small.runs)]
    cells = [re.split("  +", row) for row in rows]
    assert [cell[0].replace(" ", "_") for cell in cells] == list(small.runs)
    assert [cell[1] for cell in cells] == [f"{run.tokens_per_s:.1f}" for run in small.runs.values()]
    assert {len(head), len(rule)} == {max(map(len, rows))} and set(rule) == {"-", " "}
    assert small.record["basis"] == "modelled" and small.record["script"] == "eval.plan"
    assert small.record is small.record and small.record["wall_s"] == small.wall_s > 0
    assert small.record.items() >= dict(small.cell).items() | dict(small.values).items()
    assert "values" not in repr(small)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(model="gpt5"), "model: 'gpt5' is no folder; known shapes: opt_125m"),
        (dict(model=7), "model must be a name, a folder, a Model or a ModelConfig; got 7"),
        (dict(hardware="a100"), "hardware: 'a100' is unknown; known: h100_80gb"),
        (dict(hardware=None), "hardware must be a Hardware, a name or the file of a profile; got None"),
        (dict(model="opt_30b"), "hardware: weights and activations need 55.8"),
        (dict(batch=0), "batch must be a whole number of at least 1; got 0"),
        (dict(batch=True), "batch must be a whole number of at least 1; got True"),
        (dict(prompt_tokens=2.5), "prompt_tokens must be a whole number of at least 1; got 2.5"),
        (dict(new_tokens=4000), "new_tokens: the model has 2048 positions, and 4064 are asked for"),
        (dict(kv_sparsity=1), "kv_sparsity must be at least 0 and below 1, got 1"),
        (dict(kv_sparsity="0.8"), "kv_sparsity must be a number of at least 0; got '0.8'"),
        (dict(window="3k"), "window: window must be"),
        (dict(window=0), "window: window must be"),
        (dict(codec="int3"), "codec: int3: unknown name"),
        (dict(codec=None), "codec: "),
        (dict(codec="int8(axis=channel)", prompt_tokens=64), "codec: int8 takes its range from the first 64 tokens"),
        (dict(dtype="int8"), "dtype must be one of float16, bfloat16, float32; got 'int8'"),
        (dict(device_kv_bytes="2gb"), "device_kv_bytes: '2gb' is no size"),
        (dict(device_kv_bytes=0), "device_kv_bytes: alisa needs device_kv_bytes of at least"),
        (dict(device_kv_bytes="0.8x", host_kv_bytes=0), "host_kv_bytes: alisa, which deletes prompt tokens"),
        (dict(placement="alisa(p1=9,p2=3)"), "placement: alisa(p1=9,p2=3): p1 must be at most p2"),
        (dict(placement=[3]), "placement: "),
        (dict(read="columns"), "read must be one of rows, pages; got 'columns'"),
        (dict(traffic="all"), "traffic must be one of delta, paper; got 'all'"),
        (dict(entering_tokens=65), "entering_tokens must be at most the prompt, 64 tokens"),
        (dict(entering_tokens=float("nan")), "entering_tokens must be a number of at least 0; got nan"),
        (dict(selection_us=float("inf")), "selection_us must be a number of at least 0; got inf"),
        (dict(matmul_efficiency=0), "matmul_efficiency must be a number of at least 0.001 and at most 1; got 0"),
        (dict(read_efficiency=1.1), "read_efficiency must be a number of at least 0.001 and at most 1; got 1.1"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_that_begins_with_the_argument(settings, sentence):
    with pytest.raises(ValueError) as error:
        asked(**settings)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def opt_125m() -> dict:
    """What the `config.json` of OPT-125M says."""
    c = SHAPES["opt_125m"]
    sizes = dict(hidden_size=c.d_model, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, ffn_dim=c.d_ff)
    more = dict(word_embed_proj_dim=c.d_model, do_layer_norm_before=True, activation_function="relu")
    more |= dict(vocab_size=c.vocab_size, max_position_embeddings=c.max_positions)
    return dict(model_type="opt", enable_bias=True, layer_norm_elementwise_affine=True) | sizes | more
