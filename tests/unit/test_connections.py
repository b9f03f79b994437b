"""TCP connections inside of a container survive, all others are closed sockets."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rewarm.criu import connections, images, sockets
from rewarm.ports import ports as ports_in_use
from support.criu_images import field, image
from support.socket_images import ESTABLISHED, LISTEN, record

HOST = "127.0.0.1"


class Pair:
    """A connection of this process with itself."""

    host = HOST

    def __init__(self) -> None:
        with socket.create_server((HOST, 0)) as listener:
            self.near = socket.create_connection(listener.getsockname())
            self.far = listener.accept()[0]
        self.ends = [self.near, self.far]

    def inode(self, end: socket.socket) -> int:
        return os.fstat(end.fileno()).st_ino

    def records(self, state: int = ESTABLISHED) -> list[bytes]:
        return [
            record(
                self.host,
                end.getsockname()[1],
                far=self.host,
                far_port=end.getpeername()[1],
                state=state,
                inode=self.inode(end),
                number=number,
            )
            for number, end in enumerate(self.ends, 1)
        ]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    with ExitStack() as stack:
        for end in made.ends:
            stack.enter_context(end)
        yield made


def checkpoint(directory: Path, *records: bytes, opened: Sequence[int] = (1, 2, 3, 4, 5)) -> Path:
    """Of one process, which has files of the ids `opened` open."""
    (directory / "files.img").write_bytes(image(*records))
    inventory = field(1, 2) + field(10, 1) + field(9, 2)
    (directory / "inventory.img").write_bytes(b"MAGI" + struct.pack("<I", len(inventory)) + inventory)
    (directory / "pstree.img").write_bytes(image(field(1, 1) + field(5, 1)))
    (directory / "core-1.img").write_bytes(image(field(1, 1) + field(3, field(1, 1))))
    (directory / "ids-1.img").write_bytes(image(field(2, 9)))
    (directory / "fdinfo-9.img").write_bytes(image(*(field(1, one) + field(3, 4) for one in opened)))
    return directory


def survivors(made: Path, *here: str, taken: Collection[int] = ()) -> list[int]:
    """Ids of the sockets that are connected after a restore's look."""
    connections.settle(made, here, taken)
    return [images.number(one, 1) for one in entries(made) if sockets.is_connection(one)]


def stream(made: Path, inode: int) -> tuple[images.Message, bytes]:
    """What CRIU reads: the message, and the bytes behind it."""
    data = (made / connections.stream(inode)).read_bytes()
    assert data[:8] == bytes.fromhex("1943565406554651")
    (length,) = struct.unpack_from("<I", data, 8)
    return images.decode(data[12 : 12 + length]), data[12 + length :]


def entries(made: Path) -> list[images.Message]:
    return [one for one in map(sockets.entry_of, images.records(made / "files.img")) if one is not None]


def tcp_close(made: Path) -> int:
    (inventory,) = images.records(made / "inventory.img", magic=4)
    assert images.number(inventory, 1) == 2 and images.number(inventory, 9) == 2
    return images.number(inventory, 10)


def test_both_ends_with_what_waits_to_be_read(tmp_path: Path, pair: Pair) -> None:
    pair.near.sendall(b"hello")
    made = checkpoint(tmp_path, *pair.records())
    before = (made / "files.img").read_bytes()
    assert connections.keep(made, [os.getpid()]) == []
    assert (made / "files.img").read_bytes() == before
    near, nothing = stream(made, pair.inode(pair.near))
    far, data = stream(made, pair.inode(pair.far))
    assert (nothing, data) == (b"", b"hello")
    assert (images.number(near, 1), images.number(far, 1)) == (0, 5)
    # What the one will send next is what the other expects next, in both directions.
    assert images.number(near, 4) == images.number(far, 2)
    assert images.number(far, 4) == images.number(near, 2)
    assert connections.kept(made) and tcp_close(made) == 0 and survivors(made) == [1, 2]
    assert pair.far.recv(10) == b"hello", "it was taken away from the source"


def test_a_connection_to_outside_is_closed(tmp_path: Path, pair: Pair) -> None:
    listener = record("0.0.0.0", 80, state=LISTEN)
    outside = record("10.1.0.5", 80, far="10.9.9.9", far_port=4000, state=ESTABLISHED, inode=99)
    udp = record("10.1.0.5", 80, far="10.9.9.9", far_port=53, state=ESTABLISHED, protocol=socket.IPPROTO_UDP, inode=98)
    made = checkpoint(tmp_path, *pair.records(), listener, outside, udp)
    connections.keep(made, [os.getpid()])
    found = entries(made)
    assert [images.number(one, 8) for one in found] == [*(e.getpeername()[1] for e in pair.ends), 0, 0, 53]
    assert images.number(found[2], 6) == LISTEN and images.number(found[2], 7) == 80
    assert [images.number(found[3], number) for number in (6, 7)] == [7, 0]
    # CRIU wants as many words of an address as before.
    assert found[3][11] == found[3][12] == [0]
    assert survivors(made) == [1, 2]


