#!/usr/bin/env python3
"""Keeps rewarm installed on the node that this pod runs on, and the node's label true to that.

    daemonset.py [--uninstall]

Installs from the image's parts, verifies with `rewarm doctor` and `rewarm doctor --node`, sets the label
rewarm.dev/installed=true, and stays: every few minutes it verifies again, and takes the label away for as long as that
fails, after which it installs again.
Pods with the RuntimeClass are scheduled by that label. SIGTERM ends it and leaves the node as it is, since an upgrade
of the pod must not take the runtime from under the node's containers. With --uninstall it takes the label, then
rewarm, from the node, and stays, so that the DaemonSet is ready when all nodes are done.

Standard library only: it runs with the image's python3.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from daemonset_host import Host, Problem, Stopped
from daemonset_label import NodeLabel
from daemonset_store import SharedStore
from daemonset_verdict import Check, checks_of, unwell

HERE = Path(__file__).resolve().parent
PREFIX = "/opt/rewarm"
SETTINGS = "/etc/rewarm/config.yaml"
MARK = b"# Written by rewarm's DaemonSet; change its ConfigMap instead. "
NOT_READY = 3
"""install.sh's exit status when all is installed, and its own look at the node finds a fault: `verify` names it."""
INSTALL_SECONDS = 900.0
VERIFY_SECONDS = 180.0
# Of the back-off after a failure.
SHORTEST, LONGEST = 10.0, 300.0


def say(text: str) -> None:
    print(f"rewarm-node: {text}", flush=True)


class Keeper:
    """What the pod does, again and again, for one node."""

    def __init__(
        self, host: Host, label: NodeLabel, settings: Path | None, store: SharedStore | None, ready: Path
    ) -> None:
        self.host = host
        self.label = label
        self.settings = settings
        self.store = store
        self.ready = ready
        self.installed = False
        """Whether this pod has installed what its image holds, and it was well when last looked at."""

    def keep(self) -> None:
        """Installs what is not yet, verifies, sets the label. Raises Problem, with the label removed if it could be."""
        try:
            self.host.check()
            if self.store is not None:
                self.store.provide()
            if not self.installed:
                self._install()
            self.verify()
        except Problem as problem:
            self.installed = False
            self.ready.unlink(missing_ok=True)
            try:
                self.label.remove()
            except Problem as second:
                raise Problem(f"{problem}; and {second}") from None
            raise
        self.label.set()
        self._is_ready("installed and verified")

    def remove(self) -> None:
        """Takes the label, then rewarm, from the node. Raises Problem, also while containers still need the runtime."""
        self.ready.unlink(missing_ok=True)
        self.label.remove()  # first: no pod may be sent here any more
        self.host.check()
        status, _ = self.host.run("bash", self._script("uninstall.sh"), "--prefix", PREFIX, timeout=INSTALL_SECONDS)
        if status != 0:
            raise Problem(f"uninstall.sh: exit status {status}, see its lines above; tried again later")
        self._remove_settings(self.host.read(SETTINGS))
        if self.store is not None:
            self.store.remove()
        self._is_ready("uninstalled")

    def verify(self) -> None:
        """What `rewarm doctor` says on the node. Raises Problem that names what is not well."""
        found = unwell(self._doctor(), self._doctor("--node"))
        if found:
            raise Problem(f"verify the node: {'; '.join(found)}")

    def _doctor(self, *more: str) -> list[Check]:
        words = [f"{PREFIX}/bin/rewarm", "doctor", *more, "--json"]
        status, said = self.host.run(*words, timeout=VERIFY_SECONDS, capture=True)
        return checks_of(" ".join(("rewarm doctor", *more)), status, said)

    def _script(self, name: str) -> str:
        return f"{self.host.image}{HERE / name}"

    def _install(self) -> None:
        """Programs, then settings, which rewarm itself has to take first, then the engines."""
        self._run_installer("--no-register")
        self._write_settings()
        self._run_installer("--exclude-engines", "docker,podman")  # no kubelet's
        self.installed = True

    def _run_installer(self, *more: str) -> None:
        parts = f"{self.host.image}{HERE.parent / 'parts'}"
        words = ["bash", self._script("install.sh"), "--prefix", PREFIX, "--from", parts, "--no-packages", *more]
        status, _ = self.host.run(*words, timeout=INSTALL_SECONDS)
        if status not in (0, NOT_READY):
            raise Problem(f"install.sh: exit status {status}, see its lines above; tried again later")

    def _write_settings(self) -> None:
        """The ConfigMap's settings, if it has some and rewarm takes them; never over a file of somebody else's."""
        if self.settings is None:
            return
        found = self.host.read(SETTINGS)
        if not self.settings.exists():
            self._remove_settings(found)
            return
        content = self.settings.read_bytes()
        # The digest tells these settings from others that begin like them: install.sh may have noted something below.
        wanted = MARK + hashlib.sha256(content).hexdigest().encode() + b"\n" + content
        if found is not None and found.startswith(wanted):
            return
        if found is not None and not found.startswith(MARK):
            raise Problem(f"write {SETTINGS}: the node has one of its own; remove it, or the ConfigMap's config.yaml")
        tried = f"{SETTINGS}.tried"
        self.host.write(tried, wanted)
        load = "import sys, pathlib, rewarm.settings; rewarm.settings.load(pathlib.Path(sys.argv[1]))"
        script = '"$1" -I -c "$2" "$3" 2>&1 | tail -n 1; exit "${PIPESTATUS[0]}"'
        words = ["bash", "-c", script, "bash", f"{PREFIX}/venv/bin/python3", load, tried]
        status, said = self.host.run(*words, timeout=60, capture=True)
        if status != 0:
            self.host.run("rm", "-f", tried, timeout=30)
            raise Problem(f"settings of the ConfigMap: {said.strip()[:500]}")
        status, _ = self.host.run("mv", "-fT", tried, SETTINGS, timeout=30)
        if status != 0:
            self.host.run("rm", "-f", tried, timeout=30)
            raise Problem(f"write {SETTINGS} on the node: mv: exit status {status}; see the line above")
        say(f"{SETTINGS} is the ConfigMap's")

    def _remove_settings(self, found: bytes | None) -> None:
        if found is not None and found.startswith(MARK):
            self.host.run("rm", "-f", SETTINGS, timeout=30)

    def _is_ready(self, state: str) -> None:
        if not self.ready.exists():
            self.ready.touch()
            say(f"node {self.label.node}: {state}")


