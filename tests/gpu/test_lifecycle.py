"""One snapshot, several containers; a capture that ends its source; a snapshot of a container that was restored."""

from __future__ import annotations

import pytest

from support.gpu.fleet import Fleet, Running
from support.proc import state_of


@pytest.mark.parametrize("source", ["stopped"], indirect=True)
def test_capture_with_stop(fleet: Fleet, source: Running) -> None:
    expected = source.answers(4)
    source.ask("/reset")
    source.answers(1)
    fleet.capture(source, "stopped", "--stop")
    assert source.container.pid is not None and state_of(source.container.pid) in (None, "Z")
    source.stop()
    copy = fleet.restore("copy-stopped", source, "stopped")
    assert copy.answers(3) == expected[1:]
    copy.node.runtime.kill(copy.name, "TERM")
    assert copy.node.runtime.wait_stopped(copy.name) == 0


@pytest.mark.parametrize("source", ["twice"], indirect=True)
def test_restored_twice_and_captured_again(fleet: Fleet, source: Running) -> None:
    """Two containers of one snapshot on one GPU at a time, and a third of one of them."""
    expected = source.answers(6)
    source.ask("/reset")
    source.answers(2)
    fleet.capture(source, "twice")
    source.stop()
    copies = [fleet.restore(f"twice-{number}", source, "twice") for number in (1, 2)]
    for at in range(2, 4):
        assert [copy.ask() for copy in copies] == [expected[at]] * 2
    fleet.capture(copies[1], "twice-again")
    assert copies[1].ask() == expected[4]
    for copy in copies:
        copy.stop()
    again = fleet.restore("twice-3", source, "twice-again")
    assert again.answers(2) == expected[4:]
