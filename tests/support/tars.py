"""Archives for the tests of the rootfs diff, honest and hostile: any header field can be given any value."""

from __future__ import annotations

BLOCK = 512
END = bytes(2 * BLOCK)


def padded(data: bytes) -> bytes:
    """`data` filled up with NUL to whole blocks."""
    return data + b"\0" * (-len(data) % BLOCK)


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int = 0,
    link: bytes = b"",
    mode: int = 0o644,
    device: tuple[int, int] = (0, 0),
    fields: dict[int, bytes] | None = None,
) -> bytes:
    """A ustar header block with a right checksum. fields: bytes to put at an offset, whatever they break."""
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:136] = b"%07o\0%07o\0%07o\0%011o\0" % (mode, 0, 0, size)
    block[136:148] = b"%011o\0" % 1_000_000_000
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = b"ustar\00000"
    block[329:345] = b"%07o\0%07o\0" % device
    for offset, value in (fields or {}).items():
        block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def record(key: bytes, value: bytes) -> bytes:
    """One pax record."""
    text = b" %s=%s\n" % (key, value)
    length = len(text) + 1
    while len(b"%d" % length) + len(text) != length:
        length = len(b"%d" % length) + len(text)
    return b"%d%s" % (length, text)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    """An extended header for the next member."""
    body = b"".join(record(key, value) for key, value in records)
    return header(b"PaxHeaders/x", b"x", size=len(body)) + padded(body)


def file(name: bytes, data: bytes = b"planted") -> bytes:
    """A regular file."""
    return header(name, size=len(data)) + padded(data)


def directory(name: bytes) -> bytes:
    """A directory."""
    return header(name, b"5", mode=0o755)


def symlink(name: bytes, target: bytes) -> bytes:
    """A symbolic link."""
    return header(name, b"2", link=target)


def hard_link(name: bytes, target: bytes) -> bytes:
    """A hard link."""
    return header(name, b"1", link=target)


def sparse(name: bytes, size: int | bytes, text: bytes, data: bytes = b"") -> bytes:
    """A file in GNU's sparse format 1.0 with the map `text`, true or not."""
    body = padded(text) + padded(data)
    real = size if isinstance(size, bytes) else b"%d" % size
    announced = pax(
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", name),
        (b"GNU.sparse.realsize", real),
    )
    return announced + header(b"GNUSparseFile.0/x", size=len(padded(text)) + len(data)) + body
