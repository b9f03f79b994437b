"""Tells a Python program that its container was restored by rewarm, and that it is one of several copies since then.

    from rewarm_hooks.workload import on_restore

    on_restore(lambda restored: register(restored["addresses"], restored["pod"]))

rewarm mounts this file into containers with its annotation and adds it to PYTHONPATH; a program that runs elsewhere as
well may carry a copy of it. It needs Python 3.8 and the standard library, and loads no library in order to seed it.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import errno
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

CONTROL = "/run/rewarm"
"""The control directory of a container of rewarm's."""
_RESTORED = "restored.json"
_PATIENCE = 5.0
"""Seconds to wait for the rest of a message: rewarm writes one line at once."""
_LONGEST = 4096
_GRACE = 0.25
"""Seconds that a forked child has to run another program, before it gets a socket."""
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT}
_NOT_OURS = signal.valid_signals() - _FAULTS
"""What the hook's thread blocks: the program may wait for one by sigwait. Faults are of who makes them."""

_lock = threading.Lock()
_callbacks: list[Callable[[dict[str, Any]], object]] = []
_reseeds = True
_listener: _Listener | None = None
_pending: object | None = None
"""Of a forked child that has no socket yet: which of its threads makes it."""
_seen: tuple[int, int] | None = None
"""Of which restored.json this process, or the one it was forked from, has been told."""
_prepared = False


def on_restore(callback: Callable[[dict[str, Any]], object] | None = None, *, reseed: bool = True) -> bool:
    """Have `callback` called after each restore of this process with what /run/rewarm/restored.json says: a dict, which
    is empty if this process may not read it.

    It is called in a thread of its own while the program runs on; what it raises is printed. Several are called in the
    order of their registration. Before them the generators of `reseed()` are seeded anew, unless a call said
    `reseed=False`. A child that was forked seeds its own and has no callbacks until it registers some.

    Returns whether this process will be told: False without a control directory (this is no container of rewarm's) or
    where no socket can be made in it, which is printed. A program that closes all its descriptors calls it once more.
    """
    global _listener, _pending, _prepared, _reseeds, _seen
    with _lock:
        if not _prepared:
            _seen = _mark()
        before = _reseeds, list(_callbacks)
        # Before its thread starts, which may have something to tell at once.
        _reseeds = _reseeds and reseed
        if callback is not None:
            _callbacks.append(callback)
        if _listener is not None and _listener.is_lost():
            _listener.close()
            _listener = None
        if _listener is None:
            _listener = _listen(_Means(), start=True)
        if _listener is None:
            _reseeds, _callbacks[:] = before
            return False
        _pending = None
        if not _prepared:
            _prepared = True
            os.register_at_fork(after_in_child=_after_fork)
            atexit.register(_forget)
    return True


def reseed() -> None:
    """Seed the generators that a copy of this process shares with it: `random`'s, NumPy's global one, PyTorch's of the
    CPU and of CUDA, and OpenSSL's (as `ssl` has it); each only if its module was imported. Generators that the program
    has made for itself (`random.Random`, `numpy.random.default_rng`, `torch.Generator`) are its own to seed.
    """
    _seed("random", "ssl", "numpy.random", "torch")


def _seed(*names: str) -> None:
    seeds = {"random": _random, "ssl": _openssl, "numpy.random": _numpy, "torch": _torch}
    for name in names:
        try:
            if sys.modules.get(name) is not None:
                seeds[name](sys.modules[name])
        except Exception:
            traceback.print_exc()


def _random(module: Any) -> None:
    module.seed(os.urandom(64))


def _numpy(module: Any) -> None:
    data = os.urandom(64)
    module.seed([int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)])


def _torch(module: Any) -> None:
    number = int.from_bytes(os.urandom(8), "little") >> 1
    module.default_generator.manual_seed(number)
    cuda = getattr(module, "cuda", None)
    if cuda is not None and cuda.is_initialized():
        cuda.manual_seed_all(number)


def _openssl(module: Any) -> None:
    # Its main generator then takes entropy of its own, too, and those of all threads are seeded from it before they
    # give anything (OpenSSL 1.1.1 and newer).
    module.RAND_add(os.urandom(64), 64.0)


