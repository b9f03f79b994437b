"""Images of a real capture, altered: whatever asks for more than the live spec gives is refused before CRIU sees it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm.criu import images, vet
from rewarm.criu.images import Message
from rewarm.errors import Unfit
from rewarm.oci import spec as oci_spec
from rewarm.store.materialise import materialise
from support import counter, criu_images, faults
from support.node import Node
from support.outcomes import falls_back

MAGIC = 8
ALL = 0xFFFFFFFF
# Field numbers of CRIU's images/*.proto.
TASK, THREAD = 3, 5
STATE = 1
CREDENTIALS, SECCOMP_MODE = 10, 11
INHERITABLE, PERMITTED, EFFECTIVE, BOUNDING, GROUPS, LSM, NO_NEW_PRIVILEGES, AMBIENT = 9, 10, 11, 12, 14, 15, 18, 19
MOUNT_KIND, MOUNT_POINT, EXTERNAL, EXTERNAL_KEY = 1, 7, 13, 18


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Iterator[Node]:
    """Holds a snapshot of a container with every limit that a spec can set for it."""
    with Node(tmp_path_factory.mktemp("captured"), prefix) as made:
        bundle = faults.bundle(made.directory / "source")
        bundle.spec["process"]["noNewPrivileges"] = True
        bundle.write()
        counter.run(made.runtime, "source", bundle)
        made.rewarm("capture", "source", "--name", "counter", "--stop")
        yield made


@pytest.fixture
def live(node: Node) -> dict[str, Any]:
    """The spec that the container was created with, prepared by rewarm."""
    return oci_spec.load(str(node.directory / "source"))


@pytest.fixture
def checkpoint(node: Node, tmp_path: Path) -> Path:
    store, _, manifest = faults.only(node.store)
    materialise(store, manifest, tmp_path)
    return tmp_path / "checkpoint"


def check(checkpoint: Path, live: dict[str, Any]) -> None:
    vet.vet(checkpoint, live, {destination for destination, _ in oci_spec.mounts(live)})


def encoded(message: Message) -> bytes:
    return b"".join(criu_images.field(number, value) for number, values in message.items() for value in values)


def alter(path: Path, change: Callable[[list[Message]], object]) -> None:
    """Rewrite an image file; `change` gets its records, and puts others into that list if it likes."""
    found = list(images.records(path))
    change(found)
    magic = path.read_bytes()[:MAGIC]
    path.write_bytes(magic + criu_images.image(*map(encoded, found))[MAGIC:])


def inside(message: Message, field: int, change: Callable[[Message], object]) -> None:
    """Change the messages in one field of another."""
    found = list(images.messages(message, field))
    for one in found:
        change(one)
    message[field] = [encoded(one) for one in found]


def credentials(core: Message, change: Callable[[Message], object]) -> None:
    inside(core, THREAD, lambda thread: inside(thread, CREDENTIALS, change))


def set_field(field: int, *values: int | bytes) -> Callable[[Message], object]:
    return lambda message: message.update({field: list(values)})


def test_real_images_are_good(checkpoint: Path, live: dict[str, Any]) -> None:
    check(checkpoint, live)


def test_rewriting_changes_nothing(checkpoint: Path, live: dict[str, Any]) -> None:
    """So that what follows is refused for what it changes."""
    for pattern in ("core-*.img", "mountpoints-*.img", "cgroup.img"):
        for path in checkpoint.glob(pattern):
            alter(path, lambda found: None)
    alter(checkpoint / "core-1.img", lambda found: credentials(found[0], lambda one: None))
    alter(checkpoint / "cgroup.img", lambda found: inside(found[0], 2, lambda one: inside(one, 2, lambda two: None)))
    check(checkpoint, live)


@pytest.mark.parametrize("field", [INHERITABLE, PERMITTED, EFFECTIVE, BOUNDING, AMBIENT])
@pytest.mark.parametrize(
    ("words", "named"), [((1 << 21, 0), "CAP_SYS_ADMIN"), ((0, 1 << 7), "CAP_BPF"), ((0, ALL), "")]
)
def test_capability(checkpoint: Path, live: dict[str, Any], field: int, words: tuple[int, int], named: str) -> None:
    alter(checkpoint / "core-1.img", lambda found: credentials(found[0], set_field(field, *words)))
    with pytest.raises(Unfit, match=f"core-1.img: a process has capability {named}"):
        check(checkpoint, live)


def test_capability_that_the_live_container_has_not(checkpoint: Path, live: dict[str, Any]) -> None:
    live["process"]["capabilities"]["bounding"].remove("CAP_KILL")
    with pytest.raises(Unfit, match="CAP_KILL"):
        check(checkpoint, live)


@pytest.mark.parametrize(
    "change",
    [
        lambda core: core.pop(THREAD),
        lambda core: inside(core, THREAD, set_field(CREDENTIALS)),
        # As of a process that has ended, but it runs: CRIU would leave it the credentials that it has itself.
        lambda core: core.update({THREAD: [], TASK: [encoded({STATE: [3]})]}),
        lambda core: (core.pop(THREAD), core.pop(TASK)),
        lambda core: (core.pop(THREAD), core[TASK].insert(0, encoded({STATE: [2]}))),
    ],
    ids=["no thread", "no credentials", "stopped", "no task", "merged"],
)
def test_process_without_credentials(
    checkpoint: Path, live: dict[str, Any], change: Callable[[Message], object]
) -> None:
    alter(checkpoint / "core-1.img", lambda found: change(found[0]))
    with pytest.raises(Unfit, match=r"core-1\.img: it has no credentials in it"):
        check(checkpoint, live)


def test_process_that_has_ended_needs_none(checkpoint: Path, live: dict[str, Any]) -> None:
    """A zombie; that the only process is one is for CRIU to say."""

    def change(core: Message) -> None:
        core.pop(THREAD)
        inside(core, TASK, set_field(STATE, 2))

    shutil.copyfile(checkpoint / "core-1.img", checkpoint / "core-7.img")
    alter(checkpoint / "core-7.img", lambda found: change(found[0]))
    check(checkpoint, live)


def test_second_thread_in_the_core(checkpoint: Path, live: dict[str, Any]) -> None:
    """Protobuf merges a message that is there twice: the second one decides."""

    def change(core: Message) -> None:
        (thread,) = images.messages(core, THREAD)
        credentials(core, lambda one: None)
        second: Message = {CREDENTIALS: [encoded({EFFECTIVE: [ALL, ALL]})], SECCOMP_MODE: thread[SECCOMP_MODE]}
        core[THREAD].append(encoded(second))

    alter(checkpoint / "core-1.img", lambda found: change(found[0]))
    with pytest.raises(Unfit, match="capability"):
        check(checkpoint, live)


@pytest.mark.parametrize("values", [[0], [1], []], ids=["disabled", "strict", "absent"])
def test_no_seccomp_filter(checkpoint: Path, live: dict[str, Any], values: list[int]) -> None:
    alter(checkpoint / "core-1.img", lambda found: inside(found[0], THREAD, set_field(SECCOMP_MODE, *values)))
    with pytest.raises(Unfit, match="no seccomp filter"):
        check(checkpoint, live)


def test_may_gain_privileges(checkpoint: Path, live: dict[str, Any]) -> None:
    alter(checkpoint / "core-1.img", lambda found: credentials(found[0], set_field(NO_NEW_PRIVILEGES, 0)))
    with pytest.raises(Unfit, match="may gain privileges"):
        check(checkpoint, live)


@pytest.mark.parametrize("field", range(1, 9))
def test_user_and_group(checkpoint: Path, live: dict[str, Any], field: int) -> None:
    """A container of another user that may not gain privileges never becomes root by itself."""
    live["process"]["user"] = {"uid": 1000, "gid": 1000}

    def change(creds: Message) -> None:
        for one in range(1, 9):
            creds[one] = [1000]
        for one in (INHERITABLE, PERMITTED, EFFECTIVE, AMBIENT):
            creds[one] = [0, 0]
        creds[GROUPS] = []

    alter(checkpoint / "core-1.img", lambda found: credentials(found[0], change))
    check(checkpoint, live)
    alter(checkpoint / "core-1.img", lambda found: credentials(found[0], set_field(field, 0)))
    with pytest.raises(Unfit, match=r"this container (as )?1000"):
        check(checkpoint, live)


def test_lsm_label(checkpoint: Path, live: dict[str, Any]) -> None:
    alter(checkpoint / "core-1.img", lambda found: credentials(found[0], set_field(LSM, b"free-for-all")))
    with pytest.raises(Unfit, match="LSM label 'free-for-all'"):
        check(checkpoint, live)


def mount(**fields: object) -> Callable[[list[Message]], object]:
    """Adds a mount like /proc's."""

    def change(found: list[Message]) -> None:
        made = copy.deepcopy(next(one for one in found if images.text(one, MOUNT_POINT).rstrip("/").endswith("proc")))
        made.update({int(name.removeprefix("f")): [value] for name, value in fields.items()})  # type: ignore[list-item]
        found.append(made)

    return change


