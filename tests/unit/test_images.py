"""CRIU images are hostile input: anything that is not one is an ImageError, whatever the bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.criu import images
from support.criu_images import field, image, varint


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_reads_records(tmp_path: Path) -> None:
    inner = field(1, 7) + field(6, b"dev/shm/link_remap.1")
    path = write(tmp_path / "x.img", image(field(1, 300) + field(3, inner), field(1, 2)))
    first, second = images.records(path)
    assert images.number(first, 1) == 300 and images.number(second, 1) == 2 and images.number(first, 9, 5) == 5
    (message,) = images.messages(first, 3)
    assert images.text(message, 6) == "dev/shm/link_remap.1" and images.text(message, 7) == ""


def test_repeated_numbers_packed_and_not() -> None:
    packed = images.decode(field(5, varint(1) + varint(300)))
    plain = images.decode(field(5, 1) + field(5, 300))
    assert images.numbers(packed, 5) == images.numbers(plain, 5) == [1, 300]


def test_the_last_scalar_counts_as_in_protobuf() -> None:
    assert images.number(images.decode(field(1, 1) + field(1, 2)), 1) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MAGIC",
        image(field(1, 1))[:-1],
        image(field(1, 1)) + b"\x01",
        b"MAGICMAG" + struct.pack("<I", 2**32 - 1) + b"xx",
        image(b"\x0a\xff\xff\xff\xff\x0f"),
        image(b"\x08" + b"\xff" * 20),
        image(b"\x0b"),
        image(b"\x09\x01"),
    ],
    ids=["empty", "magic", "short", "tail", "huge", "length", "varint", "group", "fixed"],
)
def test_what_is_no_image_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(images.ImageError):
        list(images.records(write(tmp_path / "x.img", data)))


def test_a_message_of_another_type_is_refused() -> None:
    message = images.decode(field(1, b"text") + field(2, 5))
    for ask in (
        lambda: images.number(message, 1),
        lambda: images.text(message, 2),
        lambda: list(images.messages(message, 2)),
    ):
        with pytest.raises(images.ImageError):
            ask()


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        message = images.decode(data)
        for number in message:
            images.numbers(message, number)
    except images.ImageError:
        return
    assert isinstance(message, dict)
