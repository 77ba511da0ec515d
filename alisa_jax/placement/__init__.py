"""Where does each stored token live at the next step? One controller a file, a frozen dataclass.

Nothing here imports jax or holds an array: a controller gets a `View` and returns a `Plan`. The
same controllers are priced by `simulate` and obeyed by the part that moves real arrays.
"""

from __future__ import annotations

from types import MappingProxyType

from alisa_jax import spec
from alisa_jax.placement.controllers.accelerate import Accelerate
from alisa_jax.placement.controllers.alisa import Alisa
from alisa_jax.placement.controllers.flexgen import FlexGen
from alisa_jax.placement.controllers.resident import Resident
from alisa_jax.placement.controllers.waves import Waves
from alisa_jax.placement.plan import (
    ALL,
    PAGE_TOKENS,
    Controller,
    Layout,
    Plan,
    Rows,
    Setting,
    Span,
    Tier,
    View,
)

CONTROLLERS = MappingProxyType(
    {
        "resident": Resident,
        "waves": Waves,
        "accelerate": Accelerate,
        "flexgen": FlexGen,
        "alisa": Alisa,
    }
)

__all__ = [
    "ALL",
    "CONTROLLERS",
    "PAGE_TOKENS",
    "Accelerate",
    "Alisa",
    "Controller",
    "FlexGen",
    "Layout",
    "Plan",
    "Resident",
    "Rows",
    "Setting",
    "Span",
    "Tier",
    "View",
    "Waves",
    "parse",
]


def parse(text: str) -> Controller:
    """The controller that `text` names, as in 'alisa(traffic=paper)'. Raises `spec.SpecError`."""
    return spec.parse(text, CONTROLLERS)