@pytest.mark.parametrize(
    "where", ["./host", "./models/../etc", "./run/rewarm2", "./proc2", "/", "./dev/../sysroot", "../x"]
)
def test_mount_elsewhere(checkpoint: Path, live: dict[str, Any], where: str) -> None:
    (path,) = checkpoint.glob("mountpoints-*.img")
    alter(path, mount(f7=where.encode(), f1=3))
    with pytest.raises(Unfit, match=r"this container has none|file system of kind|want 2 of them"):
        check(checkpoint, live)


@pytest.mark.parametrize("kind", [3, 4, 7, 8, 9, 10, 11, 13, 15, 16, 17, 18, 20, 21, 22, 99])
def test_mount_of_a_file_system_of_the_nodes(checkpoint: Path, live: dict[str, Any], kind: int) -> None:
    """devtmpfs, debugfs, fuse and the like at a place that the container does have."""
    (path,) = checkpoint.glob("mountpoints-*.img")
    alter(path, mount(f7=b"./sys/x", f1=kind))
    with pytest.raises(Unfit, match=f"file system of kind {kind}"):
        check(checkpoint, live)


def cgroup(change: Callable[[Message], object]) -> Callable[[list[Message]], object]:
    return lambda found: change(found[0])


@pytest.mark.parametrize("place", [b"/", b"/system.slice", b"/rewarm", b"/rewarm-test/../../x", b""])
def test_cgroup_outside(checkpoint: Path, live: dict[str, Any], place: bytes) -> None:
    """A second set of cgroups, for a process that would so leave the container's limits."""

    def change(entry: Message) -> None:
        (first,) = images.messages(entry, 1)
        second = copy.deepcopy(first)
        inside(second, 2, set_field(2, place))
        entry[1].append(encoded(second))

    alter(checkpoint / "cgroup.img", cgroup(change))
    with pytest.raises(Unfit, match="outside of the container's"):
        check(checkpoint, live)


