"""The rates of a machine by name, and bytes as people write them. What is wrong raises UserError with one sentence."""

from alisa_jax.placement import bytes_text as spelling
from alisa_jax.placement.modelled import devices
from alisa_jax.placement.modelled.cost import Hardware
from eval.script.common import UserError

THIS_MACHINE = devices.PROFILE  # what --profile writes by default, and what --hardware=this_machine reads
bytes_text = spelling.as_text


def hardware(name: str) -> Hardware:
    """The device called `name`, or a file that --profile wrote."""
    try:
        return devices.hardware(name)
    except ValueError as error:
        raise UserError(f"--hardware: {error}") from None


def read_bytes(text: str, dense_kv_bytes: float, flag: str) -> float:
    """'2GB', '512MiB' and '1000' in bytes; '0.33x' times `dense_kv_bytes`."""
    try:
        return spelling.read_bytes(text, dense_kv_bytes, f"{flag}: ")
    except ValueError as error:
        raise UserError(str(error)) from None
