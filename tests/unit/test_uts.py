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

OWN, OTHER = 3, 4


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """With a second image, which no capture makes, but CRIU may look for."""
    for number in (OWN, OTHER):
        (tmp_path / f"utsns-{number}.img").write_bytes(image(field(1, b"source") + field(2, b"(none)")))
    return tmp_path


def found(checkpoint: Path, number: int) -> tuple[str, str]:
    (record,) = images.records(checkpoint / f"utsns-{number}.img")
    return images.text(record, 1), images.text(record, 2)


def test_it_is_renamed_wherever_criu_looks(checkpoint: Path) -> None:
    before = (checkpoint / f"utsns-{OWN}.img").read_bytes()[:8]
    uts.rename(checkpoint, "copy", "example.org")
    assert found(checkpoint, OWN) == found(checkpoint, OTHER) == ("copy", "example.org")
    assert (checkpoint / f"utsns-{OWN}.img").read_bytes()[:8] == before
    assert not list(checkpoint.glob("*.new"))


@pytest.mark.parametrize(("name", "becomes"), [("caf\u00e9", "caf\u00e9"), ("\ud800x", "?x"), ("\udce9", "\udce9")])
def test_names_that_are_odd(checkpoint: Path, name: str, becomes: str) -> None:
    uts.rename(checkpoint, name, "(none)")
    assert found(checkpoint, OWN)[0] == becomes


def test_images_that_are_none(checkpoint: Path) -> None:
    (checkpoint / f"utsns-{OTHER}.img").write_bytes(b"short")
    with pytest.raises(ImageError, match=f"utsns-{OTHER}.img"):
        uts.rename(checkpoint, "copy", "(none)")


def test_no_image_at_all(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is none"):
        uts.rename(tmp_path, "copy", "(none)")


def spec(*namespaces: dict[str, str], **more: str) -> dict[str, Any]:
    return {"linux": {"namespaces": [{"type": "pid"}, *namespaces]}, **more}


def test_names_of_a_spec() -> None:
    own = Path("/proc/sys/kernel/domainname").read_text().rstrip("\n")
    assert names(spec({"type": "uts"}, hostname="a")) == ("a", own)
    docker = spec({"type": "uts"}, hostname="a")
    docker["linux"]["sysctl"] = {"kernel.domainname": "b"}
    assert names(docker) == ("a", "b")
    assert names(spec({"type": "uts"}, hostname="a", domainname="b")) == ("a", "b")
    assert names(spec({"type": "uts"})) == (os.uname().nodename, own)
    assert names(spec(hostname="a")) is None and names({}) is None
    # As containerd says it in a pod with hostNetwork.
    assert names(spec({"type": "uts", "path": f"/proc/{os.getppid()}/ns/uts"}, hostname="a")) is None
    with pytest.raises(FileNotFoundError):
        names(spec({"type": "uts", "path": "/proc/self/ns/none"}))
