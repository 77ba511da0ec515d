"""`int8(axis="channel" | "token")`: asymmetric 8-bit codes, after ALISA.

Equation 7 of arXiv 2403.17312, with the factor `min` that its zero point is printed without:

    x ~ scale (code - zero)
    scale = (max - min) / 255
    zero  = round(-min / scale)
    code  = round(x / scale + zero)

Codes are shifted by 128 into int8 and clamped. The error is at most half a step wherever
min <= x <= max.

    axis       one range per                              bytes of K and V per kv head
    channel    channel, kv head and sequence (paper)      2 H per token, 16 H per sequence
    token      token and kv head                          2 (H + 3) per token

`codecs/int8_channel.py` and `codecs/int8_token.py` are the two codecs. Attention decodes nothing.
With codes c, scales s and zero points z,

    channel    q.k           = (q s).c - sum_h q_h s_h z_h
               sum_m p_m v_m = s (sum_m p_m c_m - z sum_m p_m)
    token      q.k           = s_m (q.c - z_m sum_h q_h)
               sum_m p_m v_m = sum_m (p_m s_m) c_m - sum_m p_m s_m z_m
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alisa_jax.codecs.base import NO_ROTATION, Asked, Codec, Rotation
from alisa_jax.codecs.int8_channel import ChannelInt8
from alisa_jax.codecs.int8_token import TokenInt8
from alisa_jax.codecs.raw import Raw

CALIBRATION_TOKENS = 64
HEADROOM = 1.0


@dataclass(frozen=True)
class Int8(Asked):
    """The spec; `resolve` gives the codec of a model. The other fields belong to axis="channel".

    calibration_tokens: the first tokens of a sequence, which stay raw and give the range (default
    64). headroom: widens the range by this share of itself, for later tokens (default 1: one bit of
    the eight). key_range: "rotary" (default) is the range that rotated keys of the calibration
    tokens have over all positions of the context; "minmax" is their range at their own positions,
    as in the paper's formula.
    """

    axis: Literal["channel", "token"] = "channel"
    calibration_tokens: int | None = None
    headroom: float | None = None
    key_range: Literal["rotary", "minmax"] | None = None

    def __post_init__(self):
        for name in ("calibration_tokens", "headroom", "key_range"):
            if self.axis == "token" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} goes with axis=channel; with axis=token each token has its own range"
                )
        if self.axis not in ("channel", "token"):
            raise ValueError(f"axis must be channel or token; got {self.axis!r}")
        if self.calibration_tokens is not None and self.calibration_tokens < 1:
            raise ValueError(
                f"calibration_tokens must be at least 1; got {self.calibration_tokens}"
            )
        if self.headroom is not None and not 0 <= self.headroom <= 16:
            raise ValueError(f"headroom must be in 0..16; got {self.headroom}")
        if self.key_range not in (None, "rotary", "minmax"):
            raise ValueError(f"key_range must be rotary or minmax; got {self.key_range!r}")

    def resolve(self, dtype, rotation: Rotation = NO_ROTATION) -> Codec:
        """The codec for a model that computes in `dtype` and rotates its keys by `rotation`."""
        raw = Raw().resolve(dtype)
        if self.axis == "token":
            return TokenInt8(raw)
        tokens = CALIBRATION_TOKENS if self.calibration_tokens is None else self.calibration_tokens
        headroom = HEADROOM if self.headroom is None else self.headroom
        if self.key_range == "minmax":
            rotation = NO_ROTATION
        return ChannelInt8(raw, tokens, headroom, rotation)
