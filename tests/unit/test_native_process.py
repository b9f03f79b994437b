"""rewarm_native.process on real processes: NUMA policies by ptrace, sockets of another network namespace, prctl."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rewarm_native import process
from support.proc import wait_for

NATIVE = Path(__file__).resolve().parents[2] / "native/rewarm_native"
SECONDS = 20.0
DEFAULT, PREFERRED, BIND, INTERLEAVE = 0, 1, 2, 3  # linux/mempolicy.h
STATIC = 1 << 15
SIOCGSKNS = 0x894C

# Threads that are stopped in every way in which the kernel restarts a system call, and one that is in none. A call that
# came back with a wrong value, or too early, shows in what is printed at the end.
VICTIM = """
import ctypes, json, mmap, os, select, signal, sys, threading, time
TIME = 1.0
area = mmap.mmap(-1, 16 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
read_end, write_end = os.pipe()
results, go = {}, threading.Barrier(7)
def report(function):
    def run():
        go.wait()
        start = time.monotonic()
        value = function()
        results[function.__name__] = [value, time.monotonic() - start >= TIME - 0.01]
    thread = threading.Thread(target=run)
    thread.start()
    return thread
libc = ctypes.CDLL(None, use_errno=True)
class timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]
def nanosleep():  # relative, so by restart_syscall(2)
    return [libc.nanosleep(ctypes.byref(timespec(1, 0)), None), ctypes.get_errno()]
def poll():
    waiter = select.poll()
    waiter.register(read_end)
    return waiter.poll(TIME * 1000)
def epoll():
    with select.epoll() as waiter:
        waiter.register(read_end)
        return waiter.poll(TIME)
def futex():
    lock = threading.Lock()
    lock.acquire()
    return lock.acquire(timeout=TIME)
def compute():
    end, total, number = time.monotonic() + TIME, 0.0, 0
    while time.monotonic() < end:
        number += 1
        total += number * 0.5
    return total == number * (number + 1) / 4
def sigwait():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    return signal.sigtimedwait([signal.SIGUSR2], TIME)
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append("USR1"))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
threads = [report(one) for one in (nanosleep, poll, epoll, futex, compute, sigwait)]
go.wait()
print(address, flush=True)
deadline = time.monotonic() + 15
blocked_read = os.read(0, 1).decode()
for thread in threads:
    thread.join()
masked = signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
print(json.dumps({"results": results, "read": blocked_read, "signals": got, "masked": masked}), flush=True)
"""


class Victim:
    """A process with seven threads."""

    def __init__(self, prelude: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", prelude + VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the victim did not come up"
        self.area = int(line)
        time.sleep(0.1)  # for the threads to be inside their calls

    @property
    def pid(self) -> int:
        return self.process.pid

    def tids(self) -> list[int]:
        return sorted(int(name) for name in os.listdir(f"/proc/{self.pid}/task"))

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(self.is_stopped)

    def is_stopped(self) -> bool:
        return set(self.states()) == {"T"}

    def states(self) -> list[str]:
        return [self.field(tid, "State")[0] for tid in self.tids()]

    def field(self, tid: int, name: str) -> str:
        text = Path(f"/proc/{self.pid}/task/{tid}/status").read_text()
        found = re.search(rf"^{name}:\s*(.*)$", text, re.MULTILINE)
        assert found, name
        return found[1]

    def policies(self, tid: int) -> dict[int, str]:
        lines = Path(f"/proc/{self.pid}/task/{tid}/numa_maps").read_text().splitlines()
        return {int(line.split()[0], 16): line.split()[1] for line in lines}

    def own_policy(self, tid: int) -> str:
        """The thread's own, which shows on a mapping that surely has none: the stack."""
        lines = Path(f"/proc/{self.pid}/task/{tid}/numa_maps").read_text().splitlines()
        return next(line.split()[1] for line in lines if " stack" in line)

    def memory_map(self) -> str:
        return Path(f"/proc/{self.pid}/maps").read_text()

    def kernel_view(self) -> list[str]:
        """Registers at the border to user space, and the masks, of all threads."""
        names = ("SigBlk", "SigPnd", "ShdPnd", "SigIgn", "SigCgt", "Seccomp", "TracerPid")
        return [
            Path(f"/proc/{self.pid}/task/{tid}/syscall").read_text() + " ".join(self.field(tid, name) for name in names)
            for tid in self.tids()
        ]

    def finish(self) -> dict[str, object]:
        out, _ = self.process.communicate("!", timeout=SECONDS)
        assert self.process.returncode == 0
        result: dict[str, object] = json.loads(out)
        return result


