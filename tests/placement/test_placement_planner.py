"""The search for phases: greedy against exhaustive, and the planner against the controllers and a plain loop."""

import dataclasses
import math

import numpy as np
import pytest

from alisa_jax import placement
from alisa_jax.placement.modelled import planner
from alisa_jax.placement.modelled.cost import Cost, Hardware, Shape
from alisa_jax.placement.modelled.simulate import simulate, swa_trace
from alisa_jax.placement.plan import Setting

pytestmark = pytest.mark.slow


def random_problem(rng) -> planner.Problem:
    s, n = int(rng.integers(4, 60)), int(rng.integers(4, 32))
    base, slope = rng.uniform(0.1, 2, 2)
    load, again, fixed = 10 ** rng.uniform(-2, 0.5), 10 ** rng.uniform(-2.5, 0.5), rng.uniform(0, 1)
    return planner.Problem(
        prompt_tokens=s,
        new_tokens=n,
        r=float(rng.uniform(0.1, 1)),
        device_tokens=float(rng.uniform(0.2, 1.1) * (s + n)),
        host_tokens=float(rng.uniform(0.05, 1.1) * (s + n)),
        compute_s=lambda t: base + slope * t / 100,
        recompute_s=lambda m: again * (fixed + m + m * m / 500) * (m > 0),
        load_token_s=load,
        store_token_s=load * rng.uniform(0.3, 1),
        traffic=str(rng.choice(["delta", "paper"])),
        rebuild=str(rng.choice(["prefix", "wanted"])),
        entering=0.3,
        layers=int(rng.integers(1, 48)),
        staging_tokens=float(rng.uniform(0, 4)),
        page_tokens=int(rng.choice([1, 4])),
        share_step=0.125,
    )


def test_greedy_is_within_two_percent_of_exhaustive_on_200_settings():
    rng = np.random.default_rng(20240327)
    interior = 0
    for _ in range(200):
        problem = random_problem(rng)
        greedy, best = planner.search(problem), planner.exhaustive(problem)
        if best.excess_tokens:
            assert greedy.excess_tokens > 0
            continue
        assert greedy.excess_tokens == 0 and best.seconds <= greedy.seconds * (1 + 1e-12)
        assert greedy.seconds <= 1.02 * best.seconds, (problem, greedy, best)
        interior += best.p1 < best.p2 < problem.new_tokens
    assert interior >= 20  # settings whose best plan has all three phases


def _loop(problem, p1, p2, alpha, beta):
    """The modelled seconds and the excess, step by step in plain Python."""
    seconds = excess = 0.0
    page = problem.page_tokens
    for j in range(problem.new_tokens):
        t = problem.prompt_tokens + j
        held = math.ceil(t / page) * page
        kept = math.floor(problem.r * t + 0.5)
        local = math.floor(kept / 2 + 0.5)
        away = math.floor(int(alpha * t) / page) * page if j >= p1 else 0
        lost = math.floor(int(min(beta * t, problem.prompt_tokens, away)) / page) * page if j >= p2 else 0
        seconds += problem.compute_s(t)
        room = problem.device_tokens - (problem.staging_tokens if p1 < problem.new_tokens else 0.0)
        excess += max(0.0, held - away - room) + max(0.0, away - lost - problem.host_tokens)
        if j < p1:
            continue
        seconds += alpha * problem.store_token_s * ((t - 1) * (j == p1) + 1)

        def fetched(below, t=t, kept=kept, local=local):
            older = t - local
            if problem.traffic == "delta":
                return problem.entering * min(below, older) / older
            return (kept - local) * min(below, older) / older + max(0, below - older)

        seconds += (fetched(away) - fetched(lost)) * problem.load_token_s
        if j >= p2 and problem.rebuild == "wanted":
            seconds += problem.recompute_s(fetched(lost))
        elif j >= p2:
            needed = 1 - (1 - min(1.0, fetched(lost))) ** problem.layers if problem.traffic == "delta" else 1.0
            seconds += needed * problem.recompute_s(lost)
    return seconds, excess