def test_cgroup_below_is_good(checkpoint: Path, live: dict[str, Any]) -> None:
    def change(entry: Message) -> None:
        (first,) = images.messages(entry, 1)
        second = copy.deepcopy(first)
        inside(second, 2, lambda one: one.update({2: [images.text(one, 2).encode() + b"/nested"]}))
        entry[1].append(encoded(second))

    alter(checkpoint / "cgroup.img", cgroup(change))
    check(checkpoint, live)


@pytest.mark.parametrize("name", [b"system.slice", b"../x", b"", b"rewarm-test-x/../.."])
def test_cgroup_directory_outside(checkpoint: Path, live: dict[str, Any], name: bytes) -> None:
    alter(
        checkpoint / "cgroup.img",
        cgroup(lambda entry: inside(entry, 2, lambda one: inside(one, 2, set_field(1, name)))),
    )
    with pytest.raises(Unfit, match="outside of the container's"):
        check(checkpoint, live)


def test_cgroup_child_that_climbs(checkpoint: Path, live: dict[str, Any]) -> None:
    child = encoded({1: [b"../../system.slice"]})
    alter(
        checkpoint / "cgroup.img",
        cgroup(lambda entry: inside(entry, 2, lambda one: inside(one, 2, set_field(2, child)))),
    )
    with pytest.raises(Unfit, match="outside of the container's"):
        check(checkpoint, live)


