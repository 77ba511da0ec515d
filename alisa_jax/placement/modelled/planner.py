"""Before the run: the p1, p2, alpha and beta that minimise the modelled time.

A `Problem` is the optimisation of ALISA (section IV-B, Equations 3 to 6) in numbers, at the
granularity of tokens. At step j there are t = s + j tokens, of which alpha t are off the device
from p1 on, and the first beta t of these are deleted from p2 on (never more than the prompt). A
query wants k = r t / 2 recent tokens and k others, spread evenly over the older ones. The time is

    sum_j T^c_j + sum_{p1 <= j} (stored tokens / to host + fetched tokens / to device)
                + sum_{p2 <= j} T^r_j

and the budgets are constraints: where no point of the grid meets them, the one that misses by the
least is given, and `excess_tokens` says by how much.

`search` is greedy, as in the paper: one parameter after another, each over its whole grid with the
others held, until none improves. The order is p1 (p2 giving way), p1, p2, both steps together,
alpha, beta, both shares together. It starts at steps (0, 1) with low, middle and high shares, and
at (n, n); where that meets no budget, from the shares that miss by the least when everything begins
at once. `exhaustive` tries the whole grid. Both break ties towards large p1 and p2 and small alpha
and beta: to keep everything where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from alisa_jax.placement.modelled.cost import Cost
from alisa_jax.placement.plan import PAGE_TOKENS, Setting


class Phases(NamedTuple):
    """A point of the search: steps, shares and modelled seconds.

    excess_tokens: tokens by which budgets are exceeded; 0: it fits.
    """

    p1: int
    p2: int
    alpha: float
    beta: float
    seconds: float
    excess_tokens: float


@dataclass(frozen=True)
class Problem:
    """The optimisation of one run, in numbers.

    prompt_tokens: s. new_tokens: n. r: the kept fraction. device_tokens, host_tokens: budgets in
    tokens per sequence, beside what is fixed. compute_s(t): seconds of a step with t tokens.
    recompute_s(m): of recomputing the first m tokens of all sequences. load_token_s, store_token_s:
    seconds of one token of all layers and sequences on the link. traffic: "delta" fetches
    `entering` tokens a step, "paper" all that are wanted and off the device. rebuild: "prefix"
    recomputes the whole deleted prefix when one of its tokens is wanted (exact), "wanted" prices
    the wanted tokens alone (what the paper's times suggest). layers: a prefix is needed when any of
    them wants it. staging_tokens: what of the device budget is reserved for rows on their way, from
    the first step on, wherever p1 < n. page_tokens: budgets hold whole pages, and what leaves the
    device are full ones.
    """

    prompt_tokens: int
    new_tokens: int
    r: float
    device_tokens: float
    host_tokens: float
    compute_s: Callable[[int], float]
    recompute_s: Callable[[float], float]
    load_token_s: float
    store_token_s: float
    traffic: Literal["delta", "paper"] = "delta"
    rebuild: Literal["prefix", "wanted"] = "prefix"
    entering: float = 0.2
    layers: int = 1
    staging_tokens: float = 0.0
    page_tokens: int = 1
    share_step: float = 0.01

    @property
    def shares(self) -> np.ndarray:
        """The grid of alpha and beta: share_step, 2 share_step, ... below 1."""
        return np.arange(1, round(1 / self.share_step)) * self.share_step


def problem(
    setting: Setting,
    cost: Cost,
    kv_sparsity: float,
    traffic: str = "delta",
    entering: float = 0.2,
    **more,
) -> Problem:
    """The search of a run, priced by `cost`; every sequence has the longest prompt of `setting`."""
    prompt = max(setting.prompt_tokens)
    batch = setting.batch
    r = 1.0 - kv_sparsity
    position_bytes = setting.layers * setting.token_bytes * batch
    staging = setting.staging_bytes(setting.ahead)
    extra = setting.layers * cost.selection_s * setting.selects
    gathered = setting.gather and setting.selects
    return Problem(
        prompt_tokens=prompt,
        new_tokens=setting.new_tokens,
        r=r,
        device_tokens=(setting.device_kv_bytes - setting.fixed_bytes) / position_bytes,
        host_tokens=setting.host_kv_bytes / position_bytes,
        compute_s=lambda tokens: extra + cost.decode_s(batch, batch * (int(r * tokens + 0.5) + 1)),
        recompute_s=lambda tokens: cost.prefill_s((tokens,), times=batch),
        load_token_s=cost.load_s(position_bytes, gathered),
        store_token_s=cost.store_s(position_bytes),
        traffic=traffic,
        entering=entering,
        layers=setting.layers,
        staging_tokens=staging / position_bytes,
        page_tokens=PAGE_TOKENS,
        **more,
    )


class _Tables:
    """Seconds and excess tokens of each step in phases I, II and III, and their running sums."""

    def __init__(self, problem: Problem):
        self.problem = problem
        n, s = problem.new_tokens, problem.prompt_tokens
        self.total = s + np.arange(n, dtype=float)  # tokens after step j
        kept = np.floor(problem.r * self.total + 0.5)
        self.older = np.maximum(self.total - np.floor(kept / 2 + 0.5), 1.0)
        self.dynamic = np.maximum(kept - np.floor(kept / 2 + 0.5), 0.0)
        self.held = np.ceil(self.total / problem.page_tokens) * problem.page_tokens
        self.compute = np.array([problem.compute_s(int(t)) for t in self.total])
        self.memo: dict = {}
        self.prefills: dict[float, float] = {}

    def one(self, staging: float) -> tuple[np.ndarray, np.ndarray]:
        """Phase I, nothing moves: (seconds, excess) of each step; `staging` tokens are reserved."""
        return self.compute, self._over(0.0, staging)

    def two(self, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """Phase II."""
        away = self._pages(alpha * self.total)
        over = self._over(away, self.problem.staging_tokens) + np.maximum(
            away - self.problem.host_tokens, 0.0
        )
        load = self._fetched(away) * self.problem.load_token_s
        return self.compute + self._moved(alpha) + load, over

    def three(self, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Phase III."""
        problem, away = self.problem, self._pages(alpha * self.total)
        lost = self._pages(np.minimum(np.minimum(beta * self.total, problem.prompt_tokens), away))
        over = self._over(away, problem.staging_tokens) + np.maximum(
            away - lost - problem.host_tokens, 0.0
        )
        again = lambda tokens: np.array([self._recompute_s(float(m)) for m in tokens])
        load = (self._fetched(away) - self._fetched(lost)) * problem.load_token_s
        if problem.rebuild == "wanted":
            rebuilt = again(self._fetched(lost))
        else:
            share = 1.0
            if problem.traffic == "delta":
                share = 1.0 - (1.0 - np.minimum(self._fetched(lost), 1.0)) ** problem.layers
            rebuilt = share * again(lost)
        return self.compute + self._moved(alpha) + load + rebuilt, over

    def _recompute_s(self, tokens: float) -> float:
        if tokens not in self.prefills:
            self.prefills[tokens] = self.problem.recompute_s(tokens)
        return self.prefills[tokens]

    def _pages(self, tokens: np.ndarray) -> np.ndarray:
        return np.floor(tokens.astype(int) / self.problem.page_tokens) * self.problem.page_tokens

    def _over(self, away: np.ndarray | float, staging: float) -> np.ndarray:
        return np.maximum(self.held - away - (self.problem.device_tokens - staging), 0.0)

    def _moved(self, alpha: float) -> np.ndarray:
        """Seconds of what a step adds to the host; the bulk move at p1 is priced by `seconds`."""
        return np.full_like(self.total, alpha * self.problem.store_token_s)

    def _fetched(self, below: np.ndarray) -> np.ndarray:
        """Tokens that a step fetches from among the first `below` ones."""
        reach = np.minimum(below, self.older) / self.older
        if self.problem.traffic == "delta":
            return self.problem.entering * reach
        return self.dynamic * reach + np.maximum(below - self.older, 0.0)

    def sums(self, alpha: float, beta: float | None) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, excess) of phase II (beta None) or III, [n + 1].

        Entry i sums the steps before step i.
        """
        key = (alpha, beta)
        if key not in self.memo:
            seconds, over = self.two(alpha) if beta is None else self.three(alpha, beta)
            self.memo[key] = _cumulative(seconds), _cumulative(over)
        return self.memo[key]

    def grid(self, p1, p2, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """(excess, seconds) at steps `p1` and `p2`, which broadcast.

        The excess is infinite where Equation 6 excludes the steps.
        """
        n = self.problem.new_tokens
        one = self._phase_one()
        two = self.sums(alpha, None)
        three = self.sums(alpha, beta)
        joined = lambda one, two, three: one[p1] + two[p2] - two[p1] + three[n] - three[p2]
        time = joined(one[0], two[0], three[0])
        over = joined(one[1], two[1], three[1])
        bulk = np.where(
            p1 < n,
            alpha * (self.total[np.minimum(p1, n - 1)] - 1.0) * self.problem.store_token_s,
            0.0,
        )
        return np.where((p1 < p2) | (np.minimum(p1, p2) == n), over, np.inf), time + bulk

    def _phase_one(self) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, excess) of phase I, [n + 1].

        Entry i sums the steps before p1 = i; nothing is staged where p1 = n.
        """
        if "one" not in self.memo:
            seconds, over = self.one(self.problem.staging_tokens)
            seconds = _cumulative(seconds)
            over = _cumulative(over)
            over[-1] = self.one(0.0)[1].sum()
            self.memo["one"] = seconds, over
        return self.memo["one"]

    def point(self, p1: int, p2: int, alpha: float, beta: float) -> Phases:
        key = (int(p1), int(p2), float(alpha), float(beta))
        if key not in self.memo:
            over, seconds = self.grid(*key)
            self.memo[key] = Phases(*key, float(seconds), float(over))
        return self.memo[key]


