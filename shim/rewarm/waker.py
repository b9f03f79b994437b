"""Tells the engine of a restored container to go on: it was quiet when its snapshot was taken.

    python -m rewarm.waker CONTAINER_DIRECTORY ENGINE PORT

One small process for each such container, which `create` starts and which ends when the engine is healthy. Its standard
error is `engine.log` in the container directory; `engine.json` there says what came of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

from rewarm import engines, processes, settings
from rewarm.errors import RestoreError, RewarmError
from rewarm.oci import record
from rewarm.oci.spec import Spec, write_atomically
from rewarm.request import Request
from rewarm.settings import Settings

_START_TIMEOUT = 120.0
_POLL = 0.02
_LOG = "engine.log"


@contextlib.contextmanager
def reserved(directory: str) -> Iterator[IO[bytes]]:
    """Its log, for `start`: from before the container runs whoever captures that waits for it. Raises OSError."""
    with open(os.path.join(directory, _LOG), "wb") as log:
        # It has the lock with its standard error, for as long as it lives.
        fcntl.flock(log, fcntl.LOCK_EX)
        yield log


def start(directory: str, wanted: Request, bundle_spec: Spec, log: IO[bytes]) -> str:
    """Start it for a container that has been restored; what stands against it, if anything does."""
    port = engines.target(wanted.engine, wanted.ready, bundle_spec)
    words = [sys.executable, "-I", "-m", "rewarm.waker", directory, wanted.engine, str(port)]
    try:
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/")
    except OSError as error:
        return f"the engine is not told to go on: {error}"
    return ""


def wait(directory: str, limit: float) -> bool:
    """Wait until the engine of a restored container has been told to go on, or nobody does that any more; whether that
    came within `limit` seconds."""
    end = time.monotonic() + limit
    try:
        with open(os.path.join(directory, _LOG), "rb") as log:
            while True:
                try:
                    fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    if time.monotonic() > end:
                        return False
                time.sleep(_POLL)
    except FileNotFoundError:
        return True  # it was not restored, or has no engine


def wake(directory: str, engine: str, port: int, configured: Settings) -> list[str]:
    """Wait until the container's init runs, and have the engine go on. Returns what was called. Raises RestoreError."""
    kept = record.load(directory)
    if kept is None:
        raise _not_told(engine, "its container directory has no record")
    end = time.monotonic() + _START_TIMEOUT
    while (found := processes.stat(kept.init_pid)) is not None and found.start_time == kept.init_start:
        if found.state not in "Tt":
            return engines.resume(engine, kept.init_pid, port, configured.engine_timeout)
        if time.monotonic() > end:
            raise _not_told(engine, f"the container was not started within {_START_TIMEOUT:.0f} s")
        time.sleep(_POLL)
    raise _not_told(engine, "its container has ended")


def _not_told(engine: str, cause: str) -> RestoreError:
    return RestoreError("resume engine", engine, cause)


def main(words: list[str]) -> int:
    directory, engine, port = words
    failed = False
    try:
        said = wake(directory, engine, int(port), settings.load())
    except (RewarmError, OSError, ValueError) as error:
        failed, said = True, [str(error)]
    text = "; ".join("".join(letter if letter.isprintable() else "?" for letter in line) for line in said)
    print(text, file=sys.stderr, flush=True)
    outcome = {"resumed": not failed, "text": text}
    with contextlib.suppress(FileNotFoundError):  # the container may be deleted
        write_atomically(os.path.join(directory, "engine.json"), json.dumps(outcome).encode(), 0o644)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
