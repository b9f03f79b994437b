"""The command lines with which containerd's shim and conmon call runc.

runc parses with urfave/cli v1 on Go's `flag`: one dash and two mean the same, a value follows after a
space or `=`, flags end at the first word that is none, and `--` ends them too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from rewarm.errors import OciError

# The last two are crun's, which may be the runtime behind.
_GLOBAL_WITH_VALUE = frozenset({"root", "log", "log-format", "criu", "rootless", "cgroup-manager", "log-level"})
_COMMAND_WITH_VALUE = {
    "create": frozenset({"bundle", "b", "console-socket", "pidfd-socket", "pid-file", "preserve-fds"}),
    "start": frozenset[str](),
    "delete": frozenset[str](),
}
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})  # of Go's strconv.ParseBool
_DEFAULT_ROOT = "/run/runc"


class Invocation(NamedTuple):
    """One call of the runtime.

    `words` is the argument vector without argv[0], as it came in: whoever hands the call on to the
    low-level runtime passes exactly these. `flags` are the command's own flags by name without dashes
    (booleans as "true"), `global_flags` those before the command.
    """

    words: tuple[str, ...]
    global_flags: Mapping[str, str]
    command: str
    flags: Mapping[str, str] = MappingProxyType({})
    container_id: str = ""

    @property
    def root(self) -> str:
        """The directory in which runc keeps its containers, absolute (runc resolves it the same way)."""
        return os.path.abspath(self.global_flags.get("root") or _default_root())

    @property
    def log(self) -> str:
        return self.global_flags.get("log", "")

    @property
    def log_format(self) -> str:
        return self.global_flags.get("log-format", "text")

    @property
    def systemd_cgroup(self) -> bool:
        return self.global_flags.get("systemd-cgroup") in _TRUE

    @property
    def bundle(self) -> str:
        return os.path.abspath(self.flags.get("bundle") or self.flags.get("b") or os.getcwd())

    @property
    def pid_file(self) -> str:
        return self.flags.get("pid-file", "")

    def is_set(self, *names: str) -> bool:
        """Whether a boolean flag of the command is given, under any of its names, and true."""
        return any(self.flags.get(name) in _TRUE for name in names)


def parse(words: list[str]) -> Invocation:
    """Take apart the words after argv[0]; raises OciError for a flag without its value or a missing container id."""
    global_flags, at, _ = _flags(words, 0, _GLOBAL_WITH_VALUE)
    command = words[at] if at < len(words) else ""
    known = _COMMAND_WITH_VALUE.get(command)
    if known is None:
        return Invocation(tuple(words), global_flags, command)
    flags: dict[str, str] = {}
    names: list[str] = []
    at += 1
    ended = False
    while at < len(words):
        if not ended:
            more, at, ended = _flags(words, at, known)
            flags |= more
        # Flags may stand behind the id too.
        names += words[at : at + 1]
        at += 1
    if not names:
        raise OciError("parse command line", command, "it names no container", f"call it as `{command} [flags] ID`")
    return Invocation(tuple(words), global_flags, command, flags, names[0])


def _flags(words: list[str], at: int, with_value: frozenset[str]) -> tuple[dict[str, str], int, bool]:
    """The flags from `at` on, where they end, and whether it was by `--`."""
    flags: dict[str, str] = {}
    while at < len(words) and words[at].startswith("-") and words[at] != "-":
        word = words[at]
        at += 1
        if word == "--":
            return flags, at, True
        name, equals, value = word[2 if word.startswith("--") else 1 :].partition("=")
        if not equals:
            if name in with_value:
                if at >= len(words):
                    raise OciError("parse command line", word, "the flag has no value", "give it one")
                value = words[at]
                at += 1
            else:
                value = "true"
        flags[name] = value
    return flags, at, False


def _default_root() -> str:
    if os.geteuid() != 0 and os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(os.environ["XDG_RUNTIME_DIR"], "runc")
    return _DEFAULT_ROOT
