"""Multicast groups of a network namespace, without those that the kernel joins by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewarm import memberships
from support.criu_images import field, image
from support.netns import NetworkNamespace

JOINS = """
import socket, struct, sys
four = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
for group in sys.argv[1:]:
    if ":" in group:
        where = socket.inet_pton(socket.AF_INET6, group) + struct.pack("=I", socket.if_nametoindex("lo"))
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, where)
    else:
        where = socket.inet_aton(group) + socket.inet_aton("127.0.0.1")
        four.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, where)
print("joined", flush=True)
sys.stdin.read()
"""
TCP, UDP, RAW = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW)


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as made:
        yield made


class Program:
    """A process in a network namespace that has joined groups."""

    def __init__(self, namespace: NetworkNamespace, *groups: str) -> None:
        argv = namespace.argv(sys.executable, "-c", JOINS, *groups)
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None and self._process.stdout.readline() == "joined\n"
        self.pid = self._process.pid

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate("")


def dump(directory: Path, kind: int) -> Path:
    entry = field(1, 1) + field(2, 7) + field(3, socket.AF_INET) + field(4, kind)
    (directory / "files.img").write_bytes(image(field(1, 4) + field(2, 1) + field(4, entry)))
    return directory


def test_the_kernels_own_are_none(namespace: NetworkNamespace, tmp_path: Path) -> None:
    # With an address there is a solicited-node group, with forwarding those of routers.
    subprocess.run(namespace.argv("ip", "address", "add", "fd00::1234/64", "dev", "lo"), check=True)
    forwarding = ["sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"]
    subprocess.run(namespace.argv(*forwarding), check=True)
    with Program(namespace) as program:
        assert "FF02" in Path(f"/proc/{program.pid}/net/igmp6").read_text().upper()
        assert memberships.groups(program.pid) == []
        assert memberships.notes(program.pid, dump(tmp_path, UDP)) == []


@pytest.mark.parametrize(("kind", "told"), [(UDP, True), (RAW, True), (TCP, False)])
def test_groups_are_told(namespace: NetworkNamespace, tmp_path: Path, kind: int, told: bool) -> None:
    with Program(namespace, "224.0.0.251", "239.1.2.3", "ff02::fb") as program:
        found = memberships.groups(program.pid)
        assert sorted(found) == ["224.0.0.251 on lo", "239.1.2.3 on lo", "ff02::fb on lo"]
        notes = memberships.notes(program.pid, dump(tmp_path, kind))
    assert len(notes) == told
    for note in notes:
        assert note.startswith("multicast groups do not come back: ") and "224.0.0.251 on lo" in note


def test_many_are_not_all_named(namespace: NetworkNamespace, tmp_path: Path) -> None:
    with Program(namespace, *(f"239.0.0.{number}" for number in range(1, 8))) as program:
        (note,) = memberships.notes(program.pid, dump(tmp_path, UDP))
    assert " and 3 more of its network namespace" in note


def test_where_nothing_can_be_told(tmp_path: Path) -> None:
    assert memberships.notes(os.getpid(), tmp_path) == []
    (tmp_path / "files.img").write_bytes(b"x")
    assert memberships.notes(os.getpid(), tmp_path) == []
    assert memberships.notes(1 << 22, dump(tmp_path, UDP)) == []
