"""What CRI-O, Docker and Podman know of the runtime `rewarm`: from their files, and from the engines themselves."""

from __future__ import annotations

import http.client
import json
import os
import socket
import tempfile
import tomllib
from contextlib import closing
from typing import Any

from rewarm.checks import FAILED, OK, WARNING, Check, Node, ask, ask_apart, last_line

RUNTIME = "rewarm"
_AGAIN = "run install/install.sh again"
# With this API `docker run` has --annotation: Docker 24.
_ANNOTATIONS = (1, 43)


def _wrong_binary(node: Node, binary: str) -> str:
    """What is wrong with the path that an engine has for the runtime, "" when it is this installation's and runs."""
    if os.path.realpath(binary) != os.path.realpath(node.launcher):
        return f"is {binary}, this installation's is {node.launcher}"
    status, said = ask([binary, "--version"])
    return "" if status == 0 else f"is {binary}, which does not run: {last_line(said)}"


def _toml(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        return tomllib.loads(file.read())


def _at(data: Any, *keys: str) -> Any:
    """What lies at `keys`, None where there is nothing of that form."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def crio(node: Node, config: str) -> Check:
    """rewarm's drop-in: the handler, its binary, and that it lists no annotation that CRI-O does not know."""
    try:
        handler = _at(_toml(config), "crio", "runtime", "runtimes", RUNTIME)
    except FileNotFoundError:
        return Check("CRI-O", FAILED, f"there is no {config}, so no handler {RUNTIME}", _AGAIN)
    except ValueError as error:
        return Check("CRI-O", FAILED, f"{config} cannot be understood: {error}", _AGAIN)
    if not isinstance(handler, dict):
        return Check("CRI-O", FAILED, f"{config} has no handler {RUNTIME}", _AGAIN)
    wrong = _wrong_binary(node, str(handler.get("runtime_path", "")))
    if wrong:
        return Check("CRI-O", FAILED, f"handler {RUNTIME} of {config} {wrong}", _AGAIN)
    listed = handler.get("allowed_annotations")
    ours = [name for name in listed if str(name).startswith("rewarm.dev")] if isinstance(listed, list) else []
    if ours:
        found = f"handler {RUNTIME} lists {ours[0]} in allowed_annotations: CRI-O ignores such a handler"
        return Check("CRI-O", FAILED, found, "take it out: annotations that CRI-O does not know go through anyway")
    return Check("CRI-O", OK, f"handler {RUNTIME} of {config} is {node.launcher}")


class _Engine(http.client.HTTPConnection):
    """Docker's API on its unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def get(self, path: str) -> Any:
        self.request("GET", path)
        return json.loads(self.getresponse().read())


def docker(node: Node, config: str) -> Check:
    """daemon.json, then what dockerd says that it has."""
    try:
        with open(config, encoding="utf-8-sig") as file:
            settings = json.load(file)
    except FileNotFoundError:
        return Check("Docker", FAILED, f"there is no {config}, so no runtime {RUNTIME}", _AGAIN)
    except ValueError as error:
        return Check("Docker", FAILED, f"{config} is not valid JSON: {error}", "correct the file")
    binary = _at(settings, "runtimes", RUNTIME, "path")
    if not isinstance(binary, str):
        return Check("Docker", FAILED, f"{config} has no runtime {RUNTIME}", _AGAIN)
    wrong = _wrong_binary(node, binary)
    if wrong:
        return Check("Docker", FAILED, f"runtime {RUNTIME} of {config} {wrong}", _AGAIN)
    found = f"runtime {RUNTIME} of {config} is {node.launcher}"
    try:
        with closing(_Engine(_socket(settings))) as engine:
            known, version = engine.get("/info"), engine.get("/version")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Check(
            "Docker", WARNING, f"{found}; dockerd does not answer: {error}", "start it: systemctl start docker"
        )
    if _at(known, "Runtimes", RUNTIME, "path") != binary:
        found += "; but dockerd has not read it"
        return Check("Docker", FAILED, found, "make it known: systemctl reload docker (SIGHUP does it)")
    found += f"; dockerd {_at(version, 'Version')} runs with it"
    api = str(_at(version, "ApiVersion"))
    numbers = tuple(int(part) for part in api.split(".") if part.isdigit())
    if numbers < _ANNOTATIONS:
        found += f", but hands no annotations to runtimes (API {api})"
        return Check("Docker", WARNING, found, "only captures work; use Docker 24 or newer for rewarm.dev annotations")
    return Check("Docker", OK, found)


def _socket(settings: Any) -> str:
    hosts = _at(settings, "hosts")
    for host in hosts if isinstance(hosts, list) else []:
        if str(host).startswith("unix://"):
            return str(host).removeprefix("unix://")
    return "/var/run/docker.sock"


def podman(node: Node, config: str, program: str) -> Check:
    """The drop-in, then what Podman (`program`, "": nobody) makes of the name. It hands on every annotation."""
    try:
        paths = _at(_toml(config), "engine", "runtimes", RUNTIME)
    except FileNotFoundError:
        return Check("Podman", FAILED, f"there is no {config}, so no runtime {RUNTIME}", _AGAIN)
    except ValueError as error:
        return Check("Podman", FAILED, f"{config} cannot be understood: {error}", _AGAIN)
    binary = str(paths[0]) if isinstance(paths, list) and paths else ""
    if not binary:
        return Check("Podman", FAILED, f"{config} has no runtime {RUNTIME}", _AGAIN)
    wrong = _wrong_binary(node, binary)
    if wrong:
        return Check("Podman", FAILED, f"runtime {RUNTIME} of {config} {wrong}", _AGAIN)
    found = f"runtime {RUNTIME} of {config} is {node.launcher}"
    if not program:
        return Check("Podman", OK, found)
    status, said = _ask_podman(program)
    if status != 0 and "not found" in said and f'"{RUNTIME}"' in said:
        return Check("Podman", FAILED, f"{found}; but podman says: {last_line(said)}", _AGAIN)
    if status != 0:
        return Check("Podman", WARNING, f"{found}; podman cannot say: {last_line(said)}", "mend that, see: podman info")
    if last_line(said) != binary:
        found += f"; but podman takes {last_line(said)}"
        return Check("Podman", FAILED, found, "a later file of containers.conf.d has the runtime, too: remove it")
    return Check("Podman", OK, f"{found}, says podman")


def _ask_podman(program: str) -> tuple[int, str]:
    """Which path the runtime's name leads to. In storage of its own: `podman info` sets up what is not there."""
    with tempfile.TemporaryDirectory(prefix="rewarm-", dir="/run" if os.access("/run", os.W_OK) else None) as scratch:
        places = ["--root", f"{scratch}/root", "--runroot", f"{scratch}/run", "--storage-driver", "vfs"]
        words = [program, *places, "--runtime", RUNTIME, "info", "--format", "{{.Host.OCIRuntime.Path}}"]
        status, said, warnings = ask_apart(words, timeout=60)
        return status, said if status == 0 else warnings or said