def test_nothing_to_keep(tmp_path: Path, pair: Pair) -> None:
    """Where there is no such connection CRIU closes them all, as ever."""
    made = checkpoint(
        tmp_path, pair.records()[0], record("10.1.0.5", 80, far="10.9.9.9", far_port=1, state=ESTABLISHED)
    )
    before = (made / "files.img").read_bytes()
    assert connections.keep(made, [os.getpid()]) == []
    assert (made / "files.img").read_bytes() == before
    assert not connections.kept(made) and tcp_close(made) == 1


@pytest.mark.parametrize("state", [2, 4, 5, 8, 9, 11])
def test_one_that_is_half_closed(tmp_path: Path, pair: Pair, state: int) -> None:
    made = checkpoint(tmp_path, *pair.records(state))
    connections.keep(made, [os.getpid()])
    assert not connections.kept(made)


def test_one_of_another_process(tmp_path: Path, pair: Pair) -> None:
    """In the node's network: CRIU's images have it, but nobody can say what waits to be read."""
    made = checkpoint(tmp_path, *pair.records())
    (note,) = connections.keep(made, [])
    assert str(pair.near.getsockname()[1]) in note and "comes back closed" in note
    assert not connections.kept(made)


def test_one_that_has_more_under_way_than_the_other_takes(tmp_path: Path, pair: Pair) -> None:
    pair.near.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            pair.near.send(b"x" * 65536)
    made = checkpoint(tmp_path, *pair.records())
    (note,) = connections.keep(made, [os.getpid()])
    assert "busy" in note and not connections.kept(made)


def ports(made: Path) -> list[tuple[int, int]]:
    return [(images.number(one, 7), images.number(one, 8)) for one in entries(made)]


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """By a connection that is over, of a container of the same pod and snapshot: the one that has connected moves."""
    made = checkpoint(
        tmp_path,
        record(HOST, 80, state=LISTEN),
        record(HOST, 80, far=HOST, far_port=40000, state=ESTABLISHED, inode=1, number=1),
        record(HOST, 40000, far=HOST, far_port=80, state=ESTABLISHED, inode=2, number=2),
        record(HOST, 50000, far=HOST, far_port=40001, state=ESTABLISHED, inode=3, number=3),
        record(HOST, 40001, far=HOST, far_port=50000, state=ESTABLISHED, inode=4, number=4),
        record(HOST, 40000, far="10.96.0.10", far_port=53, protocol=socket.IPPROTO_UDP, state=ESTABLISHED),
    )
    for inode in (1, 2, 3, 4):
        (made / connections.stream(inode)).touch()
    before = ports(made)
    connections.settle(made, [], {80, 40001})
    assert ports(made) == before, "a port that nobody is in the way of has changed"
    everything = set(range(32768, 61000)) - {45678}
    connections.settle(made, [], everything - {50000})
    assert ports(made) == [(80, 0), (80, 45678), (45678, 80), (50000, 40001), (40001, 50000), (40000, 53)]
    with pytest.raises(images.ImageError, match="no free port"):
        connections.settle(made, [], everything | {45678})


def test_ports_of_a_namespace(pair: Pair) -> None:
    near, far = pair.near.getsockname()[1], pair.near.getpeername()[1]
    assert {near, far} <= ports_in_use(os.getpid()) == ports_in_use("/proc/self/ns/net")
    pair.near.close()
    pair.far.close()
    assert {near, far} <= ports_in_use(os.getpid()), "it is remembered for a minute (TIME_WAIT)"
    with pytest.raises(FileNotFoundError):
        ports_in_use("/proc/self/ns/none")


def test_both_families(tmp_path: Path) -> None:
    """A server on [::] sees its clients of 127.0.0.1 as ::ffff:127.0.0.1; a connection to the pod's own address."""
    made = checkpoint(
        tmp_path,
        record(HOST, 40000, far=HOST, far_port=80, state=ESTABLISHED, inode=1, number=1),
        record("::ffff:127.0.0.1", 80, far="::ffff:127.0.0.1", far_port=40000, state=ESTABLISHED, inode=2, number=2),
        record("fd00::7", 40000, far="fd00::7", far_port=80, state=ESTABLISHED, inode=3, number=3),
        record("fd00::7", 80, far="fd00::7", far_port=40000, state=ESTABLISHED, inode=4, number=4),
    )
    files = (made / "files.img").read_bytes()
    for inode in (1, 2, 3, 4):
        (made / connections.stream(inode)).touch()
    assert survivors(made, "10.1.0.5", "fd00::7") == [1, 2, 3, 4]
    # Where the container does not have that address, or its addresses are not known.
    assert survivors(made, "10.1.0.5", "fd00::8") == [1, 2]
    (made / "files.img").write_bytes(files)
    assert survivors(made) == [1, 2]


def test_a_source_that_would_notice(tmp_path: Path, pair: Pair) -> None:
    """MSG_PEEK moves the offset of a program that peeks with SO_PEEK_OFF."""
    pair.near.sendall(b"hello")
    pair.far.setsockopt(socket.SOL_SOCKET, 42, 0)
    made = checkpoint(tmp_path, *pair.records())
    (note,) = connections.keep(made, [os.getpid()])
    assert "comes back closed" in note and pair.far.recv(10, socket.MSG_PEEK) == b"hello"


