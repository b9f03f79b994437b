"""What a container says in the library's place is not believed, costs no descriptor, and ends in time."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import pytest

from rewarm.errors import GpuError
from rewarm.gpu import served
from rewarm.gpu.pieces import MAX, TOP, WINDOW, Span
from rewarm.gpu.served import Served
from support import lying_library
from support.device_program import EXPORT, HELLO, LIST, Message
from support.lying_library import (
    STRANGE,
    WRONG,
    End,
    Lying,
    answered,
    exported,
    honest,
    listing,
    memory,
    nothing_stays_open,
    noting,
    open_files,
    reached,
    sends,
    two,
)
from support.proc import Timeout, wait_for

LIMIT = 10.0
SHORT = 0.3
BASE = 0x7F00_0000_0000
SPANS = [Span(BASE + at * 4 * WINDOW, 2 * WINDOW) for at in range(100)]
SO_PASSPIDFD = 76

Start = Callable[..., Lying]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes; this one has no descriptor more in the end than at the beginning."""
    with nothing_stays_open():
        started: list[Lying] = []

        def make(*args: object, **more: object) -> Lying:
            started.append(Lying(*args, **more))  # type: ignore[arg-type]
            return started[-1]

        yield make
        for one in started:
            one.close()


def refused(match: str) -> AbstractContextManager[object]:
    return pytest.raises(GpuError, match=match)


def works(library: Served) -> None:
    assert library.hello() == (sum(span.size for span in SPANS), len(SPANS))
    assert [one.span for one in library.list()] == SPANS
    assert exported(library, SPANS) == [span.address.to_bytes(8, "little") for span in SPANS]


def test_what_an_honest_one_says(start: Start) -> None:
    with reached(start(honest(*SPANS))) as library:
        works(library)
        library.own(SPANS)
        library.unmap(SPANS)
        fd = memory()
        library.map(SPANS, [fd] * len(SPANS))
        os.close(fd)
        works(library)


def test_one_that_never_answers(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "_SHORT", SHORT)
    with reached(start(), SHORT) as library:
        wants: list[Callable[[], object]] = [library.hello, library.imported, library.list]
        wants += [partial(library.own, SPANS), partial(library.unmap, SPANS), partial(exported, library, SPANS)]
        for ask in wants:
            began = time.monotonic()
            with pytest.raises(
                GpuError, match=r"(hear|tell) the device memory library in process \d+ .*: .*(timed out|0\.3 s)"
            ):
                ask()
            assert SHORT <= time.monotonic() - began < SHORT + 2


def test_one_that_reads_nothing_and_has_filled_the_queue(start: Start) -> None:
    def fill(end: End) -> None:
        end.other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                end.other.send(bytes(64))

    with reached(start(fill), SHORT) as library:
        began = time.monotonic()
        with refused("(tell|hear) the device memory library"):  # it may have room yet
            library.list()
        with refused("tell the device memory library"):
            library.list()
        assert time.monotonic() - began < 2 * SHORT + 2


def test_one_that_answers_slowly_has_one_limit_for_all(start: Start) -> None:
    with reached(start(honest(*SPANS, before=lambda *_: time.sleep(0.05))), SHORT) as library:
        began = time.monotonic()
        with pytest.raises(GpuError, match="hear the device memory library"):
            library.unmap(SPANS)
        assert time.monotonic() - began < SHORT + 2


@pytest.mark.parametrize("after", [0, 1, 40])
def test_one_that_closes(start: Start, after: int) -> None:
    """Its own end, while rewarm has the other one; answers that were sent are heard."""
    left = [after]

    def leave(end: End, _: Message) -> None:
        left[0] -= 1
        if left[0] < 0:
            end.own.close()
            os._exit(0)

    process = start(honest(*SPANS, before=leave))
    with reached(process) as library:
        took: list[int] = []
        with pytest.raises(GpuError, match=r"(it has closed its socket|Broken pipe|Connection reset by peer)"):
            library.export(SPANS, noting(took))
        assert len(took) <= after


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_is_gone_or_stopped(start: Start, signal_number: int) -> None:
    process = start(honest(*SPANS))
    with reached(process, SHORT) as library:
        works(library)
        os.kill(process.pid, signal_number)
        with pytest.raises(GpuError):
            library.list()
    with contextlib.suppress(GpuError):
        assert signal_number == signal.SIGSTOP or served.find(process.pid, LIMIT) is None


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_answer_is_passed_over(start: Start, wrong: Callable[[Message], bytes]) -> None:
    """Also what comes with it, which is closed."""

    def first(end: End, request: Message) -> None:
        fds = [memory(b"wrong"), memory(b"too")]
        end.send(wrong(request), fds)
        for fd in fds:
            os.close(fd)

    with reached(start(honest(*SPANS, before=first))) as library:
        works(library)


