"""A node under test: an installed rewarm with settings, store and state directories of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from support.runtime import Runtime


class Node:
    """`directory` holds everything; nodes that share `store` are nodes that share a store.

    `runtime` drives this node's rewarm-runc. `settings` are keys of config.yaml, on top of the directories.
    """

    def __init__(self, directory: Path, prefix: Path, *, store: Path | None = None, **settings: object) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.prefix = prefix
        self.store = store or directory / "store"
        self.state = directory / "state"
        self.config = directory / "config.yaml"
        self.env = {"REWARM_CONFIG": str(self.config)}
        self.configure(**settings)
        self.runtime = Runtime(directory / "runtime", prefix / "bin" / "rewarm-runc", env=self.env)

    def configure(self, **settings: object) -> None:
        """Write config.yaml anew. JSON is YAML, and its lists are flow lists, which the launcher reads too."""
        values = {
            "store": str(self.store),
            "state_dir": str(self.state),
            "work_dir": str(self.directory / "work"),
            "runtime_roots": [str(self.directory / "*" / "root")],
            **settings,
        }
        self.config.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
        self.config.chmod(0o644)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.runtime.cleanup()

    def rewarm(self, *args: str | Path, check: bool = True, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """The command line tool with this node's settings; AssertionError with its output when it fails and `check`."""
        done = subprocess.run(
            [str(self.prefix / "bin" / "rewarm"), *map(str, args)],
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"rewarm {args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def json(self, *args: str | Path) -> Any:
        return json.loads(self.rewarm(*args, "--json").stdout)

    def container_directory(self, container_id: str, root: Path | None = None) -> Path:
        """Where rewarm keeps what it knows about a container of `runtime` (or of another runc root)."""
        escaped = str(root or self.runtime.root).lstrip("/").replace("-", "\\x2d").replace("/", "-")
        return self.state / "containers" / escaped / container_id

    def outcome(self, container_id: str, root: Path | None = None) -> dict[str, Any]:
        """outcome.json of a container: `outcome` is warm or cold, `reason` says why it is cold."""
        found: dict[str, Any] = json.loads((self.container_directory(container_id, root) / "outcome.json").read_text())
        return found
