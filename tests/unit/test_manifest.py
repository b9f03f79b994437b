"""The manifest: canonical bytes, and a parser that a hostile store cannot mislead or exhaust."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.errors import SnapshotDamaged
from rewarm.store import manifest as module
from rewarm.store.manifest import (
    ChunkPack,
    Cuda,
    FileEntry,
    GpuDevice,
    Manifest,
    Wanted,
    digest_of,
    load,
    parse,
    timestamp,
)
from support.snapshots import manifest

A, B = digest_of(b"a"), digest_of(b"b")
WHOLE = FileEntry(name="checkpoint/pages-1.img", size=1 << 20, digest=A, pack=A, offset=0)
SMALL = FileEntry(name="checkpoint/core-1.img", size=10, digest=A, pack=B, offset=0)
NEXT = FileEntry(name="rootfs-diff.tar", size=5, digest=A, pack=B, offset=10)
TABLE = FileEntry(name="memory/chunks", size=64, digest=A, pack=B, offset=15)
PACK = ChunkPack(digest=digest_of(b"c"), size=4096 + 80, raw_size=8192)
GPUS = tuple(GpuDevice(f"GPU-{minor}", "NVIDIA H100", 80 << 30, minor, "default") for minor in range(2))
FULL = manifest(created="2026-01-31T12:00:00Z")._replace(
    files=(SMALL, WHOLE, NEXT, TABLE),
    packs=(PACK,),
    cuda=Cuda((1, 7), (5, 0)),
    signals=(Wanted(1, 10), Wanted(7, 64)),
    addresses=("10.1.0.5", "fd00::5"),
    blank=("/cache/app.log",),
)
FULL = FULL._replace(requires=FULL.requires._replace(gpus=GPUS, driver="580.159.04"))


def document() -> Any:
    return json.loads(FULL.to_bytes())


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def damage(data: bytes) -> str:
    with pytest.raises(SnapshotDamaged) as caught:
        parse(data, "default/model@123")
    message = str(caught.value)
    assert message.startswith("read manifest default/model@123: ")
    assert len(message) < 1000
    return message


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every field of every object, but those of `source`, whose keys are free."""
    found: list[tuple[Any, ...]] = []
    if isinstance(value, dict):
        for key, item in value.items():
            found.append((*prefix, key))
            if key != "source":
                found += paths(item, (*prefix, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        found += paths(value[0], (*prefix, 0))
    return found


def dotted(path: tuple[Any, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def parent(value: Any, path: tuple[Any, ...]) -> Any:
    for part in path[:-1]:
        value = value[part]
    return value


PATHS = paths(document())
WRONG: list[Any] = [None, 1.5, {"x": []}, "text", 7, True, [[]]]


def of_another_type(path: tuple[Any, ...]) -> list[Any]:
    """Values that the field cannot have; a list or an object is wrong by what is in it."""
    old = type(parent(document(), path)[path[-1]])
    return [wrong for wrong in WRONG if type(wrong) is not old or old in (dict, list)]


WRONG_PATHS = [(path, wrong) for path in PATHS for wrong in of_another_type(path)]


def test_round_trip_and_canonical_form() -> None:
    data = FULL.to_bytes()
    assert parse(data) == FULL
    assert load(data, FULL.id, "x") == FULL
    assert FULL.id == blake3(data).hexdigest()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    shuffled = dict(reversed(list(document().items())))
    assert parse(encode(shuffled)).to_bytes() == data


def test_the_paths_reach_every_level() -> None:
    assert len(PATHS) > 40
    assert {"files[0].offset", "requires.mounts[0].type", "processes[0].threads[0].tid"} <= set(map(dotted, PATHS))


LATER = [
    ("cuda", "served_bytes"),
    ("cuda", "served_zeros"),
    ("requires", "engine"),
    ("requires", "image_id"),
    ("signals",),
    ("addresses",),
    ("blank",),
]
"""Fields that older snapshots have not."""


@pytest.mark.parametrize("path", [path for path in PATHS if path not in LATER], ids=dotted)
def test_a_missing_field_is_named(path: tuple[Any, ...]) -> None:
    value = document()
    del parent(value, path)[path[-1]]
    assert f"field {dotted(path)} is missing" in damage(encode(value))


def test_an_older_snapshot_is_read() -> None:
    value = document()
    for path in LATER:
        del parent(value, path)[path[-1]]
    found = parse(encode(value))
    assert found.cuda.served_bytes == 0
    assert found.requires.engine == "none" and found.requires.image_id == ""
    assert found.signals == () and found.addresses == () and found.blank == ()


@pytest.mark.parametrize(("path", "wrong"), WRONG_PATHS)
def test_a_field_of_another_type_is_named(path: tuple[Any, ...], wrong: Any) -> None:
    value = document()
    parent(value, path)[path[-1]] = wrong
    assert dotted(path) in damage(encode(value))


@pytest.mark.parametrize(
    ("path", "wrong", "said"),
    [
        (("requires", "gpus", 0, "uuid"), "GPU-1", "GPU-1 is listed twice"),
        (("requires", "gpus", 0, "uuid"), "0", "0 is no GPU's UUID"),
        (("requires", "gpus", 0, "model"), "", "no usable model name"),
        (("requires", "gpus", 0, "memory_bytes"), 0, "no usable memory size"),
        (("requires", "gpus", 0, "minor"), 255, "no usable minor number"),
        (("cuda", "processes"), [1, 1], "no list of different processes"),
        (("cuda", "processes"), [0], "no list of different processes"),
        (("cuda", "used_bytes"), [5], "1 entries for 2 GPUs"),
    ],
)
def test_gpus_are_checked(path: tuple[Any, ...], wrong: Any, said: str) -> None:
    value = document()
    parent(value, path)[path[-1]] = wrong
    assert said in damage(encode(value))


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        (["10.1.0.5", "10.1.0"], "field addresses[1] is no address"),
        (["fe80::1%eth0"], "field addresses[0] is no address"),
        (["10.0.0.1"] * 1025, "field addresses has more than 1024 entries"),
        ("10.0.0.1", "field addresses must be a list"),
    ],
)
def test_bad_addresses(addresses: object, said: str) -> None:
    value = document()
    value["addresses"] = addresses
    assert said in damage(encode(value))


def test_too_many_blank_files() -> None:
    value = document()
    value["blank"] = ["/cache/x"] * 257
    assert "field blank has more than 256 entries" in damage(encode(value))


@pytest.mark.parametrize(
    ("signals", "said"),
    [
        ([{"pid": 1, "signal": 9}], "field signals[0].signal is 9, which no process may want"),
        ([{"pid": 1, "signal": 33}], "field signals[0].signal is 33"),
        ([{"pid": 1, "signal": 65}], "field signals[0].signal must be in 0..64"),
        ([{"pid": 0, "signal": 10}], "field signals[0].pid is 0"),
        ([{"pid": 1, "signal": 10}, {"pid": 1, "signal": 12}], "field signals names a process twice"),
        ([{"pid": one + 1, "signal": 10} for one in range(257)], "field signals has more than 256 entries"),
        ([{"pid": 1, "signal": 10, "to": "all"}], "field 'signals[0].to' is unknown"),
    ],
)
def test_signals_are_checked(signals: list[dict[str, Any]], said: str) -> None:
    value = document()
    value["signals"] = signals
    assert said in damage(encode(value))


def test_device_memory_is_some_processs() -> None:
    """What nobody would map is not loaded."""
    value = document()
    value["cuda"] = {"processes": [], "used_bytes": [], "served_bytes": 1 << 21, "served_zeros": 0}
    assert "field cuda.served_bytes is of no process that uses CUDA" in damage(encode(value))


def test_processes_that_use_cuda_need_gpus() -> None:
    value = document()
    value["requires"]["gpus"] = []
    assert "there are no GPUs" in damage(encode(value))


def test_more_gpus_than_there_can_be() -> None:
    value = document()
    gpus = value["requires"]["gpus"]
    value["requires"]["gpus"] = [{**gpus[0], "uuid": f"GPU-{n}", "minor": n % 250} for n in range(65)]
    assert "65 GPUs are listed" in damage(encode(value))


def test_an_unknown_field_is_named() -> None:
    value = document()
    value["requires"]["kernels"] = ""
    assert "field 'requires.kernels' is unknown" in damage(encode(value))


@pytest.mark.parametrize("version", [0, 2, 10**18])
def test_an_unknown_version_is_said_before_anything_else(version: int) -> None:
    message = damage(encode({"version": version}))
    assert f"version {version} is unknown, this rewarm reads version 1" in message


@pytest.mark.parametrize(
    ("path", "value", "cause"),
    [
        (("files", 0, "size"), -1, "must be in 0.."),
        (("files", 0, "size"), 1 << 63, "must be in 0.."),
        (("files", 0, "size"), 10.0, "a float"),
        (("files", 0, "size"), True, "a bool"),
        (("files", 0, "size"), "10", "a string"),
        (("files", 0, "offset"), -1, "must be in 0.."),
        (("files", 0, "offset"), (1 << 63) - 1, "offset is too large"),
        (("files", 0, "pack"), "../" + "a" * 61, "files[0].pack is not a BLAKE3 digest"),
        (("files", 0, "pack"), "a/" + "a" * 62, "is not a BLAKE3 digest"),
        (("files", 0, "pack"), A.upper(), "is not a BLAKE3 digest"),
        (("files", 0, "pack"), A[:63] + "\n", "is not a BLAKE3 digest"),
        (("files", 0, "digest"), "", "is not a BLAKE3 digest"),
        (("files", 0, "digest"), A + "0", "longer than 64"),
        (("files", 1, "offset"), 1, "must be 0 for a file that is a pack of its own"),
        (("files", 1, "pack"), B, "must equal digest"),
        (("files", 2, "offset"), 9, "not right after another"),
        (("files", 2, "offset"), 11, "not right after another"),
        (("files", 2, "pack"), WHOLE.pack, "offset must be 0"),
        (("created",), "yesterday", "not a time in UTC"),
        (("created",), "2026-13-01T00:00:00Z", "not a time in UTC"),
        (("created",), "2026-01-01T00:00:00+02:00", "not a time in UTC"),
        (("created",), "2026-01-01T00:00:00Z\n", "not a time in UTC"),
        (("name",), "../x", "field name is not a name"),
        (("namespace",), "a\nb", "field namespace is not a name"),
        (("requires", "user"), [0], "must be [uid, gid]"),
        (("requires", "user"), [0, 1 << 32], "requires.user[1] must be in"),
        (("requires", "cgroup_version"), 3, "must be in 0..2"),
        (("requires", "engine"), "tgi", "requires.engine must be one of none, vllm, sglang"),
        (("requires", "args"), ["a\0b"], "requires.args[0] holds a NUL"),
        (("requires", "args"), ["\ud800"], "half a surrogate"),
        (("requires", "args"), ["x" * (1 << 17 | 1)], "longer than"),
        (("requires", "args"), [["x"]], "requires.args[0] must be a string"),
        (("processes", 0, "threads", 0, "affinity"), [1 << 16], "affinity[0] must be in"),
        (("processes", 0, "memory_policies", 0, "end"), 0, "must be above start"),
        (("source", "node"), 1, "source.node must be a string"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(path: tuple[Any, ...], value: Any, cause: str) -> None:
    changed = document()
    parent(changed, path)[path[-1]] = value
    assert cause in damage(encode(changed))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a/..",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "a b",
        "a\n",
        "ä",
        "a/" + "b" * 256,
        "x" * 513,
    ],
)
def test_hostile_file_names_are_refused(name: str) -> None:
    value = document()
    value["files"][0]["name"] = name
    assert "files[0].name" in damage(encode(value))


def test_a_file_name_twice_or_as_its_own_parent_is_refused() -> None:
    value = document()
    value["files"][0]["name"] = value["files"][2]["name"]
    assert "is there twice" in damage(encode(value))
    value["files"][0]["name"] = "checkpoint"
    assert "one of its parents as a file" in damage(encode(value))


def test_small_files_cannot_multiply_a_pack() -> None:
    half = {"digest": A, "pack": B, "size": (1 << 20) - 1}
    value = document()
    value["files"] = [{**half, "name": f"f{number}", "offset": 0} for number in range(3)]
    assert "not right after another" in damage(encode(value))
    value["files"] = [
        {**half, "name": f"f{number}", "offset": number * half["size"]}  # type: ignore[operator]
        for number in range(1026)
    ]
    assert f"more than {1 << 30} bytes in small files" in damage(encode(value))


def test_one_pack_has_one_size() -> None:
    value = document()
    value["files"].append({**value["files"][1], "name": "other", "size": 5})
    assert "gives its pack another size" in damage(encode(value))


def test_empty_files_may_share_the_pack_of_the_only_other_file() -> None:
    empty = digest_of(b"")
    only = FileEntry(name="a", size=3, digest=A, pack=A, offset=0)
    none = FileEntry(name="b", size=0, digest=empty, pack=A, offset=3)
    assert parse(FULL._replace(files=(only, none), packs=()).to_bytes()).files == (only, none)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"\xff{}", "is not JSON"),
        (b'{"version":NaN}', "holds NaN"),
        (b'{"version":1,"version":1}', "field version is there twice"),
        (b'{"version":' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"version":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b"[" * 5_000_000, "more than 4000000 values"),
        (b"[" + b"0," * 5_000_000 + b"0]", "more than 4000000 values"),
    ],
    ids=lambda value: value[:24].decode("latin1") if isinstance(value, bytes) else value,
)
def test_what_is_no_manifest_is_refused(data: bytes, cause: str) -> None:
    assert cause in damage(data)


