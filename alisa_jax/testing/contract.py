"""The contract of a policy as rules that a program can check; RULES names them.

A random ragged stream is decoded through one layer on every route of the policy, from an empty
cache and after dense prompts, through a growing context bucket; what was attended is compared with
the rules and with attention in float64 NumPy. Nothing here knows a particular policy. Whether a
selection is the one that a paper means is no rule: that needs an oracle of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax import attention
from alisa_jax.kv.state import EMPTY, bias_of
from alisa_jax.policies import Dims, Policy
from alisa_jax.testing.streams import (
    BUCKETS,
    CODEC,
    QUICK,
    STARTS,
    Driver,
    H,
    K,
    N,
    Run,
    Stream,
    T,
    dense_over,
)

RULES = MappingProxyType(
    {
        "value": "a policy is a frozen, hashable value, and what it declares exists",
        "types": "structure, shapes and dtypes stay the same from step to step; no type is weak",
        "nan": "a token whose attention is not a number is kept no more than one without attention",
        "capacity": "the attended tokens fit into capacity(S) slots, and one is left for the next",
        "self": "a query attends itself",
        "past": "a query attends no token that is still to come, and no empty slot",
        "once": "no token lies in two slots",
        "gone": "what an evicting policy has dropped never comes back",
        "content": "the output is attention over the attended tokens, each with its own K and V",
        "routes": "all routes attend the same tokens and give the same outputs",
        "no_sparsity": "kv_sparsity=0 is dense attention",
    }
)
TOLERANCE = 1e-5  # between outputs of two routes, and of a route and float64


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_policy` has seen hold."""

    policy: Policy
    rules: tuple[str, ...]  # of RULES, those that apply to the policy
    routes: tuple[str, ...]
    steps: int  # decoded queries, over all sequences, routes and starts
    # their mean share of the tokens so far; 1.0: nothing was ever left out, and little was tested
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
    _value(policy)  # without it nothing else makes sense
    if unknown := [x for x in routes or () if x not in policy.routes]:
        raise ValueError(f"{policy} runs on {', '.join(policy.routes)}; got route {unknown[0]!r}")
    routes = policy.routes if routes is None else tuple(routes)
    for route in routes:
        attention.check(policy, CODEC, route, T, N, K)
    driver, seen, runs = driver or Driver(), {"value"}, []
    if "types" in rules:
        _sizes(policy)
        for route in routes:
            _types(policy, route)
    if "nan" in rules and _nan(policy):
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


def _refuse(rule: str, policy, what: str):
    raise AssertionError(f"{policy} breaks the rule {rule!r} ({RULES[rule]}): {what}")


