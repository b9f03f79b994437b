"""What a program creates by cuMemCreate itself, under rewarm-device-memory.so: it leaves, comes back with another
handle, and the program, which has the old one, sees nothing of it. The fake driver ends who uses a handle that is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import pytest

from support import device_program
from support.device_program import (
    AWAY,
    EXPORT,
    FLAVOURS,
    GIB,
    HANDLES,
    HELLO,
    IMPORTED,
    MAP,
    MAPPED,
    MIB,
    OWN,
    UNMAP,
    USED,
    Built,
    Program,
)
from support.proc import wait_for

SIZE = 4 * MIB
INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS = 1, 2, 700
NONE, READ, READ_WRITE = 0, 1, 3
DESCRIPTOR = 1
NEWER = 99000
Share = Callable[[Program, int, int], None]


@pytest.fixture(scope="module", params=FLAVOURS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return device_program.build(tmp_path_factory.getbasetemp(), request.param)


def start(built: Built, **environment: str) -> Program:
    """With its context."""
    program = Program(built, driver=True, **environment)
    assert program.do("free", program.malloc(4096)) == 0
    return program


@pytest.fixture
def program(built: Built) -> Iterator[Program]:
    """In the end it has nothing."""
    program = start(built)
    try:
        yield program
        assert [program.do("count", which) for which in (HANDLES, MAPPED, USED)] == [0, 0, 0]
        program.end()
    finally:
        program.close()


def create(program: Program, size: int = SIZE, types: int = 0) -> int:
    result, handle = program.tell("create", size, types)
    assert result == 0
    return handle


def reserve(program: Program, size: int = SIZE) -> int:
    result, address = program.tell("reserve", size)
    assert result == 0
    return address


def last(size: int) -> int:
    """How much of it is filled, at its end."""
    return min(size, 3 * SIZE)


def make(program: Program, size: int = SIZE, types: int = 0, access: int = READ_WRITE) -> tuple[int, int]:
    """Address and handle of memory that is filled, if it can be."""
    address, handle = reserve(program, size), create(program, size, types)
    assert program.do("map", address, size, handle) == 0
    if access != NONE:
        assert program.do("set_access", address, size, access) == 0
    if access == READ_WRITE:
        assert program.do("fill", address + size - last(size), last(size), address) == 0
    return address, handle


def drop(program: Program, address: int, *handles: int, size: int = SIZE) -> None:
    assert program.do("unmap", address, size) == 0
    for handle in handles:
        assert program.do("release", handle) == 0


def is_whole(program: Program, address: int, size: int = SIZE) -> bool:
    return program.do("check", address + size - last(size), last(size), address) == 1


def served(program: Program) -> list[tuple[int, int]]:
    return [(one.address, one.size) for one in program.connect().pieces()]


def out(program: Program) -> list[int]:
    """Descriptors of all pieces, in the order of their addresses; none of them is the program's then."""
    control = program.connect()
    pieces = control.pieces()
    found = []
    for piece in pieces:
        if piece.count & IMPORTED:
            assert control.status(OWN, piece.address, piece.size) == 0
    for piece in pieces:
        found.append(control.export(piece.address, piece.size))
    for piece in pieces:
        assert control.status(UNMAP, piece.address, piece.size) == 0
    assert all(piece.count == AWAY for piece in control.pieces())
    return found


def back(program: Program, descriptors: list[int], order: Sequence[int] | None = None) -> None:
    control = program.connect()
    pieces = control.pieces()
    for at in order or range(len(pieces)):
        assert control.status(MAP, pieces[at].address, pieces[at].size, [descriptors[at]]) == 0
    for descriptor in descriptors:
        os.close(descriptor)
    assert all(piece.count == IMPORTED for piece in control.pieces())


def cycle(program: Program, order: Sequence[int] | None = None) -> None:
    back(program, out(program), order)


def imported(program: Program) -> int:
    return program.connect().ask(HELLO)[0].address


