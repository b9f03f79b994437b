"""A program that asked for it is told that it was restored: by a signal, through a socket, by the Python hook."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support import gpu_containers, rootfs
from support.bundle import Bundle
from support.node import Node
from support.proc import wait_for
from support.runtime import Container

# Says who told it, and numbers that copies would share: its generators are used before it is captured.
PROGRAM = """
import json, os, random, signal, socket, ssl, sys, threading, time
import numpy.random
from rewarm_hooks.workload import on_restore

say = lambda **words: print(json.dumps(words) + "\\n", end="", flush=True)
told = threading.Event()
numbers = lambda: [random.random(), numpy.random.random(), ssl.RAND_bytes(8).hex()]

def by_signal(number, frame):
    say(by="signal", tick=tick, number=number)

def by_socket():
    while True:
        with own.accept()[0] as connection: line = connection.recv(4096)
        say(by="socket", tick=tick, said=json.loads(line), pod=json.load(open("/run/rewarm/restored.json"))["hostname"])

def by_hook(restored):
    say(by="hook", tick=tick, pod=restored["hostname"])
    told.set()

tick = 0
numbers()
signal.signal(signal.SIGUSR1, by_signal)
with open(f"/run/rewarm/{os.getpid()}.signal", "w") as file: file.write("USR1\\n")
own = socket.socket(socket.AF_UNIX)
own.bind("/run/rewarm/own.sock")
own.listen(1)
threading.Thread(target=by_socket, daemon=True).start()
say(listens=on_restore(by_hook, reseed=sys.argv[1] == "reseed"))
while True:
    time.sleep(0.02)
    tick += 1
    if told.is_set():
        told.clear()
        say(numbers=numbers())
    if tick % 10 == 0:
        say(tick=tick)
