"""Puts right what a restore left behind: after a failure, after a deadline, and after rewarm was killed.

There is one way back, and it goes by the record, so that it is the same whoever walks it: the guard, which has
killed the processes and outlives rewarm; the failing `create` itself, where there is no guard; `delete`; or the
next `create` on the node.

    python -m rewarm.recover CONTAINER_DIRECTORY      (run by the guard)
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rewarm import blanks, causes, installation, layers, private, processes, settings, sysv
from rewarm.criu import log as criu_log
from rewarm.deadline import TAKING_BACK
from rewarm.errors import NotUndone, OciError, RestoreError, RewarmError
from rewarm.oci import cgroups, mounts, record, runc, spec
from rewarm.oci.record import Record
from rewarm.settings import Settings

_LONGEST_EXEC = 1.0
"""Seconds until a program that has been started has its arguments, also one whose cgroup is throttled."""
_PROBE = re.compile(r"/tmp/\.criu\.move_mount_set_group\.[A-Za-z0-9]{6}")
_PROBED = 1.0
"""Seconds after which such a mount is nobody's any more."""


@contextmanager
def locked(path: str, *, wait: bool) -> Iterator[int]:
    """One at a time per container directory: the guard and the next `create` may come at once.

    The value is the descriptor that has the lock; -1, at once, when another has it and `wait` is not set.
    """
    private.make(os.path.dirname(path))
    name = f"{path}~lock"
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield -1
                return
            # Who had it before may have removed the file: then somebody else may hold the lock of a new one.
            if os.fstat(fd).st_nlink == 0:
                continue
            yield fd
            return
        finally:
            os.close(fd)


def forget(path: str) -> None:
    """Remove a container directory, its lock, and what a process killed while it made or removed it has left.

    One that goes away meanwhile is no error.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        record.remove(path)
    with suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(f"{path}~lock")
    parent, own = os.path.split(path)
    for name in names(parent):
        if name.startswith(f"{own}~"):
            remove_scratch(os.path.join(parent, name))


def undo(path: str, kept: Record, low_level: runc.Runc) -> None:
    """Undo a restore: kill its processes, unmount, delete it from runc, put the file trees and config.json back.

    `path` is the container directory, which stays. Nothing is deleted as long as processes live or mounts are there: a
    `runc delete` would go through them into the container's rootfs and volumes. Doing it twice does no harm. Raises
    NotUndone.
    """
    try:
        _kill(kept)
        _unmount(kept)
        _remove_yard(path)
        _remove_probes(path)
        low_level.remove(kept.id)
        cgroups.remove(kept.cgroups)
        sysv.clear(kept.ipc, made=True)
        _restore_trees(kept)
        _remove_places(kept)
        _restore_config(kept)
        # An empty or old one would be taken for this container's by whoever reads it after a failed create.
        _remove_pid_file(kept.pid_file)
    except (RewarmError, OSError) as error:
        step = "" if isinstance(error, RewarmError) and error.next_step else "mend that and delete the container"
        raise NotUndone("undo restore", kept.id, str(error), step) from error


def _kill(kept: Record) -> None:
    with suppress(OciError):  # killed before it wrote its state, or it has deleted the container: the cgroup is known
        known = runc.load(kept.root, kept.id)
        tree = processes.tree(known.pid) if processes.start_time(known.pid) == known.start_time else []
        if not processes.kill_all(set(tree)):
            raise RestoreError("kill processes of", kept.id, "they do not die", "look for state D in `ps`")
    cgroups.kill(kept.cgroups)
    # A hook is in no cgroup of the container's. One that outlived its runc and guard would go on changing the rootfs.
    hooks = {pid for change in kept.undo for pid in _running((sys.executable,), change.layer)}
    if not processes.kill_all(hooks):
        raise RestoreError("kill hook of", kept.id, "it does not die", "look for state D in `ps`")


def _unmount(kept: Record) -> None:
    mounts.unmount_below(os.path.join(kept.root, kept.id))
    if kept.rootfs:
        mounts.unmount_below(kept.rootfs, kept.mounts)


def _remove_yard(path: str) -> None:
    """What a CRIU that was killed has left in /tmp: an empty directory, for its mounts went with their namespace.

    No older than this restore: another's would have to be named in the log before it had a name.
    """
    with suppress(OSError):  # CRIU was not started
        begun = os.stat(os.path.join(path, "criu.conf")).st_mtime_ns
        for yard in criu_log.mount_yards(causes.restore_log(path)):
            with suppress(OSError):  # it has removed it itself
                found = os.lstat(yard)
                if stat.S_ISDIR(found.st_mode) and found.st_uid == 0 and found.st_ctime_ns >= begun:
                    os.rmdir(yard)


def _remove_probes(path: str) -> None:
    """The mounts by which a CRIU that was killed in the middle of it has looked what the kernel can: in its first run
    after a boot, and in every one without a tmpfs at /run (criu/kerndat.c, kerndat_has_move_mount_set_group).
    Another's, who is just looking, are gone in some milliseconds."""
    try:
        begun = os.stat(os.path.join(path, "criu.conf")).st_mtime
    except OSError:
        return  # CRIU was not started
    for probe in filter(_PROBE.fullmatch, mounts.below("/tmp")):
        with suppress(OSError, OciError):  # it is gone: another's
            made = os.lstat(probe).st_ctime
            if made >= begun:
                time.sleep(max(0.0, made + _PROBED - time.time()))
                mounts.unmount(probe)
                os.rmdir(probe)


