"""What install.sh found in the engines' files and what it wrote there, so that uninstall.sh can put it back.

Standard library only. One `ENGINE.json` an engine in the state directory, and the originals beside it. What is written
is noted before it is written, with what was written the time before: whichever of the two a kill leaves in the file,
nobody but rewarm wrote it, and the original is put back byte for byte. A file that somebody else has changed since
loses rewarm's part only.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from marked import blocks

MAX_BYTES = 8 << 20
TRIES = 3
_TEMPORARY = ".rewarm-tmp"
# What a file that was made for rewarm holds when rewarm's part is out of it.
_NOTHING = re.compile(r"\s*(?:\{\s*\}|version\s*=\s*\d+)?\s*")
# A text without rewarm's part; told the digests of the blocks written to that file, or None if nothing is on record.
Strip = Callable[[str, Path, Collection[str] | None], str]


class Refused(Exception):
    """A file cannot be changed safely. The text says which one, why, and what to do about it."""


class Changed(Refused):
    """Somebody else has written to a file since it was read, and what was to be written is of no use."""


T = TypeVar("T")


def anew(step: Callable[[], T]) -> T:
    """Runs a step that reads files and then writes them, and again if somebody else has written meanwhile."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(Changed):
            return step()
    return step()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_bytes(path: Path) -> bytes | None:
    """The content of a configuration file, None if there is none. Refused for what is not a file of sane size."""
    try:
        # A FIFO would keep an open() waiting for ever, a device could do anything.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Refused(f"{path} is not a regular file; make it one and run again")
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise Refused(f"{path} cannot be read: a part of its path is not a directory") from error
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror or error}; mend that and run again") from error
    if len(data) > MAX_BYTES:
        raise Refused(f"{path} has more than {MAX_BYTES >> 20} MiB, which is no configuration; mend it and run again")
    return data


