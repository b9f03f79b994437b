"""The device nodes of a restored /dev, made right in a real tmpfs of another mount namespace."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm.errors import RestoreError
from rewarm.gpu.nodes import put_right

DEVICES = "Character devices:\n195 nvidia\n234 nvidia-caps\n238 nvidia-uvm\n\nBlock devices:\n  7 loop\n"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making device nodes and mounts needs root")


class Container:
    """A process with a root and a /dev of its own; `run` runs a shell command in its mounts."""

    def __init__(self, root: Path) -> None:
        for name in ("dev", "elsewhere"):
            (root / name).mkdir(parents=True)
        setup = f"mount --make-rprivate / && mount --bind {root} {root} && mount -t tmpfs -o mode=755 dev {root}/dev"
        # Its root directory is the container's, its program the node's: there is none in the container.
        become = "import os, sys; os.chroot(sys.argv[1]); os.chdir('/'); print('up', flush=True); sys.stdin.read()"
        self.root = root
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", f'{setup} && exec python3 -c "$1" {root}', "sh", become],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"
        self.dev = Path(f"/proc/{self.process.pid}/root/dev")

    def run(self, command: str) -> None:
        words = ["nsenter", "--mount", "--target", str(self.process.pid), "sh", "-ec", f"cd {self.root}; {command}"]
        subprocess.run(words, check=True, timeout=60)

    def put_right(self, *devices: dict[str, Any], **spec: Any) -> list[str]:
        return put_right(self.process.pid, {"linux": {"devices": list(devices)}, **spec}, DEVICES)

    def refuse(self, *devices: dict[str, Any], **spec: Any) -> str:
        before = self.listing()
        with pytest.raises(RestoreError) as caught:
            self.put_right(*devices, **spec)
        assert self.listing() == before
        assert str(caught.value).isprintable()
        return str(caught.value)

    def listing(self) -> dict[str, str]:
        """`c 195:0 666 0:0`, or what else it is, by path below /dev."""
        found = {}
        for directory, below, files in os.walk(self.dev):
            for name in sorted(below + files):
                path = Path(directory, name)
                status = path.lstat()
                kind = {stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p"}.get(stat.S_IFMT(status.st_mode), "")
                numbers = f" {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if kind in ("c", "b") else ""
                mode = f"{stat.S_IMODE(status.st_mode):o}"
                found[str(path.relative_to(self.dev))] = (
                    f"{kind}{numbers} {mode} {status.st_uid}:{status.st_gid}" if kind else stat.filemode(status.st_mode)
                )
        return found

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self.process.stdout.close()


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    made = Container(tmp_path / "root")
    yield made
    made.close()


def device(path: str, kind: str, major: int, minor: int, **more: Any) -> dict[str, Any]:
    return {"path": path, "type": kind, "major": major, "minor": minor, **more}


def test_another_gpu_than_the_source_had(container: Container) -> None:
    container.run("mknod -m 666 dev/nvidia0 c 195 0; mknod -m 666 dev/nvidiactl c 195 255; mknod dev/null c 1 3")
    wanted = device("/dev/nvidia3", "c", 195, 3), device("/dev/nvidiactl", "c", 195, 255)
    assert container.put_right(*wanted) == [
        "/dev/nvidia3 is c 195:3, it was missing",
        "/dev/nvidia0 is removed, it was c 195:0 with mode 0666 of 0:0",
    ]
    assert container.listing() == {
        "nvidia3": "c 195:3 666 0:0",
        "nvidiactl": "c 195:255 666 0:0",
        "null": "c 1:3 644 0:0",
    }
    assert container.put_right(*wanted) == []


def test_the_same_path_for_another_gpu(container: Container) -> None:
    container.run("mknod -m 666 dev/nvidia0 c 195 0")
    changes = container.put_right(device("/dev/nvidia0", "c", 195, 3))
    assert changes == ["/dev/nvidia0 is c 195:3, it was c 195:0 with mode 0666 of 0:0"]
    assert container.listing() == {"nvidia0": "c 195:3 666 0:0"}


@pytest.mark.parametrize("umask", [0o022, 0o777])
def test_modes_and_owners(container: Container, umask: int) -> None:
    container.run("mknod -m 600 dev/nvidia0 c 195 0; mknod -m 666 dev/nvidia1 c 195 1")
    before = os.umask(umask)
    try:
        changes = container.put_right(
            device("/dev/nvidia0", "c", 195, 0, fileMode=0o20660, uid=0, gid=44),  # as Docker writes it
            device("/dev/nvidia1", "u", 195, 1, fileMode=0o666, uid=1000, gid=1000),
            device("/dev/nvidia-caps/x/nvidia-cap1", "c", 234, 1, fileMode=0o400),
            device("/dev/loop9", "b", 7, 9, fileMode=0o600, uid=None),
            {"path": "/dev/fifo", "type": "p"},
        )
    finally:
        os.umask(before)
    assert len(changes) == 5
    assert container.listing() == {
        "nvidia0": "c 195:0 660 0:44",
        "nvidia1": "c 195:1 666 1000:1000",
        "nvidia-caps": "drwxr-xr-x",
        "nvidia-caps/x": "drwxr-xr-x",
        "nvidia-caps/x/nvidia-cap1": "c 234:1 400 0:0",
        "loop9": "b 7:9 600 0:0",
        "fifo": "p 666 0:0",
    }


def test_what_is_removed_and_what_stays(container: Container) -> None:
    container.run("""
        mkdir -p dev/a/b dev/nvidia-caps
        mknod dev/sda b 8 0; mknod dev/a/b/disk b 7 1; mknod dev/loop0 b 7 0
        mknod dev/a/b/gpu c 195 7; mknod dev/uvm c 238 0; mknod dev/nvidia-caps/nvidia-cap3 c 234 3
        mknod dev/nvidia-uvm c 400 0
        mknod dev/kvm c 10 232; mknod dev/alias c 195 1; touch dev/nvidia-file; ln -s /dev/sda dev/nvidia-link
        mkfifo dev/nvidia-fifo
    """)
    changes = container.put_right(device("/dev/nvidia1", "c", 195, 1), device("/dev/loop0", "b", 7, 0, fileMode=0o644))
    assert changes[0] == "/dev/nvidia1 is c 195:1, it was missing"
    assert sorted(line.split()[0] for line in changes[1:]) == [
        "/dev/a/b/disk",
        "/dev/a/b/gpu",
        "/dev/nvidia-caps/nvidia-cap3",
        "/dev/nvidia-uvm",
        "/dev/sda",
        "/dev/uvm",
    ]
    left = container.listing()
    assert left["alias"] == "c 195:1 644 0:0"  # another name of a GPU that the container was given
    assert sorted(left) == [
        "a", "a/b", "alias", "kvm", "loop0", "nvidia-caps", "nvidia-fifo", "nvidia-file", "nvidia-link", "nvidia1",
    ]  # fmt: skip


def test_a_link_or_a_file_in_the_place_of_a_device(container: Container) -> None:
    container.run("touch elsewhere/file; ln -s ../elsewhere/file dev/nvidia0; echo x > dev/nvidia1; mkfifo dev/nvidia2")
    changes = container.put_right(*(device(f"/dev/nvidia{n}", "c", 195, n) for n in range(3)))
    assert [line.partition("it was ")[2] for line in changes] == ["a symbolic link", "a file", "a FIFO"]
    assert container.listing() == {f"nvidia{n}": f"c 195:{n} 666 0:0" for n in range(3)}
    assert (container.root / "elsewhere" / "file").stat().st_size == 0


def test_a_directory_in_the_place_of_a_device(container: Container) -> None:
    container.run("mkdir dev/nvidia0")
    assert "a directory in its place" in container.refuse(device("/dev/nvidia0", "c", 195, 0))


@pytest.mark.parametrize("target", ["/elsewhere", "../elsewhere", "/proc/self/root/elsewhere", "sub"])
def test_no_way_through_a_link(container: Container, target: str) -> None:
    container.run(f"mkdir dev/sub; ln -s {target} dev/nvidia-caps; mknod elsewhere/nvidia0 c 195 0")
    text = container.refuse(device("/dev/nvidia-caps/nvidia-cap1", "c", 234, 1))
    assert text.startswith("open the directory of /dev/nvidia-caps/nvidia-cap1: Not a directory")
    assert os.listdir(container.root / "elsewhere") == ["nvidia0"]
    assert container.put_right() == []  # nor when it is looked through
    assert os.listdir(container.root / "elsewhere") == ["nvidia0"]


def test_a_dev_that_is_a_link(container: Container) -> None:
    container.run("umount dev; rmdir dev; ln -s elsewhere dev; mknod elsewhere/nvidia0 c 195 0")
    assert "open /dev of the container: Not a directory" in container.refuse(device("/dev/nvidia1", "c", 195, 1))
    assert os.listdir(container.root / "elsewhere") == ["nvidia0"]


def test_mounts_below_are_not_entered(container: Container) -> None:
    container.run("""
        mkdir dev/shm dev/same; mount -t tmpfs shm dev/shm; mknod dev/shm/nvidia0 c 195 0; mknod dev/shm/sda b 8 0
        mknod elsewhere/nvidia0 c 195 0; mkdir dev/else; mount --bind elsewhere dev/else
        mount --bind dev dev/same
    """)
    assert container.put_right() == []
    assert os.listdir(container.dev / "else") == ["nvidia0"]
    assert sorted(os.listdir(container.dev / "shm")) == ["nvidia0", "sda"]
    for directory in ("shm", "same", "else/deeper"):
        if directory == "else/deeper":
            container.run("mkdir elsewhere/deeper")
        text = container.refuse(device(f"/dev/{directory}/nvidia1", "c", 195, 1))
        assert text.endswith("something is mounted on the way to it")


def test_what_is_mounted_in_the_place_of_a_device(container: Container) -> None:
    container.run("""
        mknod -m 600 elsewhere/three c 195 3; touch dev/nvidia3 dev/nvidia4 dev/console
        for name in nvidia3 nvidia4 console; do mount --bind elsewhere/three dev/$name; done
        mknod dev/nvidia5 c 195 5; mount --bind dev/nvidia5 dev/nvidia5
    """)
    # The node's own, with the owner and mode that it has there; runc's terminal; and a mount of the same file system.
    right = device("/dev/nvidia3", "c", 195, 3, gid=44), device("/dev/console", "c", 5, 1)
    assert container.put_right(*right) == []
    text = container.refuse(device("/dev/nvidia4", "c", 195, 4))
    assert "a mount is in its place: c 195:3 with mode 0600 of 0:0" in text
    assert set(container.listing()) == {"nvidia3", "nvidia4", "nvidia5", "console"}


def test_a_dev_of_the_node(container: Container) -> None:
    text = container.refuse(mounts=[{"destination": "/dev/", "type": "bind", "source": "/dev"}])
    assert "it is a mount of /dev; give the container a /dev of its own" in text
    container.refuse(mounts=[{"destination": "/dev", "source": "/x", "options": ["rbind", "ro"]}])
    # The spec says nothing of it.
    with pytest.raises(RestoreError, match="it is the node's own"):
        put_right(os.getpid(), {})


def test_no_dev_and_no_process(container: Container) -> None:
    container.run("umount dev; rmdir dev")
    with pytest.raises(RestoreError, match="open /dev of the container: No such file"):
        container.put_right()
    with pytest.raises(RestoreError, match="open container's root: No such file"):
        put_right(2**22 + 1, {})


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "outside": (device("/etc/nvidia0", "c", 195, 0), "make device /etc/nvidia0: it is not below /dev"),
    "/dev itself": (device("/dev", "c", 195, 0), "it is not below /dev"),
    "out again": (device("/dev/../etc/nvidia0", "c", 195, 0), "it is not below /dev"),
    "here": (device("/dev/./nvidia0", "c", 195, 0), "it is not below /dev"),
    "relative": (device("dev/nvidia0", "c", 195, 0), "it is not below /dev"),
    "a neighbour": (device("/device/nvidia0", "c", 195, 0), "it is not below /dev"),
    "a NUL": (device("/dev/nvidia\0", "c", 195, 0), "malformed"),
    "half a character": (device("/dev/nvidia\ud800", "c", 195, 0), "malformed"),
    "no path": ({"type": "c", "major": 195, "minor": 0}, "its entry in the spec is malformed"),
    "no type": ({"path": "/dev/nvidia0", "major": 195, "minor": 0}, "malformed"),
    "another type": (device("/dev/nvidia0", "s", 195, 0), "malformed"),
    "no numbers": ({"path": "/dev/nvidia0", "type": "c"}, "malformed"),
    "a number in words": (device("/dev/nvidia0", "c", "195", 0), "malformed"),  # type: ignore[arg-type]
    "numbers without end": (device("/dev/nvidia0", "c", 195, 1 << 70), "malformed"),
    "numbers below zero": (device("/dev/nvidia0", "c", -1, -1), "malformed"),
    "a mode in words": (device("/dev/nvidia0", "c", 195, 0, fileMode="0666"), "malformed"),
    "an owner below zero": (device("/dev/nvidia0", "c", 195, 0, uid=-1), "malformed"),
    "no object": ([], "malformed"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize(("entry", "message"), BAD.values(), ids=BAD.keys())
def test_entries_that_are_no_device(container: Container, entry: dict[str, Any], message: str) -> None:
    container.run("mknod dev/nvidia1 c 195 1")
    assert message in container.refuse(entry)
    assert message in container.refuse(device("/dev/nvidia7", "c", 195, 7), entry)


def test_ptmx_is_runcs_own(container: Container) -> None:
    container.run("ln -s pts/ptmx dev/ptmx")
    assert container.put_right(device("/dev/ptmx", "c", 5, 2), device("/dev//nvidia0/", "c", 195, 0)) != []
    assert container.listing() == {"ptmx": "lrwxrwxrwx", "nvidia0": "c 195:0 666 0:0"}


def test_names_that_are_no_text(container: Container) -> None:
    container.run(r"""mknod "$(printf 'dev/a\033[2J\377')" b 8 0""")
    assert container.put_right() == [r"/dev/a\x1b[2J\udcff is removed, it was b 8:0 with mode 0644 of 0:0"]


def test_a_tree_without_end(container: Container) -> None:
    container.run("mkdir -p dev/" + "d/" * 40)
    with pytest.raises(RestoreError, match="is deeper than 32"):
        container.put_right()


def test_the_root_file_system_as_dev(container: Container) -> None:
    """A spec without a mount at /dev: runc makes the devices in the image's own."""
    container.run("umount dev; mknod dev/sda b 8 0")
    assert len(container.put_right(device("/dev/nvidia0", "c", 195, 0))) == 2
    assert container.listing() == {"nvidia0": "c 195:0 666 0:0"}