"""
USERS = {"uidMappings": [{"containerID": 0, "hostID": 0, "size": 65536}]}
USERS["gidMappings"] = USERS["uidMappings"]


def bundle(node: Node, name: str, *, user: bool = False, reseed: bool = True, program: str = PROGRAM) -> Bundle:
    """`user`: as a user without rights, in a user namespace (in another one only a root with CAP_SYS_RESOURCE could
    capture it), with a copy of the hook in its image."""
    made = Bundle(
        node.directory / name,
        [rootfs.base(), rootfs.layer("ocr")],
        ["python3", "-c", program, "reseed" if reseed else ""],
        annotations={"rewarm.dev/snapshot": "told"},
        env={"PYTHONPATH": "/opt/ocr:/opt/copy" if user else "/opt/ocr"},
        hostname=name,
        user=(1000, 1001) if user else (0, 0),
    )
    if user:
        shutil.copytree(node.prefix / "lib/rewarm-hooks", made.upper / "opt/copy")
        made.spec["linux"]["namespaces"].append({"type": "user"})
        made.spec["linux"].update(USERS)
        made.write()
    return made


def captured(node: Node, **more: Any) -> Container:
    source = node.runtime.create("source", bundle(node, "source", **more))
    node.runtime.start("source")
    source.stdout.wait_text('{"tick": 10}')
    node.rewarm("capture", "source", "--name", "told")
    return source


def restored(node: Node, name: str, **more: Any) -> list[dict[str, Any]]:
    """What a copy says in its first half second."""
    copy = node.runtime.create(name, bundle(node, name, **more))
    outcome = node.outcome(name)
    assert outcome["outcome"] == "warm" and outcome["notes"] == [], outcome
    assert copy.stdout.text() == "", "it runs before it is started"
    node.runtime.start(name)
    copy.stdout.wait_text('"numbers"')
    node.runtime.exec(name, "sleep", "0.5")
    return lines(copy)


def lines(container: Container) -> list[dict[str, Any]]:
    return [json.loads(line) for line in container.stdout.text().splitlines()]


def by(said: list[dict[str, Any]], way: str) -> dict[str, Any]:
    (one,) = [line for line in said if line.get("by") == way]
    return one


def numbers(said: list[dict[str, Any]]) -> list[Any]:
    (line,) = [line for line in said if "numbers" in line]
    found: list[Any] = line["numbers"]
    return found


def check_told(said: list[dict[str, Any]], name: str) -> None:
    """Once in each way, of itself, and before its program does much."""
    assert by(said, "hook")["pod"] == by(said, "socket")["pod"] == name
    assert by(said, "socket")["said"] == {"event": "restored", "file": "/run/rewarm/restored.json"}
    assert by(said, "signal")["number"] == 10
    first = min(line["tick"] for line in said if "tick" in line)
    assert by(said, "signal")["tick"] == first and by(said, "hook")["tick"] <= first + 25, said


@pytest.mark.parametrize("user", [False, True], ids=["root", "user"])
def test_each_copy_is_told_of_itself(node: Node, user: bool) -> None:
    source = captured(node, user=user)
    one, two = restored(node, "one", user=user), restored(node, "two", user=user)
    check_told(one, "one")
    check_told(two, "two")
    assert all(a != b for a, b in zip(numbers(one), numbers(two), strict=True))
    assert lines(source)[0] == {"listens": True}
    assert not [line for line in lines(source) if "by" in line or "numbers" in line], "what starts cold is told"


@pytest.mark.parametrize("user", [False, True], ids=["root", "user"])
def test_a_copy_of_a_copy_is_told_as_well(node: Node, user: bool) -> None:
    captured(node, user=user)
    check_told(restored(node, "one", user=user), "one")
    owner = node.runtime.exec("one", "stat", "--format=%u:%g %a", "/run/rewarm/1.signal")
    assert owner == ("1000:1001 644\n" if user else "0:0 644\n"), "its own to change and to remove"
    written = node.runtime.run("exec", "one", "touch", "/run/rewarm-hooks/own.py", check=False)
    assert user or (written.returncode != 0 and "Read-only file system" in written.stderr)
    node.rewarm("capture", "one", "--name", "told", "--stop")
    check_told(restored(node, "two", user=user), "two")


def test_without_reseeding_copies_share_their_numbers(node: Node) -> None:
    """Which is what the hook is there for, and what makes the first test one that can fail."""
    captured(node, reseed=False)
    assert numbers(restored(node, "one", reseed=False)) == numbers(restored(node, "two", reseed=False))


SHELL = """
trap 'echo told by $(tr , "\\n" < /run/rewarm/restored.json | grep hostname)' USR1
echo USR1 > /run/rewarm/$$.signal
echo waits
while :; do sleep 0.05; done
"""


def test_a_shell_is_told(node: Node) -> None:
    def made(name: str) -> Bundle:
        annotations = {"rewarm.dev/snapshot": "told"}
        return Bundle(
            node.directory / name, [rootfs.base()], ["sh", "-c", SHELL], annotations=annotations, hostname=name
        )

    node.runtime.create("source", made("source"))
    node.runtime.start("source")
    node.runtime.containers["source"].stdout.wait_text("waits\n")
    node.rewarm("capture", "source", "--name", "told", "--stop")
    copy = node.runtime.create("copy", made("copy"))
    node.runtime.start("copy")
    copy.stdout.wait_text('told by "hostname": "copy"')


def test_what_nobody_can_use_is_said(node: Node) -> None:
    """A file that names a signal which its process does not handle: a line of the capture, and no more."""
    source = node.runtime.create("source", bundle(node, "source"))
    node.runtime.start("source")
    source.stdout.wait_text('{"tick": 10}')
    node.runtime.exec("source", "sh", "-c", "echo USR2 > /run/rewarm/1.signal; mkfifo /run/rewarm/7.signal")
    said = node.json("capture", "source", "--name", "told")["notes"]
    assert said == [
        "no signal by /run/rewarm/1.signal: process 1 does not handle signal 12",
        "no signal by /run/rewarm/7.signal: the container has no process 7",
    ]
    copy = restored(node, "one")
    assert [line["by"] for line in copy if "by" in line and line["by"] != "socket"] == ["hook"]


def test_with_a_gpu_it_runs_when_it_is_told(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> None:
    program = """
import os, runpy, signal
from rewarm_hooks.workload import on_restore
def tell(way): open(f"/run/rewarm/{way}", "x").close()
on_restore(lambda restored: tell("hook"))
signal.signal(signal.SIGUSR1, lambda number, frame: tell("signal"))
with open(f"/run/rewarm/{os.getpid()}.signal", "w") as file: file.write("USR1")
runpy.run_module("support.workloads.gpu_fake", run_name="__main__")
"""
    with gpu_containers.place(tmp_path, prefix) as place:
        for name in ("source", "copy"):
            made = place.bundle(name)
            made.spec["process"]["args"] = ["python3", "-u", "-c", program]
            made.write()
            place.node.runtime.create(name, made)
            control = place.node.container_directory(name) / "control"
            if name == "source":
                place.node.runtime.start(name)
                place.ask()
                place.node.rewarm("capture", name, "--name", "model", "--stop")
                assert not (control / "hook").exists() and not (control / "signal").exists()
                place.node.runtime.stop(name)
        assert place.node.outcome("copy")["outcome"] == "warm" and place.node.outcome("copy")["notes"] == []
        wait_for("it to be told", lambda: (control / "hook").exists() and (control / "signal").exists())
        place.node.runtime.start("copy")
        place.ask()
