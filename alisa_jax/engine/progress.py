"""Progress bars of runs."""

from __future__ import annotations

from tqdm import tqdm


def progress_bar(progress: bool, total: int, label: str) -> tqdm:
    """A progress bar on stderr: only when wanted, and silent when stderr is not a terminal."""
    return tqdm(
        total=total, desc=label, unit="token", disable=None if progress else True, leave=False
    )
