"""Which GPUs a spec gives a container."""

from __future__ import annotations

import copy
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rewarm.errors import Unfit
from rewarm.gpu import visible as wrapper
from rewarm_hooks.gpu_pairs import Gpu
from rewarm_hooks.gpu_visible import Unresolved, asks_for_gpus, device_at, majors, visible

MODEL, SIZE = "NVIDIA H100 80GB HBM3", 85520809984
# In PCI order, which is not that of the minor numbers.
INVENTORY = [
    Gpu("GPU-aa04c04b-0000-0000-0000-000000000000", MODEL, SIZE, 2),
    Gpu("GPU-ab04c04b-0000-0000-0000-000000000000", MODEL, SIZE, 0),
    Gpu("GPU-cc04c04b-0000-0000-0000-000000000000", MODEL, SIZE, 1),
]
DEVICES = """Character devices:
  1 mem
195 nvidia
195 nvidiactl
234 nvidia-caps
235 nvidia-caps-imex-channels
238 nvidia-uvm

Block devices:
195 nvidia-frontend
"""
HOOK = {"path": "/usr/bin/nvidia-container-runtime-hook", "args": ["nvidia-container-runtime-hook", "prestart"]}
Spec = dict[str, Any]


def char(path: str, major: int, minor: int) -> Spec:
    return {"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666, "uid": 0, "gid": 0}


def with_devices(*devices: Spec) -> Spec:
    return {"linux": {"devices": list(devices)}}


def with_env(*env: str, hook: Spec | None = HOOK, stage: str = "prestart") -> Spec:
    spec: Spec = {"process": {"env": list(env)}}
    return {**spec, "hooks": {stage: [hook]}} if hook else spec


def asked(value: str) -> Spec:
    return with_env("PATH=/bin", f"NVIDIA_VISIBLE_DEVICES={value}")


def bound(*mounts: tuple[str, str]) -> Spec:
    return {"mounts": [{"destination": to, "source": source, "options": ["rbind"]} for source, to in mounts]}


def minors(spec: Spec, **options: Any) -> list[int]:
    options = {"proc_devices": DEVICES, "device_at": lambda path: None, **options}
    seen = copy.deepcopy(spec)
    found = [gpu.minor for gpu in visible(spec, INVENTORY, **options)]
    assert spec == seen
    options.pop("mig_minors", None)
    assert asks_for_gpus(spec, **options) == bool(found)
    return found


def refused(spec: Spec, **options: Any) -> str:
    options = {"proc_devices": DEVICES, "device_at": lambda path: None, **options}
    with pytest.raises(Unresolved) as caught:
        visible(spec, INVENTORY, **options)
    options.pop("mig_minors", None)
    assert asks_for_gpus(spec, **options)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    return str(caught.value)


UTILITY = (char("/dev/nvidiactl", 195, 255), char("/dev/nvidia-modeset", 195, 254), char("/dev/nvidia-uvm", 238, 0))

GIVEN: dict[str, tuple[Spec, list[int]]] = {
    "nothing": ({}, []),
    "sections of other types": (
        {"linux": [], "mounts": {}, "process": "p", "hooks": [], "x": 1},
        [],
    ),
    "devices of other types": ({"linux": {"devices": [None, 3, {"type": "c", "major": "195", "minor": None}]}}, []),
    "devices": (with_devices(*UTILITY, char("/dev/nvidia2", 195, 2), char("/dev/nvidia0", 195, 0)), [0, 2]),
    "devices by another name": (with_devices(char("/dev/gpu", 195, 2), char("/dev/dri/x", 195, 1)), [1, 2]),
    "a device twice": (with_devices(char("/dev/nvidia1", 195, 1), char("/dev/again", 195, 1)), [1]),
    "a block device of that major": (with_devices({**char("/dev/nvidia1", 195, 1), "type": "b"}), []),
    "a device of another major": (with_devices(char("/dev/nvidia1", 238, 1)), []),
    "only what all containers get": (with_devices(*UTILITY), []),
    "MIG's own configuration": (
        with_devices(char("/dev/nvidia-caps/nvidia-cap1", 234, 1), char("/dev/nvidia-caps/nvidia-cap2", 234, 2)),
        [],
    ),
    "fabric management": (with_devices(char("/dev/nvidia-caps/nvidia-cap4323", 234, 4323)), []),
    "devices go before the variable": (
        {**asked("0"), **with_devices(char("/dev/nvidia1", 195, 1))},
        [1],
    ),
    "CDI: devices, its own hooks, and a void variable": (
        {
            **with_env(
                "NVIDIA_VISIBLE_DEVICES=void",
                hook={"path": "/usr/bin/nvidia-cdi-hook", "args": ["nvidia-cdi-hook", "update-ldcache"]},
                stage="createContainer",
            ),
            **with_devices(*UTILITY, char("/dev/nvidia1", 195, 1)),
        },
        [1],
    ),
    "all, and nobody who would add them": (with_env("NVIDIA_VISIBLE_DEVICES=all", hook=None), []),
    "CDI's hooks add no device": (
        with_env("NVIDIA_VISIBLE_DEVICES=all", hook={"path": "/usr/bin/nvidia-ctk"}, stage="createRuntime"),
        [],
    ),
    "a hook that is run too late to add any": (with_env("NVIDIA_VISIBLE_DEVICES=all", stage="poststop"), []),
    "a hook of the name in the path only": (
        with_env("NVIDIA_VISIBLE_DEVICES=all", hook={"path": "/opt/nvidia-container-runtime-hook/other"}),
        [],
    ),
    "all": (asked("all"), [0, 1, 2]),
    "all by a createRuntime hook": (with_env("NVIDIA_VISIBLE_DEVICES=all", stage="createRuntime"), [0, 1, 2]),
    "all by the operator's hook": (
        with_env("NVIDIA_VISIBLE_DEVICES=all", hook={"path": "/x/nvidia-container-runtime-hook.real"}),
        [0, 1, 2],
    ),
    "all by the hook's older name": (
        with_env("NVIDIA_VISIBLE_DEVICES=all", hook={"path": "/usr/bin/nvidia-container-toolkit"}),
        [0, 1, 2],
    ),
    "none": (asked("none"), []),
    "void": (asked("void"), []),
    "empty": (asked(""), []),
    "commas": (asked(" , ,"), []),
    "unset": (with_env("PATH=/bin"), []),
    "unset, in an image from before requirements": (with_env("CUDA_VERSION=9.2"), [0, 1, 2]),
    "unset, with requirements": (with_env("CUDA_VERSION=12.4", "NVIDIA_REQUIRE_CUDA=cuda>=12.4"), []),
    "void beats all": (asked("all,void,none"), []),
    "none beats all": (asked("0,all,none"), []),
    "all beats a list": (asked("0,all"), [0, 1, 2]),
    "set twice: the last": (with_env("NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_VISIBLE_DEVICES=0"), [2]),
    "an index is a place on the PCI bus": (asked("0"), [2]),
    "indices": (asked("2, 0,2"), [1, 2]),
    "UUID": (asked(INVENTORY[1].uuid), [0]),
    "UUID in capitals": (asked(INVENTORY[1].uuid.upper()), [0]),
    "the beginning of a UUID": (asked("GPU-ab,GPU-c"), [0, 1]),
    "CDI names": (asked("nvidia.com/gpu=0,nvidia.com/gpu=gpu1,nvidia.com/gpu=GPU-cc"), [0, 1, 2]),
    "CDI name made by the runtime": (asked("runtime.nvidia.com/gpu=1"), [0]),
    "CDI name of all": (asked("nvidia.com/gpu=all"), [0, 1, 2]),
    "a list in mounts": (
        {
            **asked("/var/run/nvidia-container-devices"),
            **bound(
                ("/dev/null", f"/var/run/nvidia-container-devices/{INVENTORY[0].uuid}"),
                ("/dev/null", "/var/run/nvidia-container-devices/cdi/nvidia.com/gpu/1"),
                ("/dev/zero", "/var/run/nvidia-container-devices/2"),
            ),
        },
        [0, 2],
    ),
}


@pytest.mark.parametrize(("spec", "expected"), GIVEN.values(), ids=GIVEN.keys())
def test_what_a_spec_gives(spec: Spec, expected: list[int]) -> None:
    assert minors(spec) == expected


REFUSED: dict[str, tuple[Spec, str]] = {
    "no such minor": (
        with_devices(char("/dev/nvidia7", 195, 7)),
        "GPU device /dev/nvidia7 with minor number 7, this node has 3 x NVIDIA H100 80GB HBM3 (85520809984 bytes): "
        "2 GPU-aa04c04b-",
    ),
    "no such index": (asked("3"), "GPU index 3, this node has 3 x"),
    "an index that is none": (asked("00"), "GPU 00, this node has"),
    "an index below zero": (asked("-1"), "GPU -1, this node has"),
    "an index without end": (asked("9" * 5000), "this node has"),
    "other digits": (asked("\u0661"), "GPU \u0661, this node has"),
    "no such UUID": (asked("GPU-ad"), "GPU GPU-ad, this node has"),
    "a UUID's beginning that fits two": (asked("GPU-a"), "GPU-a, which could be GPU-aa04c04b-"),
    "no name at all": (asked("GPU-"), "GPU GPU-, this node has"),
    "a PCI address": (asked("0000:3b:00.0"), "GPU 0000:3b:00.0, this node has"),
    "an escape": (asked("x\x1b[2J"), r"GPU x\x1b[2J, this node has"),
    "too many": (asked("0," * 5000), "lists 5000 names"),
    "another CDI class": (asked("nvidia.com/gds=all"), "nvidia.com/gds=all, which is no GPU"),
    "another CDI vendor": (asked("notnvidia.com/gpu=0"), "notnvidia.com/gpu=0, which is no GPU"),
    "CDI name of no GPU": (asked("nvidia.com/gpu=7"), "GPU index 7"),
    "MIG UUID": (asked("MIG-41b3359c-e721"), "names the MIG device MIG-41b3359c-e721"),
    "MIG UUID, the old form": (asked("MIG-GPU-41b3359c/1/0"), "names the MIG device"),
    "MIG by indices": (asked("0:0"), "names the MIG device 0:0"),
    "MIG by CDI": (asked("nvidia.com/gpu=0:1"), "names the MIG device nvidia.com/gpu=0:1"),
    "MIG by CDI's type and index": (asked("nvidia.com/gpu=mig0:1"), "names the MIG device nvidia.com/gpu=mig0:1"),
    "MIG by device nodes": (
        with_devices(char("/dev/nvidia0", 195, 0), char("/dev/nvidia-caps/nvidia-cap12", 234, 12)),
        "device /dev/nvidia-caps/nvidia-cap12 is of a MIG instance; the driver cannot checkpoint MIG devices",
    ),
    "MIG by device nodes of another name": (with_devices(char("/dev/x", 234, 12)), "device /dev/x is of a MIG"),
    "MIG by device nodes of another major": (
        with_devices(char("/dev/nvidia-caps/nvidia-cap12", 511, 12)),
        "is of a MIG instance",
    ),
}


@pytest.mark.parametrize(("spec", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(spec: Spec, message: str) -> None:
    assert message in refused(spec)


@pytest.mark.parametrize("spec", [asked("all"), asked("1"), with_devices(char("/dev/nvidia0", 195, 0))])
def test_a_gpu_in_mig_mode(spec: Spec) -> None:
    message = refused(spec, mig_minors={0})
    assert f"{INVENTORY[1].uuid} (/dev/nvidia0) is in MIG mode; the driver cannot checkpoint MIG devices" in message
    assert minors(asked("0"), mig_minors={0}) == [2]


def test_the_cdi_name_of_none() -> None:
    spec = asked("runtime.nvidia.com/gpu=none")
    assert visible(spec, INVENTORY) == ()
    assert asks_for_gpus(spec)


def test_an_nvidia_runtime_below() -> None:
    spec = with_env("NVIDIA_VISIBLE_DEVICES=all", hook=None)
    assert minors(spec, low_level="/usr/bin/nvidia-container-runtime") == [0, 1, 2]
    assert minors(spec, low_level="/opt/nvidia/bin/runc") == []
    assert minors(with_env(hook=None), low_level="nvidia-container-runtime") == []


def test_nodes_without_any_gpu() -> None:
    with pytest.raises(Unresolved, match="minor number 0, this node has none"):
        visible(with_devices(char("/dev/nvidia0", 195, 0)), [])
    assert visible(asked("all"), []) == ()


def test_bind_mounted_device_nodes() -> None:
    there = {"/dev/nvidia2": (195, 2), "/node/link": (195, 1), "/dev/nvidiactl": (195, 255), "/dev/null": (1, 3)}
    spec = bound(
        *((path, path) for path in ("/dev/nvidia2", "/dev/nvidiactl", "/dev/null", "/etc/hosts")),
        ("/node/link", "/dev/gpu"),
    )
    assert minors(spec, device_at=there.get) == [1, 2]
    spec["mounts"].append({"destination": "/dev/nvidia0", "type": "bind", "source": "/dev/nvidia0"})
    assert minors(spec, device_at={**there, "/dev/nvidia0": (195, 0)}.get) == [0, 1, 2]
    tmpfs = {"mounts": [{"destination": "/dev/nvidia2", "type": "tmpfs", "source": "/dev/nvidia2"}, {}, 3]}
    assert minors(tmpfs, device_at=there.get) == []
    mig = bound(("/dev/nvidia-caps/nvidia-cap3", "/dev/nvidia-caps/nvidia-cap3"))
    assert "MIG" in refused(mig, device_at={"/dev/nvidia-caps/nvidia-cap3": (234, 3)}.get)


def test_majors() -> None:
    assert majors(DEVICES, "nvidia", "nvidia-frontend") == {195}
    assert majors("Character devices:\n400 nvidia-frontend\n", "nvidia", "nvidia-frontend") == {400}
    assert majors("", "nvidia") == majors("nvidia\nx nvidia\n", "nvidia") == frozenset()
    moved = "Character devices:\n400 nvidia\n"
    assert minors(with_devices(char("/dev/nvidia0", 400, 0)), proc_devices=moved) == [0]
    assert minors(with_devices(char("/dev/nvidia0", 195, 0)), proc_devices=moved) == []
    assert minors(with_devices(char("/dev/nvidia0", 195, 0)), proc_devices="") == [0]


@pytest.mark.skipif(os.geteuid() != 0, reason="making device nodes needs root")
def test_device_nodes_of_this_machine(tmp_path: Path) -> None:
    node, link = tmp_path / "node", tmp_path / "link"
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(195, 1))
    link.symlink_to(node)
    assert device_at(str(node)) == device_at(str(link)) == (195, 1)
    assert device_at(str(tmp_path)) is device_at(str(tmp_path / "no")) is device_at("a\0b") is None
    spec = bound((str(link), "/dev/nvidia0"))
    assert asks_for_gpus(spec)
    assert [gpu.minor for gpu in visible(spec, INVENTORY)] == [1]


def test_with_rewarm_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert wrapper.asks_for_gpus(asked("all")) and not wrapper.asks_for_gpus({})
    assert [gpu.minor for gpu in wrapper.visible(asked("all"), INVENTORY)] == [0, 1, 2]
    with pytest.raises(Unfit) as caught:
        wrapper.visible(asked("MIG-1"), INVENTORY)
    assert caught.value.next_step
    assert str(caught.value).startswith("find GPUs of this container: NVIDIA_VISIBLE_DEVICES names the MIG device")
    (tmp_path / "devices").write_text("Character devices:\n400 nvidia\n")
    for path, found in ((tmp_path / "devices", False), (tmp_path / "none", True)):
        monkeypatch.setattr(wrapper, "_DEVICES", str(path))
        assert wrapper.asks_for_gpus(with_devices(char("/dev/nvidia0", 195, 0))) is found


def test_the_wrapper_imports_nothing_until_it_is_asked() -> None:
    code = "import sys, rewarm.gpu.visible; print([name for name in sys.modules if name.startswith('rewarm_hooks')])"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert done.stdout == "[]\n"
