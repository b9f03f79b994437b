"""The control thread of rewarm-device-memory.so: pieces leave a program and come back, whatever the messages are."""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from support import device_program
from support.device_program import (
    AWAY,
    BROKEN,
    EXPORT,
    FLAVOURS,
    GIB,
    HANDLES,
    HELLO,
    IMPORTED,
    MAP,
    MIB,
    OWN,
    SYNCS,
    UNMAP,
    Built,
    Program,
    pack,
)

SIZE = 4 * MIB
INVALID_VALUE, OUT_OF_MEMORY = 1, 2


@pytest.fixture(scope="module", params=FLAVOURS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return device_program.build(tmp_path_factory.getbasetemp(), request.param)


@pytest.fixture
def program(built: Built) -> Iterator[Program]:
    """Its control end is checked afterwards: the thread answers, and has no descriptor more than before."""
    program = Program(built)
    try:
        yield program
        assert program.connect().ask(HELLO)[0].status == 0
        assert program.do("count", HANDLES) == 0
        program.end()
    finally:
        program.close()


def new_memory(content: bytes, size: int = SIZE) -> int:
    descriptor = os.memfd_create("device")
    os.truncate(descriptor, size)
    os.pwrite(descriptor, content, 0)
    return descriptor


def test_hello_and_list(program: Program) -> None:
    first, second = program.malloc(GIB + SIZE), program.malloc(SIZE)
    assert program.do("device", 1) == 0
    third = program.malloc(2 * MIB)
    hello, _ = program.connect().ask(HELLO)
    assert (hello.device, hello.count, hello.size, hello.address) == (1, 4, GIB + 2 * SIZE + 2 * MIB, 0)
    expected = [(first, GIB, 0), (first + GIB, SIZE, 0), (second, SIZE, 0), (third, 2 * MIB, 1)]
    found = program.connect().pieces()
    assert [(one.address, one.size, one.device) for one in found] == sorted(expected)
    assert all(one.uuid == bytes([0x10 + one.device] * 16) and one.count == 0 for one in found)
    assert program.do("free", first) == 0
    assert [one.address for one in program.connect().pieces()] == sorted([second, third])


def test_a_piece_goes_and_comes_back(program: Program) -> None:
    address, control = program.malloc(SIZE), program.connect()
    assert program.do("fill", address, SIZE, 11) == 0
    exported = control.export(address, SIZE)
    with mmap.mmap(exported, SIZE) as content:
        saved = content[:]
        assert saved[:8] == (11).to_bytes(8, "little")
    assert control.status(UNMAP, address, SIZE) == 0 and control.status(UNMAP, address, SIZE) == 0
    os.close(exported)
    assert program.counts() == [0, 0, 1, 0] and program.do("count", device_program.USED) == 0
    assert [one.count for one in control.pieces()] == [AWAY]
    assert control.status(EXPORT, address, SIZE) == -errno.ENOENT
    assert control.status(OWN, address, SIZE) == -errno.ENOENT
    fresh = new_memory(saved)
    assert control.status(MAP, address, SIZE, [fresh]) == 0
    assert control.status(MAP, address, SIZE, [fresh]) == 0, "it is there already"
    os.close(fresh)
    assert program.do("check", address, SIZE, 11) == 1 and program.do("access", address) == 1
    assert [one.count for one in control.pieces()] == [IMPORTED]
    assert control.ask(HELLO)[0].address == SIZE
    assert program.do("free", address) == 0 and program.counts() == [0, 0, 0, 0]


def test_imported_memory_becomes_its_own(program: Program) -> None:
    address, control = program.malloc(SIZE), program.connect()
    assert program.do("device", 1) == 0 and program.do("enable", 0) == 0
    assert program.do("fill", address, SIZE, 5) == 0
    before = program.descriptors()
    assert control.status(OWN, address, SIZE) == 0, "it is already"
    exported = control.export(address, SIZE)
    assert control.status(UNMAP, address, SIZE) == 0
    assert control.status(MAP, address, SIZE, [exported]) == 0
    assert control.status(EXPORT, address, SIZE) == INVALID_VALUE
    assert control.status(OWN, address, SIZE) == 0
    assert [one.count for one in control.pieces()] == [0] and program.counts() == [0, 1, 1, 0]
    assert program.do("access", address) == 3 and program.do("check", address, SIZE, 5) == 1
    other = control.export(address, SIZE)
    os.pwrite(exported, bytes(SIZE), 0)
    assert program.do("check", address, SIZE, 5) == 1, "a copy"
    assert os.pread(other, 8, 0) == (5).to_bytes(8, "little")
    assert program.descriptors() == before
    os.close(exported)
    os.close(other)


def test_memory_that_cannot_be_had_changes_nothing(built: Built) -> None:
    program = Program(built, FAKE_LIMIT=str(SIZE))
    address = program.malloc(SIZE)
    control = program.connect()
    assert control.status(UNMAP, address, SIZE) == 0
    fresh = new_memory((1).to_bytes(8, "little"))
    for what in ("set_fail_map", "set_fail_access"):
        assert program.do(what, 1) == 0
        assert control.status(MAP, address, SIZE, [fresh]) == OUT_OF_MEMORY
        assert [one.count for one in control.pieces()] == [AWAY] and program.counts() == [0, 0, 1, 0]
    assert control.status(MAP, address, SIZE, [fresh]) == 0
    blocker = program.malloc(SIZE)
    assert control.status(OWN, address, SIZE) == OUT_OF_MEMORY
    assert program.do("free", blocker) == 0
    # At the scratch address; at the piece's own, where the old memory comes back.
    for what, call in product(("set_fail_map", "set_fail_access"), (1, 2)):
        assert program.do(what, call) == 0
        assert control.status(OWN, address, SIZE) == OUT_OF_MEMORY
        assert program.do("check", address, 8, 1) == 1 and program.counts() == [0, 1, 1, 0]
        assert control.pieces()[0].count == IMPORTED
    assert control.status(OWN, address, SIZE) == 0
    os.close(fresh)
    program.end()


def test_a_map_wants_memory_of_the_pieces_size(program: Program, tmp_path: Path) -> None:
    address, control = program.malloc(SIZE), program.connect()
    assert control.status(UNMAP, address, SIZE) == 0
    before = program.descriptors()
    assert control.status(MAP, address, SIZE) == -errno.EBADF
    for wrong in (new_memory(b"", 2 * MIB), new_memory(b"", 2 * SIZE), os.open(tmp_path, os.O_RDONLY)):
        assert control.status(MAP, address, SIZE, [wrong]) == INVALID_VALUE
        os.close(wrong)
    assert program.descriptors() == before and program.counts() == [0, 0, 1, 0]
    assert program.do("free", address) == 0, "without its memory"
    assert program.counts() == [0, 0, 0, 0]


def test_a_piece_that_is_away_survives_peers_and_resets(program: Program) -> None:
    address = program.malloc(GIB + SIZE)
    control = program.connect()
    assert control.status(UNMAP, address, GIB) == 0
    assert program.do("device", 1) == 0 and program.do("enable", 0) == 0
    assert program.do("access", address + GIB) == 3
    fresh = new_memory(b"", GIB)
    assert control.status(MAP, address, GIB, [fresh]) == 0
    os.close(fresh)
    assert program.do("access", address) == 3
    assert control.status(UNMAP, address + GIB, SIZE) == 0
    assert program.do("device", 0) == 0 and program.do("reset") == 0
    assert program.counts() == [0, 0, 0, 0] and control.pieces() == []


@pytest.mark.parametrize("op", [OWN, EXPORT, UNMAP, MAP])
def test_unknown_pieces(program: Program, op: int) -> None:
    address, control = program.malloc(GIB + SIZE), program.connect()
    wrong = [
        (address, SIZE),
        (address, GIB + SIZE),
        (address + GIB, GIB),
        (address + 2 * MIB, SIZE),
        (address - SIZE, SIZE),
        (0, 0),
        (0, SIZE),
        (2**64 - 1, 2**64 - 1),
        (address, 0),
    ]
    descriptors = program.descriptors()
    fresh = new_memory(b"")
    for start, size in wrong:
        assert control.status(op, start, size, [fresh]) == -errno.ENOENT
    os.close(fresh)
    assert program.counts() == [0, 2, 1, 0] and program.descriptors() == descriptors


def test_hostile_messages(program: Program) -> None:
    program.malloc(SIZE)
    control = program.connect()
    descriptors = program.descriptors()
    null = os.open("/dev/null", os.O_RDONLY)
    good = pack(HELLO, 7)
    for data in (b"", b"x", good[:63], good + b"x", good * 100, pack(HELLO, 7, magic=1), bytes(64)):
        for carried in ([], [null], [null] * 30):
            control.send(data, carried)
    assert control.ask(HELLO)[0].count == 1, "none of them had an answer"
    for op in (0, 7, 2**31, 2**32 - 1):
        assert control.status(op, 1, 2, [null]) == -errno.ENOSYS
    assert control.ask(HELLO, descriptors=[null] * 200)[0].status == 0
    assert program.descriptors() == descriptors
    os.close(null)


def test_what_leaves_waits_for_nothing_and_spares_captures(program: Program) -> None:
    """A stopped thread may be in the driver with the lock for which a wait would wait."""
    address, control = program.malloc(SIZE), program.connect()
    assert program.do("set_capturing", 1) == 0
    before = program.do("count", SYNCS)
    exported = control.export(address, SIZE)
    assert control.status(UNMAP, address, SIZE) == 0
    assert control.status(MAP, address, SIZE, [exported]) == 0 and control.status(OWN, address, SIZE) == 0
    assert program.do("count", SYNCS) == before
    assert program.do("count", BROKEN) == 0 and program.do("set_capturing", 0) == 0
    os.close(exported)


def test_surplus_descriptors_of_a_map(program: Program) -> None:
    address, control = program.malloc(SIZE), program.connect()
    assert control.status(UNMAP, address, SIZE) == 0
    before = program.descriptors()
    fresh, other = new_memory((3).to_bytes(8, "little")), new_memory(b"")
    assert control.status(MAP, address, SIZE, [fresh, other, other]) == 0
    assert program.do("check", address, 8, 3) == 1
    assert program.descriptors() == before + 1, "the fake driver keeps one for the memory"
    os.close(fresh)
    os.close(other)


def test_every_request_is_answered_in_order_though_none_is_read(program: Program) -> None:
    address, control = program.malloc(SIZE), program.connect()
    for sequence in range(100, 140):
        control.send(pack(HELLO if sequence % 2 else UNMAP, sequence, address, SIZE + 1))
    answers = [control.receive()[0] for _ in range(40)]
    assert [one.sequence for one in answers] == list(range(100, 140))
    assert {one.status for one in answers if one.op == UNMAP} == {-errno.ENOENT}


def test_listing_and_exporting_while_threads_allocate_and_free(program: Program) -> None:
    program.malloc(SIZE)
    control = program.connect()
    program.begin("stir")
    exported = 0
    while program.busy():
        for piece in control.pieces()[:20]:
            assert control.status(OWN, piece.address, piece.size) in (0, -errno.ENOENT)
            answer, received = control.ask(EXPORT, piece.address, piece.size)
            assert answer.status in (0, -errno.ENOENT) and len(received) == (answer.status == 0)
            exported += len(received)
            for descriptor in received:
                os.close(descriptor)
    assert program.finish() == [0] and exported > 20
    assert program.counts() == [0, 1, 1, 0]


def test_a_locked_table_is_said_and_not_waited_for(built: Built) -> None:
    """As a thread leaves it that was stopped while it had the lock."""
    program = Program(built)
    address, control = program.malloc(SIZE), program.connect()
    symbols = subprocess.run(["nm", built.library], check=True, capture_output=True, text=True).stdout
    found = re.search(r"^([0-9a-f]+) b table(\.\w+)*$", symbols, re.M)
    assert found is not None
    maps = Path(f"/proc/{program.process.pid}/maps").read_text()
    base = int(next(line for line in maps.splitlines() if line.endswith(built.library.name)).partition("-")[0], 16)
    place = base + int(found[1], 16)
    with open(f"/proc/{program.process.pid}/mem", "r+b", buffering=0) as memory:
        for word, status in ((1, -errno.EAGAIN), (2, -errno.EAGAIN), (0, 0)):
            os.pwrite(memory.fileno(), struct.pack("i", word), place)
            assert control.ask(HELLO)[0].status == status
            assert control.ask(device_program.LIST)[0].status == status
            if status != 0:
                assert control.status(UNMAP, address, SIZE) == status
            else:
                control.receive()
    assert program.do("free", address) == 0
    program.end()


def test_the_program_closes_the_other_end(program: Program) -> None:
    program.malloc(SIZE)
    control = program.connect()
    assert program.do("close", program.number()) == 0
    assert control.ask(HELLO)[0].count == 1, "it is open here"


def test_the_program_closes_both_ends(built: Built) -> None:
    program = Program(built)
    address = program.malloc(SIZE)
    directory = f"/proc/{program.process.pid}/fd"
    sockets = [int(name) for name in os.listdir(directory) if os.readlink(f"{directory}/{name}").startswith("socket:")]
    assert [program.do("close", number) for number in sockets] == [0, 0]
    program.wait_without_thread()
    program.malloc(SIZE)
    assert program.counts() == [0, 1, 1, 1], "no more are served"
    assert program.do("free", address) == 0 and program.counts() == [0, 0, 0, 1]
    program.end()


def test_another_socket_of_the_program_under_the_threads_number(built: Built) -> None:
    """Nothing is read from it, and it is not closed."""
    program = Program(built)
    address = program.malloc(SIZE)
    control, number = program.connect(), program.number()
    directory = f"/proc/{program.process.pid}/fd"
    sockets = [int(name) for name in os.listdir(directory) if os.readlink(f"{directory}/{name}").startswith("socket:")]
    (own,) = (one for one in sockets if one != number)
    result, one, other = program.tell("pair")
    assert result == 0 and program.do("send", other, 64) == 64
    assert program.do("replace", one, own) == own
    # The thread waits on what its number was before, and wakes by this.
    control.send(pack(HELLO, 1))
    program.wait_without_thread()
    assert program.do("receive", own) == 64
    assert program.do("free", address) == 0
    program.end()
