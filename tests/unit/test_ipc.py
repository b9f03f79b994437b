"""What of an IPC namespace is a container's, where others are in it as well."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from rewarm import ipc
from rewarm.errors import CaptureError
from rewarm.oci.runc import Container
from rewarm_native import ipc as native

QUEUES = """
import ctypes, struct, sys
libc = ctypes.CDLL(None)
queues = [libc.msgget(0, 0o1600) for _ in range(300)]
for one in queues: libc.msgsnd(one, struct.pack('l5s', 1, b'hello'), 5, 0)
print(queues[200], flush=True)
sys.stdin.read()
"""
OTHER = "import ctypes, sys; input(); print(ctypes.CDLL(None).msgrcv({queue}, b'0' * 64, 5, 0, 0), flush=True); input()"


def test_message_queues_are_looked_up_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[str] = []
    read = native.read

    def noted(namespace: int, path: str, most: int) -> bytes:
        files.append(path)
        return read(namespace, path, most)

    monkeypatch.setattr(native, "read", noted)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(["unshare", "--ipc", sys.executable, "-c", QUEUES], **pipes) as own:
        assert own.stdout is not None
        queue = own.stdout.readline().strip()
        path = f"/proc/{own.pid}/ns/ipc"
        words = ["nsenter", f"--ipc={path}", sys.executable, "-c", OTHER.format(queue=queue)]
        with subprocess.Popen(words, **pipes) as other:
            assert other.stdin is not None and other.stdout is not None
            container = Container("/run", "id", own.pid, 0, "/bundle", "/rootfs", {}, (), "")
            spec = {"linux": {"namespaces": [{"type": "ipc", "path": path}]}}
            ipc.check(container, spec)
            assert files.count("/proc/sysvipc/msg") <= 3, "more than with a larger buffer each"
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "5\n"
            with pytest.raises(CaptureError, match=f"who uses message queue {queue} cannot be told"):
                ipc.check(container, spec)
            other.communicate("\n")
        own.communicate("")
