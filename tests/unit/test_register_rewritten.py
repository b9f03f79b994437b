"""install/register.py where others have written to rewarm's part: printed anew without its marks, or added to it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

import register
import register_docker
import still_named
from rewarm.settings import load
from support.registering import BINARY, Registering, at, content, printed_anew, without_state, write

CRI = "io.containerd.grpc.v1.cri"
CONTAINERD = f"""\
# the node's own words
version = 2
[plugins."{CRI}".containerd]
  default_runtime_name = "runc"
  [plugins."{CRI}".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."{CRI}".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""
KATA = f'[plugins."{CRI}".containerd.runtimes.kata]\n  runtime_type = "io.containerd.kata.v2"\n'
END = "# END rewarm runtime"


def removed(one: Registering) -> tuple[int, str, str]:
    """As uninstall.sh does it: status, output, messages."""
    done = one.run("unregister", "--removes", BINARY, one.engine)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def runtimes(one: Registering) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(one.config.read_text())["plugins"][CRI]["containerd"]["runtimes"]
    return found


@pytest.fixture
def containerd(tmp_path: Path) -> Registering:
    one = at(tmp_path, "containerd")
    write(one.config, CONTAINERD)
    one.register()
    return one


def rewrite(one: Registering, *changes: tuple[str, str]) -> None:
    text = printed_anew(one.config.read_text())
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    one.config.write_text(text)


def test_what_lost_its_marks_is_refreshed(containerd: Registering) -> None:
    """Else runc's and rewarm's cgroup drivers would differ, and the kubelet puts up with one only."""
    rewrite(containerd, ("SystemdCgroup = false", "SystemdCgroup = true"))
    text = containerd.config.read_text()
    containerd.config.write_text(text.replace("SystemdCgroup = true", "SystemdCgroup = false", 1))
    assert {name: found["options"]["SystemdCgroup"] for name, found in runtimes(containerd).items()} == {
        "rewarm": False,
        "runc": True,
    }
    assert containerd.register() == "changed"
    assert runtimes(containerd)["rewarm"]["options"] == {"SystemdCgroup": True, "BinaryName": BINARY}
    assert containerd.register() == "unchanged"
    assert removed(containerd)[:2] == (0, "containerd changed\n")
    expected = tomllib.loads(CONTAINERD.replace("SystemdCgroup = false", "SystemdCgroup = true"))
    assert tomllib.loads(containerd.config.read_text()) == expected


def test_what_lost_its_marks_is_taken_out(containerd: Registering) -> None:
    rewrite(containerd, ("[plugins]", "[debug]\n  level = 'info' # why\n[plugins]"))
    status, out, said = removed(containerd)
    assert (status, out) == (0, "containerd changed\n"), said
    assert "took out rewarm's part only" in said
    text = containerd.config.read_text()
    assert tomllib.loads(text) == {**tomllib.loads(CONTAINERD), "debug": {"level": "info"}}
    assert "# why" in text
    assert not containerd.state.exists() or not list(containerd.state.iterdir())


@pytest.mark.parametrize(
    "form",
    [
        f'[plugins."{CRI}".containerd.runtimes]\nrewarm = {{ options = {{ BinaryName = "{BINARY}" }} }}\n',
        f'[plugins."{CRI}".containerd.runtimes]\nrewarm.options.BinaryName = "{BINARY}"\n'
        'rewarm.pod_annotations = [\n  "a.example/=", # why\n  "rewarm.dev/*",\n]\n',
        f'[plugins."{CRI}".containerd.runtimes.rewarm]\noptions = {{ BinaryName = "{BINARY}" }}\n',
        f"[plugins.'{CRI}'.containerd.runtimes.'rewarm'.options]\nBinaryName = '{BINARY}'\n",
    ],
)
def test_forms_that_toml_has_for_it(containerd: Registering, form: str) -> None:
    containerd.config.write_text(CONTAINERD + "# above\n" + form + "\n# below\n[debug]\n  level = 'info'\n")
    assert removed(containerd)[0] == 0
    assert containerd.config.read_text().startswith(CONTAINERD + "# above\n")
    assert containerd.config.read_text().endswith("\n# below\n[debug]\n  level = 'info'\n")
    assert tomllib.loads(containerd.config.read_text()) == {**tomllib.loads(CONTAINERD), "debug": {"level": "info"}}


def test_a_form_that_cannot_be_taken_out(containerd: Registering) -> None:
    """The programs stay then, and so does the record."""
    table = f'{{ runtimes = {{ runc = {{ }}, rewarm = {{ options = {{ BinaryName = "{BINARY}" }} }} }} }}'
    containerd.config.write_text(f'version = 2\nplugins."{CRI}" = {{ containerd = {table} }}\n')
    before = content(containerd.config.parent)
    status, out, said = removed(containerd)
    assert (status, out) == (1, "containerd refused\n")
    assert f'{containerd.config} has rewarm\'s plugins."{CRI}".containerd.runtimes.rewarm in a form' in said
    assert "remove it by hand, then run again" in said
    assert content(containerd.config.parent) == before
    assert "in a form that cannot be taken out" in containerd.try_register().stderr
    containerd.config.write_text(CONTAINERD)
    assert removed(containerd)[:2] == (0, "containerd unchanged\n")


def test_a_drop_in_that_lost_its_marks(tmp_path: Path) -> None:
    one = at(tmp_path, "containerd")
    one.register()  # there is no file: it is made, with the built-in runtime in it
    before = runtimes(one)
    rewrite(one)
    assert one.register() == "changed"
    assert runtimes(one) == before
    assert removed(one)[0] == 0
    assert set(runtimes(one)) == {"runc"}, "nobody can tell that this one was not asked for"


def test_tables_that_were_copied_to_another_file(containerd: Registering) -> None:
    """nvidia-ctk can write what `containerd config dump` says: rewarm's too, and to a file that has the last word."""
    other = containerd.config.parent / "conf.d/99-nvidia.toml"
    write(other, printed_anew(containerd.config.read_text()).replace("SystemdCgroup = false", "SystemdCgroup = true"))
    containerd.config.write_text(f'imports = ["{other}"]\n' + containerd.config.read_text())
    before = other.read_bytes()
    status, _, said = removed(containerd)
    assert status == 1 and f"{other} names {BINARY}" in said and "containerd.runtimes.rewarm.options.BinaryName" in said
    assert other.read_bytes() == before
    assert containerd.register() == "changed"
    assert BINARY not in containerd.config.read_text()
    found = tomllib.loads(other.read_text())["plugins"][CRI]["containerd"]["runtimes"]
    assert found["rewarm"]["options"] == {"BinaryName": BINARY, "SystemdCgroup": True}
    assert removed(containerd)[0] == 0
    assert BINARY not in other.read_text()


def test_a_runtime_of_somebody_elses_with_rewarms_program(containerd: Registering) -> None:
    """It would be left with a program that is gone."""
    theirs = f'[plugins."{CRI}".containerd.runtimes.mine]\noptions = {{ BinaryName = "{BINARY}" }}\n'
    containerd.config.write_text(containerd.config.read_text() + theirs)
    before = content(containerd.config.parent)
    status, out, said = removed(containerd)
    assert (status, out) == (1, "containerd refused\n")
    assert f"{containerd.config} names {BINARY}" in said and "containerd.runtimes.mine.options.BinaryName" in said
    assert content(containerd.config.parent) == before
    containerd.config.write_text(containerd.config.read_text().replace(theirs, ""))
    assert removed(containerd)[:2] == (0, "containerd changed\n")
    assert containerd.config.read_text() == CONTAINERD


def test_a_runtime_that_was_added_by_hand(tmp_path: Path) -> None:
    """install.sh leaves it alone, and then it is in the way of the program's removal."""
    one = at(tmp_path, "docker")
    text = f'{{"runtimes": {{"rewarm": {{"path": "{BINARY}"}}}}}}'
    write(one.config, text)
    assert one.register() == "unchanged"
    status, _, said = removed(one)
    assert status == 1 and f"{one.config} names {BINARY}" in said and "in runtimes.rewarm.path" in said
    assert one.config.read_text() == text
    one.config.write_text("{}")
    assert removed(one)[:2] == (0, "docker unchanged\n")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_program_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recorded: bool
) -> None:
    """The link that install.sh makes in /usr/local/sbin is there for such names. `recorded`: else the engine was left
    out when rewarm was installed (--exclude-engines, --no-register), and has the runtime from config/."""
    binary = write(tmp_path / "prefix/rewarm-runc", "#!/bin/sh\n")
    binary.chmod(0o755)
    link = tmp_path / "sbin/rewarm-runc"
    link.parent.mkdir()
    link.symlink_to(binary)
    monkeypatch.setattr(still_named, "_PATH", f"/nowhere:{link.parent}")
    config = write(tmp_path / "daemon.json", '{"runtimes": {"rewarm": {"path": "rewarm-runc"}}}')
    state = tmp_path / "state"
    if recorded:
        place = {"docker": {"config": str(config), "program": "", "files": [str(config)]}}
        write(state / "engines.json", json.dumps(place))
    else:
        monkeypatch.setattr(register_docker, "DEFAULT", config)
    assert not register.unregister(state, ["docker"], str(binary))
    assert f"{config} names {binary}, which would be gone, in runtimes.rewarm.path" in capsys.readouterr().err
    config.write_text('{"runtimes": {"mine": {"path": "runc"}}}')
    assert register.unregister(state, ["docker"], str(binary))


