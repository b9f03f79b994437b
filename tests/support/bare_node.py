"""A node for the installer: this machine's files in a mount namespace of its own, without network and compiler."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from types import TracebackType

_SCRIPT = r"""
set -eu
scratch=$1
ip link set lo up
mount -t tmpfs tmpfs "$scratch"
for directory in /opt /etc /usr/local /var/lib; do
    upper=$scratch/upper$directory work=$scratch/work$directory
    mkdir -p "$upper" "$work"
    mount -t overlay overlay -o "lowerdir=$directory,upperdir=$upper,workdir=$work" "$directory"
done
mount -t tmpfs tmpfs /run
rm -rf /opt/rewarm /etc/rewarm /var/lib/rewarm /usr/local/bin/rewarm /usr/local/sbin/rewarm-runc
mkdir -p /etc/containerd /run/systemd/system
printf 'version = 2\n' >/etc/containerd/config.toml
printf '#!/bin/sh\necho "$@" >>/run/systemctl.log\n' >/usr/local/bin/systemctl
chmod +x /usr/local/bin/systemctl
# No compiler and no pip: what is not executable is not found.
for program in gcc cc make; do
    if [ -e "/usr/bin/$program" ]; then mount --bind /dev/null "$(readlink -f "/usr/bin/$program")"; fi
done
mkdir "$scratch/empty"
for package in /usr/lib/python3*/ensurepip /usr/share/python-wheels; do
    if [ -d "$package" ]; then mount --bind "$scratch/empty" "$package"; fi
done
echo ready
exec sleep infinity
"""


class BareNode:
    """`pid` is a process of the node. Whatever is changed there is gone with it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        words = ["unshare", "--mount", "--net", "--uts", "--propagation", "private"]
        self._process = subprocess.Popen(
            [*words, "bash", "-c", _SCRIPT, "node", str(directory)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.stop()
            raise RuntimeError("the node's namespaces could not be set up; see standard error")
        self.pid = self._process.pid

    def __enter__(self) -> BareNode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def argv(self, *words: str | Path) -> list[str]:
        """The command line that runs a command there."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--net", "--", *map(str, words)]

    def run(self, *words: str | Path) -> str:
        """What it prints. Raises AssertionError with its words when it fails."""
        done = subprocess.run(self.argv(*words), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> set[int]:
        """Whatever is in its mount namespace."""
        own, found = os.readlink(f"/proc/{self.pid}/ns/mnt"), set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns/mnt") == own:
                    found.add(int(entry.name))
        return found

    def exists(self, path: str) -> bool:
        return subprocess.run(self.argv("test", "-e", path), timeout=60).returncode == 0

    def read(self, path: str) -> str:
        return self.run("cat", path)

    def write(self, path: str, text: str) -> None:
        words = self.argv("sh", "-c", 'mkdir -p "${1%/*}" && cat >"$1"', "sh", path)
        subprocess.run(words, input=text, text=True, check=True, timeout=60)