def test_it_is_served_as_soon_as_it_is_mapped(program: Program) -> None:
    handle, address = create(program), reserve(program)
    assert served(program) == []
    assert program.do("map", address, SIZE, handle) == 0
    assert served(program) == [(address, SIZE)]
    hello, _ = program.connect().ask(HELLO)
    assert (hello.count, hello.size, hello.address) == (1, SIZE, 0)
    assert program.do("unmap", address, SIZE) == 0
    assert served(program) == [] and program.do("count", HANDLES) == 1
    assert program.do("release", handle) == 0
    assert program.do("unreserve", address, SIZE) == 0


@pytest.mark.parametrize("released", [False, True], ids=["held", "released"])
@pytest.mark.parametrize("size", [2 * MIB, GIB + 6 * MIB])
def test_it_goes_and_comes_back(program: Program, released: bool, size: int) -> None:
    """In one piece, whatever its size."""
    address, handle = make(program, size)
    if released:
        assert program.do("release", handle) == 0
    assert served(program) == [(address, size)]
    for _ in range(2):
        descriptors = out(program)
        assert [program.do("count", which) for which in (HANDLES, MAPPED, USED)] == [0, 0, 0]
        back(program, descriptors)
        assert program.do("count", HANDLES) == (0 if released else 1)
        assert is_whole(program, address, size)
    drop(program, address, *([] if released else [handle]), size=size)
    assert served(program) == [] and imported(program) == 0


@pytest.mark.parametrize("way", range(4))
def test_functions_that_were_asked_for_by_name(program: Program, way: int) -> None:
    assert program.do("by_name", way, 12000) == 0
    pairs = [make(program) for _ in range(2)]
    assert served(program) == sorted((address, SIZE) for address, _ in pairs)
    cycle(program)
    for address, handle in pairs:
        assert is_whole(program, address)
        assert program.tell("properties", handle) == [0, 1, 0, 0]
        assert program.tell("retain", address) == [0, handle] and program.do("release", handle) == 0
        drop(program, address, handle)


@pytest.mark.parametrize("way", range(1, 4))
def test_another_version_of_a_function_is_the_drivers(program: Program, way: int) -> None:
    assert program.do("by_name", way, NEWER) == 0
    address, handle = make(program)
    assert served(program) == [] and is_whole(program, address)
    drop(program, address, handle)


def test_memory_of_all_kinds_at_once(program: Program) -> None:
    mine, handle = make(program)
    theirs = program.malloc(GIB + SIZE)
    assert program.do("fill", theirs + GIB - MIB, 2 * MIB, 5) == 0
    assert sorted(served(program)) == sorted([(mine, SIZE), (theirs, GIB), (theirs + GIB, SIZE)])
    cycle(program)
    assert is_whole(program, mine) and program.do("check", theirs + GIB - MIB, 2 * MIB, 5) == 1
    assert program.do("free", mine) == INVALID_VALUE and program.do("cu_free", mine) == INVALID_VALUE
    assert program.tell("cu_range", mine + 4096) == [0, mine, SIZE]
    assert program.do("free", theirs) == 0
    assert is_whole(program, mine)
    drop(program, mine, handle)


def test_a_handle_is_the_same_to_the_program(program: Program) -> None:
    """It maps the memory again, somewhere else, and that is served as well."""
    address, handle = make(program)
    other = reserve(program)
    cycle(program)
    assert program.do("unmap", address, SIZE) == 0
    assert imported(program) == SIZE, "it is told though there is no piece"
    assert served(program) == []
    assert program.do("map", other, SIZE, handle) == 0 and program.do("set_access", other, SIZE, 3) == 0
    assert served(program) == [(other, SIZE)] and imported(program) == SIZE
    assert program.connect().pieces()[0].count == IMPORTED
    assert program.do("check", other, SIZE, address) == 1
    cycle(program)
    assert program.do("check", other, SIZE, address) == 1
    assert program.do("release", handle) == 0
    assert imported(program) == SIZE
    drop(program, other)
    assert imported(program) == 0


