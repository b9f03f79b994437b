"""Every kind of program goes on from its snapshot as if nothing had been, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from support.gpu.fleet import Fleet, Running

CASES = ("server", "float32", "spawn", "child", "pinned", "streams", "libraries", "compiled", "threads", "llm")
BEFORE, AFTER = 3, 3


@pytest.mark.parametrize("source", CASES, indirect=True)
def test_goes_on_bit_for_bit(fleet: Fleet, source: Running, figures: dict[str, Any]) -> None:
    # The run that nothing interrupted: the same program, before anything is done to it.
    expected = source.answers(BEFORE + AFTER)
    assert len({str(one["answer"]) for one in expected}) == len(expected), "the answers do not depend on the state"
    checksum = source.ask("/checksum")
    source.ask("/reset")
    assert source.answers(BEFORE) == expected[:BEFORE], "the program is not deterministic"

    snapshot = source.name.removeprefix("source-")
    said = fleet.capture(source, snapshot)
    figures["capture"] = {key: said[key] for key in ("paused_seconds", "total_seconds", "memory_bytes", "stored_bytes")}
    state = source.ask("/state")
    assert source.answers(AFTER) == expected[BEFORE:], "the source was changed by the capture"
    assert source.ask("/checksum") == checksum
    source.stop()

    copy = fleet.restore(f"copy-{snapshot}", source, snapshot)
    assert copy.ask("/state")["nonce"] == state["nonce"], "it is not the captured process"
    assert copy.answers(AFTER) == expected[BEFORE:], "the restored program goes on differently"
    assert copy.ask("/checksum") == checksum
    copy.ask("/reset")
    assert copy.answers(BEFORE + AFTER) == expected
    copy.stop()
