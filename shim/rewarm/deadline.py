"""The time limit of a restore: SIGALRM, whose handler raises wherever the main thread is.

A limit that every wait has to keep by itself is one that some wait forgets: reading a store may hang too. What no
signal interrupts (state D) is not cut short by this either: apart.py has the last word.
"""

from __future__ import annotations

import signal

KUBELET = 120.0
"""Seconds after which the kubelet gives a container up that is being created or started: runtimeRequestTimeout, by
default."""
SWEEPING, UNDOING, TAKING_BACK = 15.0, 20.0, 20.0
"""Seconds beside the limit, at most: before it, for what killed restores have left; after it, for undoing this one; and
for the guard to do that, where the process that should hangs."""


class Passed(Exception):
    """The time is up. No RewarmError, so that nobody who tries the next thing after one takes it for that."""


def latest(limit: float) -> float:
    """Seconds after which `create` has given up a restore with this limit and starts cold, though a store or a driver
    hang."""
    return SWEEPING + limit + UNDOING + TAKING_BACK


def arm(seconds: float) -> None:
    """Raise Passed in the main thread after `seconds`, unless `disarm` comes first."""
    signal.signal(signal.SIGALRM, _raise)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def disarm() -> None:
    """Stop the clock; nothing is raised once this has returned. A second call does nothing."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    # Not SIG_IGN: execve(2) keeps ignored signals ignored, so runc and the container would inherit it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _raise(number: int, frame: object) -> None:
    raise Passed
