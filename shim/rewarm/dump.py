"""The dump of a capture: `runc checkpoint`, within its time, and never ended where that would break the source."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from rewarm import private, processes
from rewarm.criu import log, options
from rewarm.errors import CaptureError, OciError
from rewarm.lifeline import Lifeline
from rewarm.oci import runc
from rewarm.oci.runc import Container, Runc
from rewarm.restore import CHECKPOINT
from rewarm.scratch import Scratch
from rewarm.settings import Settings

_DEATH = 10.0
_LOOK, _LAST_WORDS = 0.25, 1.0
"""Seconds between looks at the container, and for CRIU to end by itself when it is dead."""
# compel's word in the log for the step at which a process begins to run CRIU's code.
_INFECTED = b"Putting parasite blob"


def dump(
    container: Container,
    low_level: Runc,
    criu: str,
    scratch: Scratch,
    settings: Settings,
    lifeline: Lifeline,
) -> None:
    """Dump the frozen container into the capture's directory. CRIU holds `lifeline` and `scratch` until it ends.

    Raises CaptureError, with CRIU's log kept, and OciError.
    """
    directory = scratch.snapshot / CHECKPOINT
    directory.mkdir(mode=0o700)
    option_file = str(scratch.work / "criu.conf")
    options.write(option_file, options.DUMP)
    words = ["checkpoint", "--leave-running", "--file-locks", "--ext-unix-sk"]
    words += ["--image-path", str(directory), "--work-path", str(scratch.work), container.id]
    environment = options.environment(option_file, criu)
    dump_log = scratch.work / "dump.log"
    done = _run_checkpoint(
        low_level.words(*words), environment, settings.capture_timeout, lifeline, scratch.lock, dump_log, container
    )
    if done.returncode != 0:
        if processes.is_dead(container.pid, container.start_time):
            cause = "it has ended while it was dumped"
            raise CaptureError("dump container", container.id, cause, "capture it while it runs")
        kept = _keep_log(dump_log, settings)
        cause = log.cause(str(dump_log)) or runc.message(done)
        raise CaptureError("dump container", container.id, cause, f"CRIU's log is kept as {kept}")


def _run_checkpoint(
    words: list[str],
    env: dict[str, str],
    timeout: float,
    lifeline: Lifeline,
    lock: int,
    dump_log: Path,
    container: Container,
) -> subprocess.CompletedProcess[str]:
    """Run `runc checkpoint`. It outlives a killed rewarm: a CRIU that dies in the middle leaves broken processes.

    The lifeline's pipe and the file `lock` stay open for as long as it or its CRIU lives.
    """
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env,
            pass_fds=(lifeline.fd, lock),
            start_new_session=True,
        )
    except OSError as error:
        raise OciError("run runc checkpoint", words[-1], str(error)) from error
    end = time.monotonic() + timeout
    try:
        lifeline.dumping(process.pid, 2 * timeout)
        said = _wait(process, container, end)
    except subprocess.TimeoutExpired as error:
        _end(process, dump_log, timeout)
        limit = f"it did not end within {timeout:g} s"
        raise CaptureError("dump container", words[-1], limit, "see `capture_timeout` in the settings") from error
    except BaseException:
        # Told to end: the processes must be whole again before they may run.
        try:
            _wait(process, container, end)
        except subprocess.TimeoutExpired:
            _end(process, dump_log, timeout)
        raise
    return subprocess.CompletedProcess(words, process.returncode, said, "")


def _wait(process: subprocess.Popen[str], container: Container, end: float) -> str:
    """What it has said once it has ended. Raises subprocess.TimeoutExpired at `end`.

    A container that is killed meanwhile is nothing that could be broken any more, and CRIU may wait for it for ever:
    a process with several threads is not dead for its tracer before that has waited for each of them (seen with 4.2).
    The engine could not delete the container for as long.
    """
    dead = 0.0
    while True:
        try:
            return process.communicate(timeout=max(0.0, min(_LOOK, end - time.monotonic())))[0]
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end:
                raise
        if not processes.is_dead(container.pid, container.start_time):
            continue
        dead = dead or time.monotonic()
        if time.monotonic() - dead > _LAST_WORDS:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[str], dump_log: Path, patience: float) -> None:
    """End a dump that takes too long: at once while CRIU has not yet put its code into a process.

    After that its death may break the process that it is in, so it has as long again to come to its end.
    """
    if dump_log.exists() and _INFECTED in dump_log.read_bytes():
        try:
            process.communicate(timeout=patience)
            return
        except subprocess.TimeoutExpired:
            pass  # two limits long it has not moved: the processes are lost either way
    os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a CRIU that hangs in the kernel, with runc's pipe
        process.communicate(timeout=_DEATH)


def _keep_log(path: Path, settings: Settings) -> str:
    kept = os.path.join(settings.state_dir, "last-failed-dump.log")
    if path.exists():
        private.make(settings.state_dir)
        shutil.copyfile(path, kept)
    return kept
