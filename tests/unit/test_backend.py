"""What a store must offer: the directory store offers it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewarm.errors import SnapshotDamaged, StoreError
from rewarm.store.backend import Pack, Store, open_store
from rewarm.store.chunks import CHUNKS
from support.chunked import some, write_chunks


def test_a_directory_is_a_store(tmp_path: Path) -> None:
    store: Store = open_store(f"file://{tmp_path}/store")
    ref, found = write_chunks(open_store(str(tmp_path / "store")), some(3))
    assert store.list() == [ref]
    assert store.candidates("default", "model") == [(ref, found)]
    assert len(store.read_file(store.load(ref), CHUNKS)) == 3 * 64
    pack: Pack = store.open_chunk_pack(found.packs[0].digest)
    assert pack.size == found.packs[0].size
    buffer = bytearray(100)
    assert pack.read_into(memoryview(buffer), 64 * 1024) == 100
    assert bytes(buffer) == some(3)[1][:100]
    assert pack.read_into(memoryview(buffer), pack.size - 10) == 10
    assert pack.read_into(memoryview(buffer), pack.size + 10) == 0
    pack.close()
    pack.close()
    with pytest.raises(StoreError):
        pack.read_into(memoryview(buffer), 0)
    with pytest.raises(SnapshotDamaged, match="is missing"):
        store.open_chunk_pack("0" * 64)
    with pytest.raises(SnapshotDamaged, match="is not a digest"):
        store.open_chunk_pack("../../etc/passwd")


@pytest.mark.parametrize("url", ["s3://bucket", "relative", "", "file://host/x"])
def test_no_other_stores_yet(url: str) -> None:
    with pytest.raises(StoreError, match="set `store` to"):
        open_store(url)
