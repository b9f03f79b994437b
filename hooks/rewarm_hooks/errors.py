"""The one error of this package, and how a file name that may hold any byte is put on one readable line."""

from __future__ import annotations

_SHOWN = 200  # characters of a name in a message: enough to find it, and a hostile one cannot fill a log


def shown(name: bytes | str) -> str:
    """`name` on one line: bytes that are not UTF-8 and characters that do not print are escaped; at most 200
    characters.
    """
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    text = text[: _SHOWN + 1]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
    if not text:
        return "(empty name)"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


class LayerError(Exception):
    """A layer that cannot be written or applied. `str` is "<entry>: <cause>" on one line.

    entry: the name of the member, or of the file, that is at fault (already made printable);  cause: why.
    """

    def __init__(self, entry: bytes | str, cause: str) -> None:
        self.entry = shown(entry)
        self.cause = cause
        super().__init__(f"{self.entry}: {cause}")


def failed(entry: bytes | str, doing: str, error: OSError) -> LayerError:
    """The LayerError for a system call that failed while `doing` something to `entry`."""
    return LayerError(entry, f"{doing}: {error.strerror or error}")
