"""The rates of a machine by name: devices as they are published, and profiles that were measured.

Where a figure is from says the page of the device in `configs/hardware` of the repository. The host
of a device is that of the evaluation that it stands for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from alisa_jax.placement.modelled.cost import Hardware

PROFILE = "this_machine.json"  # what a profile is called unless told otherwise
THIS_MACHINE = "this_machine"  # the name of that file's machine
_GIB = 2.0**30
_PCIE_3 = 15.75e9  # bytes per second of 16 lanes, each way
_PCIE_5 = 63e9


def _device(
    name: str, device_bytes: float, host_bytes: float, flops: float, read: float, link: float
) -> Hardware:
    return Hardware(
        name=name,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        matmul_flops_per_s=flops,
        read_bytes_per_s=read,
        to_device_bytes_per_s=link,
        to_host_bytes_per_s=link,
    )


DEVICES: Mapping[str, Hardware] = MappingProxyType(
    {
        "h100_80gb": _device("h100_80gb", 80 * _GIB, 128e9, 989.4e12, 3.35e12, _PCIE_5),
        "h200_141gb": _device("h200_141gb", 141e9, 128 * _GIB, 989.4e12, 4.8e12, _PCIE_5),
        "t4_16gb": _device("t4_16gb", 16 * _GIB, 208e9, 65e12, 320e9, _PCIE_3),
        "v100_16gb": _device("v100_16gb", 16 * _GIB, 128e9, 125e12, 900e9, _PCIE_3),
        "v100_32gb": _device("v100_32gb", 32 * _GIB, 128e9, 125e12, 900e9, _PCIE_3),
    }
)


def hardware(name: str | os.PathLike) -> Hardware:
    """The device of that name, or the machine whose profile is the file of that name.

    "this_machine" is `this_machine.json` in the current folder; `python -m eval.plan --profile`
    writes it. Raises ValueError, in one sentence, for what is neither, and for a file that is no
    profile.
    """
    name = os.fspath(name)
    if name in DEVICES:
        return DEVICES[name]
    path = Path(PROFILE if name == THIS_MACHINE else name)
    if not path.is_file():
        if name == THIS_MACHINE:
            raise ValueError(f"no {PROFILE} here; make it with python -m eval.plan --profile")
        known = ", ".join((*DEVICES, THIS_MACHINE))
        raise ValueError(f"{name!r} is unknown; known: {known}, or a profile's file")
    try:
        return Hardware(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{name} is no profile: {error}") from None
