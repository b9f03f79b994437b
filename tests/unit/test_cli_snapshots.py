"""rewarm ls, inspect, rm and verify on real stores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewarm import node as facts
from rewarm.cli import inspect, output, pick
from rewarm.errors import SnapshotNotFound, StoreError
from rewarm.settings import Settings
from rewarm.store.directory import DirectoryStore, SnapshotRef
from rewarm.store.manifest import HugeMapping, Memory
from support.chunked import flip, some, write_chunks
from support.cli import filled_store, newest, on, one_line, spoil
from support.snapshots import FILES, MIB, manifest, write_snapshot


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return filled_store(tmp_path)


def pack(store: DirectoryStore, ref: SnapshotRef, name: str) -> Path:
    entry = store.load(ref).file(name)
    assert entry is not None
    return store.pack_path(entry.pack)


# ls


def test_ls(store: DirectoryStore) -> None:
    lines = on(store, "ls").stdout.splitlines()
    assert lines[0].split() == ["NAMESPACE", "NAME", "ID", "CREATED", "SIZE", "MEMORY", "IMAGE"]
    assert [line.split()[:2] for line in lines[1:]] == [["default", "model"], ["default", "model"], ["team", "other"]]
    assert newest(store).id[:12] in lines[1], "the newest first"
    assert "3.0 MiB" in lines[1] and lines[1].endswith("docker.io/library/model:1")
    assert lines[3].split()[3] == "just" or "second" in lines[3]


def test_ls_of_a_namespace(store: DirectoryStore) -> None:
    assert [row["name"] for row in json.loads(on(store, "ls", "--json", "-n", "team").stdout)] == ["other"]
    assert json.loads(on(store, "ls", "--json", "-n", "nobody").stdout) == []
    assert "holds '/'" in one_line(on(store, "ls", "-n", "a/b"))


def test_ls_json(store: DirectoryStore) -> None:
    first = json.loads(on(store, "ls", "--json").stdout)[0]
    assert first == {
        "namespace": "default",
        "name": "model",
        "id": newest(store).id,
        "created": "2026-02-01T00:00:00Z",
        "size_bytes": sum(map(len, FILES.values())) - len(FILES["rootfs-diff.tar"]) + 3,
        "memory_bytes": 3 * MIB,
        "image": "docker.io/library/model:1",
        "damaged": None,
    }


def test_ls_shows_a_damaged_snapshot_as_such(store: DirectoryStore) -> None:
    ref = newest(store)
    spoil(store.root / "v1/snapshots/default/model" / f"{ref.id}.json", b"{")
    result = on(store, "ls")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[2].split() == ["default", "model", ref.id[:12], "damaged", "-", "-", "-"]
    assert "truncated or was changed" in result.stderr
    assert "truncated" in json.loads(on(store, "ls", "--json").stdout)[1]["damaged"]


# inspect


def test_inspect(store: DirectoryStore) -> None:
    shown = on(store, "inspect", "model").stdout
    ref = newest(store)
    for text in (ref.id, "python3 serve.py '--größe=1'", "/models (bind)", "avx2 sse4_2", "checkpoint/pages-1.img"):
        assert text in shown
    assert "0-1 | 1" in shown and "bind, interleave" in shown


@pytest.mark.parametrize("form", ["{name}", "{id8}", "{ns}/{name}", "{ns}/{name}@{id8}", "{ns}/{id8}", "{name}@{id8}"])
def test_inspect_takes_every_form_of_a_snapshot(store: DirectoryStore, form: str) -> None:
    ref = newest(store)
    text = form.format(name=ref.name, ns=ref.namespace, id8=ref.id[:8])
    assert json.loads(on(store, "inspect", text, "--json").stdout)["id"] == ref.id


def test_inspect_json_is_the_manifest(store: DirectoryStore) -> None:
    document = json.loads(on(store, "inspect", "other", "--json").stdout)
    assert document["version"] == 1 and document["requires"]["kernel"] == "6.18.0"
    assert {entry["name"] for entry in document["files"]} == set(FILES)
    assert "fits" not in document


@pytest.mark.parametrize("text", ["no", "model@ffffff", "team/model", "../x", "a/b/c", "n" * 300, ""])
def test_inspect_what_is_not_there(store: DirectoryStore, text: str) -> None:
    assert len(one_line(on(store, "inspect", text))) < 400


def test_inspect_in_two_namespaces_at_once(store: DirectoryStore) -> None:
    result = on(store, "inspect", "team/other", "-n", "default")
    assert result.exit_code == 2 and "not in the namespace default" in result.stderr


def test_inspect_escapes_what_a_terminal_would_act_on(store: DirectoryStore, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\nrewarm: all is well"
    with store.writer("default", "evil") as writer:
        source = tmp_path / "file"
        source.write_bytes(b"x")
        writer.add_file("a", source)
        plain = manifest("evil")
        writer.publish(plain._replace(requires=plain.requires._replace(image=evil)))
    for command in (["inspect", "evil"], ["ls"]):
        shown = on(store, *command).stdout
        assert "\x1b" not in shown and "\x07" not in shown
        assert "\\x1b]0;owned\\x07\\nrewarm" in shown


def test_inspect_of_memory(tmp_path: Path) -> None:
    store = DirectoryStore(str(tmp_path / "store"))
    huge = (HugeMapping(1, 0x7F0000000000, 0x7F0000400000, 8192),)
    with store.writer("default", "model", compression="off") as writer:
        for chunk in some(3, 64 << 10):
            writer.add_chunk(chunk)
        writer.publish(manifest()._replace(memory=Memory(filled=192 << 10, zeros=2 * MIB, left=MIB // 2, huge=huge)))
    shown = on(store, "inspect", "model").stdout
    for text in ("192.0 KiB in 3 chunks", "2.0 MiB, not stored", "512.0 KiB", "1 mapping of 4.0 MiB"):
        assert text in shown, shown
    document = json.loads(on(store, "inspect", "model", "--json").stdout)
    assert document["chunks"] == 3 and document["memory_bytes"] == 3 * MIB
    assert document["memory"] == {
        "filled": 192 << 10,
        "zeros": 2 * MIB,
        "left": MIB // 2,
        "huge": [{"pid": 1, "start": 0x7F0000000000, "end": 0x7F0000400000, "extra": 8192}],
    }
    raw = sum(pack["raw_size"] for pack in document["packs"])
    assert raw == 192 << 10
    count = len(document["packs"])
    stored = sum(pack["size"] for pack in document["packs"])
    assert f"{count} of chunks: {output.size(stored)} for 192.0 KiB" in shown


def test_inspect_of_a_snapshot_without_chunks(store: DirectoryStore) -> None:
    shown = on(store, "inspect", "model").stdout
    assert "0 B in 0 chunks" in shown and "huge pages     none" in shown
    assert json.loads(on(store, "inspect", "model", "--json").stdout)["chunks"] == 0


def fake_criu(tmp_path: Path, version: str) -> Settings:
    program = tmp_path / "criu"
    program.write_text(f"#!/bin/sh\necho Version: {version}\n")
    program.chmod(0o755)
    (tmp_path / "runc").write_text("#!/bin/sh\necho runc version 1.1.5\n")
    (tmp_path / "runc").chmod(0o755)
    return Settings(criu=str(program), runtimes=(str(tmp_path / "runc"),), state_dir=str(tmp_path / "state"))


def test_misfit(tmp_path: Path) -> None:
    settings = fake_criu(tmp_path, "9.1")
    here = manifest().requires._replace(
        arch=facts.architecture(),
        cpu_features=(),
        kernel="4.0",
        criu="4.1.1",
        cgroup_version=facts.cgroup_version(),
    )
    assert inspect.misfit(here, settings) == ""
    assert "sparc" in inspect.misfit(here._replace(arch="sparc"), settings)
    assert "avx9" in inspect.misfit(here._replace(cpu_features=("avx9",)), settings)
    assert "kernel 99.0" in inspect.misfit(here._replace(kernel="99.0"), settings)
    assert "CRIU 10.0" in inspect.misfit(here._replace(criu="10.0"), settings)
    other = 3 - facts.cgroup_version()
    assert f"cgroup v{other}" in inspect.misfit(here._replace(cgroup_version=other), settings)
    (tmp_path / "old").mkdir()
    assert "found 3.17" in inspect.misfit(here, fake_criu(tmp_path / "old", "3.17"))


def test_inspect_check_has_an_exit_status(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "misfit", lambda needed, settings: "too old")
    result = on(store, "inspect", "other", "--check")
    assert result.exit_code == 1 and result.stdout.endswith("Fits this node: no: too old\n")
    document = json.loads(on(store, "inspect", "other", "--check", "--json").stdout)
    assert (document["fits"], document["misfit"]) == (False, "too old")
    monkeypatch.setattr(inspect, "misfit", lambda needed, settings: "")
    result = on(store, "inspect", "other", "--check")
    assert result.exit_code == 0 and result.stdout.endswith("Fits this node: yes\n")


# rm


def test_rm(store: DirectoryStore) -> None:
    result = on(store, "rm", "other")
    assert result.exit_code == 0 and result.stdout.startswith("removed team/other@")
    assert [ref.name for ref in store.list()] == ["model", "model"]


def test_rm_does_not_guess_which_of_several(store: DirectoryStore) -> None:
    said = one_line(on(store, "rm", "model"))
    assert "has 2 snapshots" in said and newest(store).id[:12] in said and "--all-of-name" in said
    assert len(store.list()) == 3
    assert on(store, "rm", newest(store).id[:10]).exit_code == 0
    assert on(store, "rm", "model").exit_code == 0
    assert [ref.name for ref in store.list()] == ["other"]


def test_rm_all_of_name(store: DirectoryStore) -> None:
    assert on(store, "rm", "model", "--all-of-name").stdout.count("removed") == 2
    assert [ref.name for ref in store.list()] == ["other"]


def test_rm_goes_on_after_one_that_is_not_there(store: DirectoryStore) -> None:
    result = on(store, "rm", "nothing", "other", "--json")
    assert result.exit_code == 1 and "'nothing'" in result.stderr
    removed = json.loads(result.stdout)
    assert [entry["name"] for entry in removed] == ["other"] and removed[0]["freed_bytes"] >= 0
    assert len(store.list()) == 2


def test_rm_of_a_damaged_one(store: DirectoryStore) -> None:
    ref = newest(store)
    spoil(store.root / "v1/snapshots/default/model" / f"{ref.id}.json", b"{")
    assert on(store, "rm", str(ref)).exit_code == 0
    assert len(store.list("default")) == 1


def test_rm_of_a_name_in_two_namespaces(store: DirectoryStore, tmp_path: Path) -> None:
    write_snapshot(store, tmp_path / "w4", name="other")
    assert "several namespaces" in one_line(on(store, "rm", "other", "--all-of-name"))
    assert on(store, "rm", "other", "-n", "team").exit_code == 0
    assert [str(ref.namespace) for ref in store.list() if ref.name == "other"] == ["default"]


# gc


def test_gc(store: DirectoryStore) -> None:
    assert on(store, "gc").stdout == "0 B freed: 0 packs, 0 dead captures\n"
    orphan = store.root / "v1/packs/ee" / ("ee" + "0" * 62)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(bytes(2048))
    assert on(store, "gc", "--dry-run").stdout == "2.0 KiB would be freed: 1 pack, 0 dead captures\n"
    document = json.loads(on(store, "gc", "--dry-run", "--json").stdout)
    assert document == {"freed_bytes": 2048, "packs": 1, "workspaces": 0, "dry_run": True}
    assert orphan.exists()
    dead = store.root / "v1/tmp/0123"
    dead.mkdir()
    (dead / "lock").write_text("")
    assert json.loads(on(store, "gc", "--json").stdout) == {
        "freed_bytes": 2048,
        "packs": 1,
        "workspaces": 1,
        "dry_run": False,
    }
    assert not orphan.exists() and not dead.exists()
    assert on(store, "verify").exit_code == 0


def test_gc_of_no_store(tmp_path: Path) -> None:
    nowhere = DirectoryStore(str(tmp_path / "nowhere"))
    assert "does not exist" in one_line(on(nowhere, "gc"))
    assert on(nowhere, "gc", "model").exit_code == 2


# chunks


def test_sizes_count_packs_of_chunks(store: DirectoryStore) -> None:
    ref, written = write_chunks(store, some(40), name="chunked")
    (pack,) = written.packs
    row = next(row for row in json.loads(on(store, "ls", "--json").stdout) if row["name"] == "chunked")
    assert row["size_bytes"] == pack.size + sum(entry.size for entry in written.files)
    assert "in 2 files, 2 packs" in on(store, "inspect", "chunked").stdout
    document = json.loads(on(store, "inspect", "chunked", "--json").stdout)
    assert document["packs"] == [{"digest": pack.digest, "size": pack.size, "raw_size": pack.raw_size}]
    assert json.loads(on(store, "verify", "chunked", "--json").stdout)["bytes_read"] == row["size_bytes"]
    flip(store.pack_path(pack.digest), 5)
    result = on(store, "verify", "chunked")
    assert result.exit_code == 1
    assert f"{ref} memory/chunks: pack {pack.digest} was changed: its chunk 0 does not have" in result.stdout
    freed = json.loads(on(store, "rm", "chunked", "--json").stdout)[0]["freed_bytes"]
    assert freed == row["size_bytes"]


# verify


def test_verify_of_what_is_whole(store: DirectoryStore) -> None:
    result = on(store, "verify")
    assert result.exit_code == 0
    assert result.stdout.startswith("3 snapshots, ") and result.stdout.endswith("damage: none\n")


def test_verify_names_the_damaged_file(store: DirectoryStore) -> None:
    ref = newest(store)
    path = pack(store, ref, "checkpoint/pages-1.img")
    spoil(path, b"X" + path.read_bytes()[1:])
    result = on(store, "verify", "model", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["snapshots"] == 2, "every snapshot of the name, not only the newest"
    assert {f["object"].split()[1] for f in document["findings"]} == {"checkpoint/pages-1.img"}
    path.unlink()
    result = on(store, "verify", ref.id[:12])
    assert result.exit_code == 1 and "is missing" in result.stdout


def test_verify_names_a_damaged_manifest(store: DirectoryStore) -> None:
    ref = newest(store)
    spoil(store.root / "v1/snapshots/default/model" / f"{ref.id}.json", b"{")
    result = on(store, "verify", "model")
    assert result.exit_code == 1 and f"{ref}: is truncated" in result.stdout


def test_pick_by_id_of_one_name(store: DirectoryStore) -> None:
    with pytest.raises(StoreError, match="there are 2"):
        pick.newest(store, "default/model@", None)
    with pytest.raises(SnapshotNotFound):
        pick.every(store, "model@0123456789abcdef0", None)
