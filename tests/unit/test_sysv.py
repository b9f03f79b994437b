"""IPC namespaces that are there: listed, read, and what stands in the way of a restore removed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rewarm import sysv
from rewarm.oci import ipc as oci_ipc
from rewarm.oci import pod
from rewarm.sysv import MSG, SEM, SHM, Object
from rewarm_native import ipc

PROGRAM = """
import ctypes, struct, time
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
held, free = libc.shmget(41, 4096, 0o1600), libc.shmget(0, 4096, 0o1600)
libc.shmat(held, None, 0)
queue, used, unused = libc.msgget(-42, 0o1600), libc.semget(43, 3, 0o1600), libc.semget(44, 1, 0o1600)
libc.msgsnd(queue, struct.pack('l5s', 1, b'hello'), 5, 0)
libc.semctl(used, 1, 16, 7)
open('/proc/sys/kernel/msgmax', 'w').write('9999')
print(held, free, queue, used, unused, flush=True)
time.sleep(60)
"""


@pytest.fixture
def other() -> Iterator[tuple[int, list[int]]]:
    """A process in a namespace of its own, and the ids of what is in it."""
    args = ["unshare", "--ipc", sys.executable, "-c", PROGRAM]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.pid, [int(word) for word in process.stdout.readline().split()]
        finally:
            process.kill()


def test_what_is_there(other: tuple[int, list[int]]) -> None:
    pid, (held, free, queue, used, unused) = other
    before = os.readlink("/proc/self/ns/ipc")
    with sysv.namespace(f"/proc/{pid}/ns/ipc") as there:
        found = there.objects()
        assert found == [
            Object(SHM, 41, held, 1, frozenset({pid})),
            Object(SHM, 0, free, 0, frozenset({pid})),
            Object(MSG, 2**32 - 42, queue, 0, frozenset({pid})),
            Object(SEM, 43, used),
            Object(SEM, 44, unused),
        ]
        assert [there.users(one) for one in found[2:]] == [{pid}, {pid}, set()]
        assert there.users(Object(SEM, 0, 99)) == there.users(Object(MSG, 0, 99)) == set()
        assert there.processes() == [pid]
        assert there.sysctls()["msgmax"] == [9999] and len(there.sysctls()["sem"]) == 4
    assert os.readlink("/proc/self/ns/ipc") == before
    assert str(found[0]) == f"shared memory {held} (key 0x29)" and str(found[1]) == f"shared memory {free}"


def test_a_new_one_has_what_nobody_has_changed(other: tuple[int, list[int]]) -> None:
    with sysv.namespace("") as there:
        assert there.objects() == [] and there.processes() == []
        assert there.sysctls()["msgmax"] == [8192]


def test_very_many() -> None:
    program = "import ctypes, time; [ctypes.CDLL(None).semget(0, 1, 0o600) for _ in range(300)]; print(flush=True); "
    args = ["unshare", "--ipc", sys.executable, "-c", program + "time.sleep(60)"]
    with subprocess.Popen(args, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            with sysv.namespace(f"/proc/{process.pid}/ns/ipc") as there:
                assert len({one.id for one in there.objects()}) == 300
        finally:
            process.kill()


def test_what_is_in_the_way() -> None:
    wanted = [Object(SEM, 7, 3), Object(SEM, 0, 4)]
    assert sysv.in_the_way([Object(SEM, 7, 9), Object(SEM, 8, 3 + (5 << 15)), Object(SEM, 0, 4)], wanted) == [
        Object(SEM, 7, 9),
        Object(SEM, 8, 3 + (5 << 15)),
        Object(SEM, 0, 4),
    ]
    assert sysv.in_the_way([Object(SHM, 7, 3), Object(SEM, 0, 5), Object(SEM, 8, 6)], wanted) == []


def test_it_is_removed_unless_it_is_attached(other: tuple[int, list[int]]) -> None:
    pid, (held, free, queue, used, unused) = other
    path = f"/proc/{pid}/ns/ipc"
    wanted = [Object(SHM, 0, free), Object(MSG, 2**32 - 42, 77), Object(SEM, 99, used)]
    assert sysv.planned(path, []) == {} and sysv.clear({}) is None
    plan = sysv.planned(path, wanted)
    assert sysv.clear({**plan, "namespace": "1:1"}) is None, "another namespace has the path by now"
    with sysv.namespace(path) as there:
        assert len(there.objects()) == 5
    assert sysv.clear(plan) is None
    with sysv.namespace(path) as there:
        attached = Object(SHM, 41, held, 1, frozenset({pid}))
        assert there.objects() == [attached, Object(SEM, 44, unused)]
        assert there.remove(Object(SEM, 45, unused)), "with another key it is another's"
        assert len(there.objects()) == 2
    assert sysv.clear(sysv.planned(path, [Object(SHM, 41, 5)])) == attached
    assert sysv.clear({**plan, "path": "/proc/4194305/ns/ipc"}) is None
    assert queue >= 0


MADE = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
if os.fork() == 0:
    libc.shmget(0, 4096, 0o1600)
    libc.msgsnd(libc.msgget(0, 0o1600), struct.pack('l5s', 1, b'hello'), 5, 0)
    libc.semctl(libc.semget(0, 1, 0o1600), 0, 16, 7)
    os._exit(0)
os.wait()
print(flush=True)
sys.stdin.read()
"""
OTHERS = MADE.replace("os.fork()", "0").replace("os._exit(0)", "libc.semget(0, 2, 0o1600)").replace("os.wait()", "")