# Spends its time inside a restartable sequence that only its abort handler leaves: once the kernel has forgotten the
# sequence, it spins for ever. Prints the number of SIGUSR1 (which abort, too) so far.
SEQUENCE = r"""
#include <signal.h>
#include <stdio.h>
#include <sys/rseq.h>
static volatile sig_atomic_t signals;
static void count(int number) { (void)number; signals++; }
int main(void)
{
    struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    signal(SIGUSR1, count);
    puts("up");
    for (sig_atomic_t seen = 0;;) {
        __asm__ volatile(
            ".pushsection sequences, \"aw\"\n.balign 32\n"
            "3: .long 0, 0\n.quad 1f, 2f - 1f, 4f\n.popsection\n"
            "leaq 3b(%%rip), %%rax\nmovq %%rax, %0\n"
            "1: pause\njmp 1b\n2: ud2\n"
            ".long 0x53053053\n4:\n"
            : "=m"(area->rseq_cs) : : "rax", "memory");
        if (seen != signals) {
            seen = signals;
            printf("%d\n", (int)seen);
            fflush(stdout);
        }
    }
}
"""

EXPECTED = {
    "nanosleep": [[0, 0], True],
    "poll": [[], True],
    "epoll": [[], True],
    "futex": [False, True],
    "compute": [True, True],
    "sigwait": [None, True],
}


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.005)


@pytest.fixture
def victims() -> Iterator[Callable[..., Victim]]:
    made: list[Victim] = []

    def make(prelude: str = "") -> Victim:
        made.append(Victim(prelude))
        return made[-1]

    yield make
    for victim in made:
        victim.process.kill()
        victim.process.communicate()


# --- memory policies


def test_policies_of_threads_and_ranges_of_a_stopped_process(victims: Callable[..., Victim]) -> None:
    victim = victims()
    victim.stop()
    before, maps = victim.kernel_view(), victim.memory_map()
    policies = [
        (BIND, 1),
        (INTERLEAVE, 1),
        (PREFERRED, 1),
        (BIND | STATIC, 1),
        (DEFAULT, 0),
        (INTERLEAVE, 1),
        (BIND, 1),
    ]
    shown = ["bind:0", "interleave:0", "prefer:0", "bind=static:0", "default", "interleave:0", "bind:0"]
    assert len(victim.tids()) == len(policies)
    for tid, policy in zip(victim.tids(), policies, strict=True):
        process.set_memory_policies(victim.pid, tid, policy)
        wait_until(victim.is_stopped)
    page = mmap.PAGESIZE
    ranges = [(victim.area, 2 * page, BIND, 1), (victim.area + 4 * page, page, INTERLEAVE, 1)]
    process.set_memory_policies(victim.pid, victim.tids()[3], None, ranges)
    wait_until(victim.is_stopped)

    assert [victim.own_policy(tid) for tid in victim.tids()] == shown
    seen = victim.policies(victim.pid)
    assert (seen[victim.area], seen[victim.area + 4 * page]) == ("bind:0", "interleave:0")
    assert victim.kernel_view() == before  # registers, masks, pending signals, no tracer
    process.set_memory_policies(victim.pid, victim.pid, None, [(victim.area, 16 * page, DEFAULT, 0)])
    wait_until(victim.is_stopped)
    assert victim.memory_map() == maps

    os.kill(victim.pid, signal.SIGCONT)
    assert victim.finish() == {"results": EXPECTED, "read": "!", "signals": [], "masked": True}


def test_pending_signals_stay_pending(victims: Callable[..., Victim]) -> None:
    victim = victims()
    victim.stop()
    os.kill(victim.pid, signal.SIGUSR1)
    os.kill(victim.pid, signal.SIGUSR2)
    os.kill(victim.pid, signal.SIGSTOP)  # once more
    before = victim.kernel_view()
    for tid in victim.tids():
        process.set_memory_policies(victim.pid, tid, (BIND, 1))
        wait_until(victim.is_stopped)
    after = victim.kernel_view()
    # The second SIGSTOP may be consumed, which changes nothing: the process is stopped.
    stop = 1 << signal.SIGSTOP - 1

    def without_stop(view: list[str]) -> list[str]:
        return [re.sub(r"\b[0-9a-f]{16}\b", lambda m: f"{int(m[0], 16) & ~stop:x}", line) for line in view]

    assert without_stop(after) == without_stop(before)
    os.kill(victim.pid, signal.SIGCONT)
    result = victim.finish()
    assert result["signals"] == ["USR1"]
    # One that waits for SIGUSR2 has got it.
    assert result["masked"] is True


