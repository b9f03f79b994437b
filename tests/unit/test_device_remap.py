"""The device-remap hook: its record, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rewarm_hooks
from rewarm_hooks.device_remap import main
from rewarm_hooks.gpu_pairs import Gpu, as_objects

MODEL, SIZE = "NVIDIA H100 80GB HBM3", 85520809984
STATE = {"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 12, "bundle": "/b", "annotations": {"a": "b"}}
UNKNOWN = "GPU-????????-????-????-????-????????????"


def gpu(name: str, minor: int, model: str = MODEL) -> Gpu:
    return Gpu(f"GPU-{name}", model, SIZE, minor)


class Call:
    """A bundle, a /proc and the hook's files in a directory; `run` runs the hook in this process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.record = directory / "out" / "map.json"
        self.arguments = []
        for name in ("bundle", "out", "proc/driver/nvidia/gpus"):
            (directory / name).mkdir(parents=True)
        for option in ("sources", "node"):
            self.arguments += [f"--{option}", str(directory / f"{option}.json")]
        self.arguments += ["--record", str(self.record)]
        (directory / "proc" / "devices").write_text("Character devices:\n195 nvidia\n234 nvidia-caps\n")
        self.sources()
        self.node()
        self.spec()

    def sources(self, *gpus: Gpu) -> None:
        (self.directory / "sources.json").write_text(json.dumps(as_objects(gpus)))

    def node(self, *gpus: Gpu, mig: tuple[int, ...] = ()) -> None:
        entries = [{**entry, "mig": entry["minor"] in mig} for entry in as_objects(gpus)]
        (self.directory / "node.json").write_text(json.dumps(entries))
        for at, one in enumerate(gpus):
            self.driver(at, one.uuid, one.minor)

    def driver(self, at: int, uuid: str, minor: int) -> None:
        """What /proc says of the GPU at a place of the PCI bus, with driver 580."""
        directory = self.directory / "proc/driver/nvidia/gpus" / f"0000:0{at}:00.0"
        directory.mkdir(exist_ok=True)
        (directory / "information").write_text(
            f"Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 71\nGPU UUID: \t {uuid}\nVideo BIOS: \t 96.00.99.00.01\n"
            f"Bus Type: \t PCIe\nBus Location: \t 0000:0{at}:00.0\nDevice Minor: \t {minor}\nGPU Firmware: \t 580\n"
        )

    def spec(self, *minors: int, **more: Any) -> None:
        devices = [{"path": f"/dev/nvidia{n}", "type": "c", "major": 195, "minor": n} for n in (*minors, 255)]
        (self.directory / "bundle" / "config.json").write_text(json.dumps({"linux": {"devices": devices}, **more}))

    def state(self) -> bytes:
        return json.dumps({**STATE, "bundle": str(self.directory / "bundle")}).encode()

    def run(self, *more: str, state: bytes | None = None) -> int:
        stdin = io.BytesIO(self.state() if state is None else state)
        return main([*self.arguments, *more], stdin, str(self.directory / "proc"))

    def devices(self, *more: str) -> list[dict[str, Any]]:
        assert self.run(*more) == 0
        record = json.loads(self.record.read_text())
        assert record.pop("version") == 1
        return list(record.pop("devices"))


@pytest.fixture
def call(tmp_path: Path) -> Call:
    return Call(tmp_path)


