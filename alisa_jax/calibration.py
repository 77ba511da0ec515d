"""Statistics of a model's queries, keys and values, by which some methods choose channels.

Double Sparsity (arXiv 2408.07092, Section 3) ranks the channels of a head by the means of |q|, |k|
or |q k|. SKVQ (arXiv 2405.06219, Section 3) puts channels of like ranges together. Both do so once,
offline, from a few numbers per channel. The command

    python -m eval.calibrate --model=MODEL --text=FILE --out=calibration.json

computes them. They are kept as JSON, for instance beside a model's weights. The file is one object:
`format`, `model`, `data`, `n_tokens`, and the arrays below as nested lists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import numpy as np

FORMAT = "alisa_jax calibration 1"
OF_KV_HEADS = ("k_min", "k_max", "v_min", "v_max", "k_abs")
OF_QUERY_HEADS = ("q_abs", "qk_abs")


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of every channel of every head over `n_tokens` tokens: read-only float32 arrays.

    q and k are taken before their rotation, but for `qk_abs`. Raises ValueError, in one sentence,
    for arrays that do not fit together or hold impossible statistics.
    """

    k_min: np.ndarray  # [L, K, H]
    k_max: np.ndarray  # [L, K, H]
    v_min: np.ndarray  # [L, K, H]
    v_max: np.ndarray  # [L, K, H]
    q_abs: np.ndarray  # [L, N, H] mean of |q|
    k_abs: np.ndarray  # [L, K, H] mean of |k|
    # [L, N, H] mean of |q k| of a token with itself, after the rotation, per query head
    qk_abs: np.ndarray
    n_tokens: int
    model: str
    data: str = ""  # the text that the tokens came from

    def __post_init__(self):
        for name in (*OF_KV_HEADS, *OF_QUERY_HEADS):
            object.__setattr__(self, name, _array(name, getattr(self, name)))
        for name in ("model", "data"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a text; got {getattr(self, name)!r}")
        whole = isinstance(self.n_tokens, int) and not isinstance(self.n_tokens, bool)
        if not whole or self.n_tokens < 1:
            raise ValueError(f"n_tokens is a whole number of at least 1; got {self.n_tokens!r}")
        for names in (OF_KV_HEADS, OF_QUERY_HEADS):
            for name in names:
                if (mine := getattr(self, name).shape) != (first := getattr(self, names[0]).shape):
                    raise ValueError(
                        f"{name} has shape {mine}, and {names[0]} has {first}; they have the same "
                        "channels"
                    )
        L, N, H = self.q_abs.shape
        layers, K, channels = self.k_abs.shape
        if (L, H) != (layers, channels) or N % K:
            raise ValueError(
                f"q_abs has shape {(L, N, H)} and k_abs {(layers, K, channels)}; layers and "
                "channels are the same, and the query heads a multiple of the kv heads"
            )
        for name in ("q_abs", "k_abs", "qk_abs"):
            if (getattr(self, name) < 0).any():
                raise ValueError(
                    f"{name} holds a number below 0, which is no mean of absolute values"
                )
        for part in ("k", "v"):
            if (getattr(self, f"{part}_min") > getattr(self, f"{part}_max")).any():
                raise ValueError(f"{part}_min lies above {part}_max in a channel")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """L, N, K and H."""
        return (*self.q_abs.shape[:2], *self.k_abs.shape[1:])

    def check(self, config) -> None:
        """Raise ValueError unless the sizes are those of a model with `config`, a `ModelConfig`."""
        wanted = config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim
        if self.sizes != wanted:
            raise ValueError(
                f"the calibration is of {self.model}, with {_said(self.sizes)}; the model has "
                f"{_said(wanted)}"
            )

    def save(self, path: str | os.PathLike, digits: int = 9) -> None:
        """Write the file in one step, numbers with `digits` significant digits.

        9 digits give every float32 back exactly. Raises ValueError, in one sentence, if the file
        cannot be written.
        """
        path = Path(path)
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(self.to_json(digits), encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise ValueError(
                f"the calibration {path.name!r} cannot be written: {error.strerror}"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def to_json(self, digits: int = 9) -> str:
        """The text of the file, one head a line."""
        if digits < 1:
            raise ValueError(f"digits must be at least 1; got {digits}")
        first = {
            "format": FORMAT,
            "model": self.model,
            "data": self.data,
            "n_tokens": self.n_tokens,
        }
        parts, line = [f'"{name}": {json.dumps(value)}' for name, value in first.items()], ",\n"
        for name in (*OF_KV_HEADS, *OF_QUERY_HEADS):
            layers = (
                [_list(f"{x:.{digits}g}" for x in head) for head in layer]
                for layer in getattr(self, name)
            )
            parts.append(f'"{name}": {_list(_list(heads, line) for heads in layers)}')
        return "{\n" + line.join(parts) + "\n}\n"

    @staticmethod
    def load(path: str | os.PathLike) -> Calibration:
        """Read a file that `save` wrote.

        Raises ValueError, in one sentence, for anything else.
        """
        try:
            found = json.loads(Path(path).read_bytes().decode("utf-8"))
        except OSError as error:
            raise ValueError(
                f"no calibration at {os.fspath(path)!r}: {error.strerror}; python -m "
                "eval.calibrate makes one"
            ) from None
        except ValueError:
            raise ValueError(f"{os.fspath(path)!r} is not a calibration: it is not JSON") from None
        try:
            return _read(found)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a calibration: {error}") from None


def _read(found) -> Calibration:
    names = [field.name for field in dataclasses.fields(Calibration)]
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    given = {name: value for name, value in found.items() if name != "format"}
    for what, odd in (("lacks", set(names) - set(given)), ("has", set(given) - set(names))):
        if odd:
            raise ValueError(
                f"it {what} {', '.join(sorted(odd))}; its fields are {', '.join(names)}"
            )
    return Calibration(**given)


def _array(name: str, value) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        array = np.asarray(None)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} is not an array of numbers [layers, heads, channels]")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if array.ndim != 3 or not array.size:
        raise ValueError(f"{name} is an array [layers, heads, channels]; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a number that is not finite")
    array.flags.writeable = False
    return array


def _said(sizes) -> str:
    layers, heads, kv_heads, channels = sizes
    return f"{layers} layers, {heads} query and {kv_heads} kv heads of {channels} channels"


def _list(parts, between: str = ",") -> str:
    return f"[{between.join(parts)}]"
