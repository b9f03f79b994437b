"""What the node's settings say of namespaces: read with every mistake named, and applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rewarm import policy, settings
from rewarm.errors import SettingsError
from rewarm.policy import Policy

CONFIG = """
namespaces:
  "*":
    ignore: all
  team-a:
    share: [models, team-b]
    ignore: [engine]
    pinned: {on-miss: fail, device-memory: off}
    default: {capture: on-ready}
"""


def loaded(directory: Path, text: str) -> settings.Settings:
    path = directory / "config.yaml"
    path.write_text(text)
    path.chmod(0o644)
    return settings.load(path)


def test_it_is_read(tmp_path: Path) -> None:
    found = loaded(tmp_path, CONFIG).namespaces
    pinned = {"on-miss": "fail", "device-memory": "off"}
    assert policy.of(found, "team-a") == Policy(("models", "team-b"), ("engine",), pinned, {"capture": "on-ready"})
    assert policy.of(found, "other") == policy.of(found, "*") == Policy(ignore=("all",))
    assert policy.of({}, "other") == Policy()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "not a mapping"),
        ({"a/b": {}}, "'a/b' is not a namespace"),
        ({1: {}}, "is not a namespace"),
        ({"a": "x"}, "a is not a mapping"),
        ({"a": None}, "a is not a mapping"),
        ({"a": {"shared": []}}, "a has the unknown key 'shared', known are share, ignore, pinned, default"),
        ({"a": {"share": "b"}}, "a.share: not a list of namespaces"),
        ({"a": {"share": ["../b"]}}, "a.share: not a list of namespaces"),
        ({"a": {"share": ["*"]}}, "a.share: not a list of namespaces"),
        ({"a": {"ignore": "some"}}, "a.ignore: not all, nor a list of"),
        ({"a": {"ignore": ["all"]}}, "a.ignore: not all, nor a list of"),
        ({"a": {"pinned": ["x"]}}, "a.pinned: not a mapping"),
        ({"a": {"pinned": {"captur": "never"}}}, "a.pinned: captur: there is no such key"),
        ({"a": {"pinned": {"capture": "always"}}}, "a.pinned: capture: 'always' is not one of never, on-ready"),
        ({"a": {"pinned": {"capture": True}}}, "a.pinned: capture: not a text"),
        ({"a": {"pinned": {"container": "x"}}}, "a.pinned: container is a pod's own to say"),
        ({"a": {"default": {"snapshot": "auto"}}}, "a.default: snapshot is a pod's own to say"),
        ({"a": {"default": {"ready": "x" * 9000}}}, "a.default: ready: 'xxx"),
    ],
)
def test_mistakes_are_named(value: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        policy.read(value)
    assert said in str(caught.value) and len(str(caught.value)) < 400


def test_a_mistake_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"namespaces has the bad value .*team-a.ignore: not all.*see config.yaml"):
        loaded(tmp_path, CONFIG.replace("[engine]", "[engines]"))


def test_it_is_applied() -> None:
    rule = Policy(ignore=("engine",), pinned={"snapshot": "auto"}, default={"capture": "on-ready", "on-miss": "fail"})
    given = {"snapshot": "mine", "engine": "vllm", "on-miss": "cold-start"}
    assert rule.apply(given) == {"snapshot": "auto", "capture": "on-ready", "on-miss": "cold-start"}
    assert rule.without_effect(given) == ["engine", "snapshot"]
    # Who has not opted in is left alone, whatever is pinned.
    assert rule.apply({"engine": "vllm"}) == {} and Policy(ignore=("snapshot",)).apply(given) == {}
    assert Policy(ignore=("all",)).apply(given) == {}
    assert Policy().apply(given) == given and Policy().without_effect(given) == []
