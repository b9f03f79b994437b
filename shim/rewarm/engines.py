"""Where a container's inference engine listens, and the calls of rewarm_hooks.engine inside its network namespace."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable

from rewarm import processes
from rewarm.annotation import http_target
from rewarm.errors import CaptureError, RestoreError
from rewarm.oci.spec import Spec
from rewarm.request import environment

_PORTS = {"vllm": 8000, "sglang": 30000}
"""What each listens on without --port."""


class StillPaused(CaptureError):
    """An engine that could not be made quiet, and may be paused: it could not be told to go on."""


def target(engine: str, ready: str, spec: Spec) -> int:
    """The engine's port: of `ready` (checked) if that is `http://:PORT/PATH`, of --port, of PORT, or its own default.

    The last --port counts, also among the words of a shell's command line, and also as `$PORT`. VLLM_PORT is not looked
    at: it is for vLLM's processes among each other (vllm/envs.py), and Kubernetes sets it for a service named vllm.
    """
    if ready.startswith("http://"):
        return http_target(ready)[0]
    variables = environment(spec)
    words = " ".join(map(str, (spec.get("process") or {}).get("args") or [])).split()
    given = ""
    for word, following in itertools.pairwise([*words, ""]):
        if word == "--port":
            given = following
        elif word.startswith("--port="):
            given = word.removeprefix("--port=")
    for value in (given, "$PORT"):
        value = value.strip("\"';")
        if value in ("$PORT", "${PORT}"):
            value = variables.get("PORT", "")
        if value.isascii() and value.isdigit() and len(value) < 6 and 0 < int(value) < 65536:
            return int(value)
    return _PORTS[engine]


def quiesce(engine: str, pid: int, port: int, limit: float) -> list[str]:
    """rewarm_hooks.engine.quiesce for the engine at `port` of the network namespace of host process `pid`.

    Raises CaptureError, after telling it to go on, and StillPaused if that was in vain. Call `resume` afterwards in
    every other case, also after another exception.
    """
    from rewarm_hooks import engine as hook  # a restore of a container without an engine does without

    try:
        return hook.quiesce(engine, _connector("quiesce engine", engine, pid, port), limit)
    except hook.EngineError as error:
        kind = StillPaused if error.paused else CaptureError
        raise kind(error.operation, f"{error.object} at port {port}", error.cause, error.next_step) from None


def resume(engine: str, pid: int, port: int, limit: float) -> list[str]:
    """rewarm_hooks.engine.resume for the engine at `port` of the network namespace of host process `pid`.

    Raises RestoreError, at once when the process has ended.
    """
    from rewarm_hooks import engine as hook

    try:
        return hook.resume(engine, _connector("resume engine", engine, pid, port), limit)
    except hook.EngineError as error:
        raise RestoreError(error.operation, f"{error.object} at port {port}", error.cause, error.next_step) from None


def _connector(operation: str, engine: str, pid: int, port: int) -> Callable[[float], socket.socket]:
    """Connects to 127.0.0.1, or else to ::1, within the seconds that it is given.

    Raises the first one's OSError, and EngineError when the process has ended: there is nothing to wait for.
    """
    from rewarm_hooks.engine import EngineError
    from rewarm_native import process

    start = processes.start_time(pid)

    def connect(seconds: float) -> socket.socket:
        if start is None or processes.start_time(pid) != start:
            raise EngineError(operation, engine, "its container has ended")
        end = time.monotonic() + seconds
        first: OSError | None = None
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                connection = process.open_socket_in_netns(pid, family, socket.SOCK_STREAM)
                try:
                    connection.settimeout(left)
                    connection.connect((host, port))
                except BaseException:
                    connection.close()
                    raise
                return connection
            except OSError as error:
                first = first or error
        raise first or TimeoutError("no time left")

    return connect
