"""tests/support/guest, with a program in the place of qemu."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.proc import wait_for

TESTS = Path(__file__).parents[1]
CODE = f"""\
import sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from support import guest
guest.run(Path(sys.argv[1], "guest"), "", timeout=600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_machine_ends_with_its_test(tmp_path: Path, number: signal.Signals) -> None:
    """A CI job that is cancelled would leave it with 6 GiB of the machine's memory."""
    (tmp_path / "rootfs/kernel").mkdir(parents=True)
    (tmp_path / "rootfs/.kernel.stamp").touch()
    pid = tmp_path / "pid"
    qemu = tmp_path / "qemu-system-x86_64"
    qemu.write_text(f"#!/bin/sh\necho $$ >{pid}.new && mv {pid}.new {pid} && exec sleep 600\n")
    qemu.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REWARM_TEST_ROOTFS": str(tmp_path / "rootfs")}
    with subprocess.Popen([sys.executable, "-c", CODE, tmp_path], env={**os.environ, **variables}) as test:
        try:
            wait_for("the machine's start", pid.exists)
            machine = os.pidfd_open(int(pid.read_text()))
        finally:
            test.send_signal(number)
    try:
        assert select.select([machine], [], [], 10)[0], "it goes on"
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(machine, signal.SIGKILL)
        os.close(machine)