def test_100_megabytes_are_refused_before_they_are_parsed() -> None:
    data = b'{"version":1,"name":"' + b"x" * (100 << 20) + b'"}'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "is longer than 64 MiB" in damage(data)
    with pytest.raises(SnapshotDamaged, match="longer than 64 MiB"):
        load(data, digest_of(data), "x")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, "kilobytes"


def test_load_notices_every_change_before_it_parses() -> None:
    data = FULL.to_bytes()
    for changed in (data[:-1], data[:100], b"", data + b" ", data.replace(b"model", b"mODEL", 1)):
        with pytest.raises(SnapshotDamaged, match="truncated or was changed"):
            load(changed, FULL.id, "x")
    wrong = document()
    wrong["version"] = 2
    with pytest.raises(SnapshotDamaged, match="version 2 is unknown"):
        load(encode(wrong), digest_of(encode(wrong)), "x")


def test_creation_times_sort_by_time() -> None:
    times = ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00.25Z", "2026-01-01T00:00:00.3Z", "2026-01-01T00:00:01Z"]
    keys = [FULL._replace(created=time).created_key for time in times]
    assert keys == sorted(keys)
    assert len(set(keys)) == 4
    now = FULL._replace(created=timestamp())
    assert parse(now.to_bytes()) == now


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"digest": "A" * 64}, "packs[0].digest is not a BLAKE3 digest"),
        ({"digest": "../" + "a" * 61}, "packs[0].digest is not a BLAKE3 digest"),
        ({"digest": B}, "packs[0].digest is there twice, or is a pack of files"),
        ({"raw_size": 0}, "packs[0].raw_size is not a multiple of 4096 above 0"),
        ({"raw_size": 4097}, "packs[0].raw_size is not a multiple"),
        ({"raw_size": (64 << 20) + 4096}, "packs[0].raw_size must be in 0..67108864"),
        ({"raw_size": 1 << 63}, "packs[0].raw_size must be in"),
        ({"size": 0}, "packs[0].size must be in 4176..8320 for 8192 raw bytes"),
        ({"size": 4175}, "packs[0].size must be in"),
        ({"size": 8321}, "packs[0].size must be in"),
        ({"size": 1 << 63}, "packs[0].size must be in"),
        ({"size": -1}, "packs[0].size must be in"),
    ],
)
def test_a_bad_pack_of_chunks_is_named(change: dict[str, Any], cause: str) -> None:
    value = document()
    value["packs"][0].update(change)
    assert cause in damage(encode(value))