NAMESPACES = {"pid": 5, "network": 6, "ipc": 7, "uts": 8, "mount": 9}
INVENTORY_MAGIC, ROOT_IDS, NS_PER_ID = 4, 3, 4


def inventory(checkpoint: Path, change: Callable[[Message], object] = lambda one: None) -> Message:
    """The one record, changed."""
    path = checkpoint / "inventory.img"
    (found,) = images.records(path, magic=INVENTORY_MAGIC)
    change(found)
    image = criu_images.image(encoded(found))
    path.write_bytes(path.read_bytes()[:INVENTORY_MAGIC] + image[MAGIC:])
    return found


def outside(checkpoint: Path) -> Message:
    (found,) = images.messages(inventory(checkpoint), ROOT_IDS)
    return found


def put(checkpoint: Path, field: int, values: list[int], process: int = 1) -> None:
    alter(checkpoint / f"ids-{process}.img", lambda found: found[0].update({field: list(values)}))


@pytest.mark.parametrize("kind", NAMESPACES)
def test_a_namespace_of_the_nodes(checkpoint: Path, live: dict[str, Any], kind: str) -> None:
    put(checkpoint, NAMESPACES[kind], [images.number(outside(checkpoint), NAMESPACES[kind])])
    with pytest.raises(Unfit, match=rf"ids-1\.img.*: its images want the node's {kind} namespace"):
        check(checkpoint, live)


@pytest.mark.parametrize("kind", NAMESPACES)
@pytest.mark.parametrize("values", [[], [0]])
def test_a_namespace_that_is_not_told(checkpoint: Path, live: dict[str, Any], kind: str, values: list[int]) -> None:
    put(checkpoint, NAMESPACES[kind], values)
    with pytest.raises(Unfit, match=f"the node's {kind} namespace"):
        check(checkpoint, live)


@pytest.mark.parametrize("kind", NAMESPACES)
def test_a_number_of_which_criu_takes_the_low_half(checkpoint: Path, live: dict[str, Any], kind: str) -> None:
    put(checkpoint, NAMESPACES[kind], [images.number(outside(checkpoint), NAMESPACES[kind]) + (1 << 32)])
    with pytest.raises(images.ImageError, match="more than 32 bits"):
        check(checkpoint, live)


@pytest.mark.parametrize("kind", NAMESPACES)
def test_a_second_process_in_a_namespace_of_the_nodes(checkpoint: Path, live: dict[str, Any], kind: str) -> None:
    shutil.copy(checkpoint / "ids-1.img", checkpoint / "ids-7.img")
    put(checkpoint, NAMESPACES[kind], [images.number(outside(checkpoint), NAMESPACES[kind])], process=7)
    with pytest.raises(Unfit, match=rf"ids-7\.img.*the node's {kind} namespace"):
        check(checkpoint, live)


@pytest.mark.parametrize("kind", NAMESPACES)
def test_a_namespace_that_the_live_container_has_not(checkpoint: Path, live: dict[str, Any], kind: str) -> None:
    live["linux"]["namespaces"] = [one for one in live["linux"]["namespaces"] if one["type"] != kind]
    with pytest.raises(Unfit, match=f"its images want a {kind} namespace, this container has the node's"):
        check(checkpoint, live)


def user_namespace(checkpoint: Path, inside: int, outside_: int) -> None:
    """Of the init, with one user and one group mapped."""
    put(checkpoint, 10, [4711])
    extent = criu_images.field(1, inside) + criu_images.field(2, outside_) + criu_images.field(3, 1)
    maps = criu_images.field(1, extent) + criu_images.field(2, extent)
    (checkpoint / "userns-4711.img").write_bytes(criu_images.image(maps))


def test_a_user_namespace_that_the_live_container_has_not(checkpoint: Path, live: dict[str, Any]) -> None:
    """By which its user would be root of the node."""
    user_namespace(checkpoint, 1000, 0)
    with pytest.raises(Unfit, match="its images want a user namespace, this container has the node's"):
        check(checkpoint, live)


