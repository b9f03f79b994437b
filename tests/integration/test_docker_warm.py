"""Docker 24 and newer hand annotations to the runtime: its containers start warm. Debian 13's daemon, unpacked beside
the machine's where that is older."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import counter, proc, rootfs
from support.docker import Docker
from support.leftovers import Leftovers
from support.node import Node

pytestmark = pytest.mark.alone

PROGRAM = ("python3", "-c", counter.PROGRAM)
ENVIRONMENT = {"PYTHONHASHSEED": "0"}


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """In place of the one around each test: the engine lasts as long as this file, with its cgroups and mounts."""
    before = Leftovers.now()
    yield
    before.check()


@pytest.fixture(scope="module")
def docker(nothing_left_behind: None, tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Docker]:
    """One engine for this file: it takes seconds to start and to import its image."""
    with (
        Node(tmp_path_factory.mktemp("docker") / "node", prefix) as node,
        Docker(node, program=rootfs.dockerd()) as engine,
    ):
        assert engine.annotations
        yield engine


@pytest.fixture(scope="module")
def captured(docker: Docker) -> bytes:
    """What the source of the snapshot `counter` had printed when it was captured."""
    with docker.annotated(PROGRAM, asks("counter"), env=ENVIRONMENT) as source:
        proc.wait_for("the source counting", lambda: b"\n2 " in docker.api.logs(source))
        assert outcome(docker, source)["outcome"] == "cold"
        docker.node.rewarm("capture", source[:12], "--name", "counter", "--stop")
        assert docker.api.wait(source)["StatusCode"] == 137
        said: bytes = docker.api.logs(source, stderr=False)
        return said


def asks(snapshot: str) -> dict[str, str]:
    return {"rewarm.dev/snapshot": snapshot}


def outcome(docker: Docker, container: str) -> dict[str, Any]:
    return docker.node.outcome(container, docker.runc_root)


def counted(log: bytes) -> list[list[str]]:
    """Number and digest of its memory, of each line that it counted."""
    return [line.split() for line in log.decode().splitlines() if line[:1].isdigit()]


def test_it_counts_on(docker: Docker, captured: bytes) -> None:
    with docker.annotated(PROGRAM, asks("counter"), env=ENVIRONMENT) as warm:
        assert outcome(docker, warm)["outcome"] == "warm"
        proc.wait_for("it counting", lambda: len(counted(docker.api.logs(warm, stderr=False))) > 2)
        lines = counted(docker.api.logs(warm, stderr=False))
        assert int(lines[0][0]) > int(counted(captured)[-1][0]) - 1 >= 2, "it counts on, not from the start"
        assert {line[1] for line in lines} == {line[1] for line in counted(captured)}, "its memory is the source's"
        proc.wait_for("a line on standard error", lambda: b"to stderr" in docker.api.logs(warm, stdout=False))
        assert execute(docker, warm, "cat /var/lib/counter/state") == b"kept\n", "what the source had written is there"
        docker.api.pause(warm)
        docker.api.unpause(warm)
        docker.api.stop(warm, timeout=20)
        assert docker.api.wait(warm)["StatusCode"] == 7, "the program's own answer to SIGTERM"


def test_restarted_by_hand(docker: Docker, captured: bytes) -> None:
    """There is nothing to lose: it has just the files of the snapshot."""
    with docker.annotated(PROGRAM, asks("counter"), env=ENVIRONMENT) as made:
        docker.api.restart(made, timeout=20)
        assert outcome(docker, made)["outcome"] == "warm"
        before = len(counted(docker.api.logs(made, stderr=False)))  # of the first run as well
        proc.wait_for("it counting", lambda: len(counted(docker.api.logs(made, stderr=False))) > before + 2)
        assert execute(docker, made, "cat /var/lib/counter/state") == b"kept\n"


def test_started_again_with_files_of_its_own(docker: Docker, captured: bytes) -> None:
    """A database, say, that it wrote to since: never back to the state of the snapshot."""
    with docker.annotated(PROGRAM, asks("counter"), env=ENVIRONMENT) as made:
        # From the beginning the program needs the file that it deletes then.
        execute(docker, made, "echo written since >>/etc/issue; touch /etc/debian_version")
        docker.api.restart(made, timeout=20)
        found = outcome(docker, made)
        assert found["outcome"] == "cold"
        assert "etc/issue: the container has its own there" in found["reason"]
        proc.wait_for("a start from the beginning", lambda: b"ready\n" in docker.api.logs(made))
        assert b"written since\n" in execute(docker, made, "cat /etc/issue")


def test_restarted_after_a_crash(docker: Docker, captured: bytes) -> None:
    policy = {"restart_policy": {"Name": "on-failure", "MaximumRetryCount": 3}}
    with docker.annotated(PROGRAM, asks("counter"), env=ENVIRONMENT, host=policy) as made:
        first = docker.inspect(made)["State"]["Pid"]
        os.kill(first, signal.SIGKILL)
        proc.wait_for("it running again", lambda: docker.inspect(made)["State"]["Pid"] not in (0, first))
        assert docker.inspect(made)["RestartCount"] == 1
        assert outcome(docker, made)["outcome"] == "warm"


def test_a_health_check(docker: Docker, captured: bytes) -> None:
    """dockerd executes it in the container, as `docker exec` would."""
    check = {"test": ["CMD-SHELL", "grep -q kept /var/lib/counter/state"], "interval": 1_000_000_000}
    with docker.annotated(PROGRAM, asks("counter"), env=ENVIRONMENT, healthcheck=check) as made:
        assert outcome(docker, made)["outcome"] == "warm"
        proc.wait_for("health", lambda: docker.inspect(made)["State"]["Health"]["Status"] == "healthy")


def test_another_image(docker: Docker, captured: bytes) -> None:
    """Docker gives the runtime no name of it: it is told by its layers."""
    with docker.annotated(["sh", "-c", "echo other >/usr/bin/other"], {}, env=ENVIRONMENT) as changed:
        assert docker.api.wait(changed)["StatusCode"] == 0
        docker.api.commit(changed, repository="rewarm.test/other", tag="1")
    with docker.annotated(PROGRAM, asks("counter"), env=ENVIRONMENT, image="rewarm.test/other:1") as made:
        found = outcome(docker, made)
        assert found["outcome"] == "cold"
        assert "snapshot was taken of another image" in found["reason"], found


def execute(docker: Docker, container: str, script: str) -> bytes:
    """`docker exec`, by sh: what it printed."""
    made = docker.api.exec_create(container, ["sh", "-c", script])
    said: bytes = docker.api.exec_start(made)
    assert docker.api.exec_inspect(made)["ExitCode"] == 0, said
    return said
