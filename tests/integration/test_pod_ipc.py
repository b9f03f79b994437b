"""System V IPC in pods, whose containers share one IPC namespace that outlives each of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import image
from support.leftovers import Leftovers
from support.pods import KubeNode, Pod
from support.proc import wait_for

pytestmark = pytest.mark.alone

CAPTURE = {"rewarm.dev/capture": "on-ready", "rewarm.dev/container": "server"}
LIBRARY = """
import ctypes, os, struct, time
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
"""
READY = """
if os.path.isdir('/run/rewarm'):
    open('/run/rewarm/ready', 'w').close()
while True:
    print(said(), flush=True)
    time.sleep(0.1)
"""
# IPC_CREAT is 0o1000, SETVAL 16, GETVAL 12.
OBJECTS = """
segment = libc.shmget(4242, 10000, 0o1600)
memory = libc.shmat(segment, None, 0)
queue, semaphores = libc.msgget(77, 0o1640), libc.semget(78, 3, 0o1600)
ctypes.memmove(memory, b'mine', 4)
libc.semctl(semaphores, 2, 16, 7)
libc.msgsnd(queue, struct.pack('l5s', 1, b'hello'), 5, 0o4000)
def said():
    found = [libc.shmget(4242, 0, 0), libc.msgget(77, 0), libc.semget(78, 0, 0)] == [segment, queue, semaphores]
    return 'objects', ctypes.string_at(memory, 4), found, libc.semctl(semaphores, 2, 12)
"""
OBJECTS_SAID = "('objects', b'mine', True, 7)"
SYSCTLS = """
def said():
    return 'sysctls', *(open(f'/proc/sys/{one}').read().split() for one in ('kernel/shm_rmid_forced', 'kernel/sem',
                                                                          'kernel/msgmax', 'kernel/shmmax'))
"""
SEMAPHORES = """
semaphores = libc.semget(555, 1, 0o1600)
libc.semctl(semaphores, 0, 16, 5)
def said():
    return 'semaphores', libc.semget(555, 0, 0) == semaphores, libc.semctl(semaphores, 0, 12)
"""
SEGMENT = """
segment = libc.shmget({key}, 4096, 0o1600)
memory = libc.shmat(segment, None, 0)
ctypes.memmove(memory, b'{text}', 5)
def said():
    return 'segment', ctypes.string_at(memory, 5), libc.shmget({key}, 0, 0) == segment
"""
SHARED_FILE = """
kept = open('/dev/shm/{name}', 'w+')
kept.write('mine')
kept.flush()
def said():
    return 'file', open('/dev/shm/{name}').read()
"""
NOTHING = """
def said():
    return 'nothing'
