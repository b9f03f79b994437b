"""What rewarm keeps about one container: the container directory under the state directory.

The record is written before anything is changed that a crash would leave behind, so that whoever comes
next (the guard, `delete`, or the next `create`) can put it right.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field

from rewarm import processes
from rewarm.errors import OciError
from rewarm.oci.spec import write_atomically

RESTORING = "restoring"
RESTORED = "restored"  # warm, not started yet: the tree is stopped
STARTED = "started"
COLD = "cold"
_PHASES = (RESTORING, RESTORED, STARTED, COLD)
_LARGEST = 4 << 20


def escape(root: str) -> str:
    """A runc root as one file name: `-` becomes `\\x2d`, then `/` becomes `-` (the launcher does the same)."""
    return os.path.abspath(root).lstrip("/").replace("-", "\\x2d").replace("/", "-")


def directory(state_dir: str, root: str, container_id: str) -> str:
    return os.path.join(state_dir, "containers", escape(root), container_id)


def check_id(container_id: str) -> None:
    """Refuse an id that could name another directory; runc allows `[A-Za-z0-9_+.-]`, so this refuses no more."""
    if container_id in ("", ".", "..") or "/" in container_id or "\0" in container_id or len(container_id) > 1024:
        raise OciError(
            "check container id", repr(container_id[:80]), "it is not a name", "use letters, digits, - _ + ."
        )


@dataclass
class Undo:
    """A directory tree that was changed and the layer that turns it back."""

    root: str
    layer: str


@dataclass
class Record:
    """One container: the phase it is in and what has to be undone if that phase is never left."""

    id: str
    root: str
    bundle: str
    phase: str
    systemd_cgroup: bool = False
    pid_file: str = ""
    namespace: str = "default"
    owner_pid: int = 0
    owner_start: int = 0
    init_pid: int = 0
    init_start: int = 0
    snapshot: str = ""
    reason: str = ""
    config_backup: str = ""
    undo: list[Undo] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    request: dict[str, str] = field(default_factory=dict)

    def owner_lives(self) -> bool:
        return self.owner_pid != 0 and processes.start_time(self.owner_pid) == self.owner_start

    def own(self) -> None:
        self.owner_pid = os.getpid()
        self.owner_start = processes.start_time(os.getpid()) or 0


def make_directory(path: str) -> None:
    """The container directory and its control directory, which the container's own users may write to."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    os.mkdir(path, mode=0o700)
    os.mkdir(os.path.join(path, "control"))
    # Readiness is told by whoever the program runs as; the sticky bit keeps users from each other's files.
    os.chmod(os.path.join(path, "control"), 0o1777)


def control(path: str) -> str:
    return os.path.join(path, "control")


def save(path: str, record: Record) -> None:
    write_atomically(os.path.join(path, "record.json"), json.dumps(asdict(record), sort_keys=True).encode())


def load(path: str) -> Record | None:
    """The record in a container directory; None when there is none (a crash before it was written)."""
    name = os.path.join(path, "record.json")
    try:
        with open(name, "rb") as file:
            data = json.loads(file.read(_LARGEST))
        undo = [Undo(**one) for one in data.pop("undo")]
        record = Record(**data, undo=undo)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OciError("read record", name, repr(error), "remove the directory if its container is gone") from error
    if record.phase not in _PHASES:
        raise OciError("read record", name, f"unknown phase {record.phase!r}")
    return record


def remove(path: str) -> None:
    """Remove a container directory; what the container's users left in the control directory goes with it."""
    shutil.rmtree(path, ignore_errors=False) if os.path.isdir(path) else None
