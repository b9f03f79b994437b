"""config.json: what rewarm adds, and that it adds nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.errors import OciError
from rewarm.oci import spec

DENIED: dict[str, Any] = {
    "names": ["io_uring_setup", "io_uring_enter", "io_uring_register"],
    "action": "SCMP_ACT_ERRNO",
    "errnoRet": 1,
}


def test_without_a_profile_only_io_uring_is_denied() -> None:
    made = spec.without_io_uring(None)
    assert made["defaultAction"] == "SCMP_ACT_ALLOW" and made["syscalls"] == [DENIED]


def test_an_allow_list_loses_io_uring_and_nothing_else() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "syscalls": [
            {"names": ["read", "io_uring_setup", "write"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["io_uring_enter", "io_uring_register"], "action": "SCMP_ACT_ALLOW"},
        ],
    }
    before = copy.deepcopy(profile)
    made = spec.without_io_uring(profile)
    assert made["syscalls"] == [{"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"}, DENIED]
    assert profile == before, "the caller's own profile is not changed"


def test_a_rule_equal_to_the_default_action_is_not_added() -> None:
    """libseccomp refuses such a rule."""
    made = spec.without_io_uring({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["io_uring_setup"]}]})
    assert made["syscalls"] == []


def test_preparing_twice_changes_nothing_more() -> None:
    original: dict[str, Any] = {
        "linux": {"seccomp": None},
        "mounts": [],
        "annotations": {
            "org.criu.config": "/etc/shadow",
            "bundle": "/etc",
            "org.systemd.property.ExecStart": "'x'",
            "org.systemd.property.TimeoutStopUSec": "uint64 30000000",
            "org.systemd.property.CollectMode": "'inactive-or-failed'",
            "org.systemd.property.DefaultDependencies": "true",
            "example.org/bundle": "b",
        },
    }
    before = copy.deepcopy(original)
    once = spec.prepared(original, "/control")
    assert spec.prepared(once, "/control") == once
    kept = {f"org.systemd.property.{name}" for name in ("TimeoutStopUSec", "CollectMode", "DefaultDependencies")}
    assert once["annotations"].keys() == kept | {"example.org/bundle"}
    assert original == before, "only the copy is changed"
    (mount,) = once["mounts"]
    assert mount["destination"] == "/run/rewarm" and mount["source"] == "/control"
    assert {"nosuid", "nodev", "noexec"} <= set(mount["options"])


def test_a_users_own_mount_at_the_control_directory_gives_way() -> None:
    """Whoever writes the spec may not put another directory where rewarm looks for readiness."""
    users = {"destination": "/run/rewarm", "type": "bind", "source": "/etc", "options": ["bind"]}
    (mount,) = spec.prepared({"mounts": [users]}, "/control")["mounts"]
    assert mount["source"] == "/control"


def test_the_hook_comes_before_the_users_own() -> None:
    own = {"path": "/usr/bin/own"}
    made = spec.with_hook({"hooks": {"createRuntime": [own], "poststop": [own]}}, ["/p", "a"], 30)
    assert made["hooks"]["createRuntime"] == [{"path": "/p", "args": ["/p", "a"], "timeout": 30}, own]
    assert made["hooks"]["poststop"] == [own]


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"null", b"[" * 100_000, b'"x"'])
def test_what_is_no_spec_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(OciError, match="read container spec"):
        spec.load(str(tmp_path))


def test_saving_replaces_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    spec.save(str(tmp_path), {"a": 1})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(st.fixed_dictionaries({"names": st.lists(st.sampled_from(["read", *DENIED["names"]]))}), max_size=4))
def test_io_uring_is_never_left_in_another_rule(rules: list[dict[str, Any]]) -> None:
    made = spec.without_io_uring({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})
    for rule in made["syscalls"][:-1]:
        assert rule["names"] and not set(rule["names"]) & set(DENIED["names"])
    assert made["syscalls"][-1] == DENIED


@given(JSON)
def test_equal_values_have_equal_digests(value: object) -> None:
    assert spec.digest(value) == spec.digest(copy.deepcopy(value))


ENVIRONMENTS: list[tuple[list[str], dict[str, str]]] = [
    ([], {"PYTHONPATH": "/run/rewarm-hooks"}),
    (["PYTHONPATH="], {"PYTHONPATH": "/run/rewarm-hooks"}),
    (["PYTHONPATH=/opt/app"], {"PYTHONPATH": "/opt/app:/run/rewarm-hooks"}),
    # An empty entry is the working directory.
    (["PYTHONPATH=/opt/app:"], {"PYTHONPATH": "/opt/app::/run/rewarm-hooks"}),
    (["A=1", "LD_PRELOAD=/x.so"], {"A": "1", "LD_PRELOAD": "/x.so", "PYTHONPATH": "/run/rewarm-hooks"}),
]


@pytest.mark.parametrize(("env", "said"), ENVIRONMENTS)
def test_the_hook_comes_behind_what_a_program_imports_from(env: list[str], said: dict[str, str]) -> None:
    once = spec.prepared({"process": {"env": env}}, None, None, "/hooks")
    (mount,) = once["mounts"]
    assert (mount["destination"], mount["source"]) == ("/run/rewarm-hooks", "/hooks") and "ro" in mount["options"]
    found = dict(word.split("=", 1) for word in once["process"]["env"])
    assert found == said
    assert spec.prepared(once, None, None, "/hooks") == once
    own = {key: value for key, value in (word.split("=", 1) for word in env) if value}
    assert spec.without_own(found) == own
    assert dict(word.split("=", 1) for word in spec.prepared(once, None)["process"]["env"]) == own


def test_without_either_an_environment_stays() -> None:
    assert spec.prepared({"process": {}}, "/control")["process"] == {}
    assert spec.prepared({"process": {"env": ["A=1", "B"]}}, "/control")["process"] == {"env": ["A=1", "B"]}


@given(st.lists(st.sampled_from(["", "/a", "/run/rewarm-device-memory.so", "/run/rewarm-hooks", "/b c"]), max_size=4))
def test_what_rewarm_adds_can_be_told_apart(paths: list[str]) -> None:
    """But for its own names at the very ends, which mean nothing more the second time."""
    env = [f"{key}={':'.join(paths)}" for key in ("LD_PRELOAD", "PYTHONPATH")]
    plain = spec.without_own(dict(word.split("=", 1) for word in env))
    made = spec.prepared({"process": {"env": env}}, None, "/library", "/hooks")["process"]["env"]
    assert spec.without_own(dict(word.split("=", 1) for word in made)) == plain
