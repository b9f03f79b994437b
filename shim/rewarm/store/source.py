"""One open file of chunks, a pack of the store or its raw copy in the cache, and the fastest way to read from it.

Python holds its global lock between two system calls, so what is done here for each chunk of 2 MiB decides how many
threads pay: one call when the data is in the page cache, and nothing that grows with the number of chunks.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

from .files import Short, close
from .probe import IN_MEMORY, PAGE, Way, file_system, open_direct, resident

if TYPE_CHECKING:
    from .backend import Pack


class Source:
    """An open pack or cache entry. Any number of streams read from it at once."""

    def __init__(self, pack: Pack | None, fd: int, way: Way) -> None:
        self._pack = pack
        self._fd = fd
        self._way = way
        self._direct = -2  # not tried
        self._nowait = fd >= 0
        self._lock = threading.Lock()
        self.warm = True
        """Whether what was read last was in the page cache. A hint, shared by the streams without a lock."""

    def close(self) -> None:
        """Close the file; nobody may be reading from it."""
        if self._direct >= 0:
            close(self._direct)
        if self._pack is not None:
            self._pack.close()
        elif self._fd >= 0:
            close(self._fd)
        self._direct = self._fd = -1
        self._pack = None

    @property
    def descriptor(self) -> int:
        """Of the file, if it can be read as far as it is in memory (preadv2(2), RWF_NOWAIT); else -1."""
        return self._fd if self._nowait else -1

    def asked(self, able: bool, there: bool) -> bool:
        """What came of asking by `descriptor`: whether the file system could say, and whether all was in memory. The
        result is `cold` for the rest of the part, as of `read`: asked again, a fast device would have it by then."""
        self._nowait = self._nowait and able
        self.warm = there or not able
        return able and not there

    def at_hand(self, offset: int) -> bool:
        """Whether the byte at `offset` is in memory. Raises OSError."""
        if self._fd < 0:
            return False
        found = resident(self._fd, offset)
        return file_system(os.fstat(self._fd).st_dev) in IN_MEMORY if found is None else found

    def bytes(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`, fewer at the end. Raises OSError."""
        data = bytearray(size)
        count = 0
        while count < size and (got := self._plain(memoryview(data)[count:], offset + count)):
            count += got
        return bytes(data[:count])

    def begin(self, offset: int, size: int) -> bool:
        """Whether the part that a stream is about to read has to come from the storage; to be given to `read`."""
        if self.warm or self._fd < 0:
            return False
        return not (self._nowait and resident(self._fd, offset) and resident(self._fd, offset + size - 1))

    def read(self, buffer: memoryview, size: int, offset: int, cold: bool) -> bool:
        """Fill the first `size` bytes of `buffer`, which may be longer, from `offset`.

        `cold` skips the look into the page cache; the result is `cold` for the rest of the part. Raises OSError, and
        Short if the file ends early.
        """
        view = buffer[:size]
        count = 0
        if not cold and self._nowait:
            try:
                count = os.preadv(self._fd, [view], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._nowait = False
            if count == size:
                self.warm = True
                return False
            self.warm = False
        turn = self._way.take()
        if not (count == 0 and self._fd >= 0 and self._way.direct and self._read_direct(buffer, size, offset)):
            while count < size:
                got = self._plain(view[count:], offset + count)
                if got == 0:
                    raise Short(offset + count)
                count += got
        self._way.done(turn, size)
        return True

    def _plain(self, view: memoryview, offset: int) -> int:
        if self._fd >= 0:
            return os.preadv(self._fd, [view], offset)
        assert self._pack is not None
        return self._pack.read_into(view, offset)

    def _read_direct(self, buffer: memoryview, size: int, offset: int) -> bool:
        """Whether O_DIRECT brought all of it."""
        if self._direct == -2:
            self._open_direct()
        length = -(-size // PAGE) * PAGE
        if self._direct < 0 or length > len(buffer):
            return False
        try:
            # Fewer bytes than asked for are right at the end of a file; the buffered read then says what is missing.
            return os.preadv(self._direct, [buffer[:length]], offset) >= size
        except OSError:
            # Not every file system says EINVAL for what it cannot do; if it is the file, the buffered read says so.
            self._way.refuse()
            return False

    def _open_direct(self) -> None:
        with self._lock:
            if self._direct == -2:
                self._direct = open_direct(self._fd)
                if self._direct < 0:
                    self._way.refuse()
