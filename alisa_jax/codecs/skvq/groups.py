"""Which channels share a range: SKVQ's order of channels, and the groups that it is cut into.

SKVQ (arXiv 2405.06219, Section 3.1). A group of channels has one scale, so a few wide channels cost
the others of their group precision. Channels of like extremes over a calibration text are therefore
put together: k-means on the points (min, max), the best of 10 starts.

The authors cut where the clusters end, so their groups differ in size. Here the clusters are lined
up, and every `size` channels are a group, the last one smaller if the number does not divide. The
clusters are sorted by the middle of their range or by its width, whichever makes the sum of squared
ranges of the groups smaller; if neither beats the channels as they come, those stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SPANS = ("layer", "head")
_STARTS = 10
_ROUNDS = 300


@dataclass(frozen=True)
class Groups:
    """Groups of `size` channels, over a layer (span "layer") or within each kv head ("head").

    order: uint16 numbers [U, K H / U] as bytes, whose hash Python computes once: the channels of
    each of the U = 1 or K units in the order that is cut; empty: as they come.
    """

    size: int
    span: str = "layer"
    order: bytes = field(default=b"", repr=False)

    def units(self, K: int) -> int:
        """U: the number of units, which are grouped separately."""
        return 1 if self.span == "layer" else K

    def count(self, K: int, H: int) -> int:
        """Groups of a unit."""
        return -(-(K * H // self.units(K)) // self.size)

    def members(self, K: int, H: int) -> np.ndarray:
        """[U, groups, size]: the channels, of K H, in each group; a short one repeats its last."""
        U, n = self.units(K), self.count(K, H)
        order = self._order(K, H)
        at = np.minimum(np.arange(n * self.size), order.shape[1] - 1)
        return (order[:, at] + (np.arange(U) * (K * H // U))[:, None]).reshape(U, n, self.size)

    def of(self, K: int, H: int) -> np.ndarray:
        """[K, H] int32: the group of each channel, numbered within its unit."""
        order = self._order(K, H)
        group = np.empty(order.shape, np.int32)
        number = np.arange(order.shape[1]) // self.size
        np.put_along_axis(group, order, np.broadcast_to(number, order.shape), 1)
        return group.reshape(K, H)

    def _order(self, K: int, H: int) -> np.ndarray:
        U, channels = self.units(K), K * H // self.units(K)
        if not self.order:
            return np.tile(np.arange(channels), (U, 1))
        order = np.frombuffer(self.order, "<u2").astype(np.int64)
        if order.size != K * H:
            raise ValueError(
                f"the order of channels is of {order.size} channels; the keys and values have "
                f"{K * H}"
            )
        return order.reshape(U, channels)

    def ordered(self, low: np.ndarray, high: np.ndarray) -> Groups:
        """These groups with the order for channels of ranges `low` to `high` [K, H]."""
        K, H = low.shape
        if K * H > 2**16:
            raise ValueError(f"at most {2**16} channels of a layer can be reordered; got {K * H}")
        lows = low.astype(np.float64).reshape(self.units(K), -1)
        highs = high.astype(np.float64).reshape(self.units(K), -1)
        each = zip(lows, highs, strict=True)
        orders = np.stack([line_up(a, b, self.size) for a, b in each])
        same = (orders == np.arange(orders.shape[1])).all()
        return Groups(self.size, self.span, b"" if same else orders.astype("<u2").tobytes())


def line_up(low: np.ndarray, high: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """The order [C] of channels of ranges `low` to `high` [C]; every `size` of them are a group."""
    as_they_come = np.arange(low.size)
    if low.size <= size:
        return as_they_come
    points = np.stack([low, high], 1)
    label = cluster(points, -(-low.size // size), seed)
    centre = np.zeros((label.max() + 1, 2))
    for j in range(len(centre)):
        if (label == j).any():
            centre[j] = points[label == j].mean(0)
    lines = [as_they_come]
    for weights in ((1.0, 1.0), (-1.0, 1.0)):  # middle, width
        lines.append(np.lexsort((points @ weights, label, (centre @ weights)[label])))
    return min(lines, key=lambda order: cost(low, high, order, size))  # of equals the first


def cost(low: np.ndarray, high: np.ndarray, order: np.ndarray, size: int) -> float:
    """Sum over channels of their group's squared range; squared errors are proportional to it."""
    groups = np.split(order, range(size, order.size, size))
    return float(sum(g.size * (high[g].max() - low[g].min()) ** 2 for g in groups))


def cluster(points: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """Lloyd's k-means: the cluster [C] of each of `points` [C, 2], the best of 10 k-means++ starts.

    The result is the same at every call.
    """
    rng = np.random.default_rng(seed)
    found = [_lloyd(points, _start(points, k, rng)) for _ in range(_STARTS)]
    return min(found, key=lambda result: result[0])[1]


def _squares(points, centres):
    return ((points[:, None] - centres[None]) ** 2).sum(-1)


def _start(points, k: int, rng) -> np.ndarray:
    """k-means++: centres drawn in proportion to the squared distance from the earlier ones."""
    centres = points[rng.integers(len(points), size=1)]
    while len(centres) < k:
        away = _squares(points, centres).min(1)
        if not away.sum() > 0:  # fewer distinct points than clusters
            break
        centres = np.concatenate(
            [centres, points[rng.choice(len(points), size=1, p=away / away.sum())]]
        )
    return centres


def _lloyd(points, centres) -> tuple[float, np.ndarray]:
    """(sum of squared distances, label of each point) once assignment and means are stable."""
    label = None
    for _ in range(_ROUNDS):
        squares = _squares(points, centres)
        new = squares.argmin(1)
        if label is not None and (new == label).all():
            break
        label = new
        held = np.bincount(label, minlength=len(centres))
        sums = np.stack([np.bincount(label, points[:, i], len(centres)) for i in range(2)], 1)
        centres = np.where(held[:, None] > 0, sums / np.maximum(held, 1)[:, None], centres)
    return float(squares.min(1).sum()), label
