"""`flexgen(cache_device_frac=)`: a static split by whole sequences, with the next layer's cache in flight.

FlexGen (Sheng et al., ICML 2023, arXiv 2303.06865) fixes before the run which share of the cache is on the device; its
code rounds the share to whole sequences. The others' cache is copied to the device at every step, layer by layer, while
the layer before computes. Attention on the CPU, disks and weights on the host are left to `flexgen_cost`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alisa_jax.placement.moves import (
    fetch,
    full_pages,
    host_bytes,
    largest,
    refuse_device,
    refuse_host,
    refuse_store,
    settle,
)
from alisa_jax.placement.plan import Controller, Plan, Span


@dataclass(frozen=True)
class FlexGen(Controller):
    """cache_device_frac: share of the sequences on the device, rounded down; auto: as many as fit."""

    cache_device_frac: float | Literal["auto"] = "auto"

    def __post_init__(self):
        if self.cache_device_frac != "auto" and not 0.0 <= self.cache_device_frac <= 1.0:
            raise ValueError(f"cache_device_frac must be auto or in [0, 1]; got {self.cache_device_frac}")

    def device_sequences(self, setting) -> int:
        """How many sequences, the first ones, stay on the device."""
        if self.cache_device_frac != "auto":
            return int(setting.batch * self.cache_device_frac + 1e-9)
        if _need(setting, setting.batch) <= setting.device_kv_bytes:
            return setting.batch
        return largest(lambda some: _need(setting, some) <= setting.device_kv_bytes, setting.batch - 1)

    def check(self, setting):
        refuse_store("flexgen", setting)
        stay = self.device_sequences(setting)
        refuse_device("flexgen", setting, _need(setting, stay))
        away = (Span(0, full_pages(t)) for t in setting.final_tokens[stay:])
        refuse_host("flexgen", setting, host_bytes(setting, away))

    def spans(self, view):
        stay, have = self.device_sequences(view.setting), view.after if view.step == 0 else view.lengths
        return tuple(Span(0, full_pages(t)) if b >= stay else Span() for b, t in enumerate(have))

    def decide(self, view):
        spans = self.spans(view)
        store, _ = settle(view, spans)
        load, _ = ((), ()) if view.step == 0 else fetch(view, spans, view.wanted)
        return Plan(store=store, load=load, ahead=1)


def _need(setting, stay: int) -> float:
    """Device bytes with the first `stay` sequences on the device."""
    here = setting.fixed_bytes + setting.store_bytes(setting.final_tokens[:stay])
    if stay == setting.batch:
        return here
    tails = setting.layers * setting.page_bytes * (setting.batch - stay)
    return here + tails + setting.staging_bytes(1, slice(stay, None))
