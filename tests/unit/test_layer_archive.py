"""Archives that are damaged or lie: types, sparse maps, extended headers, fields, truncation. Nothing is applied."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.hostile import GOOD, refused, root
from support.tars import BLOCK, END, file, header, pax, record, sparse

__all__ = ["root"]  # a fixture

LIMIT = 2**63


@pytest.mark.parametrize("kind", [b"7", b"g", b"L", b"K", b"S", b"D", b"V", b"X", b"\xff"])
def test_member_types_that_are_not_known(root: Path, kind: bytes) -> None:
    error = refused(root, GOOD + header(b"odd", kind) + END)
    assert error.entry == "odd"
    assert "type" in error.cause


SPARSE = {
    "beyond the end": (10, b"1\n5\n6\n", b"123456"),
    "offset beyond the end": (10, b"1\n11\n0\n", b""),
    "overlap": (100, b"2\n0\n6\n5\n6\n", b"x" * 12),
    "backwards": (100, b"2\n50\n6\n0\n6\n", b"x" * 12),
    "claims more data than stored": (1 << 60, b"1\n0\n1000000000000\n", b"x"),
    "claims less data than stored": (100, b"1\n0\n1\n", b"x" * 50),
    "great offset and length": (LIMIT - 1, b"2\n9000000000000000000\n9000000000000000000\n1\n1\n", b""),
    "many extents": (100, b"999999999999\n0\n1\n", b"x"),
    "more extents than lines": (100, b"3\n0\n1\n", b"x"),
    "negative": (100, b"1\n-1\n1\n", b"x"),
    "not numbers": (100, b"one\n", b""),
    "digits without end": (100, b"1" * 512, b""),
    "empty lines": (100, b"1\n\n\n", b""),
    "size too great": (LIMIT, b"0\n", b""),
    "size negative": (b"-1", b"0\n", b""),
    "size no number": (b"1e9", b"0\n", b""),
}


@pytest.mark.parametrize(("size", "text", "data"), SPARSE.values(), ids=SPARSE.keys())
def test_sparse_maps_that_lie(root: Path, size: int | bytes, text: bytes, data: bytes) -> None:
    assert refused(root, GOOD + sparse(b"sparse", size, text, data) + END).entry == "sparse"


def test_sparse_forms_that_are_not_known(root: Path) -> None:
    for records in (
        ((b"GNU.sparse.major", b"0"), (b"GNU.sparse.minor", b"1"), (b"GNU.sparse.realsize", b"1")),
        ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")),
        ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"1")),
    ):
        assert "sparse file in another form" in refused(root, GOOD + pax(*records) + file(b"s") + END).cause
    assert "GNU.sparse.map" in refused(root, GOOD + pax((b"GNU.sparse.map", b"0,1")) + file(b"s") + END).cause


def test_a_size_that_no_filesystem_takes_is_put_back(root: Path) -> None:
    """What only the change itself can find out is undone on the spot."""
    assert refused(root, GOOD + sparse(b"sparse", LIMIT - 1, b"0\n") + END).entry == "sparse"


PAX = {
    "repeated": (record(b"path", b"a") * 2, "two records path"),
    "unknown": (record(b"VENDOR.x", b"a"), "unknown record VENDOR.x"),
    "length too great": (b"99 path=a\n", "not well formed"),
    "length too small": (b"3 path=a\n", "not well formed"),
    "length zero": (b"0 path=a\n", "not well formed"),
    "length absent": (b"path=a\n", "not well formed"),
    "length without end": (b"1" * 600, "not well formed"),
    "length no number": (b"x path=a\n\n", "not well formed"),
    "no newline": (b"9 path=abc", "not well formed"),
    "no equals": (b"7 path\n", "not well formed"),
    "no key": (b"5 =a\n", "not well formed"),
    "uid": (record(b"uid", b"-1"), "uid"),
    "uid that means keep": (record(b"uid", b"4294967295"), "uid"),
    "gid": (record(b"gid", b"0x10"), "gid"),
    "size": (record(b"size", b"1e3"), "size"),
    "size too great": (record(b"size", b"9" * 18), "truncated"),
    "mtime": (record(b"mtime", b"nan"), "mtime"),
    "mtime too great": (record(b"mtime", b"9" * 16), "mtime"),
    "mtime fraction": (record(b"mtime", b"1.-5"), "mtime"),
    "overlay's own mark": (record(b"SCHILY.xattr.trusted.overlay.redirect", b"/etc"), "trusted.overlay.redirect"),
    "overlay's own mark, user": (record(b"SCHILY.xattr.user.overlay.opaque", b"y"), "user.overlay.opaque"),
    "LSM label": (record(b"SCHILY.xattr.security.selinux", b"x"), "security.selinux"),
    "xattr of no namespace": (record(b"SCHILY.xattr.system.evil", b"x"), "system.evil"),
    "xattr without a name": (record(b"SCHILY.xattr.user.", b"x"), "user."),
    "xattr with a NUL": (record(b"SCHILY.xattr.user.a\0b", b"x"), "user.a"),
    "xattr name too long": (record(b"SCHILY.xattr.user." + b"n" * 255, b"x"), "user.nnn"),
    "xattr too great": (record(b"SCHILY.xattr.user.a", bytes(65537)), "65537"),
}


@pytest.mark.parametrize(("body", "cause"), PAX.values(), ids=PAX.keys())
def test_extended_headers_that_are_not_well_formed(root: Path, body: bytes, cause: str) -> None:
    extended = header(b"PaxHeaders/x", b"x", size=len(body)) + body + b"\0" * (-len(body) % BLOCK)
    assert cause in str(refused(root, GOOD + extended + file(b"odd") + END))


def test_extended_headers_in_the_wrong_place(root: Path) -> None:
    extended = pax((b"path", b"a"))
    assert "without a member" in refused(root, GOOD + extended + END).cause
    assert "two extended headers" in refused(root, GOOD + extended * 2 + file(b"x") + END).cause
    assert "at most" in refused(root, GOOD + header(b"x", b"x", size=1 << 30) + END).cause


FIELDS = {
    "checksum": (148, b"0000001\0"),
    "magic": (257, b"ustar  \0"),
    "no magic": (257, bytes(8)),
    "size": (124, b"9"),
    "size in base 256": (124, b"\x80"),
    "negative size": (124, b"-0000000001"),
    "mode": (100, b"7777777"),
    "mode no number": (100, b"abc"),
    "uid": (108, b"+1"),
    "mtime": (136, b"x"),
    "device": (329, b"?"),
}


@pytest.mark.parametrize(("offset", "value"), FIELDS.values(), ids=FIELDS.keys())
def test_header_fields_that_are_not_well_formed(root: Path, offset: int, value: bytes) -> None:
    block = header(b"odd", fields={offset: value})
    if offset == 148:
        block = block[:148] + value + block[156:]
    refused(root, GOOD + block + END)


@pytest.mark.parametrize("kind", [b"1", b"2", b"5", b"6"])
def test_data_in_members_that_have_none(root: Path, kind: bytes) -> None:
    link = b"good" if kind in b"12" else b""
    error = refused(root, GOOD + header(b"odd", kind, size=5, link=link) + bytes(BLOCK) + END)
    assert (error.entry, "data in a member" in error.cause) == ("odd", True)


def test_every_truncation(root: Path) -> None:
    whole = GOOD + sparse(b"sparse", 5000, b"2\n0\n3\n4000\n1000\n", b"d" * 1003) + file(b"last", b"l" * 700) + END
    for length in [*range(0, len(whole), BLOCK), 1, 511, len(whole) - 1, len(whole) - BLOCK - 1]:
        assert "truncated" in refused(root, whole[:length]).cause


def test_an_end_marker_of_one_block_is_damage(root: Path) -> None:
    assert "second block" in refused(root, GOOD + bytes(BLOCK) + file(b"x") + END).cause
