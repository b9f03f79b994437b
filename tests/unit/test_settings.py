"""The settings file: defaults, every key, and what is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewarm import settings
from rewarm.errors import SettingsError
from rewarm.settings import Settings, load, store_directory


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o644)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def refused(file: Path, text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(write(file, text))
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    return message


def test_an_absent_file_is_all_defaults(file: Path) -> None:
    assert load(file) == Settings()
    assert Settings().store == "/var/lib/rewarm/store"
    assert Settings().runtimes == ("runc",)
    assert Settings().deadline == 60.0
    assert Settings().on_miss == "cold-start"
    assert "/run/containerd/runc/*" in Settings().runtime_roots


def test_a_file_with_a_mistake_names_the_state_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher reads it as well, and looks there for containers that are to be started or deleted."""
    monkeypatch.setenv("REWARM_CONFIG", str(file))
    write(file, "stoer: /typo\nstate_dir: /elsewhere\n")
    assert settings.without_mistakes() == Settings(state_dir="/elsewhere")
    for text in ("state_dir: here\n", "stoer: /typo\n", "state_dir: [\n", "state_dir: /a\nstate_dir: /b\n"):
        write(file, text)
        assert settings.without_mistakes() == Settings()
    write(file, "stoer: /typo\nstate_dir: /elsewhere\n").chmod(0o666)
    assert settings.without_mistakes() == Settings(), "somebody else may have written it"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_is_all_defaults(file: Path, text: str) -> None:
    assert load(write(file, text)) == Settings()


def test_an_absent_file_imports_no_yaml(file: Path) -> None:
    script = (
        "import sys, pathlib; from rewarm.settings import load; load(pathlib.Path(sys.argv[1])); "
        "sys.exit('yaml' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(settings.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script, str(file)], check=True, env=environment)


def test_every_key_can_be_set(file: Path) -> None:
    text = """
store: file:///mnt/store
runtimes: [crun, "runc"]
runtime_roots: [/run/a, /run/b/*]
criu: /usr/sbin/criu
deadline: 30
on_miss: fail
state_dir: /run/other
work_dir: /scratch
ready_timeout: 1.5
capture_timeout: 7
compression: zstd
threads: 6
cache: /var/cache/rewarm
cache_size: 500M
ignore_env: ["X_*"]
"""
    assert load(write(file, text)) == Settings(
        store="file:///mnt/store",
        runtimes=("crun", "runc"),
        runtime_roots=("/run/a", "/run/b/*"),
        criu="/usr/sbin/criu",
        deadline=30.0,
        on_miss="fail",
        state_dir="/run/other",
        work_dir="/scratch",
        ready_timeout=1.5,
        capture_timeout=7.0,
        compression="zstd",
        threads=6,
        cache="/var/cache/rewarm",
        cache_size=500_000_000,
        ignore_env=("X_*",),
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("12345", 12345), ("50G", 50 * 10**9), ('"2T"', 2 * 10**12), ("7K", 7000), ("500M", 500 * 10**6), ("1", 1)],
)
def test_sizes(file: Path, text: str, size: int) -> None:
    assert load(write(file, f"cache_size: {text}\n")).cache_size == size
    assert Settings().cache_size == 50 * 10**9


@pytest.mark.parametrize("off", ["off", '"off"'])
def test_off_needs_no_quotes(file: Path, off: str) -> None:
    found = load(write(file, f"cache: {off}\ncompression: {off}\n"))
    assert (found.cache, found.compression) == ("off", "off")


def test_the_environment_names_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARM_CONFIG", str(write(file, "on_miss: fail")))
    assert load().on_miss == "fail"