# Between the marks


@pytest.mark.parametrize("again", [False, True])
def test_a_runtime_that_was_added_between_the_marks(containerd: Registering, tmp_path: Path, again: bool) -> None:
    containerd.config.write_text(containerd.config.read_text().replace(END, KATA + END))
    if again:  # a containerd that does not agree: what is there is not rewarm's for that
        program = write(tmp_path / "containerd", '#!/bin/sh\ntest "$1" = --config && exec cat "$2"\nexit 1\n')
        program.chmod(0o755)
        program.write_text('#!/bin/sh\nif grep -q rewarm-runc "$2"; then echo version = 2; else cat "$2"; fi\n')
        before = containerd.config.read_bytes()
        assert containerd.try_register(program=str(program)).returncode == 1
        assert containerd.config.read_bytes() == before
    status, out, said = removed(containerd)
    assert (status, out) == (0, "containerd changed\n"), said
    assert "was changed since: took out rewarm's part only" in said
    assert containerd.config.read_text() == CONTAINERD + KATA


def test_a_refresh_keeps_what_was_added_between_the_marks(containerd: Registering) -> None:
    text = (
        containerd.config.read_text().replace(END, KATA + END).replace("SystemdCgroup = false", "SystemdCgroup = true")
    )
    containerd.config.write_text(text)
    assert containerd.register() == "changed"
    assert set(runtimes(containerd)) == {"runc", "kata", "rewarm"}
    assert runtimes(containerd)["rewarm"]["options"]["SystemdCgroup"] is True
    assert containerd.register() == "unchanged"
    assert removed(containerd)[0] == 0
    assert set(runtimes(containerd)) == {"runc", "kata"}


