"""What every registered policy must do; a policy is tested by being listed in POLICIES."""

import dataclasses

import pytest

from alisa_jax import spec, testing
from alisa_jax.policies import POLICIES, Policy, parse
from tests import replay


def example(name) -> Policy:
    """The policy with its defaults, at 60 % sparsity where it has one."""
    budget = {"kv_sparsity": 0.6} if "kv_sparsity" in {f.name for f in dataclasses.fields(POLICIES[name])} else {}
    return POLICIES[name](**budget)


EXAMPLES = [example(name) for name in POLICIES]
STEP_RULES = ("capacity", "self", "past", "once", "gone", "content", "routes")


def label(value):
    return value if isinstance(value, str) else spec.to_text(value, POLICIES)


ROUTES = [(policy, route) for policy in EXAMPLES for route in policy.routes]


@pytest.mark.parametrize("policy", EXAMPLES, ids=label)
def test_a_policy_is_its_spec(policy):
    text = spec.to_text(policy, POLICIES)
    assert str(policy) == text
    assert parse(text) == policy and hash(parse(text)) == hash(policy)
    assert testing.check_policy(policy, rules=("value",)).rules == ("value",)


def test_a_policy_without_a_name_prints_as_its_python_form():
    Other = dataclasses.make_dataclass("Other", [("size", int, 3)], bases=(Policy,), frozen=True)
    assert str(Other()) == repr(Other()) == "Other(size=3)"


@pytest.mark.parametrize("start", replay.STARTS)
@pytest.mark.parametrize("policy", EXAMPLES, ids=label)
def test_the_routes_of_a_policy_agree_from_every_start(policy, start):
    report = testing.check_policy(policy, STEP_RULES, starts=(start,), driver=replay.DRIVER)
    expected = {"value", *STEP_RULES} - ({"gone"} if not policy.evicts else set())
    assert set(report.rules) == expected and report.routes == policy.routes
    if getattr(policy, "kv_sparsity", None) is not None:
        assert report.attended_frac < 0.6, "too little was left out for the rules to mean much"


@pytest.mark.parametrize("policy, route", ROUTES, ids=label)
def test_observe_seed_and_exchange_keep_shapes_and_types(policy, route):
    assert testing.check_policy(policy, ("types",), routes=(route,), driver=replay.DRIVER).rules == ("value", "types")


@pytest.mark.parametrize("policy", EXAMPLES, ids=label)
def test_attention_that_is_not_a_number_counts_as_none(policy):
    """Whether it comes by slots or as a dense row: the token with NaN is kept no more than one with no attention."""
    assert testing.check_policy(policy, ("nan",), driver=replay.DRIVER).rules == ("value", "nan")


@pytest.mark.parametrize("policy", [p for p in EXAMPLES if hasattr(p, "kv_sparsity")], ids=label)
def test_without_sparsity_a_policy_is_dense(policy):
    report = testing.check_policy(policy, ("no_sparsity",), driver=replay.DRIVER)
    assert report.rules == ("value", "no_sparsity") and report.attended_frac == 1
