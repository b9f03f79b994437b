"""Whether compression pays, as a function of what was measured; and frames that lie."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import zstandard

from rewarm.errors import StoreError
from rewarm.store.chunks import CHUNK
from rewarm.store.compression import MARGIN, Sample, compressor, decompress, worth
from rewarm.store.rate import PROBE, read_rate
from support.chunked import noise, text
from support.snapshots import tmpfs

MB = 10**6


@pytest.mark.parametrize(
    ("ratio", "undo_rate", "store_rate", "threads", "expected"),
    [
        (0.3, 1000 * MB, 100 * MB, 2, True),  # a slow share, halves and more
        (0.3, 1000 * MB, 2000 * MB, 1, False),  # a fast disk: decompression would be the limit
        (0.3, 1000 * MB, 2000 * MB, 16, True),  # the same disk with many threads
        (0.78, 1000 * MB, 100 * MB, 16, False),  # 1.28 times faster is no clear gain
        (0.76, 1000 * MB, 100 * MB, 16, True),
        (1.0, 1000 * MB, 1 * MB, 16, False),
        (1.2, 1000 * MB, 1 * MB, 16, False),
        (0.1, 130 * MB, 100 * MB, 1, True),
        (0.1, 129 * MB, 100 * MB, 1, False),
    ],
)
def test_worth(ratio: float, undo_rate: float, store_rate: float, threads: int, expected: bool) -> None:
    raw = 4 * CHUNK
    assert worth(Sample(raw, int(raw * ratio), raw / undo_rate), store_rate, threads) is expected


def test_worth_with_figures_that_cannot_be() -> None:
    assert not worth(Sample(100, 10, 0.0), 0.0, 4)
    assert not worth(Sample(0, 0, 0.0), 1.0, 4)
    assert worth(Sample(100, 10, 0.0), 1.0, 0)
    assert Sample(1, 2, 3.0).plus(Sample(10, 20, 30.0)) == Sample(11, 22, 33.0)
    assert MARGIN > 1


@pytest.mark.parametrize("data", [text(CHUNK, 1), text(4096, 2), noise(8192, 3), bytes(CHUNK)])
def test_round_trip(data: bytes) -> None:
    frame = compressor().compress(data)
    assert decompress(frame, len(data)) == decompress(memoryview(frame), len(data)) == data


FRAME = zstandard.ZstdCompressor().compress(text(8192, 1))


@pytest.mark.parametrize(
    ("frame", "size"),
    [
        (FRAME, 4096),
        (FRAME, 12288),
        (FRAME[:-1], 8192),
        (FRAME + b"x", 8192),
        (FRAME + FRAME, 8192),
        (b"", 8192),
        (b"x" * 100, 8192),
        (zstandard.ZstdCompressor(write_content_size=False).compress(text(8192, 1)), 8192),
        (FRAME, 0),
        (FRAME, CHUNK + 4096),
    ],
)
def test_a_frame_that_is_not_the_chunk(frame: bytes, size: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        decompress(frame, size)


def test_a_frame_that_says_that_it_is_huge_costs_no_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(256 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="says 268435456 bytes instead of 8192"):
        decompress(bomb, 8192)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_rate_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    assert 10**6 < read_rate(tmp_path) < 10**12
    assert list(tmp_path.iterdir()) == []
    with tmpfs(tmp_path / "full", f"size={PROBE // 2}") as mount:
        with pytest.raises(StoreError, match="no space is left"):
            read_rate(mount)
        assert list(mount.iterdir()) == []
