"""Containers that make it hard on purpose, or by sharing things with others."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest

from rewarm import processes
from rewarm.oci import runc
from rewarm.source import check_orphans
from support import counter, proc
from support.bundle import bind
from support.node import Node

LOOP = "\nimport time\nn = 0\nwhile True: n += 1; print(n, 'x', flush=True); time.sleep(0.05)\n"


def test_a_control_directory_nested_deeper_than_python_recurses(node: Node) -> None:
    program = (
        "import os\nos.chdir('/run/rewarm')\nfor n in range(1015): os.mkdir('d'); os.chdir('d')\nos.chdir('/')" + LOOP
    )
    args = ["python3", "-c", program]
    for _ in range(2):
        counter.run(node.runtime, "deep", counter.bundle(node.directory / f"deep-{_}", args=args))
        node.runtime.kill("deep", "KILL")
        node.runtime.wait_stopped("deep")
        node.runtime.delete("deep")
        assert not node.container_directory("deep").exists()


def test_a_process_that_was_execed_and_has_children(node: Node) -> None:
    """A shell of `kubectl exec`, or a probe, that runs something: they are left out, and go on."""
    counter.run(node.runtime, "source", counter.bundle(node.directory / "source"))
    pid_file = node.directory / "exec.pid"
    quiet = "sleep 1000 </dev/null >/dev/null 2>&1 & exec sleep 1001 </dev/null >/dev/null 2>&1"
    node.runtime.run("exec", "--detach", "--pid-file", pid_file, "source", "sh", "-c", quiet)
    execed = int(pid_file.read_text())
    children = Path(f"/proc/{execed}/task/{execed}/children")
    proc.wait_for("its child", lambda: children.read_text().split())
    node.rewarm("capture", "source", "--name", "counter")
    (child,) = map(int, children.read_text().split())
    for pid in (child, execed):
        os.kill(pid, signal.SIGKILL)
    proc.reap(execed, timeout=10)
    node.runtime.stop("source")


def test_a_program_that_forks_all_the_time(node: Node) -> None:
    """A child whose parent has just ended is its init's, and no other container's."""
    program = (
        "import os, time\n"
        "while True:\n"
        "    if (pid := os.fork()) == 0:\n"
        "        if os.fork() == 0: time.sleep(0.002)\n"
        "        os._exit(0)\n"
        "    while True:\n"
        "        try:\n"
        "            if os.waitpid(-1, os.WNOHANG)[0] == 0: break\n"
        "        except ChildProcessError: break\n"
    )
    made = counter.bundle(node.directory / "source", args=["python3", "-c", program])
    node.runtime.create("source", made)
    node.runtime.start("source")
    container = runc.load(str(node.runtime.root), "source")
    proc.wait_for("children", lambda: len(processes.tree(container.pid)) > 1)
    for _ in range(300):
        check_orphans(container)
    node.runtime.stop("source")


def test_captured_from_other_mounts_than_its_engines(node: Node) -> None:
    """Its control directory and its changes lie where the engine has mounted them."""
    source = counter.run(node.runtime, "source", counter.bundle(node.directory / "source"))
    words = ["unshare", "--mount", str(node.prefix / "bin/rewarm"), "capture", "source", "--name", "counter"]
    done = subprocess.run(words, env={**os.environ, **node.env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "has a mount namespace of its own; capture it from there: nsenter" in done.stderr
    before = counter.numbers(source)[-1]
    proc.wait_for("the source to count on", lambda: counter.numbers(source)[-1] > before)
    node.rewarm("capture", "source", "--name", "counter")


def test_a_stopped_process_that_was_execed_into_the_container(node: Node) -> None:
    """Control-Z in `kubectl exec`: it is no descendant of the container's init, and CRIU must not wait for it."""
    made = counter.run(node.runtime, "source", counter.bundle(node.directory / "source"))
    pid_file = node.directory / "exec.pid"
    # Its streams are this call's at first, and must not be waited for.
    quiet = "exec sleep 1000 </dev/null >/dev/null 2>&1"
    node.runtime.run("exec", "--detach", "--pid-file", pid_file, "source", "sh", "-c", quiet)
    execed = int(pid_file.read_text())
    os.kill(execed, signal.SIGSTOP)
    proc.wait_for("the stop", lambda: proc.state_of(execed) == "T")
    node.rewarm("capture", "source", "--name", "counter", timeout=60)
    proc.wait_for("the stop again", lambda: proc.state_of(execed) == "T")
    before = counter.numbers(made)[-1]
    proc.wait_for("the source to count on", lambda: counter.numbers(made)[-1] > before)
    # The end of its pid namespace waits until whoever adopted it, this process, has reaped it.
    os.kill(execed, signal.SIGKILL)
    proc.reap(execed)


