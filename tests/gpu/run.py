"""Installs rewarm out of what carry.sh gathered and runs tests/gpu: run.py CARRIED OUT [pytest arguments]

Everything lies in one temporary directory, which is removed, with its mounts. REWARM_GPU_SECONDS: 520. With
REWARM_GPU_FAKE=1, REWARM_TEST_PREFIX and REWARM_TEST_ROOTFS are used as they are and CARRIED is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.memory16 import install, say, touch
from support.bundle import unmount_below
from support.proc import command

TESTS = Path(__file__).resolve().parents[1]
SECONDS = "520"
TOUCH_GIB = 40


def main() -> int:
    carried, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    seconds = float(os.environ.setdefault("REWARM_GPU_SECONDS", SECONDS))
    directory = Path(tempfile.mkdtemp(prefix="rewarm-gpu-", dir="/var/tmp"))
    env = {**os.environ, "REWARM_GPU_REPORT": str(out / "gpu-tests.json"), "PYTHONUNBUFFERED": "1"}
    try:
        if env.get("REWARM_GPU_FAKE") != "1":
            prefix = directory / "prefix"
            (directory / "rootfs").mkdir()
            # A file system of its own: overlayfs refuses a layer that lies inside another, and the lowest is all of /.
            command("mount", "-t", "tmpfs", "tmpfs", directory / "rootfs")
            install(carried, prefix)
            env |= {
                "REWARM_TEST_PREFIX": str(prefix),
                "REWARM_TEST_ROOTFS": str(directory / "rootfs"),
                "PATH": f"{prefix}/bin:{env['PATH']}",
            }
            say("installed")
            touch(TOUCH_GIB)
        words = [sys.executable, "-u", "-m", "pytest", "-v", "--capture=no", "-p", "no:cacheprovider", "--tb=short"]
        words += ["--basetemp", str(directory / "pytest"), str(TESTS / "gpu"), *sys.argv[3:]]
        process = subprocess.Popen(words, env=env, cwd=TESTS.parent)
        try:
            # A test that has begun is let end; then the containers are taken away.
            return process.wait(seconds + 60)
        except subprocess.TimeoutExpired:
            say("time is up: pytest is ended")
            process.terminate()
            return process.wait(30)
    finally:
        unmount_below(directory)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
