"""rewarm ps: each container with an annotation, its pod, whether it was restored, and why not."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import counter
from support.node import Node
from support.proc import wait_for

POD = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-namespace": "default",
    "io.kubernetes.cri.sandbox-name": "ocr-7d9f",
    "io.kubernetes.cri.container-name": "server",
}
CRI_O = {
    "io.kubernetes.cri-o.ContainerType": "container",
    "io.kubernetes.pod.namespace": "team",
    "io.kubernetes.pod.name": "ocr-0",
    "io.kubernetes.pod.uid": "u-1",
    "io.kubernetes.container.name": "server",
}


def rows(node: Node) -> dict[str, dict[str, Any]]:
    return {row["container"]: row for row in node.json("ps")}


def test_nothing_yet(node: Node) -> None:
    assert node.json("ps") == []
    assert node.rewarm("ps").stdout.split() == [
        "CONTAINER",
        "POD",
        "STATE",
        "CREATED",
        "START",
        "FROM,",
        "OR",
        "WHY",
        "NOT",
    ]


def test_warm_cold_and_none_of_rewarms(node: Node) -> None:
    counter.captured(node)
    runtime = node.runtime
    annotation = {"rewarm.dev/snapshot": "counter"}
    counter.run(runtime, "plain", counter.bundle(node.directory / "plain", annotations={}))
    counter.run(
        runtime,
        "sidecar",
        counter.bundle(
            node.directory / "sidecar",
            annotations={
                **annotation,
                **POD,
                "io.kubernetes.cri.container-name": "proxy",
                "rewarm.dev/container": "server",
            },
        ),
    )
    ignored = {**annotation, **POD, "io.kubernetes.cri.sandbox-namespace": "plain"}
    node.configure(namespaces={"plain": {"ignore": "all"}})
    counter.run(runtime, "ignored", counter.bundle(node.directory / "ignored", annotations=ignored))
    runtime.create("copy", counter.bundle(node.directory / "copy", annotations={**annotation, **POD}))
    found = rows(node)
    assert found.keys() == {"source", "copy"}
    source, copy = found["source"], found["copy"]
    assert (source["state"], source["outcome"], source["pod"]) == ("running", "cold", None)
    assert "does not exist; create it or mount it" in source["reason"] and source["snapshot"] == "default/counter"
    assert (copy["state"], copy["outcome"], copy["reason"]) == ("created", "warm", None)
    assert copy["snapshot"] == node.outcome("copy")["snapshot"] and copy["snapshot"].startswith("default/counter/")
    assert copy["pod"] == {"namespace": "default", "name": "ocr-7d9f", "uid": "", "container": "server"}
    assert copy["runtime_root"] == str(runtime.root)
    lines = node.rewarm("ps").stdout.splitlines()
    assert lines[1].split()[:3] == ["copy", "default/ocr-7d9f/server", "created"], "the newest comes first"
    assert lines[1].endswith(copy["snapshot"]) and "does not exist; create it or mount it" in lines[2]

    node.configure(runtime_roots=[str(runtime.root)], namespaces={"plain": {"ignore": "all"}})
    everything = {row["container"]: row for row in node.json("ps", "--all")}
    assert everything.keys() == {"source", "copy", "plain", "sidecar", "ignored"} and everything["copy"] == copy
    for name, reason in (
        ("plain", "it has no annotation rewarm.dev/snapshot"),
        ("sidecar", "rewarm.dev/container is 'server'"),
        ("ignored", "its annotations do not count: the node's settings say otherwise for its namespace"),
    ):
        other = everything[name]
        assert (other["state"], other["outcome"], other["reason"]) == ("running", None, reason)

    runtime.start("copy")
    assert rows(node)["copy"]["state"] == "running"
    runtime.kill("copy", "TERM")
    runtime.wait_stopped("copy")
    assert rows(node)["copy"]["state"] == "stopped"
    runtime.delete("copy")
    assert rows(node).keys() == {"source"}


def test_a_pod_of_cri_o(node: Node) -> None:
    made = counter.bundle(node.directory / "copy", annotations={"rewarm.dev/snapshot": "counter", **CRI_O})
    node.runtime.create("copy", made)
    assert rows(node)["copy"]["pod"] == {"namespace": "team", "name": "ocr-0", "uid": "u-1", "container": "server"}


def test_what_is_written_by_others_is_printed_as_text(node: Node) -> None:
    """A pod's annotations come from whoever may make pods."""
    hostile = {**POD, "io.kubernetes.cri.sandbox-name": "a\x1b[2Jb\nc"}
    made = counter.bundle(node.directory / "copy", annotations={"rewarm.dev/snapshot": "counter", **hostile})
    node.runtime.create("copy", made)
    shown = node.rewarm("ps").stdout
    assert "\x1b" not in shown and len(shown.splitlines()) == 2 and "default/a\\x1b[2Jb\\nc/server" in shown
    assert rows(node)["copy"]["pod"]["name"] == "a\x1b[2Jb\nc"


