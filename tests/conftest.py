"""Settings of the whole suite: CPU with two virtual devices, strict promotion rules, the test data."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("alisa", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("alisa")

REPOSITORY = Path(__file__).resolve().parent.parent


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