def test_an_unknown_key_is_named_with_the_allowed_ones(file: Path) -> None:
    message = refused(file, "stroe: /x\n")
    assert "unknown key 'stroe'" in message
    assert "store" in message.split("allowed keys:")[1]


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("store", "relative/path", "absolute path"),
        ("store", "s3://bucket", "scheme s3 is not supported"),
        ("store", "file://other-host/x", "no host"),
        ("store", "3", "absolute path"),
        ("runtimes", "runc", "a list"),
        ("runtimes", "[]", "at least one"),
        ("runtimes", "[1]", "program name"),
        ("runtimes", '["bin/runc"]', "absolute path"),
        ("runtimes", '["-x"]', "program name"),
        ("runtimes", '[""]', "program name"),
        ("runtime_roots", "[run/x]", "absolute"),
        ("criu", "criu", "auto"),
        ("criu", "null", "auto"),
        ("deadline", "0", "above 0"),
        ("deadline", "-3", "above 0"),
        ("deadline", ".nan", "above 0"),
        ("deadline", ".inf", "above 0"),
        ("deadline", "true", "above 0"),
        ("deadline", "'90'", "above 0"),
        ("on_miss", "cold_start", "cold-start or fail"),
        ("on_miss", "[]", "cold-start or fail"),
        ("state_dir", "run", "absolute"),
        ("work_dir", "{}", "absolute"),
        ("ready_timeout", "soon", "seconds"),
        ("capture_timeout", "100000", "86400"),
        ("ignore_env", "[A=B]", "globs"),
        ("compression", "lz4", "auto, zstd or off"),
        ("compression", "[]", "auto, zstd or off"),
        ("compression", "true", "auto, zstd or off"),
        ("threads", "-1", "whole number from 0"),
        ("threads", "1025", "to 1024"),
        ("threads", "1.5", "whole number"),
        ("threads", "true", "whole number"),
        ("threads", "'2'", "whole number"),
        ("cache", "var/cache", "an absolute path"),
        ("cache", "true", "auto, off"),
        ("cache", "{}", "auto, off"),
        ("cache", "0", "auto, off"),
        ("cache_size", "0", "bytes above 0"),
        ("cache_size", "-5", "bytes above 0"),
        ("cache_size", "50GB", "like 50G"),
        ("cache_size", "1.5G", "like 50G"),
        ("cache_size", "''", "like 50G"),
        ("cache_size", "G", "like 50G"),
        ("cache_size", "99999999T", "bytes above 0"),
        ("cache_size", "true", "bytes above 0"),
        ("cache_size", "[1]", "bytes above 0"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(file: Path, key: str, value: str, allowed: str) -> None:
    message = refused(file, f"{key}: {value}\n")
    assert f"{key} has the bad value" in message
    assert allowed in message


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("- a\n", "not a mapping"),
        ("store: [\n", "is not YAML"),
        ("store: !!python/object/apply:os.system [id]\n", "is not YAML"),
        ("\x00", "is not YAML"),
        ("on_miss: fail\non_miss: fail\n", "'on_miss' is there twice"),
        ("1: 2\n", "unknown key 1"),
        ("? [a, b]\n: 2\n", "is not YAML"),
        ("a: " + "x" * (1 << 20), "longer than"),
    ],
)
def test_what_is_no_settings_file_is_refused(file: Path, text: str, cause: str) -> None:
    assert cause in refused(file, text)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_refused(file: Path, mode: int) -> None:
    write(file, "on_miss: fail").chmod(mode)
    with pytest.raises(SettingsError, match=r"others than root may write it; run: chown 0:0 .* chmod 644"):
        load(file)


def test_a_file_of_another_user_is_refused(file: Path) -> None:
    os.chown(write(file, "on_miss: fail"), 12345, 0)
    with pytest.raises(SettingsError, match="owner 12345"):
        load(file)


def test_what_is_no_file_is_refused_without_hanging(file: Path, tmp_path: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(SettingsError, match="not a regular file"):
        load(file)
    with pytest.raises(SettingsError, match="not a regular file"):
        load(tmp_path)
    regular = write(tmp_path / "regular", "")
    with pytest.raises(SettingsError, match="Not a directory"):
        load(regular / "config.yaml")


@pytest.mark.parametrize(
    ("store", "directory"),
    [
        ("/a/b/", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("file://localhost/a%20b", "/a b"),
        ("/a:b", "/a:b"),
        ("FILE:/a", "/a"),
    ],
)
def test_store_directory(store: str, directory: str) -> None:
    assert store_directory(store) == directory


@pytest.mark.parametrize("store", ["", "x", "./x", "gs://b", "file:x", "file://h/x", "file:///x?y", "/a\0"])
def test_store_directory_refuses(store: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        store_directory(store)