def test_the_maps_of_a_user_namespace_are_the_live_ones(checkpoint: Path, live: dict[str, Any]) -> None:
    live["linux"]["namespaces"].append({"type": "user"})
    for name in ("uidMappings", "gidMappings"):
        live["linux"][name] = [{"containerID": 1000, "hostID": 101000, "size": 1}]
    with pytest.raises(Unfit, match="the node's user namespace"):
        check(checkpoint, live)
    user_namespace(checkpoint, 1000, 101000)
    check(checkpoint, live)
    for wrong in ((1000, 0), (0, 101000), (1000, 1000)):
        user_namespace(checkpoint, *wrong)
        with pytest.raises(Unfit, match=r"userns-4711\.img.*its images have other uidMappings"):
            check(checkpoint, live)
    live["linux"]["uidMappings"][0]["hostID"] = 1000
    with pytest.raises(Unfit, match=r"userns-4711\.img.*its images have other gidMappings"):
        check(checkpoint, live)


@pytest.mark.parametrize("values", [[], [0], [2], [1, 0]])
def test_namespaces_by_the_number_of_a_process(checkpoint: Path, live: dict[str, Any], values: list[int]) -> None:
    """CRIU would take them from other images than those that are looked at."""
    inventory(checkpoint, lambda one: one.update({NS_PER_ID: list(values)}))
    with pytest.raises(Unfit, match=r"inventory\.img"):
        check(checkpoint, live)


@pytest.mark.parametrize("times", [0, 2])
def test_an_inventory_with_other_than_one_set_of_the_nodes_ids(
    checkpoint: Path, live: dict[str, Any], times: int
) -> None:
    """CRIU would merge them."""
    inventory(checkpoint, lambda one: one.update({ROOT_IDS: one[ROOT_IDS] * times}))
    with pytest.raises(Unfit, match=r"inventory\.img"):
        check(checkpoint, live)


def test_an_init_without_ids(checkpoint: Path, live: dict[str, Any]) -> None:
    (checkpoint / "ids-1.img").unlink()
    with pytest.raises(Unfit, match=r"ids-1\.img"):
        check(checkpoint, live)


def test_no_process_at_all(checkpoint: Path, live: dict[str, Any]) -> None:
    for path in checkpoint.glob("core-*.img"):
        path.unlink()
    with pytest.raises(Unfit, match="no core image"):
        check(checkpoint, live)


def test_hostile_snapshot_starts_cold(node: Node, tmp_path: Path, prefix: Path) -> None:
    """The whole way: a snapshot whose every digest is right, and that wants to be more than its container."""

    def change(directory: Path) -> None:
        core = directory / "checkpoint" / "core-1.img"
        alter(core, lambda found: credentials(found[0], set_field(EFFECTIVE, ALL, ALL)))

    with Node(tmp_path / "node", prefix, store=faults.copied(node.store, tmp_path / "store")) as other:
        faults.altered(other.store, tmp_path / "altered", change)
        made = faults.bundle(other.directory / "copy")
        made.spec["process"]["noNewPrivileges"] = True
        falls_back(other, "restore snapshot core-1.img: a process has capability CAP_", made=made)


@pytest.mark.parametrize("kind", ["network", "ipc", "mount"])
def test_a_snapshot_that_wants_to_be_in_the_nodes_namespaces_starts_cold(
    node: Node, tmp_path: Path, prefix: Path, kind: str
) -> None:
    """CRIU would put it there."""

    def change(directory: Path) -> None:
        checkpoint = directory / "checkpoint"
        put(checkpoint, NAMESPACES[kind], [images.number(outside(checkpoint), NAMESPACES[kind])])

    with Node(tmp_path / "node", prefix, store=faults.copied(node.store, tmp_path / "store")) as other:
        faults.altered(other.store, tmp_path / "altered", change)
        made = faults.bundle(other.directory / "copy")
        made.spec["process"]["noNewPrivileges"] = True
        falls_back(other, f"ids-1.img: its images want the node's {kind} namespace", made=made)
