"""Device memory that is loaded, for tests: which pieces there are, and whether they hold what they should."""

from __future__ import annotations

import mmap
import os
import random
import resource
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from rewarm.gpu.pieces import WINDOW, ZEROS, Piece, Span
from support import fake_gpu
from support.fake_gpu import FakeGpus

GPU = fake_gpu.uuid(0)
PATTERN = ("xx.x", "." * 3, "x" * 9)
"""Pieces, an x for each window that is not zeros."""
COUNT = sum(piece.count("x") for piece in PATTERN)
DATA = [random.Random(number).randbytes(WINDOW) for number in range(COUNT)]


def pieces() -> list[Piece]:
    """Chunks lie in the order of their numbers, from the last window to the first."""
    numbers = iter(reversed(range(COUNT)))
    found = []
    for at, pattern in enumerate(PATTERN):
        chunks = array("I", [next(numbers) if letter == "x" else ZEROS for letter in pattern])
        found.append(Piece(7, 0, (at + 1) << 32, len(pattern) * WINDOW, chunks))
    return found


def right(wanted: Sequence[Piece], places: Sequence[tuple[Span, int]], data: Sequence[bytes] = DATA) -> bool:
    """Whether each place holds what it should; closes them."""
    found = True
    for piece, (span, fd) in zip(wanted, places, strict=True):
        assert span == piece.span
        with mmap.mmap(fd, piece.size, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
            for at, chunk in enumerate(piece.chunks):
                content = bytes(WINDOW) if chunk == ZEROS else data[chunk]
                found = found and memory[at * WINDOW : (at + 1) * WINDOW] == content
        os.close(fd)
    return found


@contextmanager
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpus]:
    """A node with one GPU, in this process: its memory is not zeros, and this process's limits are as they were."""
    found = FakeGpus(tmp_path / "gpus")
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPU)
    for name in ("CUDA_CACHE_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "")  # taken back afterwards
    monkeypatch.setenv("FAKE_CUDA_DIRTY", "1")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield found
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
