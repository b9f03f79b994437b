"""A node for the installer: this machine's files in a mount namespace of its own, without network and compiler."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType

from support.proc import descendants

_SCRIPT = r"""
set -eu
scratch=$1 containerd=$2
ip link set lo up
mount -t tmpfs tmpfs "$scratch"
for directory in /opt /etc /usr/local /var/lib; do
    upper=$scratch/upper$directory work=$scratch/work$directory
    mkdir -p "$upper" "$work"
    mount -t overlay overlay -o "lowerdir=$directory,upperdir=$upper,workdir=$work" "$directory"
done
mount -t tmpfs tmpfs /run
rm -rf /opt/rewarm /etc/rewarm /var/lib/rewarm /usr/local/bin/rewarm /usr/local/sbin/rewarm-runc
rm -rf /etc/containerd /etc/crio
mkdir -p /run/systemd/system /run/units /var/lib/containerd
mount -t tmpfs tmpfs /var/lib/containerd # its snapshotter needs a file system that can be an overlay's upper layer
if [ -n "$containerd" ]; then
    mount --bind "$containerd" /usr/bin/containerd
    mkdir -p /etc/containerd
    printf 'version = 2\n' >/etc/containerd/config.toml
else
    mkdir -p "$scratch/hidden" "$scratch/work/hidden"
    mount -t overlay overlay -o "lowerdir=/usr/bin,upperdir=$scratch/hidden,workdir=$scratch/work/hidden" /usr/bin
    rm /usr/bin/containerd # bash finds a program that is not executable
fi
# No compiler and no pip: what is not executable is not found.
for program in gcc cc make; do
    if [ -e "/usr/bin/$program" ]; then mount --bind /dev/null "$(readlink -f "/usr/bin/$program")"; fi
done
mkdir "$scratch/empty"
for package in /usr/lib/python3*/ensurepip /usr/share/python-wheels; do
    if [ -d "$package" ]; then mount --bind "$scratch/empty" "$package"; fi
done
cat >/usr/local/bin/systemctl <<'EOF'
#!/bin/bash
# Of systemd what install.sh uses. A unit is started and ended by the node's own process, not by who asks for it.
echo "$@" >>/run/systemctl.log
case $1 in
is-active) [ -e "/run/units/${*: -1}" ] ;;
show) cat "/run/units/${*: -1}" 2>/dev/null || echo 0 ;;
start | restart)
    [ "$1" = start ] || [ -e "/run/units/$2" ] || exit 1
    echo "$2 $$" >/run/units.asked
    until [ -e "/run/units.done.$$" ]; do sleep 0.02; done
    rm "/run/units.done.$$"
    ;;
esac
EOF
chmod +x /usr/local/bin/systemctl
start() {
    rm -f "/run/$1/$1.sock"
    "$1" >>"/run/$1.log" 2>&1 &
    echo "$!" >"/run/units/$1"
    until [ -e "/run/$1/$1.sock" ] || ! kill -0 "$!"; do sleep 0.02; done
}
[ -z "$containerd" ] || start containerd
mkfifo /run/units.asked
exec 3<>/run/units.asked
echo ready
while read -r unit asker <&3; do
    if [ -e "/run/units/$unit" ]; then
        kill "$(cat "/run/units/$unit")" && wait "$(cat "/run/units/$unit")" || true
    fi
    start "$unit"
    : >"/run/units.done.$asker"
done
"""


class BareNode:
    """`pid` is a process of the node. Whatever is changed there is gone with it.

    `containerd` runs there as a unit (of this machine's program, of another one, or with "" of none at all), with the
    places of a node. What stands for systemd knows that unit, and those that a test starts.
    """

    def __init__(self, directory: Path, containerd: str | Path = "/usr/bin/containerd") -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        words = ["unshare", "--mount", "--net", "--uts", "--propagation", "private"]
        self._process = subprocess.Popen(
            [*words, "bash", "-c", _SCRIPT, "node", str(directory), str(containerd)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        if self._process.stdout.readline() != "ready\n":
            self.stop()
            raise RuntimeError("the node's namespaces could not be set up; see standard error")

    def __enter__(self) -> BareNode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends whatever runs in its mount namespace."""
        with contextlib.suppress(FileNotFoundError):  # it has ended itself
            self._kill(spare_units=False)
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

    def kill_strangers(self) -> None:
        """Kills what somebody from outside runs there: all but the node's own process and its units."""
        self._kill(spare_units=True)

    def _kill(self, *, spare_units: bool) -> None:
        while found := self.processes() - {self.pid} - (set(descendants(self.pid)) if spare_units else set()):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    @property
    def root(self) -> Path:
        """The node's root directory, from here."""
        return Path(f"/proc/{self.pid}/root")

    def changed(self) -> list[str]:
        """Every file, directory and link in which it differs from this machine, with mode, owner and content."""
        show = 'cd "$1" && find . -printf "/%P %y %m %U:%G %l\\n" && find . -type f -exec sha256sum {} +'
        lines = self.run("sh", "-c", show, "sh", self._directory / "upper").splitlines()
        # An overlay copies a directory of the machine's when something below it has changed, and keeps it.
        return sorted(line for line in lines if not Path(line.split(" ")[0]).is_dir())

    def exists(self, path: str) -> bool:
        return subprocess.run(self.argv("test", "-e", path), timeout=60).returncode == 0

    def read(self, path: str) -> str:
        return self.run("cat", path)

    def write(self, path: str, text: str) -> None:
        words = self.argv("sh", "-c", 'mkdir -p "${1%/*}" && cat >"$1"', "sh", path)
        subprocess.run(words, input=text, text=True, check=True, timeout=60)
