"""What is called of an inference engine before a capture, so that nothing is in flight, and afterwards to go on.

The engine is in the container, so its answers are hostile input: a call ends in time whatever comes, of an answer no
more than a few KiB is read, redirects are not followed, and nothing of it decides more than which call is the next.

Endpoints, by the engines' sources (vLLM 0.14 to 0.32: entrypoints/serve/ and v1/engine/core.py; SGLang, before and
since its pause_generation: srt/entrypoints/http_server.py, srt/managers/). Why these: docs/decisions/0016-engines.md.
"""

from __future__ import annotations

import re
import time

from .errors import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    Connect = Callable[[float], socket.socket]

ENGINES = ("vllm", "sglang")

_HEAD_MOST = 16 << 10  # bytes of status line and headers: uvicorn's own take a few hundred
_BODY_MOST = 4 << 10  # bytes
_BODY_WAIT = 1.0  # seconds: engines send a short answer's head and body at once
_POLL = 0.1  # seconds
_UNDO = 0.2  # part of the limit of `quiesce` that is kept for continuing what could not be quiesced
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r\n]")
_LENGTH = re.compile(rb"\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r?\n", re.IGNORECASE)
_ASLEEP = re.compile(rb'"is_sleeping"\s*:\s*(true|false)\b')

_ABSENT = (404, 405, 501)
_FORBIDDEN = (401, 403)
_NOT_YET = (0, 503)

# vLLM: no new request is scheduled, those that run are waited for, prefix and encoder caches are dropped (clear_cache
# defaults to true). The second name of the same is all that 0.14 has, and newer ones take both.
_VLLM_PAUSE = "/pause?mode=wait&wait_for_inflight_requests=true"
# SGLang: after `flush_cache` has said that it is idle, so there is nothing to keep or to abort.
_SGLANG_PAUSE = b'{"mode": "in_place"}'

_PORT = "see that it listens, and that this is its port: that of rewarm.dev/ready (http://:PORT/PATH), or of --port"
_BUSY = "capture it while it serves nobody, or give it more time"
_NEEDS = {
    "vllm": "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, or leave out rewarm.dev/engine",
    "sglang": "see that the port is SGLang's own (--port), or leave out rewarm.dev/engine",
}


class EngineError(Exception):
    """An engine that could not be made quiet, or does not go on. `str` is one line.

    operation: a verb phrase;  object: the engine;  cause: why;  next_step: what the operator can do, may be empty;
    paused: whether `quiesce` may have left it paused.
    """

    def __init__(self, operation: str, object: str, cause: str, next_step: str = "", paused: bool = False) -> None:
        super().__init__(operation, object, cause, next_step)
        self.operation = operation
        self.object = object
        self.cause = cause
        self.next_step = next_step
        self.paused = paused

    def __str__(self) -> str:
        text = f"{self.operation} {self.object}: {self.cause}"
        return f"{text}; {self.next_step}" if self.next_step else text


class _Failed(Exception):
    """A call that got no answer, or none that it can go on with; `str` is the cause. status: 0 for no answer."""

    def __init__(self, cause: str, status: int = 0, next_step: str = "") -> None:
        super().__init__(cause)
        self.status = status
        self.next_step = next_step


def quiesce(engine: str, connect: Connect, limit: float) -> list[str]:
    """Wait until the engine has no request in flight, have it drop its caches and start no other. Weights stay.

    `connect` takes seconds and gives a connected TCP socket to the engine's port, or raises OSError; EngineError, which
    passes as it is, when there is no engine any more. Within `limit`
    seconds. Returns what was called, a line each. Requests are waited for, never aborted. Raises EngineError, after
    telling the engine to go on. Call `resume` afterwards in any case: an exception of a signal handler passes as it is.
    """
    operation = "quiesce engine"
    _check(operation, engine)
    calls = _Calls(connect, limit * (1 - _UNDO))
    try:
        if engine == "vllm":
            _quiesce_vllm(calls)
        else:
            _quiesce_sglang(calls)
    except _Failed as failure:
        cause, paused = str(failure), False
        calls.end = calls.begin + limit
        try:
            if calls.paused:
                _continue(engine, calls)
        except _Failed as undone:
            paused = True
            cause += f"; it may be paused, for it could not be told to go on: {undone}"
        raise EngineError(operation, engine, cause, _next_step(engine, failure), paused) from None
    return calls.lines