def test_released_before_it_is_unmapped_or_after(program: Program) -> None:
    pairs = [make(program) for _ in range(2)]
    cycle(program)
    (first, its), (second, other) = pairs
    assert program.do("release", its) == 0 and program.do("unmap", first, SIZE) == 0
    assert imported(program) == SIZE
    assert program.do("unmap", second, SIZE) == 0 and imported(program) == SIZE
    assert program.do("release", other) == 0 and imported(program) == 0


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_numbers_that_change_places(program: Program, order: tuple[int, ...]) -> None:
    """What one handle was, another is."""
    made = sorted(make(program) for _ in range(3))
    cycle(program, order)
    cycle(program, order[::-1])
    for address, handle in made:
        assert is_whole(program, address)
        assert program.do("unmap", address, SIZE) == 0
        assert program.do("map", address, SIZE, handle) == 0 and program.do("set_access", address, SIZE, 3) == 0
        assert is_whole(program, address)
    for address, handle in made:
        drop(program, address, handle)


def away_with_one(program: Program) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two that have changed numbers, of which the first is gone: the driver gives its number next, which is the name of
    the second."""
    first, second = sorted(make(program) for _ in range(2))
    cycle(program)
    drop(program, *first)
    assert is_whole(program, second[0])
    return first, second


def test_new_memory_with_a_number_that_is_known(program: Program) -> None:
    _, second = away_with_one(program)
    new = [make(program) for _ in range(2)]
    assert len({second[1], *(handle for _, handle in new)}) == 3
    assert any(handle % 2 for _, handle in new), "the number was not used again, which this is about"
    cycle(program)
    for address, handle in (second, *new):
        assert is_whole(program, address)
        drop(program, address, handle)


@pytest.mark.parametrize("way", ["import", "not served"])
def test_other_memory_with_a_number_that_is_known(program: Program, way: str) -> None:
    """It is used as what it is."""
    shared_handle = create(program, types=DESCRIPTOR)
    result, shared = program.tell("export", shared_handle)
    assert result == 0
    _, second = away_with_one(program)
    if way == "import":
        result, handle = program.tell("import", shared)
    else:
        assert program.do("set_fail_export", 1) == 0
        result, handle = program.tell("create", SIZE)
    assert result == 0 and handle % 2 == 1 and handle != second[1]
    address = reserve(program)
    assert program.do("map", address, SIZE, handle) == 0 and program.do("set_access", address, SIZE, 3) == 0
    assert program.do("fill", address, SIZE, 9) == 0
    assert is_whole(program, second[0])
    assert program.do("check", address, SIZE, 9) == 1
    assert (address, SIZE) not in served(program)
    assert program.tell("properties", handle)[:2] == [0, 1]
    drop(program, address, handle)
    assert is_whole(program, second[0])
    drop(program, *second)
    assert program.do("release", shared_handle) == 0 and program.do("close", shared) == 0


def test_a_group_with_a_number_that_is_known(program: Program) -> None:
    """It is no memory, and has no name: there is none then."""
    _, second = away_with_one(program)
    assert program.tell("group")[0] == OUT_OF_MEMORY
    assert is_whole(program, second[0])
    drop(program, *second)
    result, handle = program.tell("group")
    assert result == 0 and program.do("release", handle) == 0


def test_released_by_a_call_that_was_not_seen(program: Program) -> None:
    """The number is the driver's again, and what has it next is not taken for what had it before."""
    address, handle = make(program)
    assert program.do("unmap", address, SIZE) == 0
    assert program.do("unseen_release", handle) == 0
    other, again = make(program)
    assert again == handle and served(program) == [(other, SIZE)]
    cycle(program)
    assert is_whole(program, other)
    drop(program, other, again)


