"""IPC namespaces in images: read, checked, and what is taken out of them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rewarm.criu import images, ipc
from rewarm.errors import Unfit
from support.criu_images import field, image

MAGIC = b"MAGICMAG"
SYSV, ANON_SHARED, REGULAR = 1 << 10, 1 << 8, 1


def description(number: int, key: int = 7, uid: int = 0, gid: int = 0, mode: int = 0o600) -> bytes:
    numbers = {1: key, 2: uid, 3: gid, 4: 0, 5: 0, 6: mode, 7: number}
    return field(1, b"".join(field(at, value) for at, value in numbers.items()))


def record(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


def segment(number: int, huge: int = 0, in_pagemaps: int = 1, mode: int = 0o600, uid: int = 0) -> bytes:
    more = field(4, huge) if huge else b""
    return description(number, uid=uid, mode=mode) + field(2, 4096) + field(3, in_pagemaps) + more


def queue(number: int, *texts: bytes) -> bytes:
    sent = b"".join(record(field(1, 1) + field(2, len(text))) + text + bytes(-len(text) % 8) for text in texts)
    return record(description(number, key=8) + field(2, 16384) + field(3, len(texts))) + sent


def semaphores(number: int, *values: int) -> bytes:
    data = struct.pack(f"<{len(values)}H", *values)
    return record(description(number, key=9) + field(2, len(values))) + data + bytes(-len(data) % 8)


def mapping(status: int, shmid: int) -> bytes:
    numbers = {1: 4096, 2: 8192, 3: 0, 4: shmid, 5: 3, 6: 1, 7: status, 8: 1}
    return field(14, b"".join(field(at, value) for at, value in numbers.items()))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "ipcns-shm-3.img").write_bytes(image(segment(0), segment(32769)))
    (tmp_path / "ipcns-msg-3.img").write_bytes(MAGIC + queue(1, b"hello", b"") + queue(2))
    (tmp_path / "ipcns-sem-3.img").write_bytes(MAGIC + semaphores(4, 1, 2, 3) + semaphores(5, 1))
    (tmp_path / "ipcns-var-3.img").write_bytes(image(field(9, 1)))
    (tmp_path / "mm-1.img").write_bytes(image(mapping(REGULAR | ANON_SHARED | SYSV, 0)))
    for number, pages in ((0, 1), (32769, 2)):
        (tmp_path / f"pagemap-shmem-{number}.img").write_bytes(image(field(1, pages)))
        (tmp_path / f"pages-{pages}.img").write_bytes(b"content")
    return tmp_path


def names(checkpoint: Path) -> list[tuple[str, int]]:
    return [(one.kind, one.id) for one in ipc.entries(checkpoint)]


def may_own(user: int, group: int) -> bool:
    return (user, group) == (0, 0)


def test_all_objects_are_found(checkpoint: Path) -> None:
    assert names(checkpoint) == [("msg", 1), ("msg", 2), ("sem", 4), ("sem", 5), ("shm", 0), ("shm", 32769)]
    assert ipc.attached(checkpoint) == {0}
    ipc.check(checkpoint, may_own, huge=False)


def test_shared_memory_of_others_goes_with_its_content(checkpoint: Path) -> None:
    ipc.drop(checkpoint, {32769})
    assert [found for found in names(checkpoint) if found[0] == "shm"] == [("shm", 0)]
    assert {path.name for path in checkpoint.glob("pa*")} == {"pagemap-shmem-0.img", "pages-1.img"}
    assert (checkpoint / "ipcns-shm-3.img").read_bytes() == image(segment(0))


def test_anonymous_memory_of_the_same_number_stays(checkpoint: Path) -> None:
    (checkpoint / "mm-2.img").write_bytes(image(mapping(REGULAR | ANON_SHARED, 32769)))
    ipc.drop(checkpoint, {32769})
    assert (checkpoint / "pages-2.img").exists()


def test_sysctls_are_written_wherever_criu_looks(checkpoint: Path) -> None:
    (checkpoint / "ipcns-var-4.img").write_bytes(image(field(9, 1) + field(15, 5)))
    ipc.write_variables(checkpoint, {"sem": [1, 2, 3, 4], "shmmax": [2**64 - 1], "msg_default": [10]})
    for number in (3, 4):
        (found,) = images.records(checkpoint / f"ipcns-var-{number}.img")
        assert images.numbers(found, 1) == [1, 2, 3, 4] and images.number(found, 6) == 2**64 - 1
        assert (found[9], found[13]) == ([0], [10]) and not {14, 15, 16, 17} & set(found)
        assert set(range(1, 13)) <= set(found), "what is required is there"


@pytest.mark.parametrize(
    ("kind", "data", "text"),
    [
        ("shm", image(segment(0, in_pagemaps=0)), "elsewhere than in pagemaps"),
        ("shm", image(segment(0) + segment(1)), "2 descriptions"),
        ("shm", image(segment(0, mode=0o10600)), "mode 0o10600"),
        ("shm", image(segment(1 << 31)), "mode"),
        ("sem", MAGIC + semaphores(4, 1, 2, 3)[:-1], "reach beyond the end"),
        ("sem", MAGIC + record(description(4) + field(2, 0xFFFFFFFF)), "reach beyond the end"),
        ("sem", image(description(4, mode=0o1600)), "mode 0o1600"),
        ("msg", MAGIC + record(description(1) + field(3, 0xFFFFFFFF)), "messages are missing"),
        ("msg", MAGIC + queue(1, b"hello")[:-1], "reach beyond the end"),
        ("sem", MAGIC + semaphores(4, 1) * 4097, "more than 4096"),
    ],
)
def test_images_that_are_none(checkpoint: Path, kind: str, data: bytes, text: str) -> None:
    (checkpoint / f"ipcns-{kind}-9.img").write_bytes(data)
    with pytest.raises(images.ImageError, match=text):
        ipc.check(checkpoint, may_own, huge=True)


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (segment(1, uid=5), "user 5's"),
        (segment(1, huge=0o4000), "CAP_IPC_LOCK"),
        (segment(1, huge=0o10000), "CAP_IPC_LOCK"),
    ],
)
def test_what_a_container_may_not_have(checkpoint: Path, one: bytes, text: str) -> None:
    (checkpoint / "ipcns-shm-9.img").write_bytes(image(one))
    with pytest.raises(Unfit, match=text):
        ipc.check(checkpoint, may_own, huge=False)


def test_huge_pages_and_segments_that_are_locked_or_removed(checkpoint: Path) -> None:
    (checkpoint / "ipcns-shm-9.img").write_bytes(image(segment(1, huge=0o4000 | 21 << 26, mode=0o3600)))
    ipc.check(checkpoint, may_own, huge=True)
