"""`alisa(...)`: three-phase token-level scheduling, section IV of ALISA (ISCA 2024, arXiv 2403.17312, its Algorithm 2).

    Phase I     j < p1           everything on the device
    Phase II    p1 <= j < p2     the newest tokens on the device, the older ones on the host
    Phase III   p2 <= j          the oldest tokens deleted, and recomputed from their ids when they are wanted

    alpha    share of the tokens that is off the device from p1 on. auto: as little as the device budget allows, so that
             as many of the most recent tokens as possible stay.
    beta     share of the tokens that is deleted from p2 on. auto: as little as the host budget allows.
    p1, p2   output steps. auto: the first step at which the device, or the host, cannot hold what it would have to.
    traffic  delta: rows that newly enter the selection travel, once. paper: every selected row that is off the device
             travels at every step, as in Equation 4 (at most round(r (s + j)) rows).
    lag      1: choices are a step old, and loads hide behind the step.

Shares are of the tokens of each sequence, in whole pages. Only prompt tokens are deleted, because a prefill gives exactly
what the first prefill gave for them alone: a plan that would delete generated tokens is clamped, and its notes say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alisa_jax.placement.moves import (
    device_bytes,
    fetch,
    full_pages,
    host_bytes,
    largest,
    refuse_device,
    refuse_host,
    refuse_store,
    settle,
)
from alisa_jax.placement.plan import PAGE_TOKENS, Controller, Plan, Setting, Span, View, pages

Auto = Literal["auto"]


@dataclass(frozen=True)
class Alisa(Controller):
    """The phases above."""

    alpha: float | Auto = "auto"
    beta: float | Auto = "auto"
    p1: int | Auto = "auto"
    p2: int | Auto = "auto"
    traffic: Literal["delta", "paper"] = "delta"
    recompute: bool = True
    lag: int = 0

    def __post_init__(self):
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value != "auto" and not 0.0 < value < 1.0:
                raise ValueError(f"{name} must be auto or above 0 and below 1; got {value}")
        for name in ("p1", "p2"):
            value = getattr(self, name)
            if value != "auto" and value < 0:
                raise ValueError(f"{name} must be auto or a step of at least 0; got {value}")
        if "auto" not in (self.p1, self.p2) and self.p1 > self.p2:
            raise ValueError(f"p1 must be at most p2; got p1={self.p1} and p2={self.p2}")
        if self.traffic not in ("delta", "paper"):
            raise ValueError(f"traffic must be delta or paper; got {self.traffic!r}")
        if self.lag not in (0, 1):
            raise ValueError(f"lag must be 0 or 1; got {self.lag}")
        if not self.recompute and (self.p2 != "auto" or self.beta != "auto"):
            raise ValueError(f"p2={self.p2} and beta={self.beta} plan deletions, and recompute=false allows none")

    def check(self, setting):
        refuse_store("alisa", setting)
        if self.recompute and setting.refreshes:
            raise ValueError(
                "a policy that refreshes attends every token, so deleted ones would all be recomputed: "
                "give recompute=false, or refresh_every=0"
            )
        phase_one = _phase_one(setting)
        if (phase_one if self.p1 == "auto" else min(self.p1, phase_one)) < setting.new_tokens:
            refuse_device("alisa", setting, least_device_bytes(setting))
        if self.p1 != "auto" and self.p1 > phase_one:
            raise ValueError(
                f"p1 must be at most {phase_one} here, the first step at which the device budget does not hold "
                f"everything; got {self.p1}"
            )
        if self.alpha != "auto":
            least = self._least_alpha(setting)
            if self.alpha < least:
                raise ValueError(
                    f"alpha must be at least {math.ceil(least * 1000) / 1000} here, so that the rest fits the device "
                    f"budget; got {self.alpha}"
                )
        spans, need = (Span(),) * setting.batch, 0.0
        for step in self._steps_that_matter(setting):
            spans = self._spans(setting, step, _after(setting, step), spans)
            need = max(need, host_bytes(setting, spans))
        refuse_host("alisa, which deletes prompt tokens at most," if self.recompute else "alisa", setting, need)

    def spans(self, view):
        return self._spans(view.setting, view.step, view.after, view.spans)

    def decide(self, view):
        spans = self.spans(view)
        store, drop = settle(view, spans)
        load, again = ((), ()) if view.step == 0 else fetch(view, spans, self._to_fetch(view))
        notes = (_CLAMPED.format(view.step),) if self._clamped(view) else ()
        ahead = 0 if view.setting.selects else 1
        return Plan(store, drop, load, again, ahead=ahead, lag=self.lag, notes=notes)

    def _to_fetch(self, view: View):
        return view.wanted if view.wanted is None or self.traffic == "paper" else view.entering

    def _spans(self, setting: Setting, step: int, after: Sequence[int], old: Sequence[Span]) -> tuple[Span, ...]:
        """Phases II and III: how far each sequence is off the device, and deleted."""
        if not self._offloading(setting, step, after):
            return tuple(old)
        keep, share = _pages_kept(setting), 0.0 if self.alpha == "auto" else self.alpha
        away = [
            max(have.host, PAGE_TOKENS * max(0, pages(n) - keep), full_pages(int(share * n)))
            for n, have in zip(after, old)
        ]
        lost = self._lost(setting, step, after, away)
        return tuple(
            Span(max(have.dropped, min(gone, full_pages(s), host)), host)
            for gone, host, s, have in zip(lost, away, setting.prompt_tokens, old)
        )

    def _offloading(self, setting: Setting, step: int, after: Sequence[int]) -> bool:
        if self.p1 != "auto" and step >= self.p1:
            return True
        return setting.fixed_bytes + setting.store_bytes(after) > setting.device_kv_bytes

    def _lost(self, setting: Setting, step: int, after: Sequence[int], away: Sequence[int]) -> list[int]:
        """Tokens to delete of each sequence, before the clamp to the prompt."""
        none = [0] * len(away)
        if not self.recompute or (self.p2 != "auto" and step < self.p2):
            return none
        over = none
        if self.p2 == "auto" or self.beta == "auto":
            room = setting.host_kv_bytes / (setting.layers * setting.page_bytes * setting.batch)
            keep = PAGE_TOKENS * int(min(room, 1e12))
            over = [max(0, host - keep) for host in away]
        if self.p2 == "auto" and not any(over):
            return none
        share = 0.0 if self.beta == "auto" else self.beta
        return [max(more, full_pages(int(share * n))) for more, n in zip(over, after)]

    def _clamped(self, view: View) -> bool:
        setting, spans = view.setting, self.spans(view)
        if not self._offloading(setting, view.step, view.after):
            return False
        lost = self._lost(setting, view.step, view.after, [span.host for span in spans])
        return any(more > full_pages(s) for more, s in zip(lost, setting.prompt_tokens))

    def _least_alpha(self, setting: Setting) -> float:
        """The smallest share that leaves the device no more than its budget at every step from p1 on."""
        first = _phase_one(setting) if self.p1 == "auto" else self.p1
        keep, longest = _pages_kept(setting), max(setting.prompt_tokens)
        totals = (longest + step for step in range(first, setting.new_tokens))
        return max((PAGE_TOKENS * max(0, pages(n) - keep) / n for n in totals), default=0.0)

    def _steps_that_matter(self, setting: Setting) -> tuple[int, ...]:
        """Steps at which the host may hold most: the last, and from the last before deletions begin."""
        last = setting.new_tokens - 1
        if self.p2 == "auto":
            return (last,)
        first = min(max(self.p2 - 1, 0), last)
        return (first, last) if self.beta == "auto" else tuple(range(first, last + 1))


_CLAMPED = "step {}: the plan would delete generated tokens; it is clamped to the prompt"


def least_device_bytes(setting: Setting) -> float:
    """The smallest device budget under which `alisa` can offload: one page per layer and sequence beside what is fixed."""
    tails = setting.layers * setting.page_bytes * setting.batch
    return setting.fixed_bytes + tails + setting.staging_bytes(_ahead(setting))


def _ahead(setting: Setting) -> int:
    return 0 if setting.selects else 1


def _pages_kept(setting: Setting) -> int:
    """Pages per layer and sequence that stay on the device while the others are on the host."""
    room = setting.device_kv_bytes - setting.fixed_bytes - setting.staging_bytes(_ahead(setting))
    return max(1, int(min(room / (setting.layers * setting.page_bytes * setting.batch), 1e12)))


def _after(setting: Setting, step: int) -> tuple[int, ...]:
    return tuple(s + step for s in setting.prompt_tokens)


def _phase_one(setting: Setting) -> int:
    """The first step after which the device cannot hold everything; new_tokens where it always can."""
    spans = (Span(),) * setting.batch
    fits = lambda steps: (
        steps == 0 or (device_bytes(setting, spans, _after(setting, steps - 1)) <= setting.device_kv_bytes)
    )
    return largest(fits, setting.new_tokens)
