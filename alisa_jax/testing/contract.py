"""The contract of a policy as rules that a program can check; RULES names them.

A random ragged stream is decoded through one layer on every route of the policy, from an empty
cache and after dense prompts, through a growing context bucket; what was attended is compared with
the rules and with attention in float64 NumPy. Nothing here knows a particular policy. Whether a
selection is the one that a paper means is no rule: that needs an oracle of its own.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from alisa_jax import attention
from alisa_jax.kv.state import LayerSpec
from alisa_jax.policies import Policy
from alisa_jax.testing.rules import RULES, refuse
from alisa_jax.testing.streams import (
    BUCKETS,
    CODEC,
    STARTS,
    Driver,
    K,
    N,
    Run,
    Stream,
    T,
    dense_over,
)
from alisa_jax.testing.value_rules import check_nan, check_sizes, check_types, check_value

TOLERANCE = 1e-5  # between outputs of two routes, and of a route and float64


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_policy` has seen hold."""

    policy: Policy
    rules: tuple[str, ...]  # of RULES, those that apply to the policy
    routes: tuple[str, ...]
    steps: int  # decoded queries, over all sequences, routes and starts
    # mean share of the past that they attend; 1.0: nothing was left out, and little was tested
    attended_frac: float
    seconds: float


def check_policy(
    policy: Policy,
    rules: Sequence[str] = tuple(RULES),
    routes: Sequence[str] | None = None,
    starts: Sequence[str] = tuple(STARTS),
    driver: Driver | None = None,
) -> Report:
    """Check `policy` against `rules`, on its own `routes` (None: all of them) and from `starts`.

    driver: give the same one to several calls, and what is compiled and decoded once is not done
    again. Raises AssertionError, in one sentence, for the first rule that is broken, with the
    policy, the route, the start and the position of the query; ValueError for rules, routes or
    starts that do not exist. An error that the policy itself raises passes through.
    """
    began = time.perf_counter()
    for name, given, known in (("rule", rules, RULES), ("start", starts, STARTS)):
        if unknown := [x for x in given if x not in known]:
            raise ValueError(f"{name}s are {', '.join(known)}; got {unknown[0]!r}")
    check_value(policy)  # without it nothing else makes sense
    if unknown := [x for x in routes or () if x not in policy.routes]:
        raise ValueError(f"{policy} runs on {', '.join(policy.routes)}; got route {unknown[0]!r}")
    routes = policy.routes if routes is None else tuple(routes)
    for route in routes:
        attention.check(LayerSpec(policy, CODEC, route), T, N, K)
    driver = driver or Driver()
    seen = {"value"}
    runs = []
    if "types" in rules:
        check_sizes(policy)
        for route in routes:
            check_types(policy, route)
    if "nan" in rules and check_nan(policy):
        seen.add("nan")
    by_step = {"capacity", "self", "past", "once", "content", *(["gone"] if policy.evicts else [])}
    for start in starts if {*by_step, "routes"} & {*rules} else ():
        here = []
        for route in routes:
            here.append(driver.shared_run(policy, route, start))
            found = [
                x
                for x in _breaches(policy, here[-1], driver.tokens)
                if x[0] in by_step & {*rules} and x[1].any()
            ]
            if found:
                rule, bad, say = min(found, key=lambda x: x[1].any(0).argmax())
                _refuse_first(rule, policy, f"route {route}, {_from(start)}", here[-1], bad, say)
        for route, run in zip(routes[1:], here[1:]) if "routes" in rules else ():
            _agree(policy, (routes[0], route), start, here[0], run)
        runs += here
    if "no_sparsity" in rules and getattr(policy, "kv_sparsity", None) is not None:
        runs.append(_no_sparsity(policy, routes[0], driver))
        seen.add("no_sparsity")
    if len(routes) > 1:
        by_step.add("routes")
    seen |= {"types", *(by_step if starts else ())} & {*rules}
    shares = [run.attended / (_queries(run) + 1) for run in runs]
    return Report(
        policy,
        tuple(rule for rule in RULES if rule in seen),
        routes,
        sum(share.size for share in shares),
        float(np.mean(np.concatenate(shares, axis=None))) if runs else float("nan"),
        time.perf_counter() - began,
    )


def _refuse_first(rule, policy, where: str, run: Run, bad: np.ndarray, say) -> None:
    """Refuse the policy for the earliest step of `bad` [B, steps]; say(b, i): what happened."""
    if bad.any():
        i, b = np.argwhere(bad.T)[0].tolist()
        refuse(
            rule,
            policy,
            f"{where}, sequence {b}, query at position {run.first[b] + i}: {say(b, i)}",
        )


def _from(start: str) -> str:
    lengths = STARTS[start]
    return f"after dense prompts of {lengths} tokens" if lengths else "from an empty cache"


