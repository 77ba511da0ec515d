"""`resident()`: everything stays on the device, and nothing is ever decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alisa_jax.placement.moves import refuse_device
from alisa_jax.placement.plan import Controller, Layout, Plan


@dataclass(frozen=True)
class Resident(Controller):
    """All tokens of all sequences on the device."""

    offloads: ClassVar[bool] = False

    def check(self, setting):
        refuse_device(
            "resident", setting, setting.fixed_bytes + setting.store_bytes(setting.final_tokens)
        )

    def layout(self, setting):
        return Layout(setting.batch, 0)

    def decide(self, view):
        return Plan()
