"""The `rewarm` command as a whole: help, imports, exit statuses, settings, and that no error is a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

import rewarm
from rewarm import cli
from rewarm.store.directory import DirectoryStore, SnapshotRef
from support.cli import as_process, call, environment, filled_store, on, one_line


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return filled_store(tmp_path)


# The group


def test_help_lists_what_each_command_says_of_itself() -> None:
    for name, text in cli.COMMANDS.items():
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command is not None and command.name == name
        assert command.get_short_help_str(limit=200) == text
    shown = call("--help").output
    assert all(name in shown for name in cli.COMMANDS)


def imported_by(*words: str) -> set[str]:
    code = (
        "import sys, rewarm.cli\n"
        "try: rewarm.cli.main(sys.argv[1:], prog_name='rewarm')\n"
        "except SystemExit as end: print(*sys.modules, file=sys.stderr); sys.exit(end.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, env=environment()
    )
    return set(done.stderr.split())


def test_help_imports_no_command() -> None:
    found = imported_by("--help")
    assert "rewarm.cli" in found
    assert not found & {"rewarm.settings", "rewarm.store.directory", "yaml", "rich", "blake3", "json"}


def test_a_command_imports_its_own_only(store: DirectoryStore) -> None:
    found = imported_by("ls", "--json", "--store", str(store.root))
    assert "rewarm.cli.ls" in found
    assert not found & {"rewarm.capture", "rewarm.restore", "rewarm.doctor", "rich", "yaml", "subprocess"}


def test_version() -> None:
    assert call("--version").stdout == f"rewarm, version {rewarm.__version__}\n"


@pytest.mark.parametrize("words", [["frobnicate"], ["ls", "--frobnicate"], ["inspect"], ["rm"], ["capture", "c1"]])
def test_wrong_command_lines_are_usage_errors(words: list[str]) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert "Usage: rewarm" in result.stderr


def test_as_a_process(store: DirectoryStore) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = as_process(*words, "--store", str(store.root))
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment())

    listed = run("ls", "--json")
    assert listed.returncode == 0 and not listed.stderr and len(json.loads(listed.stdout)) == 3
    missing = run("inspect", "nothing")
    assert missing.returncode == 1 and not missing.stdout
    assert missing.stderr == "rewarm: find snapshot 'nothing': no name or id in any namespace; see `rewarm ls`\n"


def test_a_reader_that_goes_away_is_no_error_message(store: DirectoryStore) -> None:
    command = as_process("ls", "--json", "--store", str(store.root))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_another_broken_pipe_is_an_error_message(monkeypatch: pytest.MonkeyPatch, store: DirectoryStore) -> None:
    def fail(self: DirectoryStore, namespace: str | None = None) -> list[SnapshotRef]:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(DirectoryStore, "list", fail)
    assert one_line(on(store, "ls")) == "rewarm: ls: Broken pipe\n"


def test_an_operating_system_error_is_one_line(monkeypatch: pytest.MonkeyPatch, store: DirectoryStore) -> None:
    def fail(self: DirectoryStore, namespace: str | None = None) -> list[SnapshotRef]:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(DirectoryStore, "list", fail)
    assert one_line(on(store, "ls")) == "rewarm: ls /somewhere: Permission denied\n"


# Settings and the store


def test_settings_file_names_the_store(store: DirectoryStore, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"store: {store.root}\n")
    file.chmod(0o600)
    assert "other" in call("ls", "--config", str(file)).stdout
    file.write_text("stoer: /x\n")
    assert "unknown key 'stoer'" in one_line(call("ls", "--config", str(file)))


def test_settings_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    assert call("ls", "--config", str(tmp_path / "none")).exit_code == 2


def test_store_may_be_relative(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store.root.parent)
    assert "other" in call("ls", "--store", "store").stdout


def test_store_of_another_scheme() -> None:
    assert "scheme s3 is not supported" in one_line(call("ls", "--store", "s3://bucket"))
    assert "is not an absolute path" in one_line(call("ls", "--store", ""))


@pytest.mark.parametrize("command", [["ls"], ["inspect", "model"], ["rm", "model"], ["verify"]])
def test_store_that_is_not_there(command: list[str], tmp_path: Path) -> None:
    assert "does not exist" in one_line(call(*command, "--store", str(tmp_path / "none")))
    (tmp_path / "link").symlink_to(tmp_path / "none")
    assert "broken symbolic link" in one_line(call(*command, "--store", str(tmp_path / "link")))
