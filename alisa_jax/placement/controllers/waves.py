"""`waves()`: the device alone, as many sequences at a time as it holds, one wave after the other.

This is what a user without offloading does, and what offloading has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alisa_jax.placement.moves import largest, refuse_device
from alisa_jax.placement.plan import Controller, Layout, Plan


@dataclass(frozen=True)
class Waves(Controller):
    """Runs of neighbouring sequences, each as long as the budget allows."""

    offloads: ClassVar[bool] = False

    def check(self, setting):
        refuse_device("waves", setting, max(_need(setting, b, b + 1) for b in range(setting.batch)))

    def groups(self, setting):
        found, first = [], 0
        while first < setting.batch:
            fits = lambda size, first=first: (
                _need(setting, first, first + size) <= setting.device_kv_bytes
            )
            size = max(1, largest(fits, setting.batch - first))
            found.append(setting.part(first, first + size))
            first += size
        return tuple(found)

    def layout(self, setting):
        return Layout(setting.batch, 0)

    def decide(self, view):
        return Plan()


def _need(setting, first: int, stop: int) -> float:
    if first == stop:
        return 0.0
    some = setting.part(first, stop)
    return some.fixed_bytes + some.store_bytes(some.final_tokens)
