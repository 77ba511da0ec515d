"""What a step costs in bytes, operations and seconds, from numbers alone; every time is modelled.

The paper's equations (section IV-B, with theta^c and theta^g tokens going to and coming from the
CPU at step j):

    T^m_j = 4 b l h (theta^c_j + theta^g_j) / B          p1 <= j < n                     (3)
    theta^c_j = alpha (s + j),   0 <= theta^g_j <= round((s + j) r)                      (4)
    minimise  sum_{j <= p2} T^c_j + sum_{j >= p1} T^m_j + sum_{j >= p2} T^r_j            (5)
    subject to  0 <= p1 < p2 <= n,  0 < alpha < 1,  0 < beta < 1                         (6)

`paper_traffic_s` and `paper_objective_s` are these lines as they are printed. The other functions
price plans as this project carries them out: a row travels once (a store sends the increment only),
and T^r holds the compute of its step.

Compute is a roofline: the slower of operations and bytes, for the weights and for attention.
Recomputing a prefix is a dense prefill of its tokens through all layers.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from alisa_jax.placement.plan import ALL, Plan, Setting, Tier, View, moved_bytes

F32 = 4


@dataclass(frozen=True)
class Hardware:
    """A device, its host and the link between them.

    Peak rates as published, in operations and bytes per second each way; or, with `measured`, the
    rates that a profile reached, to which no efficiency is applied. gathered_frac: the share of the
    link's rate that single rows reach where they are read from host pages one by one.
    """

    name: str
    device_bytes: float
    host_bytes: float
    matmul_flops_per_s: float
    read_bytes_per_s: float
    to_device_bytes_per_s: float
    to_host_bytes_per_s: float
    gathered_frac: float = 1.0
    measured: bool = False

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in ("name", "measured"):
                continue
            if not isinstance(value, numbers.Real) or not value > 0:
                raise ValueError(f"hardware {self.name}: {name} must be above 0; got {value!r}")


@dataclass(frozen=True)
class Shape:
    """A model as numbers.

    weight_flops: of one token outside attention. attention_flops: of one attended position over all
    layers. A multiply-add is 2.
    """

    weight_bytes: float
    weight_flops: float
    attention_flops: float
    layers: int
    d_model: int
    d_ff: int
    vocab_size: int
    kv_token_bytes: float  # of one layer, as the cache stores it
    element_bytes: int = 2

    def activation_bytes(self, batch: int, prompt_tokens: int) -> float:
        """Peak bytes of a prefill's layer, by a model of ours; what a compiler keeps may differ.

        The residual stream twice, q, k, v and output, the MLP's hidden rows twice, and the last
        logits in float32.
        """
        rows = batch * prompt_tokens * (6 * self.d_model + 2 * self.d_ff) * self.element_bytes
        return rows + F32 * batch * self.vocab_size


class Price(NamedTuple):
    """Seconds and link bytes of one step; `total_s` has the overlap."""

    compute_s: float
    load_s: float
    store_s: float
    recompute_s: float
    total_s: float
    load_bytes: float
    store_bytes: float


@dataclass(frozen=True)
class Cost:
    """Prices steps of `shape` on `hardware`.

    matmul_efficiency, read_efficiency: the share of a published peak that is reached; not used with
    measured rates. selection_s: what a policy that selects adds to each layer of a decode step:
    sums, exchange, their launches. step_s: (a, c): a decode step of `batch` sequences computes for
    a + c * batch seconds, in place of the roofline.
    """

    hardware: Hardware
    shape: Shape
    matmul_efficiency: float = 0.6
    read_efficiency: float = 0.8
    selection_s: float = 0.0
    step_s: tuple[float, float] | None = None

    @property
    def flops_per_s(self) -> float:
        return self.hardware.matmul_flops_per_s * (
            1.0 if self.hardware.measured else self.matmul_efficiency
        )

    @property
    def bytes_per_s(self) -> float:
        return self.hardware.read_bytes_per_s * (
            1.0 if self.hardware.measured else self.read_efficiency
        )

    def decode_s(self, batch: int, attended_tokens: float) -> float:
        """One decode step; `attended_tokens`: sum over the sequences, mean over the layers."""
        if self.step_s is not None:
            return self.step_s[0] + self.step_s[1] * batch
        weights = max(
            batch * self.shape.weight_flops / self.flops_per_s,
            self.shape.weight_bytes / self.bytes_per_s,
        )
        read = attended_tokens * self.shape.layers * self.shape.kv_token_bytes
        return weights + max(
            attended_tokens * self.shape.attention_flops / self.flops_per_s, read / self.bytes_per_s
        )

    def prefill_s(self, lengths: Sequence[float], times: int = 1) -> float:
        """A dense causal pass over `times` sequences of each of these lengths."""
        if not any(lengths):
            return 0.0
        ops = sum(
            n * self.shape.weight_flops + self.shape.attention_flops * n * (n + 1) / 2
            for n in lengths
        )
        return max(times * ops / self.flops_per_s, self.shape.weight_bytes / self.bytes_per_s)

    def load_s(self, sent_bytes: float, gathered: bool) -> float:
        """Host to device."""
        return sent_bytes / (
            self.hardware.to_device_bytes_per_s * (self.hardware.gathered_frac if gathered else 1.0)
        )

    def store_s(self, sent_bytes: float) -> float:
        """Device to host, in pages."""
        return sent_bytes / self.hardware.to_host_bytes_per_s

    def price(self, plan: Plan, view: View) -> Price:
        """The modelled seconds of a step under `plan`.

        With layers in flight (`ahead`) loads hide behind compute and what is longer counts;
        without, they add up, unless they were chosen a step earlier (`lag`). Stores are written
        behind, and count where they take longer than all else.
        """
        setting = view.setting
        if view.step == 0:
            compute = self.prefill_s(view.new)
        else:
            compute = self.decode_s(setting.batch, attended_tokens(view))
            compute += setting.layers * self.selection_s * setting.selects
        load_bytes = moved_bytes(plan.load, setting, view.lengths)
        store_bytes = moved_bytes(plan.store, setting, view.after)
        gathered = setting.gather and any(row.target is Tier.WORKING for row in plan.load)
        load, store = self.load_s(load_bytes, gathered), self.store_s(store_bytes)
        again = self.prefill_s(_prefixes(plan, setting.batch))
        ahead = max(compute, load) if plan.ahead or plan.lag else compute + load
        return Price(
            compute, load, store, again, max(ahead + again, store), load_bytes, store_bytes
        )


def attended_tokens(view: View) -> float:
    """Tokens that a decode step attends, its own too: sum over sequences, mean over layers."""
    if view.wanted is None:
        return float(sum(view.lengths) + len(view.lengths))
    layers, batch = view.setting.layers, view.setting.batch
    total = 0.0
    for (layer, sequence, *head), positions in view.wanted.items():
        total += (
            len(positions)
            / (view.setting.heads if head else 1)
            * (batch if sequence == ALL else 1)
            * (1.0 if layer == ALL else 1.0 / layers)
        )
    return total + batch


def _prefixes(plan: Plan, batch: int) -> list[int]:
    lengths = [0] * batch
    for row in plan.recompute:
        for b in range(batch) if row.sequence == ALL else (row.sequence,):
            lengths[b] = max(lengths[b], row.stop)
    return lengths


def statistics_bytes(window_rows: int, context_tokens: int, layers: int, heads: int = 1) -> float:
    """Bytes of SWA's statistics of one sequence over S tokens.

    They are a float32 ring of W + 2 rows, sums as pairs, and an int32 index.
    """
    return layers * heads * context_tokens * F32 * (window_rows + 2 + 2 + 1)


def kv_bytes(setting: Setting) -> float:
    """The dense cache at the end of the run, without page rounding.

    4 b l h (s + n - 1) for 16-bit elements.
    """
    return setting.layers * setting.token_bytes * sum(setting.final_tokens)


def paper_traffic_s(
    kv_position_bytes: float, alpha: float, r: float, tokens: int, bytes_per_s: float
) -> float:
    """Equations 3 and 4 as printed, theta^g at its bound, at the step with `tokens` = s + j.

    kv_position_bytes: 4 b l h.
    """
    return kv_position_bytes * (alpha * tokens + int(tokens * r + 0.5)) / bytes_per_s


def paper_objective_s(
    compute_s: Sequence[float],
    traffic_s: Sequence[float],
    recompute_s: Sequence[float],
    p1: int,
    p2: int,
) -> float:
    """Equation 5: T^c up to p2, T^m from p1, T^r from p2; one entry a step."""
    if not 0 <= p1 < p2 <= len(compute_s):
        raise ValueError(
            f"Equation 6 asks for 0 <= p1 < p2 <= n; got p1={p1}, p2={p2}, n={len(compute_s)}"
        )
    return sum(compute_s[:p2]) + sum(traffic_s[p1:]) + sum(recompute_s[p2:])
