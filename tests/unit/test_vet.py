"""Images that ask for more than the live spec gives are refused before CRIU sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rewarm.criu import vet
from rewarm.criu.images import ImageError
from rewarm.errors import Unfit
from support.criu_images import field, image

PROC, TMPFS, OVERLAY, UNSUPPORTED, AUTO = 1, 5, 17, 0, 16
KILL, SYS_ADMIN, SETUID = 5, 21, 7


def spec(**process: Any) -> dict[str, Any]:
    namespaces = [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]
    return {
        "linux": {"namespaces": namespaces},
        "process": {"user": {"uid": 0}, "capabilities": {"bounding": ["CAP_KILL", "CAP_SETUID"]}, **process},
    }


def mount(where: str, kind: int, *, external: bool = False, key: bytes = b"") -> bytes:
    made = field(1, kind) + field(7, where.encode())
    return made + (field(13, 1) if external else b"") + (field(18, key) if key else b"")


def creds(
    uid: int = 0,
    caps: int = 1 << KILL,
    no_new_privs: int = 0,
    lsm: bytes = b"",
    gid: int = 0,
    groups: tuple[int, ...] = (),
) -> bytes:
    made = b"".join(field(number, uid) for number in (1, 3, 5, 7))
    made += b"".join(field(number, gid) for number in (2, 4, 6, 8)) + b"".join(field(14, group) for group in groups)
    made += b"".join(field(number, caps & 0xFFFFFFFF) + field(number, caps >> 32) for number in (9, 10, 11, 12, 19))
    return made + field(18, no_new_privs) + (field(15, lsm) if lsm else b"")


def core(made: bytes | None = None, seccomp: int = 0) -> bytes:
    thread = (field(10, creds() if made is None else made)) + field(11, seccomp)
    return image(field(1, 1) + field(5, thread))


def init(directory: Path) -> None:
    """One process, in namespaces of its own."""
    (directory / "pstree.img").write_bytes(image(field(1, 1) + field(5, 1)))
    (directory / "ids-1.img").write_bytes(image(b"".join(field(number, 2) for number in range(5, 10))))
    outside = b"".join(field(number, 1) for number in range(5, 10))
    (directory / "inventory.img").write_bytes(image(field(1, 2) + field(3, outside) + field(4, 1))[4:])


def check(directory: Path, live: dict[str, Any], *, cores: bytes | None = None, mounts: tuple[bytes, ...] = ()) -> None:
    (directory / "core-1.img").write_bytes(core() if cores is None else cores)
    init(directory)
    (directory / "mountpoints-12.img").write_bytes(image(mount("./", OVERLAY), *mounts))
    vet.vet(directory, live, {"/models", "/proc", "/dev/shm"})


@pytest.mark.parametrize(("kind", "number"), [("network", 6), ("ipc", 7), ("uts", 8)])
def test_a_namespace_of_the_nodes_that_is_joined_by_its_path(tmp_path: Path, kind: str, number: int) -> None:
    """As containerd has it in a pod with hostNetwork: the container's is the node's, and its images say so."""
    name = {"network": "net"}.get(kind, kind)
    live = spec()
    (joined,) = [one for one in live["linux"]["namespaces"] if one["type"] == kind]
    joined["path"] = f"/proc/self/ns/{name}"
    own = b"".join(field(one, 1 if one == number else 2) for one in range(5, 10))
    with pytest.raises(Unfit, match=f"want a {kind} namespace"):
        check(tmp_path, live)
    (tmp_path / "ids-1.img").write_bytes(image(own))
    vet.vet(tmp_path, live, set())
    joined["path"] = "/proc/self/ns/none"
    with pytest.raises(Unfit, match=f"want the node's {kind} namespace"):
        vet.vet(tmp_path, live, set())


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (field(1, 4) + field(4, field(3, 2) + field(4, 3)), "a raw socket.*CAP_NET_RAW"),
        (field(1, 4) + field(4, field(3, 10) + field(4, 3)), "a raw socket.*CAP_NET_RAW"),
        (field(1, 4) + field(4, field(3, 17) + field(4, 2)), "family 17"),
        (field(1, 10), "a packet socket.*CAP_NET_RAW"),
        (field(1, 15), "a network tunnel.*CAP_NET_ADMIN"),
        (field(1, 19), "a BPF map.*CAP_BPF"),
    ],
)
def test_files_that_take_a_capability(tmp_path: Path, record: bytes, text: str) -> None:
    (tmp_path / "files.img").write_bytes(image(field(1, 4) + field(4, field(3, 2) + field(4, 1)), record))
    with pytest.raises(Unfit, match=text):
        check(tmp_path, spec())
    if "CAP" in text:
        held = ["CAP_KILL", "CAP_SETUID", "CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_BPF"]
        check(tmp_path, spec(capabilities={"bounding": held}))


def test_an_init_of_its_own_where_the_pid_namespace_is_shared(tmp_path: Path) -> None:
    """CRIU would make it a namespace beside the pod's. With another number it takes the one that runc hands it."""
    live = spec()
    (shared,) = [one for one in live["linux"]["namespaces"] if one["type"] == "pid"]
    shared["path"] = "/proc/1/ns/other"
    with pytest.raises(Unfit, match="it has a pid namespace of its own, this container shares one"):
        check(tmp_path, live)
    (tmp_path / "pstree.img").write_bytes(image(field(1, 7) + field(5, 7)))
    for name in ("ids", "core"):
        (tmp_path / f"{name}-1.img").rename(tmp_path / f"{name}-7.img")
    vet.vet(tmp_path, live, set())


