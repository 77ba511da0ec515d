"""What every registered policy must do; a policy is tested by being listed in POLICIES."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import attention, spec
from alisa_jax.kv.state import bias_of
from alisa_jax.policies import POLICIES, Dims, Policy, parse
from tests import replay

S = 24


def example(name) -> Policy:
    """The policy with its defaults, at 60 % sparsity where it has one."""
    budget = {"kv_sparsity": 0.6} if "kv_sparsity" in {f.name for f in dataclasses.fields(POLICIES[name])} else {}
    return POLICIES[name](**budget)


EXAMPLES = [example(name) for name in POLICIES]


def label(value):
    return value if isinstance(value, str) else spec.to_text(value, POLICIES)


ROUTES = [(policy, route) for policy in EXAMPLES for route in policy.routes]


@pytest.mark.parametrize("policy", EXAMPLES, ids=label)
def test_a_policy_is_its_spec(policy):
    text = spec.to_text(policy, POLICIES)
    assert parse(text) == policy and hash(parse(text)) == hash(policy)
    assert policy.seed_kind in ("none", "rows", "sum")
    assert policy.routes and set(policy.routes) <= set(attention.ROUTES)


@pytest.mark.parametrize("start", replay.STARTS)
@pytest.mark.parametrize("policy", EXAMPLES, ids=label)
def test_the_routes_of_a_policy_agree_from_every_start(policy, start):
    runs = [replay.shared_run(policy, route, start) for route in policy.routes]
    for other in runs[1:]:
        assert other.sets == runs[0].sets
        np.testing.assert_allclose(other.out, runs[0].out, atol=1e-5)


@pytest.mark.parametrize("policy, route", ROUTES, ids=label)
def test_observe_seed_and_exchange_keep_shapes_and_types(policy, route):
    B, N, K = 2, 6, 3
    P = policy.selection_heads(K)
    assert P in (1, K)
    dims = attention.dims_of(policy, route, B, N, K, S)
    M = dims.M

    def walk(mass, pos, slot, length, which, row):
        stats = policy.init(dims)
        seen = policy.observe(stats, mass, pos, slot, length)
        both = policy.observe(stats, mass, pos, slot, length, (which, row))
        rows = {"none": None, "sum": row, "rows": jnp.stack([row] * max(1, policy.seed_rows(S)), axis=2)}
        seeded, first = policy.seed(stats, rows[policy.seed_kind], length, dims)
        after = policy.exchange(seen, pos, bias_of(pos), length, S) if "working_set" in policy.routes else (seen, None)
        return stats, (seen, both, seeded, after[0]), first, after[1]

    def arg(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    f, i = jnp.float32, jnp.int32
    args = arg(f, B, P, M), arg(i, B, P, M), arg(i, B, P), arg(i, B), arg(jnp.bool_, B), arg(f, B, P, S)
    stats, later, first, ex = jax.eval_shape(walk, *args)
    for other in later:
        assert jax.tree.structure(other) == jax.tree.structure(stats)
        for new, old in zip(jax.tree.leaves(other), jax.tree.leaves(stats)):
            assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, False)
    assert (jnp.broadcast_shapes(first.shape, (B, P, M)), first.dtype) == ((B, P, M), i)
    if ex is not None:
        assert (ex.pos.shape, ex.pos.dtype, ex.bias.shape, ex.bias.dtype) == ((B, P, M), i, (B, P, M), f)
        assert ex.load_pos.shape == ex.load_slot.shape and (ex.more.shape, ex.more.dtype) == ((), jnp.bool_)
    if "indexed" in policy.routes and not policy.needs_query:
        keep = jax.eval_shape(lambda: policy.select(policy.init(dims), jnp.zeros((B,), i), S))
        assert (jnp.broadcast_shapes(keep.shape, (B, P, S)), keep.dtype) == ((B, P, S), jnp.bool_)


@pytest.mark.parametrize("policy", EXAMPLES, ids=label)
def test_attention_that_is_not_a_number_counts_as_none(policy):
    """Whether it comes by slots or as a dense row: the token with NaN is kept no more than one with no attention."""
    N = K = 2
    dims = Dims(1, N, K, S, S)
    P, bad = policy.selection_heads(K), 3
    pos = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (1, P, S))

    @functools.partial(jax.jit, compiler_options=replay.QUICK)
    def kept(rows, dense):
        def body(n, stats):
            length = jnp.full((1,), n, jnp.int32)
            here = jnp.where(pos <= n, pos, -1)
            slot = jnp.full((1, P), n, jnp.int32)
            return policy.observe(stats, rows[n], here, slot, length, (dense, rows[n]))

        n = jnp.full((1,), S - 2, jnp.int32)
        stats = jax.lax.fori_loop(0, S - 2, body, policy.init(dims))
        here = jnp.where(pos < S - 2, pos, -1)
        sets = []
        if "indexed" in policy.routes and not policy.needs_query:
            sets.append(jnp.broadcast_to(policy.select(stats, n, S), (1, P, S)))
        if "working_set" in policy.routes:
            sets.append(policy.exchange(stats, here, bias_of(here), n, S)[1].bias == 0)
        return sets

    rows = np.random.default_rng(2).random((S, 1, P, S)).astype(np.float32) * N / S
    rows *= np.arange(S) <= np.arange(S)[:, None, None, None]
    none, nan = rows.copy(), rows.copy()
    none[..., bad], nan[..., bad] = 0, np.nan
    for dense in (True, False):
        which = jnp.array([dense])
        want, got = kept(jnp.asarray(none), which), kept(jnp.asarray(nan), which)
        for a, b in zip(want, got):
            np.testing.assert_array_equal(a, b)