def test_a_running_process_goes_on_running(victims: Callable[..., Victim]) -> None:
    victim = victims()
    for tid in victim.tids():
        process.set_memory_policies(victim.pid, tid, (INTERLEAVE, 1))
    assert {victim.own_policy(tid) for tid in victim.tids()} == {"interleave:0"}
    assert "T" not in victim.states()
    assert victim.finish() == {"results": EXPECTED, "read": "!", "signals": [], "masked": True}


def test_seccomp_of_the_program_does_not_judge(victims: Callable[..., Victim]) -> None:
    """Engines' default profiles deny mbind and set_mempolicy; this filter kills for them."""
    prelude = """
import ctypes, struct
def rule(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
program = rule(0x20, 0, 0, 0) + rule(0x15, 1, 0, 237) + rule(0x15, 0, 1, 238)
program += rule(6, 0, 0, 0x80000000) + rule(6, 0, 0, 0x7fff0000)
text = ctypes.create_string_buffer(program)
class fprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(fprog(5, ctypes.addressof(text))), 0, 0) == 0
"""
    victim = victims(prelude)
    victim.stop()
    assert victim.field(victim.pid, "Seccomp") == "2"
    process.set_memory_policies(victim.pid, victim.pid, (BIND, 1), [(victim.area, 4096, INTERLEAVE, 1)])
    wait_until(victim.is_stopped)
    assert victim.own_policy(victim.pid) == "bind:0"
    assert victim.field(victim.pid, "Seccomp") == "2"
    os.kill(victim.pid, signal.SIGCONT)
    assert victim.finish()["results"] == EXPECTED


