"""`device/pieces` is hostile input: what a capture would not have written is refused, by a message that names it."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.gpu import pieces
from rewarm.gpu.pieces import MAX, TOP, WINDOW, ZEROS, Bad, Piece, Span, decode, encode

BASE = 0x7F00_0000_0000
HEAD = struct.calcsize("<IIQQ")
PIDS = (1, 7)
GPUS = 2


def piece(*chunks: int, at: int = BASE, pid: int = 1, gpu: int = 0) -> Piece:
    return Piece(pid, gpu, at, len(chunks) * WINDOW, array("I", chunks))


def read(*wanted: Piece, sizes: Sequence[int] | None = None) -> list[Piece]:
    """Where every chunk that is named is there, and a whole window."""
    named = {chunk for one in wanted for chunk in one.chunks if chunk != ZEROS}
    return decode(encode(wanted), [WINDOW] * len(named) if sizes is None else sizes, GPUS, PIDS)


def raw(pid: int = 1, gpu: int = 0, address: int = BASE, size: int = WINDOW, slots: int | None = None) -> bytes:
    """A piece of zeros, with as many slots as it has windows unless told."""
    return struct.pack("<IIQQ", pid, gpu, address, size) + b"\xff" * 4 * (size // WINDOW if slots is None else slots)


def test_round_trip() -> None:
    wanted = [
        piece(2, ZEROS, 0, at=BASE + 8 * WINDOW),
        piece(ZEROS, pid=7, gpu=1),
        piece(1, at=BASE),
        piece(*[ZEROS] * (MAX // WINDOW), at=MAX),
        piece(ZEROS, at=TOP - WINDOW),
        piece(3, at=WINDOW, pid=7),
    ]
    assert read(*wanted) == wanted
    assert wanted[0].span == Span(BASE + 8 * WINDOW, 3 * WINDOW)
    assert read() == []


@st.composite
def tables(draw: st.DrawFn) -> list[Piece]:
    """What a capture may write: pieces that do not overlap in a process, every chunk in one place."""
    lengths = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), max_size=8))
    numbers = iter(draw(st.permutations(range(sum(map(sum, lengths))))))
    ends = dict.fromkeys(PIDS, WINDOW)
    made = []
    for filled in lengths:
        pid = draw(st.sampled_from(PIDS))
        start = ends[pid] + WINDOW * draw(st.integers(0, 1 << 20))
        chunks = [next(numbers) if one else ZEROS for one in filled]
        made.append(piece(*chunks, at=start, pid=pid, gpu=draw(st.integers(0, GPUS - 1))))
        ends[pid] = start + len(chunks) * WINDOW
    return draw(st.permutations(made))


@given(tables())
def test_whatever_a_capture_writes_is_read(wanted: list[Piece]) -> None:
    assert read(*wanted) == wanted


@given(tables(), st.data())
def test_cut_anywhere_it_is_refused(wanted: list[Piece], data: st.DataObject) -> None:
    """But between two pieces, where the chunks tell, if there are any in the rest."""
    encoded = encode(wanted)
    ends = [len(encode(wanted[:count])) for count in range(len(wanted) + 1)]
    cut = data.draw(st.integers(0, len(encoded)))
    sizes = [WINDOW] * sum(chunk != ZEROS for one in wanted for chunk in one.chunks)
    if cut in ends and all(chunk == ZEROS for one in wanted[ends.index(cut) :] for chunk in one.chunks):
        assert decode(encoded[:cut], sizes, GPUS, PIDS) == wanted[: ends.index(cut)]
    else:
        with pytest.raises(Bad):
            decode(encoded[:cut], sizes, GPUS, PIDS)


@given(st.binary(max_size=200), st.lists(st.sampled_from([0, 1, WINDOW]), max_size=3))
def test_noise_is_refused_or_a_table(noise: bytes, sizes: list[int]) -> None:
    try:
        found = decode(noise, sizes, GPUS, PIDS)
    except Bad:
        return
    assert encode(found) == noise and (noise or not sizes)


@pytest.mark.parametrize("left", [1, 4, HEAD - 1])
def test_a_head_that_is_cut(left: int) -> None:
    with pytest.raises(Bad, match=f"it goes on for {left} bytes after piece 0"):
        decode(raw() + raw()[:left], [], GPUS, PIDS)


@pytest.mark.parametrize("missing", [1, 2, 3, 4, 5, 12])
def test_slots_that_are_cut(missing: int) -> None:
    with pytest.raises(Bad, match="piece 1 is cut off"):
        decode(raw() + raw(address=BASE + WINDOW, size=3 * WINDOW)[:-missing], [], GPUS, PIDS)


@pytest.mark.parametrize(
    "data",
    [
        raw(pid=2),
        raw(pid=0),
        raw(pid=0xFFFFFFFF),
        raw(gpu=GPUS),
        raw(gpu=0xFFFFFFFF),
        raw(size=0),
        raw(size=WINDOW - 1, slots=1),
        raw(size=WINDOW + 4096, slots=1),
        raw(size=MAX + WINDOW),
        raw(size=1 << 63, slots=1),
        raw(size=(1 << 64) - WINDOW, slots=1),
        raw(address=0),
        raw(address=BASE + 4096),
        raw(address=BASE + WINDOW - 1),
        raw(address=TOP),
        raw(address=TOP - WINDOW, size=2 * WINDOW),
        raw(address=1 << 63),
        raw(address=(1 << 64) - WINDOW),
    ],
)
def test_a_head_that_is_none(data: bytes) -> None:
    good = raw(address=4 << 30)
    assert len(decode(good, [], GPUS, PIDS)) == 1
    pid, gpu, address, size = struct.unpack_from("<IIQQ", data)
    with pytest.raises(Bad, match=f"piece 1 is of process {pid}, GPU {gpu}, {size} bytes at {address:#x}"):
        decode(good + data, [], GPUS, PIDS)


def test_without_a_gpu_there_is_no_piece() -> None:
    with pytest.raises(Bad, match="piece 0 is of process 1, GPU 0"):
        decode(raw(), [], 0, PIDS)


@pytest.mark.parametrize(
    "second",
    [piece(ZEROS), piece(ZEROS, at=BASE + WINDOW), piece(*[ZEROS] * 3, at=BASE - WINDOW), piece(ZEROS, gpu=1)],
)
@pytest.mark.parametrize("turned", [False, True])
def test_an_overlap_in_one_process(second: Piece, turned: bool) -> None:
    both = [piece(ZEROS, ZEROS), second]
    with pytest.raises(Bad, match="two pieces overlap in process 1 at 0x7f"):
        read(*reversed(both) if turned else both)


def test_neighbours_and_other_processes_do_not_overlap() -> None:
    read(piece(ZEROS, ZEROS), piece(ZEROS, at=BASE + 2 * WINDOW), piece(ZEROS, at=BASE - WINDOW))
    read(piece(ZEROS, ZEROS), piece(ZEROS, ZEROS, ZEROS, at=BASE - WINDOW, pid=7), piece(0, pid=7, at=BASE + (8 << 30)))


@pytest.mark.parametrize(
    ("wanted", "sizes", "names"),
    [
        ([piece(0, 1)], [WINDOW], "piece 0 names chunk 1,"),
        ([piece(0), piece(ZEROS - 1, at=BASE + (1 << 30))], [WINDOW], "piece 1 names chunk 4294967294,"),
        ([piece(0)], [], "piece 0 names chunk 0,"),
        ([piece(0, 0)], [WINDOW], "piece 0 names chunk 0,"),
        ([piece(0), piece(0, pid=7)], [WINDOW], "piece 1 names chunk 0,"),
        ([piece(0)], [WINDOW - 4096], "piece 0 names chunk 0,"),
        ([piece(0)], [2 * WINDOW], "piece 0 names chunk 0,"),
        ([piece(0)], [0], "piece 0 names chunk 0,"),
        ([piece(0)], [WINDOW, WINDOW], "^1 chunks of device memory are in no piece"),
        ([piece(1)], [WINDOW] * 3, "^2 chunks of device memory are in no piece"),
        ([], [WINDOW], "^1 chunks of device memory are in no piece"),
    ],
)
def test_chunks_that_do_not_fit(wanted: list[Piece], sizes: list[int], names: str) -> None:
    with pytest.raises(Bad, match=names):
        read(*wanted, sizes=sizes)


def test_too_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_PIECES", 3)
    made = [piece(ZEROS, at=BASE + at * WINDOW) for at in range(4)]
    assert read(*made[:3]) == made[:3]
    with pytest.raises(Bad, match=f"it goes on for {HEAD + 4} bytes after piece 2"):
        read(*made)
