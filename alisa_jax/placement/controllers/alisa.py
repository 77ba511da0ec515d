"""`alisa(...)`: three-phase token-level scheduling (ALISA, section IV and Algorithm 2).

    Phase I     j < p1           everything on the device
    Phase II    p1 <= j < p2     the newest tokens on the device, the older ones on the host
    Phase III   p2 <= j          the oldest tokens deleted, and recomputed from their ids if wanted

    alpha    share of the tokens that is off the device from p1 on. auto: as little as the device
             budget allows, so that as many of the most recent tokens as possible stay.
    beta     share of the tokens that is deleted from p2 on. auto: the least for the host budget.
    p1, p2   output steps. auto: the first step at which the device, or the host, cannot hold what
             it would have to.
    traffic  delta: rows that newly enter the selection travel, once. paper: every selected row
             that is off the device travels at every step, as in Equation 4 (at most
             round(r (s + j)) rows).
    lag      1: choices are a step old, and loads hide behind the step.

Where the query itself chooses its tokens (`Setting.chosen`), they are fetched within the step: the
two kinds of traffic are one, lag is 0 and nothing is deleted.

ALISA: ISCA 2024, arXiv 2403.17312. Shares are of the tokens of each sequence, in whole pages. Only
prompt tokens are deleted, because a prefill gives exactly what the first prefill gave for them
alone: a plan that would delete generated tokens is clamped, and its notes say so.

A run whose tokens all fit keeps them, unless p1 says otherwise. Any other run reserves its staging
from the first step on, because tokens cannot leave through room that is not there; what is left is
as many pages for each layer and sequence. Without p1, a sequence leaves Phase I when it has more
pages than these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alisa_jax.placement.moves import (
    device_bytes,
    fetch,
    full_pages,
    host_bytes,
    moves_between,
    refuse_device,
    refuse_host,
    refuse_store,
)
from alisa_jax.placement.plan import (
    PAGE_TOKENS,
    Controller,
    Layout,
    Plan,
    Setting,
    Span,
    View,
    pages,
)

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
            raise ValueError(
                f"p2={self.p2} and beta={self.beta} plan deletions, and recompute=false allows none"
            )

    def check(self, setting):
        refuse_store("alisa", setting)
        if self.recompute and setting.refreshes:
            raise ValueError(
                "a policy that refreshes attends every token, so deleted ones would all be "
                "recomputed: give recompute=false, or refresh_every=0"
            )
        if setting.chosen and self.lag:
            raise ValueError(
                "a query that chooses its tokens has them fetched within its own step, so no "
                "choice is a step old: give lag=0"
            )
        if setting.chosen and (self.p2 != "auto" or self.beta != "auto"):
            raise ValueError(
                f"p2={self.p2} and beta={self.beta} plan deletions, and a deleted token would be "
                "recomputed through all layers for every layer whose query chooses it: leave both "
                "at auto"
            )
        least = least_device_bytes(setting)
        everything = device_bytes(setting, Layout(setting.batch, 0), 0)
        early = self.p1 != "auto" and self.p1 < setting.new_tokens
        refuse_device("alisa", setting, least if early else min(least, everything))
        if self.p1 != "auto" and self._leaves(setting) and self.p1 > (first := _phase_one(setting)):
            instead = (
                f", or {setting.new_tokens}: everything fits"
                if everything <= setting.device_kv_bytes
                else ""
            )
            raise ValueError(
                f"p1 must be at most {first} here, the first step after which a sequence has more "
                f"than the {PAGE_TOKENS * _pages_kept(setting)} tokens that the device budget "
                f"leaves it room for{instead}; got {self.p1}"
            )
        if self.alpha != "auto":
            least = self._least_alpha(setting)
            if self.alpha < least:
                raise ValueError(
                    f"alpha must be at least {math.ceil(least * 1e6) / 1e6} here, so that the "
                    f"rest fits the device budget; got {self.alpha}"
                )
        name = "alisa, which deletes prompt tokens at most," if self._deletes(setting) else "alisa"
        need = setting.host_kv_bytes
        while (more := self._host_need(dataclasses.replace(setting, host_kv_bytes=need))) > need:
            # with a larger budget each sequence may keep more, and need more
            need = math.ceil(more)
        refuse_host(name, setting, need)

    @property
    def reads_wanted(self):
        return self.traffic == "paper"

    def layout(self, setting):
        return (
            Layout(0, _pages_kept(setting)) if self._leaves(setting) else Layout(setting.batch, 0)
        )

    def spans(self, view):
        return self._spans(view.setting, view.step, view.after, view.spans)

    def decide(self, view):
        spans = self.spans(view)
        store, drop = moves_between(view, spans)
        load, again = ((), ()) if view.step == 0 else fetch(view, spans, self._to_fetch(view))
        notes = (_CLAMPED.format(view.step),) if self._clamped(view) else ()
        return Plan(store, drop, load, again, ahead=view.setting.ahead, lag=self.lag, notes=notes)

    def _to_fetch(self, view: View):
        return view.wanted if view.wanted is None or self.traffic == "paper" else view.entering

    def _deletes(self, setting: Setting) -> bool:
        """Phase III may begin; where the query chooses, the host keeps all that leaves."""
        return self.recompute and not setting.chosen

    def _leaves(self, setting: Setting) -> bool:
        """Some token may leave the device: not all fit, or p1 is a step of the run."""
        if self.p1 != "auto" and self.p1 < setting.new_tokens:
            return True
        return device_bytes(setting, Layout(setting.batch, 0), 0) > setting.device_kv_bytes

    def _spans(
        self, setting: Setting, step: int, after: Sequence[int], old: Sequence[Span]
    ) -> tuple[Span, ...]:
        """Phases II and III: how far each sequence is off the device, and deleted."""
        if not self._leaves(setting):
            return tuple(old)
        keep, share = _pages_kept(setting), 0.0 if self.alpha == "auto" else self.alpha
        begun = self.p1 != "auto" and step >= self.p1
        given = list(zip(setting.prompt_tokens, after, old))
        prompts, lengths, spans = zip(*dict.fromkeys(given))  # most sequences are alike
        away = [
            max(have.host, PAGE_TOKENS * max(0, pages(n) - keep), full_pages(int(share * n)))
            if begun or pages(n) > keep
            else have.host
            for n, have in zip(lengths, spans)
        ]
        lost = self._lost(setting, step, lengths, away)
        made = {
            (s, n, have): Span(max(have.dropped, min(gone, full_pages(s), host)), host)
            for gone, host, s, n, have in zip(lost, away, prompts, lengths, spans)
        }
        return tuple(made[one] for one in given)

    def _lost(
        self, setting: Setting, step: int, after: Sequence[int], away: Sequence[int]
    ) -> list[int]:
        """Tokens to delete of each sequence, before the clamp to the prompt."""
        none = [0] * len(away)
        if not self._deletes(setting) or (self.p2 != "auto" and step < self.p2):
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
        setting, away = view.setting, [span.host for span in self.spans(view)]
        lost = self._lost(setting, view.step, view.after, away)
        return any(
            min(more, host) > full_pages(s)
            for more, host, s in zip(lost, away, setting.prompt_tokens)
        )

    def _least_alpha(self, setting: Setting) -> float:
        """The least alpha under which no sequence exceeds the device budget at any step."""
        if not self._leaves(setting):
            return 0.0
        keep = _pages_kept(setting)
        totals = {
            s + step for s in set(setting.prompt_tokens) for step in range(setting.new_tokens)
        }
        return max(PAGE_TOKENS * max(0, pages(n) - keep) / n for n in totals)

    def _host_need(self, setting: Setting) -> float:
        """The most bytes that the host holds at any step."""
        spans, need = (Span(),) * setting.batch, 0.0
        for step in self._steps_that_matter(setting):
            spans = self._spans(
                setting, step, tuple(s + step for s in setting.prompt_tokens), spans
            )
            need = max(need, host_bytes(setting, spans))
        return need

    def _steps_that_matter(self, setting: Setting) -> tuple[int, ...]:
        """Steps at which the host may hold most: the last, and from the one before p2 on."""
        last = setting.new_tokens - 1
        if self.p2 == "auto":
            return (last,)
        first = min(max(self.p2 - 1, 0), last)
        return (first, last) if self.beta == "auto" else tuple(range(first, last + 1))


_CLAMPED = "step {}: the plan would delete generated tokens; it is clamped to the prompt"


def least_device_bytes(setting: Setting) -> float:
    """The least device budget for offloading: a page per layer and sequence, and what is fixed."""
    return device_bytes(setting, Layout(0, 1), setting.ahead)


def _pages_kept(setting: Setting) -> int:
    """Pages per layer and sequence that stay on the device in a run that offloads."""
    room = setting.device_kv_bytes - device_bytes(setting, Layout(0, 0), setting.ahead)
    most = room / (setting.layers * setting.page_bytes * setting.batch)
    return max(1, int(min(most, pages(max(setting.final_tokens)))))


def _phase_one(setting: Setting) -> int:
    """The first step after which a sequence has more pages than are kept, else new_tokens."""
    return min(
        setting.new_tokens,
        max(0, PAGE_TOKENS * _pages_kept(setting) + 1 - max(setting.prompt_tokens)),
    )
