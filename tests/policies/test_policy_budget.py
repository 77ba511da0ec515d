"""How many tokens a budget keeps, against exact fractions."""

import functools

import numpy as np
import pytest

from alisa_jax.policies import Local, Strided, Swa, budget
from tests import oracle

pytestmark = pytest.mark.slow

LONGEST = 600
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.333)
SWA = [
    *({"kv_sparsity": s, "window": w} for s in SPARSITIES for w in ("k", "2k")),
    *({"kv_sparsity": s, "local_frac": f} for s in (0.0, 0.4, 0.8, 0.95) for f in (0.0, 0.25, 0.3, 0.9, 1.0)),
    *({"tokens": t, "window": w} for t in (1, 2, 7, 64) for w in ("k", "2k", 1, 23)),
    {"kv_sparsity": 0.8, "window": 700},
    {"tokens": 33, "local_frac": 0.0},
    {"tokens": 33, "decay": 0.5, "local_frac": 1.0},
]


def label(fields):
    return ",".join(f"{k}={v}" for k, v in fields.items())


@functools.cache
def exact_counts(items):
    rule = oracle.Swa(**dict(items))
    return [rule.counts(n) for n in range(LONGEST + 1)]


@pytest.mark.parametrize("fields", SWA, ids=label)
def test_swa_counts_equal_exact_fractions(fields):
    local, top, width = Swa(**fields).counts(LONGEST)
    assert list(zip(local.tolist(), top.tolist(), width.tolist())) == exact_counts(tuple(fields.items()))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 127, 128, 511, 600])
def test_r_of_one_keeps_every_token_for_odd_and_even_lengths(n):
    local, top, _ = Swa(kv_sparsity=0.0).counts(n)
    assert local[n] + top[n] == n
    assert Local(kv_sparsity=0.0).kept(n)[n] == n
    assert np.asarray(Strided(kv_sparsity=0.0).select((), np.array([n], np.int32), n)).sum() == n


def test_figure_11_at_128_tokens_keeps_the_counts_of_algorithm_1():
    kept = {s: sum(int(t[128]) for t in Swa(kv_sparsity=s).counts(128)[:2]) for s in (0.2, 0.4, 0.6, 0.8, 0.9)}
    assert kept == {0.2: 102, 0.4: 76, 0.6: 52, 0.8: 26, 0.9: 12}


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_local_keeps_the_nearest_count_and_at_least_one(sparsity):
    kept = Local(kv_sparsity=sparsity).kept(LONGEST).tolist()
    r = 1 - oracle.exact(sparsity)
    assert kept == [min(n, max(1, oracle.nearest(n * r))) for n in range(LONGEST + 1)]


@pytest.mark.parametrize("tokens", [1, 5, 599, 1000])
def test_a_budget_in_tokens_is_a_fixed_count(tokens):
    assert Local(tokens=tokens).kept(LONGEST).tolist() == [min(n, tokens) for n in range(LONGEST + 1)]


@pytest.mark.parametrize("anchor", ["position", "query"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.8, 0.95])
def test_strided_keeps_the_floor_of_r_n_tokens_evenly(sparsity, anchor):
    S = 97
    rule = oracle.Strided(sparsity, anchor)
    mask = np.asarray(Strided(sparsity, anchor).select((), np.arange(S + 1, dtype=np.int32), S))[:, 0]
    assert [set(np.flatnonzero(row).tolist()) for row in mask] == [rule.keep(n, [], 0) for n in range(S + 1)]


@pytest.mark.parametrize("fields", SWA, ids=label)
def test_the_capacity_holds_every_set_and_the_query_itself(fields):
    swa = Swa(**fields, spare_slots=3)
    counts = exact_counts(tuple(fields.items()))
    for S in (1, 2, 31, 32, 64, 96, 600):
        largest = max(local + top + 1 for local, top, _ in counts[:S])  # n < S: there is room for the query
        after = counts[S][0] + counts[S][1]  # the set that the next bucket starts from
        assert max(largest, after) + 3 <= swa.capacity(S) <= S + 3