def test_a_piece_that_is_something_else_is_not_exported(program: Program) -> None:
    """Since it was mapped by calls that were not seen."""
    address, handle = make(program)
    other = create(program)
    for word, arguments in (("unseen_unmap", (address, SIZE)), ("unseen_map", (address, SIZE, other))):
        assert program.do(word, *arguments) == 0
    answer, received = program.connect().ask(EXPORT, address, SIZE)
    assert answer.status == -errno.ESTALE and received == []
    drop(program, address, handle, other)


def test_unmapped_by_a_call_that_was_not_seen(program: Program) -> None:
    """What is mapped there next is served, and the other is the driver's."""
    address, handle = make(program)
    assert program.do("unseen_unmap", address, SIZE) == 0
    new = create(program)
    assert program.do("map", address, SIZE, new) == 0 and program.do("set_access", address, SIZE, 3) == 0
    assert program.do("fill", address, SIZE, address) == 0
    assert served(program) == [(address, SIZE)]
    assert program.do("release", handle) == 0
    descriptors = out(program)
    assert program.do("count", HANDLES) == 0
    back(program, descriptors)
    assert is_whole(program, address)
    drop(program, address, new)


@pytest.mark.parametrize("access", [NONE, READ, READ_WRITE])
def test_access_is_as_it_was(program: Program, access: int) -> None:
    address, handle = make(program)
    assert program.do("set_access", address, SIZE, access) == 0
    for _ in range(2):  # the second has to copy it first
        cycle(program)
        assert program.do("protection", address) == access
    assert program.do("set_access", address, SIZE, READ_WRITE) == 0
    assert is_whole(program, address)
    drop(program, address, handle)


