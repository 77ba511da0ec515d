"""`skvq(k_bits=2, v_bits=2, group=128, ...)`: few bits, ordered channels, a raw window.

SKVQ (COLM 2024, arXiv 2405.06219). A token is stored as codes with a scale and a lower end per
group of channels (`codecs/skvq/bits.py`), where channels of like ranges share a group
(`codecs/skvq/groups.py`); keys are stored before their rotation, which would mix channels. The
first `sinks` and the last `window` tokens are attended raw (`codecs/recent.py`).

Every token is encoded once, when it is written, and kept raw beside its codes while it is among the
first or last ones. So no step moves a token from one form to the other, a prompt leaves what
decoding it would, and slots may be reused, copied and evicted under any policy. It costs the codes
of sinks and window, which `token_bytes` counts like all others; `sequence_bytes` are the raw rows
and, in a working set, their slots.

    k_bits, v_bits    1 .. 8, 16, or 1.5: three levels, five to a byte (`codecs/packing.py`)
    group             channels that share a range
    clip              a; 1 clips nothing. The authors use 0.92 to 0.96
    reorder           orders channels by a calibration of the model. Without a model, as in streams,
                      and if one group holds all channels, they stay as they come
    span              "layer": groups may span the heads of a layer, as in the paper, and all heads
                      keep the same tokens; "head": each kv head has its own groups, and any policy
                      will do
    params            the type of scales and lower ends: "float8", as the authors, "bfloat16" or
                      "float32". Float8 steps are multiples of 1/512, so groups narrower than that
                      lose all but their lower end

If the codes of a head fill whole bytes, an element takes b + 16 / group bits with float8, 8 for
scale and end each. Three levels take 1.6 bits and the padding of a head's last byte, 1.625 at 64 or
128 channels; the authors' packer spends 2.

Deviations: groups are of equal size; one `clip` serves all layers and groups, as in the authors'
code, where the paper fits one to each group; attention over a prompt is in full precision, which
the authors call `full_prefill`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import flax
import jax
import jax.numpy as jnp

from alisa_jax.codecs import packing
from alisa_jax.codecs.base import NO_ROTATION, TOKEN_AXIS, Asked, Codec, Rotation
from alisa_jax.codecs.raw import Raw
from alisa_jax.codecs.recent import Reach, Recent
from alisa_jax.codecs.skvq.bits import PARAMS, GroupBits, Rows
from alisa_jax.codecs.skvq.groups import SPANS, Groups
from alisa_jax.ops import rows
from alisa_jax.ops.rope import rotate


@dataclass(frozen=True)
class Skvq(Asked):
    """The spec; `resolve` gives the codec of a model."""

    k_bits: int | float = 2
    v_bits: int | float = 2
    group: int = 128
    window: int = 128
    sinks: int = 5
    clip: float = 0.92
    reorder: bool = True
    span: str = "layer"
    params: str = "float8"

    raw_keys: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("k_bits", "v_bits"):
            if getattr(self, name) not in packing.BITS:
                raise ValueError(f"{name} must be 1.5, 1 to 8 or 16; got {getattr(self, name)}")
        for name, least in (("group", 1), ("window", 0), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if not 0.0 < self.clip <= 1.0:
            raise ValueError(
                f"clip must be above 0 and at most 1, which clips nothing; got {self.clip}"
            )
        for name, known in (("span", SPANS), ("params", PARAMS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}"
                )

    def resolve(
        self, dtype, rotation: Rotation = NO_ROTATION, calibration=None, config=None
    ) -> Codec:
        """The codec for a model that computes in `dtype`.

        calibration: a `Calibration` of the model, whose k_min, k_max, v_min and v_max order the
        channels. config: the model's, for which `reorder` needs a calibration; without one nothing
        is reordered. Raises ValueError.
        """
        del rotation  # keys are stored before it
        raw, groups = Raw().resolve(dtype), Groups(self.group, self.span)
        k = GroupBits(raw, self.k_bits, groups, self.clip, self.params)
        v = GroupBits(raw, self.v_bits, groups, self.clip, self.params)
        plain = SlidingCodec(raw, k, v, Reach(self.sinks, self.window))
        if not self.reorder or config is None:
            return plain
        if groups.count(config.n_kv_heads, config.head_dim) == 1:
            return plain
        if calibration is None:
            raise ValueError(
                "skvq(reorder=true) orders channels by their ranges over a text, and the model "
                "has no calibration: make one with python -m eval.calibrate, or give "
                "reorder=false"
            )
        calibration.check(config)
        c = calibration
        layers = []
        for k_low, k_high, v_low, v_high in zip(c.k_min, c.k_max, c.v_min, c.v_max, strict=True):
            k_bits = dataclasses.replace(k, groups=groups.ordered(k_low, k_high))
            v_bits = dataclasses.replace(v, groups=groups.ordered(v_low, v_high))
            layers.append((k_bits, v_bits))
        return dataclasses.replace(plain, layers=tuple(layers))


@flax.struct.dataclass
class Held:
    """Tokens in either layout: all of them encoded, and the first and last ones also raw."""

    rows: Rows  # [B, K or U, M, *] or [B, S, K or U, *]
    recent: Recent
    side: str = flax.struct.field(pytree_node=False)  # "k" | "v"


@flax.struct.dataclass
class NewToken:
    """One token, encoded, and raw for the rows of the last tokens."""

    rows: Rows  # [B, K or U, *]
    x: jax.Array  # [B, K, H]


@dataclass(frozen=True)
class SlidingCodec(Codec):
    """See above.

    layers: how K and V of each layer are encoded, if layers differ (`for_layer` picks one).
    """

    raw: Raw
    k: GroupBits
    v: GroupBits
    reach: Reach
    layers: tuple[tuple[GroupBits, GroupBits], ...] = field(default=(), repr=False)

    raw_keys: ClassVar[bool] = True
    crops: ClassVar[bool] = False  # the raw form of tokens before the window is gone

    def for_layer(self, layer: int) -> Codec:
        if not self.layers:
            return self
        k, v = self.layers[layer]
        return dataclasses.replace(self, k=k, v=v, layers=())

    def refuses(self, policy, route: str) -> str | None:
        if self.k.groups.span == "layer" and policy.selection_heads(2) > 1:
            return (
                f"skvq(span=layer) stores all heads of a token together, and {policy} keeps other "
                "tokens for each kv head; give span=head"
            )
        return None

    def token_bytes(self, K: int, H: int) -> float:
        return float(self.k.token_bytes(K, H) + self.v.token_bytes(K, H))

    def sequence_bytes(self, K: int, H: int) -> float:
        """As the base says, of a working set.

        A store, whose rows are positions, saves 4 bytes per raw row and head.
        """
        row = H * jnp.dtype(self.raw.dtype).itemsize + 4
        return 2.0 * (self.reach.rows * K * row + 4)

    def empty(self, shape, layout, side):
        B, H = shape[0], shape[3]
        K = shape[1] if layout == "slots" else shape[2]
        like = jax.eval_shape(lambda: self._encoded(jnp.zeros(shape, jnp.float32), layout, side))
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        recent = Recent.empty(self.reach, B, K, H, jnp.dtype(self.raw.dtype), layout)
        return Held(none, recent, side)

    def grow(self, packed, size, layout):
        grown = _each(lambda x: rows.pad_axis(x, TOKEN_AXIS(layout), size, 0), packed.rows)
        return packed.replace(rows=grown)

    def fill(self, packed, x, layout):
        """As the base says; all of x is the prompt (`upto` for less)."""
        filled = packed.replace(rows=self._encoded(x, layout, packed.side))
        length = jnp.full((x.shape[0],), x.shape[TOKEN_AXIS(layout)], jnp.int32)
        return self.upto(filled, x, length, layout)

    def upto(self, packed, x, length, layout):
        """`packed`, filled from x, as it is after only the first `length` [B] tokens of x."""
        return packed.replace(recent=packed.recent.after(x, length, layout))

    def encode_token(self, packed, x):
        return NewToken(self._bits(packed.side).encode(x), x)

    def write_slot(self, packed, codes, slot):
        put = lambda old, new: rows.put_slots(old, new[:, :, None], slot[:, :, None])
        recent = packed.recent.append(codes.x, slot, packed.rows.codes.shape[2])
        return packed.replace(rows=_each(put, packed.rows, codes.rows), recent=recent)

    def write_token(self, packed, codes, pos):
        put = lambda old, new: rows.put_tokens(old, new, pos)
        recent = packed.recent.append(codes.x, None, packed.rows.codes.shape[1])
        return packed.replace(rows=_each(put, packed.rows, codes.rows), recent=recent)

    def take(self, packed, pos):
        taken = _each(lambda x: rows.take_tokens(x, pos), packed.rows)
        return packed.replace(rows=taken, recent=packed.recent.taken(pos))

    def copy_in(self, packed, codes, slot):
        held = _each(lambda old, new: rows.put_slots(old, new, slot), packed.rows, codes.rows)
        recent = packed.recent.copy_in(codes.recent, slot, packed.rows.codes.shape[2])
        return packed.replace(rows=held, recent=recent)

    def slice_tokens(self, packed, start, size):
        cut = _each(lambda x: rows.slice_tokens(x, start, size), packed.rows)
        return packed.replace(rows=cut, recent=packed.recent.sliced(start, size))

    def leaves(self, packed):
        return tuple(packed.rows)

    def rebuild(self, packed, leaves):
        return packed.replace(rows=Rows(*leaves))

    def seated(self, packed, home, pos):
        return packed.replace(recent=home.recent.taken(pos))

    def encode(self, packed, x, layout):
        return tuple(self._encoded(x, layout, packed.side))

    def values(self, packed):
        recent = packed.recent
        values = self._bits(packed.side).values(packed.rows, recent.x.shape[1], recent.x.shape[3])
        return rows.put_slots(values, recent.x.astype(jnp.float32), recent.slot)

    def logits(self, q, k):
        return self.turned_logits(q, k, None)

    def turned_logits(self, q, k, turn):
        q = q.astype(jnp.float32)
        z, recent = self._bits(k.side).logits(q, k.rows, turn), k.recent
        x = recent.x
        if turn is not None:
            places = jnp.broadcast_to(turn.places, (*recent.slot.shape[:2], turn.places.shape[2]))
            places = jnp.take_along_axis(places, jnp.maximum(recent.slot, 0), axis=-1)
            x = rotate(x, places, turn.rotation)
        return _at_slots(z, recent.slot).set(jnp.swapaxes(self.raw.logits(q, x), 2, 3), mode="drop")

    def mix(self, p, v):
        slot = v.recent.slot[:, :, None]  # [B, K, 1, R]
        at = jnp.broadcast_to(jnp.maximum(slot, 0), (*p.shape[:3], slot.shape[-1]))
        own = jnp.where(slot >= 0, jnp.take_along_axis(p, at, axis=-1), jnp.float32(0.0))
        p = _at_slots(p, v.recent.slot).set(jnp.float32(0.0), mode="drop")
        x = v.recent.x
        return self._bits(v.side).mix(p, v.rows, x.shape[-1]) + self.raw.mix(own, x)

    def clipped(self, packed, x):
        """As the base says, tokens of sinks and window included.

        With clip < 1 some elements of every group are clipped.
        """
        return self._bits(packed.side).clipped(jnp.moveaxis(x, 1, -2))

    def _bits(self, side: str) -> GroupBits:
        return self.k if side == "k" else self.v

    def _encoded(self, x, layout, side) -> Rows:
        """Rows of x, in its `layout`."""
        if layout == "tokens":
            return self._bits(side).encode(x)
        encoded = self._bits(side).encode(jnp.swapaxes(x, 1, 2))
        return _each(lambda y: jnp.swapaxes(y, 1, 2), encoded)


def _each(move, *held: Rows) -> Rows:
    return jax.tree.map(move, *held)


def _at_slots(x: jax.Array, slot: jax.Array):
    """The entries of x [B, K, G, M] at `slot` [B, K, R], to be set to [B, K, R, G].

    Set them in mode "drop": a slot of -1 is out of range.
    """
    b = jax.lax.broadcasted_iota(jnp.int32, slot.shape, 0)
    k = jax.lax.broadcasted_iota(jnp.int32, slot.shape, 1)
    return x.at[b, k, :, jnp.where(slot >= 0, slot, x.shape[-1])]