def _refuse_first(rule, policy, where: str, run: Run, bad: np.ndarray, say) -> None:
    """Refuse the policy for the earliest step of `bad` [B, steps]; say(b, i) tells what happened
    there.
    """
    if bad.any():
        i, b = (int(x) for x in np.argwhere(bad.T)[0])
        _refuse(
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


def _value(policy) -> None:
    if not isinstance(policy, Policy):
        _refuse("value", policy, "it does not inherit alisa_jax.policies.Policy")
    names = {field.name for field in dataclasses.fields(policy)}
    for name in vars(policy):
        if name not in names and not isinstance(
            getattr(type(policy), name, None), functools.cached_property
        ):
            _refuse(
                "value",
                policy,
                f"{name!r} is no field; decorate the class with @dataclass(frozen=True)",
            )
    try:
        same = dataclasses.replace(policy)
        equal = same == policy and hash(same) == hash(policy)
    except TypeError as error:
        _refuse("value", policy, f"it cannot be hashed and copied: {error}")
    if not equal:
        _refuse("value", policy, "a copy with the same fields is not equal to it")
    for name in names:
        other = copy.copy(policy)
        object.__setattr__(other, name, object())
        if other == policy:
            _refuse(
                "value",
                policy,
                f"it equals a policy with another {name!r}, whose compiled programs it would run",
            )
    if (
        not policy.routes
        or not set(policy.routes) <= set(attention.ROUTES)
        or "masked" not in policy.routes
    ):
        _refuse(
            "value",
            policy,
            f"routes are some of {attention.ROUTES}, masked always; got {policy.routes}",
        )
    if policy.needs_query and "working_set" in policy.routes:
        _refuse(
            "value",
            policy,
            "the set of a working set is chosen one step ahead, which needs_query rules out",
        )
    if policy.seed_kind not in ("none", "rows", "sum"):
        _refuse("value", policy, f'seed_kind is "none", "rows" or "sum"; got {policy.seed_kind!r}')


def _sizes(policy: Policy) -> None:
    small, large = (policy.capacity(S) for S in BUCKETS)
    if not (isinstance(small, int) and isinstance(large, int) and 1 <= small <= large):
        _refuse(
            "types",
            policy,
            f"capacity(S) is an int that does not shrink; got {small}, {large} for S = {BUCKETS}",
        )
    if policy.selection_heads(K) not in (1, K):
        _refuse(
            "types",
            policy,
            f"selection_heads(K) is 1 or K; got {policy.selection_heads(K)} for K = {K}",
        )


def _types(policy: Policy, route: str, B: int = 2, S: int = 24, later: int = 40) -> None:
    """Traces every method on `route` once; nothing is compiled."""
    dims, grown = (attention.dims_of(policy, route, B, N, K, size, H) for size in (S, later))
    P, M, f, i = policy.selection_heads(K), dims.M, jnp.float32, jnp.int32
    heads = policy.mass_heads(N, K)

    def walk(mass, pos, slot, length, which, row):
        stats = policy.init(dims)
        seen = policy.observe(stats, mass, pos, slot, length)
        both = policy.observe(stats, mass, pos, slot, length, (which, row))
        rows = {
            "none": None,
            "sum": row,
            "rows": jnp.stack([row] * max(1, policy.seed_rows(S)), axis=2),
        }
        seeded, first = policy.seed(stats, rows[policy.seed_kind], length, dims)
        after = (
            policy.exchange(seen, pos, bias_of(pos), length, S)
            if "working_set" in policy.routes
            else (stats, None)
        )
        keep = (
            policy.select(stats, length, S)
            if "indexed" in policy.routes and not policy.needs_query
            else None
        )
        steps = {
            "observe": seen,
            "observe with a dense row": both,
            "seed": seeded,
            "exchange": after[0],
        }
        steps["note"] = (
            policy.note(stats, jnp.zeros((B, 1, K, H)), length) if policy.takes_keys else stats
        )
        larger = policy.grow(stats, later, grown.M), policy.init(grown)
        return stats, steps, larger, first, after[1], keep, policy.refresh(length)

    def arg(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    args = (
        arg(f, B, heads, M),
        arg(i, B, P, M),
        arg(i, B, P),
        arg(i, B),
        arg(jnp.bool_, B),
        arg(f, B, heads, S),
    )
    stats, steps, (larger, fresh), first, ex, keep, which = jax.eval_shape(walk, *args)

    def same(name: str, got, want) -> None:
        if jax.tree.structure(got) != jax.tree.structure(want) or _kinds(got) != _kinds(want):
            _refuse(
                "types",
                policy,
                f"route {route}: {name} gives {_kinds(got)}, expected {_kinds(want)}",
            )

    same("init", stats, jax.tree.map(lambda x: arg(x.dtype, *x.shape), stats))
    for name in ("observe", "observe with a dense row", "seed", "exchange", "note"):
        same(name, steps[name], stats)
    same(f"grow from {S} to {later} tokens", larger, fresh)
    same(
        "the first set of seed",
        arg(first.dtype, *jnp.broadcast_shapes(first.shape, (B, P, M))),
        arg(i, B, P, M),
    )
    if ex is not None:
        same("pos of exchange", ex.pos, arg(i, B, P, M))
        same("bias of exchange", ex.bias, arg(f, B, P, M))
        same("load_slot of exchange", ex.load_slot, arg(i, B, P, ex.load_pos.shape[-1]))
        same("load_pos of exchange", ex.load_pos, arg(i, B, P, ex.load_pos.shape[-1]))
        same("more of exchange", ex.more, arg(jnp.bool_))
    if keep is not None:
        same(
            "select",
            arg(keep.dtype, *jnp.broadcast_shapes(keep.shape, (B, P, S))),
            arg(jnp.bool_, B, P, S),
        )
    if which is not None:
        same("refresh", which, arg(jnp.bool_, B))


def _kinds(tree) -> str:
    """The leaves of `tree` as text: float32[2, 1, 24], weak int32[]."""
    kinds = (f"{'weak ' * x.weak_type}{x.dtype.name}{list(x.shape)}" for x in jax.tree.leaves(tree))
    return ", ".join(kinds) or "nothing"


def _nan(policy: Policy, S: int = 24, bad: int = 3) -> bool:
    """Whether NaN comes by slots or as a dense row."""
    heads = 2
    P, groups = policy.selection_heads(heads), policy.mass_heads(heads, heads)
    pos = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (1, P, S))

    @functools.partial(jax.jit, compiler_options=dict(QUICK))
    def kept(rows, dense):
        def body(n, stats):
            length = jnp.full((1,), n, jnp.int32)
            here = jnp.where(pos <= n, pos, EMPTY)
            slot = jnp.full((1, P), n, jnp.int32)
            return policy.observe(stats, rows[n], here, slot, length, (dense, rows[n]))

        n = jnp.full((1,), S - 2, jnp.int32)
        start = policy.init(Dims(1, heads, heads, S, S, H))
        if policy.takes_keys:
            start = policy.note(start, keys, jnp.zeros_like(n))
        stats = jax.lax.fori_loop(0, S - 2, body, start)
        here = jnp.where(pos < S - 2, pos, EMPTY)
        sets = {}
        if "indexed" in policy.routes:
            query = keys[:, 0, :, None] if policy.needs_query else None
            sets["select"] = jnp.broadcast_to(policy.select(stats, n, S, query), (1, P, S))
        if "working_set" in policy.routes:
            sets["exchange"] = policy.exchange(stats, here, bias_of(here), n, S)[1].bias == 0
        return sets

    rng = np.random.default_rng(2)
    rows = rng.random((S, 1, groups, S)).astype(np.float32) * heads / S
    keys = jnp.asarray(rng.normal(size=(1, S, heads, H)), jnp.float32)
    rows *= np.arange(S) <= np.arange(S)[:, None, None, None]
    none, nan = rows.copy(), rows.copy()
    none[..., bad], nan[..., bad] = 0, np.nan
    for dense in (True, False):
        want, got = (kept(jnp.asarray(x), jnp.array([dense])) for x in (none, nan))
        for name in got:
            if (differ := np.asarray(got[name] != want[name])).any():
                how = "as a dense row" if dense else "by slots"
                at = sorted({int(p) for p in np.argwhere(differ)[:, 2]})
                said = f"{name} decides otherwise on the tokens {at} when the attention of token"
                _refuse(
                    "nan", policy, f"{said} {bad}, given {how}, is not a number than when it is 0"
                )
    return bool(got)


def _breaches(policy: Policy, run: Run, tokens: Stream):
    """(rule, where it is broken [B, steps], what happened at (b, i)); a cause comes before what
    follows from it.
    """
    n, at = _queries(run), np.arange(run.slots.shape[-1])
    # [B, steps, 1, T + 1]
    own, later = (x[:, :, None] for x in (at == n[..., None], at > n[..., None]))
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
        _refuse("routes", policy, f"{where}: the numbers of selections differ")
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
