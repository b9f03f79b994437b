"""`start` of a container that was restored: the stopped tree goes on where its source was captured.

The launcher (native/start.c) does the same by what `create` wrote down (resume.py). What comes here is what that
does not cover: poststart hooks, and everything that is not as it was expected.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from rewarm import processes, resume
from rewarm.errors import OciError
from rewarm.oci import log, record, runc, spec
from rewarm.oci.argv import Invocation
from rewarm.oci.record import Record
from rewarm.settings import Settings

_KEPT = frozenset(
    {"record.json", "outcome.json", "trace.json", "control", "device-memory.so", "engine.json", "engine.log"}
)


def start(invocation: Invocation, settings: Settings, binary: str) -> int:
    """Answer `start` for a restored container; hand every other one to runc, which has the words for it."""
    directory = record.directory(settings.state_dir, invocation.root, invocation.container_id)
    kept = record.load(directory)
    if kept is None or kept.phase != record.RESTORED or not _as_restored(kept):
        runc.replace_process(binary, invocation.words)
        return 127
    container = runc.load(kept.root, kept.id)
    for pid in resume.order(kept):
        processes.send(pid, signal.SIGCONT)
    # In this order, so that a `start` that was killed can be repeated at whatever point that was.
    if os.path.lexists(container.exec_fifo):
        os.unlink(container.exec_fifo)
    record.save(directory, kept._replace(phase=record.STARTED))
    for line in [*_tidy(directory), *_poststart(kept)]:
        log.write(invocation, "warning", f"rewarm: {line}")
    return 0


def _tidy(directory: str) -> list[str]:
    """Remove what the restored tree has read: it would only take memory in /run. The container runs: no failure."""
    try:
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if os.path.isdir(path) and name != "control":
                import shutil

                shutil.rmtree(path)
            elif name not in _KEPT:
                os.unlink(path)
    except OSError as error:
        return [f"{directory} was not tidied up: {error}"]
    return []


def _as_restored(kept: Record) -> bool:
    """Whether the init that was restored is still there (its start time tells it from another with its pid)."""
    return runc.exists(kept.root, kept.id) and processes.start_time(kept.init_pid) == kept.init_start


def _poststart(kept: Record) -> list[str]:
    """Run the spec's poststart hooks, which runc runs in its own `start`; the OCI spec lets their failures pass."""
    problems = []
    bundle_spec = spec.load(kept.bundle)
    state: dict[str, Any] = {
        "ociVersion": bundle_spec.get("ociVersion", "1.0.2"),
        "id": kept.id,
        "status": "running",
        "pid": kept.init_pid,
        "bundle": kept.bundle,
        "annotations": spec.spec_annotations(bundle_spec),
    }
    for hook in (bundle_spec.get("hooks") or {}).get("poststart") or []:
        try:
            _run_hook(hook, state)
        except OciError as error:
            problems.append(str(error))
    return problems


def _run_hook(hook: dict[str, Any], state: dict[str, Any]) -> None:
    import subprocess  # most containers have no poststart hook

    path = str(hook.get("path", ""))
    words = [str(word) for word in hook.get("args") or [path]]
    env = dict(str(word).partition("=")[::2] for word in hook.get("env") or [])
    try:
        done = subprocess.run(
            words,
            executable=path,
            env=env,
            input=json.dumps(state).encode(),
            capture_output=True,
            timeout=hook.get("timeout"),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OciError("run poststart hook", path, str(error)) from error
    if done.returncode != 0:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[-300:]
        raise OciError("run poststart hook", path, f"exit status {done.returncode} {said}")
