"""`flexgen(cache_device_frac=)`: a static split by whole sequences, the next layer in flight.

FlexGen (Sheng et al., ICML 2023, arXiv 2303.06865) fixes before the run which share of the cache is
on the device; its code rounds the share to whole sequences. The others' cache is copied to the
device at every step, layer by layer, while the layer before computes. Attention on the CPU, disks
and weights on the host are left to `flexgen_cost`.
"""

from __future__ import annotations

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
from alisa_jax.placement.plan import Controller, Layout, Plan, Span


@dataclass(frozen=True)
class FlexGen(Controller):
    """cache_device_frac: share of the sequences on the device, rounded down; auto: all that fit."""

    cache_device_frac: float | Literal["auto"] = "auto"

    def __post_init__(self):
        if self.cache_device_frac != "auto" and not 0.0 <= self.cache_device_frac <= 1.0:
            raise ValueError(
                f"cache_device_frac must be auto or in [0, 1]; got {self.cache_device_frac}"
            )

    @property
    def reads_wanted(self):
        return True

    def device_sequences(self, setting) -> int:
        """How many sequences, the first ones, stay on the device; 0 where no split fits."""
        if self.cache_device_frac != "auto":
            return int(setting.batch * self.cache_device_frac + 1e-9)
        # Not bisected: with more on the device a run may need less, as the longest is not staged.
        fits = lambda stay: _need(setting, stay) <= setting.device_kv_bytes
        return next(filter(fits, range(setting.batch, -1, -1)), 0)

    def check(self, setting):
        refuse_store("flexgen", setting)
        stay = self.device_sequences(setting)
        splits = range(setting.batch + 1) if self.cache_device_frac == "auto" else (stay,)
        refuse_device("flexgen", setting, min(_need(setting, some) for some in splits))
        away = (Span(0, full_pages(t)) for t in setting.final_tokens[stay:])
        refuse_host("flexgen", setting, host_bytes(setting, away))

    def layout(self, setting):
        return _layout(setting, self.device_sequences(setting))

    def spans(self, view):
        stay = self.device_sequences(view.setting)
        have = view.after if view.step == 0 else view.lengths
        return tuple(Span(0, full_pages(t)) if b >= stay else Span() for b, t in enumerate(have))

    def decide(self, view):
        spans = self.spans(view)
        store, _ = moves_between(view, spans)
        load, _ = ((), ()) if view.step == 0 else fetch(view, spans, view.wanted)
        return Plan(store=store, load=load, ahead=1)


def _need(setting, stay: int) -> float:
    return device_bytes(setting, _layout(setting, stay), ahead=1)


def _layout(setting, stay: int) -> Layout:
    return Layout(stay, kept_pages=int(stay < setting.batch))
