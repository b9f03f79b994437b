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
    sockets.readdress(made, [NEW, NEW6], connections=False)
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
    sockets.readdress(made, [NEW, NEW6], connections=False)
    assert (made / "files.img").read_bytes() == before


def test_an_unbound_socket_stays(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, record(OLD, 0, state=CLOSE))
    sockets.readdress(made, [], connections=False)
    assert found(made) == [(OLD, "0.0.0.0")]


@pytest.mark.parametrize(
    ("address", "here", "text"),
    [
        (OLD, [NEW6], f"sockets bound to {OLD}.*this container has no IPv4 address"),
        (OLD6, [NEW], f"sockets bound to {OLD6}.*this container has no IPv6 address"),
        (OLD, [NEW, "10.3.0.1"], f"sockets bound to {OLD}.*this container has 2 IPv4 addresses"),
    ],
)
def test_no_guess(tmp_path: Path, address: str, here: list[str], text: str) -> None:
    made = checkpoint(tmp_path, record(address))
    with pytest.raises(Unfit, match=text):
        sockets.readdress(made, here, connections=False)


def test_connections_move_only_where_they_survive(tmp_path: Path) -> None:
    pair = (
        record(OLD, 80, far=OLD, far_port=4000, state=ESTABLISHED),
        record(OLD, 4000, far=OLD, far_port=80, state=ESTABLISHED, inode=8),
    )
    made = checkpoint(tmp_path, *pair)
    sockets.readdress(made, [NEW, "10.3.0.1"], connections=False)  # a closed socket is bound to nothing
    assert found(made) == [(OLD, OLD), (OLD, OLD)]
    sockets.readdress(made, [NEW], connections=True)
    assert found(made) == [(NEW, NEW), (NEW, NEW)]


@pytest.mark.parametrize(
    "entry",
    [
        field(3, 2) + field(7, 80) + field(11, b"\xff"),
        field(3, b"two") + field(7, 80),
        b"\xff",
        field(3, 2) + field(7, b"port"),
    ],
)
def test_images_that_are_none(tmp_path: Path, entry: bytes) -> None:
    made = checkpoint(tmp_path, field(1, 4) + field(4, entry))
    with pytest.raises(ImageError):
        sockets.readdress(made, [NEW], connections=False)


def test_a_socket_that_is_two(tmp_path: Path) -> None:
    """Protobuf merges them: CRIU would see another than is looked at here."""
    made = checkpoint(tmp_path, record("0.0.0.0") + field(4, words(11, OLD)))
    with pytest.raises(ImageError, match="2 times"):
        sockets.readdress(made, [NEW], connections=False)


@pytest.mark.parametrize("family", [0, 1, 16, 1 << 31])
def test_another_family_stays(tmp_path: Path, family: int) -> None:
    entry = field(3, family) + field(7, 80) + words(11, OLD)
    made = checkpoint(tmp_path, field(1, 4) + field(4, entry))
    before = (made / "files.img").read_bytes()
    sockets.readdress(made, [NEW], connections=False)
    assert (made / "files.img").read_bytes() == before


def test_no_files(tmp_path: Path) -> None:
    sockets.readdress(tmp_path, [NEW], connections=False)
    assert not list(tmp_path.iterdir())