def test_the_record(call: Call) -> None:
    hooks = str(Path(rewarm_hooks.__file__).parent.parent)
    start = f"""import sys, runpy; sys.path.insert(0, {hooks!r})
runpy.run_module('rewarm_hooks.device_remap', run_name='__main__')"""
    command = [sys.executable, "-I", "-c", start, *call.arguments]
    done = subprocess.run(command, input=call.state(), capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert json.loads(call.record.read_text()) == {"version": 1, "devices": []}
    assert os.listdir(call.record.parent) == ["map.json"]
    assert call.record.stat().st_mode & 0o777 == 0o600


def test_it_imports_little() -> None:
    """It stands in the path of every restore onto a GPU."""
    hooks = str(Path(rewarm_hooks.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {hooks!r}); import rewarm_hooks.device_remap; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    found = set(done.stdout.split())
    assert "rewarm_hooks.gpu_visible" in found
    assert not found & {"typing", "dataclasses", "pathlib", "argparse", "subprocess", "tempfile", "glob", "rewarm"}


def test_a_record_is_replaced_as_a_whole(call: Call) -> None:
    call.record.write_text("x" * 1000)
    assert call.devices() == []


def test_the_same_gpus(call: Call) -> None:
    both = gpu("a", 0), gpu("b", 1)
    call.sources(*both[::-1])
    call.node(*both)
    call.spec(0, 1)
    assert call.devices() == []


def test_another_gpu(call: Call) -> None:
    call.sources(gpu("a", 0))
    call.node(gpu("c", 4), gpu("b", 3))
    call.spec(3)
    assert call.devices() == [{"source": "GPU-a", "target": "GPU-b", "source_minor": 0, "target_minor": 3}]


def test_one_of_two_moves_and_both_are_named(call: Call) -> None:
    call.sources(gpu("x", 0), gpu("y", 1))
    call.node(gpu("z", 0), gpu("x", 1), gpu("other", 2))
    call.spec(0, 1)
    assert call.devices() == [
        {"source": "GPU-x", "target": "GPU-x", "source_minor": 0, "target_minor": 1},
        {"source": "GPU-y", "target": "GPU-z", "source_minor": 1, "target_minor": 0},
    ]


def test_a_gpu_that_nobody_has_used_yet_shows_no_uuid(call: Call) -> None:
    call.sources(gpu("a", 0))
    call.node(gpu("b", 0))
    call.driver(0, UNKNOWN, 0)
    call.spec(0)
    assert [entry["target"] for entry in call.devices()] == ["GPU-b"]


def test_the_spec_as_the_hooks_before_have_left_it(call: Call) -> None:
    call.sources(gpu("a", 0))
    call.node(gpu("b", 0), gpu("c", 1))
    hook = {"path": "/usr/bin/nvidia-container-runtime-hook"}
    call.spec(process={"env": ["NVIDIA_VISIBLE_DEVICES=1"]}, hooks={"prestart": [hook]})
    assert [entry["target"] for entry in call.devices()] == ["GPU-c"]
    call.spec(0, process={"env": ["NVIDIA_VISIBLE_DEVICES=1"]}, hooks={"prestart": [hook]})
    assert [entry["target"] for entry in call.devices()] == ["GPU-b"]


def test_the_runtime_below(call: Call) -> None:
    call.sources(gpu("a", 0))
    call.node(gpu("b", 0), gpu("c", 1))
    call.spec(process={"env": ["NVIDIA_VISIBLE_DEVICES=GPU-c"]})
    assert call.run() == 1
    assert [entry["target"] for entry in call.devices("--low-level", "/usr/bin/nvidia-container-runtime")] == ["GPU-c"]


def refuse(call: Call, capsys: pytest.CaptureFixture[str], *arguments: str, state: bytes | None = None) -> str:
    assert call.run(*arguments, state=state) == 1
    message = capsys.readouterr().err
    assert message.startswith("device-remap: ") and message.count("\n") == 1 and message[:-1].isprintable()
    assert os.listdir(call.record.parent) == []
    return message


def test_gpus_that_cannot_be_paired(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    call.sources(gpu("a", 0), gpu("b", 1))
    call.node(gpu("c", 0), gpu("d", 1, "NVIDIA A100"))
    call.spec(0)
    assert refuse(call, capsys) == (
        f"device-remap: GPUs: snapshot needs 2 x {MODEL} ({SIZE} bytes), this container has 1\n"
    )
    call.spec(0, 1)
    assert f"this container has 1, and 1 x NVIDIA A100 ({SIZE} bytes)" in refuse(call, capsys)
    call.spec(7)
    assert "GPUs: this container is given GPU device /dev/nvidia7 with minor number 7" in refuse(call, capsys)
    call.sources()
    call.spec(0)
    assert "snapshot needs no GPU, this container has 1 x" in refuse(call, capsys)


def test_mig(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    call.sources(gpu("a", 0))
    call.node(gpu("b", 0), gpu("c", 1), mig=(1,))
    call.spec(1)
    assert "GPU-c (/dev/nvidia1) is in MIG mode; the driver cannot checkpoint MIG devices" in refuse(call, capsys)
    call.spec(0)
    assert [entry["target"] for entry in call.devices()] == ["GPU-b"]


def test_a_node_that_has_changed(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    call.sources(gpu("a", 0))
    call.node(gpu("b", 0))
    call.spec(0)
    call.driver(0, "GPU-z", 0)
    assert "GPUs: minor number 0 is GPU-z, NVML said GPU-b" in refuse(call, capsys)
    call.driver(0, "GPU-b", 1)
    assert "the driver has no GPU with minor number 0, NVML said GPU-b" in refuse(call, capsys)
    (call.directory / "proc/driver/nvidia/gpus/0000:00:00.0/information").unlink()
    assert "the driver has no GPU with minor number 0" in refuse(call, capsys)
    (call.directory / "proc/driver").rename(call.directory / "gone")
    assert call.devices() == [{"source": "GPU-a", "target": "GPU-b", "source_minor": 0, "target_minor": 0}]
    call.sources()
    call.spec()
    assert call.devices() == []


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "no sources": ("sources.json", b"", "sources.json: empty"),
    "sources cut off": ("sources.json", b'[{"uuid"', "sources.json: not JSON"),
    "sources without end": ("sources.json", b"[" * 200_000, "sources.json: not JSON"),
    "sources too long": ("sources.json", b" " * (1 << 20) + b"[]", "sources.json: more than 1048576 bytes"),
    "sources that are no list": ("sources.json", b"{}", "GPUs: snapshot: not a list of GPUs"),
    "sources that are no GPUs": ("sources.json", b'[{"uuid": "MIG-1"}]', "GPUs: snapshot: MIG-1 is no GPU's UUID"),
    "a source twice": (
        "sources.json",
        json.dumps(as_objects([gpu("a", 0), gpu("a", 1)])).encode(),
        "GPUs: snapshot: GPU-a is listed twice",
    ),
    "a node that is no list": ("node.json", b'"x"', "GPUs: node: not a list of GPUs"),
    "a node of numbers": ("node.json", b"[1]", "GPUs: node: an entry that is not an object"),
    "no spec": ("bundle/config.json", b"", "config.json: empty"),
    "a spec that is no JSON": ("bundle/config.json", b"\xff", "config.json: not JSON"),
    "a spec that is a list": ("bundle/config.json", b"[]", "config.json: not a JSON object"),
}


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_files_that_are_no_good(
    call: Call, capsys: pytest.CaptureFixture[str], name: str, text: bytes, message: str
) -> None:
    (call.directory / name).write_bytes(text)
    assert message in refuse(call, capsys)


@pytest.mark.parametrize("name", ["sources.json", "node.json", "bundle/config.json"])
def test_files_that_are_missing_or_none(call: Call, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (call.directory / name).unlink()
    assert f"{name.rpartition('/')[2]}: No such file or directory" in refuse(call, capsys)
    os.mkfifo(call.directory / name)
    assert "empty" in refuse(call, capsys)
    (call.directory / name).unlink()
    (call.directory / name).mkdir()
    assert "Is a directory" in refuse(call, capsys)


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
def test_states_that_are_none(call: Call, capsys: pytest.CaptureFixture[str], state: bytes, cause: str) -> None:
    message = refuse(call, capsys, state=state)
    assert message.startswith("device-remap: container state: ")
    assert cause in message


@pytest.mark.parametrize("bundle", ["/b\0", "\ud800", "/nowhere"])
def test_bundles_that_are_none(call: Call, capsys: pytest.CaptureFixture[str], bundle: str) -> None:
    refuse(call, capsys, state=json.dumps({**STATE, "bundle": bundle}).encode())


GOOD = ["--sources", "a", "--node", "b", "--record", "c"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        GOOD[:4],
        GOOD[:5],
        [*GOOD[:5], ""],
        [*GOOD, "--map", "x"],
        [*GOOD, "--record", "x"],
        [*GOOD, "--low-level"],
        [*GOOD, "--low-level", ""],
        [*GOOD, "x"],
    ],
)
def test_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments, io.BytesIO(json.dumps(STATE).encode())) == 1
    assert capsys.readouterr().err == (
        "device-remap: arguments: --sources, --node, --record are needed, --low-level may be, each once with a value\n"
    )


def test_a_record_that_cannot_be_written(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    call.record.mkdir()
    assert call.run() == 1
    assert "map.json: writing the record" in capsys.readouterr().err
    assert os.listdir(call.record.parent) == ["map.json"]
    call.record.rmdir()
    call.record.parent.rmdir()
    assert call.run() == 1
    assert "writing the record: No such file or directory" in capsys.readouterr().err
