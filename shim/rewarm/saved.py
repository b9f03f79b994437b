"""The device memory of a container on its way into a snapshot, as far as it was taken out of the driver's hands."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rewarm import preload, processes
from rewarm.gpu import pieces
from rewarm.gpu.container import ContainerGpus
from rewarm.gpu.hold import Hold, Users
from rewarm.oci.spec import Spec
from rewarm.settings import Settings
from rewarm.store.writer import SnapshotWriter

if TYPE_CHECKING:
    from rewarm.gpu.save import Save

COPIED = "device memory was stored out of a copy on the GPU (gpu_copy)"
NO_COPY = "the GPU had not as much room as gpu_copy allows a copy of: the program stood still until all was stored"


class SavedMemory:
    """Context manager, entered before the pause. Where no process has served memory it does nothing."""

    def __init__(
        self, gpus: ContainerGpus, users: Users | None, writer: SnapshotWriter, settings: Settings, threads: int
    ) -> None:
        """Opens the GPUs. Raises GpuError."""
        self._writer = writer
        self._limit = settings.capture_timeout
        self._copy = settings.gpu_copy > 0
        self._save: Save | None = None
        self._found: list[pieces.Piece] = []
        self.notes: list[str] = []
        """What the user should know, a line each."""
        if users is not None and users.served:
            from rewarm.gpu.save import Save  # only where there is anything

            writer.expect(sum(users.served.values()))
            uuids = [device.gpu.uuid for device in gpus.devices]
            self._save = Save(settings.libcuda, uuids, settings.state_dir, writer.add_chunk, threads, settings.gpu_copy)

    def __enter__(self) -> SavedMemory:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self, held: Hold) -> None:
        """Begin to read what `held` has taken. Raises GpuError, RestoreError."""
        if self._save is not None:
            places = held.places()
            numbered = [(processes.namespace_pid(pid), gpu, span, fd) for pid, gpu, span, fd in places]
            self._save.start(numbered, held.needed, self._limit)

    def settle(self) -> None:
        """Wait until the processes may run again: at once where the GPU had room for a copy, else until all is stored.
        Raises GpuError, StoreError."""
        if self._save is not None and not self._save.detached:
            self._found = self._save.join(self._limit)

    def release(self) -> None:
        """The processes run again: what they free from now on is to be free, unless it is a copy that is stored."""
        if self._save is not None and self._copy:
            self.notes.append(COPIED if self._save.detached else NO_COPY)
        if self._save is not None and not self._save.detached:
            self.close()

    def finish(self) -> tuple[int, int]:
        """Wait until all is stored, which has to be before any other chunk is. Returns the bytes, and how many of them
        are in windows of zeros, which are not stored.

        Raises GpuError, StoreError.
        """
        if self._save is not None:
            self._found = self._save.join(self._limit)
            self.close()
        found = self._found
        if found:
            self._writer.add_bytes(pieces.PIECES, pieces.encode(found))
        zeros = sum(piece.chunks.count(pieces.ZEROS) for piece in found) * pieces.WINDOW
        return sum(piece.size for piece in found), zeros

    def close(self) -> None:
        """Let go of the memory and the GPUs; nothing happens the second time."""
        if self._save is not None:
            self._save.close()
            self._save = None


def add_library(spec: Spec, writer: SnapshotWriter) -> None:
    """The library that the container has, if any: its processes have it mapped, and another version would not do."""
    if path := preload.of(spec):
        writer.add_file(pieces.LIBRARY, path)