def test_options_that_were_added_to_the_built_in_runtime(tmp_path: Path) -> None:
    """rewarm named it, where no file named a runtime; what somebody adds to it is theirs."""
    one = at(tmp_path, "containerd")
    write(one.config, "# nothing\n")
    one.register()
    options = f'[plugins."{CRI}".containerd.runtimes.runc.options]\n  SystemdCgroup = true\n'
    one.config.write_text(one.config.read_text().replace(END, options + END))
    assert one.register() == "changed"
    assert runtimes(one)["rewarm"]["options"]["SystemdCgroup"] is True
    assert removed(one)[0] == 0
    assert runtimes(one) == {"runc": {"runtime_type": "io.containerd.runc.v2", "options": {"SystemdCgroup": True}}}


def test_a_block_of_an_earlier_rewarm(containerd: Registering) -> None:
    """Its record does not say what it wrote between the marks."""
    record = json.loads((containerd.state / "containerd.json").read_text())
    for entry in record.values():
        del entry["blocks"]
    (containerd.state / "containerd.json").write_text(json.dumps(record))
    containerd.config.write_text(containerd.config.read_text() + "[debug]\n  level = 'info'\n")
    assert removed(containerd)[0] == 0
    assert containerd.config.read_text() == CONTAINERD + "[debug]\n  level = 'info'\n"


