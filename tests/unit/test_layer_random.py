"""Random base images and random changes to them, on real overlay mounts: round trip, and undo."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm_hooks.layer import LayerError, apply_layer, undo_layer, write_layer
from support.layers import Overlays, difference, picture

# Few names, so that changes meet what is there.
NAMES = st.sampled_from([b"a", b"b", b"c", "ü".encode(), b"\xff"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(b"/".join)
STAMPS = st.integers(-(10**18), 4 * 10**18)
MODES = st.integers(0, 0o7777)
DATA = st.one_of(st.binary(max_size=20), st.integers(1, 300_000).map(lambda size: bytes([size % 251]) * size))
OPERATIONS = st.one_of(
    st.tuples(st.just("file"), PATHS, DATA),
    st.tuples(
        st.just("hole"), PATHS, st.tuples(st.integers(0, 300_000), st.binary(max_size=9), st.integers(0, 300_000))
    ),
    st.tuples(st.just("directory"), PATHS, MODES),
    st.tuples(
        st.just("symlink"), PATHS, st.sampled_from([b"a", b"..", b"/etc/passwd", b"../../../../outside", b"b/c"])
    ),
    st.tuples(st.just("fifo"), PATHS, MODES),
    st.tuples(st.just("link"), PATHS, PATHS),
    st.tuples(st.just("delete"), PATHS, st.none()),
    st.tuples(st.just("replace"), PATHS, st.none()),
    st.tuples(st.just("mode"), PATHS, MODES),
    st.tuples(st.just("owner"), PATHS, st.tuples(st.integers(0, 2**32 - 2), st.integers(0, 70_000))),
    st.tuples(st.just("time"), PATHS, STAMPS),
    st.tuples(
        st.just("xattr"),
        PATHS,
        st.tuples(st.sampled_from(["user.a", "user.b=%", "trusted.c"]), st.binary(max_size=300)),
    ),
    st.tuples(st.just("rename"), PATHS, PATHS),
)


def perform(root: bytes, operation: tuple[str, bytes, object]) -> None:
    """Do it, if it can be done; what it meets decides."""
    what, name, value = operation
    path = root + b"/" + name
    try:
        if real_parent(root, name):
            act(root, what, path, value)
    except OSError:
        pass  # a random operation that makes no sense in a random tree: a file in a file, a link to nothing


def real_parent(root: bytes, name: bytes) -> bool:
    """Links may lead out of the tree, so the test itself must not follow them either."""
    parts = name.split(b"/")
    for depth in range(1, len(parts)):
        above = root + b"/" + b"/".join(parts[:depth])
        if not os.path.lexists(above):
            os.mkdir(above)
        if not stat.S_ISDIR(os.lstat(above).st_mode):
            return False
    return True


def act(root: bytes, what: str, path: bytes, value: object) -> None:
    plain = os.path.lexists(path) and not os.path.islink(path)
    if what == "file" and isinstance(value, bytes) and not os.path.islink(path) and (not plain or os.path.isfile(path)):
        Path(os.fsdecode(path)).write_bytes(value)
    elif what == "hole" and isinstance(value, tuple) and not os.path.lexists(path):
        offset, data, size = value
        with open(path, "wb") as file:
            file.seek(offset)
            file.write(data)
            file.truncate(size)
    elif what == "directory" and isinstance(value, int):
        os.mkdir(path, value & 0o777)
    elif what == "symlink" and isinstance(value, bytes):
        os.symlink(value, path)
    elif what == "fifo" and isinstance(value, int):
        os.mkfifo(path, value & 0o777)
    elif what == "link" and isinstance(value, bytes) and real_parent(root, value):
        if stat.S_ISREG(os.lstat(path).st_mode):
            os.link(path, root + b"/" + value, follow_symlinks=False)
    elif what == "delete":
        delete(path)
    elif what == "replace":
        was_directory = plain and os.path.isdir(path)
        delete(path)
        if was_directory:
            os.mkdir(path)  # an opaque directory
        else:
            Path(os.fsdecode(path)).write_bytes(b"replaced")
    elif what == "mode" and isinstance(value, int) and plain:
        os.chmod(path, value)
    elif what == "owner" and isinstance(value, tuple):
        os.chown(path, *value, follow_symlinks=False)
    elif what == "time" and isinstance(value, int):
        os.utime(path, ns=(value, value), follow_symlinks=False)
    elif what == "xattr" and isinstance(value, tuple):
        os.setxattr(path, *value, follow_symlinks=False)
    elif what == "rename" and isinstance(value, bytes) and real_parent(root, value):
        os.rename(path, root + b"/" + value)


def delete(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


@settings(max_examples=60, deadline=None)
@given(
    base=st.lists(OPERATIONS.filter(lambda operation: operation[0] not in ("link", "rename")), max_size=14),
    changes=st.lists(OPERATIONS, max_size=14),
    others=st.lists(OPERATIONS.filter(lambda operation: operation[0] != "link"), max_size=5),
)
def test_round_trip_and_undo(
    base: list[tuple[str, bytes, object]],
    changes: list[tuple[str, bytes, object]],
    others: list[tuple[str, bytes, object]],
) -> None:
    """others: a layer may meet another tree than the one it was made over; refused or undone, never half."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        overlays = Overlays(directory)
        try:
            for operation in base:
                perform(os.fsencode(overlays.lower), operation)
            source, target = overlays.new(), overlays.new()
            before = picture(target.merged)
            for operation in changes:
                perform(os.fsencode(source.merged), operation)
            layer = io.BytesIO()
            write_layer(source.upper, layer)
            root = os.open(target.merged, os.O_RDONLY)
            apply_layer(layer, root, directory / "undo")
            assert difference(picture(source.merged), picture(target.merged)) == {}
            assert undo_layer(directory / "undo", root)
            assert difference(before, picture(target.merged)) == {}
            os.close(root)
            onto_another(overlays, layer, others, directory / "undo")
        finally:
            overlays.close()


def onto_another(overlays: Overlays, layer: io.BytesIO, others: list[tuple[str, bytes, object]], undo: Path) -> None:
    target = overlays.new().merged
    for operation in others:
        perform(os.fsencode(target), operation)
    before = picture(target)
    root = os.open(target, os.O_RDONLY)
    try:
        apply_layer(layer, root, undo)
        assert undo_layer(undo, root)
    except LayerError as error:
        assert "link or a file" in str(error) or "No such file" in str(error)
    finally:
        os.close(root)
    assert not undo.exists()
    assert difference(before, picture(target)) == {}