"""


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[KubeNode]:
    before = Leftovers.now()
    with KubeNode(tmp_path_factory.mktemp("kube"), prefix) as made:
        made.import_image(image.workload("pod_server")[0])
        yield made
    before.check()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """The node of the module is looked at at its end."""


@pytest.fixture
def clean(kube: KubeNode) -> Iterator[KubeNode]:
    yield kube
    kube.remove_all()


def pod(kube: KubeNode, name: str, **more: Any) -> Pod:
    return kube.pod(name, annotations={**CAPTURE, "rewarm.dev/snapshot": name}, **more)


def container(kube: KubeNode, pod: Pod, setup: str, name: str = "server", attempt: int = 0, **more: Any) -> str:
    args = ["python3", "-u", "-c", LIBRARY + setup + READY]
    return kube.container(pod, name, image.workload("pod_server")[1], args, attempt=attempt, **more)


def captured(kube: KubeNode, name: str, setup: str, **more: Any) -> None:
    """A snapshot of a program alone in its pod, which is gone then."""
    source = pod(kube, name, **more)
    kube.wait_captured(container(kube, source, setup))
    kube.remove(source)


def outcome(kube: KubeNode, one: str) -> str:
    found = kube.outcome(one)
    return f"{found['outcome']} {found.get('reason', '')}".strip()


def wait_said(kube: KubeNode, pod: Pod, text: str, name: str = "server", attempt: int = 0) -> None:
    wait_for(f"{text} in the log", lambda: text in kube.log(pod, name, attempt).splitlines()[-1:])


def crash(kube: KubeNode, one: str) -> None:
    os.kill(kube.pid(one), signal.SIGKILL)
    kube.wait_exited(one)


def test_the_sysctls_are_the_new_pods(clean: KubeNode) -> None:
    captured(clean, "sysctls", SYSCTLS)
    own = {"kernel.shm_rmid_forced": "1", "kernel.sem": "100 3200 10 20", "kernel.msgmax": "12345"}
    replica = pod(clean, "sysctls", sysctls={**own, "kernel.shmmax": "1000000"})
    assert outcome(clean, container(clean, replica, SYSCTLS)) == "warm"
    wait_said(clean, replica, "('sysctls', ['1'], ['100', '3200', '10', '20'], ['12345'], ['1000000'])")


def test_objects_of_a_container_that_crashed_are_replaced(clean: KubeNode) -> None:
    captured(clean, "objects", OBJECTS)
    replica = pod(clean, "objects")
    for attempt in range(3):
        one = container(clean, replica, OBJECTS, attempt=attempt)
        assert outcome(clean, one) == "warm"
        wait_said(clean, replica, OBJECTS_SAID, attempt=attempt)
        crash(clean, one)


def test_a_failed_restore_leaves_none(clean: KubeNode) -> None:
    """CRIU has made them when it misses a file of a volume."""
    setup = "open('/cache/kept', 'w').write('x')\nkept = open('/cache/kept')\n"
    # With IPC_EXCL: what the restore had left would be in the way.
    setup += OBJECTS.replace("0o16", "0o36")
    captured(clean, "failed", setup)
    replica = pod(clean, "failed")
    found = outcome(clean, container(clean, replica, setup))
    assert found.startswith("cold ") and "cache/kept" in found, found
    wait_said(clean, replica, OBJECTS_SAID)


def test_semaphores_of_who_used_them_last(clean: KubeNode) -> None:
    """Beside a container that has nothing to do with them the snapshot has them, and the other's has not."""
    for turn in ("cold", "warm"):
        both = pod(clean, "semaphores")
        side = container(clean, both, NOTHING, "side")
        server = container(clean, both, SEMAPHORES)
        assert outcome(clean, server).startswith(turn)
        wait_said(clean, both, "('semaphores', True, 5)")
        if turn == "cold":
            clean.wait_captured(server)
            done = clean.node.rewarm("capture", side, "--name", "side", check=False)
            assert done.returncode == 1 and "who uses semaphores 0 (key 0x22b) cannot be told" in done.stderr, (
                done.stderr
            )
        else:
            crash(clean, server)
            again = container(clean, both, SEMAPHORES, attempt=1)
            found = outcome(clean, again)
            assert found.startswith("cold ") and "it is in the IPC namespace already" in found, found
            assert "of another container" in found and "python3" in found
        clean.remove(both)


def test_shared_memory_of_others_is_not_carried(clean: KubeNode) -> None:
    theirs, own = SEGMENT.format(key=31, text="other"), SEGMENT.format(key=32, text="mine.")
    both = pod(clean, "segments")
    side = container(clean, both, theirs, "side")
    wait_said(clean, both, "('segment', b'other', True)", "side")
    clean.wait_captured(container(clean, both, own))
    clean.remove(both)
    both = pod(clean, "segments")
    side = container(clean, both, NOTHING, "side")
    assert outcome(clean, container(clean, both, own)) == "warm"
    wait_said(clean, both, "('segment', b'mine.', True)")
    keys = clean.exec(side, "cat", "/proc/sysvipc/shm").splitlines()[1:]
    assert [line.split()[0] for line in keys] == ["32"]


def test_the_nodes_ipc(clean: KubeNode) -> None:
    """With `hostIPC` /dev/shm is the node's own."""
    own, other = (Path("/dev/shm", f"rewarm-test-{os.getpid()}-{kind}") for kind in ("own", "other"))
    setup = SHARED_FILE.format(name=own.name)
    other.write_text("secret")
    try:
        captured(clean, "host", setup, host_ipc=True)
        own.unlink()
        other.unlink()
        replica = pod(clean, "host", host_ipc=True)
        assert outcome(clean, container(clean, replica, setup)) == "warm"
        wait_said(clean, replica, "('file', 'mine')")
        assert not other.exists(), "a file of another program was carried"
    finally:
        own.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
