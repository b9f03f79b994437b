"""What the GPU cases share: numbered answers that depend on all earlier ones, by HTTP.

GET /probe -> {"n", "answer"} of the next step; /reset -> back to before the first one; /checksum -> of what steps do
not change; /state; POST /busy SECONDS -> the GPU is busy for so long from now on; POST /open "KIND MAJOR MINOR" -> what
opening such a device gives. The same program gives the same answers in every run.
"""

from __future__ import annotations

import os
import queue
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from support.workloads import web

_KINDS = {"c": 0o020000, "b": 0o060000}


class Case:
    """One program. Every method is called by the main thread, whichever connection asks: a restored program finds
    what libraries keep for each thread where it was."""

    def reset(self) -> None:
        """Go back to before the first step."""

    def step(self) -> Any:
        """Do the next step; its result as JSON."""
        raise NotImplementedError

    def checksum(self) -> Any:
        """Of everything that the steps leave alone."""
        return None

    def busy(self, seconds: float) -> None:
        """Give the GPU so much to do, and do not wait for it."""
        raise NotImplementedError("this case cannot keep the GPU busy")

    def state(self) -> dict[str, Any]:
        """More for /state."""
        return {}


def open_device(body: bytes) -> dict[str, str]:
    """What the cgroup's device rules say: a node of our own is made, and opened."""
    kind, major, minor = body.decode().split()
    directory = tempfile.mkdtemp(dir="/dev")
    path = f"{directory}/node"
    try:
        os.mknod(path, 0o600 | _KINDS[kind], os.makedev(int(major), int(minor)))
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        return {"open": error.strerror or str(error)}
    finally:
        if os.path.lexists(path):
            os.unlink(path)
        os.rmdir(directory)
    return {"open": "ok"}


def serve(case: Case) -> None:
    """Serves `case`, and does not return."""
    nonce = os.urandom(16).hex()
    number = 0
    work: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()

    def step() -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"n": number, "answer": case.step()}

    def reset() -> dict[str, Any]:
        nonlocal number
        number = 0
        case.reset()
        return {}

    def in_turn(function: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()
        work.put((function, done))
        return done.result()

    def busy(body: bytes) -> Any:
        return in_turn(lambda: case.busy(float(body)))

    routes: dict[str, web.Route] = {
        "/probe": lambda _body: in_turn(step),
        "/reset": lambda _body: in_turn(reset),
        "/checksum": lambda _body: {"checksum": in_turn(case.checksum)},
        "/busy": busy,
        "/open": open_device,
        "/state": lambda _body: {"pid": os.getpid(), "n": number, "nonce": nonce, **case.state()},
    }
    case.reset()
    web.start(web.port(), routes)
    while True:
        function, done = work.get()
        try:
            done.set_result(function())
        except Exception as error:
            done.set_exception(error)
