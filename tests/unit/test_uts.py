"""The names of a restored container: out of its own spec, into CRIU's images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rewarm.criu import images, uts
from rewarm.criu.images import ImageError
from rewarm.oci.uts import names
from support.criu_images import field, image

INIT, OWN, OTHER = 5, 3, 4


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of an init in UTS namespace OWN, with a program that has made itself another."""
    (tmp_path / "pstree.img").write_bytes(image(field(1, INIT), field(1, 17)))
    (tmp_path / f"ids-{INIT}.img").write_bytes(image(field(1, 1) + field(8, OWN)))
    (tmp_path / "ids-17.img").write_bytes(image(field(1, 1) + field(8, OTHER)))
    for number, name in ((OWN, b"source"), (OTHER, b"other")):
        (tmp_path / f"utsns-{number}.img").write_bytes(image(field(1, name) + field(2, b"(none)")))
    return tmp_path


def found(checkpoint: Path, number: int) -> tuple[str, str]:
    (record,) = images.records(checkpoint / f"utsns-{number}.img")
    return images.text(record, 1), images.text(record, 2)


def test_the_containers_own_is_renamed(checkpoint: Path) -> None:
    before = (checkpoint / f"utsns-{OWN}.img").read_bytes()[:8]
    uts.rename(checkpoint, "copy", "example.org")
    assert found(checkpoint, OWN) == ("copy", "example.org")
    assert found(checkpoint, OTHER) == ("other", "(none)")
    assert (checkpoint / f"utsns-{OWN}.img").read_bytes()[:8] == before


def test_the_nodes_namespace_is_not_in_the_images(checkpoint: Path) -> None:
    (checkpoint / f"utsns-{OWN}.img").unlink()
    uts.rename(checkpoint, "copy", "(none)")
    assert not (checkpoint / f"utsns-{OWN}.img").exists() and found(checkpoint, OTHER)[0] == "other"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (f"utsns-{OWN}.img", b"short"),
        ("pstree.img", b"short"),
        (f"ids-{INIT}.img", b"short"),
        (f"ids-{INIT}.img", image(field(8, b"text"))),
    ],
)
def test_images_that_are_none(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"{name}|field 8 is not a number"):
        uts.rename(checkpoint, "copy", "(none)")
    assert not list(checkpoint.glob("*.new"))


def test_without_an_image_of_ids(checkpoint: Path) -> None:
    """CRIU would not restore it either."""
    (checkpoint / f"ids-{INIT}.img").unlink()
    with pytest.raises(OSError, match=f"ids-{INIT}.img"):
        uts.rename(checkpoint, "copy", "(none)")


def spec(*namespaces: dict[str, str], **more: str) -> dict[str, Any]:
    return {"linux": {"namespaces": [{"type": "pid"}, *namespaces]}, **more}


def test_names_of_a_spec() -> None:
    assert names(spec({"type": "uts"}, hostname="a")) == ("a", "(none)")
    assert names(spec({"type": "uts"}, hostname="a", domainname="b")) == ("a", "b")
    assert names(spec({"type": "uts"})) == (os.uname().nodename, "(none)")
    assert names(spec(hostname="a")) is None and names({}) is None
    assert names(spec({"type": "uts", "path": "/proc/self/ns/uts"}, hostname="a"))[0] == os.uname().nodename  # type: ignore[index]
    with pytest.raises(FileNotFoundError):
        names(spec({"type": "uts", "path": "/proc/self/ns/none"}))
