"""What there is: packages, modules of the project, the device. Standard library alone until `device` imports jax."""

import importlib
import importlib.metadata
import os
import platform
import subprocess
import warnings

from eval.card.records import ROOT

PACKAGES = (
    "jax jaxlib jax-cuda13-plugin jax-cuda12-plugin flax numpy ml_dtypes absl-py optax orbax-checkpoint safetensors "
    "tokenizers tqdm torch triton nvidia-cudnn-cu13 nvidia-cudnn-cu12"
).split()


def packages() -> dict[str, str | None]:
    """Version of each package, or None where it is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def modules() -> dict[str, str | None]:
    """Each module of the project: None where it imports, else why it does not."""
    found = {}
    for top in ("alisa_jax", "pallas_kernels"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = missing(name)
    return found


def missing(name: str) -> str | None:
    """Why the module `name` does not import, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except Exception as wrong:  # of an import anything can come
        return f"{type(wrong).__name__}: {' '.join(str(wrong).split())[:200]}"
    return None


def device() -> dict:
    """The default device of jax, and what says how fast it may be."""
    import jax

    one = jax.devices()[0]
    memory = (one.memory_stats() or {}).get("bytes_limit") if one.platform != "cpu" else None
    return {
        "platform": one.platform,
        "device_kind": one.device_kind,
        "devices": jax.device_count(),
        "compute_capability": str(getattr(one, "compute_capability", "")) or None,
        "multiprocessors": getattr(one, "core_count", None),
        "memory_bytes": memory,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "driver": driver(),
    }


def driver() -> str | None:
    """Name and driver version of the first NVIDIA card as its own tool tells them, or None where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
