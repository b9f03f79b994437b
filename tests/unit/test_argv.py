"""runc's command lines, as containerd's shim and conmon write them."""

from __future__ import annotations

import os

import pytest

from rewarm.errors import OciError
from rewarm.oci import argv

SHIM = "--root /run/containerd/runc/k8s.io --log /b/log.json --log-format json --systemd-cgroup"
CONMON = "create --bundle /b --pid-file /p/pid 0123abc"


def parse(text: str) -> argv.Invocation:
    return argv.parse(text.split())


def test_the_shims_create() -> None:
    found = parse(
        f"{SHIM} create --bundle /b --pid-file /b/init.pid --console-socket /s --no-pivot --preserve-fds 2 id"
    )
    assert (found.command, found.container_id, found.bundle, found.pid_file) == ("create", "id", "/b", "/b/init.pid")
    assert (found.root, found.log, found.log_format) == ("/run/containerd/runc/k8s.io", "/b/log.json", "json")
    assert found.systemd_cgroup and found.flags["preserve-fds"] == "2" and found.flags["console-socket"] == "/s"
    assert found.is_set("no-pivot") and not found.is_set("no-new-keyring")


@pytest.mark.parametrize("flag", ["--bundle /b", "-bundle /b", "--bundle=/b", "-bundle=/b", "-b /b", "--b=/b"])
@pytest.mark.parametrize("behind", [False, True], ids=["before the id", "behind the id"])
def test_every_form_of_a_flag(flag: str, behind: bool) -> None:
    found = parse(f"create id {flag}" if behind else f"create {flag} id")
    assert (found.bundle, found.container_id) == ("/b", "id")


def test_conmon() -> None:
    found = parse(CONMON)
    assert (found.bundle, found.pid_file, found.container_id) == ("/b", "/p/pid", "0123abc")
    assert found.root == "/run/runc" and not found.systemd_cgroup and found.log == ""


def test_start_and_delete() -> None:
    assert parse(f"{SHIM} start id").container_id == "id"
    found = parse(f"{SHIM} delete --force id")
    assert found.container_id == "id" and found.is_set("force")


def test_other_commands_are_not_taken_apart() -> None:
    for text in ("features", "--version", f"{SHIM} kill --all id 9", "restore -no-subreaper --bundle /b id", ""):
        found = argv.parse(text.split())
        assert found.container_id == "" and found.words == tuple(text.split())


def test_the_bundle_is_the_working_directory_by_default() -> None:
    assert parse("create id").bundle == os.getcwd()


def test_relative_roots_are_made_absolute_as_runc_does() -> None:
    assert parse("--root some/where start id").root == os.path.join(os.getcwd(), "some/where")


def test_the_words_stay_as_they_came() -> None:
    words = ["--log=/l", "create", "-b", "/b", "--", "id"]
    found = argv.parse(words)
    assert found.words == tuple(words) and found.container_id == "id"


@pytest.mark.parametrize("text", ["create", "create --bundle", "start", "delete --force", "create --bundle /b --"])
def test_what_names_no_container_is_refused(text: str) -> None:
    with pytest.raises(OciError, match="parse command line"):
        parse(text)


def test_a_false_boolean_is_false() -> None:
    assert not parse("--systemd-cgroup=false create id").systemd_cgroup
    assert parse("--systemd-cgroup=1 create id").systemd_cgroup
