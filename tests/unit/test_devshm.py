"""What a capture looks at in a /dev/shm that other programs use."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rewarm import devshm


def test_files_of_others_that_go_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Semaphores and segments of the node's other programs come and go."""
    monkeypatch.setattr(devshm, "is_nodes", lambda directory: True)
    (tree := tmp_path / "tree").mkdir()
    over = threading.Event()

    def others() -> None:
        while not over.is_set():
            for number in range(64):
                (tree / str(number)).touch()
            for number in range(64):
                (tree / str(number)).unlink()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(300):
            devshm.write(tmp_path / devshm.FILE, tmp_path, str(tree), [], [])
    finally:
        over.set()
        thread.join()
