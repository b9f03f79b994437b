"""IPC namespaces of containers outside of pods."""

from __future__ import annotations

from pathlib import Path

from rewarm import sysv
from rewarm.criu import images
from support import counter, criu_images, faults
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
REGULAR, ANON_SHARED, SYSV = 1, 1 << 8, 1 << 10
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


def test_shared_memory_of_others_cannot_be_attached(node: Node, tmp_path: Path) -> None:
    """By a mapping that is of no kind which CRIU opens it would attach what has the number in the image."""

    def change(directory: Path) -> None:
        path = directory / "checkpoint" / "mm-1.img"
        (record,) = images.records(path)
        vmas = list(images.messages(record, 14))
        (one,) = [vma for vma in vmas if images.number(vma, 7) == REGULAR | ANON_SHARED | SYSV]
        one[7], one[8] = [REGULAR | SYSV], [2 * 1]
        record[14] = [b"".join(criu_images.field(n, v[0]) for n, v in vma.items()) for vma in vmas]
        data = b"".join(criu_images.field(number, value) for number, values in record.items() for value in values)
        path.write_bytes(path.read_bytes()[:8] + criu_images.image(data)[8:])

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
            faults.altered(node.store, tmp_path / "altered", change)
