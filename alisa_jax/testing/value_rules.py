"""Rules of the contract that need no stream: a policy as a value, the types it gives, NaN."""

from __future__ import annotations

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from alisa_jax import attention
from alisa_jax.kv.state import EMPTY, LayerSpec, bias_of
from alisa_jax.policies import Dims, Policy
from alisa_jax.testing.rules import refuse
from alisa_jax.testing.streams import BUCKETS, QUICK, H, K, N


def check_value(policy) -> None:
    """The rule "value". Raises AssertionError, as all rules do."""
    if not isinstance(policy, Policy):
        refuse("value", policy, "it does not inherit alisa_jax.policies.Policy")
    names = {field.name for field in dataclasses.fields(policy)}
    for name in vars(policy):
        if name not in names and not isinstance(
            getattr(type(policy), name, None), functools.cached_property
        ):
            refuse(
                "value",
                policy,
                f"{name!r} is no field; decorate the class with @dataclass(frozen=True)",
            )
    try:
        same = dataclasses.replace(policy)
        equal = same == policy and hash(same) == hash(policy)
    except TypeError as error:
        refuse("value", policy, f"it cannot be hashed and copied: {error}")
    if not equal:
        refuse("value", policy, "a copy with the same fields is not equal to it")
    for name in names:
        other = copy.copy(policy)
        object.__setattr__(other, name, object())
        if other == policy:
            refuse(
                "value",
                policy,
                f"it equals a policy with another {name!r}, whose compiled programs it would run",
            )
    if (
        not policy.routes
        or not set(policy.routes) <= set(attention.ROUTES)
        or "masked" not in policy.routes
    ):
        refuse(
            "value",
            policy,
            f"routes are some of {attention.ROUTES}, masked always; got {policy.routes}",
        )
    if policy.needs_query and "working_set" in policy.routes:
        refuse(
            "value",
            policy,
            "the set of a working set is chosen one step ahead, which needs_query rules out",
        )
    if policy.seed_kind not in ("none", "rows", "sum"):
        refuse("value", policy, f'seed_kind is "none", "rows" or "sum"; got {policy.seed_kind!r}')


def check_sizes(policy: Policy) -> None:
    """Numbers that a policy tells: capacity and heads."""
    small = policy.capacity(BUCKETS[0])
    large = policy.capacity(BUCKETS[1])
    if not (isinstance(small, int) and isinstance(large, int) and 1 <= small <= large):
        refuse(
            "types",
            policy,
            f"capacity(S) is an int that does not shrink; got {small}, {large} for S = {BUCKETS}",
        )
    if policy.selection_heads(K) not in (1, K):
        refuse(
            "types",
            policy,
            f"selection_heads(K) is 1 or K; got {policy.selection_heads(K)} for K = {K}",
        )


def check_types(policy: Policy, route: str, B: int = 2, S: int = 24, later: int = 40) -> None:
    """Traces every method on `route` once; nothing is compiled."""
    spec = LayerSpec(policy, None, route)
    dims = attention.dims_of(spec, B, N, K, S, H)
    grown = attention.dims_of(spec, B, N, K, later, H)
    P = policy.selection_heads(K)
    M = dims.M
    f = jnp.float32
    i = jnp.int32
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
            refuse(
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


def check_nan(policy: Policy, S: int = 24, bad: int = 3) -> bool:
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
        want = kept(jnp.asarray(none), jnp.array([dense]))
        got = kept(jnp.asarray(nan), jnp.array([dense]))
        for name in got:
            if (differ := np.asarray(got[name] != want[name])).any():
                how = "as a dense row" if dense else "by slots"
                at = sorted({int(p) for p in np.argwhere(differ)[:, 2]})
                said = f"{name} decides otherwise on the tokens {at} when the attention of token"
                refuse(
                    "nan", policy, f"{said} {bad}, given {how}, is not a number than when it is 0"
                )
    return bool(got)