def test_packs_of_chunks_and_their_table_belong_together() -> None:
    assert "has 1 entries, and files has no 'memory/chunks'" in damage(FULL._replace(files=(SMALL,)).to_bytes())
    assert "has 0 entries, and files has a 'memory/chunks'" in damage(FULL._replace(packs=()).to_bytes())
    assert "packs[1].digest is there twice" in damage(FULL._replace(packs=(PACK, PACK)).to_bytes())


def test_convenience() -> None:
    assert FULL.stored_bytes == 15 + 64 + (1 << 20) + PACK.size
    assert FULL.file("rootfs-diff.tar") == NEXT
    assert FULL.file("x") is None
    assert not module.is_digest(A + "\n")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(PATHS), value=JSON)
def test_any_value_anywhere_parses_or_is_damage(path: tuple[Any, ...], value: Any) -> None:
    changed = document()
    parent(changed, path)[path[-1]] = value
    survives(lambda: encode(changed))


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, len(FULL.to_bytes()) - 1), byte=st.integers(0, 255))
def test_any_changed_byte_parses_or_is_damage(position: int, byte: int) -> None:
    data = bytearray(FULL.to_bytes())
    data[position] = byte
    survives(lambda: bytes(data))


def survives(make: Callable[[], bytes]) -> None:
    try:
        result = parse(make())
    except SnapshotDamaged:
        return
    assert isinstance(result, Manifest)
    assert parse(result.to_bytes()) == result
