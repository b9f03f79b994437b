"""The identity of an image: the same wherever its layers were unpacked, another for other content, and harmless."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rewarm import compat, image, layer_digest
from rewarm.errors import Unfit
from rewarm.overlay import lower_directories
from support.snapshots import REQUIRES

CRIO = {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.ImageName": "model:latest"}
DIGEST = "5f" * 32


def layer(path: Path, text: str = "V = 1\n") -> Path:
    """A layer as an image has it; directories have the time of this moment."""
    (path / "app/empty").mkdir(parents=True)
    (path / "app/main.py").write_text(text)
    (path / "app/py.typed").touch()
    (path / "app/run").symlink_to("main.py")
    os.mknod(path / "app/gone", 0o600 | 0o020000, os.makedev(0, 0))
    os.utime(path / "app/main.py", ns=(0, 1_700_000_000_999_999_999))
    return path


def digest(path: Path) -> str:
    return layer_digest.layer_digest(str(path)).digest


def test_a_layer_that_is_unpacked_again(tmp_path: Path) -> None:
    one = layer(tmp_path / "1")
    two = layer(tmp_path / "2")
    os.utime(two / "app", (1, 1))
    os.utime(two / "app/py.typed", (2, 2))
    os.utime(two / "app/main.py", ns=(5, 1_700_000_000_000_000_000))
    os.chmod(two / "app/empty", 0o700)
    os.chown(two / "app/main.py", 100000, 100000)
    assert digest(one) == digest(two)


@pytest.mark.parametrize(
    "change",
    [
        lambda app: os.utime(app / "main.py", (0, 1_700_000_001)),
        lambda app: (app / "main.py").chmod(0o755),
        lambda app: (app / "py.typed").write_text("x"),
        lambda app: (app / "run").unlink(),
        lambda app: (app / "gone").unlink(),
        lambda app: (app / "empty/more").mkdir(),
        lambda app: ((app / "run").unlink(), (app / "run").symlink_to("other.py")),
        lambda app: ((app / "gone").unlink(), (app / "gone").touch()),
        lambda app: (app / "empty").rename(app / "full"),
    ],
    ids=["time", "mode", "size", "file", "whiteout", "directory", "link", "type", "name"],
)
def test_a_layer_with_other_content(tmp_path: Path, change: Callable[[Path], object]) -> None:
    one, two = layer(tmp_path / "1"), layer(tmp_path / "2")
    change(two / "app")
    assert digest(one) != digest(two)


def test_hostile_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is opened but directories, and neither depth nor number of names keeps anybody waiting."""
    hostile = tmp_path / "layer"
    hostile.mkdir()
    os.mkfifo(hostile / "fifo")
    (hostile / "device").symlink_to("/dev/zero")
    (hostile / "up").symlink_to("../" * 40)
    (hostile / "line\nfile 644 0 0").touch()
    (hostile / os.fsdecode(b"\xff\xfe")).touch()
    monkeypatch.setattr(layer_digest, "MOST", 512)
    for name in ("many", "more"):
        (hostile / name).mkdir()
        for number in range(600):
            (hostile / name / str(number)).touch()
    here = os.open(hostile, os.O_RDONLY)
    for _ in range(200):
        os.mkdir("d" * 200, dir_fd=here)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    before = time.monotonic()
    first = layer_digest.layer_digest(str(hostile))
    assert time.monotonic() - before < 1
    assert first.names <= 512
    # What is in a directory that is too large is not looked at: which of it would be chance.
    (hostile / "many/600").touch()
    assert digest(hostile) == first.digest
    (hostile / "line\n").touch()
    assert digest(hostile) != first.digest
    subprocess.run(["rm", "-rf", hostile], check=True)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Mounts an overlay of these lower directories, and tells where."""
    done: list[Path] = []

    def mount(*lower: str, upper: Path = tmp_path / "upper", cwd: Path = tmp_path) -> str:
        work, root = tmp_path / "work", tmp_path / f"root {len(done)}"
        for path in (upper, work, root):
            path.mkdir(parents=True, exist_ok=True)
        options = f"lowerdir={':'.join(lower)},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", root], check=True, cwd=cwd)
        done.append(root)
        return str(root)

    yield mount
    for root in reversed(done):
        subprocess.run(["umount", root], check=True)


def identity(state: Path, root: str, annotations: dict[str, str] | None = None) -> str:
    return image.identity({"annotations": annotations or {}}, str(state), os.getpid(), root)


def test_lower_directories(tmp_path: Path, mounted: Callable[..., str]) -> None:
    names = ["a", "b,c d", "e:f", "g\\h"]
    paths = [layer(tmp_path / name) for name in names]
    escaped = [str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,") for path in paths]
    assert lower_directories(os.getpid(), mounted(*escaped)) == list(map(str, paths))
    assert lower_directories(os.getpid(), "/proc") == []
    assert lower_directories(os.getpid(), str(tmp_path)) == []


def test_layers_as_containerd_names_many(tmp_path: Path, mounted: Callable[..., str]) -> None:
    snapshots = tmp_path / "snapshots"
    for number in "12":
        layer(snapshots / number / "fs")
    root = mounted("2/fs", "1/fs", upper=snapshots / "3/fs", cwd=snapshots)
    assert lower_directories(os.getpid(), root) == [str(snapshots / "2/fs"), str(snapshots / "1/fs")]
    assert identity(tmp_path / "state", root).startswith("layers:")


def test_layers_of_docker(tmp_path: Path, mounted: Callable[..., str]) -> None:
    """Links to the layers, and one that is made for each container."""
    state = tmp_path / "state"
    found = []
    for number in "12":
        node = tmp_path / f"docker{number}"
        layer(node / "image/diff")
        own = node / f"{number * 64}-init/diff"
        own.mkdir(parents=True)
        (own / "resolv.conf").write_text(number)
        (node / "l").mkdir()
        (node / "l/OWN").symlink_to(f"../{number * 64}-init/diff")
        (node / "l/IMAGE").symlink_to("../image/diff")
        found.append(identity(state, mounted(f"{node}/l/OWN", f"{node}/l/IMAGE", upper=node / "upper")))
    assert found[0] == found[1] and found[0]


def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    def walk(path: str) -> layer_digest.LayerDigest:
        seen.append(os.path.basename(path))
        return layer_digest.layer_digest(path)

    monkeypatch.setattr(image, "layer_digest", walk)
    return seen


def large(path: Path) -> Path:
    layer(path)
    for number in range(70):
        (path / str(number)).mkdir()
    return path


def test_a_layer_is_walked_once(tmp_path: Path, mounted: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state"
    one, two, small = large(tmp_path / "1"), large(tmp_path / "2"), layer(tmp_path / "small")
    root = mounted(str(one), str(two), str(small))
    seen = walked(monkeypatch)
    first = identity(state, root)
    assert seen == ["1", "2", "small"]
    assert identity(state, root) == first
    assert seen[3:] == ["small"]
    assert (state / "layers.json").stat().st_mode & 0o777 == 0o600
    # Its place is taken by another.
    two.rename(tmp_path / "old")
    layer(two, "other")
    for number in range(70):
        (two / str(number)).mkdir()
    assert identity(state, root) != first
    assert seen[4:] == ["2", "small"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100000, b'{"LAYER": [1]}', b'{"LAYER": 5}'])
def test_a_damaged_cache(tmp_path: Path, mounted: Callable[..., str], content: bytes) -> None:
    state = tmp_path / "state"
    one = large(tmp_path / "1")
    root = mounted(str(one), str(layer(tmp_path / "2")))
    first = identity(state, root)
    kept = json.loads((state / "layers.json").read_text())
    (state / "layers.json").write_bytes(content.replace(b"LAYER", bytes(one)))
    assert identity(state, root) == first
    assert json.loads((state / "layers.json").read_text()) == kept


def test_the_cache_is_bounded(tmp_path: Path, mounted: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "_MOST", 2)
    layers = [str(large(tmp_path / name)) for name in "123"]
    assert identity(tmp_path / "state", mounted(*layers))
    assert list(json.loads((tmp_path / "state/layers.json").read_text())) == layers[1:]


def test_no_identity(tmp_path: Path, mounted: Callable[..., str]) -> None:
    """Another file system, and layers that are not there (idmapped ones, whose mounts containerd takes away)."""
    assert identity(tmp_path / "state", "/proc") == ""
    root = mounted(str(layer(tmp_path / "1")), str(layer(tmp_path / "2")))
    (tmp_path / "1").rename(tmp_path / "gone")
    assert identity(tmp_path / "state", root) == ""


def test_crio_tells_it(tmp_path: Path) -> None:
    key = "io.kubernetes.cri-o.ImageRef"
    for value in (DIGEST, f"sha256:{DIGEST}", f"registry.test/model@sha256:{DIGEST}"):
        assert identity(tmp_path, "/proc", {**CRIO, key: value}) == f"image:{DIGEST}"
    assert identity(tmp_path, "/proc", {**CRIO, key: "registry.test/model:latest"}) == ""
    # A pod of containerd's may have such an annotation, and it means nothing.
    assert identity(tmp_path, "/proc", {"io.kubernetes.cri.container-type": "container", key: DIGEST}) == ""


@pytest.mark.parametrize(
    ("there", "here"), [("", "layers:a"), ("layers:a", ""), ("layers:a", "layers:a"), ("layers:a", "image:b")]
)
def test_images_that_fit(there: str, here: str) -> None:
    compat.check_image(REQUIRES._replace(image_id=there), lambda: here)


def test_another_image_does_not_fit() -> None:
    said = r"snapshot was taken of another image of that name \(a{12}, here b{12}\)"
    with pytest.raises(Unfit, match=said):
        compat.check_image(REQUIRES._replace(image_id="layers:" + "a" * 32), lambda: "layers:" + "b" * 32)


def test_layers_are_not_walked_for_a_snapshot_without() -> None:
    def walk() -> str:
        raise AssertionError("walked")

    compat.check_image(REQUIRES, walk)