def stay(keeper: Keeper, uninstall: bool, interval: float) -> NoReturn:
    """Does it again every `interval` seconds, and after a failure with back-off, until Stopped is raised."""
    pause = SHORTEST
    while True:
        try:
            keeper.remove() if uninstall else keeper.keep()
        except Problem as problem:
            say(f"error: {problem}")
            wait, pause = min(pause, interval), min(2 * pause, LONGEST)
        else:
            wait, pause = interval, SHORTEST
        # Nodes that were started together need not ask the API server together.
        time.sleep(wait * random.uniform(0.8, 1.2))


def on_signal(number: int, frame: object) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Keeps rewarm installed on this pod's node, and the node's label.")
    parser.add_argument("--uninstall", action="store_true", help="take the label and rewarm from the node")
    parser.add_argument("--node", default=os.environ.get("NODE_NAME", ""), help="the node's name (default: $NODE_NAME)")
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="settings for the node, from a ConfigMap; may be absent"
    )
    parser.add_argument(
        "--store", type=Path, metavar="DIRECTORY", help="a volume of the pod, to be mounted on the node"
    )
    parser.add_argument("--store-on-node", default="/var/lib/rewarm/shared", metavar="DIRECTORY", help="where")
    parser.add_argument(
        "--ready", type=Path, default=Path("/run/rewarm-node/ready"), metavar="FILE", help="there when done"
    )
    parser.add_argument(
        "--interval", type=float, default=300.0, metavar="SECONDS", help="between two looks (default: 300)"
    )
    parser.add_argument("--target", type=int, default=1, metavar="PID", help="a process of the node (default: 1)")
    parser.add_argument(
        "--account", type=Path, default=Path("/var/run/secrets/kubernetes.io/serviceaccount"), help=argparse.SUPPRESS
    )
    return parser.parse_args(words)


def main() -> int:
    given = arguments()
    server = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        if not server[0] or not server[1].isdecimal():
            raise Problem("find the API server: KUBERNETES_SERVICE_HOST and _PORT are not set; run it in a pod")
        host = Host(given.target)
        label = NodeLabel(given.node, (server[0], int(server[1])), given.account)
        store = SharedStore(host, given.store, given.store_on_node) if given.store is not None else None
        given.ready.parent.mkdir(parents=True, exist_ok=True)
        stay(Keeper(host, label, given.settings, store, given.ready), given.uninstall, given.interval)
    except Problem as problem:
        say(f"error: {problem}")
        return 1
    except Stopped:
        say("stopped; the node stays as it is")
        return 0


if __name__ == "__main__":
    sys.exit(main())
