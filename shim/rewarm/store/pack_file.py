"""An open pack of a store in a directory."""

from __future__ import annotations

import os
from pathlib import Path

from . import files


class PackFile:
    """A pack's open file; see backend.Pack. `fd` is for readers that know files: O_DIRECT, RWF_NOWAIT, readahead."""

    def __init__(self, fd: int, path: Path) -> None:
        """Takes `fd` over; `path` is for errors. Raises OSError."""
        self.fd = fd
        self.size = os.fstat(fd).st_size
        """Bytes when it was opened."""
        self._path = path

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset`; returns the bytes read, fewer only at the end. Raises StoreError."""
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self.fd, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise files.store_error("read pack", self._path, error) from None
        return done

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer at the end. Raises StoreError."""
        pieces = []
        try:
            while length:
                piece = os.pread(self.fd, length, offset)
                if not piece:
                    break
                pieces.append(piece)
                offset, length = offset + len(piece), length - len(piece)
        except OSError as error:
            raise files.store_error("read pack", self._path, error) from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Close it; again does nothing."""
        if self.fd >= 0:
            files.close(self.fd)
            self.fd = -1
