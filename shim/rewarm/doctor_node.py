"""Checks of the node's registration: which engines are there, and whether each one runs containers by rewarm.

An engine is asked itself where it answers: Docker by its API, Podman by its command, containerd and CRI-O by what they
make of their files. Of a daemon that cannot say what it has read, it is checked that it was started after its files
were changed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from rewarm import doctor_containerd, doctor_engines, processes
from rewarm.checks import FAILED, OK, WARNING, Check, Node, ask, last_line

RECORD = "engines.json"
_AGAIN = "run install/install.sh again"


@dataclass(frozen=True)
class Engine:
    """One engine: its program and configuration file, and what install.sh has recorded of it (None: nothing).

    `copied` is the runtime whose options it has given to rewarm's.
    """

    name: str
    label: str
    program: str
    config: str
    check: Callable[..., Check]
    files: tuple[str, ...] = field(default=())
    recorded: bool | None = None
    copied: str = ""

    @property
    def where(self) -> str:
        """The file that names the runtime: it may have been there before install.sh came."""
        return self.files[0] if self.files else self.config

    @property
    def default(self) -> bool:
        """Whether the configuration is the engine's own, so that it reads it without being told."""
        return any(self.config == engine.config for engine in ENGINES)


def found(node: Node) -> list[Engine]:
    """The engines to look at: those that install.sh has recorded, and what else is on the node."""
    recorded = _record(node)
    engines = []
    for engine in ENGINES:
        entry = (recorded or {}).get(engine.name)
        if isinstance(entry, dict):
            engines.append(_placed(engine, entry))
        elif shutil.which(engine.program) or (engine.name != "podman" and os.path.exists(engine.config)):
            program = shutil.which(engine.program) or ""
            engines.append(replace(engine, program=program, recorded=None if recorded is None else False))
    return engines


def _record(node: Node) -> dict[str, Any] | None:
    try:
        with open(os.path.join(node.install_state, RECORD), encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _placed(engine: Engine, entry: dict[str, Any]) -> Engine:
    files = entry.get("files")
    return replace(
        engine,
        program=str(entry.get("program") or shutil.which(engine.program) or ""),
        config=str(entry.get("config") or engine.config),
        files=tuple(map(str, files)) if isinstance(files, list) else (),
        recorded=True,
        copied=str(entry.get("copied") or ""),
    )


def launcher(node: Node) -> Check:
    """What the engines call."""
    trouble = not_running(node.launcher)
    if trouble:
        return Check("launcher", FAILED, f"{node.launcher} {trouble}", _AGAIN)
    return Check("launcher", OK, node.launcher)


def not_running(binary: str) -> str:
    """Why a runtime's binary cannot be run, "" when it can."""
    status, said = ask([binary, "--version"])
    return "" if status == 0 else f"does not run: {last_line(said)}"


def judged(node: Node, placed: Engine, check: Check, changed_files: Iterable[str], daemon: str) -> Check:
    """A check of an engine's files, with what the running daemon may add to it ("": there is no daemon)."""
    if check.status == FAILED and placed.recorded is False:
        found = f"{check.found}; install.sh was not told to register with it, or it came later"
        return Check(placed.label, WARNING, found, check.mend)
    if check.status != OK:
        return check
    if not daemon:
        return replace(check, name=placed.label)
    began = [start for start in _daemons(daemon, placed) if start]
    if not began:
        found = f"{check.found}; {daemon} does not run with {placed.config}"
        step = f"start it: systemctl start {placed.name}; one with a configuration elsewhere has to be told by hand"
        return Check(placed.label, WARNING, found, step)
    for path in changed_files:
        if os.path.exists(path) and min(began) < os.stat(path).st_mtime:
            found = f"{check.found}; but {daemon} was started before {path} was changed"
            step = f"make it known: systemctl restart {placed.name}, or restart what else has started it"
            if os.stat(path).st_mtime > time.time():  # by which no restart would be later
                step = f"its time of change has not come yet (was the clock set back?): run touch {path}, then {step}"
            return Check(placed.label, FAILED, found, step)
    return Check(placed.label, OK, f"{check.found}; {daemon} runs with it")


def _daemons(name: str, placed: Engine) -> list[float]:
    """When each process of that name that has this configuration was started, in seconds since the epoch."""
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    began = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/comm", encoding="utf-8", errors="replace") as file:
                if file.read() != f"{name}\n":
                    continue
            with open(f"/proc/{entry}/cmdline", encoding="utf-8", errors="replace") as file:
                words = file.read().split("\0")[:-1]
        except OSError:
            continue  # it has ended
        start = processes.start_time(int(entry))
        if start is not None and _reads(words, placed) and _sees(entry, placed.where):
            began.append(boot + start / os.sysconf("SC_CLK_TCK") + 0.02)  # a tick and more: both clocks are coarse
    return began


def _reads(words: list[str], placed: Engine) -> bool:
    """Whether a daemon's command line names the engine's configuration, or none while that is its own."""
    if placed.name != "containerd":
        return True
    for number, word in enumerate(words[1:], 1):
        option, equals, value = word.partition("=")
        if option in ("--config", "-config", "-c"):
            named = value if equals else "".join(words[number + 1 : number + 2])
            return os.path.realpath(named) == os.path.realpath(placed.config)
    return placed.default


def _sees(pid: str, path: str) -> bool:
    """Whether a path is the same file for that process: a daemon in a container (kind's) has files of its own."""
    try:
        return os.path.samefile(f"/proc/{pid}/root{path}", path)
    except PermissionError:  # who is not root cannot look
        return True
    except OSError:
        return False


def containerd(node: Node, placed: Engine) -> Check:
    """By `containerd config dump`, which reads the files as a start would."""
    there = replace(node, containerd_config=placed.config)
    check = doctor_containerd.registered(there, placed.program, placed.copied)
    if "CRI plugin is disabled" in check.found:
        return check
    if check.status == WARNING:  # for a node that has other engines it is one, not for this engine
        check = replace(check, status=FAILED)
    return judged(node, placed, check, (placed.config, *placed.files), "containerd")


def crio(node: Node, placed: Engine) -> Check:
    """By CRI-O's files, and by `crio status config`, which asks the daemon."""
    check = doctor_engines.crio(node, placed.where)
    if check.status == OK and placed.default and placed.program:
        status, said = ask([placed.program, "status", "config"])
        if status == 0:
            if node.launcher in said:
                return Check(placed.label, OK, f"{check.found}; crio runs with it")
            found = f"{check.found}; but crio was started without it"
            return Check(placed.label, FAILED, found, "make it known: systemctl restart crio")
    return judged(node, placed, check, (placed.config, *placed.files), "crio")


def docker(node: Node, placed: Engine) -> Check:
    """By daemon.json and by dockerd's API."""
    return judged(node, placed, doctor_engines.docker(node, placed.where), (), "")


def podman(node: Node, placed: Engine) -> Check:
    """By Podman itself where it reads the file, else by the file."""
    program = placed.program if placed.default else ""
    return judged(node, placed, doctor_engines.podman(node, placed.where, program), (), "")


ENGINES = (
    Engine("containerd", "containerd", "containerd", "/etc/containerd/config.toml", containerd),
    Engine("crio", "CRI-O", "crio", "/etc/crio/crio.conf.d/99-rewarm.conf", crio),
    Engine("docker", "Docker", "dockerd", "/etc/docker/daemon.json", docker),
    Engine("podman", "Podman", "podman", "/etc/containers/containers.conf.d/rewarm.conf", podman),
)
