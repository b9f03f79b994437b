"""A network namespace without iproute2, which the machine with the GPU does not have."""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import socket
import struct
import threading
from pathlib import Path

from support.netns import CLONE_NEWNET, NetworkNamespace
from support.proc import command

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_libc = ctypes.CDLL(None, use_errno=True)


class BareNamespace(NetworkNamespace):
    """A new network namespace with its loopback up, bound to a file in `directory` until `close`."""

    def __init__(self, directory: Path) -> None:
        self.name = f"rwt-{os.getpid()}-{secrets.token_hex(3)}"
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / self.name
        self.path.touch()
        failed: list[BaseException] = []
        thread = threading.Thread(target=self._make, args=(failed,))
        thread.start()
        thread.join()
        if failed:
            self.path.unlink()
            raise failed[0]

    def _make(self, failed: list[BaseException]) -> None:
        # unshare(2) moves the calling thread alone, which ends here.
        try:
            if _libc.unshare(CLONE_NEWNET) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), "unshare network")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
            command("mount", "--bind", f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net", self.path)
        except BaseException as error:
            failed.append(error)

    def close(self) -> None:
        """Takes the file away; the kernel frees the namespace with its last process."""
        if self.path.exists():
            command("umount", self.path, check=False)
            self.path.unlink()
