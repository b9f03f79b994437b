"""Where the time of one capture or restore went: named phases, written as a JSON file that Perfetto opens.

Only the standard library's light parts are imported; a trace is made on the path of every restore.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

Value = str | int | float | bool | None


class PhaseRecord(NamedTuple):
    """One phase. Times are CLOCK_MONOTONIC nanoseconds (comparable between processes of one boot).

    `depth` counts the phases of the same thread around it. `end_ns` is None while the phase runs.
    `error` is the exception type that ended it, or "".
    """

    name: str
    start_ns: int
    end_ns: int | None
    tid: int
    depth: int
    error: str
    args: dict[str, Value]

    @property
    def seconds(self) -> float:
        """Duration in seconds; 0.0 while the phase runs."""
        return 0.0 if self.end_ns is None else (self.end_ns - self.start_ns) / 1e9


class Trace:
    """Phases of one operation. Every method may be called from any thread, phases may nest."""

    def __init__(self) -> None:
        # Read together, once: every other time is monotonic, so that a clock step cannot bend the trace.
        self.monotonic_base_ns = time.monotonic_ns()
        self.wall_base_ns = time.time_ns()
        self._lock = threading.Lock()
        self._records: list[PhaseRecord] = []
        self._other: dict[str, Value] = {}
        self._local = threading.local()

    def phase(self, name: str, **args: Value) -> _Phase:
        """A context manager that records the time spent inside it; an exception is noted and passes through."""
        return _Phase(self, name, args)

    def add(self, name: str, start_ns: int, end_ns: int, **args: Value) -> None:
        """Record a phase that something else timed (a hook, CRIU): CLOCK_MONOTONIC nanoseconds."""
        self._begin(PhaseRecord(name, start_ns, max(start_ns, end_ns), threading.get_native_id(), 0, "", args))

    def note(self, key: str, value: Value) -> None:
        """Put one fact about the whole operation (container id, outcome) into `otherData`."""
        with self._lock:
            self._other[key] = value

    def phases(self) -> list[PhaseRecord]:
        """A copy of the phases so far, by start time; running ones have `end_ns` None."""
        with self._lock:
            return sorted(self._records, key=lambda record: (record.start_ns, record.depth))

    def seconds(self) -> dict[str, float]:
        """How long each phase took, by name; those that still run until now."""
        now = time.monotonic_ns()
        return {phase.name: round(((phase.end_ns or now) - phase.start_ns) / 1e9, 6) for phase in self.phases()}

    def to_json(self) -> bytes:
        """The trace in Chrome's trace event format: `ts` and `dur` are microseconds since the trace began.

        A phase that still runs is written as lasting until now, with `args.open` true, so that a trace
        written before a failure shows where it was.
        """
        now = time.monotonic_ns()
        pid = os.getpid()
        events = []
        for record in self.phases():
            end = now if record.end_ns is None else record.end_ns
            args: dict[str, Value] = {**record.args, "start_ns": record.start_ns, "end_ns": end}
            if record.end_ns is None:
                args["open"] = True
            if record.error:
                args["error"] = record.error
            start_us = (record.start_ns - self.monotonic_base_ns) / 1000
            event = {"name": record.name, "cat": record.name.partition(".")[0], "ph": "X", "ts": start_us}
            events.append({**event, "dur": (end - record.start_ns) / 1000, "pid": pid, "tid": record.tid, "args": args})
        with self._lock:
            other = dict(self._other)
        other |= {"monotonic_base_ns": self.monotonic_base_ns, "wall_base_ns": self.wall_base_ns}
        document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}
        return json.dumps(document, separators=(",", ":")).encode()

    def write(self, path: str | Path) -> None:
        """Write the trace to `path` so that a reader sees the old file or the new one, never a part. Raises OSError."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
        data = self.to_json()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _begin(self, record: PhaseRecord) -> int:
        with self._lock:
            self._records.append(record)
            return len(self._records) - 1

    def _end(self, index: int, end_ns: int, error: str) -> None:
        with self._lock:
            self._records[index] = self._records[index]._replace(end_ns=end_ns, error=error)

    def _depth(self, step: int) -> int:
        """Change the calling thread's nesting depth by `step`; returns the depth before."""
        depth: int = getattr(self._local, "depth", 0)
        self._local.depth = depth + step
        return depth


class _Phase:
    def __init__(self, trace: Trace, name: str, args: dict[str, Value]) -> None:
        self._trace = trace
        self._name = name
        self._args = args
        self._index = -1

    def __enter__(self) -> None:
        depth = self._trace._depth(+1)
        start = time.monotonic_ns()
        record = PhaseRecord(self._name, start, None, threading.get_native_id(), depth, "", self._args)
        self._index = self._trace._begin(record)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        end = time.monotonic_ns()
        self._trace._depth(-1)
        self._trace._end(self._index, end, kind.__name__ if kind else "")
