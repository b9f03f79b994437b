"""The small container that most restore tests use: a program that counts, changes files and dies as told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support import rootfs
from support.bundle import Bundle
from support.node import Node
from support.runtime import Container, Runtime

# Changes a base-image file, deletes one, makes one, then counts. SIGTERM ends it with status 7.
PROGRAM = """
import os, signal, sys, time
memory = bytearray(os.urandom(int(os.environ.get("MIB", "16")) << 20))
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
with open("/etc/issue", "a") as file: file.write("changed by the program\\n")
os.unlink("/etc/debian_version")
os.makedirs("/var/lib/counter", exist_ok=True)
with open("/var/lib/counter/state", "w") as file: file.write("kept\\n")
print("ready", flush=True)
if os.path.isdir("/run/rewarm"): open("/run/rewarm/ready", "w").close()
count = 0
while True:
    time.sleep(0.05)
    count += 1
    print(count, hash(bytes(memory)), file=sys.stdout, flush=True)
    if count % 10 == 0: print("to stderr", count, file=sys.stderr, flush=True)
"""


def bundle(directory: Path, annotations: Mapping[str, str] | None = None, **more: Any) -> Bundle:
    """A bundle with the counter; `more` goes to Bundle. By default it asks for the snapshot `counter`."""
    found = {"rewarm.dev/snapshot": "counter"} if annotations is None else annotations
    environment = more.pop("env", {"PYTHONHASHSEED": "0"})
    args = more.pop("args", ["python3", "-c", PROGRAM])
    return Bundle(directory, [rootfs.base()], args, annotations=found, env=environment, **more)


def run(runtime: Runtime, name: str, made: Bundle) -> Container:
    """Create, start, wait until it counts."""
    container = runtime.create(name, made)
    runtime.start(name)
    container.stdout.wait_text("\n2 ")
    return container


def captured(node: Node, name: str = "source", **more: Any) -> Container:
    """A counter that runs on, captured as the snapshot `counter`."""
    container = run(node.runtime, name, bundle(node.directory / name, **more))
    node.rewarm("capture", name, "--name", "counter")
    return container


def numbers(container: Container) -> list[int]:
    """What it counted on standard output, in order."""
    return [int(line.split()[0]) for line in container.stdout.text().splitlines() if line[:1].isdigit()]


def hashes(container: Container) -> set[str]:
    """The digests of its memory that it printed: one, as long as its memory is its own."""
    return {line.split()[1] for line in container.stdout.text().splitlines() if line[:1].isdigit() and " " in line}
