"""How kernels are cut into tiles: data, by kernel and chip.

The numbers are starting points reasoned from registers and shared memory, not measured ones;
`python -m pallas_kernels.bench --tilings` times the neighbours of a tiling on the device at hand,
and what wins is written here.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple


class DecodeTiling(NamedTuple):
    """One query against many rows."""

    rows: int = 64  # of K and V that one step of the loop reads; a power of two
    splits: int = 0  # programs that share the rows of a kv head; 0: enough to fill the device
    warps: int = 4
    stages: int = 2


class PrefillTiling(NamedTuple):
    """Many queries against many rows."""

    queries: int = 128  # a power of two
    rows: int = 64
    warps: int = 4
    stages: int = 3


# kernel -> start of a device kind, "" for all others -> greatest head dimension -> tiling
TABLE = MappingProxyType(
    {
        "sparse_decode": {
            "": {128: DecodeTiling(64, 0, 4, 2), 256: DecodeTiling(32, 0, 4, 2)},
            "NVIDIA H": {128: DecodeTiling(64, 0, 4, 3), 256: DecodeTiling(32, 0, 4, 3)},
        },
        "packed_decode": {
            "": {128: DecodeTiling(64, 0, 4, 2), 256: DecodeTiling(32, 0, 4, 2)},
            "NVIDIA H": {128: DecodeTiling(64, 0, 4, 3), 256: DecodeTiling(32, 0, 4, 3)},
        },
        "flash_prefill": {
            "": {
                64: PrefillTiling(128, 64, 4, 3),
                128: PrefillTiling(128, 32, 8, 2),
                256: PrefillTiling(64, 32, 4, 2),
            },
            "NVIDIA H": {
                64: PrefillTiling(128, 64, 4, 3),
                128: PrefillTiling(128, 64, 8, 2),
                256: PrefillTiling(64, 32, 8, 2),
            },
        },
    }
)


def tiling_for(kernel: str, chip: str, head_dim: int):
    """The table's tiling of `kernel` for heads of `head_dim` channels on `chip`, a device kind."""
    chips = TABLE[kernel]
    sizes = chips[max((name for name in chips if chip.startswith(name)), key=len)]
    return sizes[min(size for size in sizes if size >= head_dim)]