def test_a_restartable_sequence_is_aborted_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / "sequence.c").write_text(SEQUENCE)
    program = tmp_path / "sequence"
    subprocess.run(["cc", "-O1", "-o", program, tmp_path / "sequence.c"], check=True)
    child = subprocess.Popen([program], stdout=subprocess.PIPE, text=True, bufsize=1)
    assert child.stdout is not None
    try:
        time.sleep(0.1)
        for number in range(1, 6):
            os.kill(child.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            process.set_memory_policies(child.pid, child.pid, (BIND, 1))
            os.kill(child.pid, signal.SIGCONT)
            time.sleep(0.02)
            os.kill(child.pid, signal.SIGUSR1)
            assert select.select([child.stdout], [], [], 5)[0], f"hangs after time {number}"
            if number == 1:
                assert child.stdout.readline() == "up\n"
            assert child.stdout.readline() == f"{number}\n"
    finally:
        child.kill()
        child.communicate()


def test_a_policy_that_fails_is_named_and_leaves_the_process_whole(victims: Callable[..., Victim]) -> None:
    victim = victims()
    victim.stop()
    before, maps = victim.kernel_view(), victim.memory_map()
    absent = 1 << 900
    with pytest.raises(
        OSError, match=rf"set_mempolicy to mode 0x2, nodes {absent:#x} in thread {victim.pid}"
    ) as caught:
        process.set_memory_policies(victim.pid, victim.pid, (BIND, absent))
    assert caught.value.errno == errno.EINVAL
    good = (victim.area, 4096, BIND, 1)
    with pytest.raises(OSError, match="mbind 0x1000-0x2000 to mode 0x2") as caught:
        process.set_memory_policies(victim.pid, victim.pid, None, [good, (0x1000, 0x1000, BIND, 1), (0, 1, 99, 1)])
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(OSError, match="mbind") as caught:
        process.set_memory_policies(victim.pid, victim.pid, None, [(victim.area + 1, 4096, BIND, 1)])
    assert caught.value.errno == errno.EINVAL
    wait_until(victim.is_stopped)
    assert victim.kernel_view() == before
    assert victim.policies(victim.pid)[victim.area] == "bind:0"
    process.set_memory_policies(victim.pid, victim.pid, None, [(victim.area, 4096, DEFAULT, 0)], move=True)
    wait_until(victim.is_stopped)
    assert victim.memory_map() == maps
    os.kill(victim.pid, signal.SIGCONT)
    assert victim.finish()["results"] == EXPECTED


def test_arguments_that_cannot_be_meant() -> None:
    for mask in (-1, 1 << process.NODES):
        with pytest.raises(ValueError, match="node mask"):
            process.set_memory_policies(os.getpid(), os.getpid(), (BIND, mask))
    with pytest.raises(ValueError, match="length 0"):
        process.set_memory_policies(os.getpid(), os.getpid(), None, [(4096, 0, BIND, 1)])
    process.set_memory_policies(2**22 + 1, 2**22 + 1, None)  # nothing to do


def test_threads_that_are_not_there(victims: Callable[..., Victim]) -> None:
    with pytest.raises(ProcessLookupError):
        process.set_memory_policies(2**22 + 1, 2**22 + 1, (BIND, 1))
    victim, other = victims(), victims()
    with pytest.raises(ProcessLookupError):
        process.set_memory_policies(victim.pid, other.pid, (BIND, 1))
    victim.process.kill()
    victim.process.wait()
    with pytest.raises(ProcessLookupError):
        process.set_memory_policies(victim.pid, victim.pid, (BIND, 1))
    other.process.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    with pytest.raises(OSError, match="run system calls in thread") as caught:
        process.set_memory_policies(other.pid, other.pid, (BIND, 1))
    assert caught.value.errno in (errno.EPERM, errno.ESRCH)


def test_a_process_that_another_traces_is_refused(victims: Callable[..., Victim]) -> None:
    victim = victims()
    tracer = subprocess.Popen(
        [sys.executable, "-I", "-c", "import ctypes, sys, time\n"
         "assert ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None) == 0\n"
         "print('attached', flush=True); time.sleep(1000)", str(victim.pid)],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert tracer.stdout is not None and tracer.stdout.readline() == b"attached\n"
        with pytest.raises(PermissionError):
            process.set_memory_policies(victim.pid, victim.pid, (BIND, 1))
    finally:
        tracer.kill()
        tracer.communicate()
    assert victim.finish()["results"] == EXPECTED


# --- sockets


@pytest.fixture
def namespace() -> Iterator[int]:
    """The pid of a process in a network namespace of its own."""
    child = subprocess.Popen(
        ["/usr/bin/unshare", "-n", "/bin/sh", "-c", "echo up; exec sleep 1000"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"up\n"
    yield child.pid
    child.kill()
    child.communicate()


def namespace_of(sock: socket.socket) -> int:
    fd = fcntl.ioctl(sock.fileno(), SIOCGSKNS)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def test_a_socket_belongs_to_the_namespace_of_the_process(namespace: int) -> None:
    path = f"/proc/{namespace}/ns/net"
    own = os.stat("/proc/thread-self/ns/net").st_ino
    fd = os.open(path, os.O_RDONLY)
    try:
        for target in (namespace, path, Path(path), f"/proc/self/fd/{fd}"):
            for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_NETLINK, socket.SOCK_RAW)):
                with process.open_socket_in_netns(target, family, kind) as sock:
                    assert (sock.family, sock.type) == (family, kind)
                    assert not sock.get_inheritable()
                    assert namespace_of(sock) == os.stat(path).st_ino != own
    finally:
        os.close(fd)
    assert {os.stat(f"/proc/self/task/{tid}/ns/net").st_ino for tid in os.listdir("/proc/self/task")} == {own}


def test_many_threads_open_sockets_at_once(namespace: int) -> None:
    there = os.stat(f"/proc/{namespace}/ns/net").st_ino
    found: list[int] = []

    def work() -> None:
        for _ in range(20):
            with process.open_socket_in_netns(namespace, socket.AF_INET, socket.SOCK_DGRAM) as sock:
                found.append(namespace_of(sock))
            with socket.socket() as sock:
                found.append(-namespace_of(sock))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    here = os.stat("/proc/self/ns/net").st_ino
    assert len(found) == 160 and set(found) == {there, -here}


def test_namespaces_that_are_none(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    with pytest.raises(ProcessLookupError):
        process.open_socket_in_netns(2**22 + 1, socket.AF_INET, socket.SOCK_STREAM)
    with pytest.raises(FileNotFoundError):
        process.open_socket_in_netns("/run/netns/none", socket.AF_INET, socket.SOCK_STREAM)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", "/proc/self/ns/mnt"):
        with pytest.raises(OSError, match="open socket in network namespace") as caught:
            process.open_socket_in_netns(path, socket.AF_INET, socket.SOCK_STREAM)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="open socket") as caught:
        process.open_socket_in_netns(os.getpid(), 9999, socket.SOCK_STREAM)
    assert caught.value.errno == errno.EAFNOSUPPORT
    assert descriptors() == before


# --- prctl


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_subreaper_adopts_orphans_until_it_is_none() -> None:
    code = """
import os, time
from rewarm_native import process
def parent_of_orphan():
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        middle = os.getpid()
        if os.fork() == 0:
            while os.getppid() == middle:
                time.sleep(0.001)
            os.write(write_end, str(os.getppid()).encode())
        os._exit(0)
    return int(os.read(read_end, 20)) == os.getpid()
answers = [parent_of_orphan()]
process.set_child_subreaper(True)
answers.append(parent_of_orphan())
process.set_child_subreaper(False)
answers.append(parent_of_orphan())
print(answers)
"""
    assert run_python(code) == "[False, True, False]\n"


def test_pdeathsig_is_sent_when_the_parent_ends() -> None:
    code = """
import os, signal, time
from rewarm_native import process
process.set_child_subreaper(True)
read_end, write_end = os.pipe()
if os.fork() == 0:
    middle = os.getpid()
    if os.fork() == 0:
        signal.signal(signal.SIGUSR1, lambda *_: (os.write(write_end, b"signal"), os._exit(0)))
        process.set_pdeathsig(signal.SIGUSR1)
        os.write(write_end, b"x")
        time.sleep(10)
        os._exit(0)
    os.read(read_end, 1)
    os._exit(0)
print(os.waitpid(-1, 0)[1], os.read(read_end, 20).decode())
"""
    assert run_python(code) == "0 signal\n"
    with pytest.raises(OSError, match="PR_SET_PDEATHSIG 1000") as caught:
        process.set_pdeathsig(1000)
    assert caught.value.errno == errno.EINVAL


# --- the build


@pytest.mark.parametrize(
    "source", ["process.c", "ipc.c", "tracing.c", "borrow.c", "mempolicy.c", "detour.c", "advise.c", "memory.c"]
)
def test_the_sources_are_clean_under_the_strictest_warnings(source: str) -> None:
    flags = ["-std=gnu17", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion"]
    done = subprocess.run(["cc", *flags, "-c", "-o", "/dev/null", NATIVE / source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_of_another_uts_namespace(tmp_path: Path) -> None:
    own = os.uname().nodename
    longest = "h" * 64
    script = f"hostname {longest}; echo example.org > /proc/sys/kernel/domainname; echo; exec sleep 60"
    with subprocess.Popen(["unshare", "--uts", "sh", "-c", script], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"\n"
            assert process.names_in_utsns(f"/proc/{other.pid}/ns/uts") == (longest, "example.org")
        finally:
            other.kill()
    assert process.names_in_utsns("/proc/self/ns/uts")[0] == own == os.uname().nodename
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", "/proc/self/ns/mnt"):
        with pytest.raises(OSError, match="read host name in UTS namespace") as caught:
            process.names_in_utsns(path)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        process.names_in_utsns(tmp_path / "none")


def test_the_next_process_of_another_pid_namespace(tmp_path: Path) -> None:
    script = "echo; while read word; do sh -c 'echo $$'; done"
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as other:
        try:
            assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == "\n"
            (init,) = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
            for wanted in (5000, 300, 31000):
                process.set_last_pid(f"/proc/{init}/ns/pid", wanted - 1)
                other.stdin.write("\n")
                assert other.stdout.readline() == f"{wanted}\n"
            with pytest.raises(OSError, match="set last pid 99999999 in pid namespace") as caught:
                process.set_last_pid(f"/proc/{init}/ns/pid", 99999999)
            assert caught.value.errno == errno.EINVAL
            gone = os.open(f"/proc/{init}/ns/pid", os.O_RDONLY)
        finally:
            other.kill()
    try:
        wait_for("end of the namespace", lambda: not Path(f"/proc/{init}").exists())
        with pytest.raises(OSError, match="set last pid") as caught:
            process.set_last_pid(f"/proc/self/fd/{gone}", 1000)
        assert caught.value.errno == errno.ENOMEM
    finally:
        os.close(gone)
    for path, number in (("/proc/self/ns/mnt", errno.EINVAL), (str(tmp_path / "none"), errno.ENOENT)):
        with pytest.raises(OSError, match=r"pid namespace|No such file") as caught:
            process.set_last_pid(path, 1000)
        assert caught.value.errno == number