@pytest.mark.parametrize("policy", [Local(kv_sparsity=0.8), Local(tokens=9), Strided(0.8), Strided(0.95), Strided(0.0)])
def test_the_capacity_of_a_baseline_holds_every_set_and_the_query_itself(policy):
    rule = (
        oracle.Local(policy.kv_sparsity, policy.tokens)
        if isinstance(policy, Local)
        else oracle.Strided(policy.kv_sparsity)
    )
    for S in (1, 2, 31, 32, 96):
        assert max(len(rule.keep(n, [], 0)) for n in range(S + 1)) + 1 == policy.capacity(S)


@pytest.mark.parametrize("fields", SWA, ids=label)
def test_windows_and_sets_never_shrink(fields):
    local, top, width = (t.astype(int) for t in Swa(**fields).counts(LONGEST))
    n = np.arange(LONGEST + 1)
    assert (np.diff(n - local) >= 0).all(), "a token that left the local window came back into it"
    assert (np.diff(width) >= 0).all() and (np.diff(width) <= 2).all()
    assert (width <= n).all() and (local + top <= n).all()


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({}, "either kv_sparsity or tokens"),
        ({"kv_sparsity": 0.5, "tokens": 3}, "either kv_sparsity or tokens"),
        ({"kv_sparsity": 1.0}, r"kv_sparsity must be in \[0, 1\); got 1.0"),
        ({"kv_sparsity": -0.1}, r"kv_sparsity must be in \[0, 1\); got -0.1"),
        ({"kv_sparsity": float("nan")}, "kv_sparsity must be in"),
        ({"tokens": 0}, "tokens must be at least 1; got 0"),
        ({"tokens": 4, "window": "3k"}, 'window must be "k", "2k" or a number of rows; got .3k'),
        ({"tokens": 4, "window": 0}, "window must be at least 1 row; got 0"),
        ({"tokens": 4, "decay": 1.0}, r"decay must be in \(0, 1\); got 1.0"),
        ({"tokens": 4, "decay": 0.5, "window": "2k"}, "either window or decay"),
        ({"tokens": 4, "local_frac": 1.1}, r"local_frac must be in \[0, 1\]; got 1.1"),
        ({"tokens": 4, "refresh_every": -1}, "refresh_every must be 0 or more; got -1"),
        ({"tokens": 4, "dense_layers": -1}, "dense_layers must be 0 or more; got -1"),
        ({"tokens": 4, "spare_slots": -1}, "spare_slots must be 0 or more; got -1"),
    ],
)
def test_swa_refuses_options_outside_their_domain(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Swa(**fields)


def test_strided_refuses_an_unknown_anchor():
    with pytest.raises(ValueError, match='anchor must be "position" or "query"; got .head.'):
        Strided(0.5, anchor="head")


def test_a_window_that_grows_is_refused_for_long_contexts_and_the_others_are_not():
    with pytest.raises(ValueError, match="serves at most 16384 tokens; got a context of 20000"):
        Swa(kv_sparsity=0.8).validate(20000)
    for swa in (Swa(kv_sparsity=0.8, window=64), Swa(kv_sparsity=0.8, decay=0.9), Swa(tokens=512)):
        swa.validate(20000)
    Swa(kv_sparsity=0.8).validate(16384)


def test_a_table_is_read_at_its_border_and_beyond_by_its_last_entry():
    table = np.array([3, 5, 8], np.int32)
    assert budget.lookup(table, np.array([0, 2, 3, 99], np.int32)).tolist() == [3, 8, 8, 8]


def test_the_first_dense_layers_are_dense_and_the_rest_are_not():
    swa = Swa(kv_sparsity=0.8, dense_layers=2)
    assert [type(swa.for_layer(i)).__name__ for i in range(4)] == ["Dense", "Dense", "Swa", "Swa"]
    assert swa.for_layer(2) == swa