def resume(engine: str, connect: Connect, limit: float) -> list[str]:
    """Have the engine go on, wake it if it sleeps, and wait until it is healthy. Can be called again, and without need.

    `connect`, `limit` and what is returned are as for `quiesce`. Until the limit it is tried again when there is no
    answer, or a 503. Raises EngineError: then it may be paused.
    """
    operation = "resume engine"
    _check(operation, engine)
    calls = _Calls(connect, limit)
    earlier: _Failed | None = None
    while True:
        try:
            _continue(engine, calls)
            _healthy(engine, calls)
        except _Failed as failure:
            if failure.status not in _NOT_YET or calls.left() <= _POLL:
                # A call that had no time for its answer says less than the one before it.
                said = failure if earlier is None or calls.left() else earlier
                raise EngineError(operation, engine, str(said), _next_step(engine, said)) from None
            earlier = failure
            del calls.lines[:]
            time.sleep(_POLL)
        else:
            return calls.lines


def _check(operation: str, engine: str) -> None:
    if engine not in ENGINES:
        raise EngineError(operation, shown(engine), f"it is not one of {', '.join(ENGINES)}")


def _next_step(engine: str, failure: _Failed) -> str:
    if failure.next_step:
        return failure.next_step
    if failure.status in _FORBIDDEN:
        return "rewarm knows no API keys: serve without one inside the pod, or leave out rewarm.dev/engine"
    if failure.status in _ABSENT:
        return _NEEDS[engine]
    return ""


def _quiesce_vllm(calls: _Calls) -> None:
    try:
        paused = calls.done("POST", _VLLM_PAUSE)
    except _Failed as failure:
        if failure.status or calls.left():
            raise
        raise _Failed(f"requests are still in flight, or it hangs: {failure}", next_step=_BUSY) from None
    # Never /sleep: level 1 takes the weights off the GPU, 2 drops them, and 0 does so in versions that do not know it.
    if not calls.done("POST", "/reset_prefix_cache") and not paused:
        raise _Failed("it has neither /pause nor /reset_prefix_cache", 404)


def _quiesce_sglang(calls: _Calls) -> None:
    while True:
        _flush(calls)
        if not calls.done("POST", "/pause_generation", _SGLANG_PAUSE):
            return  # an old one: it was idle a moment ago, and that is all that can be had
        # A request may have come in between; flushing tells, and drops what one that has ended since has left.
        if _flush(calls, wait=False):
            return
        calls.done("POST", "/continue_generation", b"{}")
        calls.poll("")


def _flush(calls: _Calls, wait: bool = True) -> bool:
    """Whether it was idle and has dropped its caches; SGLang answers 400 while requests run or wait."""
    while True:
        status, body, seconds = calls.ask("POST", "/flush_cache")
        if status in _ABSENT:
            raise _Failed(f"it has no /flush_cache (answered {status})", status)
        if status != 400:
            calls.accept("POST /flush_cache", status, body, seconds)
            return True
        if not wait:
            return False
        calls.poll(_said(body))


def _continue(engine: str, calls: _Calls) -> None:
    """Undo what `quiesce` did, and a sleep; does nothing to an engine that runs."""
    if engine == "sglang":
        # Never /resume_memory_occupation: its scheduler dies of it when nothing was released (KeyError).
        calls.done("POST", "/continue_generation", b"{}")
        return
    # First: requests that are scheduled while the weights are away end the engine.
    status, body, seconds = calls.ask("GET", "/is_sleeping")
    if status not in _ABSENT:
        calls.accept("GET /is_sleeping", status, body, seconds)
        found = _ASLEEP.search(body)
        if found is None:
            raise _Failed("GET /is_sleeping was answered by something else" + _said(body), 502)
        if found[1] == b"true":  # newer ones say so of a pause, too, and waking ends it
            calls.done("POST", "/wake_up")
    calls.done("POST", "/resume")


def _healthy(engine: str, calls: _Calls) -> None:
    """Raises _Failed. SGLang generates a token for /health_generate, which takes it a second; vLLM's is a flag."""
    paths = ("/health",) if engine == "vllm" else ("/health_generate", "/health")
    if not any(calls.done("GET", path) for path in paths):
        raise _Failed(f"it has no {' or '.join(paths)}", 404)


