"""Tells a Python program that its container was restored by rewarm, and that it is one of several copies since then.

    from rewarm_hooks.workload import on_restore

    on_restore(lambda restored: register(restored["addresses"], restored["pod"]))

rewarm mounts this file into containers with its annotation and adds it to PYTHONPATH; a program that runs elsewhere as
well may carry a copy of it. It needs Python 3.8 and the standard library, and loads no library in order to seed it.
"""

from __future__ import annotations

import atexit
import contextlib
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

_lock = threading.Lock()
_callbacks: list[Callable[[dict[str, Any]], object]] = []
_reseeds = True
_listener: _Listener | None = None
_prepared = False


def on_restore(callback: Callable[[dict[str, Any]], object] | None = None, *, reseed: bool = True) -> bool:
    """Have `callback` called after each restore of this process with what /run/rewarm/restored.json says: a dict, which
    is empty if this process may not read it.

    It is called in a thread of its own while the program runs on; what it raises is printed. Several are called in the
    order of their registration. Before them the generators of `reseed()` are seeded anew, unless a call said
    `reseed=False`. A child that was forked seeds its own and has no callbacks until it registers some.

    Returns whether this process will be told: False without a control directory (this is no container of rewarm's) or
    where no socket can be made in it, which is printed.
    """
    global _listener, _prepared, _reseeds
    with _lock:
        if _listener is None:
            _listener = _listen()
        if _listener is None:
            return False
        _reseeds = _reseeds and reseed
        if callback is not None:
            _callbacks.append(callback)
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
    for name, one in (("random", _random), ("numpy.random", _numpy), ("torch", _torch), ("ssl", _openssl)):
        module = sys.modules.get(name)
        if module is not None:
            try:
                one(module)
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


class _Listener:
    """A socket of this process in the control directory, and the thread that waits there for rewarm."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.path = os.path.join(CONTROL, f"python-{self.owner}-{os.urandom(4).hex()}.sock")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(None)  # whatever socket.setdefaulttimeout says
            os.fchmod(self.socket.fileno(), 0o600)  # the mode that bind(2) gives to the file
            self.socket.bind(self.path)
            self.socket.listen(8)
            self.socket.setblocking(False)
            self._start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The file stays with the process that has made it."""
        self.socket.close()
        if self.owner == os.getpid():
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def _start(self) -> None:
        # The program's signals are not for this thread: it may wait for one by sigwait. Faults are of who makes them.
        faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT}
        self._blocked = signal.valid_signals() - faults
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        try:
            threading.Thread(target=self._serve, name="rewarm-on-restore", daemon=True).start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _serve(self) -> None:
        while self.socket.fileno() >= 0:
            with contextlib.suppress(OSError, ValueError):  # closed meanwhile
                waiting = select.poll()
                waiting.register(self.socket, select.POLLIN)
                waiting.poll()
            # A program that closes all descriptors may have one of its own with this number by now.
            if self._is_lost():
                return
            try:
                connection, _ = self.socket.accept()
            except BlockingIOError:
                continue
            except OSError:
                time.sleep(1.0)  # out of descriptors, perhaps
                continue
            try:
                with connection:
                    told = _is_told(connection)
                if told:
                    self._tell()
            except Exception:
                traceback.print_exc()

    def _is_lost(self) -> bool:
        """Whether the descriptor was closed by somebody else, or is somebody else's. Its inode is another after each
        restore, its name is not."""
        try:
            return bool(self.socket.getsockname() != self.path)
        except OSError:
            return True

    def _tell(self) -> None:
        with _lock:
            reseeds, callbacks = _reseeds, list(_callbacks)
        if reseeds:
            reseed()
        document = _document()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)  # which the children of a callback inherit
        try:
            for callback in callbacks:
                try:
                    callback(document)
                except BaseException:  # sys.exit() in it ends neither the program nor this thread
                    traceback.print_exc()
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)


def _listen() -> _Listener | None:
    """None without a control directory, or where the kernel refuses a socket or a thread."""
    if not os.path.isdir(CONTROL):
        return None
    _sweep()
    try:
        return _Listener()
    except (OSError, RuntimeError) as error:
        print(f"rewarm: this process will not be told of a restore: {error}", file=sys.stderr)
        return None


def _is_told(connection: socket.socket) -> bool:
    connection.settimeout(_PATIENCE)
    data = b""
    try:
        while b"\n" not in data and len(data) < _LONGEST:
            piece = connection.recv(_LONGEST)
            if not piece:
                break
            data += piece
        message = json.loads(data)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(message, dict) and message.get("event") == "restored"


def _document() -> dict[str, Any]:
    try:
        with open(os.path.join(CONTROL, _RESTORED), "rb") as file:
            found: dict[str, Any] = json.loads(file.read())
    except (OSError, ValueError) as error:  # it is for the container's user, and this process may be another's
        print(f"rewarm: this process cannot read what its restore says: {error}", file=sys.stderr)
        return {}
    return found


def _sweep() -> None:
    """Remove the sockets of processes that ended without doing so, as forked ones do."""
    with contextlib.suppress(OSError):
        for name in os.listdir(CONTROL):
            words = name.split("-")
            if len(words) != 3 or words[0] != "python" or not words[1].isdigit() or not name.endswith(".sock"):
                continue
            with contextlib.suppress(OSError):
                try:
                    os.kill(int(words[1]), 0)
                except ProcessLookupError:
                    os.unlink(os.path.join(CONTROL, name))


def _after_fork() -> None:
    """No thread of the parent's is in a child, which may have stopped in the middle of anything under the lock."""
    global _lock, _listener
    _lock = threading.Lock()
    _callbacks.clear()
    parents, _listener = _listener, None
    if parents is not None:
        parents.close()
    if _reseeds:
        _listener = _listen()


def _forget() -> None:
    if _listener is not None:
        _listener.close()
