"""install/register.py while another program (nvidia-ctk, the GPU operator's toolkit) writes to the same files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import register
import register_settings
from support.registering import BINARY, ENGINES, Registering, at, write

CRI = "io.containerd.grpc.v1.cri"
CONTAINERD = f"""\
version = 2
[plugins."{CRI}".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"""
THEIRS = "# theirs\n"


def original_of(engine: str) -> str:
    return {"containerd": CONTAINERD, "docker": '{"debug": true}\n'}.get(engine, "# ours\n")


def edited(engine: str, text: str) -> str:
    return text.replace("true", "false") if engine == "docker" else text + THEIRS


def meddle(monkeypatch: pytest.MonkeyPatch, path: Path, edit: Callable[[str], str], times: int) -> None:
    """Has somebody change a file just before the rename that replaces it."""
    real, left = os.fsync, [times]

    def fsync(handle: int) -> None:
        real(handle)
        if os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).startswith(f".{path.name}.") and left[0]:
            left[0] -= 1
            path.write_text(edit(path.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)


def registers(one: Registering) -> bool:
    return register.register({one.engine: (one.config, "")}, BINARY, one.state, None, "")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_before_the_runtime_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    one = at(tmp_path, engine)
    write(one.config, original_of(engine))
    meddle(monkeypatch, one.config, lambda text: edited(engine, text), 2)
    assert registers(one)
    assert BINARY in one.config.read_text()
    assert one.unregister() == "changed"
    assert one.config.read_text() == edited(engine, edited(engine, original_of(engine)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("before", [False, True], ids=["first", "again"])
def test_somebody_who_does_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: str, before: bool
) -> None:
    """The last edit stands, and the record is what it was."""
    one = at(tmp_path, engine)
    write(one.config, original_of(engine))
    if before:
        one.register()
        one.config.write_text(original_of(engine))
    recorded = {path.name: path.read_bytes() for path in one.state.glob("*")}
    meddle(monkeypatch, one.config, lambda text: text + "\n", 99)
    assert not registers(one)
    assert f"{one.config} was changed meanwhile; run again" in capsys.readouterr().err
    assert one.config.read_text() == original_of(engine) + "\n\n\n"
    left = {path.name: path.read_bytes() for path in one.state.glob("*") if path.name != "engines.json"}
    assert left == {name: what for name, what in recorded.items() if name != "engines.json"}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_before_the_original_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    one = at(tmp_path, engine)
    write(one.config, original_of(engine))
    one.register()
    meddle(monkeypatch, one.config, lambda text: edited(engine, text), 1)
    assert register.unregister(one.state, [engine], "")
    assert one.config.read_text() == edited(engine, original_of(engine))


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = write(tmp_path / "custom-runc", "#!/bin/sh\necho runc version 1.1.5\n")
    program.chmod(0o755)
    one = at(tmp_path, "containerd")
    write(one.config, CONTAINERD + f'  options = {{ BinaryName = "{program}" }}\n')
    settings = write(tmp_path / "etc/rewarm/config.yaml", "deadline: 60\n")
    meddle(monkeypatch, settings, lambda text: text + THEIRS, 1)
    assert register.register({"containerd": (one.config, "")}, BINARY, one.state, settings, "")
    assert str(program) in settings.read_text()
    meddle(monkeypatch, settings, lambda text: text + THEIRS, 1)
    assert register_settings.journal_in(one.state).put_all_back() == [settings]
    assert settings.read_text() == "deadline: 60\n" + THEIRS + THEIRS


# While the engine is asked


def asked(path: Path, script: str) -> str:
    write(path, f"#!/bin/sh\n{script}\n").chmod(0o755)
    return str(path)


def test_an_edit_while_containerd_is_asked_first(tmp_path: Path) -> None:
    one = at(tmp_path, "containerd")
    write(one.config, CONTAINERD)
    script = f'cat "$2"; test -e {tmp_path}/once || echo "{THEIRS.strip()}" >>"$2"; : >{tmp_path}/once'
    done = one.try_register(program=asked(tmp_path / "containerd", script))
    assert (done.returncode, done.stdout) == (0, "containerd changed\n"), done.stderr
    assert one.config.read_text().startswith(CONTAINERD + THEIRS + "# BEGIN")


def test_an_edit_while_containerd_refuses(tmp_path: Path) -> None:
    one = at(tmp_path, "containerd")
    write(one.config, CONTAINERD)
    script = f'if grep -q rewarm-runc "$2"; then echo "{THEIRS.strip()}" >>"$2"; exit 1; else cat "$2"; fi'
    program = asked(tmp_path / "containerd", script)
    for _ in range(2):
        text = one.config.read_text()
        done = one.try_register(program=program)
        assert done.returncode == 1
        assert f"{one.config} was changed meanwhile: only rewarm's part was taken out" in done.stderr
        assert one.config.read_text() == text + THEIRS
        assert not (one.state / "containerd.json").exists()


def test_an_edit_while_dockerd_refuses(tmp_path: Path) -> None:
    one = at(tmp_path, "docker")
    write(one.config, original_of("docker"))
    script = f'test "$1" != --help || exec echo --validate\nsed -i s/true/false/ {one.config}; echo no >&2; exit 1'
    done = one.try_register(program=asked(tmp_path / "dockerd", script))
    assert done.returncode == 1
    assert "only rewarm's part was taken out" in done.stderr
    assert one.config.read_text() == edited("docker", original_of("docker"))


def test_an_edit_where_an_earlier_run_has_written(tmp_path: Path) -> None:
    """The block goes to the file with the last word, and back when containerd refuses that, but not over an edit."""
    one, last = at(tmp_path, "containerd"), tmp_path / "last.toml"
    main = f'imports = ["{last}"]\n' + CONTAINERD
    write(one.config, CONTAINERD)
    one.register()
    one.config.write_text(one.config.read_text().replace(CONTAINERD, main))
    write(last, CONTAINERD)
    script = f'if grep -q rewarm-runc {last}; then echo "{THEIRS.strip()}" >>"$2"; exit 1; else cat "$2"; fi'
    done = one.try_register(program=asked(tmp_path / "containerd", script))
    assert done.returncode == 1
    assert f"{one.config} was changed meanwhile: rewarm's part stays out of it" in done.stderr
    assert (one.config.read_text(), last.read_text()) == (main + THEIRS, CONTAINERD)
