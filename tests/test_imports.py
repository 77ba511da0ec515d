"""Every module imports, and the kernels do where only jax and what jax needs are installed."""

import importlib
import pkgutil
import subprocess
import sys

import alisa_jax
import pallas_kernels

WITH_EXTRAS = ("alisa_jax.lm_eval",)  # inherits from lm_eval, which is an extra
ALONE = """
import importlib, importlib.metadata, sys
JAX = {"jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "scipy"}
barred = {"alisa_jax", *importlib.metadata.packages_distributions()} - JAX - {"pallas_kernels"}
assert "flax" in barred and "absl" in barred
sys.modules |= dict.fromkeys(barred)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def modules(package) -> list[str]:
    """The names of all modules of a package, itself first."""
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [package.__name__, *(module.name for module in found)]


def test_every_module_imports():
    names = [*modules(alisa_jax), *modules(pallas_kernels)]
    assert {"alisa_jax.lm_eval", "alisa_jax.models.decoder", "pallas_kernels.backend"} <= set(names)
    for name in names:
        if not name.startswith(WITH_EXTRAS):
            importlib.import_module(name)


def test_kernels_import_with_jax_and_its_dependencies_alone():
    """As on a bare machine: each other package that is installed here is barred."""
    command = [sys.executable, "-W", "error", "-c", ALONE, *modules(pallas_kernels)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
