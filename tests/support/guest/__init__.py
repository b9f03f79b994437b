"""A virtual machine: another kernel, systemd, one cgroup v2 tree, and root with all its capabilities.

What the machine that runs the tests has not: it may be a container, or have cgroups of version 1. The guest has the
machine's own file system (read-only, what it writes is kept in its memory), so that what is installed or built here is
there as well, at the same paths. Its processor is emulated (QEMU without KVM), which takes some ten times as long.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from support import rootfs

_MEMORY = 6144  # MiB, of which 3 GiB may be in /guest-tmp


def run(directory: Path, script: str, *, timeout: float) -> str:
    """Boot a guest, run a bash script in it as root, and power it off; what the script has written to its streams.

    The guest's /guest is `directory`, which is made. /guest-tmp is in memory, as /run is, and empty; changes of other
    files are gone with the guest. Raises AssertionError if it does not end by itself within `timeout` seconds.
    """
    directory.mkdir()
    (directory / "run").write_text(script)
    kernel = rootfs.layer("kernel")
    shares = [("machine", "/", ",readonly=on"), ("guest", directory, "")]
    # However this process ends, with it: qemu would go on with the guest's memory for as long as the script runs.
    words: list[str | Path] = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
    words += ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]
    words += ["-m", str(_MEMORY), "-nodefaults", "-nographic", "-no-reboot", "-device", "virtio-rng-pci"]
    words += ["-serial", f"file:{directory}/console", "-kernel", kernel / "vmlinuz", "-initrd", kernel / "initrd"]
    words += ["-append", "console=ttyS0 panic=-1 quiet systemd.show_status=no"]
    for name, path, more in shares:
        words += ["-virtfs", f"local,path={path},mount_tag={name},security_model=none,multidevs=remap{more}"]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the guest did not end within {timeout:g} s\n{_said(directory)}") from None
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{_said(directory)}"
    return _said(directory)


def _said(directory: Path) -> str:
    files = (directory / name for name in ("console", "output"))
    return "".join(file.read_text(errors="replace")[-20_000:] for file in files if file.exists())