def test_access_and_unmapping_of_several_at_once(program: Program) -> None:
    address = reserve(program, 4 * SIZE)
    handles = [create(program) for _ in range(3)]
    for at, handle in enumerate(handles):
        assert program.do("map", address + at * SIZE, SIZE, handle) == 0
    assert program.do("set_access", address, 3 * SIZE, READ_WRITE) == 0
    assert program.do("fill", address, 3 * SIZE, address) == 0
    cycle(program)
    assert is_whole(program, address, 3 * SIZE)
    assert program.do("unmap", address, 3 * SIZE + SIZE // 2) == INVALID_VALUE
    assert program.do("unmap", address + SIZE, 2 * SIZE) == 0
    assert served(program) == [(address, SIZE)] and imported(program) == 3 * SIZE
    for handle in handles[1:]:
        assert program.do("release", handle) == 0
    assert imported(program) == SIZE
    cycle(program)
    assert is_whole(program, address)
    drop(program, address, handles[0])


@pytest.mark.parametrize("address", [0, 4096, (1 << 64) - SIZE, (1 << 64) - 4096])
@pytest.mark.parametrize("size", [0, 1, SIZE, 1 << 50, (1 << 64) - 1])
def test_ranges_that_are_none(program: Program, address: int, size: int) -> None:
    mine, handle = make(program)
    assert program.do("unmap", address, size) == INVALID_VALUE
    assert program.do("set_access", address, size, READ) == INVALID_VALUE
    assert program.do("unmap", mine, size) == INVALID_VALUE or size == SIZE
    if size != SIZE:
        assert served(program) == [(mine, SIZE)] and is_whole(program, mine)
        assert program.do("unmap", mine, SIZE) == 0
    assert program.do("release", handle) == 0


def test_what_the_driver_does_not_unmap_is_served_still(program: Program) -> None:
    address, handle = make(program)
    for start, size in ((address, SIZE // 2), (address + SIZE // 2, SIZE // 2), (address - SIZE, 2 * SIZE)):
        assert program.do("unmap", start, size) == INVALID_VALUE
    assert served(program) == [(address, SIZE)]
    cycle(program)
    assert is_whole(program, address)
    drop(program, address, handle)


def second_mapping(program: Program, address: int, handle: int) -> None:
    other = reserve(program)
    assert program.do("map", other, SIZE, handle) == 0
    assert program.do("unmap", other, SIZE) == 0


def access_of_two(program: Program, address: int, handle: int) -> None:
    assert program.do("set_access_of_two", address, SIZE, READ_WRITE) == 0


def access_of_another(program: Program, address: int, handle: int) -> None:
    assert program.do("set_access_of_another", address, SIZE, READ_WRITE) == 0


def export(program: Program, address: int, handle: int) -> None:
    result, shared = program.tell("export", handle)
    assert result == 0 and program.do("close", shared) == 0


def bind(program: Program, address: int, handle: int) -> None:
    result, group = program.tell("group")
    assert result == 0 and program.do("bind", group, handle, SIZE) == 0
    assert program.do("release", group) == 0


def bind_address(program: Program, address: int, handle: int) -> None:
    result, group = program.tell("group")
    assert result == 0 and program.do("bind_address", group, address, SIZE) == 0
    assert program.do("release", group) == 0


def bind_v2(program: Program, address: int, handle: int) -> None:
    result, group = program.tell("group")
    assert result == 0 and program.do("bind_v2", group, handle, SIZE) == 0
    assert program.do("release", group) == 0


def bind_address_v2(program: Program, address: int, handle: int) -> None:
    result, group = program.tell("group")
    assert result == 0 and program.do("bind_address_v2", group, address, SIZE) == 0
    assert program.do("release", group) == 0


SHARES = [
    *(second_mapping, access_of_two, access_of_another, export, bind, bind_address, bind_v2, bind_address_v2),
]


@pytest.mark.parametrize("share", SHARES, ids=lambda share: share.__name__)
def test_what_is_known_elsewhere_too_is_the_drivers(program: Program, share: Share) -> None:
    address, handle = make(program, types=DESCRIPTOR)
    assert served(program) == [(address, SIZE)]
    share(program, address, handle)
    assert served(program) == [] and imported(program) == 0
    assert is_whole(program, address)
    assert program.do("unmap", address, SIZE) == 0
    assert program.do("map", address, SIZE, handle) == 0 and program.do("set_access", address, SIZE, 3) == 0
    assert served(program) == [] and is_whole(program, address)
    drop(program, address, handle)


@pytest.mark.parametrize("share", [one for one in SHARES if one is not export], ids=lambda share: share.__name__)
def test_what_a_restore_has_brought_is_told_for_good(program: Program, share: Share) -> None:
    """The driver would lose it with the next checkpoint. (It exports none.)"""
    address, handle = make(program, types=DESCRIPTOR)
    cycle(program)
    share(program, address, handle)
    assert served(program) == [] and imported(program) == SIZE
    assert is_whole(program, address)
    drop(program, address, handle)
    assert imported(program) == SIZE


def test_what_a_restore_has_brought_and_nobody_holds_is_told(program: Program) -> None:
    address, handle = make(program)
    assert program.do("release", handle) == 0
    cycle(program)
    access_of_two(program, address, 0)
    assert served(program) == [] and imported(program) == SIZE
    drop(program, address)


def test_what_a_restore_has_brought_is_not_exported(program: Program) -> None:
    """It cannot be, and is served as before."""
    address, handle = make(program, types=DESCRIPTOR)
    cycle(program)
    assert program.tell("export", handle) == [INVALID_VALUE, -1]
    assert served(program) == [(address, SIZE)]
    cycle(program)
    assert is_whole(program, address)
    drop(program, address, handle)
    assert imported(program) == 0


@pytest.mark.parametrize("released", [False, True])
def test_more_handles_of_one_memory(program: Program, released: bool) -> None:
    """By its address, as often as the program likes, also if it has none any more."""
    (other, its), (address, handle) = sorted(make(program) for _ in range(2))
    cycle(program)
    if released:
        assert program.do("release", handle) == 0
    for at in (address, address + 4096):
        result, again = program.tell("retain", at)
        assert result == 0 and (again == handle or released)
    assert served(program) == [(other, SIZE), (address, SIZE)]
    for _ in range(2):
        descriptors = out(program)
        assert program.do("count", HANDLES) == 0
        back(program, descriptors)
        assert program.do("count", HANDLES) == (3 if released else 4)
    assert program.do("unmap", address, SIZE) == 0
    assert program.do("map", address, SIZE, again) == 0 and program.do("set_access", address, SIZE, 3) == 0
    assert is_whole(program, address) and is_whole(program, other)
    drop(program, address, again, again, *([] if released else [handle]))
    drop(program, other, its)
    assert imported(program) == 0


def test_a_handle_for_a_moment(program: Program) -> None:
    """As wrappers free memory of which they know the address only."""
    pairs = [make(program) for _ in range(2)]
    for _ in range(2):
        cycle(program)
    for address, handle in pairs:
        assert program.do("release", handle) == 0
        result, again = program.tell("retain", address)
        assert result == 0
        assert program.do("unmap", address, SIZE) == 0 and program.do("release", again) == 0
    assert served(program) == [] and imported(program) == 0


def test_what_the_library_has_allocated_has_no_handle(program: Program) -> None:
    """As memory of cudaMalloc has none."""
    theirs = program.malloc(SIZE)
    assert program.tell("retain", theirs)[0] == INVALID_VALUE
    assert program.do("count", HANDLES) == 0
    cycle(program)
    assert program.tell("retain", theirs + 4096)[0] == INVALID_VALUE
    assert program.do("free", theirs) == 0


@pytest.mark.parametrize("failing", [False, True])
def test_released_and_unmapped_at_once(program: Program, failing: bool) -> None:
    """What is on its way is there until it is gone."""
    address, handle = make(program)
    cycle(program)
    program.do("set_slow_ms", 300)
    if failing:
        program.do("set_sticky", ILLEGAL_ADDRESS)
        program.do("set_fail_release", 1)
    program.do("beside_release", handle)
    wait_for("the call", lambda: program.connect().changing() == 1)
    program.do("set_slow_ms", 0)
    assert program.do("unmap", address, SIZE) == 0
    assert imported(program) == SIZE
    assert program.do("join") == (ILLEGAL_ADDRESS if failing else 0)
    assert imported(program) == (SIZE if failing else 0)
    if failing:
        program.do("set_sticky", 0)
        assert program.do("release", handle) == 0
    assert imported(program) == 0


def test_while_it_is_unmapped_it_is_told(program: Program) -> None:
    address, handle = make(program)
    cycle(program)
    program.do("set_slow_ms", 300)
    program.do("beside_unmap", address, SIZE)
    wait_for("the call", lambda: program.connect().changing() == 1)
    assert served(program) == [] and imported(program) == SIZE
    program.do("set_slow_ms", 0)
    assert program.do("join") == 0 and imported(program) == SIZE
    assert program.do("release", handle) == 0 and imported(program) == 0


def test_a_handle_more_while_the_driver_refuses_to_unmap_it(program: Program) -> None:
    """Its name is another by now; and the piece leaves no handle behind."""
    made = sorted(make(program) for _ in range(2))
    cycle(program)
    for address, handle in made:
        program.do("set_slow_ms", 300)
        program.do("beside_unmap", address, SIZE // 2)
        wait_for("the call", lambda: program.connect().changing() == 1)
        program.do("set_slow_ms", 0)
        assert program.tell("retain", address) == [0, handle]
        assert program.do("join") == INVALID_VALUE
    descriptors = out(program)
    assert program.do("count", HANDLES) == 0
    back(program, descriptors)
    for address, handle in made:
        assert is_whole(program, address)
        drop(program, address, handle, handle)


def test_a_copy_that_cannot_be_made_leaves_access_as_it_was(built: Built) -> None:
    program = start(built, FAKE_LIMIT=str(SIZE))
    try:
        address, handle = make(program)
        assert program.do("set_access", address, SIZE, NONE) == 0
        cycle(program)
        program.do("set_fail_map", 1)
        assert program.connect().status(OWN, address, SIZE) == OUT_OF_MEMORY
        assert program.do("protection", address) == NONE
        assert program.do("set_access", address, SIZE, READ_WRITE) == 0 and is_whole(program, address)
        drop(program, address, handle)
        program.end()
    finally:
        program.close()


def test_shared_while_the_driver_refuses_to_unmap_it(program: Program) -> None:
    address, handle = make(program, types=DESCRIPTOR)
    program.do("set_slow_ms", 300)
    program.do("beside_unmap", address, SIZE // 2)
    wait_for("the call", lambda: program.connect().changing() == 1)
    program.do("set_slow_ms", 0)
    export(program, address, handle)
    assert program.do("join") == INVALID_VALUE
    assert served(program) == [] and imported(program) == 0
    assert is_whole(program, address)
    drop(program, address, handle)


def test_only_what_was_made_for_it_is_exported(program: Program) -> None:
    """The library has asked for more than the program."""
    address, handle = make(program)
    assert program.tell("export", handle) == [INVALID_VALUE, -1]
    assert served(program) == [(address, SIZE)]
    drop(program, address, handle)


@pytest.mark.parametrize("types", [0, DESCRIPTOR])
def test_properties_are_as_the_program_has_asked(program: Program, types: int) -> None:
    address, handle = make(program, types=types)
    for _ in range(2):
        assert program.tell("properties", handle) == [0, 1, types, 0]
        cycle(program)
    drop(program, address, handle)


def test_memory_of_its_own_again(program: Program) -> None:
    address, handle = make(program)
    cycle(program)
    control = program.connect()
    assert control.status(OWN, address, SIZE) == 0
    assert imported(program) == 0 and program.do("count", HANDLES) == 1
    assert is_whole(program, address)
    assert program.do("unmap", address, SIZE) == 0 and imported(program) == 0
    assert program.do("map", address, SIZE, handle) == 0 and program.do("set_access", address, SIZE, 3) == 0
    assert is_whole(program, address)
    drop(program, address, handle)


def test_no_memory_for_its_own(built: Built) -> None:
    program = start(built, FAKE_LIMIT=str(SIZE))
    try:
        address, handle = make(program)
        cycle(program)
        theirs = program.malloc(SIZE)
        assert program.connect().status(OWN, address, SIZE) == OUT_OF_MEMORY
        assert is_whole(program, address) and imported(program) == SIZE
        assert program.do("free", theirs) == 0
        cycle(program)
        assert is_whole(program, address)
        drop(program, address, handle)
        program.end()
    finally:
        program.close()


@pytest.mark.parametrize("failing", ["set_fail_map", "set_fail_access"])
@pytest.mark.parametrize("released", [False, True])
def test_a_map_that_fails_can_be_tried_again(program: Program, failing: str, released: bool) -> None:
    address, handle = make(program)
    if released:
        assert program.do("release", handle) == 0
    (shared,) = out(program)
    assert program.do(failing, 1) == 0
    control = program.connect()
    assert control.status(MAP, address, SIZE, [shared]) == OUT_OF_MEMORY
    assert program.do("count", HANDLES) == 0 and control.pieces()[0].count == AWAY
    back(program, [shared])
    assert is_whole(program, address)
    drop(program, address, *([] if released else [handle]))


def test_a_release_that_fails(program: Program) -> None:
    address, handle = make(program)
    cycle(program)
    assert program.do("set_sticky", ILLEGAL_ADDRESS) == 0 and program.do("set_fail_release", 1) == 0
    assert program.do("release", handle) == ILLEGAL_ADDRESS
    assert program.do("set_sticky", 0) == 0
    assert is_whole(program, address)
    descriptors = out(program)
    assert program.do("count", HANDLES) == 0, "it is the program's handle still"
    back(program, descriptors)
    assert is_whole(program, address)
    drop(program, address, handle)


def test_a_driver_that_cannot_export(program: Program) -> None:
    assert program.do("set_fail_export", 1) == 0
    address, handle = make(program)
    assert is_whole(program, address) and served(program) == []
    drop(program, address, handle)


def test_a_context_of_its_own(program: Program) -> None:
    """Mappings are of no context; the copy of what was imported is made in the primary one."""
    assert program.do("cu_context", 1, 0) == 0
    address, handle = make(program)
    for _ in range(2):
        cycle(program)
        assert is_whole(program, address)
    assert program.do("cu_context", 0) == 0
    drop(program, address, handle)


def test_a_reset_leaves_it(program: Program) -> None:
    """As the driver does."""
    address, handle = make(program)
    theirs = program.malloc(SIZE)
    assert program.do("reset") == 0
    assert served(program) == [(address, SIZE)] and is_whole(program, address)
    for _ in range(2):
        cycle(program)
        assert is_whole(program, address)
    drop(program, address, handle)
    assert program.do("free", theirs) == INVALID_VALUE


def test_after_a_wish_for_a_legacy_handle(program: Program) -> None:
    theirs = program.malloc(SIZE)
    program.do("ipc", theirs)
    address, handle = make(program)
    assert served(program) == [(theirs, SIZE)] and is_whole(program, address)
    drop(program, address, handle)
    assert program.do("free", theirs) == 0


def calls(program: Program) -> dict[str, tuple[int, ...]]:
    """One of each kind, that is right at any time."""
    address, handle = make(program)
    other, held = reserve(program), create(program, types=DESCRIPTOR)
    (_, shared), (_, group) = program.tell("export", held), program.tell("group")
    return {
        "create": (SIZE,),
        "map": (other, SIZE, held),
        "set_access": (address, SIZE, READ_WRITE),
        "retain": (address,),
        "properties": (handle,),
        "import": (shared,),
        "export": (held,),
        "group": (),
        "bind": (group, handle, SIZE),
        "bind_address": (group, address, SIZE),
        "bind_v2": (group, handle, SIZE),
        "bind_address_v2": (group, address, SIZE),
        "unmap": (address, SIZE),
        "release": (handle,),
    }


WORDS = (
    *("create", "map", "set_access", "retain", "properties", "import", "export", "group"),
    *("bind", "bind_address", "bind_v2", "bind_address_v2", "unmap", "release"),
)


@pytest.mark.parametrize("word", WORDS)
def test_a_thread_in_the_middle_of_a_call_is_told(built: Built, word: str) -> None:
    """What it does is not in the table yet, or still."""
    with contextlib.closing(start(built)) as program:
        arguments = calls(program)[word]
        assert program.connect().changing() == 0
        program.do("set_slow_ms", 300)
        program.begin(word, *arguments)
        wait_for("the call", lambda: program.connect().changing() == 1)
        assert program.finish()[0] == 0
        assert program.connect().changing() == 0


@pytest.mark.parametrize("word", WORDS)
def test_a_call_while_memory_is_away_waits_for_it(built: Built, word: str) -> None:
    """The handle that it would bring is no more: and other memory has its number, which it would be mistaken for."""
    with contextlib.closing(start(built)) as program:
        arguments = calls(program)[word]
        second = make(program)
        descriptors = out(program)
        program.begin(word, *arguments)
        time.sleep(0.25)
        assert program.busy() and program.connect().changing() == 0
        assert sum(piece.count == AWAY for piece in program.connect().pieces()) == 2
        back(program, descriptors)
        assert program.finish()[0] == 0
        assert is_whole(program, second[0])


def test_many_threads(program: Program) -> None:
    kept = make(program)
    assert program.do("stir_created") == 0
    assert served(program) == [(kept[0], SIZE)] and is_whole(program, kept[0])
    drop(program, *kept)
