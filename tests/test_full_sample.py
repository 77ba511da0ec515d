"""What is kept of the cases that are marked `full`."""

import random

import pytest

from tests import full

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.slow

TESTS = """
import pytest
@pytest.mark.full(sample=2)
@pytest.mark.parametrize("x", range(9))
def test_some(x): pass
@pytest.mark.full(sample=1, per=("a", "b"))
@pytest.mark.parametrize("a, b", [(a, b) for a in "pqr" for b in (1.5, None)])
def test_each(a, b): pass
@pytest.mark.full
def test_none(): pass
@pytest.mark.full(sample=2)
@pytest.mark.parametrize("x", range(9))
def test_some_again(x): pass
@pytest.mark.parametrize("x", [0, *(pytest.param(x, marks=pytest.mark.full(sample=1)) for x in (1, 2, 3))])
def test_marked_cases(x): pass
def test_all(): pass
"""


@pytest.fixture
def collected(pytester, monkeypatch):
    """`collected(seed, *args)`: the names of the tests that pytest would run."""
    pytester.makepyfile(test_some=TESTS)
    pytester.makeini("[pytest]\nmarkers = full\naddopts = --strict-markers -p no:xdist -p no:hypothesispytest")

    def collect(seed, *args):
        monkeypatch.setenv(full.SEED, str(seed))
        out = pytester.runpytest_inprocess("-p", "tests.full", "--collect-only", "-q", *args)
        assert out.ret == 0
        return [line.partition("::")[2] for line in out.outlines if "::" in line]

    return collect


def of(names, test):
    return [name.partition("[")[2] for name in names if name.partition("[")[0] == test]


def test_a_run_keeps_the_sample_of_its_seed_and_full_keeps_everything(collected):
    some = collected(5)
    assert some == collected(5)
    assert len(of(some, "test_some")) == 2 and of(some, "test_some") == of(some, "test_some_again")
    assert len(of(some, "test_each")) == 3 and not of(some, "test_none") and of(some, "test_all") == [""]
    for values in ({name.split("-")[0] for name in of(some, "test_each")}, {"p", "q", "r"}):
        assert values == {"p", "q", "r"}
    assert {name.split("-")[1] for name in of(some, "test_each")} == {"1.5]", "None]"}
    assert len(of(some, "test_marked_cases")) == 2 and "0]" in of(some, "test_marked_cases")
    assert len({tuple(of(collected(i), "test_some")) for i in range(6)}) > 1
    assert len(collected(5, "--full")) == 9 + 6 + 1 + 9 + 4 + 1


def test_a_test_that_is_named_by_hand_is_run(collected):
    assert collected(5, "test_some.py::test_none") == ["test_none"]
    assert len(collected(5, "test_some.py::test_some")) == 9
    assert collected(5, "test_some.py::test_some[3]") == ["test_some[3]"]


@pytest.mark.parametrize("sample", [1, 2, 5])
def test_every_value_of_every_parameter_is_kept_as_often_as_asked_where_it_can_be(sample):
    rng = random.Random(0)
    for drawn in range(50):
        cases = sorted({(rng.randrange(5), rng.randrange(3)) for _ in range(rng.randrange(1, 12))})
        keep = full.kept([str(case) for case in cases], sample, cases, str(drawn))
        for column in (0, 1):
            for value in {case[column] for case in cases}:
                there = sum(case[column] == value for case in cases)
                assert sum(cases[i][column] == value for i in keep) >= min(sample, there)


def test_each_case_has_its_turn_and_no_more_than_the_sample_is_kept():
    names = [f"case {i}" for i in range(12)]
    draws = [full.kept(names, 3, [()] * 12, str(drawn)) for drawn in range(60)]
    assert all(len(keep) == 3 for keep in draws) and set().union(*draws) == set(range(12))
    assert full.kept(names, 0, [()] * 12, "0") == set() and full.kept([], 2, [], "0") == set()
    assert full.kept(names, 99, [()] * 12, "0") == set(range(12))


def test_a_seed_is_drawn_once_and_inherited(monkeypatch):
    monkeypatch.setenv(full.SEED, "7")
    assert full.seed() == 7
    monkeypatch.setenv(full.SEED, "")
    first = full.seed()
    assert first == full.seed() and 0 <= first < 2**32


def test_the_summary_of_a_run_names_what_it_ran_with(pytester, monkeypatch):
    monkeypatch.setenv(full.SEED, "11")
    pytester.makepyfile("def test_one(): pass\ndef test_two(): raise ValueError")
    out = pytester.runpytest_inprocess("-p", "tests.full", "-p", "no:xdist", "-q", "--full-summary=out.md")
    out.stdout.fnmatch_lines(["ALISA_TEST_SEED=11 *"])
    text = (pytester.path / "out.md").read_text()
    assert text.startswith("# The suite as CI runs it\n") and "1 passed, 1 failed in 0 s." in text
    assert "jax " in text and "ALISA_TEST_SEED=11" in text and str(pytester.path) not in text
