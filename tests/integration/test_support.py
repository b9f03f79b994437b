"""The helpers and workloads themselves, on plain runc and plain containerd: a test of rewarm can trust them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import image, proc, rootfs, samples
from support.bundle import Bundle, bind
from support.containerd import Containerd
from support.leftovers import Leftovers
from support.netns import NetworkNamespace, join
from support.runtime import Runtime

pytestmark = pytest.mark.alone

DENY_IO_URING = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["io_uring_setup"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}],
}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test no mount, network namespace, cgroup or process of it remains."""
    proc.become_subreaper()
    before = Leftovers.now()
    yield
    before.check()


@pytest.fixture
def network() -> Iterator[NetworkNamespace]:
    with NetworkNamespace() as made:
        yield made


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with Runtime(tmp_path / "runtime") as made:
        yield made


def start(runtime: Runtime, bundle: Bundle, network: NetworkNamespace) -> None:
    """Runs a workload until it serves; its own words are in the error if it does not."""
    container = runtime.create(bundle.name, bundle)
    runtime.start(bundle.name)
    container.stdout.wait_text("ready", timeout=60)
    network.wait_http(8000, "/health")


def workload(runtime: Runtime, name: str, kind: str, network: NetworkNamespace, **env: str) -> Bundle:
    return runtime.bundle(
        name, rootfs.layers(kind), rootfs.args(kind), env=rootfs.env(kind, **env), network=network.path
    )


def test_exit_code_and_output(runtime: Runtime) -> None:
    script = 'echo "$WORD"; echo problem >&2; exit 7'
    bundle = runtime.bundle("one", rootfs.layers(), ["sh", "-c", script], env={"WORD": "hello"})
    container = runtime.create("one", bundle)
    assert runtime.state("one")["status"] == "created"
    assert container.pid in proc.children(os.getpid())
    runtime.start("one")
    assert runtime.wait_stopped("one") == 7
    assert container.stdout.wait_end() == "hello\n"
    assert container.stderr.wait_end() == "problem\n"
    assert runtime.state("one")["status"] == "stopped"
    runtime.delete("one")
    assert not runtime.exists("one")


def test_signal_and_exec(runtime: Runtime) -> None:
    runtime.create("two", runtime.bundle("two", rootfs.layers(), ["sleep", "60"], hostname="two"))
    runtime.start("two")
    assert runtime.exec("two", "hostname") == "two\n"
    runtime.kill("two", "USR1")  # PID 1 has no handler for it: ignored
    assert runtime.state("two")["status"] == "running"
    assert runtime.stop("two") == 128 + 9


def test_cleanup_of_a_container_in_use(runtime: Runtime) -> None:
    """What `nothing_left` sees when a test fails half-way: the fixture's cleanup alone ends everything."""
    shell = "sleep 60 & sleep 60"
    runtime.create("busy", runtime.bundle("busy", rootfs.layers(), ["sh", "-c", shell]))
    runtime.start("busy")
    runtime.bundle("unused", rootfs.layers(), ["true"])
    runtime.create("created", runtime.bundle("created", rootfs.layers(), ["sleep", "60"]))


def test_error_of_the_runtime(runtime: Runtime) -> None:
    bundle = runtime.bundle("wrong", rootfs.layers(), ["/no/such/program"])
    with pytest.raises(proc.CommandFailed, match="no such file or directory"):
        runtime.create("wrong", bundle)
    assert "/no/such/program" in runtime.last_error()


def test_taken_id(runtime: Runtime) -> None:
    runtime.create("taken", runtime.bundle("taken", rootfs.layers(), ["sleep", "60"]))
    other = runtime.bundle("other", rootfs.layers(), ["sleep", "60"])
    assert runtime.create("taken", other, check=False).status == 1
    assert "already exists" in runtime.last_error()
    assert runtime.stop("taken") == 128 + 9