def test_an_honest_snapshot_passes(tmp_path: Path) -> None:
    mounts = (mount("./proc", PROC), mount("./models", UNSUPPORTED, key=b"/models"), mount("./dev/shm", TMPFS))
    check(tmp_path, spec(), mounts=(*mounts, mount("./proc/kcore", TMPFS), mount("./dev/pts", 6)))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (mount("./host", PROC), "/host"),
        (mount("./host", UNSUPPORTED, external=True), "/host"),
        (mount("./models", AUTO), "kind 16"),
        (mount("./models", OVERLAY), "kind 17"),
        (mount("./models", UNSUPPORTED), "kind 0"),
        (mount("./proc/../etc", TMPFS), "/etc"),
        (mount("./dev/../../etc", TMPFS), "/etc"),
        (mount("./proc/x", 3), "kind 3"),
        (mount("/procx", PROC), "/procx"),
    ],
)
def test_mounts_that_the_container_has_not(tmp_path: Path, made: bytes, said: str) -> None:
    with pytest.raises(Unfit, match=said):
        check(tmp_path, spec(), mounts=(made,))


def test_a_capability_beyond_the_bounding_set(tmp_path: Path) -> None:
    with pytest.raises(Unfit, match="CAP_SYS_ADMIN"):
        check(tmp_path, spec(), cores=core(creds(caps=1 << SYS_ADMIN)))
    with pytest.raises(Unfit, match="CAP_CHECKPOINT_RESTORE"):
        check(tmp_path, spec(), cores=core(creds(caps=1 << 40)))


def test_a_capability_that_this_rewarm_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(Unfit):
        check(tmp_path, spec(), cores=core(creds(caps=1 << 60)))


def test_the_user_of_a_container_that_cannot_change_it(tmp_path: Path) -> None:
    live = spec(user={"uid": 1000}, capabilities={"bounding": ["CAP_KILL"]})
    check(tmp_path, live, cores=core(creds(uid=1000)))
    with pytest.raises(Unfit, match="runs as user 0"):
        check(tmp_path, live, cores=core(creds(uid=0)))
    check(tmp_path, spec(user={"uid": 1000}), cores=core(creds(uid=33)))


def test_the_groups_of_a_container_that_cannot_change_them(tmp_path: Path) -> None:
    live = spec(user={"uid": 0, "gid": 7, "additionalGids": [8, 9]})
    check(tmp_path, live, cores=core(creds(gid=7, groups=(7, 9))))
    for made in (creds(gid=0, groups=()), creds(gid=7, groups=(42,)), creds(gid=8)):
        with pytest.raises(Unfit, match="has group"):
            check(tmp_path, live, cores=core(made))
    setgid = {"bounding": ["CAP_KILL", "CAP_SETGID"]}
    check(tmp_path, spec(user={"uid": 0, "gid": 7}, capabilities=setgid), cores=core(creds(gid=0)))


