"""One member of a layer, and the counts of what was written or applied."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .names import Parts

# The type flags of a tar header that a layer uses.
FILE, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO, PAX = b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"x"

Extent = tuple[int, int, int]  # offset in the file, length, offset of its bytes in the archive; all in bytes


class Member:
    """A member as the archive states it.

    name: as written;  parts: its components;  kind: one of the type flags above;  mode: permission bits, 0 to 0o7777;
    mtime: ns since the epoch;  size: apparent size in bytes;  extents: the parts of the file that are not holes, in
    order; link: the target of a symbolic link, or the name that a hard link names;  xattrs: name -> value;  device:
    major, minor.
    """

    __slots__ = ("device", "extents", "gid", "kind", "link", "mode", "mtime", "name", "parts", "size", "uid", "xattrs")

    def __init__(
        self,
        name: bytes,
        parts: Parts,
        kind: bytes,
        *,
        mode: int,
        uid: int,
        gid: int,
        mtime: int,
        size: int = 0,
        extents: tuple[Extent, ...] = (),
        link: bytes = b"",
        xattrs: dict[bytes, bytes] | None = None,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        self.name = name
        self.parts = parts
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.size = size
        self.extents = extents
        self.link = link
        self.xattrs = xattrs or {}
        self.device = device


class LayerStats:
    """What a layer holds: entries (files and directories), whiteouts, opaque directories, data_bytes (holes not
    counted), and sockets: the names of the sockets that were left out, since a tar archive has no form for them."""

    __slots__ = ("data_bytes", "entries", "opaque", "sockets", "whiteouts")

    def __init__(self) -> None:
        self.entries = 0
        self.whiteouts = 0
        self.opaque = 0
        self.data_bytes = 0
        self.sockets: list[str] = []

    def __repr__(self) -> str:
        return "LayerStats(" + ", ".join(f"{key}={getattr(self, key)!r}" for key in self.__slots__) + ")"