def test_one_whose_runc_has_lost_it(node: Node) -> None:
    counter.run(node.runtime, "lost", counter.bundle(node.directory / "lost"))
    state = Path(node.runtime.root) / "lost"
    kept = state.with_name("kept")
    shutil.move(state, kept)
    try:
        assert rows(node)["lost"]["state"] == "gone"
    finally:
        shutil.move(kept, state)
    assert rows(node)["lost"]["state"] == "running"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"id": "x"}', b"\xff", b"[" * 100000])
def test_a_record_that_cannot_be_read(node: Node, content: bytes) -> None:
    """It is shown, and hides no other."""
    runtime = node.runtime
    for name in ("good", "bad"):
        counter.run(runtime, name, counter.bundle(node.directory / name))
    record = node.container_directory("bad") / "record.json"
    before = record.read_bytes()
    record.write_bytes(content)
    try:
        found = rows(node)
        assert found["bad"]["state"] == "damaged" and "read record" in found["bad"]["reason"]
        assert found["good"]["state"] == "running"
        assert len(node.rewarm("ps").stdout.splitlines()) == 3
    finally:
        record.write_bytes(before)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"outcome": 7, "reason": [1], "snapshot": {}}'])
def test_an_outcome_that_cannot_be_read(node: Node, content: bytes) -> None:
    counter.run(node.runtime, "one", counter.bundle(node.directory / "one"))
    (node.container_directory("one") / "outcome.json").write_bytes(content)
    row = rows(node)["one"]
    assert row["outcome"] is None and row["snapshot"] == "default/counter" and row["state"] == "running"
    assert len(node.rewarm("ps").stdout.splitlines()) == 2


@pytest.mark.parametrize(
    "field",
    [("request", []), ("id", 7), ("bundle", None), ("root", {}), ("phase", "odd"), ("snapshot", 1), ("reason", [])],
)
def test_a_record_with_a_field_that_is_none(node: Node, field: tuple[str, object]) -> None:
    counter.run(node.runtime, "bad", counter.bundle(node.directory / "bad"))
    record = node.container_directory("bad") / "record.json"
    before = record.read_bytes()
    record.write_text(json.dumps({**json.loads(before), field[0]: field[1]}))
    try:
        assert rows(node)["bad"]["state"] == "damaged"
    finally:
        record.write_bytes(before)


def test_while_runc_makes_it(node: Node) -> None:
    """A cold one is runc's by then."""
    made = counter.bundle(node.directory / "slow")
    made.spec["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "2"]}]}
    made.write()
    with ThreadPoolExecutor() as pool:
        done = pool.submit(node.runtime.create, "slow", made)
        # "restoring" for a moment, until it is known that there is no snapshot.
        wait_for("the hook", lambda: rows(node).get("slow", {}).get("state") == "creating", timeout=10)
        done.result()
    assert rows(node)["slow"]["state"] == "created"


def test_names_are_whole_and_what_is_no_directory_is_passed_over(node: Node) -> None:
    for name in ("test-server-1", "test-server-2"):
        counter.run(node.runtime, name, counter.bundle(node.directory / name))
    stray = node.container_directory("x").parent.with_name("stray")
    stray.touch()
    shown = node.rewarm("ps").stdout
    stray.unlink()
    assert "test-server-1 " in shown and "test-server-2 " in shown


def test_what_is_about_to_be_there_or_to_go_is_not_listed(node: Node) -> None:
    counter.run(node.runtime, "one", counter.bundle(node.directory / "one"))
    directory = node.container_directory("one")
    for name in ("one~17", "~"):
        other = directory.with_name(name)
        other.mkdir()
        (other / "record.json").write_text(json.dumps(json.loads((directory / "record.json").read_text())))
    directory.with_name("empty").mkdir()
    assert rows(node).keys() == {"one"}
    for name in ("one~17", "~", "empty"):
        shutil.rmtree(directory.with_name(name))
