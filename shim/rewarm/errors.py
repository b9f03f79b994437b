"""The errors that rewarm raises, each naming the operation, the object, the cause and the next step.

`create` prints exactly one of them as its last line in runc's log, and `kubectl describe pod` shows
that line: it has to stand on its own.
"""

from __future__ import annotations


class RewarmError(Exception):
    """Something rewarm could not do.

    `operation` is a verb phrase ("read manifest"), `object` what it was done to, `cause` why it failed
    and `next_step` what the operator can do about it (may be empty when there is nothing to do).
    """

    def __init__(self, operation: str, object: str, cause: str, next_step: str = "") -> None:
        super().__init__(operation, object, cause, next_step)
        self.operation = operation
        self.object = object
        self.cause = cause
        self.next_step = next_step

    def __str__(self) -> str:
        text = f"{self.operation} {self.object}: {self.cause}".replace("\n", " ")
        return f"{text}; {self.next_step}" if self.next_step else text


class SettingsError(RewarmError):
    """The node's settings file holds something that rewarm does not understand."""


class RequestError(RewarmError):
    """A `rewarm.dev/…` annotation is unknown or has a value that is not allowed."""


class OciError(RewarmError):
    """A command line, config.json or low-level runtime did not do what the OCI runtime spec or runc promises."""


class StoreError(RewarmError):
    """The store could not be read or written."""


class SnapshotNotFound(StoreError):
    """No snapshot has the name or id asked for."""


class SnapshotDamaged(StoreError):
    """A snapshot is there but its bytes are not what its manifest says."""


class Unfit(RewarmError):
    """A snapshot does not fit this container or this node."""


class CaptureError(RewarmError):
    """A container could not be captured."""


class RestoreError(RewarmError):
    """A snapshot could not be restored."""


class GpuError(RewarmError):
    """A GPU, or the driver on behalf of a process that uses one, did not do what was asked."""


class NotUndone(RewarmError):
    """A failed restore could not be undone, so nothing may be started in its place."""