def decode(data: bytes, path: Path) -> str:
    """Without newline translation, so that what is written back is the same. Raises Refused."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{path} cannot be read: it is not UTF-8 ({error.reason} at byte {error.start})") from error


def read_text(path: Path) -> str | None:
    """The text of a configuration file, None if there is none. Raises Refused."""
    data = read_bytes(path)
    return None if data is None else decode(data, path)


def atomic_write(
    path: Path,
    data: bytes,
    scratch: Path | None = None,
    mode: int = 0o644,
    check: Callable[[], None] | None = None,
    changed_ns: int | None = None,
) -> None:
    """Writes by rename, at a symlink its target. Keeps mode, owner and attributes (new file: `mode`). Raises Refused.

    `changed_ns` is the time of change that the file gets (None: now). `check` is called just before the rename, to
    raise what speaks against it. `scratch` is where the temporary file is made, on the same file system: for
    directories whose every file is read by somebody (CRI-O's), who must not find half of one there. By default it is
    the file's own directory.
    """
    path = Path(os.path.realpath(path))
    directory = scratch or path.parent
    sweep(path, directory)
    try:
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{path.name}.", suffix=_TEMPORARY)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {directory}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            if changed_ns is not None:
                os.utime(out.fileno(), ns=(changed_ns, changed_ns))
            if path.exists():
                _copy_attributes(path, out.fileno())
            else:
                os.fchmod(out.fileno(), mode)
            os.fsync(out.fileno())
        if check is not None:
            check()
        os.replace(temporary, path)
    except OSError as error:
        _unlink(temporary)
        raise Refused(f"{path} cannot be written: {error.strerror or error}; mend that and run again") from error
    except BaseException:
        _unlink(temporary)
        raise
    _sync(path.parent)


def _copy_attributes(path: Path, handle: int) -> None:
    """In this order, since without CAP_FOWNER (as a DaemonSet) nobody but a file's owner can do the rest."""
    status = path.stat()
    mode, special = status.st_mode & 0o1777, status.st_mode & 0o6000
    os.fchmod(handle, mode)
    names: list[str] = []
    with contextlib.suppress(OSError):  # not every file system has attributes
        names = os.listxattr(path)
    for name in names:
        with contextlib.suppress(OSError):  # some are the kernel's own
            os.setxattr(handle, name, os.getxattr(path, name))
    os.fchown(handle, status.st_uid, status.st_gid)
    if special:  # which a new owner takes away
        os.fchmod(handle, mode | special)


def sweep(path: Path, directory: Path | None = None) -> None:
    """Removes what a killed `atomic_write` of `path` has left."""
    pattern = f".{glob.escape(path.name)}.*{_TEMPORARY}"
    for left in glob.glob(str(Path(glob.escape(str(directory or path.parent))) / pattern)):
        _unlink(left)


def _unlink(path: str | Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _sync(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _blocks(data: bytes | None) -> list[str]:
    return [digest(block.encode("utf-8", "surrogateescape")) for block in blocks(_text(data or b""))]


class Journal:
    """The record of one engine's files: `engine` names it, `label` is its name in messages.

    `strip` takes rewarm's part out of a text (the text of a file that holds nothing else becomes empty or, as JSON, an
    empty object); `keep_out` says that no temporary file may lie in the directory of the engine's files.
    """

    def __init__(self, directory: Path, engine: str, label: str, strip: Strip, *, keep_out: bool = False) -> None:
        self.directory = directory
        self.label = label
        self.file = directory / f"{engine}.json"
        self._strip = strip
        self._keep_out = keep_out
        self._undone: tuple[dict[str, Any] | None, bytes | None] = (None, None)
        self._changed_ns = 0
        try:
            self.entries: dict[str, dict[str, Any]] = json.loads(self.file.read_bytes())
            for entry in self.entries.values():
                installed = entry["installed"]
                entry["installed"] = [installed] if isinstance(installed, str) else installed
                entry.setdefault("made", [])
                entry.setdefault("blocks", [])
            for path in self.entries:  # earlier versions let others read them
                with contextlib.suppress(FileNotFoundError):
                    os.chmod(self.original(Path(path)), 0o600)
        except FileNotFoundError:
            self.entries = {}
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise Refused(f"{self.file} is damaged: {error}; remove it and rewarm's part of {label}'s files") from error

    def say(self, message: str) -> None:
        print(f"rewarm: {self.label}: {message}", file=sys.stderr)

    def original(self, path: Path) -> Path:
        return self.directory / (str(path).lstrip("/").replace("-", r"\x2d").replace("/", "-") + ".orig")

    def wrote(self, path: Path, data: bytes | None) -> bool:
        """Whether `data` is what rewarm wrote to this file: nobody else has changed it since."""
        return data is not None and digest(data) in self.entries.get(str(path), {}).get("installed", ())

    def found(self, path: Path) -> bytes | None:
        """The file as it was found, None if there was none. Refused if the saved copy is damaged."""
        expected = self.entries[str(path)]["found"]
        if expected is None:
            return None
        saved = read_bytes(self.original(path)) or b""
        if digest(saved) != expected:
            raise Refused(f"{self.original(path)} is not what was saved; remove rewarm's part of {path} by hand")
        return saved

    def base(self, text: str, path: Path) -> str:
        """The text without rewarm's part, which programs copy to other files of the engine, too. Raises Refused."""
        blocks_there = self.entries.get(str(path), {}).get("blocks", [])
        return self._strip(text, path, blocks_there if self.entries else None)

    def write(
        self, path: Path, current: bytes | None, base: bytes | None, new: bytes, changed_ns: int | None = None
    ) -> None:
        """Writes `new`; `current` is what is there, `base` the same without rewarm's part. Raises Refused.

        Changed, with nothing on record, where something else is there by now.
        """
        entry = self.entries.get(str(path))
        self._undone = entry, None if entry is None or entry["found"] is None else read_bytes(self.original(path))
        self._changed_ns = path.stat().st_mtime_ns if path.exists() else 0
        made = [] if entry is None else entry["made"]
        ours = [*_blocks(new), *(name for name in _blocks(current) if entry is not None and name in entry["blocks"])]
        installed = [digest(new)]
        if self.wrote(path, current):
            # Nobody but us wrote since: what was found the first time is still what uninstall has to put back.
            base = self.found(path)
            installed.append(digest(current or b""))
        elif entry is not None and entry["found"] is None and _NOTHING.fullmatch(_text(base or b"")):
            base = None
        missing = [str(parent) for parent in path.parents if not parent.exists()]
        made = [*made, *(name for name in missing if name not in made)]
        self._note(path, base, {"installed": installed, "made": made, "blocks": list(dict.fromkeys(ours))})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"{path.parent} cannot be made: {error.strerror or error}") from error
        try:
            self._replace(path, current, new, changed_ns)
        except Changed:
            self._recall(path)
            raise

    def _replace(self, path: Path, current: bytes | None, new: bytes, changed_ns: int | None = None) -> None:
        """Writes `new` if `current` is there still: what others wrote since it was read would be lost."""

        def check() -> None:
            if read_bytes(path) != current:
                raise Changed(f"{path} was changed meanwhile; run again")

        atomic_write(path, new, self._scratch(path), check=check, changed_ns=changed_ns)

    def _scratch(self, path: Path) -> Path | None:
        return Path(os.path.realpath(path)).parent.parent if self._keep_out else None

    def _note(self, path: Path, base: bytes | None, entry: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        if base is not None:
            atomic_write(self.original(path), base, mode=0o600)  # it may hold what others must not read
        self.entries[str(path)] = {"found": None if base is None else digest(base), **entry}
        self._save()

    def _forget(self, path: Path) -> None:
        for name in self.entries.pop(str(path), {}).get("made", []):
            with contextlib.suppress(OSError):  # others have files there by now
                os.rmdir(name)
        self._save()
        self.original(path).unlink(missing_ok=True)

    def _save(self) -> None:
        if self.entries:
            atomic_write(self.file, json.dumps(self.entries, indent=1, sort_keys=True).encode() + b"\n")
        else:
            self.file.unlink(missing_ok=True)

    def _recall(self, path: Path) -> None:
        """Makes the record what it was before the last `write`, which alone says whether rewarm wrote what is there."""
        entry, original = self._undone
        if entry is None:
            self._forget(path)
            return
        self.entries[str(path)] = entry
        if original is None:
            self.original(path).unlink(missing_ok=True)
        else:
            atomic_write(self.original(path), original, mode=0o600)
        self._save()

    def undo(self, path: Path, current: bytes | None) -> str:
        """Takes back a `write` that did not do: `current` is what was there before it. Raises Refused.

        What somebody else has written there meanwhile stays. Returns words for what has become of the file.
        """
        return anew(lambda: self._undo(path, current))

    def _undo(self, path: Path, current: bytes | None) -> str:
        written = read_bytes(path)
        if not self.wrote(path, written):
            self.put_back(path, quiet=True)
            return f"{path} was changed meanwhile: only rewarm's part was taken out"
        if current is None:
            _unlink(os.path.realpath(path))
            self._forget(path)
        else:
            # Nothing has changed for the engine, and doctor goes by the time.
            self._replace(path, written, current, self._changed_ns)
            if self._undone[0] is not None or self.base(_text(current), path) == _text(current):
                self._recall(path)
            else:  # rewarm's part of an install whose record is lost
                self.entries[str(path)]["installed"] = []
                self._save()
        return "the file was put back as it was"

    def left(self, path: Path, current: bytes | None) -> bytes | None:
        """What `put_back` makes of a file, None where it removes it. Raises Refused."""
        if self.wrote(path, current):
            # Nobody changed it since.
            return self.found(path)
        if current is None:
            return None
        rest = self.base(_text(current), path)
        if rest == _text(current):
            return current
        if self.entries.get(str(path), {}).get("found") is None and _NOTHING.fullmatch(rest):
            return None
        return rest.encode("utf-8", "surrogateescape")

    def put_back(self, path: Path, *, quiet: bool = False) -> bool:
        """Takes rewarm's part out of one file: by the original, if nobody changed the file since. True if changed."""
        return anew(lambda: self._put_back(path, quiet=quiet))

    def _put_back(self, path: Path, *, quiet: bool) -> bool:
        current = read_bytes(path)
        real = Path(os.path.realpath(path))
        sweep(real, self._scratch(path))
        left, whole = self.left(path, current), self.wrote(path, current)
        if left is None and current is not None:
            _unlink(real)
            said = f"removed {path}, which {'was not there before' if whole else 'held nothing else'}"
        elif left is not None and left != current:
            self._replace(path, current, left)
            said = (
                f"put {path} back as it was found"
                if whole
                else f"{path} was changed since: took out rewarm's part only"
            )
        else:
            said = ""
        if said and not quiet:
            self.say(said)
        self._forget(path)
        return whole or bool(said)

    def put_all_back(self) -> list[Path]:
        """Undoes all that is recorded. The files that were changed."""
        return [path for path in map(Path, list(self.entries)) if self.put_back(path)]
