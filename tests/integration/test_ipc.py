"""IPC namespaces of containers outside of pods."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path

from rewarm import sysv
from rewarm.criu import images
from support import counter, criu_images, faults
from support.bundle import Bundle
from support.node import Node

LOOP = "\nimport time\nn = 0\nwhile True: n += 1; print(n, 'x', flush=True); time.sleep(0.05)\n"
LIBRARY = "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_void_p\n"
SEGMENT = (
    LIBRARY
    + """
import time
others = [libc.shmget(0, 4096, 0o1600) for _ in range({skipped})]
memory = libc.shmat(libc.shmget(0, 4096, 0o1600), None, 0)
{removed}
ctypes.memmove(memory, b'{text}', 6)
n = 0
while True: n += 1; print(n, ctypes.string_at(memory, 6), flush=True); time.sleep(0.05)
"""
)
REGULAR, FILE_SHARED, ANON_SHARED, SYSV, MEMFD = 1, 1 << 7, 1 << 8, 1 << 10, 1 << 14
SHARED = """
import mmap, time
memory = mmap.mmap(-1, mmap.PAGESIZE)
memory[:6] = b'source'
n = 0
while True: n += 1; print(n, memory[:6], flush=True); time.sleep(0.05)
"""
OBJECTS = "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.semctl(libc.semget(78, 3, 0o1600), 2, 16, 7)\n"
SYSCTLS = {"kernel.msgmax": "12345", "kernel/shm_rmid_forced": "1", "fs.mqueue.queues_max": "77"}


def test_the_sysctls_are_the_specs(node: Node) -> None:
    args = ["python3", "-c", OBJECTS + LOOP]
    made = counter.bundle(node.directory / "source", args=args)
    made.spec["linux"]["sysctl"] = {"kernel.msgmax": "23456", "kernel.shmmni": "99"}
    made.write()
    counter.run(node.runtime, "source", made)
    node.rewarm("capture", "source", "--name", "counter")
    made = counter.bundle(node.directory / "copy", args=args)
    made.spec["linux"]["sysctl"] = SYSCTLS
    made.write()
    node.runtime.create("copy", made)
    node.runtime.start("copy")
    assert node.outcome("copy")["outcome"] == "warm", node.outcome("copy")
    files = ["kernel/msgmax", "kernel/shm_rmid_forced", "fs/mqueue/queues_max", "kernel/shmmni"]
    found = node.runtime.exec("copy", "sh", "-c", "cd /proc/sys; cat " + " ".join(files)).split()
    assert found == ["12345", "1", "77", "4096"]
    script = [*OBJECTS.splitlines()[:2], "print(libc.semctl(libc.semget(78, 3, 0), 2, 12))"]
    assert node.runtime.exec("copy", "python3", "-c", "\n".join(script)).strip() == "7"


def hostile(kind: int, segment: int) -> Callable[[Path], None]:
    """What makes the one mapping of a kind one that is of no kind which CRIU opens: of such a one it attaches the
    shared memory that has the number in the image."""

    def change(directory: Path) -> None:
        path = directory / "checkpoint" / "mm-1.img"
        (record,) = images.records(path)
        vmas = list(images.messages(record, 14))
        (one,) = [vma for vma in vmas if images.number(vma, 7) == kind]
        one[7], one[8] = [REGULAR | SYSV], [2 * segment]
        record[14] = [b"".join(criu_images.field(n, v[0]) for n, v in vma.items()) for vma in vmas]
        data = b"".join(criu_images.field(number, value) for number, values in record.items() for value in values)
        path.write_bytes(path.read_bytes()[:8] + criu_images.image(data)[8:])

    return change


def test_shared_memory_of_others_cannot_be_attached(node: Node, tmp_path: Path) -> None:
    args = ["python3", "-c", SEGMENT.format(skipped=0, text="source", removed="")]
    counter.run(node.runtime, "source", counter.bundle(node.directory / "source", args=args))
    node.rewarm("capture", "source", "--name", "counter")
    # Another's has the id 1.
    program = SEGMENT.format(skipped=1, text="secret", removed="libc.shmctl(others[0], 0, None)")
    made = counter.bundle(node.directory / "other", {}, args=["python3", "-c", program])
    other = counter.run(node.runtime, "other", made)
    path = f"/proc/{other.pid}/ns/ipc"
    for name, outcome in (("honest", "warm"), ("hostile", "cold")):
        made = counter.bundle(node.directory / name, args=args)
        next(one for one in made.spec["linux"]["namespaces"] if one["type"] == "ipc")["path"] = path
        made.write()
        copy = node.runtime.create(name, made)
        node.runtime.start(name)
        copy.stdout.wait_text(" b'")
        assert "secret" not in copy.stdout.text()
        found = node.outcome(name)
        assert found["outcome"] == outcome, found
        assert outcome == "warm" or "shared memory 1: it is not the snapshot's" in found["reason"], found
        node.runtime.kill(name, "KILL")
        node.runtime.wait_stopped(name)
        with sysv.namespace(path) as there:
            assert there.remove(sysv.Object(sysv.SHM, 0, 0))
        if name == "honest":
            faults.altered(node.store, tmp_path / "altered", hostile(REGULAR | ANON_SHARED | SYSV, 1))


def test_shared_memory_of_the_node_cannot_be_attached(node: Node, tmp_path: Path) -> None:
    """By a container that is in the node's IPC namespace."""
    libc = ctypes.CDLL(None)
    libc.shmat.restype = ctypes.c_void_p
    number = libc.shmget(sysv.PRIVATE, mmap.PAGESIZE, 0o1600)
    memory = libc.shmat(number, None, 0)
    try:
        ctypes.memmove(memory, b"secret", 6)
        args = ["python3", "-c", SHARED]
        counter.run(node.runtime, "source", in_the_nodes(counter.bundle(node.directory / "source", args=args)))
        node.rewarm("capture", "source", "--name", "counter")
        for name, outcome in (("honest", "warm"), ("hostile", "cold")):
            copy = node.runtime.create(name, in_the_nodes(counter.bundle(node.directory / name, args=args)))
            node.runtime.start(name)
            copy.stdout.wait_text(" b'")
            assert "secret" not in copy.stdout.text()
            found = node.outcome(name)
            assert found["outcome"] == outcome, found
            reason = f"shared memory {number}: it is not the snapshot's"
            assert outcome == "warm" or reason in found["reason"], found
            if name == "honest":
                faults.altered(node.store, tmp_path / "altered", hostile(REGULAR | FILE_SHARED | MEMFD, number))
    finally:
        libc.shmdt(ctypes.c_void_p(memory))
        libc.shmctl(number, 0, None)


def in_the_nodes(made: Bundle) -> Bundle:
    """As with `hostIPC`."""
    made.spec["linux"]["namespaces"] = [one for one in made.spec["linux"]["namespaces"] if one["type"] != "ipc"]
    made.spec["mounts"] = [one for one in made.spec["mounts"] if one["destination"] != "/dev/mqueue"]
    made.write()
    return made
