"""Gives the tests the rewarm that `make test` installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def prefix() -> Path:
    """The prefix into which install.sh installed the rewarm under test."""
    found = Path(os.environ.get("REWARM_TEST_PREFIX", REPOSITORY / "build" / "prefix"))
    if not (found / "bin" / "rewarm-runc").exists():
        pytest.fail(f"{found} holds no rewarm: run the tests with `make test`, which installs it there")
    return found