def test_strange_descriptors_with_what_is_passed_over(start: Start) -> None:
    """Their end may take as long as somebody likes: the first ends it all."""

    def first(end: End, request: Message) -> None:
        fds = [*os.pipe()]
        end.send(b"x", fds)
        for fd in fds:
            os.close(fd)

    with reached(start(honest(*SPANS, before=first))) as library, refused("of other things than device memory"):
        library.list()


def test_an_empty_packet_is_an_end(start: Start) -> None:
    with reached(start(lambda end: (end.receive(), end.send(b""))[1])) as library, refused("it has closed its socket"):
        library.list()


def test_what_a_killed_one_did_not_hear_is_passed_over(start: Start) -> None:
    """Answers with descriptors, of requests like the next one's."""
    process = start(honest(*SPANS))
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                library = served.find(process.pid, LIMIT)
                assert library is not None
                library._send(LIST, Span(0, 0), time.monotonic() + LIMIT)
                for span in SPANS[:10]:
                    library._send(EXPORT, span, time.monotonic() + LIMIT)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
    with reached(process) as library:
        assert exported(library, SPANS[::-1]) == [span.address.to_bytes(8, "little") for span in SPANS[::-1]]


@pytest.mark.parametrize(
    ("pieces", "names"),
    [
        ([(BASE, 2 * WINDOW), (BASE + WINDOW, WINDOW)], f"{WINDOW} bytes at {BASE + WINDOW:#x}"),
        ([(BASE, WINDOW), (BASE, WINDOW)], f"{WINDOW} bytes at {BASE:#x}"),
        ([(BASE + (1 << 30), WINDOW), (BASE, WINDOW)], f"{WINDOW} bytes at {BASE:#x}"),
        ([(BASE, MAX + WINDOW)], f"{MAX + WINDOW} bytes"),
        ([(BASE, (1 << 64) - WINDOW)], "18446744073707454464 bytes"),
        ([(BASE, WINDOW + 4096)], "2101248 bytes"),
        ([(BASE + 4096, WINDOW)], "at 0x7f0000001000"),
        ([(0, WINDOW)], "at 0x0"),
        ([(TOP, WINDOW)], "at 0x800000000000"),
        ([(TOP - WINDOW, 2 * WINDOW)], "at 0x7fffffe00000"),
        ([((1 << 64) - WINDOW, WINDOW)], "at 0xffffffffffe00000"),
    ],
)
def test_a_list_that_cannot_be(start: Start, pieces: list[tuple[int, int]], names: str) -> None:
    with (
        reached(start(listing(*pieces))) as library,
        refused(f"list pieces of the device memory library in process .*: it names .*{names}"),
    ):
        library.list()


@pytest.mark.parametrize("count", [0, 1, 3, (1 << 64) - 1])
def test_a_list_of_another_length(start: Start, count: int) -> None:
    with (
        reached(start(listing((BASE, WINDOW), (BASE + WINDOW, WINDOW), count=count))) as library,
        refused(f"it names 2 of {count}"),
    ):
        library.list()


def test_a_list_without_an_end(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "MAX_PIECES", 50)
    with reached(start(honest(*SPANS[:50]))) as library:
        assert len(library.list()) == 50
    with (
        reached(start(honest(*SPANS[:51]))) as library,
        refused(f"it names {2 * WINDOW} bytes at {SPANS[50].address:#x}"),
    ):
        library.list()


def test_another_version(start: Start) -> None:
    with (
        reached(start(lambda end: end.answer(end.receive()[0], device=2))) as library,
        refused("it speaks version 2 of the protocol, this rewarm 1"),
    ):
        library.hello()


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (2, "the GPU has not enough free memory"),
        (700, "CUDA error 700"),
        (-11, "Resource temporarily"),
        (-(1 << 31), ""),
    ],
)
def test_a_failure_names_the_piece(start: Start, status: int, says: str) -> None:
    def play(end: End) -> None:
        while True:
            request, _ = end.receive()
            end.answer(request, status=status if request.address == SPANS[1].address else 0)

    with reached(start(play)) as library, refused(f"{says}.*{SPANS[1].size} bytes at {SPANS[1].address:#x}"):
        library.unmap(SPANS)


@pytest.mark.parametrize("kind", STRANGE)
def test_a_file_that_is_no_device_memory(start: Start, kind: str) -> None:
    with (
        reached(start(sends(STRANGE[kind]))) as library,
        refused("it has sent 1 descriptors, or none of device memory"),
    ):
        exported(library, SPANS[:3])


@pytest.mark.parametrize("count", [0, 2, 3, 4, 5, 100])
def test_another_number_of_descriptors(start: Start, count: int) -> None:
    with reached(start(sends(*[memory] * count))) as library, refused(f"it has sent {min(count, 4)} descriptors"):
        exported(library, SPANS[:3])


