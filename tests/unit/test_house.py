"""The house: rooms import only downward, and the linters find nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {"rewarm": "shim/rewarm", "rewarm_hooks": "hooks/rewarm_hooks", "rewarm_native": "native/rewarm_native"}

# The higher a number, the higher the room. A module imports from lower rooms and from its own.
ROOMS = {
    "rewarm_hooks": 0,
    "rewarm_native": 0,
    "rewarm": 1,
    "rewarm.errors": 1,
    "rewarm.settings": 1,
    "rewarm.lines": 1,
    "rewarm.plain": 1,
    "rewarm.annotation": 1,
    "rewarm.naming": 1,
    "rewarm.policy": 1,
    "rewarm.trace": 1,
    "rewarm.deadline": 1,
    "rewarm.installation": 1,
    "rewarm.private": 1,
    "rewarm.processes": 1,
    "rewarm.aside": 1,
    "rewarm.apart": 1,
    "rewarm.briefly": 1,
    "rewarm.oci": 2,
    "rewarm.gpu": 2,
    "rewarm.criu": 2,
    "rewarm.memory": 2,
    "rewarm.store": 2,
    "rewarm.node": 2,
    "rewarm.layers": 2,
    "rewarm.overlay": 2,
    "rewarm.layer_digest": 2,
    "rewarm.image": 3,
    "rewarm.netlock": 2,
    "rewarm.nftables": 2,
    "rewarm.sysv": 2,
    "rewarm.ipc": 3,
    "rewarm.devshm": 3,
    "rewarm.netlink": 1,
    "rewarm.addresses": 2,
    "rewarm.ports": 2,
    "rewarm.memberships": 3,
    "rewarm.replica": 3,
    "rewarm.notify": 3,
    "rewarm.registered": 3,
    "rewarm.scratch": 2,
    "rewarm.guard": 2,
    "rewarm.hook": 2,
    "rewarm.request": 3,
    "rewarm.compat": 3,
    "rewarm.losses": 3,
    "rewarm.readiness": 3,
    "rewarm.lifeline": 3,
    "rewarm.frozen": 3,
    "rewarm.recover": 3,
    "rewarm.sweep": 3,
    "rewarm.resume": 3,
    "rewarm.carved": 3,
    "rewarm.causes": 3,
    "rewarm.devices": 3,
    "rewarm.engines": 3,
    "rewarm.volumes": 3,
    "rewarm.blanks": 3,
    "rewarm.alone": 4,
    "rewarm.quiet": 4,
    "rewarm.waker": 4,
    "rewarm.restore": 4,
    "rewarm.dump": 4,
    "rewarm.source": 4,
    "rewarm.capture": 4,
    "rewarm.slots": 2,
    "rewarm.preload": 4,
    "rewarm.additions": 4,
    "rewarm.saved": 4,
    "rewarm.pids": 3,
    "rewarm.limits": 3,
    "rewarm.cold": 4,
    "rewarm.warm": 5,
    "rewarm.start": 5,
    "rewarm.watcher": 6,
    "rewarm.runtime": 6,
    "rewarm.checks": 6,
    "rewarm.doctor_kernel": 6,
    "rewarm.doctor_programs": 6,
    "rewarm.doctor_places": 6,
    "rewarm.doctor_memory": 6,
    "rewarm.doctor_gpu": 6,
    "rewarm.doctor_containerd": 6,
    "rewarm.doctor_engines": 6,
    "rewarm.doctor_node": 6,
    "rewarm.doctor": 6,
    "rewarm.cli": 7,
}
# Rooms at one height that know nothing of each other.
STRANGERS = [
    ("rewarm.criu", "rewarm.store"),
    ("rewarm.criu", "rewarm.oci"),
    ("rewarm.store", "rewarm.oci"),
    ("rewarm.memory", "rewarm.store"),
    ("rewarm.memory", "rewarm.oci"),
    ("rewarm.gpu", "rewarm.store"),
    ("rewarm.gpu", "rewarm.criu"),
    ("rewarm.gpu", "rewarm.memory"),
    ("rewarm.gpu", "rewarm.oci"),
]


def modules() -> Iterator[tuple[str, Path]]:
    for package, directory in PACKAGES.items():
        for path in sorted((REPOSITORY / directory).rglob("*.py")):
            parts = path.relative_to(REPOSITORY / directory).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def imported(name: str, path: Path) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for item in ast.walk(ast.parse(path.read_text())):
        if isinstance(item, ast.Import):
            yield from (alias.name for alias in item.names)
        elif isinstance(item, ast.ImportFrom):
            base = item.module or ""
            if item.level:
                above = package.split(".")[: len(package.split(".")) - item.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            # `from rewarm import x` names a module; `from rewarm.x import y` names something of it.
            yield from (f"{base}.{alias.name}" for alias in item.names)


def room(name: str) -> str | None:
    """The longest known name that `name` is, or lies in."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in ROOMS:
            return ".".join(parts[:length])
    return None


@pytest.mark.parametrize(("name", "path"), [pytest.param(*found, id=found[0]) for found in modules()])
def test_imports_go_downward(name: str, path: Path) -> None:
    own = room(name)
    assert own is not None and (own != "rewarm" or name == "rewarm"), f"{name} has no room: give it one in ROOMS"
    for other in imported(name, path):
        target = room(other)
        if target is None or target == own:
            continue
        assert ROOMS[target] <= ROOMS[own], f"{name} imports {other}, from a room above"
        assert (own, target) not in STRANGERS and (target, own) not in STRANGERS, f"{name} imports {other}"


def test_hooks_need_only_the_standard_library() -> None:
    for name, path in modules():
        if name.startswith("rewarm_hooks"):
            for other in imported(name, path):
                top = other.partition(".")[0]
                assert top in sys.stdlib_module_names or top == "rewarm_hooks", f"{name} imports {other}"


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy", "shim/rewarm", "hooks/rewarm_hooks", "native/rewarm_native", "install/daemonset.py", "tests", "demo"),
    ],
    ids=["ruff", "ruff-format", "mypy"],
)
def test_linters(command: tuple[str, ...]) -> None:
    tool = Path(sys.executable).with_name(command[0])
    done = subprocess.run([tool, *command[1:]], cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck() -> None:
    scripts = [*REPOSITORY.glob("install/*.sh"), *REPOSITORY.glob("tests/support/*.sh"), REPOSITORY / ".ci" / "run"]
    assert len(scripts) > 4
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
