"""rewarm-runc, the launcher: what goes to Python, what to the low-level runtime, and how it fails.

The real binary, built plain and with ASan and UBSan, in an install prefix whose python3 and runc are scripts that write
down how they were called.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from rewarm import doctor
from rewarm.checks import OK, WARNING

REPOSITORY = Path(__file__).resolve().parents[2]
NATIVE = REPOSITORY / "native"
ANNOTATED = '{"annotations": {"rewarm.dev/snapshot": "x"}}'
REAL_RUNC = "/usr/sbin/runc"


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp(request.param)
    sanitize = ["SANITIZE=1"] if request.param == "sanitized" else []
    subprocess.run(["make", "-s", "-C", NATIVE, f"BUILD={build}", *sanitize, f"{build}/rewarm-runc"], check=True)
    return build / "rewarm-runc"


@dataclass
class Result:
    status: int
    who: str  # "python", the name of a runtime, or "" when nothing was executed
    words: list[str]
    stdout: str
    stderr: str


@dataclass
class Node:
    """One machine as far as the launcher sees it."""

    base: Path

    @property
    def binary(self) -> Path:
        return self.base / "prefix/bin/rewarm-runc"

    @property
    def python(self) -> Path:
        return self.base / "prefix/venv/bin/python3"

    @property
    def state(self) -> Path:
        return self.base / "state"

    @property
    def config(self) -> Path:
        return self.base / "config.yaml"

    def settings(self, text: str) -> None:
        self.config.write_bytes(text.encode())
        self.config.chmod(0o644)

    def program(self, path: Path, who: str) -> None:
        """A program that writes down its words and the launcher's variable."""
        path.parent.mkdir(parents=True, exist_ok=True)
        record = self.base / "record"
        path.write_text(
            f'#!/bin/sh\nprintf \'%s\\0\' {who} "$REWARM_LAUNCHER" "$@" > {record}\necho {who} was here\nexit 7\n'
        )
        path.chmod(0o755)

    def bundle(self, config: str | None, name: str = "bundle") -> Path:
        directory = self.base / name
        directory.mkdir(exist_ok=True)
        if config is not None:
            (directory / "config.json").write_text(config)
        return directory

    def container(self, escaped_root: str, name: str) -> None:
        (self.state / "containers" / escaped_root / name).mkdir(parents=True)

    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.base}/path1:{self.base}/path2", "REWARM_CONFIG": str(self.config)}

    def run(self, *words: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Result:
        record = self.base / "record"
        record.unlink(missing_ok=True)
        done = subprocess.run(
            [self.binary, *words],
            env=self.environment() if env is None else env,
            cwd=cwd or self.base,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr
        who, launcher, *rest = record.read_text().split("\0")[:-1] if record.exists() else ["", ""]
        assert launcher == (str(self.binary) if who == "python" else ""), "only Python is told of the launcher"
        if who == "python":
            assert rest[:2] == ["-I", "-c"] and rest[2].endswith("; from rewarm import runtime; runtime.entry()")
            rest = rest[3:]
        return Result(done.returncode, who, rest, done.stdout, done.stderr)


@pytest.fixture
def node(launcher: Path, tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    node.binary.parent.mkdir(parents=True)
    shutil.copy2(launcher, node.binary)
    node.program(node.python, "python")
    node.program(tmp_path / "path2/runc", "runc")
    node.settings(f"state_dir: {node.state}\n")
    yield node


def shim(command: Sequence[str | Path], root: str = "/run/containerd/runc/k8s.io") -> list[str | Path]:
    """The words that containerd's shim puts before a command."""
    return ["--root", root, "--log", "/dev/null", "--log-format", "json", "--systemd-cgroup", *command]


# --- which way a call goes


def test_a_version_of_its_own(node: Node) -> None:
    """Python is started from the version that `venv` leads to, since an upgrade renames it. Other links stay links."""
    node.bundle(ANNOTATED)
    words = shim(["create", "--bundle", node.base / "bundle", "c1"])
    link, versions = node.base / "prefix/venv", node.base / "prefix/venvs"
    shutil.rmtree(link)
    for name in ("one", "two"):
        at = versions / name / "bin/python3"
        node.program(at, "python")
        at.write_text(at.read_text().replace("\n", f"\necho $0 >> {node.base}/paths\n", 1))
    for target in ("venvs/one", "venvs/two", "../prefix/venvs/one", str(versions / "two"), "venvs/../venvs/one"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert node.run(*words).who == "python"
    settled = [f"{versions}/one/bin/python3", f"{versions}/two/bin/python3"]
    assert (node.base / "paths").read_text().split() == [*settled, *[f"{link}/bin/python3"] * 3]
    link.unlink()
    link.symlink_to("venvs/gone")
    done = node.run(*words)
    assert done.who == "runc"


@pytest.mark.parametrize(
    "form",
    [["--bundle", "{}"], ["--bundle={}"], ["-bundle", "{}"], ["-bundle={}"], ["-b", "{}"],
                                  ["-b={}"], ["--b", "{}"]])  # fmt: skip
@pytest.mark.parametrize("annotated", [True, False])
def test_create_looks_into_the_bundle(node: Node, form: list[str], annotated: bool) -> None:
    bundle = node.bundle(ANNOTATED if annotated else '{"annotations": {"rewarm.device/x": "rewarm.dev"}}')
    words = shim(["create", *[word.format(bundle) for word in form], "--pid-file", "create", "--no-pivot",
                  "--console-socket", "start", "--preserve-fds=2", "c1"])  # fmt: skip
    result = node.run(*words)
    assert result.who == ("python" if annotated else "runc")
    assert result.words == [str(word) for word in words]
    assert result.status == 7


@pytest.mark.parametrize(
    "words",
    [
        ["create", "c1"],  # the working directory is the default
        ["create", "--bundle=", "c1"],
        ["--", "create", "--pid-file", "p", "--", "c1"],
        ["create", "c1", "--bundle", "{bundle}"],  # urfave/cli takes flags behind words
        ["create", "--bundle", "/nowhere", "-b", "{bundle}", "c1"],  # the last one wins
        ["create", "--flag-of-a-newer-runc", "value", "--bundle", "{bundle}", "c1"],
        ["-debug", "-root", "/r", "-log=/dev/null", "create", "-bundle", "{bundle}", "c1"],
        ["--rootless", "false", "--criu", "create", "create", "--pid-file", "--x", "--bundle={bundle}", "c1"],
    ],
)
def test_create_is_found_in_every_form_of_argv(node: Node, words: list[str]) -> None:
    bundle = node.bundle(ANNOTATED)
    words = [word.format(bundle=bundle) for word in words]
    result = node.run(*words, cwd=bundle)
    assert (result.who, result.words) == ("python", words)


@pytest.mark.parametrize(
    "config",
    ['{"annotations": {"rewarm.dev\\/snapshot": "x"}}', '{"annotations": {"rewarm.dev\\u002fsnapshot": "x"}}',
     " " * 200_000 + ANNOTATED],
    ids=["escaped slash", "escape sequence", "far into the file"],
)  # fmt: skip
def test_an_annotation_is_found_however_it_is_written(node: Node, config: str) -> None:
    assert node.run("create", "-b", node.bundle(config), "c1").who == "python"


def test_a_bundle_that_cannot_be_read_is_for_runc_to_complain_about(node: Node) -> None:
    assert node.run("create", "-b", "/nowhere", "c1").who == "runc"
    assert node.run("create", "-b", node.bundle(None), "c1").who == "runc"
    (node.bundle(None, "directory") / "config.json").mkdir()
    assert node.run("create", "-b", node.base / "directory", "c1").who == "runc"
    os.mkfifo(node.bundle(None, "fifo") / "config.json")
    assert node.run("create", "-b", node.base / "fifo", "c1").who == "runc"
    huge = node.bundle(ANNOTATED, "huge") / "config.json"
    os.truncate(huge, (64 << 20) + 1)
    assert node.run("create", "-b", huge.parent, "c1").who == "runc"
    os.truncate(huge, 64 << 20)
    assert node.run("create", "-b", huge.parent, "c1").who == "python"
    assert node.run("create", "-b", node.bundle("", "empty"), "c1").who == "runc"


@pytest.mark.parametrize(
    "words",
    [
        ["state", "c1"],
        ["kill", "--all", "c1", "9"],
        ["exec", "--process", "create", "--detach", "--pid-file", "p", "c1"],
        ["restore", "-no-subreaper", "--bundle", "{bundle}", "c1"],
        ["run", "--bundle", "{bundle}", "c1"],
        ["checkpoint", "--help"],
        ["features"],
        ["--version"],
        ["-v"],
        ["--help"],
        [],
        ["create", "--bundle", "{bundle}", "--help"],
        ["create", "--bundle"],
        ["create", "---bundle", "{bundle}", "c1"],
        ["--root"],
        ["list", "create"],
        ["", "create", "--bundle", "{bundle}", "c1"],
    ],
)
def test_everything_else_is_runc_at_once(node: Node, words: list[str]) -> None:
    bundle = node.bundle(ANNOTATED)
    node.container("run-runc", "c1")
    words = [word.format(bundle=bundle) for word in words]
    result = node.run(*words, cwd=bundle)
    assert (result.who, result.words) == ("runc", words)
    assert (result.stdout, result.stderr) == ("runc was here\n", "")


@pytest.mark.parametrize("command", [["start"], ["delete"], ["delete", "--force"], ["delete", "-f"]])
@pytest.mark.parametrize(
    ("root", "escaped"),
    [
        (None, "run-runc"),
        ("", "run-runc"),
        ("/run/containerd/runc/k8s.io", "run-containerd-runc-k8s.io"),
        ("/run/docker/runtime-runc/moby", "run-docker-runtime\\x2drunc-moby"),
        ("//run/./x//y/../runc/", "run-x-runc"),
        ("/../../run-a/../-", "\\x2d"),
        ("/", ""),
    ],
)
def test_start_and_delete_go_to_python_for_containers_of_ours(
    node: Node, command: list[str], root: str | None, escaped: str
) -> None:
    words = [*([] if root is None else ["--root", root]), *command]
    assert node.run(*words, "c1").who == "runc"
    node.container(escaped, "c1")
    result = node.run(*words, "c1")
    assert (result.who, result.words) == ("python", [*words, "c1"])
    assert node.run(*words, "c2").who == "runc"
    assert node.run("--root", "/another", *command, "c1").who == "runc"


def test_a_relative_root_is_taken_from_the_working_directory(node: Node) -> None:
    (node.base / "sub").mkdir()
    escaped = str(node.base / "x").lstrip("/").replace("-", "\\x2d").replace("/", "-")
    node.container(escaped, "c1")
    assert node.run("--root", "../x", "start", "c1", cwd=node.base / "sub").who == "python"
    assert node.run("--root", "x", "start", "c1", cwd=node.base / "sub").who == "runc"


def test_create_over_a_left_over_container_directory_goes_to_python(node: Node) -> None:
    node.container("run-runc", "c1")
    assert node.run("create", "-b", node.bundle("{}"), "c1").who == "python"
    assert node.run("create", "-b", node.bundle("{}"), "c2").who == "runc"


@pytest.mark.parametrize("name", ["", ".", "..", "../run-runc/c1", "c1/", "x" * 300])
def test_an_id_that_is_no_name_is_runcs_to_refuse(node: Node, name: str) -> None:
    node.container("run-runc", "c1")
    assert node.run("delete", name).who == "runc"


# --- what the program behind sees


def test_stdio_descriptors_and_environment_go_through_untouched(node: Node) -> None:
    seen = node.base / "path1/runc"
    seen.parent.mkdir()
    seen.write_text("#!/usr/bin/python3 -I\nimport os, sys\nprint(sorted(os.listdir('/proc/self/fd')), os.environ,"
                    " sys.stdin.read())\nprint('err', file=sys.stderr)\n")  # fmt: skip
    seen.chmod(0o755)
    environment = {**node.environment(), "_OCI_SYNCPIPE": "3", "PYTHONPATH": "/x"}
    read_end, write_end = os.pipe()
    try:
        outputs = [
            subprocess.run(
                [binary, "create", "-b", node.bundle("{}"), "c1"],
                input=b"hello",
                capture_output=True,
                env=environment,
                pass_fds=[read_end, write_end],
                check=True,
            )
            for binary in (node.binary, seen)
        ]
    finally:
        os.close(read_end)
        os.close(write_end)
    assert outputs[0].stdout == outputs[1].stdout and b"hello" in outputs[0].stdout
    assert outputs[0].stderr == outputs[1].stderr == b"err\n"


def test_features_of_the_real_runc_is_pure_json(node: Node) -> None:
    assert os.access(REAL_RUNC, os.X_OK), f"{REAL_RUNC} is missing: install the package runc"
    done = subprocess.run(
        [node.binary, "features"], capture_output=True, env={"REWARM_CONFIG": str(node.config)}, check=True
    )
    assert "ociVersionMin" in json.loads(done.stdout)
    assert done.stderr == b""


def test_a_link_to_the_launcher_finds_the_prefix(node: Node) -> None:
    link = node.base / "elsewhere"
    link.symlink_to(node.binary)
    node.container("run-runc", "c1")
    subprocess.run([link, "start", "c1"], env=node.environment(), check=False)
    assert (node.base / "record").read_text().split("\0")[:2] == ["python", str(node.binary)]


# --- the low-level runtime


def test_the_launcher_never_executes_itself(node: Node) -> None:
    (node.base / "path1").mkdir()
    os.link(node.binary, node.base / "path1/runc")
    assert node.run("state", "c1").who == "runc"  # the one in path2
    (node.base / "path1/runc").unlink()
    (node.base / "path1/runc").symlink_to(node.binary)
    assert node.run("state", "c1").who == "runc"
    (node.base / "path2/runc").unlink()
    result = node.run("state", "c1")
    assert (result.status, result.who) == (127, "")


def test_what_is_no_program_is_passed_over(node: Node) -> None:
    (node.base / "path1").mkdir()
    (node.base / "path1/runc").mkdir()
    assert node.run("state", "c1").who == "runc"
    (node.base / "path1/runc").rmdir()
    (node.base / "path1/runc").write_text("not executable")
    assert node.run("state", "c1").who == "runc"


def test_relative_entries_of_path_are_passed_over(node: Node) -> None:
    node.program(node.base / "runc", "trap")
    environment = {**node.environment(), "PATH": f":.:{node.base}/path2:"}
    assert node.run("state", "c1", env=environment, cwd=node.base).who == "runc"


def test_without_path_the_usual_places_are_searched(node: Node) -> None:
    for environment in ({}, {"PATH": ""}):
        result = node.run("--version", env={"REWARM_CONFIG": str(node.config), **environment})
        assert result.stdout.startswith("runc version"), result.stderr


def test_the_first_of_the_list_that_is_there_is_taken(node: Node) -> None:
    node.settings("runtimes: [nvidia-container-runtime, crun, runc]\n")
    assert node.run("state", "c1").who == "runc"
    node.program(node.base / "path2/crun", "crun")
    assert node.run("state", "c1").who == "crun"
    node.settings(f"runtimes: [{node.base}/special/runc, runc]\n")
    assert node.run("state", "c1").who == "runc"
    node.program(node.base / "special/runc", "special")
    assert node.run("state", "c1").who == "special"


def test_no_runtime_is_an_error_in_runcs_log(node: Node) -> None:
    node.settings('runtimes: [crun, "youki"]\n')
    result = node.run("--log", node.base / "log.json", "--log-format", "json", "state", "c1")
    assert (result.status, result.who, result.stdout) == (127, "", "")
    line = json.loads((node.base / "log.json").read_text())
    assert line["level"] == "error" and line["time"].endswith("Z")
    for part in ("[crun, youki]", f"{node.base}/path1:{node.base}/path2", str(node.config)):
        assert part in line["msg"]
    assert result.stderr == line["msg"] + "\n"

    node.run("--log", node.base / "log", "state", "c1")
    assert (node.base / "log").read_text().startswith('time="2')
    assert ' level=error msg="rewarm: find low-level runtime: none of [crun, youki] ' in (node.base / "log").read_text()
    result = node.run("state", "c1")
    assert " level=error msg=" in result.stderr and result.stderr.count("\n") == 1
    result = node.run("--log", "/nowhere/log", "state", "c1")
    assert result.status == 127 and "none of [crun, youki]" in result.stderr


def test_a_runtime_that_cannot_be_executed_is_an_error(node: Node) -> None:
    (node.base / "path2/runc").write_text("#!/nowhere\n")
    result = node.run("state", "c1")
    assert result.status == 126
    assert f"run {node.base}/path2/runc: No such file" in result.stderr


# --- Python is broken


@pytest.mark.parametrize("command", [["create", "-b", "{bundle}"], ["delete"]])
def test_without_python_create_and_delete_go_on_with_a_warning(node: Node, command: list[str]) -> None:
    node.python.unlink()
    node.container("run-runc", "c1")
    words = [word.format(bundle=node.bundle(ANNOTATED)) for word in command]
    log = node.base / "log.json"
    result = node.run("--log", log, "--log-format=json", *words, "c1")
    assert (result.who, result.words) == ("runc", ["--log", str(log), "--log-format=json", *words, "c1"])
    assert (result.stdout, result.stderr) == ("runc was here\n", "")
    (line,) = [json.loads(text) for text in log.read_text().splitlines()]
    assert line["level"] == "warning"
    assert f"run {node.python}: No such file or directory; going on without rewarm" in line["msg"]


def test_without_python_start_of_our_container_is_an_error(node: Node) -> None:
    node.python.unlink()
    node.container("run-runc", "c1")
    log = node.base / "log.json"
    result = node.run("--log", log, "--log-format=json", "start", "c1")
    assert (result.status, result.who) == (1, "")
    line = json.loads(log.read_text())
    assert line["level"] == "error" and str(node.python) in line["msg"]
    assert result.stderr == line["msg"] + "\n"


def test_odd_settings_without_python_do_not_stop_other_containers(node: Node) -> None:
    node.python.unlink()
    node.settings("runtimes:\n  - crun\n")
    for command in ("start", "state"):
        result = node.run(command, "c1")
        assert result.who == "runc"
        assert result.stderr.count("level=warning") == 1


# --- settings


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n\n---\n",
        "store: /x\nignore_env: [A, 'B',\n  C\n]\nruntime_roots:\n- /a\n- /b: c\n",
        "runtimes: [runc]",
        "runtimes: [ runc , \"crun\" , 'a b' ]   # comment",
        "runtimes:   ['missing', runc]\r\nstore: \"/x\" # y\r\n",
        "---\nruntimes: [missing, /nowhere/crun, runc]\non_miss: fail\n",
        "compression: auto\nthreads: 0\ncache: /var/cache/x\ncache_size: 50G\nruntimes: [runc]\n",
        'namespaces:\n  "*":\n    ignore: all\n  a:\n    pinned: {capture: never}\nruntimes: [runc]\n',
        "cache: off  # none\ncache_size: '500M'\ncompression: \"zstd\"\n",
        "namespaces: {}",
        "namespaces: {}  # none\nruntimes: [runc]\n",
        "namespaces: {team: {ignore: all}}\n",
        "namespaces: {a: {share: [b-1, c], pinned: {capture: never, ready: http://:80/x}}, d: {}}\nruntimes: [runc]\n",
        "namespaces:\n  a: {ignore: [engine, ready]}\n  'b': {\n    ignore: all}\n",
        "# isn't\nignore_env: [A, 'it', \"B*\", C]  # it's\nstore: /it's\nruntime_roots:\n  # isn't\n  - '/a b'\n",
    ],
)
def test_simple_settings_are_read_without_python(node: Node, text: str) -> None:
    node.settings(text)
    assert node.run("state", "c1").who == "runc"


@pytest.mark.parametrize(
    "text",
    [
        "runtimes:\n  - runc\n",
        "runtimes:\n- runc\n",
        "runtimes: [runc,\n  crun]\n",
        "runtimes: runc\n",
        "runtimes: []\n",
        "runtimes:\n",
        "runtimes: [runc, ]\n",
        "runtimes: [runc, [crun]]\n",
        "runtimes: [yes]\n",
        "runtimes: [1.0]\n",
        "runtimes: ['']\n",
        "runtimes: ['-x']\n",
        "runtimes: [a/b]\n",
        "runtimes: ['it''s']\n",
        'runtimes: ["a\\tb"]\n',
        "runtimes: [runc] crun\n",
        "runtimes: [runc]\nruntimes: [crun]\n",
        "runtimes: &a [runc]\n",
        "runtimes: !!seq [runc]\n",
        "runtimes: [runc: crun]\n",
        "runtimes: [{}]\n".format(", ".join(["runc"] * 17)),
        '"runtimes": [runc]\n',
        "runtimes : [runc]\n",
        "? runtimes\n: [runc]\n",
        "  runtimes: [runc]\n",
        "{runtimes: [runc]}\n",
        "store: 'x\nruntimes: [crun]\n'\n",
        "store: {a: b,\nruntimes: [crun]}\n",
        "a: {b: {c: d}\n",
        "a: {b: c]\n",
        "a: {b: c}}\n",
        "a: {b: c} d\n",
        "a: {b: c}# d\n",
        "a: {b: 'c'}\n",
        "a: {b: c # }\n",
        "a: {b: c\\}\n",
        "a: {b: &c d}\n",
        "a: {b: !!str c}\n",
        "a: " + "{a: " * 40 + "}" * 40 + "\n",
        "x: ['b\nruntimes: [c]\ny: z']\n",
        "x: [a, b 'c, 'd\nruntimes: [c]\ny: z']\n",
        "x: [a, {'b': 'c\nruntimes: [c]\ny: z'}]\n",
        "x: [a#', 'b\nruntimes: [c]\ny: z']\n",
        "x: [\n  'b\nruntimes: [c]\ny: z']\n",
        'x:\n  "b\nruntimes: [c]\ny: z"\n',
        'x:\n- "b\nruntimes: [c]\ny: z"\n',
        'x:\n  - ["a\\" "]\n',
        "%YAML 1.1\n---\nruntimes: [runc]\n",
        "store: /x\n---\nruntimes: [runc]\n",
        "a: &x [1]\nb: *x\n",
        "# a\u2028runtimes: [crun]\n",
        "# a\rruntimes: [crun]\n",
        "\ufeffruntimes: [crun]\n",
        "state_dir: relative\n",
        "state_dir: |\n  /x\n",
        "state_dir: /x\n  y\n",
        "state_dir: '/x '\n",
        "just words\n",
        "\0",
    ],
)
def test_all_other_yaml_is_pythons(node: Node, text: str) -> None:
    node.settings(text)
    result = node.run("features")
    assert (result.who, result.words) == ("python", ["features"])


def test_doctor_warns_of_settings_that_take_each_call_through_python(node: Node) -> None:
    paths = ":".join(str(REPOSITORY / part) for part in ("shim", "hooks", "native"))
    node.python.write_text(f'#!/bin/sh\nshift; PYTHONPATH={paths} exec {sys.executable} "$@"\n')  # without -I
    runc = node.base / "path2/runc"
    runc.write_text("#!/bin/sh\necho 'Incorrect Usage: flag needs an argument: -root'; exit 1\n")
    for text, odd in (
        ("deadline: 30\n", False),
        ("namespaces: {}\n", False),
        ("namespaces:\n  '*':\n    ignore: all\n", False),
        ("namespaces: {'*': {ignore: all}}\n", True),
        (f"runtimes:\n  - {runc}\n", True),
    ):
        node.settings(f"{text}state_dir: {node.state}\n")
        looked = replace(doctor.look(node.config), prefix=str(node.binary.parents[1]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{node.base}/path2:{os.environ['PATH']}")
            check = doctor.check_settings(looked)
        assert (check.status, "starts Python" in check.found) == ((WARNING, True) if odd else (OK, False)), (
            text,
            check,
        )


def test_a_settings_file_that_python_refuses_goes_to_python(node: Node) -> None:
    node.config.chmod(0o666)
    assert node.run("state", "c1").who == "python"
    node.config.chmod(0o644)
    os.chown(node.config, 65534, 65534)
    assert node.run("state", "c1").who == "python"
    node.config.unlink()
    assert node.run("state", "c1").who == "runc"
    node.config.mkdir()
    assert node.run("state", "c1").who == "python"


def test_state_dir_in_quotes_is_read(node: Node) -> None:
    node.container("run-runc", "c1")
    for text in (f"state_dir: '{node.state}'", f'state_dir: "{node.state}"  # here', f"state_dir:  {node.state}/ #"):
        node.settings(text)
        assert node.run("start", "c1").who == "python", text
    node.settings(f"state_dir: {node.base}/other")
    assert node.run("start", "c1").who == "runc"


def agrees(node: Node, text: str) -> bool:
    """Whether the launcher reads `text` itself, and then finds what PyYAML finds, which is not the default."""
    node.settings(text)
    result = node.run("state", "c1")
    if result.who == "python":
        return False
    try:
        meant = yaml.safe_load(text)
    except yaml.YAMLError:
        return False  # broken elsewhere in the file: Python says so when it is called for
    assert meant is None or isinstance(meant, dict), text
    names = (meant or {}).get("runtimes", ["runc"])
    if names == ["runc"]:
        assert result.who == "runc", text
        return False
    assert result.status == 127 and f"none of [{', '.join(names)}]" in result.stderr, text
    return True


def test_what_the_launcher_reads_is_what_yaml_means(node: Node) -> None:
    """Lines thrown together at random: whenever the launcher does not ask Python, it has to agree with PyYAML."""
    good = ["runtimes: [a1, b2]", "runtimes: ['c 3']", "v: [p,", "  q]", "w:", "  r: s", "# t", "n: {}"]
    odd = ["runtimes:", "- d4", "  - e5", "store: 'x", "'", "  runtimes: [f6]",
           "]", "x: [", "x: |", "  text", "# note", "", "---", "x: {", "}", 'y: "z"', "- runtimes: [g7]", " ]", "\ttab",
           "...", "runtimes: [h8] # x", "z: a # [", "state_dir: /s", "n: {a: {b: c}} # }", "n: {a: [b}", "n: {a: b",
           "  'i", "m: j']", "x: ['k", '  "l', 'm: o"', "  p: {q", "m: r}", "  , s]"]  # fmt: skip
    chance = random.Random(20)
    agreed = sum(agrees(node, "\n".join(chance.choices([*odd, *good * 4], k=chance.randint(1, 5)))) for _ in range(250))
    assert agreed > 10


def test_what_stands_in_a_value_is_no_key(node: Node) -> None:
    """Values of random characters, between which a key of the launcher's may be a part of them."""
    marks = [
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        ", ",
        ": ",
        " ",
        "a",
        "b",
        "#",
        " #",
        "\\",
        "-",
        "- ",
        "&a ",
        "*a",
        "!t ",
        "?",
    ]
    closing = ["", "}", "]", "'", '"', "']", '"]', "'}", '"}', "]}"]
    chance = random.Random(21)

    def value(most: int) -> str:
        return "".join(chance.choices(marks, k=chance.randint(0, most)))

    agreed = 0
    for _ in range(400):
        first = chance.choice(["x: {", "x: [", "x: ", "x:\n  ", "x:\n- ", "x:\n  - [", "x:\n  y: {"])
        last = chance.choice(["y: ", "  ", "# ", "y: ["]) + value(2) + chance.choice(closing)
        agreed += agrees(node, f"{first}{value(6)}{chance.choice(closing)}\nruntimes: [a1]\n{last}\n")
    assert agreed > 10
