"""The checks of `rewarm doctor` of kernel and programs, each well and unwell."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from rewarm import checks, doctor, doctor_kernel, doctor_programs
from rewarm import node as facts
from rewarm.checks import FAILED, OK, WARNING, Node
from support.nodes import program, says, well, with_settings


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return well(tmp_path)


# The kernel


def test_rights(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(doctor_kernel, "_status", lambda key: "000001ffffffffff")
    says(doctor_kernel.rights(node), OK)
    monkeypatch.setattr(doctor_kernel, "_status", lambda key: "00000000a80425fb")  # a container's default set
    says(doctor_kernel.rights(node), FAILED, "CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN", "privileged")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    says(doctor_kernel.rights(node), FAILED, "user 1000", "as root")


def test_capabilities_are_read_from_the_kernel() -> None:
    assert int(doctor_kernel._status("CapEff"), 16) <= int(doctor_kernel._status("CapBnd"), 16)


def test_kernel_features(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    says(doctor_kernel.features(node), OK, facts.kernel())
    monkeypatch.setattr(doctor_kernel, "_words", lambda path: ["allow"])
    monkeypatch.setattr(doctor_kernel, "_has_namespace", lambda kind: kind != "ipc")
    says(doctor_kernel.features(node), FAILED, "CONFIG_SECCOMP_FILTER", "ipc namespaces")


def test_a_kernel_without_time_namespaces(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_kernel, "_has_namespace", lambda kind: kind != "time")
    says(doctor_kernel.features(node), WARNING, "CLOCK_MONOTONIC may go back", "CONFIG_TIME_NS")


def test_kernel_that_protects_read_only_memory(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", refuse)
    says(doctor_kernel.features(node), FAILED, "/proc/PID/mem (boot parameter proc_mem.force_override)")


def test_overlay(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_kernel, "_words", lambda path: ["nodev", "overlay"])
    says(doctor_kernel.overlay(node), OK)
    monkeypatch.setattr(doctor_kernel, "_words", lambda path: ["ext4"])
    says(doctor_kernel.overlay(node), WARNING, "modprobe overlay")


V1 = [("tmpfs", "/sys/fs/cgroup", ["rw"]), ("cgroup", "/sys/fs/cgroup/freezer", ["rw", "freezer"])]


@pytest.mark.parametrize(
    ("version", "kernel", "mounts", "status", "text"),
    [
        (2, "5.10.0", [], OK, "v2"),
        (2, "4.19.0", [], FAILED, "Linux 5.2"),
        (1, "5.10.0", V1, OK, "v1, with freezer at /sys/fs/cgroup/freezer"),
        (1, "5.10.0", [*V1, ("cgroup2", "/sys/fs/cgroup/unified", ["rw"])], OK, "v1 (hybrid)"),
        (1, "5.10.0", [("cgroup", "/sys/fs/cgroup/pids", ["rw", "pids"])], FAILED, "v1, without freezer"),
        (1, "5.10.0", [], FAILED, "none is mounted"),
    ],
)
def test_cgroups(
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    kernel: str,
    mounts: list[tuple[str, str, list[str]]],
    status: str,
    text: str,
) -> None:
    monkeypatch.setattr(facts, "cgroup_version", lambda: version)
    monkeypatch.setattr(facts, "kernel", lambda: kernel)
    monkeypatch.setattr(doctor_kernel, "_cgroup_mounts", lambda: mounts)
    says(doctor_kernel.cgroups(node), status, text)


def test_cgroup_mounts_are_read_from_the_kernel() -> None:
    assert all(kind.startswith("cgroup") and place.startswith("/") for kind, place, _ in doctor_kernel._cgroup_mounts())


# Programs


@pytest.mark.parametrize(
    ("script", "status", "text"),
    [
        ("echo runc version 1.1.5", OK, "1.1.5"),
        ("echo runc version 1.0.3", FAILED, "runc 1.1 or newer"),
        ("echo crun version 1.8.1", FAILED, "no hooks"),
        ("echo cannot load library; exit 127", FAILED, "cannot load library"),
        ("exit 0", FAILED, "0.0.0"),
    ],
)
def test_runc(node: Node, tmp_path: Path, script: str, status: str, text: str) -> None:
    binary = program(tmp_path / "other", script)
    says(doctor_programs.runc(with_settings(node, runtimes=(binary,))), status, text, binary if status == OK else "")


def test_no_runc_at_all(node: Node) -> None:
    found = {check.name: check for check in doctor.examine(with_settings(node, runtimes=("no-such-runc",)))}
    says(found["runc"], FAILED, "no-such-runc", "install runc")


@pytest.mark.parametrize(
    ("kernel", "script", "status", "text"),
    [
        ("6.1.0", "echo Version: 4.1.1", OK, "4.1.1"),
        ("6.18.2", "echo Version: 4.2", OK, "4.2.0"),
        ("6.18.2", "echo Version: 4.1.1", FAILED, "inet sockets"),
        ("6.1.0", "echo Version: 3.17.1", FAILED, "needs 4.1.1"),
        ("6.1.0", "echo error while loading shared libraries >&2; exit 127", FAILED, "shared libraries"),
    ],
)
def test_criu(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, script: str, status: str, text: str
) -> None:
    monkeypatch.setattr(facts, "kernel", lambda: kernel)
    binary = program(tmp_path / "other", script)
    says(doctor_programs.criu(with_settings(node, criu=binary)), status, text)


def test_no_criu(node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    says(doctor_programs.criu(with_settings(node, criu="/no/criu")), FAILED, "No such file", "install.sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(facts, "criu_binary", lambda settings: "")
    says(doctor_programs.criu(node), FAILED, "not found", "install.sh")
    says(doctor_programs.criu_check(node), FAILED, "no CRIU")


def test_criu_check(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(doctor_programs.criu_check(node), OK, "Looks good.")
    broken = with_settings(node, criu=program(tmp_path / "other", "echo Warn; echo Error: no map_files; exit 1"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    says(doctor_programs.criu_check(broken), FAILED, "Error: no map_files")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    says(doctor_programs.criu_check(broken), WARNING, "as root")


def test_a_program_that_does_not_end(tmp_path: Path) -> None:
    assert checks.ask([program(tmp_path / "slow", "exec sleep 30")], timeout=0.1) == (-1, "no answer within 0 s")


def test_helpers(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tar", "gzip", "ip", "nsenter"):
        program(tmp_path / "path" / name, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    says(doctor_programs.helpers(node), OK)
    (tmp_path / "path" / "ip").unlink()
    (tmp_path / "path" / "tar").unlink()
    says(doctor_programs.helpers(node), FAILED, "tar, ip", "apt-get install tar iproute2")


HOOK = "lib/rewarm-hooks/rewarm_hooks/workload.py"


@pytest.mark.parametrize("part", ["bin/rewarm-runc", "libexec/rewarm-guard", "venv/bin/python3", HOOK])
def test_installation(node: Node, part: str) -> None:
    says(doctor_programs.installation(node), OK, node.prefix)
    path = Path(node.prefix, part)
    path.unlink()
    says(doctor_programs.installation(node), FAILED, str(path), "is not there", "install.sh")


def test_installation_without_the_compiled_module(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rewarm_native.process", None)
    says(doctor_programs.installation(node), FAILED, "rewarm_native.process")
