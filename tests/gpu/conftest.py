"""The GPU tests' machine, time box and report. Without a GPU the tests are left out, and one line says so.

REWARM_GPU_SECONDS: no test begins after so many. REWARM_GPU_REPORT: a JSON file that is written anew after each test.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from support.gpu import checkpoints as calls
from support.gpu import evidence
from support.gpu.checkpoints import Checkpoints
from support.gpu.fleet import Fleet, Running
from support.gpu.machine import CONTROL, Machine, present
from support.gpu.sources import SOURCES
from support.node import Node
from support.proc import become_subreaper

HERE = Path(__file__).parent
# Those that could leave the GPU in a bad state come last.
ORDER = ("test_cases", "test_served", "test_lifecycle", "test_remap", "test_cgroup", "test_refused", "test_faults")
LONGEST = 150
BEGAN = time.monotonic()
LIMIT = float(os.environ.get("REWARM_GPU_SECONDS", "3600"))
REPORT = os.environ.get("REWARM_GPU_REPORT")

_left_out: list[str] = []
_results: dict[str, dict[str, Any]] = {}


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", file=sys.stderr, flush=True)


def _save() -> None:
    if REPORT:
        path = Path(REPORT)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"seconds": round(time.monotonic() - BEGAN, 1), "tests": _results}, indent=1))
        scratch.replace(path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if HERE in item.path.parents]
    others = [item for item in items if HERE not in item.path.parents]
    if not present():
        _left_out.extend(item.nodeid for item in own)
        config.hook.pytest_deselected(items=own)
        items[:] = others
        return
    own.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else 0)
    items[:] = [*others, *own]
    for item in own:
        item.add_marker("alone")
        _results[item.nodeid] = {"outcome": "not run"}
    _save()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _left_out:
        terminalreporter.write_line(f"tests/gpu: no NVIDIA GPU here (no {CONTROL}): {len(_left_out)} tests not run")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if HERE in item.path.parents and time.monotonic() - BEGAN > LIMIT:
        pytest.skip("not run: time is up")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Ends a test that hangs, also where there is no pytest-timeout."""
    if HERE not in item.path.parents:
        return (yield)
    say(f"begins: {item.name}")

    def hangs(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LONGEST)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if HERE not in item.path.parents:
        return report
    node = getattr(item, "funcargs", {}).get("gpu_node")
    said = ""
    if report.failed and node is not None:
        said = evidence.of(node)
        report.sections.append(("evidence", said))
    if report.failed or report.skipped or report.when == "call":
        entry: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.skipped and isinstance(report.longrepr, tuple):
            entry["why"] = report.longrepr[2]
        if report.failed:
            entry |= {"when": report.when, "why": report.longreprtext[-4000:], "evidence": said}
        earlier = _results.get(item.nodeid, {})
        if earlier.get("outcome") != "failed":
            _results[item.nodeid] = {**entry, **{k: v for k, v in earlier.items() if k == "figures"}}
        last = report.longreprtext.strip().splitlines()[-1:] if report.failed else entry.get("why", "")
        say(f"{report.outcome}: {item.name} ({report.when}, {report.duration:.1f} s) {last or ''}")
        _save()
    return report


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a test measured, for the report."""
    found: dict[str, Any] = {}
    _results.setdefault(request.node.nodeid, {"outcome": "not run"})["figures"] = found
    return found


@pytest.fixture(scope="session")
def gpu_node(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Node]:
    become_subreaper()
    with Node(tmp_path_factory.mktemp("gpu") / "node", prefix) as node:
        yield node


@pytest.fixture(scope="session")
def fleet(gpu_node: Node, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """With the sources of all tests that were chosen on their way up."""
    made = Fleet(gpu_node, Machine.here())
    try:
        wanted = [item.callspec.params.get("source") for item in request.session.items if hasattr(item, "callspec")]
        for name in dict.fromkeys(wanted):
            if name in SOURCES and SOURCES[name].early:
                start(made, name)
        say(f"{len(made.running)} containers are starting")
        yield made
    finally:
        made.close()


def start(fleet: Fleet, name: str) -> Running:
    source = SOURCES[name]
    # There is no such snapshot yet: it starts cold.
    snapshot = name if source.served else None
    return fleet.start(f"source-{name}", source.case, env=source.env, change=source.change, snapshot=snapshot)


@pytest.fixture
def source(request: pytest.FixtureRequest, fleet: Fleet) -> Iterator[Running]:
    """The container of that name in SOURCES, ready; it and all that the test started are gone afterwards."""
    name = request.param
    known = {running.name: running for running in fleet.running}
    running = known.get(f"source-{name}") or start(fleet, name)
    before = set(known)
    running.wait_ready()
    try:
        yield running
    finally:
        for other in reversed(fleet.running):
            if other is running or other.name not in before:
                other.stop()


@pytest.fixture(scope="session")
def checkpoints() -> Checkpoints:
    """The driver, asked by the test itself."""
    return calls.here()


@pytest.fixture
def card() -> None:
    """For a test that makes no sense with the stand-in."""
    if Machine.here().fake:
        pytest.skip("not run: it needs a real GPU")
