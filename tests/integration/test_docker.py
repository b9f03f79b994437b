"""docker as the engine: rewarm is one of its runtimes, and its containers are captured by the short id it prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from testcontainers.core.container import DockerContainer

from support import counter, proc
from support.docker import Docker
from support.leftovers import Leftovers
from support.node import Node

pytestmark = pytest.mark.alone

PROGRAM = ("python3", "-c", counter.PROGRAM)
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
SNAPSHOT = {"rewarm.dev/snapshot": "counter"}


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """In place of the one around each test: the engine lasts as long as this file, with its cgroups and mounts."""
    before = Leftovers.now()
    yield
    before.check()


@pytest.fixture(scope="module")
def docker(nothing_left_behind: None, tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Docker]:
    """One engine for this file: it takes seconds to start and to import its image."""
    with Node(tmp_path_factory.mktemp("docker") / "node", prefix) as node, Docker(node) as engine:
        yield engine


@pytest.fixture
def running(docker: Docker) -> Iterator[DockerContainer]:
    with docker.container(PROGRAM, env=ENVIRONMENT) as made:
        proc.wait_for("the program counting", lambda: b"\n2 " in made.get_logs()[0])
        yield made


def test_a_container_runs(docker: Docker, running: DockerContainer) -> None:
    inspected = docker.inspect(running.get_container_id())
    assert (inspected["HostConfig"]["Runtime"], inspected["Driver"]) == ("rewarm", "overlay2")
    assert docker.under_rewarm(inspected["Id"]), "the name in daemon.json led to rewarm-runc"
    assert (docker.runc_root / inspected["Id"] / "state.json").exists()
    stdout, _stderr = running.get_logs()
    assert stdout.startswith(b"ready\n")
    proc.wait_for("a line on standard error", lambda: b"to stderr" in running.get_logs()[1])
    assert running.exec(["cat", "/var/lib/counter/state"]) == (0, b"kept\n")
    assert running.exec(["sh", "-c", "exit 5"]).exit_code == 5
    wrapped = running.get_wrapped_container()
    wrapped.stop(timeout=20)
    assert wrapped.wait()["StatusCode"] == 7, "the program's own answer to SIGTERM"


def test_the_daemons_network(docker: Docker) -> None:
    """`host` is the engine's namespace: docker hands it to the runtime by its path."""
    with docker.container(
        ["python3", "-c", "import os; print(os.readlink('/proc/self/ns/net'))"], network="host"
    ) as it:
        wrapped = it.get_wrapped_container()
        assert wrapped.wait()["StatusCode"] == 0
        assert re.fullmatch(rb"net:\[\d+\]\n", it.get_logs()[0])


def test_exit_code_of_a_failing_program(docker: Docker) -> None:
    with docker.container(["sh", "-c", "echo said >&2; exit 42"]) as made:
        assert made.get_wrapped_container().wait()["StatusCode"] == 42
        assert made.get_logs() == (b"", b"said\n")


def test_a_program_that_is_not_there(docker: Docker) -> None:
    with pytest.raises(Exception, match="/no/such/program"), docker.container(["/no/such/program"]):
        pytest.fail("docker started it")


def test_capture_by_short_id(docker: Docker, running: DockerContainer) -> None:
    node = docker.node
    identifier = running.get_container_id()
    node.rewarm("capture", identifier[:12], "--name", "short")
    found = node.json("inspect", "short")
    assert found["source"]["container"] == identifier
    assert found["source"]["runtime_root"] == str(docker.runc_root)
    node.rewarm("verify", "short")
    seen = _last(running)
    proc.wait_for("the source counting on", lambda: _last(running) > seen)
    assert docker.inspect(identifier)["State"]["Running"]


def test_capture_and_stop(docker: Docker, running: DockerContainer) -> None:
    docker.node.rewarm("capture", running.get_container_id()[:12], "--name", "stopped", "--stop")
    docker.node.rewarm("verify", "stopped")
    assert running.get_wrapped_container().wait()["StatusCode"] == 137


def test_annotations_are_dropped_or_handed_on(docker: Docker) -> None:
    """Docker before 24, as Debian 12's, drops them without a word: its container is plain runc's. What newer ones do
    with them is in test_docker_warm.py."""
    with docker.annotated(PROGRAM, SNAPSHOT, env=ENVIRONMENT) as made:
        proc.wait_for("it counting", lambda: b"\n2 " in docker.api.logs(made))
        assert docker.node.container_directory(made, docker.runc_root).exists() == docker.annotations


def _counted(log: bytes) -> list[str]:
    return [line for line in log.decode().splitlines() if line[:1].isdigit()]


def _last(made: DockerContainer) -> int:
    return int(_counted(made.get_logs()[0])[-1].split()[0])