class _Calls:
    """Calls of one engine, which together end in time.

    begin, end: of time.monotonic();  lines: what was called and answered;  paused: whether the engine may be.
    """

    def __init__(self, connect: Connect, limit: float) -> None:
        self._connect = connect
        self.begin = time.monotonic()
        self.end = self.begin + limit
        self.lines: list[str] = []
        self.paused = False

    def left(self) -> float:
        """Seconds; 0 when the time is up."""
        return max(0.0, self.end - time.monotonic())

    def poll(self, said: str) -> None:
        """Wait a moment for requests in flight to end; `said`: the engine's words of them. Raises _Failed."""
        if self.left() <= _POLL:
            raise _Failed(f"requests are still in flight after {time.monotonic() - self.begin:.1f} s{said}", 0, _BUSY)
        time.sleep(_POLL)

    def done(self, method: str, path: str, body: bytes = b"") -> bool:
        """Whether the engine did it; False if it has no such endpoint. Raises _Failed."""
        status, answer, seconds = self.ask(method, path, body)
        what = f"{method} {path}"
        if status in _ABSENT:
            self.lines.append(f"{what}: not there ({status})")
            return False
        self.accept(what, status, answer, seconds)
        return True

    def accept(self, what: str, status: int, body: bytes, seconds: float) -> None:
        """Note what was answered; raises _Failed unless it is a success."""
        if not 200 <= status < 300:
            raise _Failed(f"{what} was answered by status {status}{_said(body)}", status)
        self.lines.append(f"{what}: {status} in {seconds:.2f} s")

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes, float]:
        """Status, the first KiBs of the body, and the seconds that it took. Raises _Failed."""
        begin = time.monotonic()
        try:
            with self._connect(self._time()) as connection:
                connection.settimeout(self._time())
                self.paused = self.paused or path.startswith("/pause")  # even if no answer comes
                connection.sendall(_request(method, path, body))
                head, rest = self._head(connection)
                status = _STATUS.match(head)
                if status is None:
                    raise _Failed(f"{method} {path} was answered by something that is not HTTP{_said(head)}", 502)
                if path.startswith("/pause") and status[1].startswith(b"4"):
                    self.paused = False
                return int(status[1]), self._body(connection, head, rest), time.monotonic() - begin
        except TimeoutError:
            raise _Failed(f"{method} {path} had no answer after {time.monotonic() - begin:.1f} s") from None
        except ConnectionRefusedError as error:
            raise _Failed(f"{method} {path}: {error.strerror or error}", next_step=_PORT) from None
        except OSError as error:
            raise _Failed(f"{method} {path}: {error.strerror or error}") from None

    def _time(self) -> float:
        """What is left, for settimeout, to which 0 means something else. Raises TimeoutError."""
        left = self.left()
        if not left:
            raise TimeoutError
        return left

    def _head(self, connection: socket.socket) -> tuple[bytes, bytes]:
        """Status line and headers with their last line feed, and what has come behind the empty line."""
        data = b""
        while len(data) < _HEAD_MOST:
            connection.settimeout(self._time())
            piece = connection.recv(_BODY_MOST)
            if not piece:
                raise _Failed("the connection was closed before an answer" + _said(data))
            data += piece
            if not data.startswith(b"HTTP/1."[: len(data)]):
                return data, b""  # no need to wait for the end of that
            for end in (b"\r\n\r\n", b"\n\n"):
                head, found, rest = data.partition(end)
                if found:
                    return head + b"\r\n", rest
        raise _Failed(f"the answer has more than {_HEAD_MOST >> 10} KiB of headers", 502)

    def _body(self, connection: socket.socket, head: bytes, data: bytes) -> bytes:
        """As much of it as comes soon: an answer whose body does not end is one nevertheless."""
        end = time.monotonic() + min(_BODY_WAIT, self.left())
        length = _LENGTH.search(head)
        most = min(_BODY_MOST, int(length[1])) if length else _BODY_MOST
        while len(data) < most:
            left = end - time.monotonic()
            if left <= 0:
                break
            connection.settimeout(left)
            try:
                piece = connection.recv(_BODY_MOST)
            except OSError:
                break
            if not piece:
                break
            data += piece
        return data[:most]


def _request(method: str, path: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: rewarm\r\nAccept: */*\r\nConnection: close\r\n"
    if method == "POST":
        kind = "Content-Type: application/json\r\n" if body else ""
        head += f"{kind}Content-Length: {len(body)}\r\n"
    return head.encode("ascii") + b"\r\n" + body


def _said(body: bytes) -> str:
    return f" ({shown(body.strip())})" if body.strip() else ""