def test_who_may_own_what_a_container_makes(tmp_path: Path) -> None:
    """As System V objects, and files in a /dev/shm that is not the container's own."""
    user = {"uid": 5, "gid": 6, "additionalGids": [7]}
    plain = vet.Limits(spec(user=user, capabilities={}))
    assert [plain.may_own(*one) for one in ((5, 6), (5, 7), (5, 8), (0, 6))] == [True, True, False, False]
    root = vet.Limits(spec(capabilities={"bounding": ["CAP_SETUID"]}))
    assert [root.may_own(*one) for one in ((0, 0), (9, 0), (9, 9))] == [True, True, False]
    init(tmp_path)
    description = b"".join(field(number, value) for number, value in {1: 1, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0, 7: 0}.items())
    (tmp_path / "ipcns-sem-2.img").write_bytes(image(field(1, description) + field(2, 0)))
    check(tmp_path, spec())
    with pytest.raises(Unfit, match="System V object sem 0: it is user 0's"):
        check(tmp_path, spec(user=user, capabilities={}), cores=core(creds(uid=5, gid=6, caps=0)))


def test_another_user_without_new_privileges_has_its_ambient_capabilities_alone(tmp_path: Path) -> None:
    """Its bounding set says nothing: it can never get what is in it."""
    bounding = ["CAP_KILL", "CAP_SETUID", "CAP_SETGID"]
    live = spec(user={"uid": 5, "gid": 5}, capabilities={"bounding": bounding}, noNewPrivileges=True)
    quiet = b"".join(field(n, 5) for n in range(1, 9)) + field(12, 1 << KILL) + field(18, 1)
    check(tmp_path, live, cores=core(quiet))
    with pytest.raises(Unfit, match="CAP_KILL"):
        check(tmp_path, live, cores=core(quiet + field(11, 1 << KILL)))
    with pytest.raises(Unfit, match="runs as user 0"):
        check(tmp_path, live, cores=core(b"".join(field(n, 0) for n in range(1, 9)) + field(18, 1)))


def test_numbers_that_criu_would_cut_off_are_refused(tmp_path: Path) -> None:
    """protobuf-c keeps the low 32 bits: 1 << 32 is true here and false there."""
    with pytest.raises(ImageError, match="32 bits"):
        check(tmp_path, spec(noNewPrivileges=True), cores=core(creds(no_new_privs=1 << 32)))
    with pytest.raises(ImageError, match="32 bits"):
        check(tmp_path, spec(), cores=core(creds(uid=1 << 32)))


def test_mount_points_that_begin_with_a_dot(tmp_path: Path) -> None:
    (tmp_path / "core-1.img").write_bytes(core())
    init(tmp_path)
    (tmp_path / "mountpoints-12.img").write_bytes(image(mount("./.models", UNSUPPORTED, key=b"/.models")))
    vet.vet(tmp_path, spec(), {"/.models"})
    with pytest.raises(Unfit, match=r"/\.models"):
        vet.vet(tmp_path, spec(), {"/models"})


def test_no_new_privileges_stays(tmp_path: Path) -> None:
    live = spec(noNewPrivileges=True)
    check(tmp_path, live, cores=core(creds(no_new_privs=1)))
    with pytest.raises(Unfit, match="may gain privileges"):
        check(tmp_path, live)


def test_a_seccomp_filter_stays(tmp_path: Path) -> None:
    live = spec()
    live["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    check(tmp_path, live, cores=core(seccomp=2))
    with pytest.raises(Unfit, match="no seccomp filter"):
        check(tmp_path, live)


def test_the_lsm_label_is_the_live_one(tmp_path: Path) -> None:
    live = spec(apparmorProfile="docker-default")
    check(tmp_path, live, cores=core(creds(lsm=b"docker-default")))
    with pytest.raises(Unfit, match="unconfined"):
        check(tmp_path, live, cores=core(creds(lsm=b"unconfined")))
    check(tmp_path, spec(), cores=core(creds(lsm=b"unconfined")))


@pytest.mark.parametrize(
    "cores",
    [image(field(1, 1)), image(field(1, 1) + field(5, field(11, 0))), image()],
    ids=["thread", "creds", "record"],
)
def test_a_core_without_credentials_is_refused(tmp_path: Path, cores: bytes) -> None:
    """CRIU would take them from an image of another name, which nobody has looked at."""
    with pytest.raises(Unfit, match="credentials"):
        check(tmp_path, spec(), cores=cores)


def test_no_process_is_refused(tmp_path: Path) -> None:
    init(tmp_path)
    with pytest.raises(Unfit, match="no core image"):
        vet.vet(tmp_path, spec(), set())


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        check(tmp_path, spec(), cores=b"garbage!garbage")
