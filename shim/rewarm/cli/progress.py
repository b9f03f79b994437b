"""What is going on, on standard error: only on a terminal, and only once it has taken a second."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_DELAY = 1.0


class Progress:
    """Shows a step, or bytes done of `total`, from `delay` seconds after its `with` was entered until it is left.

    Without a terminal on standard error it does nothing. rich is imported when there is something to show.
    """

    def __init__(self, step: str, total: int | None = None, *, delay: float = _DELAY) -> None:
        self._step = step
        self._total = total
        self._done = 0
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._timer = threading.Timer(delay, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join()
        if self._bar is not None:
            self._bar.stop()

    def step(self, text: str) -> None:
        """What is being done now."""
        with self._lock:
            self._step = text
            self._update()

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        with self._lock:
            self._done += count
            self._update()

    def _update(self) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=self._step, completed=self._done)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        counted = (BarColumn(), DownloadColumn(binary_units=True)) if self._total is not None else ()
        text = TextColumn("{task.description}", markup=False)
        bar = Bar(SpinnerColumn(), text, *counted, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
        with self._lock:
            bar.add_task(self._step, total=self._total, completed=self._done)
            self._bar = bar
            bar.start()