OUTSIDE = "10.9.9.9"


def hostile(
    pair: Pair, *, mirror: str = OUTSIDE, near: str = OUTSIDE, port: int = 80, inode: int = 0, **changed: int
) -> list[bytes]:
    """The near end of a connection with others, and something that is to look like its far end."""
    own = pair.inode(pair.near)
    state = changed.pop("state", ESTABLISHED)
    return [
        record(HOST, 40000, far=mirror, far_port=80, state=ESTABLISHED, inode=own, number=1),
        record(near, port, far=HOST, far_port=40000, state=state, inode=inode or own, number=2, **changed),
    ]


@pytest.mark.parametrize(
    ("changed", "opened"),
    [
        ({}, (1, 2)),  # an address that the container has not
        ({"mirror": HOST, "near": HOST}, (1,)),  # CRIU makes only what a process has open
        ({"mirror": HOST, "near": HOST, "network": 5}, (1, 2)),
        ({"mirror": HOST, "near": HOST, "state": 2}, (1, 2)),  # SYN_SENT: CRIU would connect
        ({"mirror": HOST, "near": HOST, "port": 81}, (1, 2)),
        ({"mirror": HOST, "near": HOST, "inode": 12345}, (1, 2)),  # there is no stream of it
    ],
)
def test_hostile_images(tmp_path: Path, pair: Pair, changed: dict[str, Any], opened: tuple[int, ...]) -> None:
    made = checkpoint(tmp_path, *pair.records())
    connections.keep(made, [os.getpid()])
    checkpoint(tmp_path, *hostile(pair, **changed), opened=opened)
    assert survivors(made) == []
    checkpoint(tmp_path, *hostile(pair, mirror=HOST, near=HOST), opened=(1, 2))
    assert survivors(made) == [1, 2], "the test refuses something else"


def decoy(made: Path, name: str, *records: bytes) -> None:
    (made / name).write_bytes(image(*records))


SOCKET, REGULAR = 4, 1
DEAD, ALIVE = field(3, field(1, 2)), field(3, field(1, 1))


@pytest.mark.parametrize(
    ("name", "records"),
    [
        # A file of another kind that is open under the id: CRIU looks for both.
        ("fdinfo-9.img", [field(1, 1) + field(3, SOCKET), field(1, 2) + field(3, REGULAR)]),
        # Records that it does not read.
        ("ids-1.img", [field(2, 8), field(2, 9)]),
        ("core-1.img", [field(1, 1) + DEAD, field(1, 1) + ALIVE]),
        ("core-1.img", [field(1, 1) + DEAD + ALIVE]),
    ],
)
def test_a_far_end_that_only_seems_to_be_open(tmp_path: Path, pair: Pair, name: str, records: list[bytes]) -> None:
    made = checkpoint(tmp_path, *pair.records())
    connections.keep(made, [os.getpid()])
    decoy(made, name, *records)
    assert survivors(made) == []


def test_two_connections_of_one_id(tmp_path: Path, pair: Pair) -> None:
    """CRIU takes either: one of others' could stand behind one that is well."""
    made = checkpoint(tmp_path, *pair.records())
    connections.keep(made, [os.getpid()])
    other = record(HOST, 40000, far=OUTSIDE, far_port=80, state=ESTABLISHED, inode=pair.inode(pair.near), number=1)
    (made / "files.img").write_bytes(image(*pair.records(), other))
    with pytest.raises(images.ImageError, match="two connections have one id"):
        connections.settle(made, [], ())


def test_equal_addresses_in_two_namespaces(tmp_path: Path) -> None:
    ends = [(HOST, 80, 40000), (HOST, 40000, 80)]
    records = [
        record(HOST, near, far=HOST, far_port=far, state=ESTABLISHED, inode=number, number=number, network=network)
        for network, numbers in ((5, (1, 2)), (6, (3, 4)))
        for number, (_, near, far) in zip(numbers, ends, strict=True)
    ]
    made = checkpoint(tmp_path, *records)
    for inode in (1, 2, 3, 4):
        (made / connections.stream(inode)).touch()
    assert survivors(made) == [1, 2, 3, 4]


def test_the_far_end_of_a_dead_process(tmp_path: Path, pair: Pair) -> None:
    made = checkpoint(tmp_path, *pair.records())
    connections.keep(made, [os.getpid()])
    (made / "core-1.img").write_bytes(image(field(1, 1) + field(3, field(1, 2))))
    assert survivors(made) == []


def test_a_protocol_that_is_too_wide(tmp_path: Path, pair: Pair) -> None:
    """CRIU takes the low 32 bits: TCP."""
    made = checkpoint(tmp_path, *pair.records(), record(HOST, 80, far=OUTSIDE, far_port=80, protocol=6 + (1 << 32)))
    with pytest.raises(images.ImageError, match="more than 32 bits"):
        connections.settle(made, [], ())


def test_images_without_files(tmp_path: Path) -> None:
    with pytest.raises(images.ImageError, match="it is not there"):
        connections.settle(tmp_path, [], ())
