"""The children of the vmas workload: they share its memory copy-on-write, change some, and answer its questions."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from support.workloads import raw
from support.workloads.raw import MIB, PAGE
from support.workloads.vmas_areas import Area, Areas

Handlers = Mapping[str, Callable[[Any], Any]]
NUMBER = int(signal.SIGUSR1)


class Peer:
    """The parent's side of a socket pair to a child: one question at a time."""

    def __init__(self, pair: socket.socket) -> None:
        self.pair = pair
        self.pair.settimeout(120)
        self._file = pair.makefile("r")
        self._lock = threading.Lock()

    def ask(self, what: str, value: Any = None) -> Any:
        with self._lock:
            self.pair.sendall(json.dumps([what, value]).encode() + b"\n")
            return self.answer()

    def answer(self) -> Any:
        line = self._file.readline()
        if not line:
            raise EOFError("the child has closed its socket")
        found = json.loads(line)
        if isinstance(found, dict) and "error" in found:
            raise RuntimeError(found["error"])
        return found


def serve(pair: socket.socket, handlers: Handlers) -> None:
    """The child's side; returns when the parent is gone."""
    for line in pair.makefile("r"):
        what, value = json.loads(line)
        try:
            answer = handlers[what](value)
        except Exception as error:
            answer = {"error": f"{what}: {type(error).__name__}: {error}"}
        pair.sendall(json.dumps(answer).encode() + b"\n")


def spawn(run: Callable[[socket.socket], None]) -> tuple[int, Peer]:
    """Forks; the child runs `run` and ends. The parent gets its pid and the way to ask it."""
    mine, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        mine.close()
        try:
            run(theirs)
        finally:
            os._exit(0)
    theirs.close()
    return pid, Peer(mine)


def handlers(areas: Areas) -> Handlers:
    """What every process answers about itself."""
    return {
        "hash": lambda _: areas.digests(),
        "memory": lambda _: rollup(),
        "areas": lambda _: mappings(areas),
        "poke": lambda value: poke(areas, value["area"], value["at"], value["byte"]),
        "peek": lambda value: peek(areas, value["area"], value["at"]),
        "pid": lambda _: os.getpid(),
    }


def change(areas: Areas, number: int) -> None:
    """Makes copies of a few pages of the memory "cow": of three in 17, one anew, one zeroed, one given back."""
    area = areas.found["cow"]
    assert isinstance(area, Area)
    start, length = area.spans[0]
    source = random.Random(number)
    for page, address in enumerate(range(start, start + length, PAGE)):
        if page % 17 == number:
            raw.write(address, source.randbytes(PAGE))
        elif page % 17 == number + 4:
            raw.zero(address, PAGE)
        elif page % 17 == number + 8:
            raw.advise(address, PAGE, raw.MADV_DONTNEED)


def child(
    areas: Areas, number: int, *, moved: bool, grandchild: socket.socket | None
) -> Callable[[socket.socket], None]:
    """What a child does: with `moved`, the shared memory lies at another address than the parent's."""

    def run(pair: socket.socket) -> None:
        areas.found.pop("not-in-children", None)
        change(areas, number)
        if grandchild is not None:
            if os.fork() == 0:
                pair.close()
                change(areas, number + 1)
                _own(areas, number + 1)
                serve(grandchild, handlers(areas))
                return
            grandchild.close()
        if moved:
            area = areas.found["shared"]
            assert isinstance(area, Area)
            address, length = area.spans[0]
            areas.add("shared", raw.move(address, length), length)
        _own(areas, number)
        serve(pair, handlers(areas))

    return run


def _own(areas: Areas, number: int) -> None:
    size = areas.size(4 + number)
    areas.scattered(areas.add("own", raw.memory(size), size), size, 0.25)


def stopped(areas: Areas) -> Callable[[socket.socket], None]:
    """Stops itself; when it goes on, a signal that came meanwhile is handled on a stack in memory with content."""

    def run(pair: socket.socket) -> None:
        areas.found.pop("not-in-children", None)
        size = 4 * MIB
        address = areas.add("signal stack", raw.memory(size), size)
        stack = size // 2  # the upper half, which nothing has touched; below it lies content
        areas.dense(address, stack)
        areas.found["signal stack"] = Area("signal stack", [(address, stack)])
        raw.alternate_stack(address + stack, size - stack)
        seen: list[dict[str, Any]] = []

        def handle(number: int, info: int, _context: int) -> None:
            # Runs inside kill(2) below, where Python code may: not what a program should do elsewhere.
            sender, value = raw.signal_value(info)
            seen.append(
                {
                    "signal": number,
                    "sender": sender,
                    "value": value,
                    "stack intact": areas.found["signal stack"].digest() == before,
                    "stack used": any(raw.read(address + stack, size - stack)),
                }
            )

        keep = raw.HANDLER(handle)
        raw.on_alternate_stack(NUMBER, keep)
        before = areas.found["signal stack"].digest()
        pair.sendall(json.dumps({"pid": os.getpid()}).encode() + b"\n")
        os.kill(os.getpid(), signal.SIGSTOP)
        answer = {"seen": seen, "hash": areas.digests(), "alternate": raw.alternate_stack() == (address + stack, stack)}
        pair.sendall(json.dumps(answer).encode() + b"\n")
        serve(pair, handlers(areas))

    return run


def rollup(pid: int | str = "self") -> dict[str, int]:
    """Bytes of smaps_rollup: Rss, Pss, Private_*, Shared_*, AnonHugePages and the others."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        lines = [line.split() for line in file][1:]
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines}


def mappings(areas: Areas) -> dict[str, dict[str, Any]]:
    """Rights and flags of the mapping in which each area begins, as smaps shows them."""
    starts = {area.spans[0][0]: name for name, area in areas.found.items() if isinstance(area, Area)}
    found: dict[str, dict[str, Any]] = {}
    inside: list[dict[str, Any]] = []
    with open("/proc/self/smaps") as file:
        for line in file:
            words = line.split()
            if "-" in words[0]:
                start, end = (int(part, 16) for part in words[0].split("-"))
                names = [name for address, name in starts.items() if start <= address < end]
                inside = [found.setdefault(name, {"rights": words[1], "range": words[0]}) for name in names]
            elif words[0] == "VmFlags:":
                for entry in inside:
                    entry["flags"] = words[1:]
            elif words[0] in ("Rss:", "Pss:", "AnonHugePages:", "Locked:"):
                for entry in inside:
                    entry[words[0].rstrip(":")] = int(words[1]) << 10
    return found


def _place(areas: Areas, name: str, at: int) -> int:
    area = areas.found[name]
    assert isinstance(area, Area)
    return area.spans[0][0] + at


def peek(areas: Areas, name: str, at: int) -> int:
    return raw.read(_place(areas, name, at), 1)[0]


def poke(areas: Areas, name: str, at: int, byte: int) -> int:
    """Writes a byte, and returns the one that was there."""
    old = peek(areas, name, at)
    raw.write(_place(areas, name, at), bytes([byte]))
    return old
