"""How a create that asks for a snapshot may end without one: cold, or failed in one line; and nothing left over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import counter, faults
from support.bundle import Bundle
from support.node import Node
from support.proc import command
from support.runtime import Container


def fails(node: Node, made: Bundle, *texts: str, own: str = "") -> None:
    """With on-miss: fail the create fails, its last error line says all of `texts`, and nothing remains.

    `own` is a mount below the bundle that is the test's.
    """
    annotate(made, "fail")
    before = faults.Before(made)
    container = node.runtime.create("copy", made, check=False)
    assert container.status == 1, (container.status, node.runtime.log_lines())
    said(node.runtime.last_error(), *texts, "on-miss")
    assert container.stdout.wait_end() == ""
    nothing_remains(node, made, own)
    before.check_config()
    before.check_names()
    before.check_files()


def starts_cold(node: Node, made: Bundle, *texts: str, own: str = "") -> Container:
    """With on-miss: cold-start the same create gives a cold container; its outcome and a warning say why."""
    annotate(made, "cold-start")
    before = faults.Before(made)
    container = node.runtime.create("copy", made)
    outcome = node.outcome("copy")
    assert outcome["outcome"] == "cold", outcome
    said(outcome["reason"], *texts)
    warnings = [line["msg"] for line in node.runtime.log_lines() if line["level"] == "warning"]
    assert f"rewarm: cold start of copy: {outcome['reason']}" in warnings, warnings
    # Nothing of the snapshot ever ran, and nothing of it is in the root filesystem.
    before.check_files(mount_points=True)
    # Its streams are those of the runc that could not restore it, whose complaint is all that they may hold.
    assert container.stdout.text() == "" and "to stderr" not in container.stderr.text(), container
    assert node.runtime.state("copy")["status"] == "created"
    assert not (node.container_directory("copy") / "control/restored.json").exists(), "it is told that it was restored"
    node.runtime.start("copy")
    container.stdout.wait_text("\n3 ")
    assert container.stdout.text().startswith("ready\n1 "), container.stdout.text()
    assert counter.numbers(container)[:3] == [1, 2, 3]
    assert node.runtime.exec("copy", "cat", "/etc/issue").count("changed by the program") == 1
    node.runtime.kill("copy", "TERM")
    assert node.runtime.wait_stopped("copy") == 7
    node.runtime.delete("copy")
    nothing_remains(node, made, own)
    return container


def falls_back(node: Node, *texts: str, made: Bundle | None = None) -> None:
    """Both ways with one bundle, the second after the first: what failed left nothing in the way."""
    made = made or faults.bundle(node.directory / "copy")
    fails(node, made, *texts)
    starts_cold(node, made, *texts)


def nothing_remains(node: Node, made: Bundle, own: str = "") -> None:
    left = [line for line in faults.remains(node, "copy", made) if not (own and line.endswith(own))]
    assert left == [], left


def annotate(made: Bundle, on_miss: str) -> None:
    made.spec["annotations"]["rewarm.dev/on-miss"] = on_miss
    made.write()


def said(text: str, *parts: str, longest: int = 1000) -> None:
    """AssertionError unless `text` is one line, not too long, and holds every one of `parts`."""
    assert all(part in text for part in parts), f"{parts} in: {text}"
    assert text.isprintable() and len(text) <= longest, f"{len(text)}: {text!r}"


@contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    """`source` bind-mounted at `target`."""
    command("mount", "--bind", source, target)
    try:
        yield
    finally:
        command("umount", target)
