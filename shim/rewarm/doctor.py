"""Whether this node can capture and restore: every check as data, in the order in which one would mend things.

The checks look at what is there by using it, and change nothing. `fix` does: it undoes what killed restores
and captures left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rewarm import (
    briefly,
    deadline,
    doctor_containerd,
    doctor_gpu,
    doctor_kernel,
    doctor_memory,
    doctor_node,
    doctor_places,
    doctor_programs,
    settings,
)
from rewarm.checks import FAILED, OK, WARNING, Check, Node, ask
from rewarm.errors import RewarmError
from rewarm.settings import Settings


def look(config: Path | None = None, store: str | None = None) -> Node:
    """This node, with its settings; with the defaults, which the checks then go by, if those cannot be read.

    `store` is put over the settings' store.
    """
    file = str(config) if config is not None else os.environ.get("REWARM_CONFIG") or settings.DEFAULT_PATH
    error = ""
    try:
        found = settings.load(config)
    except RewarmError as refused:
        found, error = Settings(), str(refused)
    return Node(found if store is None else found._replace(store=store), file, error)


def check_settings(node: Node) -> Check:
    if node.settings_error:
        step = "correct the file; until then every container with a rewarm annotation starts cold"
        return Check("settings", FAILED, node.settings_error, step)
    there = os.path.exists(node.settings_file)
    found = node.settings_file if there else f"the defaults: there is no {node.settings_file}"
    latest = deadline.latest(node.settings.deadline)
    if latest > deadline.KUBELET:
        late = (
            f"{found}: with `deadline: {node.settings.deadline:g}` a cold start may begin after {latest:g} s, when the "
        )
        late += f"kubelet has given up ({deadline.KUBELET:g} s, runtimeRequestTimeout)"
        highest = node.settings.deadline - (latest - deadline.KUBELET)
        return Check("settings", WARNING, late, f"set it to {highest:g} at most, or raise the kubelet's")
    if there and _through_python(node):
        odd = f"{found}: the launcher does not understand its form, so that each call of the runtime starts Python"
        step = "write it in the form of config/config.yaml: a key at the start of its line, `runtimes: [a, b]` and "
        step += "`state_dir: /path` on one line, longer values as blocks, no quotes where YAML does without"
        return Check("settings", WARNING, odd, step)
    return Check("settings", OK, found)


def _through_python(node: Node) -> bool:
    """Whether the launcher leaves to Python what is neither's: runc's words for a wrong flag, or rewarm's, tell."""
    _, said = ask(["env", f"REWARM_CONFIG={node.settings_file}", node.launcher, "--root"])
    return "parse command line --root" in said


CHECKS: tuple[tuple[str, Callable[[Node], Check]], ...] = (
    ("settings", check_settings),
    ("rights", doctor_kernel.rights),
    ("kernel", doctor_kernel.features),
    ("overlay", doctor_kernel.overlay),
    ("cgroups", doctor_kernel.cgroups),
    ("runc", doctor_programs.runc),
    ("criu", doctor_programs.criu),
    ("criu check", doctor_programs.criu_check),
    ("helper programs", doctor_programs.helpers),
    ("installation", doctor_programs.installation),
    ("store", doctor_places.store),
    ("work directory", doctor_places.work_directory),
    ("state directory", doctor_places.state_directory),
    ("cache", doctor_memory.cache),
    ("huge pages", doctor_memory.huge_pages),
    ("GPUs", doctor_gpu.gpus),
    ("left-overs", doctor_places.left_overs),
    ("containerd", doctor_containerd.containerd),
)
NODE_CHECKS: tuple[tuple[str, Callable[[Node], Check]], ...] = (
    ("settings", check_settings),
    ("runc", doctor_programs.runc),
    ("installation", doctor_programs.installation),
    ("launcher", doctor_node.launcher),
)
SHARES = ("store", "work directory", "cache", "left-overs")
"""Checks that look at what may be another machine's, whose server may not answer."""
PATIENCE = 10.0
"""Seconds that one of them may take."""
WIDTH = max(len(name) for name, _ in CHECKS)


def examine(node: Node) -> Iterator[Check]:
    """Run every check. One that cannot look is a failed one, and keeps no other from looking."""
    yield from _run(node, CHECKS)


def examine_node(node: Node) -> Iterator[Check]:
    """Run the checks of how the node's engines reach rewarm, for each engine that is there."""
    engines = [(engine.label, partial(engine.check, placed=engine)) for engine in doctor_node.found(node)]
    yield from _run(node, (*NODE_CHECKS, *engines))
    if not engines:
        step = "run install/install.sh --engines NAME, or give containers the runtime by its path"
        yield Check("engines", FAILED, "none of containerd, CRI-O, Docker and Podman is on this node", step)


def _run(node: Node, checks: Sequence[tuple[str, Callable[[Node], Check]]]) -> Iterator[Check]:
    for name, check in checks:
        yield (_within if name in SHARES else _look)(node, name, check)


def _look(node: Node, name: str, check: Callable[[Node], Check]) -> Check:
    try:
        return check(node)
    except RewarmError as error:
        found = f"{error.operation} {error.object}: {error.cause}"
        return Check(name, FAILED, found, error.next_step or "see the cause")
    except OSError as error:
        found = f"{error.filename or 'cannot look'}: {error.strerror or error}"
        return Check(name, FAILED, found, "run it as root, and see the kernel's log")


def _within(node: Node, name: str, check: Callable[[Node], Check]) -> Check:
    """The same, or that there is no answer: the store is what has failed then, pods start cold without it."""
    said = briefly.ask(lambda: json.dumps(asdict(_look(node, name, check))).encode(), PATIENCE)
    if said:
        return Check(**json.loads(said))
    status = FAILED if name == "store" else WARNING
    found = f"no answer within {PATIENCE:g} s" if said is None else "its process died"
    return Check(name, status, found, f"look whether the server of {node.settings.store} answers; pods start cold")


def fix(node: Node) -> list[str]:
    """Undo what killed restores and captures left behind; a line for each thing that stays. Raises OciError."""
    if node.settings_error:
        return [f"nothing was undone, since the settings say where to look: {node.settings_error}"]
    return doctor_places.undo_left_overs(node)
