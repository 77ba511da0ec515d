"""What tests of several commands share."""

import pytest

from eval import checkouts


@pytest.fixture
def other(tmp_path):
    """A checkout of its own folder, in which all is as here."""
    folder = tmp_path / "before"
    folder.mkdir()
    for name in ("alisa_jax", "pallas_kernels", "configs", "eval"):
        (folder / name).symlink_to(checkouts.ROOT / name)
    return folder
