"""cudaMallocAsync and cudaFreeAsync under rewarm-device-memory.so, over the fake driver, whose streams have unfinished
work when they are told to."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support import device_program
from support.device_program import (
    ALLOCATED,
    BROKEN,
    EVENTS,
    FLAVOURS,
    HANDLES,
    MAP,
    MAPPED,
    MIB,
    RESERVED,
    SYNCS,
    TINY,
    UNMAP,
    USED,
    Built,
    Program,
)

SIZE = 4 * MIB
INVALID_VALUE, OUT_OF_MEMORY, CAPTURE_UNSUPPORTED = 1, 2, 900
MOST_FREES = 32
NOTHING = (HANDLES, MAPPED, RESERVED, ALLOCATED, TINY, EVENTS)


@pytest.fixture(scope="module", params=FLAVOURS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return device_program.build(tmp_path_factory.getbasetemp(), request.param)


@pytest.fixture
def program(built: Built) -> Iterator[Program]:
    yield from started(built)


@pytest.fixture
def narrow(built: Built) -> Iterator[Program]:
    """On a GPU with room for one allocation."""
    yield from started(built, FAKE_LIMIT=str(SIZE))


def started(built: Built, **environment: str) -> Iterator[Program]:
    """In the end it has nothing."""
    program = Program(built, driver=True, **environment)
    try:
        assert program.do("free", program.malloc(4096)) == 0
        yield program
        assert counts(program, *NOTHING) == [0] * len(NOTHING)
        program.end()
    finally:
        program.close()


def counts(program: Program, *which: int) -> list[int]:
    return [program.do("count", one) for one in which]


def malloc(program: Program, word: str = "malloc_async", size: int = SIZE) -> int:
    address = program.malloc(size, word)
    assert program.do("fill", address, size, address) == 0
    return address


def is_whole(program: Program, address: int) -> bool:
    return program.do("check", address, SIZE, address) == 1


@pytest.mark.parametrize(
    ("allocate", "free"),
    [("malloc_async", "free_async"), ("malloc_async_ptsz", "free_async_ptsz"), ("cu_alloc_async", "cu_free_async")],
)
def test_it_is_served_and_freed_without_a_wait(program: Program, allocate: str, free: str) -> None:
    small = malloc(program, allocate, 2 * MIB - 8)
    assert counts(program, MAPPED, ALLOCATED) == [0, 1]
    address, other = malloc(program, allocate), malloc(program, allocate)
    assert counts(program, MAPPED, RESERVED, ALLOCATED, TINY) == [2, 2, 1, 0]
    assert [piece.address for piece in program.connect().pieces()] == sorted([address, other])
    (before,) = counts(program, SYNCS)
    assert program.do(free, address) == 0
    assert counts(program, MAPPED, SYNCS) == [1, before] and is_whole(program, other)
    assert program.do(free, other) == 0 and program.do(free, small) == 0


def test_what_a_stream_uses_is_there(program: Program) -> None:
    address = malloc(program)
    (before,) = counts(program, SYNCS)
    program.do("set_unfinished", 1)
    assert program.do("free_async", address) == 0
    assert program.do("free_async", program.malloc(SIZE, "malloc_async")) == 0
    assert counts(program, MAPPED, SYNCS, EVENTS) == [2, before, 2]
    assert is_whole(program, address)
    program.do("set_unfinished", 0)
    new = malloc(program)
    assert counts(program, MAPPED, SYNCS, EVENTS) == [1, before, 0]
    assert program.do("free_async", new) == 0


def test_freed_twice(program: Program) -> None:
    address = malloc(program)
    program.do("set_unfinished", 1)
    assert program.do("free_async", address) == 0
    for word in ("free_async", "free", "cu_free", "cu_free_async"):
        assert program.do(word, address) == INVALID_VALUE
    program.do("set_unfinished", 0)
    assert program.do("free_async", address) == INVALID_VALUE
    assert counts(program, MAPPED) == [0]


@pytest.mark.parametrize("allocate", ["malloc_async", "malloc", "cu_alloc", "cu_alloc_async"])
def test_where_memory_is_short_what_was_freed_is_waited_for(narrow: Program, allocate: str) -> None:
    address = malloc(narrow)
    assert narrow.tell(allocate, SIZE) == [OUT_OF_MEMORY, 0]
    narrow.do("set_unfinished", 1)
    assert narrow.do("free_async", address) == 0
    new = malloc(narrow, allocate)
    assert counts(narrow, MAPPED, EVENTS) == [1, 0]
    assert narrow.do("free", new) == 0


def test_the_drivers_pool_is_waited_for_as_well(narrow: Program) -> None:
    for _ in range(MOST_FREES - 1):
        assert narrow.do("free_async", narrow.malloc(SIZE, "malloc_async")) == 0
    address = malloc(narrow)
    narrow.do("set_unfinished", 1)
    assert narrow.do("free_async", address) == 0
    new = malloc(narrow)
    assert counts(narrow, MAPPED, ALLOCATED, EVENTS) == [0, 1, 0]
    assert narrow.tell("malloc_async", SIZE) == [OUT_OF_MEMORY, 0]
    assert narrow.do("free_async", new) == 0


def test_who_frees_all_the_time_gets_it_from_the_driver(program: Program) -> None:
    kept = malloc(program)
    for _ in range(MOST_FREES):
        address = program.malloc(SIZE, "malloc_async")
        assert counts(program, MAPPED, ALLOCATED) == [2, 0]
        assert program.do("free_async", address) == 0
    new = malloc(program)
    assert counts(program, MAPPED, ALLOCATED) == [1, 1]
    other = program.malloc(SIZE)
    assert counts(program, MAPPED, ALLOCATED) == [2, 1], "cudaMalloc is served still"
    for address in (new, kept, other):
        assert program.do("free_async", address) == 0


def test_in_a_capture_of_the_stream(program: Program) -> None:
    """An allocation is a node of the graph, and a free of something else is an error of the driver's."""
    address = malloc(program)
    program.do("set_stream_capturing", 1)
    other = program.malloc(SIZE, "malloc_async")
    assert counts(program, MAPPED, ALLOCATED) == [1, 1]
    assert program.do("free_async", address) == INVALID_VALUE
    assert program.do("free_async", other) == 0
    program.do("set_stream_capturing", 0)
    assert is_whole(program, address)
    assert program.do("free_async", address) == 0