@pytest.mark.parametrize("program", [MADE, OTHERS], ids=["by it", "by others"])
def test_after_a_restore_what_it_has_made_is_removed(program: str) -> None:
    """Not what another container of the pod has made meanwhile, which has the slots that the snapshot's would have."""
    args = ["unshare", "--ipc", sys.executable, "-c", program]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        path = f"/proc/{process.pid}/ns/ipc"
        wanted = [Object(SHM, 0, 0), Object(MSG, 0, 0), Object(SEM, 0, 0), Object(SEM, 0, 1)]
        with sysv.namespace(path) as there:
            found = there.objects()
            assert len(found) == (3 if program == MADE else 4)
            assert sysv.clear(sysv.planned(path, wanted), made=True) is None
            assert there.objects() == ([] if program == MADE else found)
        process.communicate("")


def test_after_a_restore_what_others_have_in_its_place_stays() -> None:
    """A new queue, which nobody has used: the kernel does not say whose it is."""
    program = (
        "import ctypes; made = [ctypes.CDLL(None).msgget(key, 0o1600) for key in (5, 6, 7)]; print(*made, flush=True)"
    )
    args = ["unshare", "--ipc", sys.executable, "-c", f"{program}; input()"]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first, second, third = (int(word) for word in process.stdout.readline().split())
        wanted = [Object(MSG, 5, third + 9), Object(MSG, 0, second + (1 << 15)), Object(MSG, 7, third)]
        path = f"/proc/{process.pid}/ns/ipc"
        assert sysv.clear(sysv.planned(path, wanted), made=True) is None
        with sysv.namespace(path) as there:
            assert there.objects() == [Object(MSG, 5, first), Object(MSG, 6, second)]
        process.communicate("\n")


QUEUES = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
if os.fork() == 0:
    for _ in range(300):
        libc.msgsnd(libc.msgget(0, 0o1600), struct.pack('l5s', 1, b'hello'), 5, 0)
    os._exit(0)
os.wait()
print(flush=True)
sys.stdin.read()
"""


def test_a_table_is_read_once_for_all_that_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel prints all of it each time, so that thousands would take minutes."""
    files: list[str] = []
    read = ipc.read

    def noted(namespace: int, path: str, most: int) -> bytes:
        files.append(path)
        return read(namespace, path, most)

    monkeypatch.setattr(ipc, "read", noted)
    args = ["unshare", "--ipc", sys.executable, "-c", QUEUES]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        path = f"/proc/{process.pid}/ns/ipc"
        with sysv.namespace(path) as there:
            found = there.objects()
            assert len(found) == 300
            files.clear()
            assert sysv.clear(sysv.planned(path, found), made=True) is None
            assert files.count("/proc/sysvipc/msg") <= 3, "more than with a larger buffer each"
            assert there.objects() == []
        process.communicate("")


def test_what_is_no_namespace(other: tuple[int, list[int]]) -> None:
    with pytest.raises(OSError, match="No such") as missing, sysv.namespace("/proc/4194305/ns/ipc"):
        pass
    assert missing.value.errno == errno.ENOENT
    with sysv.namespace("/proc/self/ns/uts") as wrong, pytest.raises(OSError, match="Invalid"):
        wrong.objects()
    namespace = os.open(f"/proc/{other[0]}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="sysvipc") as large:
            ipc.read(namespace, "/proc/sysvipc/sem", 10)
        assert large.value.errno == errno.E2BIG
    finally:
        os.close(namespace)


def test_the_namespace_of_a_spec() -> None:
    def spec(*namespaces: dict[str, str]) -> dict[str, object]:
        return {"linux": {"namespaces": list(namespaces)}}

    assert oci_ipc.namespace(spec({"type": "ipc"})) == ""
    assert oci_ipc.namespace(spec({"type": "ipc", "path": "/run/ipc/1"})) == "/run/ipc/1"
    assert oci_ipc.namespace(spec({"type": "ipc", "path": "/proc/self/ns/ipc"})) is None
    assert oci_ipc.namespace(spec({"type": "uts"})) is oci_ipc.namespace({}) is None
    assert oci_ipc.sysctls({"linux": {"sysctl": {"kernel.sem": "1 2", "fs/mqueue/msg_max": 3}}}) == {
        "kernel/sem": "1 2",
        "fs/mqueue/msg_max": "3",
    }


def test_the_sandbox_of_a_spec() -> None:
    annotations = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "abc"}
    assert pod.sandbox({"annotations": annotations}) == "abc"
    annotations = {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "def"}
    assert pod.sandbox({"annotations": annotations}) == "def" and pod.sandbox({}) == ""