def test_memory_that_comes_with_a_failure(start: Start) -> None:
    with reached(start(sends(memory, status=2))) as library, refused("not enough free memory"):
        exported(library, SPANS[:3])


def test_memory_where_none_was_asked_for(start: Start) -> None:
    with reached(start(sends(memory, STRANGE["pipe"]))) as library:
        library.unmap(SPANS)
        with pytest.raises(GpuError, match="it speaks version 0"):
            library.hello()


def test_memory_behind_a_failure_is_closed(start: Start) -> None:
    """Of those that were on their way already."""

    def play(end: End) -> None:
        requests = [end.receive()[0] for _ in range(32)]
        for at, request in enumerate(requests):
            fd = memory()
            end.answer(request, [fd], status=at == 3)
            os.close(fd)

    with reached(start(play)) as library:
        took: list[int] = []
        with pytest.raises(GpuError, match="CUDA error 1"):
            library.export(SPANS, noting(took))
        assert took == [0, 1, 2]


@pytest.mark.parametrize("option", [socket.SO_PASSCRED, SO_PASSPIDFD])
def test_options_that_the_process_sets_on_rewarms_end(start: Start, option: int) -> None:
    """With every answer comes what nobody has asked for: a descriptor of who has sent it, or its ids."""

    def make() -> tuple[socket.socket, socket.socket]:
        own, other = lying_library.pair()
        other.setsockopt(socket.SOL_SOCKET, option, 1)
        return own, other

    with reached(start(honest(*SPANS[:3]), make)) as library:
        before = set(open_files())
        for _ in range(3):
            assert len(library.list()) == 3
        with contextlib.suppress(Timeout):
            wait_for("descriptors that were closed", lambda: set(open_files()) <= before, timeout=1)
        left = set(open_files()) - before
        for one in left:
            os.close(int(one.split()[0]))
        assert left == set()


@pytest.mark.parametrize(
    "make",
    [
        partial(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM),
        partial(socket.socketpair, socket.AF_UNIX, socket.SOCK_STREAM),
        two(socket.AF_INET, socket.SOCK_STREAM),
        two(socket.AF_NETLINK, socket.SOCK_RAW),
    ],
)
def test_another_socket(start: Start, make: Callable[[], tuple[socket.socket, socket.socket]]) -> None:
    process = start(make=make)
    with pytest.raises(GpuError, match=r"reach .* in process \d+ .*: descriptor \d+ is not its socket any more"):
        served.find(process.pid, LIMIT)


def test_what_is_no_socket(start: Start) -> None:
    with refused("descriptor 0 is no socket any more"):
        served.find(start(name=lambda _: "rewarm-mem-0").pid, LIMIT)


@pytest.mark.parametrize("number", ["999", "1023", "9999", "0000"])
def test_a_number_that_is_not_open(start: Start, number: str) -> None:
    with refused("(Bad file descriptor|descriptor 0 is no socket any more)"):
        served.find(start(name=lambda _: f"rewarm-mem-{number}").pid, LIMIT)


@pytest.mark.parametrize("name", ["rewarm-mem-", "rewarm-mem-²", "rewarm-mem-x", "rewarm-mem--1", "rewarm-mem 70", "x"])
def test_a_name_without_a_number(start: Start, name: str) -> None:
    assert served.find(start(name=lambda _: name).pid, LIMIT) is None


def test_a_process_that_is_gone(start: Start) -> None:
    process = start(honest(*SPANS))
    process.close()
    assert served.find(process.pid, LIMIT) is None
    with pytest.raises(GpuError, match="reach the device memory library"):
        Served(process.pid, 70, LIMIT)


@pytest.mark.parametrize("kind", ["", "memory", "pipe"])
def test_a_flood(start: Start, kind: str) -> None:
    """Packets that are no answers, as fast as they go."""
    kinds: dict[str, list[Callable[[], int]]] = {"": [], "memory": [memory], "pipe": [STRANGE["pipe"]]}

    def play(end: End) -> None:
        request, _ = end.receive()
        fds = [one() for one in kinds[kind]]
        while True:
            end.send(answered(request, sequence=1), fds)

    with reached(start(play), 1.0) as library:
        before, began = lying_library.threads(), time.monotonic()
        with pytest.raises(GpuError, match="hear the device memory library"):
            library.list()
        assert time.monotonic() - began < 3
        wait_for("the end of the threads", lambda: lying_library.threads() <= before, timeout=5)


def test_hello_is_asked_for_a_short_time_only(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes meanwhile: it is asked while nothing is paused, but somebody waits."""
    monkeypatch.setattr(served, "_SHORT", SHORT)

    def play(end: End) -> None:
        while True:
            end.send(HELLO.to_bytes(8, "little") + bytes(56))

    with reached(start(play)) as library:
        began = time.monotonic()
        with refused("hear"):
            library.hello()
        assert time.monotonic() - began < SHORT + 2