def _queries(run: Run) -> np.ndarray:
    """[B, steps]: positions of the queries."""
    return run.first[:, None] + np.arange(run.out.shape[1])


def _breaches(policy: Policy, run: Run, tokens: Stream):
    """(rule, where it is broken [B, steps], what happened at (b, i)), causes first."""
    n, at = _queries(run), np.arange(run.slots.shape[-1])
    own = (at == n[..., None])[:, :, None]  # [B, steps, 1, T + 1]
    later = (at > n[..., None])[:, :, None]
    held = run.slots > 0
    capacity = np.array([policy.capacity(int(S)) for S in run.contexts])
    sizes = held.sum(-1).max(-1)

    def those(mask, b, i) -> str:
        """Positions of `mask` [B, steps, P, T + 1] at one step, by head where heads differ."""
        heads = dict.fromkeys(str(np.flatnonzero(head).tolist()) for head in mask[b, i])
        return " | ".join(heads)

    def full(b, i) -> str:
        return f"no slot is empty for its own token: exchange left all {_room(b, i)} slots taken"

    def _room(b, i) -> str:
        return f"capacity({run.contexts[i]}) = {capacity[i]}"

    yield "capacity", run.free < 1, full
    beyond = (sizes > capacity) & ~run.refreshed
    yield (
        "capacity",
        beyond,
        lambda b, i: f"it attends {sizes[b, i]} tokens, more than {_room(b, i)}",
    )
    yield (
        "self",
        ~(held & own).any(-1).all(-1),
        lambda b, i: f"it attends {those(held, b, i)} and not itself",
    )
    yield (
        "past",
        (held & later).any((-1, -2)),
        lambda b, i: f"it attends {those(held & later, b, i)}, which do not exist",
    )
    ghosts = np.where(run.refreshed, 0, run.attended - run.slots.sum(-1).mean(-1))
    yield (
        "past",
        ghosts > 1e-3,
        lambda b, i: f"it attends {ghosts[b, i]:g} slots beside those that hold a token",
    )
    twice = run.slots > 1
    yield "once", twice.any((-1, -2)), lambda b, i: f"tokens {those(twice, b, i)} lie in two slots"
    back = held & ~own
    back[:, 1:] &= ~held[:, :-1]
    back[:, 0] = False
    yield (
        "gone",
        back.any((-1, -2)),
        lambda b, i: f"it attends {those(back, b, i)}, which the query before did not",
    )
    if policy.compacts and run.prompt is not None:
        return  # some slots hold other keys and values than the tokens they are named by
    if (held & later).any() or not held.any(-1).all():
        return  # there is no attention that the output could be compared with
    rows = np.where(run.refreshed[..., None, None], ~later, held)
    error = np.abs(run.out - dense_over(tokens, n, rows)).max((-1, -2))
    text = "its output is {:.1e} away from attention over {}"
    yield "content", ~(error <= TOLERANCE), lambda b, i: text.format(error[b, i], those(rows, b, i))


def _agree(policy: Policy, routes: tuple[str, str], start: str, one: Run, other: Run) -> None:
    where = f"{_from(start)}, {routes[0]} against {routes[1]}"
    if one.slots.shape != other.slots.shape:
        refuse("routes", policy, f"{where}: the numbers of selections differ")
    differ = (((one.slots > 0) != (other.slots > 0)) & ~one.refreshed[..., None, None]).any(
        (-1, -2)
    )

    def sets(b, i) -> str:
        return " and ".join(str([sorted(head) for head in run.sets[b][i]]) for run in (one, other))

    _refuse_first("routes", policy, where, one, differ, lambda b, i: f"they attend {sets(b, i)}")
    error = np.abs(one.out - other.out).max((-1, -2))
    far = ~(error <= TOLERANCE)
    _refuse_first(
        "routes", policy, where, one, far, lambda b, i: f"the outputs are {error[b, i]:.1e} apart"
    )


def _no_sparsity(policy: Policy, route: str, driver: Driver) -> Run:
    full = dataclasses.replace(policy, kv_sparsity=0.0)
    run = driver.shared_run(full, route, "empty", BUCKETS[-1:])
    n, where = _queries(run), f"route {route}, {_from('empty')}"
    past = (np.arange(run.slots.shape[-1]) <= n[..., None])[:, :, None]
    missing = past & (run.slots == 0)
    say = lambda b, i: f"it leaves out {sorted({int(p) for p in np.argwhere(missing[b, i])[:, 1]})}"
    _refuse_first("no_sparsity", full, where, run, missing.any((-1, -2)), say)
    error = np.abs(run.out - dense_over(driver.tokens, n, past)).max((-1, -2))
    far = ~(error <= TOLERANCE)
    _refuse_first(
        "no_sparsity",
        full,
        where,
        run,
        far,
        lambda b, i: f"it is {error[b, i]:.1e} away from dense attention",
    )
    return run