class _Means:
    """What a thread waits with, as it was when it was started: then both are gevent's or eventlet's, or neither. One of
    the system's that was there before gevent patched the modules must use nothing of gevent's: it would hang."""

    def __init__(self) -> None:
        self.starter = threading.get_native_id()
        self.socket, self.sleep = socket.socket, time.sleep
        self.poll = getattr(select, "poll", None)  # eventlet has none
        self.mask: set[int] | None = None

    def enter(self) -> None:
        """Have this thread take no signals. If it is the very one that started it, it is the program's own, which would
        be deaf; `mask` stays None."""
        if self.mask is None and threading.get_native_id() != self.starter:
            self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)

    def wait(self, listener: socket.socket) -> None:
        if self.poll is None:
            select.select([listener], [], [])
        else:
            (waiting := self.poll()).register(listener, select.POLLIN)
            waiting.poll()

    def accept(self, listener: Any) -> Any:
        # socket.accept() makes what socket.socket is by now.
        return listener.accept()[0] if self.mask is None else self.socket(fileno=listener._accept()[0])


class _Listener:
    """A socket of this process in the control directory, where a thread waits for rewarm."""

    def __init__(self, means: _Means) -> None:
        self.means = means
        self.owner = os.getpid()
        self.path = os.path.join(CONTROL, f"python-{self.owner}-{os.urandom(4).hex()}.sock")
        self.socket = means.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(None)  # whatever socket.setdefaulttimeout says
            os.fchmod(self.socket.fileno(), 0o600)  # the mode that bind(2) gives to the file
            self.socket.bind(self.path)
            self.socket.listen(8)
            self.socket.setblocking(False)
        except BaseException:
            self.socket.close()
            self._unlink()
            raise

    def close(self) -> None:
        """The file stays with the process that has made it, and the descriptor with whoever has its number now."""
        with contextlib.suppress(OSError):
            if self.is_lost():
                self.socket.detach()
            else:
                self.socket.close()
        self._unlink()

    def _unlink(self) -> None:
        if self.owner == os.getpid():
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def is_lost(self) -> bool:
        """Whether the descriptor was closed by somebody else, or is somebody else's. Its inode is another after each
        restore, its name is not."""
        try:
            return bool(self.socket.getsockname() != self.path)
        except OSError:
            return True

    def start(self) -> None:
        """Return once the thread takes no signals any more. Raises RuntimeError."""
        ready = threading.Event()
        try:
            threading.Thread(target=self.serve, args=(ready,), name="rewarm-on-restore", daemon=True).start()
            ready.wait()
        except BaseException:
            self.close()
            raise

    def serve(self, ready: threading.Event | None = None) -> None:
        """Until the socket is closed or lost."""
        self.means.enter()
        due = _mark() != _seen  # restored before there was a socket, or while it was lost
        if ready is not None:
            ready.set()
        if due:
            _tell(self.means.mask)
        while self.socket.fileno() >= 0:
            try:
                self.means.wait(self.socket)
            except (OSError, ValueError):  # closed meanwhile; a number that is too large for select
                if not self.is_lost():
                    self.means.sleep(1.0)
            # A program that closes all descriptors may have one of its own with this number by now.
            if self.is_lost():
                return
            try:
                connection = self.means.accept(self.socket)
            except BlockingIOError:
                continue
            except OSError:
                self.means.sleep(1.0)  # out of descriptors, perhaps
                continue
            try:
                with connection:
                    told = _is_told(connection)
                if told:
                    _tell(self.means.mask)
            except Exception:
                traceback.print_exc()


def _tell(mask: set[int] | None) -> None:
    """Without the lock, which a program of gevent's may hold in the same thread. `mask` is for the callbacks."""
    global _seen
    mark, callbacks = _mark(), list(_callbacks)
    if _reseeds:
        reseed()
    _seen = mark  # only now: a child that is forked meanwhile seeds its own
    document = _document()
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # which the children of a callback inherit
    try:
        for callback in callbacks:
            try:
                callback(document)
            except BaseException:  # sys.exit() in it ends neither the program nor this thread
                traceback.print_exc()
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)