# The other engines


def spread(one: Registering, text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True) if one.engine == "docker" else printed_anew(text)


@pytest.mark.parametrize("engine", ["docker", "crio", "podman"])
def test_other_engines_files_printed_anew(tmp_path: Path, engine: str) -> None:
    one = at(tmp_path, engine)
    if engine == "docker":
        write(one.config, '{"debug": true}')
    before = without_state(tmp_path)
    one.register()
    registered = one.config.read_text()
    one.config.write_text(spread(one, registered))
    assert one.register() == ("unchanged" if engine == "docker" else "changed")
    one.config.write_text(spread(one, registered))
    status, out, said = removed(one)
    assert (status, out) == (0, f"{engine} changed\n"), said
    if engine == "docker":
        assert json.loads(one.config.read_text()) == {"debug": True}
    else:
        assert without_state(tmp_path) == {name: what for name, what in before.items() if "etc/docker" not in name}


@pytest.mark.parametrize(
    ("engine", "theirs", "left"),
    [
        (
            "crio",
            '[crio.runtime.runtimes.kata]\nruntime_path = "/k"\n',
            {"crio": {"runtime": {"runtimes": {"kata": {"runtime_path": "/k"}}}}},
        ),
        ("podman", '  kata = ["/k"]\n', {"engine": {"runtimes": {"kata": ["/k"]}}}),
    ],
)
@pytest.mark.parametrize("marks", [True, False])
def test_drop_ins_that_were_added_to(tmp_path: Path, engine: str, theirs: str, left: object, marks: bool) -> None:
    one = at(tmp_path, engine)
    one.register()
    text = one.config.read_text().replace(END, theirs + END)
    one.config.write_text(text if marks else printed_anew(text))
    assert "of somebody else; move them to another file there" in one.try_register().stderr
    assert removed(one)[0] == 0
    assert tomllib.loads(one.config.read_text()) == left


@pytest.mark.parametrize("engine", ["crio", "podman"])
def test_a_drop_in_of_somebody_elses_that_names_the_program(tmp_path: Path, engine: str) -> None:
    one = at(tmp_path, engine)
    one.register()
    other = one.config.parent / "50-mine.conf"
    other.write_text(one.config.read_text().replace("rewarm = ", "mine = ").replace(".rewarm]", ".mine]"))
    status, _, said = removed(one)
    assert status == 1 and f"{other} names {BINARY}" in said and "runtimes.mine" in said
    assert one.config.exists()
    other.unlink()
    assert removed(one)[0] == 0


def test_settings_that_were_added_to(tmp_path: Path) -> None:
    program = write(tmp_path / "custom-runc", "#!/bin/sh\necho runc version 1.1.5\n")
    program.chmod(0o755)
    one = at(tmp_path, "containerd")
    write(one.config, CONTAINERD + f'      BinaryName = "{program}"\n')
    settings = tmp_path / "etc/rewarm/config.yaml"
    words = ("register", "--binary", BINARY, "--settings", str(settings), f"containerd={one.config}")
    assert one.run(*words).returncode == 0
    settings.write_text(settings.read_text().replace(END, "deadline: 60\n" + END))
    assert one.run(*words).returncode == 0
    assert (load(settings).deadline, load(settings).runtimes) == (60, (str(program),))
    settings.write_text(settings.read_text().replace(END, "workers: 3\n" + END))
    assert one.run("unregister").returncode == 0
    assert settings.read_text() == "deadline: 60\nworkers: 3\n"
