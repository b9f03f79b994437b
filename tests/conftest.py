"""Gives the tests the rewarm that `make test` installed, and takes back the disk space of those that passed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    which = "those marked `alone`, or those that can run together with others; beside any -m"
    parser.addoption("--only", choices=["alone", "together"], help=f"run only {which}")


@pytest.hookimpl(trylast=True)  # tests/gpu marks its own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if only := config.getoption("--only"):
        others = [item for item in items if (item.get_closest_marker("alone") is None) == (only == "alone")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture
def tmp_path(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A test's directory, which goes with it: all together they have tens of gigabytes. What a failed one had stays.

    pytest's own tmp_path_retention_policy would also empty what a test has left mounted there.
    """
    yield tmp_path
    mounts = (line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    mounted = any(target.startswith(f"{tmp_path}/") for target in mounts)
    if not mounted and not request.node.stash.get(FAILED, False):
        shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def prefix() -> Path:
    """The prefix into which install.sh installed the rewarm under test."""
    found = Path(os.environ.get("REWARM_TEST_PREFIX", REPOSITORY / "build" / "prefix"))
    if not (found / "bin" / "rewarm-runc").exists():
        pytest.fail(f"{found} holds no rewarm: run the tests with `make test`, which installs it there")
    return found