def test_bundle_writes_go_to_its_upper(runtime: Runtime, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    mount = bind(shared, "/dev/shm")
    script = "rm /etc/issue; echo x >/etc/hostname; echo s >/dev/shm/file"
    bundle = runtime.bundle("files", rootfs.layers(), ["sh", "-c", script], mounts=[mount])
    runtime.create("files", bundle)
    runtime.start("files")
    assert runtime.wait_stopped("files") == 0
    assert (bundle.upper / "etc/issue").is_char_device()
    assert (bundle.upper / "etc/hostname").read_text() == "x\n"
    assert (rootfs.base() / "etc/issue").is_file()
    assert (shared / "file").read_text() == "s\n"


def test_client_in_another_namespace(runtime: Runtime, network: NetworkNamespace) -> None:
    args = ["python3", "-m", "http.server", "8000"]
    runtime.create("web", runtime.bundle("web", rootfs.layers(), args, network=network.path))
    runtime.start("web")
    with NetworkNamespace() as client:
        join(network, client, "10.231.77.1/24", "10.231.77.2/24")
        assert b"etc/" in client.wait_http(8000, "/", host="10.231.77.1")
        with pytest.raises(OSError, match="refused"):
            client.connect(8000)


def test_redis(runtime: Runtime, network: NetworkNamespace) -> None:
    args = ["redis-server", "--protected-mode", "no", "--dir", "/var/lib/redis"]
    container = runtime.create("redis", runtime.bundle("redis", rootfs.layers(), args, network=network.path))
    runtime.start("redis")
    container.stdout.wait_text("Ready to accept connections")
    with network.connect(6379) as client:
        client.sendall(b"SET a 1\r\nGET a\r\n")
        answers = client.makefile("rb")
        assert [answers.readline() for _ in range(3)] == [b"+OK\r\n", b"$1\r\n", b"1\r\n"]


def test_memory(runtime: Runtime, network: NetworkNamespace) -> None:
    hashes = []
    for name, seed in (("first", "1"), ("second", "1"), ("third", "2")):
        bundle = workload(runtime, name, "memory", network, MIB="32", SEED=seed, TICK="1")
        start(runtime, bundle, network)
        answer = network.json(8000, "/hash")
        assert answer["size"] == 32 << 20
        hashes.append(answer["hash"])
        runtime.containers[name].stdout.wait_text("tick 3\n")
        runtime.kill(name, "TERM")
        assert runtime.wait_stopped(name) == 0
        runtime.delete(name)
    assert hashes[0] == hashes[1] != hashes[2]


def test_ready_file(runtime: Runtime, network: NetworkNamespace, tmp_path: Path) -> None:
    control = tmp_path / "control"
    control.mkdir()
    bundle = runtime.bundle(
        "told",
        rootfs.layers("memory"),
        rootfs.args("memory"),
        env=rootfs.env("memory", MIB="1"),
        network=network.path,
        mounts=[bind(control, "/run/rewarm")],
    )
    start(runtime, bundle, network)
    assert (control / "ready").exists()
    assert network.http(8000, "/exit/5")[0] == 200
    assert runtime.wait_stopped("told") == 5


def test_ocr_server(runtime: Runtime, network: NetworkNamespace) -> None:
    began = time.monotonic()
    start(runtime, workload(runtime, "ocr", "ocr_server", network), network)
    cold = time.monotonic() - began
    for name, texts in samples.TEXTS.items():
        page = samples.png(name)
        assert page == samples.png(name)
        answers = [network.json(8000, "/ocr", body=page) for _ in range(2)]
        assert answers[0] == answers[1]
        assert [line["text"] for line in answers[0]["lines"]] == texts
        assert answers[0]["count"] == len(texts)
    stats = network.json(8000, "/stats")
    assert stats["pid"] == 1
    assert stats["served"] == 2 * len(samples.TEXTS)
    # A cold start is the work of loading and warming up, not waiting.
    assert stats["import_s"] + stats["warm_up_s"] > cold / 2
    assert network.http(8000, "/ocr", body=b"not an image")[0] == 500


@pytest.mark.parametrize("denied", [False, True])
def test_multi(runtime: Runtime, network: NetworkNamespace, denied: bool) -> None:
    bundle = runtime.bundle(
        "multi",
        rootfs.layers("multi"),
        rootfs.args("multi"),
        env=rootfs.env("multi"),
        network=network.path,
        seccomp=DENY_IO_URING if denied else None,
    )
    start(runtime, bundle, network)
    with network.connect(8001) as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"hello\n"
        checks = network.json(8000, "/check")
        assert len(checks) >= 18
        assert [name for name, good in checks.items() if not good] == []
        state = network.json(8000, "/state")
        assert state["loop"]["clients_opened"] - state["loop"]["clients_closed"] == 1
    # uvloop makes a ring where it may, so denying it is what makes the tree capturable.
    assert state["io_uring_errno"] == state["loop"]["io_uring_errno"] == (errno.EPERM if denied else 0)
    assert (state["loop"]["io_uring_rings"] == 0) is denied
    pid = runtime.containers["multi"].pid
    assert pid is not None
    assert len(proc.descendants(pid)) >= 2
    cpus = sorted(os.sched_getaffinity(0))
    assert state["affinity"]["first"] == cpus[:1]
    assert state["affinity"]["last"] == state["affinity"]["child"] == cpus[-1:]
    assert state["affinity"]["main"] == cpus
    assert state["policy"] == {"numa": [1, [0]], "first": [0, []], "mapping": [2, [0]]}


def test_multi_notices_losses(runtime: Runtime, network: NetworkNamespace) -> None:
    """A check that cannot fail proves nothing: damage from outside is seen."""
    start(runtime, workload(runtime, "damaged", "multi", network), network)
    state = network.json(8000, "/state")
    pid = runtime.containers["damaged"].pid
    assert pid is not None
    by_own_id = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        by_own_id[int(status["NSpid"].split()[-1])] = int(task.name)
    os.sched_setaffinity(by_own_id[state["threads"]["first"]], os.sched_getaffinity(0))
    damage = "echo 12 >/etc/debian_version; echo x >/etc/issue; printf X | dd conv=notrunc of=$(echo /dev/shm/psm_*)"
    runtime.exec("damaged", "sh", "-c", damage)
    bad = {name for name, good in network.json(8000, "/check").items() if not good}
    expected = {"changed file", "removed file", "shared memory", "shared memory in child", "shared memory is shared"}
    assert bad >= expected
    if len(os.sched_getaffinity(0)) > 1:
        assert "affinity" in bad


def test_containerd(tmp_path: Path) -> None:
    archive, reference = image.workload("multi")
    with Containerd(tmp_path / "node", namespace="k8s.io") as node:
        node.import_image(archive)
        task = node.run(reference, "c1", annotations={"rewarm.dev/test": "a b"}, env={"PORT": "9000"})
        node.network.wait_http(9000, "/health")
        assert all(node.network.json(9000, "/check").values())
        assert node.status(task) == "RUNNING"
        assert node.info(task)["Spec"]["annotations"] == {"rewarm.dev/test": "a b"}
        assert node.exec(task, "cat", "/etc/debian_version") == "rewarm\n"
        pid = node.pid(task)
        # Pipes of the shim, which alone CRIU can dump: a file of the host would have no mount in the container.
        assert os.readlink(f"/proc/{pid}/fd/1").startswith("pipe:")
        assert "/rootfs " in Path("/proc/self/mounts").read_text()
        assert task.stdout.read_text() == "ready\n"
        assert (node.runc_root / "k8s.io" / "c1").is_dir()
        assert node.network.http(9000, "/exit/9")[0] == 200
        node.wait_stopped(task)
        assert node.delete(task) == 9
        again = node.run(reference, "c1", ["sh", "-c", "exit 0"])
        node.wait_stopped(again)
        assert node.remove(again) == 0
        node.run(reference, "left-running")


def test_two_nodes(tmp_path: Path) -> None:
    """The same container id on two daemons at once."""
    archive, reference = image.workload("")
    with Containerd(tmp_path / "a" / "node") as first, Containerd(tmp_path / "b" / "node") as second:
        for node in (first, second):
            node.import_image(archive)
            task = node.run(reference, "same", ["sleep", "60"])
            assert node.status(task) == "RUNNING"
            assert len(node.shims()) == 1
        assert first.shims() != second.shims()
        with pytest.raises(proc.CommandFailed, match="no such file or directory"):
            first.run(reference, "wrong", ["/no/such/program"])


def test_image_is_made_once(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "file").write_text("content")
    archive = image.pack(tmp_path / "image.tar", "rewarm.test/x:1", [layer], args=["true"])
    made = archive.stat().st_mtime_ns
    assert image.pack(archive, "rewarm.test/x:1", [layer], args=["true"]).stat().st_mtime_ns == made
    assert image.pack(archive, "rewarm.test/x:1", [layer], args=["false"]).stat().st_mtime_ns > made


def test_prepare_does_nothing_the_second_time() -> None:
    script = Path(rootfs.__file__).with_name("prepare.sh")
    stamps = {item: item.stat().st_mtime_ns for item in rootfs.cache().glob(".*.stamp")}
    done = proc.command(script, rootfs.cache())
    assert done.stderr == ""
    assert stamps == {item: item.stat().st_mtime_ns for item in rootfs.cache().glob(".*.stamp")}
    assert len(stamps) >= 3


def test_layers_hold_weights() -> None:
    models = rootfs.layer("ocr") / "opt/ocr/rapidocr/models"
    assert sum(item.stat().st_size for item in models.glob("*.onnx")) > 20 << 20