def _restore_trees(kept: Record) -> None:
    for change in reversed(kept.undo):
        if change.layer.endswith(blanks.PLAN):
            blanks.undo(change)
        elif os.path.isdir(change.root) and (not change.mounted or os.path.ismount(change.root)):
            layers.undo(change.root, change.layer)  # else the engine has taken the tree away already


def _remove_places(kept: Record) -> None:
    """The mount points that runc made in the rootfs, empty directories and files; what holds something stays."""
    for path in sorted(kept.places, reverse=True):
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                os.rmdir(path)
            elif os.path.lexists(path) and os.lstat(path).st_size == 0:
                os.unlink(path)
        except OSError:
            continue  # an empty directory too many in the rootfs hurts nobody


def _restore_config(kept: Record) -> None:
    """Put config.json back, unless the engine has written another one since."""
    config = os.path.join(kept.bundle, "config.json")
    for scratch in spec.scratches(config):  # of a rewarm that was killed while it wrote
        with suppress(FileNotFoundError):
            os.unlink(scratch)
    try:
        with open(config, "rb") as file:
            ours = spec.digest_of(file.read()) in kept.config_written
        if ours and kept.config_backup:
            with open(kept.config_backup, "rb") as file:
                spec.write_atomically(config, file.read(), os.fstat(file.fileno()).st_mode & 0o7777)
    except FileNotFoundError:
        return  # the bundle is gone


def _remove_pid_file(path: str) -> None:
    """And the one beside it of a runc that was killed while it wrote: it makes it anew or fails (utils_linux.go,
    createPidFile), so that not even a cold start could follow."""
    if not path:
        return
    directory, name = os.path.split(path)
    for one in (path, os.path.join(directory, f".{name}")):
        with suppress(FileNotFoundError):
            os.unlink(one)


def left_over(path: str) -> Record | None:
    """The record of a restore whose rewarm is no more; None for everything else."""
    kept = record.load(path)
    return kept if kept is not None and kept.phase == record.RESTORING and not kept.owner_lives() else None


def settle(path: str, binary: str) -> None:
    """Wait until no guard is busy with this container, then undo what is left over. Raises NotUndone and OSError.

    A restore whose rewarm lives is nobody else's business.
    """
    try:
        kept = record.load(path)
        if kept is not None and kept.owner_lives():
            return
    except OciError:
        return  # a record that cannot be read tells nothing that could be undone
    _wait_for_guards(path)
    recover(path, binary, wait=True)


def take_back(path: str, binary: str) -> None:
    """Undo a restore of this process's own, whose child has died in the middle of it. Raises NotUndone."""
    try:
        _wait_for_guards(path)
        with locked(path, wait=True):
            kept = record.load(path)
            # Another one's may be there by now, if the guard was faster.
            ours = kept is not None and kept.owner_pid == os.getpid()
            if kept is not None and ours and kept.phase in (record.RESTORING, record.RESTORED):
                _take(path, kept, binary)
            with suppress(FileNotFoundError):
                os.unlink(f"{path}~lock")
    except NotUndone:
        raise
    except (RewarmError, OSError) as error:
        raise NotUndone("undo restore", path, str(error), "mend that and delete the container") from error


