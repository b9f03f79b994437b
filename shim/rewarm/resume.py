"""What `start` of a restored container sends SIGCONT to, and that written down, so that `start` needs no Python.

The launcher (native/start.c) reads it:

    start                  "1", then "init PID START", then "PID START" of each process to continue, in that order
    record.started.json    what record.json is to be once they run

START is the start time in clock ticks since boot, which tells a process from a later one with its pid.
"""

from __future__ import annotations

import os

from rewarm import processes
from rewarm.oci import record
from rewarm.oci.record import Record
from rewarm.oci.spec import write_atomically


def order(kept: Record) -> list[int]:
    """The tree but for what was stopped in the source.

    Children before parents: a parent that waits with WUNTRACED finds them running.
    """
    tree = reversed(processes.tree(kept.init_pid))
    return [pid for pid in tree if processes.namespace_pid(pid) not in kept.stopped]


def write_down(directory: str, kept: Record) -> None:
    """Before the record says RESTORED: the launcher takes it for true only then."""
    lines = ["1", f"init {kept.init_pid} {kept.init_start}"]
    for pid in order(kept):
        started = processes.start_time(pid)
        if started is not None:
            lines.append(f"{pid} {started}")
    record.save(directory, kept._replace(phase=record.STARTED), "record.started.json")
    write_atomically(os.path.join(directory, "start"), ("\n".join(lines) + "\n").encode())
