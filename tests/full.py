"""What CI runs of the whole matrices of cases: a sample, drawn anew at every run; `make test-full` runs all.

`@pytest.mark.full(sample=2)` keeps two cases of a parametrized test, `@pytest.mark.full(sample=1, per="policy")` one for
each value of the parameter `policy` (`per=("policy", "codec")`: few that hold one for each value of either), and a bare
`@pytest.mark.full` leaves a test out; `--full` runs everything, and so does naming a test by hand (`FILE::TEST`).

What is drawn hangs on the seed, the file's name and the names of the cases alone. So equal cases of the tests of one file
are kept together and share their runs, a file alone gives what it gives in the whole suite, and every worker collects the
same: the seed is `ALISA_TEST_SEED`, or, drawn once, put there before workers are started.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import secrets
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import pytest

SEED = "ALISA_TEST_SEED"
VERSIONS = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "lm_eval")
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed", "deselected")


def seed() -> int:
    """That of this run: of the cases that are kept, and of the inputs of tests that draw theirs anew."""
    if not os.environ.get(SEED):
        os.environ[SEED] = str(secrets.randbits(32))
    return int(os.environ[SEED])


def kept(cases: Sequence[str], sample: int, values: Sequence[tuple[Hashable, ...]], drawn: str) -> set[int]:
    """The indices of the cases to keep: `sample` of all, or as many for each of the values that cases have in each column.

    `drawn` and a case's name say how early its turn comes. With columns, the case that is still needed for the most values
    comes first.
    """
    turn = sorted(range(len(cases)), key=lambda i: hashlib.sha256(f"{drawn} {cases[i]}".encode()).digest())
    columns = len(values[0]) if values else 0
    if sample <= 0 or not columns:
        return set(turn[: max(sample, 0)])
    needed: dict[tuple[int, Hashable], int] = {}
    for row in values:
        for value in enumerate(row):
            needed[value] = min(needed.get(value, 0) + 1, sample)
    found: set[int] = set()
    while any(needed.values()):
        best = max((i for i in turn if i not in found), key=lambda i: sum(needed[v] > 0 for v in enumerate(values[i])))
        found.add(best)
        for value in enumerate(values[best]):
            needed[value] = max(0, needed[value] - 1)
    return found


def by_hand(args: Sequence[str]) -> Callable[[str], bool]:
    """Whether the arguments of pytest name a test, and not only its file or folder."""
    named = [(Path(file).name, test) for file, _, test in (arg.partition("::") for arg in args) if test]

    def is_named(nodeid: str) -> bool:
        file, _, test = nodeid.partition("::")
        return any(Path(file).name == name and test.startswith(start) for name, start in named)

    return is_named


def asked(sample: int = 0, per: str | tuple[str, ...] = ()) -> tuple[int, tuple[str, ...]]:
    """The arguments of the marker."""
    return sample, (per,) if isinstance(per, str) else tuple(per)


def left_out(items: list[pytest.Item], args: Sequence[str], drawn: int) -> list[pytest.Item]:
    """Those of the collected tests that a run without `--full` does not run."""
    is_named, groups = by_hand(args), {}
    for item in items:
        marker = item.get_closest_marker("full")
        if marker is not None and not is_named(item.nodeid):
            key = item.nodeid.partition("[")[0], asked(*marker.args, **marker.kwargs)
            groups.setdefault(key, []).append(item)
    out: list[pytest.Item] = []
    for (name, (sample, per)), group in groups.items():
        cases = [item.nodeid.partition("[")[2] for item in group]
        values = [tuple(str(item.callspec.params[one]) for one in per) for item in group]
        keep = kept(cases, sample, values, f"{drawn} {Path(name.partition('::')[0]).name}")
        out += [item for i, item in enumerate(group) if i not in keep]
    return out


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run every case, also those that CI draws a sample of")
    parser.addoption("--full-summary", metavar="FILE", help="write versions, counts and seconds of the run to FILE")


def pytest_sessionstart(session):
    session.config.stash[STARTED] = time.monotonic()


STARTED = pytest.StashKey[float]()


def pytest_report_header(config):
    return f"{SEED}={seed()}"


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    out = left_out(items, config.args, seed())
    if out:
        config.hook.pytest_deselected(items=out)
        gone = set(out)
        items[:] = [item for item in items if item not in gone]


def pytest_terminal_summary(terminalreporter, config):
    """Names the seed where the header is not shown, and writes the summary."""
    terminalreporter.write_line(f"{SEED}={seed()} gives these cases and inputs again")
    file = config.getoption("--full-summary")
    if file:
        counts = [(len(terminalreporter.stats.get(name, ())), name) for name in OUTCOMES]
        seconds = time.monotonic() - config.stash[STARTED]
        Path(file).write_text(summary(counts, seconds, config.getoption("--full")), encoding="utf-8")


def summary(counts: Sequence[tuple[int, str]], seconds: float, full: bool) -> str:
    """What a run was, for people: when, with what, how it ended and how long it took."""
    found = {d.metadata["Name"].lower().replace("-", "_"): d.version for d in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {found[name]}" for name in VERSIONS if name in found)
    return (
        f"# {'Every case of the suite' if full else 'The suite as CI runs it'}\n\n"
        f"Run on {datetime.date.today():%Y-%m-%d} with Python {platform.python_version()}, {versions}, "
        f"on {os.cpu_count()} cores of {platform.machine()}, {SEED}={seed()}.\n\n"
        f"{', '.join(f'{count} {name}' for count, name in counts if count) or 'no tests'} in {seconds:.0f} s.\n"
    )
