"""Arrays of golden records as text: sets as packed bits, codes as base64, float32 as short numbers."""

import base64

import numpy as np

POSITIONS = 117 + 24  # that sets are bits of: the longest prompt and the new tokens of `eval.quality.golden_cells`


def bits_text(bits: np.ndarray) -> str:
    """[B, P, POSITIONS] bool as 'BxP:' and base64 of its packed rows."""
    return f"{bits.shape[0]}x{bits.shape[1]}:{base64.b64encode(np.packbits(bits, axis=-1).tobytes()).decode()}"


def bits_of(text: str) -> np.ndarray:
    """What `bits_text` was given."""
    shape, packed = text.split(":")
    rows = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(*map(int, shape.split("x")), -1)
    return np.unpackbits(rows, axis=-1, count=POSITIONS).astype(bool)


def array_text(x: np.ndarray) -> str:
    """An array of one axis or none as its type and base64."""
    return f"{x.dtype.name}:{base64.b64encode(x.tobytes()).decode()}"


def array_of(text: str) -> tuple[str, np.ndarray]:
    """Type and array; of types that NumPy does not have, their bits as whole numbers."""
    name, data = text.split(":")
    kinds = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}
    return name, np.frombuffer(base64.b64decode(data), kinds.get(name, name))


def short(row) -> list[float]:
    """float32 values as the shortest numbers that give them again."""
    return [float(str(np.float32(x))) for x in np.asarray(row)]
