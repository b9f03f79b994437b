"""A base image of all kinds of files, and changes to it of every kind that a layer has to carry."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

# struct vfs_cap_data, revision 2: effective, permitted CAP_NET_BIND_SERVICE
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def base_image(root: Path) -> None:
    for name in ("etc/app/conf.d", "usr/lib/deep/er", "var/empty", "home"):
        (root / name).mkdir(parents=True)
    for name in ("etc/passwd", "etc/app/a", "etc/app/b", "etc/app/conf.d/x", "usr/lib/deep/er/f", "usr/lib/one", "run"):
        (root / name).write_text(f"base {name}")
        os.utime(root / name, ns=(1, 1_600_000_000_123_456_789))
    os.link(root / "usr/lib/one", root / "usr/lib/two")
    (root / "lib").symlink_to("usr/lib")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "usr/lib/suid").write_bytes(b"suid")
    os.chown(root / "usr/lib/suid", 10, 20)
    (root / "usr/lib/suid").chmod(0o6755)
    os.setxattr(root / "etc/app", "user.base", b"dir")
    os.setxattr(root / "etc/passwd", "user.base", b"\0\xff")
    os.mkfifo(root / "var/pipe")
    os.mknod(root / "var/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (root / "étc").mkdir()
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            os.utime(path, ns=(5, 1_500_000_000_000_000_007))


def nothing(root: Path) -> None:
    pass


def modify(root: Path) -> None:
    with (root / "etc/passwd").open("a") as file:
        file.write("appended")


def metadata_only(root: Path) -> None:
    (root / "etc/app/a").chmod(0o400)
    os.chown(root / "etc/app/b", 1234, 5678)
    os.chown(root / "etc/app", 70000, 3_000_000_000)
    os.setxattr(root / "usr/lib", "user.new", b"v")
    os.utime(root / "home", ns=(7, 7_000_000_009))


def delete_file(root: Path) -> None:
    (root / "etc/app/a").unlink()


def delete_directory(root: Path) -> None:
    shutil.rmtree(root / "etc/app")
    shutil.rmtree(root / "usr")


def delete_specials(root: Path) -> None:
    (root / "var/pipe").unlink()
    (root / "var/null").unlink()
    (root / "lib").unlink()


def opaque(root: Path) -> None:
    shutil.rmtree(root / "etc/app")
    (root / "etc/app").mkdir()
    (root / "etc/app/b").write_text("new b")
    (root / "etc/app/conf.d").mkdir()
    (root / "etc/app/conf.d/new").write_text("new")


def opaque_empty(root: Path) -> None:
    shutil.rmtree(root / "usr/lib")
    (root / "usr/lib").mkdir(mode=0o750)


def directory_by_file(root: Path) -> None:
    shutil.rmtree(root / "etc/app")
    (root / "etc/app").write_text("a file now")
    shutil.rmtree(root / "usr/lib/deep")
    (root / "usr/lib/deep").symlink_to("/etc")


def file_by_directory(root: Path) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").mkdir()
    (root / "etc/passwd/in").write_text("in")
    (root / "lib").unlink()
    (root / "lib").mkdir()
    (root / "lib/so").write_text("so")
    (root / "var/pipe").unlink()
    (root / "var/pipe").mkdir()


def file_by_specials(root: Path) -> None:
    (root / "etc/app/a").unlink()
    os.mkfifo(root / "etc/app/a", 0o620)
    (root / "etc/app/b").unlink()
    (root / "etc/app/b").symlink_to("../../../../../outside")


def hard_links(root: Path) -> None:
    (root / "home/first").write_text("linked")
    os.link(root / "home/first", root / "home/second")
    (root / "a").mkdir()
    os.link(root / "home/first", root / "a/third")
    os.link(root / "etc/passwd", root / "home/passwd")  # copied up: both names come into the upper directory


def modify_linked(root: Path) -> None:
    (root / "usr/lib/one").unlink()
    (root / "usr/lib/two").unlink()
    (root / "usr/lib/one").write_text("new")


def extended_attributes(root: Path) -> None:
    path = root / "home/program"
    path.write_bytes(b"elf")
    os.chown(path, 33, 33)
    path.chmod(0o4711)
    os.setxattr(path, "security.capability", CAPABILITY)
    os.setxattr(path, "user.binary", bytes(range(256)))
    os.setxattr(path, "user.with=and%3D", b"=\n=")
    os.setxattr(path, "user.empty", b"")
    os.setxattr(path, "trusted.kept", b"t")
    os.removexattr(root / "etc/passwd", "user.base")
    os.removexattr(root / "etc/app", "user.base")
    (root / "home/link").symlink_to("nowhere")
    os.setxattr(root / "home/link", "trusted.on_link", b"l", follow_symlinks=False)
    os.mkfifo(root / "home/fifo")
    os.setxattr(root / "home/fifo", "trusted.on_fifo", b"f")


def access_lists(root: Path) -> None:
    # version 2; user:: rw-, user:1000 r--, group:: r--, mask:: r--, other:: ---
    entries = ((1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
    value = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + perm.to_bytes(2, "little") + who.to_bytes(4, "little") for tag, perm, who in entries
    )
    (root / "home/listed").write_text("x")
    os.setxattr(root / "home/listed", "system.posix_acl_access", value)
    (root / "home/inherited").mkdir()
    (root / "home/inherited/before").write_text("has no list of its own")
    os.setxattr(root / "home/inherited", "system.posix_acl_default", value)
    os.setxattr(root / "var", "system.posix_acl_default", value)
    (root / "var/after").write_text("inherits")
    (root / "var/without").write_text("inherited and removed")
    os.removexattr(root / "var/without", "system.posix_acl_access")


def times(root: Path) -> None:
    for index, stamp in enumerate(
        (0, 1, -1, -1_500_000_001, 999_999_999, 4_102_444_800_000_000_001, 2_000_000_000 * 10**9)
    ):
        path = root / f"home/{index}"
        path.write_text("t")
        os.utime(path, ns=(stamp, stamp))
    (root / "home/dated").symlink_to("0")
    os.utime(root / "home/dated", ns=(3, 1_234_567_890_123_456_789), follow_symlinks=False)
    (root / "home/dir/in").mkdir(parents=True)
    os.utime(root / "home/dir/in", ns=(1, 1_000_000_001))
    os.utime(root / "home/dir", ns=(1, 1_000_000_002))
    os.utime(root, ns=(1, 1_000_000_003))


def names(root: Path) -> None:
    base = os.fsencode(root)
    for name in (
        "ünïcödé 🐚".encode(), b"\xff\xfe not utf-8", b"new\nline", b"back\\slash", b" ", b"-rf", b"~", b"a" * 255,
        b"\xe9" * 255, b"..a", b"...", b".w", b"wh.", b"%s", b"=",
    ):  # fmt: skip
        with open(base + b"/home/" + name, "wb") as file:
            file.write(name)
        os.symlink(b"/" + name, base + b"/tmp/" + name)
        os.mkdir(base + b"/var/" + name)
    os.link(base + b"/home/" + b"\xe9" * 255, base + b"/" + b"l" * 200)
    os.rmdir(base + "/étc".encode())
    deep = base
    for _ in range(14):
        deep += b"/" + b"d" * 250
        os.mkdir(deep)
    with open(deep + b"/end", "wb") as file:
        file.write(b"deep")


def sparse_files(root: Path) -> None:
    with (root / "home/middle").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 5000)
        file.seek(16 << 20)
        file.write(b"end")
    with (root / "home/tail").open("wb") as file:
        file.write(b"head" * 3000)
        file.truncate(10 << 20)
    with (root / "home/all").open("wb") as file:
        file.truncate(1 << 40)
        file.truncate((8 << 20) + 1)
    with (root / "home/many").open("wb") as file:
        for index in range(200):
            file.seek(index * 40960)
            file.write(b"%d" % index)
    (root / "home" / ("n" * 200)).write_bytes(b"")
    os.truncate(root / "home" / ("n" * 200), 1 << 20)
    os.link(root / "home/middle", root / "home/middle-2")


def rename_over(root: Path) -> None:
    (root / "home/new").write_text("new")
    (root / "home/new").rename(root / "etc/passwd")
    (root / "etc/app/a").rename(root / "etc/app/c")
    (root / "étc").mkdir(exist_ok=True)


def everything(root: Path) -> None:
    for change in (
        hard_links,
        extended_attributes,
        times,
        names,
        sparse_files,
        delete_specials,
        opaque,
        delete_file_in_usr,
    ):
        change(root)


def delete_file_in_usr(root: Path) -> None:
    shutil.rmtree(root / "usr/lib/deep")
    (root / "usr/lib/two").unlink()
    (root / "usr/lib/one").unlink()


CHANGES = [
    nothing,
    modify,
    metadata_only,
    delete_file,
    delete_directory,
    delete_specials,
    opaque,
    opaque_empty,
    directory_by_file,
    file_by_directory,
    file_by_specials,
    hard_links,
    modify_linked,
    extended_attributes,
    access_lists,
    times,
    names,
    sparse_files,
    rename_over,
]
