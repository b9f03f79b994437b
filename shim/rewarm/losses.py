"""What CRIU loses silently, recorded at the capture and put right after the restore.

- The CPU affinity of every thread (CRIU has no image for it).
- The NUMA policy of threads (set_mempolicy) and of mappings (mbind).
- Which processes were stopped by a signal: `leave-stopped` stops all of them, and only those that ran may go on.
"""

from __future__ import annotations

import errno
import os
import re

from rewarm import processes
from rewarm.errors import RestoreError
from rewarm.store.manifest import MemoryPolicy, Process, Thread

# linux/mempolicy.h; the text is what mm/mempolicy.c prints into numa_maps.
_MODES = {
    "default": 0,
    "prefer": 1,
    "bind": 2,
    "interleave": 3,
    "local": 4,
    "prefer (many)": 5,
    "weighted interleave": 6,
}
_FLAGS = {"static": 1 << 15, "relative": 1 << 14, "balancing": 1 << 13}
_POLICY = re.compile(r"([a-z]+(?: \([a-z]+\)| interleave)?)((?:[=|][a-z]+)*)(?::([0-9,-]+))?")


def record(pids: list[int], stopped: frozenset[int]) -> tuple[Process, ...]:
    """The facts about the given (frozen) processes, of which a signal had stopped `stopped` (host pids).

    Pids and tids in the result are the container's own.
    """
    found = []
    everywhere = _allowed(pids[0])
    for pid in pids:
        state = processes.stat(pid)
        if state is None or state.state in "ZX":
            continue
        policy, mappings = _policies(pid, pid)
        threads = []
        for tid in processes.threads(pid):
            affinity = os.sched_getaffinity(tid)
            own = policy if tid == pid else _policies(pid, tid)[0]
            threads.append(
                Thread(
                    tid=processes.namespace_pid(pid, tid),
                    # Every CPU there is means "wherever", on a node with more or fewer CPUs too.
                    affinity=() if affinity >= everywhere else tuple(sorted(affinity)),
                    policy=own[0],
                    nodes=own[1],
                )
            )
        found.append(Process(processes.namespace_pid(pid), tuple(threads), pid in stopped, tuple(mappings)))
    return tuple(found)


def put_right(recorded: tuple[Process, ...], init_pid: int) -> list[str]:
    """Give the restored, still stopped tree under `init_pid` (host pid) back what CRIU lost.

    Returns one line for each thing that this node cannot give (a CPU or NUMA node that it does not have).
    Raises RestoreError when a process refuses what the node has.
    """
    here = {processes.namespace_pid(pid): pid for pid in processes.tree(init_pid)}
    notes: list[str] = []
    for process in recorded:
        pid = here.get(process.pid)
        if pid is None:
            raise RestoreError("restore process", str(process.pid), "it is not in the restored tree")
        tids = {processes.namespace_pid(pid, tid): tid for tid in processes.threads(pid)}
        for thread in process.threads:
            tid = tids.get(thread.tid)
            if tid is None:
                raise RestoreError("restore thread", f"{thread.tid} of {process.pid}", "it is not in the restored tree")
            if thread.affinity:
                _set_affinity(tid, thread, notes)
            if thread.policy:
                _set_policy(pid, tid, thread, (), notes)
        if process.memory_policies:
            _set_policy(pid, pid, None, process.memory_policies, notes)
    return notes


def stopped_pids(recorded: tuple[Process, ...]) -> frozenset[int]:
    """The container's own pids of processes that a signal had stopped when they were captured."""
    return frozenset(process.pid for process in recorded if process.stopped)


def _allowed(pid: int) -> set[int]:
    """The CPUs that the container's cpuset and the node give to a process (Cpus_allowed is narrowed by affinity)."""
    online = set(range(os.cpu_count() or 1))
    try:
        with open(f"/proc/{pid}/cpuset", encoding="utf-8", newline="\n") as file:
            path = file.read().strip()
    except OSError:
        return online  # a kernel without cpusets
    for base in ("/sys/fs/cgroup/cpuset", "/sys/fs/cgroup"):
        for name in ("cpuset.effective_cpus", "cpuset.cpus.effective"):
            try:
                with open(f"{base}{path}/{name}", encoding="ascii") as file:
                    listed = numbers(file.read().strip())
            except OSError:
                continue
            if listed:
                return set(listed)
    return online