def _take(path: str, kept: Record, binary: str) -> None:
    """Undo and forget a restore, also one that was killed on the last yards. Needs the lock."""
    if kept.phase == record.RESTORED:
        # Should this fail too, whoever comes next sees that it is to be undone.
        kept = kept._replace(phase=record.RESTORING)
        record.save(path, kept)
    undo(path, kept, runc.Runc(binary, kept.root, kept.systemd_cgroup))
    forget(path)


def _wait_for_guards(path: str) -> None:
    end = time.monotonic() + TAKING_BACK
    while guards(path):
        if time.monotonic() > end:
            raise NotUndone("wait for guard of", os.path.basename(path), "it does not end", "look for state D in `ps`")
        time.sleep(0.005)


def recover(path: str, binary: str, *, wait: bool) -> bool:
    """Undo one left-over restore and remove its directory; False when there is none, or another is at it."""
    if left_over(path) is None or (not wait and guards(path)):
        return False
    with locked(path, wait=wait) as lock:
        kept = left_over(path) if lock >= 0 else None
        if kept is None:
            return False  # somebody else was faster
        undo(path, kept, runc.Runc(binary, kept.root, kept.systemd_cgroup))
        forget(path)
    return True


def remove_scratch(path: str) -> None:
    """A container directory that was never finished, by a process that is no more."""
    owner = path.rpartition("~")[2]
    if owner.isdigit() and processes.start_time(int(owner)) is None:
        with suppress(FileNotFoundError):
            record.remove(path)


def guards(path: str) -> list[int]:
    """The guards, or the recoveries that they became, of one container directory: they have its path as an argument."""
    found = _running((installation.guard(),), path)
    # After these: one that becomes a recovery meanwhile is in the one list or the other, or in both.
    recoveries = _running((sys.executable,), path)
    return [*found, *(pid for pid, words in recoveries.items() if b"rewarm.recover" in words.split(b"\0"))]


def _running(programs: tuple[str, ...], argument: str) -> dict[int, bytes]:
    """Processes that run one of the programs with an argument that is exactly this, and their words.

    One in the middle of execve(2) has the file already, but no words yet (begin_new_exec, create_elf_tables): it is
    waited for, if it is in this pid namespace, since others could have none for ever (PR_SET_MM) to hold us up.
    """
    wanted = b"\0" + os.fsencode(argument) + b"\0"
    # By the file that runs, not by its name: a container may call its processes as it likes.
    files = {_identity(program) for program in programs} - {None}
    here = _identity("/proc/self/ns/pid")
    found: dict[int, bytes] = {}
    left = {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}
    end = time.monotonic() + _LONGEST_EXEC
    while left:
        for pid in sorted(left):
            words = _words(pid)
            if (words and wanted not in words) or _identity(f"/proc/{pid}/exe") not in files:
                left.discard(pid)
            elif words:
                left.discard(pid)
                found[pid] = words
            elif _identity(f"/proc/{pid}/ns/pid") != here:
                left.discard(pid)
        if time.monotonic() > end:
            break
        if left:
            time.sleep(0.001)
    return found


def _words(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(1 << 16)
    except OSError:
        return b""  # it has ended


def _identity(program: str) -> tuple[int, int] | None:
    try:
        found = os.stat(program)
    except OSError:
        return None  # it has ended, or rewarm is only half installed
    return found.st_dev, found.st_ino


def names(directory: str) -> list[str]:
    """What is in a directory, in order; nothing if it is not there."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def main(words: list[str]) -> int:
    """The guard has killed every process of this restore: undo the rest, whether or not rewarm still waits for it."""
    path = words[0]
    try:
        configured = settings.load()
    except RewarmError:
        configured = Settings()
    try:
        with locked(path, wait=True):
            kept = record.load(path)
            if kept is None or kept.phase not in (record.RESTORING, record.RESTORED):
                return 0
            _take(path, kept, runc.find(configured))
    except (RewarmError, OSError) as error:
        # The guard's standard error is the container's: the state directory is where an operator looks.
        with suppress(OSError), open(f"{path}/recover.log", "a", encoding="utf-8") as log:
            log.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