def test_a_pid_namespace_below_the_containers_own(node: Node) -> None:
    """CRIU dumps none: that is said before anything is paused."""
    program = (
        "import ctypes, os, time\n"
        "assert ctypes.CDLL(None).unshare(0x20000000) == 0\n"
        "if os.fork() == 0:\n    while True: time.sleep(1)\n" + LOOP
    )
    made = counter.bundle(node.directory / "source", args=["python3", "-c", program])
    for names in made.spec["process"]["capabilities"].values():
        names.append("CAP_SYS_ADMIN")
    made.write()
    source = counter.run(node.runtime, "source", made)
    done = node.rewarm("capture", "source", "--name", "counter", check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "(python3) is in a pid namespace of its own, which CRIU cannot dump" in last, last
    assert not (node.state / "last-failed-dump.log").exists(), "CRIU was not asked"
    before = counter.numbers(source)[-1]
    proc.wait_for("the source to count on", lambda: counter.numbers(source)[-1] > before)


@pytest.mark.parametrize(
    ("there", "held", "opens", "outcome", "text"),
    [
        ("siblings", False, True, "warm", "source"),
        ("mine", False, False, "warm", "sibling"),
        ("mine", True, False, "warm", "sibling"),
        ("mine", False, True, "warm", "source"),
        ("mine", True, True, "cold", "sibling"),
    ],
    ids=["free", "taken", "taken and in use", "left behind", "in use"],
)
def test_a_shared_dev_shm(node: Node, there: str, held: bool, opens: bool, outcome: str, text: str) -> None:
    """The containers of a pod share it, and it outlives them: what a sibling uses stays as it is."""
    close = "" if opens else "; file.close()"
    program = f"file = open('/dev/shm/mine', 'w'); file.write('source'); file.flush(){close}"
    args = ["python3", "-c", program + LOOP]
    pods = {name: node.directory / f"shm-{name}" for name in ("a", "b")}
    for path in pods.values():
        path.mkdir(mode=0o1777)
    mounts = {name: [bind(path, "/dev/shm")] for name, path in pods.items()}
    counter.run(node.runtime, "source", counter.bundle(node.directory / "source", args=args, mounts=mounts["a"]))
    node.rewarm("capture", "source", "--name", "counter")
    sibling = pods["b"] / there
    sibling.write_text("sibling")
    with sibling.open("r+") if held else nullcontext():
        node.runtime.create("copy", counter.bundle(node.directory / "copy", args=args, mounts=mounts["b"]))
        found = node.outcome("copy")
        assert found["outcome"] == outcome, found
    if outcome == "cold":
        assert "mine: it is there already, and in use by others" in found["reason"]
    assert (pods["b"] / "mine").read_text() == text
    assert there == "mine" or sibling.read_text() == "sibling"


ANOTHER_ROOT = """
import ctypes, os, shutil
libc = ctypes.CDLL(None, use_errno=True)
def done(result): assert result == 0, os.strerror(ctypes.get_errno())
if own_users:
    done(libc.unshare(0x5c020000))  # user, network, IPC, UTS and mount namespace
    open('/proc/self/setgroups', 'w').write('deny')
    for kind in 'uid', 'gid': open(f'/proc/self/{kind}_map', 'w').write('0 0 1')
os.makedirs(top)
done(libc.mount(b'tmpfs', top.encode(), b'tmpfs', 0, None))
for name in 'up', 'work', 'root': os.mkdir(f'{top}/{name}')
layers = f'lowerdir=/etc,upperdir={top}/up,workdir={top}/work'
done(libc.mount(b'overlay', f'{top}/root'.encode(), b'overlay', 0, layers.encode()))
for file in '/usr/bin/sleep', '/lib/x86_64-linux-gnu/libc.so.6', '/lib64/ld-linux-x86-64.so.2':
    os.makedirs(os.path.dirname(f'{top}/root{file}'), exist_ok=True)
    shutil.copy(file, f'{top}/root{file}')
for name in 'proc', 'dev':
    os.mkdir(f'{top}/root/{name}')
    done(libc.mount(f'/{name}'.encode(), f'{top}/root/{name}'.encode(), None, 0x5000, None))
os.mkdir(f'{top}/root/old')
os.chdir(f'{top}/root')
done(libc.syscall(155, b'.', b'old'))
done(libc.umount2(b'/old', 2))
print('there', flush=True)
os.dup2(os.pipe()[0], 0)
os.execv('/usr/bin/sleep', ['sleep', '1000'])
"""


@pytest.mark.parametrize("own_users", [True, False], ids=["without a right that others have not", "CAP_SYS_ADMIN"])
def test_a_root_of_its_own_choice(node: Node, tmp_path: Path, own_users: bool) -> None:
    """The upper directory of that overlay is a path of the node's."""
    (tmp_path / "nodes/up").mkdir(parents=True)
    (tmp_path / "nodes/up/secret").write_text("the node's")
    args = ["python3", "-c", f"{own_users = }; top = {str(tmp_path / 'nodes')!r}" + ANOTHER_ROOT]
    made = counter.bundle(node.directory / "source", args=args)
    for names in made.spec["process"]["capabilities"].values():
        names += [] if own_users else ["CAP_SYS_ADMIN"]
    made.write()
    container = node.runtime.create("source", made)
    node.runtime.start("source")
    container.stdout.wait_text("there")
    done = node.rewarm("capture", "source", "--name", "counter", check=False)
    assert done.returncode == 1 and "its root is not the overlay that its engine has mounted" in done.stderr, done
    assert not node.store.exists()
    node.runtime.stop("source")


def test_a_user_namespace_of_its_own(node: Node) -> None:
    program = "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0" + LOOP
    source = counter.run(
        node.runtime, "source", counter.bundle(node.directory / "source", args=["python3", "-c", program])
    )
    done = node.rewarm("capture", "source", "--name", "counter", check=False)
    assert done.returncode == 1 and "in a user namespace that it has made itself" in done.stderr, done
    before = counter.numbers(source)[-1]
    proc.wait_for("the source to count on", lambda: counter.numbers(source)[-1] > before)


def test_a_mistyped_annotation_is_said(node: Node) -> None:
    counter.run(node.runtime, "typo", counter.bundle(node.directory / "typo", {"rewarm.dev/snapshott": "x"}))
    said = [line["msg"] for line in node.runtime.log_lines() if line.get("level") == "warning"]
    assert any("rewarm.dev/snapshott" in line and "no effect" in line for line in said), said


def test_everything_of_the_state_is_private(node: Node) -> None:
    before = os.umask(0)
    try:
        counter.captured(node)
    finally:
        os.umask(before)
    for path in (
        node.state,
        node.state / "containers",
        node.directory / "work",
        node.store,
        node.container_directory("source"),
    ):
        assert Path(path).stat().st_mode & 0o077 == 0, path
