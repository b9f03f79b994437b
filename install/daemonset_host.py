"""Commands in the node's own namespaces, run from a pod that has `hostPID` and no mount of the node's root.

nsenter, not chroot: systemctl refuses to work in a chroot, `rewarm doctor` and `criu check` have to see the mounts,
cgroups and network that the runtime will see, and a pod that mounts the node's root keeps every file system below it
busy. The node reaches the image's files as /proc/PID/root, PID being this process: nothing has to be copied that does
not stay.

Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACES = ("mount", "uts", "ipc", "net", "cgroup")
STOP_SECONDS = 10.0


class Mount(NamedTuple):
    """A line of proc_pid_mountinfo(5): `number` is the mount's ID, `root` its root within the file system."""

    number: str
    device: str
    root: str
    point: str


class Problem(Exception):
    """What went wrong on the node, as one line: the operation, its object, the cause and the next step."""


class Stopped(BaseException):
    """SIGTERM or SIGINT: the pod has to end."""


class Host:
    """The node, by the namespaces of its process `pid`: 1, but in tests."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.image = f"/proc/{os.getpid()}/root"
        """This process's root directory, as a path on the node."""

    def check(self) -> None:
        """Raises Problem if the process is not the node's, or its namespaces may not be entered."""
        try:
            theirs = os.readlink(f"/proc/{self.pid}/ns/mnt")
        except OSError as error:
            cause = f"{error.strerror}; the pod needs hostPID, CAP_SYS_PTRACE and no AppArmor profile"
            raise Problem(f"enter the node by process {self.pid}: {cause}") from None
        if theirs == os.readlink("/proc/self/ns/mnt"):
            raise Problem(f"enter the node by process {self.pid}: it is the pod's own; set hostPID in the pod's spec")

    def run(self, *words: str, timeout: float, capture: bool = False, stdin: bytes | None = None) -> tuple[int, str]:
        """Exit status and, with `capture`, standard output of a command on the node; else its output is the pod's log.

        Raises Problem if it cannot be run or takes longer than `timeout` seconds. It ends with whatever exception ends
        the wait, and all of its process group with it.
        """
        entered = ["nsenter", "--target", str(self.pid), *(f"--{name}" for name in NAMESPACES), "--"]
        environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        try:
            process = subprocess.Popen(
                [*entered, *words],
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE if capture else None,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise Problem(f"run nsenter: {error.strerror}; the image has to have util-linux") from None
        with _ended(process):
            try:
                said, _ = process.communicate(stdin, timeout=timeout)
            except subprocess.TimeoutExpired:
                raise Problem(
                    f"run {words[0]} on the node: not done within {timeout:.0f} s; see its log above"
                ) from None
        return process.returncode, (said or b"").decode(errors="replace")

    def write(self, path: str, content: bytes) -> None:
        """Puts a file of root's there by rename, with its directory. Raises Problem."""
        script = 'umask 022; mkdir -p "${1%/*}" && cat >"$1.new" && mv -fT "$1.new" "$1"'
        status, _ = self.run("sh", "-c", script, "sh", path, timeout=30, stdin=content)
        if status != 0:
            raise Problem(f"write {path} on the node: exit status {status}; see the line above")

    def read(self, path: str) -> bytes | None:
        """The file's content; None if it is not there. Raises Problem."""
        status, said = self.run(
            "sh", "-c", 'test ! -e "$1" || { echo; cat "$1"; }', "sh", path, timeout=30, capture=True
        )
        if status != 0:
            raise Problem(f"read {path} on the node: exit status {status}; see the line above")
        return said[1:].encode() if said else None

    def mounts(self) -> Iterator[Mount]:
        """The node's mounts, the latest last."""
        yield from mounts(Path(f"/proc/{self.pid}/mountinfo"))


def mounts(file: Path) -> Iterator[Mount]:
    """The same of a mountinfo file."""
    for line in file.read_text(errors="surrogateescape").splitlines():
        words = line.split(" ")
        yield Mount(words[0], words[2], _plain(words[3]), _plain(words[4]))


def _plain(word: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(octal, character)
    return word


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever ends the wait ends the command: SIGTERM to its process group, SIGKILL after STOP_SECONDS."""
    try:
        yield
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
                break
        raise
