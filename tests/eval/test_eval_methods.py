"""`python -m eval.methods`: nothing of the registries is missing, and what it says of a pair is what happens."""

import json
import re

import pytest

import alisa_jax
from alisa_jax import codecs, placement, policies
from eval import methods
from eval.script import common

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def printed():
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert common.run(methods.main, ["methods", "--json"]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()], err.getvalue()


def test_every_method_of_the_registries_is_there_with_what_it_does(printed):
    records, text = printed
    listed = {(r["kind"], r["name"]) for r in records if r["kind"] in methods.REGISTRIES}
    wanted = {("policy", n) for n in policies.POLICIES} | {("codec", n) for n in codecs.CODECS}
    assert listed == wanted | {("controller", n) for n in placement.CONTROLLERS}
    by = {r["name"]: r for r in records if r["kind"] in methods.REGISTRIES}
    assert by["h2o"]["papers"] == ["2306.14048"] and by["h2o"]["scores"] and by["h2o"]["evicts"]
    assert by["swa"]["scores"] and not by["swa"]["evicts"] and not by["swa"]["query"]
    assert not by["dense"]["evicts"] and by["int4"]["papers"] == ["2303.06865"]
    assert all(r["does"] in text for r in by.values())


def test_every_policy_runs_with_every_codec_and_refusals_are_those_of_the_engine(printed):
    records, text = printed
    pairs = {(r["policy"], r["with"], r["name"]): r["refused"] for r in records if r["kind"] == "pair"}
    rows = [name for name, sort, _ in pairs if sort == "controller"]
    assert set(rows) == {*policies.POLICIES, *methods.OPTIONS}
    assert len(rows) == len(set(rows)) * len(placement.CONTROLLERS)
    assert len(pairs) == len(policies.POLICIES) * len(codecs.CODECS) + len(rows)
    refusals = {(p, name): refused for (p, sort, name), refused in pairs.items() if sort == "codec" and refused}
    assert {name for _, name in refusals} == {"skvq"} and {"h2o", "snapkv", "merge"} <= {p for p, _ in refusals}
    model = alisa_jax.load("bundled")
    for (p, name), sentence in refusals.items():
        texts = [methods.example(r[n]) for r, n in ((policies.POLICIES, p), (codecs.CODECS, name))]
        with pytest.raises(ValueError, match=re.escape(sentence)):
            alisa_jax.Engine(model, *texts)
    assert pairs["swa", "controller", "alisa"] is None and pairs["dense", "controller", "flexgen"] is None
    refused = pairs["h2o", "controller", "alisa"]
    assert "evicts what it does not keep" in refused and refused in text and text.count(refused) == 1


def test_what_is_placed_and_what_is_not_is_what_an_engine_says(printed):
    """Every reason once; and what stays on the device refuses nothing."""
    records, text = printed
    cells = [
        (r["policy"], "raw", r["name"], r["refused"])
        for r in records
        if r["kind"] == "pair" and r["with"] == "controller"
    ]
    placed = [r for r in records if r["kind"] == "placed"]
    assert len(placed) == len(codecs.CODECS) * len(placement.CONTROLLERS) * len(methods.PLACED)
    cells += [(r["policy"], methods.example(codecs.CODECS[r["codec"]]), r["controller"], r["refused"]) for r in placed]
    assert not any(refused for _, _, name, refused in cells if name in ("resident", "waves"))
    model, said = alisa_jax.load("bundled"), {}
    for policy, codec, name, refused in cells:
        said.setdefault(refused, (policy, codec, name))
    assert len(said) > 3 and all(sentence in text for sentence in said if sentence)
    for sentence, (policy, codec, name) in said.items():
        policy = methods.example(policies.POLICIES[policy]) if policy in policies.POLICIES else policy
        one = alisa_jax.Engine(model, policy, codec, methods.offloading(name))
        check = lambda one=one: one.check_generate([[1] * methods.TOKENS] * 2, methods.TOKENS)
        if sentence is None:
            check()
            continue
        with pytest.raises(ValueError, match=re.escape(sentence)):
            check()
