"""Who asked for it is told of a restore: a listener at NAME.sock in the control directory by a line of JSON, a process
that wanted a signal by that.

The processes are stopped meanwhile, but in containers with GPUs: a connection waits in its listener's backlog, a signal
is pending, and is the first that the program sees. What is in the control directory is the container's and hostile:
nothing of it is opened, followed or waited for.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat

from rewarm import processes
from rewarm.oci.runc import Container
from rewarm.oci.spec import CONTROL_DESTINATION, Spec
from rewarm.replica import NAME, hand_over
from rewarm.store.manifest import Wanted

SUFFIX = ".sock"
MOST = 256
"""Sockets: each takes 0.02 ms."""
ENTRIES = 4096
"""Names that are looked at: a container may have filled the directory."""
_NOTES = 8
_THREAD = 1
"""PIDFD_SIGNAL_THREAD: to the thread that the descriptor is of."""
_MESSAGE = json.dumps({"event": "restored", "file": f"{CONTROL_DESTINATION}/{NAME}"}).encode() + b"\n"
_CAUSES = {errno.EAGAIN: "its backlog is full", errno.ECONNREFUSED: "nobody listens"}


def notify(control: str, init: Container, wanted: tuple[Wanted, ...], bundle_spec: Spec) -> list[str]:
    """Tell all, and wait for none. `control` is the control directory on the node, `init` the container that was
    restored, with this spec, `wanted` what its snapshot says of signals. Returns a line for each that was not told,
    some of them at most. Raises OSError if there is no control directory.
    """
    directory = os.open(control, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        hand_over(directory, processes.tree(init.pid), bundle_spec)
        notes = _connect(directory)
        if wanted:
            notes += _signal(directory, init, wanted)
    finally:
        os.close(directory)
    return notes if len(notes) <= _NOTES else [*notes[:_NOTES], f"and {len(notes) - _NOTES} more were not told"]


def _connect(directory: int) -> list[str]:
    notes = []
    with os.scandir(directory) as entries:
        seen = [entry.name for entry in itertools.islice(entries, ENTRIES + 1)]
    names = [name for name in seen[:ENTRIES] if name.endswith(SUFFIX)]
    if len(seen) > ENTRIES or len(names) > MOST:
        notes.append(f"not everybody was told: more than {MOST} sockets or {ENTRIES} names in {CONTROL_DESTINATION}")
    for name in names[:MOST]:
        try:
            _send(directory, name)
        except OSError as error:
            cause = _CAUSES.get(error.errno or 0, error.strerror)
            notes.append(f"{CONTROL_DESTINATION}/{ascii(name)[1:-1][:80]} was not told: {cause}")
    return notes


def _send(directory: int, name: str) -> None:
    """One line to the socket that this name is now, by its descriptor: a link would lead root elsewhere."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTSOCK, "it is no socket")
        import socket  # takes longer than all else here, and most containers have none

        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            connection.connect(f"/proc/self/fd/{fd}")
            connection.send(_MESSAGE)
    finally:
        os.close(fd)


def _signal(directory: int, init: Container, wanted: tuple[Wanted, ...]) -> list[str]:
    notes = []
    here = {processes.namespace_pid(pid): pid for pid in processes.tree(init.pid)}
    opened = []
    try:
        for one in wanted:
            try:
                opened.append((one, here[one.pid], os.pidfd_open(here[one.pid])))
            except (KeyError, OSError) as error:
                cause = error.strerror if isinstance(error, OSError) else "it is not there"
                notes.append(f"process {one.pid} was not sent signal {one.signal}: {cause}")
        # A number that is in the tree now, or whose process has ended, is not that of another process.
        tree = set(processes.tree(init.pid))
        if processes.start_time(init.pid) != init.start_time:
            return ["no process was sent a signal: the container's init has ended"]
        for one, pid, fd in opened:
            if pid not in tree or not processes.handles(pid, one.signal):
                notes.append(f"process {one.pid} was not sent signal {one.signal}: it does not handle it")
                continue
            try:
                _deliver(fd, pid, one.signal)
                _register(directory, one, pid)
            except OSError as error:
                notes.append(f"process {one.pid}, signal {one.signal}: {error.strerror}")
    finally:
        for _, _, fd in opened:
            os.close(fd)
    return notes


def _deliver(fd: int, pid: int, number: int) -> None:
    """To the first thread unless it blocks it, as the kernel does with threads that run. Of stopped ones any could take
    it, and Python's handlers run in the first one only, which nothing might wake."""
    import signal

    flags = 0 if processes.blocks(pid, number) else _THREAD
    try:
        signal.pidfd_send_signal(fd, number, None, flags)
    except OSError as error:
        if error.errno != errno.EINVAL or not flags:  # before Linux 6.9 there is no such flag
            raise
        signal.pidfd_send_signal(fd, number)


def _register(directory: int, one: Wanted, pid: int) -> None:
    """What it wrote into the source's control directory, for a capture of the copy."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace", newline="\n") as file:
        found = dict(line.split(":", 1) for line in file if ":" in line)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(f"{one.pid}.signal", flags, 0o644, dir_fd=directory)
    except FileExistsError:
        return  # it runs already, and has registered anew
    try:
        os.fchmod(fd, 0o644)
        os.fchown(fd, int(found["Uid"].split()[1]), int(found["Gid"].split()[1]))
        os.write(fd, f"{one.signal}\n".encode())
    finally:
        os.close(fd)