def _set_affinity(tid: int, thread: Thread, notes: list[str]) -> None:
    try:
        os.sched_setaffinity(tid, thread.affinity)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise RestoreError("set CPU affinity", f"thread {thread.tid}", error.strerror or str(error)) from error
        notes.append(f"thread {thread.tid} was bound to CPUs {list(thread.affinity)}, which this container has not")


def _set_policy(pid: int, tid: int, thread: Thread | None, ranges: tuple[MemoryPolicy, ...], notes: list[str]) -> None:
    from rewarm_native import process  # only snapshots with a NUMA policy pay for the import

    own = None if thread is None else (mode(thread.policy), node_mask(thread.nodes))
    mappings = [(r.start, r.end - r.start, mode(r.mode), node_mask(r.nodes)) for r in ranges]
    wanted = thread.nodes if thread is not None else tuple({node for r in ranges for node in r.nodes})
    missing = [node for node in wanted if not os.path.isdir(f"/sys/devices/system/node/node{node}")]
    if missing:
        notes.append(f"process {pid} had a memory policy for NUMA nodes {missing}, which this machine has not")
        return
    try:
        process.set_memory_policies(pid, tid, own, mappings)
    except OSError as error:
        raise RestoreError("set memory policy", f"process {pid}", error.strerror or str(error)) from error


def _policies(pid: int, tid: int) -> tuple[tuple[str, tuple[int, ...]], list[MemoryPolicy]]:
    """A thread's own policy ("" for the default) and the mappings whose policy differs from it.

    numa_maps shows a mapping's policy, or the thread's where the mapping has none. The vdso is the
    mapping that surely has none, so it shows the thread's.
    """
    try:
        with open(f"/proc/{pid}/task/{tid}/numa_maps", encoding="utf-8", errors="replace", newline="\n") as file:
            shown = dict(line.split(" ", 1) for line in file)
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace", newline="\n") as file:
            areas = [line.split() for line in file]
    except FileNotFoundError:
        return ("", ()), []  # a kernel without NUMA has no policies
    ends, special = {}, ""
    for area in areas:
        start, _, end = area[0].partition("-")
        ends[int(start, 16)] = int(end, 16)
        if len(area) > 5 and area[5] in ("[vdso]", "[vvar]"):
            special = start
    own = parse_policy(next((text for start, text in shown.items() if int(start, 16) == int(special or "0", 16)), ""))
    differing = []
    for first, text in shown.items():
        address = int(first, 16)
        policy = parse_policy(text)
        if policy != own and address in ends:
            differing.append(MemoryPolicy(address, ends[address], policy[0] or "default", policy[1]))
    return own, differing


def parse_policy(text: str) -> tuple[str, tuple[int, ...]]:
    """A numa_maps policy (`bind=static:0-1 anon=3 …`) as mode with flags ("" for default) and nodes."""
    found = _POLICY.match(text)
    if found is None or found[1] not in _MODES or found[1] == "default":
        return "", ()
    return found[1] + found[2], tuple(numbers(found[3] or ""))


def mode(text: str) -> int:
    """The number that set_mempolicy(2) takes for a mode as `parse_policy` returns it."""
    words = re.split(r"[=|]", text)
    try:
        return _MODES[words[0]] | sum(_FLAGS[word] for word in words[1:])
    except KeyError as error:
        raise RestoreError("set memory policy", repr(text), "no such mode") from error


def numbers(text: str) -> list[int]:
    """`0-2,5` -> [0, 1, 2, 5]."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def node_mask(nodes: tuple[int, ...]) -> int:
    return sum(1 << node for node in set(nodes))
