"""What a measurement ran on: the processor, and how busy the machine was before."""

import hashlib
import os
import platform
from pathlib import Path

from eval.script import common

BUSY = 0.7  # of the load average over a minute


def processor() -> str:
    """Name, family, model and stepping of the processor, and a hash of what it says it can do."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    first = dict(map(str.strip, line.split(":", 1)) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    can = hashlib.sha256(" ".join(sorted(first.get("flags", "").split())).encode()).hexdigest()[:8]
    number = "/".join(first.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return f"{first.get('model name', platform.machine())} {number} {can}"


def load() -> float:
    """How many threads were busy on this machine in the last minute, on average; says so where times will suffer."""
    found = os.getloadavg()[0]
    if found > BUSY:
        common.say(f"other programs are running (load {found:.1f}): times are of no use")
    return found
