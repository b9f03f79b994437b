"""rewarm-device-memory.so as a program meets it: what cudaMalloc and cudaFree promise, over the fake driver.

Plain, with ASan and UBSan, and in programs of musl.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support import device_program
from support.device_program import (
    ANCHORS,
    BROKEN,
    FLAVOURS,
    GIB,
    HANDLES,
    MIB,
    SYNCS,
    USED,
    Built,
    Program,
)

INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, CAPTURE_UNSUPPORTED = 1, 2, 700, 900
GLOBAL, RELAXED = 0, 2


@pytest.fixture(scope="module", params=FLAVOURS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return device_program.build(tmp_path_factory.getbasetemp(), request.param)


@pytest.fixture
def program(built: Built) -> Iterator[Program]:
    program = Program(built)
    try:
        yield program
        # No handle outlives the call that got it, in no case.
        assert program.do("count", HANDLES) == 0
        program.end()
    finally:
        program.close()


def start(built: Built, driver: bool = False, **environment: str) -> Program:
    return Program(built, driver, **environment)


def test_large_memory_is_served_and_small_is_not(program: Program) -> None:
    address = program.malloc(2 * MIB)
    assert program.counts() == [0, 1, 1, 0]
    assert address % (2 * MIB) == 0
    assert program.do("access", address) == 1
    small = program.malloc(2 * MIB - 1)
    assert program.counts() == [0, 1, 1, 1]
    assert program.do("fill", address, 2 * MIB, 7) == 0 and program.do("check", address, 2 * MIB, 7) == 1
    assert program.do("free", small) == 0 and program.do("free", address) == 0
    assert program.counts() == [0, 0, 0, 0]


def test_the_driver_keeps_its_block_for_tags(program: Program) -> None:
    """It would be taken from the GPU, and given back, for each of them."""
    assert program.do("count", ANCHORS) == 0
    for _ in range(3):
        assert program.do("free", program.malloc(4 * MIB)) == 0
    assert program.do("count", ANCHORS) == 1 and program.counts() == [0, 0, 0, 0]
    assert program.do("device", 1) == 0
    assert program.do("free", program.malloc(4 * MIB)) == 0
    assert program.do("count", ANCHORS) == 2
    assert program.do("reset") == 0
    assert program.do("count", ANCHORS) == 1
    assert program.do("free", program.malloc(4 * MIB)) == 0
    assert program.do("count", ANCHORS) == 2


def test_sizes_are_rounded_up_and_large_ones_made_of_pieces(program: Program) -> None:
    address = program.malloc(2 * GIB + 1)
    assert program.counts() == [0, 3, 1, 0] and program.do("count", USED) == 2 * GIB + 2 * MIB
    edge = address + GIB - 4096
    assert program.do("fill", edge, 8192, 3) == 0 and program.do("check", edge, 8192, 3) == 1
    assert [program.do("access", address + at * GIB) for at in range(3)] == [1, 1, 1]
    assert program.do("free", address) == 0
    assert program.counts() == [0, 0, 0, 0] and program.do("count", USED) == 0


def test_a_free_waits_for_the_device(program: Program) -> None:
    address = program.malloc(4 * MIB)
    before = program.do("count", SYNCS)
    assert program.do("free", address) == 0
    assert program.do("count", SYNCS) == before + 1
    assert program.do("free_async", program.malloc(4 * MIB)) == 0
    assert program.do("count", SYNCS) == before + 2 and program.counts() == [0, 0, 0, 0]


def test_wrong_frees_are_the_drivers_errors(program: Program) -> None:
    address = program.malloc(4 * MIB)
    assert program.do("free", address + 2 * MIB) == INVALID_VALUE
    assert program.do("free", address - 2 * MIB) == INVALID_VALUE
    assert program.do("free", 0) == 0
    assert program.do("check", address, 4096, 0) == 0 and program.counts() == [0, 1, 1, 0]
    assert program.do("free", address) == 0
    assert program.do("last_error") == INVALID_VALUE
    assert program.do("free", address) == INVALID_VALUE


def test_wrong_sizes_are_the_drivers_errors(program: Program) -> None:
    assert program.tell("malloc", 0) == [0, 0]
    assert program.do("malloc_null", 4 * MIB) == INVALID_VALUE
    for size in (2**64 - 1, 2**64 - 2 * MIB, 2**63, 2**47, 65 * GIB):
        assert program.tell("malloc", size)[0] == OUT_OF_MEMORY
    assert program.do("last_error") == OUT_OF_MEMORY
    assert program.counts() == [0, 0, 0, 0] and program.do("count", USED) == 0


def test_without_memory_the_driver_answers_and_nothing_is_left(built: Built) -> None:
    program = start(built, FAKE_LIMIT=str(2 * GIB + 8 * MIB))
    address = program.malloc(2 * GIB)
    assert program.tell("malloc", 10 * MIB) == [OUT_OF_MEMORY, 0]
    # The first of its pieces can still be had, and is given back.
    assert program.do("free", address) == 0
    assert program.tell("malloc", 3 * GIB) == [OUT_OF_MEMORY, 0]
    assert program.do("last_error") == OUT_OF_MEMORY and program.do("last_error") == 0
    assert program.counts() == [0, 0, 0, 0] and program.do("count", USED) == 0
    program.malloc(8 * MIB)
    assert program.counts() == [0, 1, 1, 0]
    program.end()


@pytest.mark.parametrize(("what", "call"), [("set_fail_map", 3), ("set_fail_access", 1)])
def test_a_call_that_fails_leaves_nothing(program: Program, what: str, call: int) -> None:
    assert program.do(what, call) == 0
    program.malloc(3 * GIB)
    assert program.counts() == [0, 0, 0, 1]
    assert program.do("count", USED) == 3 * GIB


def test_devices_without_virtual_memory_management_are_left_to_the_driver(built: Built) -> None:
    program = start(built, FAKE_NO_VMM="1")
    program.malloc(4 * MIB)
    assert program.counts() == [0, 0, 0, 1]
    assert not any(name.startswith("rewarm") for name in program.threads())
    program.end()


def test_several_threads_and_thousands_of_allocations(program: Program) -> None:
    assert program.do("stir") == 0
    assert program.counts() == [0, 0, 0, 0] and program.do("count", USED) == 0


def test_many_at_once(program: Program) -> None:
    held = [program.malloc(2 * MIB) for _ in range(1500)]
    assert len(set(held)) == len(held) and program.counts() == [0, 1500, 1500, 0]
    assert [program.do("free", address) for address in held[::2]] == [0] * 750
    assert [piece.address for piece in program.connect().pieces()] == sorted(held[1::2])
    assert [program.do("free", address) for address in held[1::2]] == [0] * 750
    assert program.counts() == [0, 0, 0, 0]


def test_a_broken_context_frees_nothing_and_says_so(program: Program) -> None:
    address = program.malloc(4 * MIB)
    assert program.do("set_sticky", ILLEGAL_ADDRESS) == 0
    assert program.do("free", address) == ILLEGAL_ADDRESS and program.do("free", address) == ILLEGAL_ADDRESS
    assert program.do("last_error") == ILLEGAL_ADDRESS
    assert program.counts() == [0, 1, 1, 0]
    assert program.do("reset") == 0
    assert program.counts() == [0, 0, 0, 0]


def test_frees_beside_a_capture_break_it_only_if_the_drivers_would(program: Program) -> None:
    first, second = program.malloc(4 * MIB), program.malloc(4 * MIB)
    assert program.do("set_capturing", 1) == 0 and program.do("mode", RELAXED) == 0
    assert program.do("free", first) == 0 and program.do("free", program.malloc(6 * MIB)) == 0
    assert program.counts() == [0, 1, 1, 0] and program.do("count", BROKEN) == 0
    assert program.do("mode", GLOBAL) == 0
    assert program.do("free", second) == CAPTURE_UNSUPPORTED and program.do("last_error") == CAPTURE_UNSUPPORTED
    assert program.tell("malloc", 4 * MIB) == [CAPTURE_UNSUPPORTED, 0]
    assert program.counts() == [0, 1, 1, 0] and program.do("count", BROKEN) > 0
    assert program.do("set_capturing", 0) == 0 and program.do("free", second) == 0
    assert program.counts() == [0, 0, 0, 0]


def test_peers_get_access_and_lose_it(program: Program) -> None:
    assert program.do("device", 1) == 0
    before = program.malloc(4 * MIB)
    assert program.do("device", 0) == 0
    own = program.malloc(4 * MIB)
    assert program.do("enable", 1) == 0, "device 0 may now reach the memory of device 1"
    assert program.do("enable", 1) == 704
    assert program.do("device", 1) == 0
    after = program.malloc(GIB + 2 * MIB)
    assert [program.do("access", address) for address in (before, after, after + GIB, own)] == [3, 3, 3, 1]
    assert program.do("device", 0) == 0
    assert program.do("disable", 1) == 0
    assert [program.do("access", address) for address in (before, after, after + GIB, own)] == [2, 2, 2, 1]
    assert program.do("enable", 1) == 0
    assert program.do("reset") == 0, "of device 0: its own memory goes, and its access"
    assert program.do("access", own) == 0
    assert program.do("device", 1) == 0
    assert program.do("access", program.malloc(2 * MIB)) == 2
    assert [program.do("free", address) for address in (before, after)] == [0, 0]


def test_a_reset_frees_and_memory_is_served_again(program: Program) -> None:
    held = [program.malloc(4 * MIB), program.malloc(GIB + 4 * MIB), program.malloc(1000)]
    assert program.do("reset") == 0
    assert program.counts() == [0, 0, 0, 0]
    assert program.do("free", held[1]) == INVALID_VALUE
    address = program.malloc(4 * MIB)
    assert program.counts() == [0, 1, 1, 0] and program.do("free", address) == 0


def test_legacy_ipc_ends_the_service_by_name(built: Built) -> None:
    program = start(built)
    address, small = program.malloc(4 * MIB), program.malloc(1000)
    assert program.do("ipc", small) == 0 and program.stderr() == ""
    assert program.do("ipc", address + 3 * MIB) == INVALID_VALUE
    assert program.do("ipc", address) == INVALID_VALUE
    assert program.stderr().count("rewarm.dev/device-memory: off") == 1 and program.stderr().count("\n") == 1
    new = program.malloc(4 * MIB)
    assert program.counts() == [0, 1, 1, 2] and program.do("ipc", new) == 0
    assert [program.do("free", one) for one in (address, small, new)] == [0, 0, 0]
    assert program.counts() == [0, 0, 0, 0]
    program.end()


def test_a_forked_child_has_none_of_it(program: Program) -> None:
    address = program.malloc(4 * MIB)
    assert program.do("fill", address, 4096, 5) == 0
    descriptors = program.do("descriptors")
    # Both ends are closed there; the free is the driver's answer; new memory is the driver's; no mapping is touched.
    assert program.tell("fork", address) == [descriptors - 2, INVALID_VALUE, 0, 1, 1]
    assert program.do("check", address, 4096, 5) == 1
    assert program.do("descriptors") == descriptors
    assert program.connect().ask(device_program.HELLO)[0].count == 1
    assert program.do("free", address) == 0


def test_descriptors_are_high_and_not_inherited(program: Program) -> None:
    program.malloc(4 * MIB)
    directory = f"/proc/{program.process.pid}/fd"
    sockets = [name for name in os.listdir(directory) if os.readlink(f"{directory}/{name}").startswith("socket:")]
    assert len(sockets) == 2 and str(program.number()) in sockets and min(map(int, sockets)) >= 64
    for name in sockets:
        with open(f"/proc/{program.process.pid}/fdinfo/{name}") as info:
            flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
        assert flags & os.O_CLOEXEC


def test_the_driver_interface(built: Built) -> None:
    program = start(built, driver=True)
    assert program.tell("cu_alloc", 4 * MIB) == [201, 0], "no context"
    small = program.malloc(1000)
    address = program.malloc(GIB + 5 * MIB, "cu_alloc")
    assert program.counts() == [0, 2, 1, 1]
    assert program.tell("cu_range", address + GIB + 1) == [0, address, GIB + 5 * MIB]
    assert program.tell("cu_range", small) == [0, small, 1000]
    assert program.do("cu_ipc", address + 1) == INVALID_VALUE and "device-memory: off" in program.stderr()
    assert program.do("cu_free", address + 1) == INVALID_VALUE
    assert program.do("cu_free", address) == 0 and program.do("cu_free", small) == 0
    assert program.counts() == [0, 0, 0, 0]
    program.end()


def test_other_contexts_than_the_primary_one_are_left_to_the_driver(built: Built) -> None:
    program = start(built, driver=True)
    served = program.malloc(4 * MIB)
    assert program.do("cu_context", 1, 0) == 0
    other = [program.malloc(4 * MIB), program.malloc(4 * MIB, "cu_alloc")]
    assert program.counts() == [0, 1, 1, 2]
    assert program.do("free", served) == 0, "in its own context, not in the current one"
    assert [program.do("cu_free", address) for address in other] == [0, 0]
    assert program.do("cu_context", 0) == 0
    program.malloc(4 * MIB, "cu_alloc")
    assert program.counts() == [0, 1, 1, 0]
    program.close()
