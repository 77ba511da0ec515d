"""`python -m eval.rooms`: which modules are one room, and that a row holds one layer and nothing beside it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from alisa_jax import spec
from alisa_jax.kv import buckets
from eval import rooms


@pytest.mark.parametrize(
    "module, room",
    [
        ("alisa_jax.ops.products", "ops"),
        ("alisa_jax.ops.rope", "ops"),
        ("alisa_jax.codecs", "codec"),
        ("alisa_jax.codecs.int8_token", "codec"),
        ("alisa_jax.codecs.skvq.bits", "codec"),
        ("alisa_jax.kv.ring", "kv.ring"),
        ("alisa_jax.kv.state", "kv.state"),
        ("alisa_jax.attention.layer", "attention.layer"),
        ("pallas_kernels.partial", "pallas_kernels.partial"),
        ("alisa_jax.policies.swa", None),
        ("alisa_jax.axes", None),
    ],
)
def test_ops_and_the_codec_are_one_room_each_and_other_modules_are_their_own(module, room):
    assert rooms.room_of(module) == room


def test_only_files_of_the_project_have_a_module():
    assert rooms.module_of(spec.__file__) == "alisa_jax.spec"
    assert rooms.module_of(str(rooms.REPOSITORY / "alisa_jax" / "ops" / "__init__.py")) == "alisa_jax.ops"
    for path in (np.__file__, __file__, rooms.__file__, "<string>"):
        assert rooms.module_of(path) is None


def profiled(watch, *calls):
    """What `watch` has noted after `calls`."""
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        for call in calls:
            call()
    finally:
        sys.setprofile(before)
    return list(watch.entered)


def test_modules_before_and_behind_what_is_watched_are_not_noted():
    def other():
        with pytest.raises(spec.SpecError):
            spec.parse("(", {})

    def watched():
        return buckets.bucket(5)

    opens = lambda module, frame: frame.f_code is buckets.bucket.__code__
    assert profiled(rooms.Watch(opens), other, watched, other) == ["alisa_jax.kv.buckets"]
    assert "alisa_jax.spec" in profiled(rooms.Watch(lambda module, frame: True), other)


def test_what_is_watched_ends_with_an_exception_as_well():
    def broken():
        with pytest.raises(TypeError):
            buckets.bucket("5")

    watch = rooms.Watch(lambda module, frame: frame.f_code is buckets.bucket.__code__)
    assert profiled(watch, broken) == ["alisa_jax.kv.buckets"]
    assert watch.inside is None


def test_a_step_opens_at_its_first_block_and_at_the_first_exchange_outside_of_blocks():
    def call(module, name, tokens=1, caller=None):
        x = np.zeros((1, tokens, 3))
        code = SimpleNamespace(co_qualname=name)
        return module, SimpleNamespace(f_code=code, f_locals={"x": x}, f_back=caller)

    prompt, block, exchange = call(*rooms.BLOCK, tokens=7), call(*rooms.BLOCK), call(rooms.EXCHANGES, "exchange_sets")
    of_a_layer = call(rooms.EXCHANGES, "exchange_sets", caller=block[1])
    calls = [exchange, prompt, block, of_a_layer, exchange, block, exchange]
    step, prefill = rooms.layer_of("step"), rooms.layer_of("prefill")
    assert [step(*c) for c in calls] == [False, False, True, False, True, False, False]
    assert [prefill(*c) for c in calls] == [False, True, False, False, False, False, False]


@pytest.fixture(scope="module")
def dense():
    """The row of dense attention and raw rows."""
    name, *run = rooms.RUNS[0]
    assert name == "dense raw"
    return rooms.rows(name, *run)


def test_the_key_of_a_dense_step_goes_through_decoder_attention_and_codec(dense):
    (record,) = dense
    assert {"models.decoder", "ops", "codec", "kv.state"} <= set(record["rooms"])
    assert any(room.split(".")[0] == "attention" for room in record["rooms"])
    assert record["rooms"][0] == "models.decoder"
    assert len(record["rooms"]) < len(record["files"]) == len(set(record["files"]))


def test_nothing_of_the_run_around_the_layer_is_counted(dense):
    (record,) = dense
    around = {"engine.engine", "engine.generate", "engine.sampling", "engine.prompts", "kv.buckets"}
    assert not around & set(record["rooms"])
    assert not any(rooms.within(file, rooms.LEFT_OUT) for file in record["files"])


def test_a_layer_that_is_not_found_is_told(monkeypatch):
    monkeypatch.setattr(rooms, "BLOCK", ("alisa_jax.models.decoder", "Decoder.gone"))
    with pytest.raises(RuntimeError, match=r"dense raw: no step entered alisa_jax\.models\.decoder\.Decoder\.gone"):
        rooms.rows(*rooms.RUNS[0])


def test_the_table_has_a_line_for_each_row_and_lists_rooms_on_request(dense):
    text = rooms.report(dense, listed=False)
    (record,) = dense
    assert text.splitlines()[-1].split() == ["dense", "raw", str(len(record["files"])), str(len(record["rooms"]))]
    assert rooms.report(dense, listed=True).endswith(f"dense raw: {' '.join(record['rooms'])}")
