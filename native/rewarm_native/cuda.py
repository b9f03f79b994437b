"""The CUDA driver's process checkpoint API (cuda.h, CUDA 12.8 and later), bound to the library at run time.

cffi in ABI mode: no CUDA header or library at build time, and a node without a GPU loads nothing. The calls act on
another process by its pid in the caller's namespace and need no cuInit; the driver wants root. Each waits for the
driver with the GIL released.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ._cuda import ffi
from ._native import ffi as native_ffi
from ._native import lib as native

RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
"""CUprocessState."""

INVALID_VALUE = 1
NOT_INITIALIZED = 3
OUT_OF_MEMORY = 2
OPERATING_SYSTEM = 304
NOT_READY = 600
NOT_SUPPORTED = 801
"""CUresult: a bad argument, or imported memory at a restore; no CUDA in that process; no such process; work in flight
past the time-out; memory or a mode that the driver cannot checkpoint."""

UUID_BYTES = 16

_NEEDED = ("GetState", "GetRestoreThreadId", "Lock", "Checkpoint", "Restore", "Unlock")


class CudaError(Exception):
    """What the driver answered: `code` and `name` of the CUresult, the `call`, and the `pid` that it was about (0: this
    process)."""

    def __init__(self, code: int, name: str, call: str, pid: int) -> None:
        super().__init__(f"{call} of process {pid}: {name}" if pid else f"{call}: {name}")
        self.code = code
        self.name = name
        self.call = call
        self.pid = pid


class MissingSymbol(Exception):
    """The driver library is older than the API; `str` is the symbol."""


def preload(path: str) -> None:
    """Load a library for as long as this process lives: who looks for it by its name afterwards gets this one. Raises
    OSError. With the GIL released, which cffi's dlopen keeps: for a large one that is some hundredths of a second."""
    error = native_ffi.new("char[]", _TEXT)
    if native.rw_load_library(os.fsencode(path), error, _TEXT) < 0:
        raise OSError(native_ffi.string(error).decode("utf-8", "replace"))


_TEXT = 512
"""Bytes for what the loader has to say."""


class Driver:
    """A loaded libcuda. Its methods may be called from several threads at once. All but the state queries raise
    CudaError."""

    def __init__(self, path: str) -> None:
        """Load the library at `path`. Raises OSError if that cannot be loaded, MissingSymbol if it is too old."""
        self._lib: Any = ffi.dlopen(path)
        for name in _NEEDED:
            symbol = f"cuCheckpointProcess{name}"
            try:
                getattr(self._lib, symbol)
            except (AttributeError, ffi.error):
                raise MissingSymbol(symbol) from None

    @property
    def version(self) -> int:
        """The CUDA version that the driver speaks, 1000 * major + 10 * minor; 0 if it does not say."""
        found = ffi.new("int *")
        return int(found[0]) if self._lib.cuDriverGetVersion(found) == 0 else 0

    @property
    def has_custom_storage(self) -> bool:
        """Whether the driver hands device memory over to who checkpoints (615 and later, CUDA 13.4). Only the symbol is
        looked for, nothing calls it."""
        try:
            return bool(self._lib.cuCheckpointOperationComplete)
        except (AttributeError, ffi.error):
            return False

    def state(self, pid: int) -> int:
        """RUNNING, LOCKED, CHECKPOINTED or FAILED."""
        found = ffi.new("int *")
        self._call("GetState", pid, found)
        return int(found[0])

    def restore_thread(self, pid: int) -> int | None:
        """The thread of the process that does the driver's work there; None without CUDA in it, or without it.

        A process that has called cuInit has one, also before it makes a context (driver 580).
        """
        found = ffi.new("int *")
        try:
            self._call("GetRestoreThreadId", pid, found)
        except CudaError as error:
            if error.code in (NOT_INITIALIZED, OPERATING_SYSTEM):
                return None
            raise
        return int(found[0])

    def lock(self, pid: int, timeout_ms: int) -> None:
        """Let the process's CUDA calls block and wait for what the GPU has to do for it, at most so many milliseconds.

        NOT_READY when that time is up: the process runs on as if nothing had been asked.
        """
        self._call("Lock", pid, ffi.new("CUcheckpointLockArgs *", {"timeoutMs": timeout_ms}))

    def checkpoint(self, pid: int) -> None:
        """Move the device memory of a locked process into its own memory, and let go of the GPU. Locked if it fails."""
        self._call("Checkpoint", pid, ffi.new("CUcheckpointCheckpointArgs *"))

    def restore(self, pid: int, pairs: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Undo `checkpoint`; the process is locked afterwards, and has to be able to run during the call.

        `pairs` are (old, new) UUIDs of 16 bytes for every GPU that the process saw, none if they are the same.
        """
        args = ffi.new("CUcheckpointRestoreArgs *")
        # cffi owns the array: it has to live as long as the call.
        array = ffi.new("CUcheckpointGpuPair[]", max(1, len(pairs)))
        for at, (old, new) in enumerate(pairs):
            array[at].oldUuid.bytes = old
            array[at].newUuid.bytes = new
        if pairs:
            args.gpuPairs = array
            args.gpuPairsCount = len(pairs)
        self._call("Restore", pid, args)

    def unlock(self, pid: int) -> None:
        """Let a locked process go on."""
        self._call("Unlock", pid, ffi.new("CUcheckpointUnlockArgs *"))

    def _call(self, name: str, pid: int, argument: object) -> None:
        symbol = f"cuCheckpointProcess{name}"
        code = int(getattr(self._lib, symbol)(pid, argument))
        if code:
            raise CudaError(code, self._name(code), symbol, pid)

    def _name(self, code: int) -> str:
        text = ffi.new("const char **")
        if self._lib.cuGetErrorName(code, text) or not text[0]:
            return f"CUresult {code}"
        return bytes(ffi.string(text[0])).decode("ascii", "replace")
