"""An inference engine that is told to be quiet for a capture, and to go on afterwards: rewarm.dev/engine."""

from __future__ import annotations

from types import TracebackType

from rewarm import engines, processes, request, waker
from rewarm.errors import CaptureError, RequestError, RestoreError, RewarmError
from rewarm.lifeline import Lifeline
from rewarm.oci import record
from rewarm.oci.runc import Container
from rewarm.oci.spec import Spec
from rewarm.settings import Settings


class Quiet:
    """Context manager: inside, the container's engine has no request in flight, if the annotation names one."""

    def __init__(self, container: Container, bundle_spec: Spec, settings: Settings, lifeline: Lifeline) -> None:
        """The helper behind `lifeline` lets the engine go on if this process cannot. Raises CaptureError."""
        self._lifeline = lifeline
        self._container = container
        self._limit = settings.engine_timeout
        self._state_dir = settings.state_dir
        self._told = self._failed = False
        self.notes: list[str] = []
        """What was called, and what failed when it was to go on, a line each."""
        try:
            wanted = request.parse(bundle_spec, settings)
        except RequestError as error:
            raise CaptureError(
                "capture container", container.id, str(error), "start it with other annotations"
            ) from None
        self.engine = "none" if wanted is None else wanted.engine
        """Which one, or "none"."""
        self._port = 0 if wanted is None or self.engine == "none" else _port(wanted, bundle_spec)

    def __enter__(self) -> Quiet:
        """Raises CaptureError; the engine goes on then."""
        if self.engine == "none":
            return self
        directory = record.find_directory(self._state_dir, self._container.root, self._container.id)
        if not waker.wait(directory, self._limit):
            # It would be told to go on in the middle of the capture.
            cause = f"its engine is still being told to go on after its restore, for more than {self._limit:g} s"
            raise CaptureError("capture container", self._container.id, cause, "look into engine.log beside its record")
        self._lifeline.quiet(self.engine, self._port, self._limit)
        self._told = True
        try:
            self.notes += engines.quiesce(self.engine, self._container.pid, self._port, self._limit)
        except engines.StillPaused as error:
            self.resume()
            outcome = self.notes[-1] if self._failed else "it goes on by now"
            error.next_step = "; ".join(filter(None, (outcome, error.next_step)))
            raise
        except CaptureError:
            self._told = False  # it goes on already
            self._lifeline.loud()
            raise
        except BaseException:
            self.resume()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.resume()
        if isinstance(value, RewarmError) and self._failed:
            value.next_step = f"{self.notes[-1]}; {value.next_step}"

    def resume(self) -> None:
        """Let the engine go on; nothing happens the second time. Its processes have to run."""
        if not self._told:
            return
        self._told = False
        container = self._container
        if processes.start_time(container.pid) != container.start_time:
            self._lifeline.loud()
            return  # it was stopped, as was asked
        try:
            self.notes += engines.resume(self.engine, container.pid, self._port, self._limit)
        except RestoreError as error:
            # What was captured is right; that the source does not answer is for its owner to know.
            self._failed = True
            self.notes.append(f"the engine did not go on: {error}")
        self._lifeline.loud()


def _port(wanted: request.Request, bundle_spec: Spec) -> int:
    return engines.target(wanted.engine, wanted.ready, bundle_spec)
