"""Whether compressing a pack makes restores faster, and the one way to take a frame apart.

The model: a restore streams from the store at `rate` and decompresses on `threads` threads, both at once, so it
takes the longer of the two times; without compression it takes the time to read. Compression has to win clearly,
since the capture pays for it too and a page cache or a faster node would make it lose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .chunks import CHUNK

LEVEL = 1
"""Higher levels take several times as long for a few percent."""
MARGIN = 1.3
"""How many times faster a restore must be for a pack to be compressed."""
MODES = ("auto", "zstd", "off")


class Sample(NamedTuple):
    """What some chunks of a pack were like: bytes before and after, and seconds of one thread to undo it."""

    raw: int
    stored: int
    seconds: float

    def plus(self, other: Sample) -> Sample:
        """Both together."""
        return Sample(self.raw + other.raw, self.stored + other.stored, self.seconds + other.seconds)


def worth(sample: Sample, rate: float, threads: int) -> bool:
    """Whether a restore gains MARGIN from compression, reading at `rate` bytes/s with that many threads."""
    if sample.stored >= sample.raw or rate <= 0:
        return False
    raw_seconds = sample.raw / rate
    return raw_seconds >= MARGIN * max(sample.stored / rate, sample.seconds / max(1, threads))


def compressor() -> Any:
    """A zstandard.ZstdCompressor, for one thread."""
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False)


def decompress(frame: bytes | memoryview, size: int) -> bytes:
    """The `size` bytes (at most CHUNK) that the frame holds. Raises ValueError if it is no frame of exactly these.

    The size in the frame's header is looked at first: zstandard allocates what it says.
    """
    import zstandard

    if not 0 < size <= CHUNK:
        raise ValueError(f"{size} bytes are no chunk")
    try:
        says = zstandard.frame_content_size(frame)
        if says != size:
            raise ValueError(f"its zstd frame says {says} bytes instead of {size}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=CHUNK)
        data = decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"is no whole zstd frame: {str(error)[:120]}") from None
    if len(data) != size:
        raise ValueError(f"its zstd frame holds {len(data)} bytes instead of {size}")
    return data
