"""Settings of the whole suite: CPU with two virtual devices, quick compilation, strict promotion rules, the test data.

Nearly all the time of the tests is XLA's. So LLVM does not optimise programs that run for a few steps (XLA's own passes all
run; the fixture `optimised` asks for both), and a program that one process of a run has compiled is not compiled by another:
the workers of xdist and the commands that tests start share a folder of them, which is removed at the end of the run.
On Python 3.11 fusions are compiled by XLA's older emitters, which take a third less time; on the newer Pythons by those that
users get.

Of what is marked `full` a sample is run, see `tests/full.py`.

A module's programs are freed at its end: each is many maps of memory, and a process that has more than the system allows
(65,530 by default) dies.
"""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
if "xla_cpu_parallel_codegen_split_count" not in os.environ["XLA_FLAGS"]:  # small programs: one piece each is less work
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
if sys.version_info < (3, 12) and "xla_backend_extra_options" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
if "PYTEST_XDIST_WORKER" not in os.environ:  # its workers inherit the folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="alisa-jax-compiled-")
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # in the commands that tests start as well

import hypothesis
import jax
import pytest

from tests.full import (  # noqa: F401  (hooks of pytest)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_report_header,
    pytest_sessionstart,
    pytest_terminal_summary,
    seed,
)

seed()  # before workers are started
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("alisa", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("alisa")
gc.set_threshold(20_000, 20, 20)  # tracing makes many objects and little garbage

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    # An entry that another process is just writing: the program is compiled here as well.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry:UserWarning")


def pytest_unconfigure(config):
    gc.freeze()  # pytest collects garbage five times when all is over
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module():
    """What a module compiles is freed when it ends; long-lived objects are not looked at by each collection of garbage."""
    gc.freeze()
    yield
    jax.clear_caches()
    gc.unfreeze()
    gc.collect()


@pytest.fixture
def optimised():
    """What a test with this fixture compiles is compiled as for a user, with all of LLVM's optimisations."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of shared test data: ALISA_TEST_DATA, by default ../shared/data beside the repository."""
    folder = Path(os.environ.get("ALISA_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no test data: set ALISA_TEST_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def stories(test_data: Path) -> Path:
    """The folder of stories260K, a small trained LLaMA model in the Hugging Face layout."""
    folder = test_data / "stories260K"
    if not folder.is_dir():
        pytest.skip("the test data holds no stories260K folder")
    return folder
