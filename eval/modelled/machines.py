"""The rates of a machine by name, and bytes as people write them. What is wrong raises UserError with one sentence."""

import json
import math
import runpy
from pathlib import Path

from alisa_jax.placement import bytes_text as spelling
from alisa_jax.placement.modelled.cost import Hardware
from eval.script.common import UserError

HARDWARE = Path(__file__).resolve().parents[2] / "configs" / "hardware"
THIS_MACHINE = "this_machine.json"  # what --profile writes by default, and what --hardware=this_machine reads


def hardware(name: str) -> Hardware:
    """The page of configs/hardware called `name`, or a file that --profile wrote."""
    known = sorted(path.stem for path in HARDWARE.glob("*.py"))
    if name in known:
        return runpy.run_path(str(HARDWARE / f"{name}.py"))["HARDWARE"]
    path = Path(THIS_MACHINE if name == "this_machine" else name)
    if not path.is_file():
        if name == "this_machine":
            raise UserError(f"--hardware: no {THIS_MACHINE} here; make it with python -m eval.plan --profile")
        raise UserError(
            f"--hardware: {name!r} is unknown; known: {', '.join(known)}, this_machine, or a profile's file"
        )
    try:
        return Hardware(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--hardware: {name} is no profile: {error}") from None


def read_bytes(text: str, dense_kv_bytes: float, flag: str) -> float:
    """'2GB', '512MiB' and '1000' in bytes; '0.33x' times `dense_kv_bytes`."""
    try:
        return spelling.read_bytes(text, dense_kv_bytes, f"{flag}: ")
    except ValueError as error:
        raise UserError(str(error)) from None


def bytes_text(number: float) -> str:
    """Bytes as a table shows them; "any" for no limit."""
    if not math.isfinite(number):
        return "any"
    unit = next((u for u in ("TiB", "GiB", "MiB", "KiB") if number >= spelling.UNITS[u]), "B")
    return f"{number / spelling.UNITS[unit]:.2f} {unit}"
