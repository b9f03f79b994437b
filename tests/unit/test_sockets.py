"""Sockets that were bound to the source's address are bound to the new container's."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rewarm.criu import images, sockets
from rewarm.criu.images import ImageError
from rewarm.errors import Unfit
from support.criu_images import field, image
from support.socket_images import CLOSE, ESTABLISHED, record, words

OLD, NEW = "10.1.0.5", "10.2.0.9"
OLD6, NEW6 = "fd00:1::5", "fd00:2::9"

OTHER = field(1, 1) + field(2, 5) + field(3, field(1, 5) + field(11, b"/etc/passwd"))
"""A regular file, whose message has a field of the same number."""


def checkpoint(directory: Path, *records: bytes) -> Path:
    (directory / "files.img").write_bytes(image(OTHER, *records))
    return directory


def found(directory: Path) -> list[tuple[str, str]]:
    """Source and destination of each socket."""
    result = []
    for entry in map(sockets.entry_of, images.records(directory / "files.img")):
        if entry is not None:
            family = images.number(entry, 3)
            pair = [socket.inet_ntop(family, sockets.address(entry, number)) for number in (11, 12)]
            result.append((pair[0], pair[1]))
            assert images.number(entry, 1) == 23 and images.number(entry, 19) == 1, "a field was lost"
    assert next(images.records(directory / "files.img")) == images.decode(OTHER)
    return result


def test_they_move_to_the_address_of_their_kind(tmp_path: Path) -> None:
    made = checkpoint(
        tmp_path,
        record(OLD),
        record(OLD6),
        record("::ffff:" + OLD),
        record(OLD, protocol=socket.IPPROTO_UDP, state=CLOSE),
        record(OLD, protocol=socket.IPPROTO_UDP, state=ESTABLISHED, far="10.96.0.10", far_port=53),
        record(OLD, protocol=socket.IPPROTO_UDP, state=ESTABLISHED, far=OLD, far_port=99),
    )
    sockets.readdress(made, [OLD, OLD6], [NEW, NEW6])
    assert found(made) == [
        (NEW, "0.0.0.0"),
        (NEW6, "::"),
        ("::ffff:" + NEW, "::"),
        (NEW, "0.0.0.0"),
        (NEW, "10.96.0.10"),
        (NEW, NEW),
    ]
    assert not list(tmp_path.glob("*.new"))


STAY = ["0.0.0.0", "127.0.0.1", "127.8.8.8", "224.0.0.251", "255.255.255.255", "169.254.1.1", "::", "::1", "ff02::1"]


@pytest.mark.parametrize("address", [*STAY, "fe80::1", "::ffff:127.0.0.1", "::ffff:0.0.0.0", NEW, NEW6])
def test_what_is_not_of_one_pod_stays(tmp_path: Path, address: str) -> None:
    made = checkpoint(tmp_path, record(address))
    before = (made / "files.img").read_bytes()
    sockets.readdress(made, [OLD, OLD6], [NEW, NEW6])
    assert (made / "files.img").read_bytes() == before


def test_an_unbound_socket_stays(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, record(OLD, 0, state=CLOSE))
    sockets.readdress(made, [OLD], [])
    assert found(made) == [(OLD, "0.0.0.0")]


@pytest.mark.parametrize(
    ("address", "before", "here", "text"),
    [
        (OLD, [OLD], [NEW6], f"sockets bound to {OLD}: the source had 1 IPv4 address, this container has none"),
        (OLD6, [OLD6], [NEW], f"sockets bound to {OLD6}: the source had 1 IPv6 address, this container has none"),
        (OLD, [OLD], [NEW, "10.3.0.1"], "the source had 1 IPv4 address, this container has 2"),
        (OLD, [OLD, "192.168.100.5"], [NEW], "the source had 2 IPv4 addresses, this container has 1"),
        (OLD, [], [NEW], "the source had no IPv4 address, this container has 1"),
        ("10.9.9.9", [OLD], [NEW], "sockets bound to 10.9.9.9"),
    ],
)
def test_no_guess(tmp_path: Path, address: str, before: list[str], here: list[str], text: str) -> None:
    """A port of an inner network's could be open to the outer one."""
    made = checkpoint(tmp_path, record(address))
    with pytest.raises(Unfit) as caught:
        sockets.readdress(made, before, here)
    assert text in str(caught.value)


def test_two_services_on_one_port_do_not_become_one(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, record(OLD), record("192.168.100.5"))
    with pytest.raises(Unfit):
        sockets.readdress(made, [OLD, "192.168.100.5"], [NEW])


def test_ends_of_connections_move_if_they_can(tmp_path: Path) -> None:
    pair = (
        record(OLD, 80, far=OLD, far_port=4000, state=ESTABLISHED),
        record(OLD, 4000, far=OLD, far_port=80, state=ESTABLISHED, inode=8),
    )
    made = checkpoint(tmp_path, *pair)
    sockets.readdress(made, [OLD], [NEW, "10.3.0.1"])
    assert found(made) == [(OLD, OLD), (OLD, OLD)]
    sockets.readdress(made, [OLD], [NEW])
    assert found(made) == [(NEW, NEW), (NEW, NEW)]


WIDE = 1 << 32
"""Of which CRIU takes the low 32 bits."""


@pytest.mark.parametrize(
    "entry",
    [
        field(3, 2) + field(7, 80) + field(11, b"\xff"),
        field(3, b"two") + field(7, 80),
        b"\xff",
        field(3, 2) + field(7, b"port"),
        field(3, 2 + WIDE) + field(7, 80),
    ],
)
def test_images_that_are_none(tmp_path: Path, entry: bytes) -> None:
    made = checkpoint(tmp_path, field(1, 4) + field(4, entry))
    with pytest.raises(ImageError):
        sockets.readdress(made, [OLD], [NEW])


def test_a_socket_that_is_two(tmp_path: Path) -> None:
    """Protobuf merges them: CRIU would see another than is looked at here."""
    made = checkpoint(tmp_path, record("0.0.0.0") + field(4, words(11, OLD)))
    with pytest.raises(ImageError, match="2 times"):
        sockets.readdress(made, [OLD], [NEW])


def test_a_kind_of_file_that_is_too_wide(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, field(1, 4 + WIDE) + record(OLD)[2:])
    with pytest.raises(ImageError, match="more than 32 bits"):
        sockets.readdress(made, [OLD], [NEW])


@pytest.mark.parametrize("family", [0, 1, 16, 1 << 31])
def test_another_family_stays(tmp_path: Path, family: int) -> None:
    entry = field(3, family) + field(7, 80) + words(11, OLD)
    made = checkpoint(tmp_path, field(1, 4) + field(4, entry))
    before = (made / "files.img").read_bytes()
    sockets.readdress(made, [OLD], [NEW])
    assert (made / "files.img").read_bytes() == before


def test_no_files(tmp_path: Path) -> None:
    sockets.readdress(tmp_path, [OLD], [NEW])
    assert not list(tmp_path.iterdir())