def test_in_a_capture_of_another_thread(program: Program) -> None:
    """It is not broken."""
    program.do("set_capturing", 1)
    address, other = malloc(program), malloc(program)
    program.do("set_unfinished", 1)
    assert program.do("free_async", address) == 0
    program.do("set_unfinished", 0)
    assert program.do("free_async", other) == 0
    assert counts(program, MAPPED, BROKEN) == [0, 0]
    assert program.tell("cu_alloc", 4096) == [CAPTURE_UNSUPPORTED, 0], "the thread's own mode is as it was"


@pytest.mark.parametrize("setting", ["set_other_pool", "set_other_context"])
def test_another_pool_or_device_is_the_drivers(program: Program, setting: str) -> None:
    program.do(setting, 1)
    address = malloc(program)
    assert counts(program, MAPPED, ALLOCATED) == [0, 1]
    assert program.do("free_async", address) == 0


@pytest.mark.parametrize("word", ["free", "cu_free"])
def test_freed_at_once(program: Program, word: str) -> None:
    """With a wait for the device, and as the driver in the capture of another thread."""
    address = malloc(program)
    program.do("set_capturing", 1)
    assert program.do(word, address) == CAPTURE_UNSUPPORTED
    program.do("set_capturing", 0)
    assert is_whole(program, address)
    (before,) = counts(program, SYNCS)
    assert program.do(word, address) == 0
    assert counts(program, MAPPED, TINY) == [0, 0] and counts(program, SYNCS) > [before]


def test_an_event_that_cannot_be_had(program: Program) -> None:
    address = malloc(program)
    program.do("set_fail_record", 1)
    assert program.do("free_async", address) == OUT_OF_MEMORY
    assert counts(program, EVENTS) == [0] and is_whole(program, address)
    program.do("set_fail_record", 0)
    assert program.do("free_async", address) == 0


def test_a_reset_frees_what_waits_too(program: Program) -> None:
    address, kept = malloc(program), malloc(program)
    program.do("set_unfinished", 1)
    assert program.do("free_async", address) == 0
    assert program.do("reset") == 0
    assert counts(program, MAPPED, RESERVED, EVENTS) == [0, 0, 0]
    assert program.do("free_async", kept) == INVALID_VALUE


def test_a_capture_takes_what_waits_with_the_rest(program: Program) -> None:
    address, kept = malloc(program), malloc(program)
    program.do("set_unfinished", 1)
    assert program.do("free_async", address) == 0
    control = program.connect()
    pieces = control.pieces()
    assert [piece.address for piece in pieces] == sorted([address, kept])
    descriptors = [control.export(piece.address, SIZE) for piece in pieces]
    for piece in pieces:
        assert control.status(UNMAP, piece.address, SIZE) == 0
    for piece, descriptor in zip(pieces, descriptors, strict=True):
        assert control.status(MAP, piece.address, SIZE, [descriptor]) == 0
        os.close(descriptor)
    assert is_whole(program, address) and is_whole(program, kept)
    program.do("set_unfinished", 0)
    assert program.do("free_async", kept) == 0
    assert counts(program, MAPPED, USED) == [0, 0]


def test_in_a_child(program: Program) -> None:
    address = malloc(program)
    program.do("set_unfinished", 1)
    assert program.do("free_async", address) == 0
    program.do("set_unfinished", 0)
    assert program.tell("fork", address)[3] == 1, "the child has freed it"
    assert program.do("free_async", malloc(program)) == 0


def test_many_threads(program: Program) -> None:
    kept = malloc(program)
    assert program.do("stir_async") == 0
    assert is_whole(program, kept)
    assert program.do("free_async", kept) == 0
