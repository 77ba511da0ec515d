"""`check_policy` against policies that are wrong in one respect each, and against right ones that use every seam."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import pytest

from alisa_jax.policies import base, parse
from alisa_jax.testing import RULES, check_policy
from tests import replay
from tests.policies.evicting import HeavyHitters

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Recent(base.Policy):
    """Right in every respect: the last `keep` tokens, and a statistic that counts steps."""

    keep: int = 6

    def capacity(self, S):
        return self.keep + 1

    def init(self, dims):
        return jnp.zeros((dims.B,), jnp.float32)

    def observe(self, stats, mass, pos, slot, length, dense=None):
        return stats + 1

    def first(self, length):
        return base.column(length) - self.keep

    def exchange(self, stats, pos, bias, length, S):
        return stats, base.evicted(pos, bias, (pos >= 0) & (pos < self.first(length)))

    def select(self, stats, length, S, q=None):
        p = base.positions(S)
        return (p >= self.first(length)) & (p < base.column(length))


class Masked(Recent):
    evicts: ClassVar[bool] = False
    routes: ClassVar[tuple[str, ...]] = ("masked",)


class NoPolicy:
    pass


@dataclass(frozen=True)
class Unhashable(Recent):
    sizes: list = dataclasses.field(default_factory=list)


@dataclass(frozen=True, eq=False)
class EqualToOthers(Recent):
    share: float = 0.5


class EqualToNothing(Recent):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Mutable(Recent):
    def __init__(self, share):
        object.__setattr__(self, "keep", 6)
        object.__setattr__(self, "share", share)


class WithoutReference(Recent):
    routes: ClassVar[tuple[str, ...]] = ("working_set",)


class TwoMinds(Recent):
    needs_query: ClassVar[bool] = True


class UnknownSeed(Recent):
    seed_kind: ClassVar[str] = "row"


class OtherDtype(Recent):
    def observe(self, stats, mass, pos, slot, length, dense=None):
        return stats.astype(jnp.bfloat16)


class WeakStatistic(Recent):
    def observe(self, stats, mass, pos, slot, length, dense=None):
        return jnp.where(length > 0, 1.0, 0.0)


class ForgetsToGrow(Recent):
    def init(self, dims):
        return jnp.zeros((dims.B, dims.S), jnp.float32)


class OtherExchange(Recent):
    def exchange(self, stats, pos, bias, length, S):
        stats, ex = super().exchange(stats, pos, bias, length, S)
        return stats, ex._replace(pos=ex.pos.astype(jnp.int16))


class SelectsNumbers(Recent):
    def select(self, stats, length, S, q=None):
        return super().select(stats, length, S).astype(jnp.int32)


class Shrinks(Recent):
    def capacity(self, S):
        return 200 - S


class TwoHeads(Recent):
    def selection_heads(self, K):
        return 2


class NanWins(Masked):
    routes: ClassVar[tuple[str, ...]] = ("indexed", "masked")

    def init(self, dims):
        return jnp.zeros((dims.B, 1, dims.S), jnp.float32)

    def grow(self, stats, S, M):
        return jnp.pad(stats, ((0, 0), (0, 0), (0, S - stats.shape[-1])))

    def observe(self, stats, mass, pos, slot, length, dense=None):
        return stats if dense is None else stats + dense[1]

    def select(self, stats, length, S, q=None):
        best = jnp.argmax(stats, axis=-1, keepdims=True) == base.positions(S)
        return super().select(stats, length, S) | (best & (base.positions(S) < base.column(length)))

    def capacity(self, S):
        return self.keep + 2


class CapacityTooSmall(Recent):
    def capacity(self, S):
        return self.keep


class FillsEverySlot(Recent):
    def exchange(self, stats, pos, bias, length, S):
        return stats, base.evicted(pos, bias, (pos >= 0) & (pos < self.first(length) - 1))


class SelectsTooMany(Masked):
    def select(self, stats, length, S, q=None):
        return super().select(stats, length + 1, S) | super().select(stats, length - 1, S)


class ForgetsItself(CapacityTooSmall):
    routes: ClassVar[tuple[str, ...]] = ("indexed", "masked")


class SeesTheFuture(Masked):
    def select(self, stats, length, S, q=None):
        return super().select(stats, length + 2, S)


class KeepsTheAbsent(Recent):
    """Right until a prompt seeds the working set with a token beyond the prompt's end."""

    def select(self, stats, length, S, q=None):
        return super().select(stats, length + 2, S)


class HoldsTwice(Recent):
    def capacity(self, S):
        return self.keep + 3

    def exchange(self, stats, pos, bias, length, S):
        stats, ex = super().exchange(stats, pos, bias, length, S)
        again = (pos == -1) & (jnp.cumsum(pos == -1, axis=-1) == 1) & (base.column(length) > self.keep)
        return stats, ex._replace(
            pos=jnp.where(again, base.column(length) - 1, ex.pos), bias=jnp.where(again, jnp.float32(0), ex.bias)
        )


class ComesBack(Recent):
    routes: ClassVar[tuple[str, ...]] = ("indexed", "masked")

    def select(self, stats, length, S, q=None):
        return super().select(stats, length, S) & (base.positions(S) % 2 == base.column(length) % 2)


class RelabelsASlot(Recent):
    evicts: ClassVar[bool] = False

    def exchange(self, stats, pos, bias, length, S):
        stats, ex = super().exchange(stats, pos, bias, length, S)
        return stats, ex._replace(pos=jnp.where((ex.pos == 9) & (base.column(length) == 10), 0, ex.pos))


