"""Why `runc restore` failed, in one line: out of the hooks' words, CRIU's log and runc's own."""

from __future__ import annotations

import json
import os

from rewarm.criu import log

_HOOKS = ("rootfs-diff:", "device-remap:", "series:")


def cause(directory: str, ended: str) -> str:
    """The cause that explains most; `ended` is how the process ended. `directory` is the container directory."""
    said = _runc(os.path.join(directory, "runc.json"))
    # runc reports what a failed hook wrote to standard error; CRIU's log only says that a script failed.
    hook = next((said[said.index(name) :] for name in _HOOKS if name in said), "")
    return hook or log.cause(restore_log(directory)) or said or f"runc restore ended with {ended}"


def restore_log(directory: str) -> str:
    """CRIU's log."""
    return os.path.join(directory, "work", "restore.log")


def keep(directory: str, state_dir: str) -> str:
    """The next step: where CRIU's log of the last failure is kept when the container directory is removed.

    It stays in the directory as well: who undoes the restore reads in it what CRIU has left.
    """
    import shutil  # takes milliseconds, which a restore that succeeds is not to pay for

    path = restore_log(directory)
    kept = os.path.join(state_dir, "last-failed-restore.log")
    scratch = f"{path}~"  # goes with the directory, whoever is killed meanwhile
    try:
        with (
            open(path, "rb") as log_file,
            open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as copy,
        ):
            shutil.copyfileobj(log_file, copy)
        os.replace(scratch, kept)
    except OSError:
        return "run `rewarm doctor`"
    return f"CRIU's log is kept as {kept}"


def _runc(path: str) -> str:
    """The last error in runc's log."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [json.loads(line) for line in file if line.startswith("{")]
    except (OSError, ValueError):
        return ""
    return next(
        (" ".join(str(line.get("msg", "")).split()) for line in reversed(lines) if line.get("level") == "error"), ""
    )
