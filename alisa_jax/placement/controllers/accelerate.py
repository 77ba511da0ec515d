"""`accelerate()`: the cache on the host, streamed layer by layer, as Hugging Face Accelerate does.

The device keeps a page per layer and sequence that is not full yet. Nothing is fetched ahead. Where
a policy selects, what it wants travels, at every step anew.
"""

from __future__ import annotations

from dataclasses import dataclass

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
class Accelerate(Controller):
    """All full pages on the host."""

    @property
    def reads_wanted(self):
        return True

    def check(self, setting):
        refuse_store("accelerate", setting)
        refuse_device("accelerate", setting, device_bytes(setting, self.layout(setting), ahead=0))
        refuse_host(
            "accelerate",
            setting,
            host_bytes(setting, (Span(0, full_pages(t)) for t in setting.final_tokens)),
        )

    def layout(self, setting):
        return Layout(whole=0, kept_pages=1)

    def spans(self, view):
        return tuple(
            Span(0, full_pages(have)) for have in (view.after if view.step == 0 else view.lengths)
        )

    def decide(self, view):
        spans = self.spans(view)
        store, _ = moves_between(view, spans)
        load, _ = ((), ()) if view.step == 0 else fetch(view, spans, view.wanted)
        return Plan(store=store, load=load)