class TwoOpinions(Recent):
    def exchange(self, stats, pos, bias, length, S):
        return stats, base.evicted(pos, bias, (pos >= 0) & (pos <= self.first(length)))


@dataclass(frozen=True)
class HalfAtMost(Recent):
    kv_sparsity: float = 0.5

    def capacity(self, S):
        return S // 2 + 1

    def first(self, length):
        return base.column(length) - base.column(length) // 2


BROKEN = [
    (NoPolicy(), "value", "does not inherit"),
    (Unhashable(), "value", "unhashable type: 'list'"),
    (EqualToOthers(), "value", "it equals a policy with another 'share'"),
    (EqualToNothing(), "value", "a copy with the same fields is not equal to it"),
    (Mutable(0.5), "value", "'share' is no field; decorate the class"),
    (WithoutReference(), "value", "masked always; got ('working_set',)"),
    (TwoMinds(), "value", "which needs_query rules out"),
    (UnknownSeed(), "value", "got 'row'"),
    (OtherDtype(), "types", "route working_set: observe gives bfloat16[2], expected float32[2]"),
    (WeakStatistic(), "types", "route working_set: observe gives weak float32[2], expected float32[2]"),
    (ForgetsToGrow(), "types", "grow from 24 to 40 tokens gives float32[2, 24], expected float32[2, 40]"),
    (OtherExchange(), "types", "pos of exchange gives int16[2, 1, 7], expected int32[2, 1, 7]"),
    (SelectsNumbers(), "types", "select gives int32[2, 1, 24], expected bool[2, 1, 24]"),
    (Shrinks(), "types", "does not shrink; got 168, 104 for S = (32, 96)"),
    (TwoHeads(), "types", "selection_heads(K) is 1 or K; got 2 for K = 3"),
    (NanWins(), "nan", "select decides otherwise on the tokens"),
    (CapacityTooSmall(), "capacity", "query at position 6: no slot is empty for its own token"),
    (FillsEverySlot(), "capacity", "query at position 7: no slot is empty for its own token"),
    (SelectsTooMany(), "capacity", "query at position 7: it attends 8 tokens, more than capacity(32) = 7"),
    (
        ForgetsItself(),
        "self",
        "route indexed, from an empty cache, sequence 0, query at position 6: it attends [0, 1, 2",
    ),
    (SeesTheFuture(), "past", "query at position 0: it attends 1 slots beside those that hold a token"),
    (
        KeepsTheAbsent(),
        "past",
        "after dense prompts of (5, 29, 16) tokens, sequence 0, query at position 5: it attends [6]",
    ),
    (HoldsTwice(), "once", "tokens [6] lie in two slots"),
    (ComesBack(), "gone", "route indexed, from an empty cache, sequence 0, query at position 2: it attends [0]"),
    (
        RelabelsASlot(),
        "content",
        "route working_set, from an empty cache, sequence 0, query at position 10: its output",
    ),
    (TwoOpinions(), "routes", "working_set against indexed, sequence 0, query at position 6: they attend [[1, 2, 3"),
    (HalfAtMost(), "no_sparsity", "query at position 1: it leaves out [0]"),
]


@pytest.mark.parametrize("policy, rule, sentence", BROKEN, ids=[type(policy).__name__ for policy, *_ in BROKEN])
def test_a_broken_policy_is_refused_by_the_rule_that_it_breaks(policy, rule, sentence):
    starts = ("prompt",) if isinstance(policy, KeepsTheAbsent) else ("empty",)
    with pytest.raises(AssertionError) as refused:
        check_policy(policy, starts=starts, driver=replay.DRIVER)
    name, told = str(refused.value).split(f" breaks the rule {rule!r} ({RULES[rule]}): ")
    assert type(policy).__name__ in name and sentence in told


def test_every_rule_has_a_policy_that_breaks_it():
    assert {rule for _, rule, _ in BROKEN} == set(RULES)


def test_a_right_policy_passes_and_the_report_says_what_was_seen():
    report = check_policy(Recent(), driver=replay.DRIVER)
    assert report.rules == tuple(rule for rule in RULES if rule != "no_sparsity")
    assert report.policy == Recent() and report.routes == ("working_set", "indexed", "masked")
    assert report.steps == 3 * 3 * (96 + (96 - 29) + (96 - 32)), "3 routes, 3 sequences, 3 starts"
    assert 0 < report.attended_frac < 0.4 and report.seconds > 0


def test_selections_per_head_that_evict_pass_and_sums_left_in_a_reused_slot_are_found():
    report = check_policy(HeavyHitters(), starts=("empty", "prompt"), driver=replay.DRIVER)
    assert {"gone", "once", "routes"} <= set(report.rules) and report.routes == ("working_set", "masked")
    with pytest.raises(AssertionError, match="breaks the rule 'routes'.*working_set against masked.*they attend"):
        check_policy(HeavyHitters(resets=False), starts=("empty",), driver=replay.DRIVER)


def test_a_step_that_attends_everything_is_not_held_against_the_working_set():
    policy = parse("swa(kv_sparsity=0.6,window=5,refresh_every=7)")
    report = check_policy(
        policy, ("capacity", "content", "routes"), ("working_set", "masked"), ("empty",), replay.DRIVER
    )
    assert report.rules == ("value", "capacity", "content", "routes") and report.attended_frac < 0.7


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rules=("speed",)), "rules are value, types, .*; got 'speed'"),
        (dict(starts=("middle",)), "starts are empty, prompt, full_bucket; got 'middle'"),
        (dict(routes=("gather",)), "runs on working_set, indexed, masked; got route 'gather'"),
    ],
)
def test_unknown_rules_starts_and_routes_are_told_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        check_policy(Recent(), **options)
