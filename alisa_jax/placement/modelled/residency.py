"""Where every row is, as boolean masks: the strict reader of plans that checks budgets.

The simulator and the tests use it. It is independent of the arithmetic of controllers and cost
model: a plan is obeyed row by row, and an impossible move, a token that is not there when it is
attended, or a budget overrun raises PlanError.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from alisa_jax.placement.plan import (
    ALL,
    PAGE_TOKENS,
    Layout,
    Plan,
    Positions,
    Rows,
    Setting,
    Tier,
    View,
)


class PlanError(AssertionError):
    """A plan that cannot be carried out, in one sentence."""


class Moved(NamedTuple):
    """Bytes on the link in one step, and the peaks of both memories during it."""

    load_bytes: float
    store_bytes: float
    device_bytes: float
    host_bytes: float


class Residency:
    """The rows of one run, as masks [L, B, S]: layers, sequences, positions.

    L = 1 stands for layers that are alike.
    """

    def __init__(self, setting: Setting, layout: Layout, layers: int | None = None):
        self.setting = setting
        self.layout = layout
        L = setting.layers if layers is None else layers
        if setting.layers % L:
            raise ValueError(f"layers must divide {setting.layers}; got {L}")
        self.weight = setting.layers // L
        shape = (L, setting.batch, -(-max(setting.final_tokens) // PAGE_TOKENS) * PAGE_TOKENS)
        self.device = np.zeros(shape, bool)
        self.host = np.zeros(shape, bool)
        self.working = np.zeros(shape, bool)

    def step(self, view: View, plan: Plan) -> Moved:
        """Carry out `plan`, attend, and write the step's tokens."""
        setting, first = self.setting, view.step == 0
        if setting.evicts:
            if not plan.empty:
                raise PlanError(
                    f"step {view.step}: the policy has no store, and the plan moves rows"
                )
            return self._within(view, Moved(0.0, 0.0, setting.fixed_bytes, 0.0))
        if first:
            self._write(view)
        there = (
            np.arange(self.device.shape[2])
            < np.asarray(view.after if first else view.lengths)[:, None]
        )
        stored = self._move(plan.store, there, self.device, self.host, view)
        if (
            stored.reshape(*stored.shape[:2], -1, PAGE_TOKENS).any(-1).sum() * PAGE_TOKENS
            != stored.sum()
        ):
            raise PlanError(f"step {view.step}: a store holds a page that is not full")
        dropped = np.zeros_like(self.device)
        for row in plan.drop:
            tier = {Tier.HOST: self.host, Tier.DEVICE: self.device}.get(row.source)
            if tier is None or row.target is not Tier.NOWHERE:
                raise PlanError(f"step {view.step}: {row} is no deletion")
            mask = self._mask(row, there)
            self._demand((tier & mask) == mask, view, row, "is not where it is deleted")
            tier &= ~mask
            dropped |= mask
        loaded, staged = np.zeros_like(self.device), np.zeros_like(self.device)
        for row in plan.load:
            mask = self._mask(row, there)
            if row.source is not Tier.HOST or row.target not in (Tier.WORKING, Tier.STAGING):
                raise PlanError(f"step {view.step}: {row} is no load from the host")
            self._demand((self.host & mask) == mask, view, row, "is loaded and not on the host")
            self._demand(
                ~(mask & (dropped | loaded | staged)),
                view,
                row,
                "is loaded twice, or deleted and loaded",
            )
            (loaded if row.target is Tier.WORKING else staged)[mask] = True
        again = np.zeros_like(self.device)
        for row in plan.recompute:
            prompts = np.asarray(setting.prompt_tokens)[:, None]
            mask = self._mask(row, there)
            if row.start or row.layer != ALL or row.source is not Tier.NOWHERE:
                raise PlanError(f"step {view.step}: {row} is no prefix of all layers")
            self._demand(
                ~(mask & (np.arange(mask.shape[2]) >= prompts)),
                view,
                row,
                "is generated and recomputed",
            )
            self._demand(~(mask & (loaded | staged)), view, row, "is both loaded and recomputed")
            again |= mask
        # The layer that a prefill computes is whole on the device until its rows have left.
        moving = self._pages(stored | dropped).sum() / len(self.device) if first else 0.0
        device = self._device_bytes(loaded, staged, again, plan.ahead) + moving * setting.page_bytes
        if not first:
            self._attend(view, loaded, staged, again)
            self._write(view)
            device = max(device, self._device_bytes(loaded, staged, again, plan.ahead))
        self._check_rings(view)
        host = self._pages(self.host).sum() * self.weight * setting.page_bytes
        link = self._link_bytes(loaded | staged), self._link_bytes(stored, whole=True)
        return self._within(view, Moved(*link, device, host))

    def _within(self, view: View, moved: Moved) -> Moved:
        budgets = {"device": self.setting.device_kv_bytes, "host": self.setting.host_kv_bytes}
        for name, used in (("device", moved.device_bytes), ("host", moved.host_bytes)):
            if used > budgets[name]:
                raise PlanError(
                    f"step {view.step}: {used:.0f} bytes on the {name}; its budget is "
                    f"{budgets[name]:.0f}"
                )
        return moved

    def _check_rings(self, view: View) -> None:
        ring, whole = PAGE_TOKENS * self.layout.kept_pages, self.layout.whole
        oldest = np.asarray(view.after)[whole:, None] - ring
        lost = self.device[:, whole:] & (np.arange(self.device.shape[2]) < oldest)
        if lost.any():
            layer, sequence, position = np.argwhere(lost)[0].tolist()
            raise PlanError(
                f"step {view.step}: position {position} of layer {layer} and sequence "
                f"{sequence + whole} is overwritten on the device before it was stored: the ring "
                f"has {ring} rows"
            )

    def _mask(self, row: Rows, there: np.ndarray) -> np.ndarray:
        if row.head != ALL:
            raise PlanError(f"{row} names a head, and rows hold all heads")
        if row.layer != ALL and len(self.device) != self.setting.layers:
            raise PlanError(f"{row} names a layer, and layers are folded")
        mask = np.zeros_like(self.device)
        layers = slice(None) if row.layer == ALL else slice(row.layer, row.layer + 1)
        sequences = slice(None) if row.sequence == ALL else slice(row.sequence, row.sequence + 1)
        mask[layers, sequences, row.start : row.stop] = True
        return mask & there

    def _move(self, rows, there, source, target, view) -> np.ndarray:
        moved = np.zeros_like(source)
        for row in rows:
            mask = self._mask(row, there)
            if (row.source, row.target) != (Tier.DEVICE, Tier.HOST):
                raise PlanError(f"step {view.step}: {row} is no store")
            self._demand((source & mask) == mask, view, row, "is stored and not on the device")
            source &= ~mask
            target |= mask
            moved |= mask
        return moved

    def _attend(self, view: View, loaded, staged, again) -> None:
        S = self.device.shape[2]
        if view.wanted is None:
            want = np.broadcast_to(
                np.arange(S) < np.asarray(view.lengths)[:, None], self.device.shape
            )
        else:
            want = self._at(view.wanted)
        here = self.device | staged | loaded | again | (self.working & want)
        if (want & ~here).any():
            where = tuple(int(i) for i in np.argwhere(want & ~here)[0])
            raise PlanError(
                f"step {view.step}: (layer, sequence, position) {where} is attended and not there"
            )
        if self.setting.slots:
            most = want.sum(-1).max() + 1
            if most > self.setting.slots:
                raise PlanError(
                    f"step {view.step}: {most} tokens are attended, and the working set has fewer "
                    "slots"
                )
            self.working = want.copy()

    def _write(self, view: View) -> None:
        positions = np.arange(self.device.shape[2])
        past, after = np.asarray(view.lengths)[:, None], np.asarray(view.after)[:, None]
        self.device |= (positions >= past) & (positions < after)

    def seed(self, wanted: Positions | None) -> None:
        """What a prefill puts into the working set."""
        self.working = self._at(wanted or {})

    def _at(self, wanted: Positions) -> np.ndarray:
        mask = np.zeros_like(self.device)
        for (layer, sequence), positions in wanted.items():
            at = (
                slice(None) if layer == ALL else layer,
                slice(None) if sequence == ALL else sequence,
            )
            mask[(*at, list(positions))] = True
        return mask

    def _pages(self, mask: np.ndarray) -> np.ndarray:
        return mask.reshape(*mask.shape[:2], -1, PAGE_TOKENS).any(-1)

    def _link_bytes(self, mask: np.ndarray, whole: bool = False) -> float:
        rows = (
            mask.sum()
            if self.setting.gather and not whole
            else self._pages(mask).sum() * PAGE_TOKENS
        )
        return float(rows) * self.weight * self.setting.token_bytes

    def _device_bytes(self, loaded, staged, again, ahead: int) -> float:
        setting = self.setting
        held = self._pages(self.device).sum() * self.weight * setting.page_bytes
        flight = (ahead + 1) * self._pages(staged).sum((1, 2)).max() * setting.page_bytes
        # a page of each layer and sequence at a time
        rounds = loaded.any(-1).sum() * self.weight * setting.page_bytes
        layer = self._pages(again).sum((1, 2)).max() * setting.page_bytes
        return setting.fixed_bytes + held + flight + rounds + layer

    def _demand(self, holds: np.ndarray, view: View, row: Rows, complaint: str) -> None:
        if not holds.all():
            raise PlanError(f"step {view.step}: {row} {complaint}")
