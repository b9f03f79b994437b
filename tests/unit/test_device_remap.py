"""The device-remap hook: its record, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rewarm_hooks
from rewarm_hooks.device_remap import main

STATE = {"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 12, "bundle": "/b", "annotations": {"a": "b"}}


def test_the_record(tmp_path: Path) -> None:
    hooks = str(Path(rewarm_hooks.__file__).parent.parent)
    start = f"""import sys, runpy; sys.path.insert(0, {hooks!r})
runpy.run_module('rewarm_hooks.device_remap', run_name='__main__')"""
    command = [sys.executable, "-I", "-c", start, "--record", str(tmp_path / "map.json")]
    done = subprocess.run(command, input=json.dumps(STATE), capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((tmp_path / "map.json").read_text()) == {"version": 1, "devices": []}
    assert os.listdir(tmp_path) == ["map.json"]
    assert (tmp_path / "map.json").stat().st_mode & 0o777 == 0o600


def test_a_record_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text("x" * 1000)
    assert main(["--record", str(tmp_path / "map.json")], io.BytesIO(json.dumps(STATE).encode())) == 0
    assert json.loads((tmp_path / "map.json").read_text()) == {"version": 1, "devices": []}


BAD_STATES = {
    "empty": (b"", "not JSON"),
    "cut off": (b'{"id":', "not JSON"),
    "not text": (b"\xff\xfe", "not JSON"),
    "nested without end": (b"[" * 200_000, "not JSON"),
    "a list": (b"[]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "no id": (json.dumps({**STATE, "id": None}).encode(), "'id'"),
    "empty id": (json.dumps({**STATE, "id": ""}).encode(), "'id'"),
    "bundle of another type": (json.dumps({**STATE, "bundle": ["/b"]}).encode(), "'bundle'"),
    "no version": (json.dumps({"id": "c", "bundle": "/b"}).encode(), "'ociVersion'"),
    "too long": (b" " * (16 << 20) + b"{}", "more than"),
}


@pytest.mark.parametrize(("state", "cause"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_states_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], state: bytes, cause: str) -> None:
    assert main(["--record", str(tmp_path / "map.json")], io.BytesIO(state)) == 1
    message = capsys.readouterr().err
    assert message.startswith("device-remap: container state: ")
    assert cause in message
    assert message.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [[], ["--record"], ["--record", ""], ["--map", "x"], ["--record", "x", "y"]])
def test_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments, io.BytesIO(json.dumps(STATE).encode())) == 1
    assert capsys.readouterr().err == "device-remap: arguments: --record FILE is needed, and nothing else\n"


def test_a_record_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--record", str(tmp_path / "nowhere/map.json")], io.BytesIO(json.dumps(STATE).encode())) == 1
    assert "writing the record: No such file or directory" in capsys.readouterr().err
    (tmp_path / "map.json").mkdir()
    assert main(["--record", str(tmp_path / "map.json")], io.BytesIO(json.dumps(STATE).encode())) == 1
    assert "map.json: writing the record" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["map.json"]
