"""A thread that runs what it is given: what belongs to one thread can be read and set by that thread alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class Worker(threading.Thread):
    """`prepare` runs in the thread before the constructor returns."""

    def __init__(self, name: str, prepare: Callable[[], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        self.start()
        self.do(prepare)

    def run(self) -> None:
        while True:
            work, answer = self._work.get()
            try:
                answer.put(work())
            except Exception as error:
                answer.put(error)

    def do(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, run in the thread; what it raises is raised here."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._work.put((work, answer))
        result = answer.get(timeout=20)
        if isinstance(result, Exception):
            raise result
        return result
