"""`memory/places` is hostile input: what a capture would not have written is refused, and so is what is no memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.memory import places, plan
from rewarm.memory.places import FORCED, MASK_BYTES, PAGE, TOP, Bad, Place
from support import memory_images as made
from support.memory_images import Area

BASE = 0x7F00_0000_0000


def place(base: int = BASE, bits: int = 0b101, pid: int = 1, flags: int = 0) -> Place:
    return Place(pid, flags, base, bits.to_bytes(MASK_BYTES, "little"))


def decode(*wanted: Place, sizes: list[int] | None = None) -> list[Place]:
    return places.decode(places.encode(wanted), sizes or [one.bits.bit_count() * PAGE for one in wanted])


def test_round_trip() -> None:
    wanted = [place(), place(BASE + (2 << 20), (1 << 512) - 1), place(pid=2, flags=FORCED)]
    assert decode(*wanted) == wanted
    assert wanted[0].span == (BASE, BASE + 3 * PAGE) and wanted[2].forced and not wanted[0].forced


def test_windows_may_interleave_where_pages_do_not() -> None:
    decode(place(BASE, 0b11), place(BASE + 2 * PAGE, 0b11))


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ([place(), place()], "overlap"),
        ([place(bits=0b1111), place(BASE + 3 * PAGE, 1)], "overlap"),
        # A page between those of another chunk: no capture does that.
        ([place(bits=0b101), place(BASE + PAGE, 1)], "overlap"),
        ([place(BASE + 8)], "unaligned"),
        ([place(BASE + 1)], "unaligned"),
        ([place(1 << 63)], "beyond"),
        ([place((1 << 64) - PAGE)], "beyond"),
        ([place(TOP)], "beyond"),
        ([place(TOP - 2 * PAGE)], "beyond"),
        ([place(flags=2)], "flags"),
        ([place(flags=1 << 31)], "flags"),
    ],
)
def test_refused(wanted: list[Place], says: str) -> None:
    with pytest.raises(Bad, match=says):
        decode(*wanted)


def test_the_same_address_in_two_processes_is_none_of_that() -> None:
    decode(place(pid=1), place(pid=2))


def test_sizes_must_be_those_of_the_chunks() -> None:
    for sizes in ([PAGE], [3 * PAGE], [0]):
        with pytest.raises(Bad, match="pages"):
            decode(place(), sizes=sizes)
    with pytest.raises(Bad, match="0 pages"):
        decode(place(bits=0), sizes=[0])


@given(st.binary(max_size=400), st.lists(st.integers(0, 1 << 21), max_size=4))
def test_any_bytes(data: bytes, sizes: list[int]) -> None:
    with contextlib.suppress(Bad):
        places.decode(data, sizes)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: data[:80]])
def test_length(change: object) -> None:
    assert callable(change)
    data = places.encode([place(), place(BASE + (2 << 20))])
    with pytest.raises(Bad, match="bytes"):
        places.decode(change(data), [2 * PAGE, 2 * PAGE])


ANONYMOUS = made.SHARED | made.ANONYMOUS
FILE = made.REGULAR | made.FILE_SHARED


@pytest.mark.parametrize(
    ("area", "flags", "good"),
    [
        (Area(BASE, 16), 0, True),
        (Area(BASE, 16), FORCED, False),
        (Area(BASE, 16, prot=made.READ), FORCED, True),
        (Area(BASE, 16, prot=made.READ), 0, False),
        (Area(BASE, 2), 0, False),
        (Area(BASE + PAGE, 16), 0, False),
        (Area(BASE, 16, flags=made.PRIVATE, status=made.REGULAR | made.FILE_PRIVATE), 0, True),
        (Area(BASE, 16, flags=ANONYMOUS, status=made.REGULAR | made.ANON_SHARED), 0, True),
        (Area(BASE, 16, prot=made.READ, flags=ANONYMOUS, status=made.REGULAR | made.ANON_SHARED), FORCED, False),
        # A file of a volume, a device, a SysV segment.
        (Area(BASE, 16, flags=made.SHARED, status=FILE), 0, False),
        (Area(BASE, 16, flags=made.SHARED, status=FILE | made.MEMFD), 0, True),
        (Area(BASE, 16, flags=ANONYMOUS, status=made.REGULAR | made.ANON_SHARED | 1 << 10), 0, False),
        (Area(BASE, 16, flags=made.PRIVATE | made.ANONYMOUS | made.HUGETLB), 0, False),
        (Area(BASE, 16, flags=made.PRIVATE | made.ANONYMOUS | made.GROWSDOWN), 0, False),
    ],
)
def test_a_place_is_memory_of_the_containers_own(tmp_path: Path, area: Area, flags: int, good: bool) -> None:
    made.write_mm(tmp_path / "mm-1.img", [Area(BASE - (1 << 30), 16), area, Area(BASE + (1 << 30), 16)])
    if good:
        plan.check([place(flags=flags)], tmp_path)
        return
    with pytest.raises(plan.Unfounded, match="no memory that can be filled"):
        plan.check([place(flags=flags)], tmp_path)


def test_a_process_that_is_not_there(tmp_path: Path) -> None:
    made.write_mm(tmp_path / "mm-1.img", [Area(BASE, 16)])
    with pytest.raises(plan.Unfounded, match="process 2"):
        plan.check([place(pid=2)], tmp_path)