def test_the_tables_agree_with_a_plain_loop():
    rng = np.random.default_rng(5)
    for _ in range(60):
        problem = random_problem(rng)
        p1 = int(rng.integers(0, problem.new_tokens + 1))
        p2 = int(rng.integers(min(p1 + 1, problem.new_tokens), problem.new_tokens + 1))
        alpha, beta = rng.uniform(0.05, 0.95, 2)
        found = planner.seconds(problem, p1, p2, alpha, beta)
        assert (found.seconds, found.excess_tokens) == pytest.approx(_loop(problem, p1, p2, alpha, beta), abs=1e-6)


def test_p1_equal_to_p2_is_no_plan_unless_all_stays():
    problem = random_problem(np.random.default_rng(1))
    n = problem.new_tokens
    assert planner.seconds(problem, 2, 2, 0.5, 0.5).excess_tokens == math.inf
    assert planner.seconds(problem, n, n, 0.5, 0.5).excess_tokens < math.inf


def test_everything_stays_where_it_fits():
    problem = dataclasses.replace(random_problem(np.random.default_rng(2)), device_tokens=1e6, recompute_s=lambda m: m)
    assert planner.search(problem)[:2] == (problem.new_tokens, problem.new_tokens)


def test_recomputing_starts_earlier_the_slower_the_link_and_the_more_is_kept():
    base = dataclasses.replace(
        random_problem(np.random.default_rng(3)),
        prompt_tokens=40,
        new_tokens=80,
        device_tokens=60.0,
        host_tokens=1e6,
        traffic="paper",
        rebuild="wanted",
        page_tokens=1,
        staging_tokens=0.0,
        recompute_s=lambda m: 0.05 * m + 1.0 * (m > 0),
    )
    p2 = lambda **more: planner.search(dataclasses.replace(base, **more)).p2
    by_link = [p2(r=0.4, load_token_s=seconds) for seconds in (0.01, 0.2, 0.4, 5.0)]
    assert by_link == sorted(by_link, reverse=True) and by_link[0] == 80 > by_link[-1]
    by_sparsity = [p2(r=r, load_token_s=0.2) for r in (0.8, 0.6, 0.4, 0.2)]
    assert by_sparsity == sorted(by_sparsity) and by_sparsity[0] < by_sparsity[-1]
    assert len({planner.search(dataclasses.replace(base, r=r, load_token_s=0.2)).p1 for r in (0.8, 0.6, 0.4, 0.2)}) == 1


def test_searched_phases_are_accepted_by_the_controller_and_cost_what_was_searched():
    hardware = Hardware("toy", 1e9, 1e9, 1e12, 1e11, 1e9, 1e9)
    cost = Cost(hardware, Shape(1e6, 2e6, 1e3, 4, 8, 32, 11, kv_token_bytes=64.0))
    base = Setting(4, (64,) * 3, 97, 64.0, device_kv_bytes=1.0, slots=42, selects=True, gather=False)
    rng = np.random.default_rng(4)
    compared = 0
    for _ in range(12):
        total = base.fixed_bytes + base.store_bytes(base.final_tokens)
        run = dataclasses.replace(
            base, device_kv_bytes=total * rng.uniform(0.5, 0.9), host_kv_bytes=total * rng.uniform(0.1, 1)
        )
        found = planner.search(planner.problem(run, cost, 0.75, "paper", share_step=0.04))
        if found.excess_tokens or found.p1 >= 97:
            continue
        ours = dict(alpha=found.alpha, p1=found.p1, traffic="paper")
        ours |= dict(beta=found.beta, p2=found.p2) if found.p2 < 97 else dict(recompute=False)
        trace = swa_trace(lambda n: round(n / 8), lambda n: round(n / 8))
        priced = simulate(placement.Alisa(**ours), run, cost, trace, strict=1)
        assert abs(priced.p1 - found.p1) <= 16 and (found.p2 == 97 or priced.p2 >= found.p2)
        compared += 1
    assert compared >= 4