def search(problem: Problem) -> Phases:
    """The greedy search."""
    tables = _Tables(problem)
    n = problem.new_tokens
    shares = problem.shares.tolist()
    few = (shares[0], shares[len(shares) // 2], shares[-1])
    starts = [(0, 1, alpha, beta) for alpha in few for beta in few] + [(n, n, few[1], few[0])]
    found = min((_descend(tables, *start) for start in starts), key=_rank)
    if found.excess_tokens:
        some = shares[:: max(1, len(shares) // 20)]
        least = min((tables.point(0, 1, alpha, beta) for alpha in some for beta in some), key=_rank)
        found = min(found, _descend(tables, *least[:4]), key=_rank)
    return found


def exhaustive(problem: Problem) -> Phases:
    """The best point of the whole grid: every p1 < p2 <= n and every pair of shares.

    p1 = p2 = n is a point as well: all stays.
    """
    tables = _Tables(problem)
    steps = np.arange(problem.new_tokens + 1)
    best = None
    for alpha in problem.shares:
        for beta in problem.shares:
            over, seconds = tables.grid(steps[:, None], steps[None, :], alpha, beta)
            least = over <= over.min() + 1e-9
            at = np.unravel_index(np.argmin(np.where(least, seconds, np.inf)), over.shape)
            here = tables.point(*at, alpha, beta)
            best = here if best is None or _rank(here) < _rank(best) else best
    return best


def seconds(problem: Problem, p1: int, p2: int, alpha: float, beta: float) -> Phases:
    """The modelled time of given phases."""
    return _Tables(problem).point(p1, p2, alpha, beta)


def _descend(tables: _Tables, p1: int, p2: int, alpha: float, beta: float) -> Phases:
    """From a start, line after line until none improves."""
    n, shares = tables.problem.new_tokens, tables.problem.shares.tolist()
    steps = np.arange(n + 1)
    best = tables.point(p1, p2, alpha, beta)
    while True:
        before = best
        best = _along(tables, best, steps, np.minimum(np.maximum(steps + 1, best.p2), n))
        best = _along(tables, best, steps, np.full(n + 1, best.p2))
        best = _along(tables, best, np.full(n + 1, best.p1), steps)
        best = _along(tables, best, steps, np.minimum(steps + best.p2 - best.p1, n))
        best = min((best, *(tables.point(*best[:2], a, best.beta) for a in shares)), key=_rank)
        best = min((best, *(tables.point(*best[:3], b) for b in shares)), key=_rank)
        apart = shares.index(best.beta) - shares.index(best.alpha)
        pairs = (
            (a, shares[i + apart]) for i, a in enumerate(shares) if 0 <= i + apart < len(shares)
        )
        best = min((best, *(tables.point(*best[:2], *pair) for pair in pairs)), key=_rank)
        if _rank(best) >= _rank(before):
            return best


def _along(tables: _Tables, best: Phases, p1: np.ndarray, p2: np.ndarray) -> Phases:
    """The best of the points (p1[i], p2[i]) with the shares of `best`, and `best` itself."""
    over, seconds = tables.grid(p1, p2, best.alpha, best.beta)
    order = np.lexsort((-p2, -p1, np.round(seconds, 12), np.round(over, 6)))[0]
    here = Phases(
        int(p1[order]),
        int(p2[order]),
        best.alpha,
        best.beta,
        float(seconds[order]),
        float(over[order]),
    )
    return min(best, here, key=_rank)


def _rank(point: Phases) -> tuple:
    return (
        round(point.excess_tokens, 6),
        round(point.seconds, 12),
        -point.p1,
        -point.p2,
        point.alpha,
        point.beta,
    )


def _cumulative(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])
