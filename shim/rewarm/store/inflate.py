"""Decompressing one chunk, bounded by what the chunk table says it holds."""

from __future__ import annotations

import zstandard

_WINDOW = 1 << 23
"""Bytes of history that a frame may ask for, four chunks: a hostile header could claim gigabytes."""


class Inflater:
    """For one thread."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)

    def inflate(self, data: memoryview, into: memoryview) -> str:
        """Decompress the frame `data` to fill `into` exactly, without Python's global lock; returns what is wrong
        with the frame, "" if nothing is."""
        try:
            with self._decompressor.stream_reader(data) as reader:
                count = 0
                while count < len(into):
                    got = reader.readinto(into[count:])
                    if got == 0:
                        return f"its zstd frame holds {count} bytes, not {len(into)}"
                    count += got
                if reader.readinto(bytearray(1)):
                    return f"its zstd frame holds more than {len(into)} bytes"
        except zstandard.ZstdError as error:
            return f"its zstd frame is damaged ({error})"
        return ""