def _listen(means: _Means, *, start: bool) -> _Listener | None:
    """None without a control directory, or where the kernel refuses a socket or a thread."""
    if not os.path.isdir(CONTROL):
        return None
    _sweep(means)
    try:
        made = _Listener(means)
        if start:
            made.start()
    except (OSError, RuntimeError) as error:
        print(f"rewarm: this process will not be told of a restore: {error}", file=sys.stderr)
        return None
    return made


def _is_told(connection: socket.socket) -> bool:
    connection.settimeout(_PATIENCE)
    try:
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(_LONGEST))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(message, dict) and message.get("event") == "restored"


def _document() -> dict[str, Any]:
    try:
        with open(os.path.join(CONTROL, _RESTORED), "rb") as file:
            return dict(json.loads(file.read()))
    except (OSError, ValueError, TypeError) as error:  # it is for the container's user, and this one may be another
        print(f"rewarm: this process cannot read what its restore says: {error}", file=sys.stderr)
        return {}


def _mark() -> tuple[int, int] | None:
    """What tells one restored.json from another; None before the first restore. Who may not read it sees this."""
    with contextlib.suppress(OSError):
        found = os.stat(os.path.join(CONTROL, _RESTORED))
        return found.st_ino, found.st_mtime_ns
    return None


def _sweep(means: _Means) -> None:
    """Remove the sockets of processes that ended without doing so, as forked ones do, or that run another program."""
    with contextlib.suppress(OSError):
        heard: set[str] | None = None
        for name in os.listdir(CONTROL):
            words = name.split("-")
            if len(words) != 3 or words[0] != "python" or not words[1].isdigit() or not name.endswith(".sock"):
                continue
            path = os.path.join(CONTROL, name)
            with contextlib.suppress(OSError):
                if not _has_ended(int(words[1])):
                    heard = _heard() if heard is None else heard
                    if path in heard or not _is_refused(path, means):
                        continue
                os.unlink(path)


def _has_ended(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


def _heard() -> set[str]:
    """The unix sockets of this network namespace. To connect to all would wake processes, and spoil a capture."""
    with open("/proc/net/unix", errors="replace") as file:
        return {line.split(None, 7)[-1].rstrip("\n") for line in file}


def _is_refused(path: str, means: _Means) -> bool:
    """It may be heard in another network namespace."""
    with means.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        return connection.connect_ex(path) == errno.ECONNREFUSED


def _after_fork() -> None:
    """No thread of the parent's is in a child; one may have stopped in the middle of anything under the lock."""
    global _lock, _listener, _pending, _seen
    _lock = threading.Lock()
    _callbacks.clear()
    parents, _listener, _pending = _listener, None, None
    if parents is not None:
        parents.close()
    if not _reseeds or _is_for_exec():
        return
    mark = _mark()
    late = mark != _seen  # the parent was restored and is not told yet: its numbers are those of the other copies
    if late:
        _seed("random", "ssl")
        _seen = mark
    _pending = token = object()
    try:
        # Not threading's: under gevent that would run the program's greenlets before the child is theirs.
        _thread.start_new_thread(_listen_later, (token, _Means(), late))
    except RuntimeError as error:
        print(f"rewarm: this process will not be told of a restore: {error}", file=sys.stderr)


def _is_for_exec() -> bool:
    """Whether subprocess forks, for a `preexec_fn`: it goes on to run another program, and to have a thread until then
    would keep it from a new user namespace."""
    frame: Any = sys._getframe()
    while frame := frame.f_back:
        module = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "_execute_child" and module.endswith("subprocess"):
            return True
    return False


def _listen_later(token: object, means: _Means, late: bool) -> None:
    """A child that was forked in order to run another program has done so by then, and leaves nothing."""
    global _listener, _pending
    means.enter()
    if late:  # here, where it may hang: a lock that another thread of the parent's held is never given back
        _seed("numpy.random", "torch")
    means.sleep(_GRACE)
    if not _lock.acquire(blocking=False):  # who holds it makes the socket, or the process ends
        return
    try:
        if _pending is not token:
            return
        _pending = None
        _listener = made = _listen(means, start=False)
    finally:
        _lock.release()
    if made is not None:
        made.serve()


def _forget() -> None:
    global _pending
    with _lock:
        _pending = None
        if _listener is not None:
            _listener.close()
