"""Pairing a snapshot's GPUs with a container's: who stands for whom, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm_hooks.gpu_pairs import MOST, CannotPair, Gpu, as_objects, device_map, from_objects, pair

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
SIZE = 85520809984


def gpu(name: str | int, minor: int, model: str = H100, memory: int = SIZE) -> Gpu:
    return Gpu(f"GPU-{name}", model, memory, minor)


def node(name: str, count: int, model: str = H100, memory: int = SIZE) -> list[Gpu]:
    return [gpu(f"{name}{minor}", minor, model, memory) for minor in range(count)]


def uuids(pairs: list[tuple[Gpu, Gpu]]) -> list[tuple[str, str]]:
    return [(source.uuid.removeprefix("GPU-"), target.uuid.removeprefix("GPU-")) for source, target in pairs]


@pytest.mark.parametrize("count", range(9))
def test_the_same_gpus(count: int) -> None:
    own = node("a", count)
    assert pair(own, own) == [(one, one) for one in own]
    assert pair(own, own[::-1]) == [(one, one) for one in own]
    assert device_map(pair(own, own)) == []


@pytest.mark.parametrize("count", range(1, 9))
def test_other_gpus_of_the_kind_come_in_the_order_of_minor_numbers(count: int) -> None:
    there, here = node("a", count), node("b", count)
    assert uuids(pair(there, here[::-1])) == [(f"a{n}", f"b{n}") for n in range(count)]
    assert device_map(pair(there, here)) == [(f"GPU-a{n}", f"GPU-b{n}") for n in range(count)]


@pytest.mark.parametrize("count", range(1, 5))
def test_order_in_the_lists_changes_nothing(count: int) -> None:
    there, here = node("a", count), [gpu("a0", 7), *node("b", count)[1:]]
    expected = dict(uuids(pair(there, here)))
    for sources in itertools.permutations(there):
        for targets in itertools.permutations(here):
            found = pair(sources, targets)
            assert [source for source, _ in found] == list(sources)
            assert dict(uuids(found)) == expected


def test_a_gpu_on_both_sides_is_its_own_partner_under_another_minor_number() -> None:
    found = pair([gpu("x", 0), gpu("y", 1)], [gpu("z", 0), gpu("x", 1)])
    assert uuids(found) == [("x", "x"), ("y", "z")]
    assert device_map(found) == [("GPU-x", "GPU-x"), ("GPU-y", "GPU-z")]


def test_models_are_kept_apart() -> None:
    there = [gpu("h", 0), gpu("a", 1, A100), gpu("i", 2)]
    here = [gpu("b", 0, A100), gpu("j", 1), gpu("k", 2)]
    assert uuids(pair(there, here)) == [("h", "j"), ("a", "b"), ("i", "k")]


def test_memory_sizes_are_kept_apart() -> None:
    small = SIZE // 2
    assert uuids(pair([gpu("a", 0), gpu("b", 1, memory=small)], [gpu("c", 0, memory=small), gpu("d", 1)])) == [
        ("a", "d"),
        ("b", "c"),
    ]


REFUSED: dict[str, tuple[list[Gpu], list[Gpu], str]] = {
    "fewer": (
        node("a", 2),
        node("b", 1),
        "snapshot needs 2 x NVIDIA H100 80GB HBM3 (85520809984 bytes), this container has 1",
    ),
    "none": (node("a", 1), [], f"snapshot needs 1 x {H100} ({SIZE} bytes), this container has 0"),
    "more": (
        node("a", 1),
        node("b", 2),
        f"snapshot needs 1 x {H100} ({SIZE} bytes), this container has 2",
    ),
    "none needed": ([], node("b", 1), f"snapshot needs no GPU, this container has 1 x {H100} ({SIZE} bytes)"),
    "another model": (
        node("a", 1),
        node("b", 1, A100),
        f"snapshot needs 1 x {H100} ({SIZE} bytes), this container has 1 x {A100} ({SIZE} bytes)",
    ),
    "another size": (
        node("a", 1),
        node("b", 1, memory=1 << 30),
        f"snapshot needs 1 x {H100} ({SIZE} bytes), this container has 1 x {H100} (1073741824 bytes)",
    ),
    "one of two models": (
        node("a", 2),
        [gpu("b", 0), gpu("c", 1, A100)],
        f"snapshot needs 2 x {H100} ({SIZE} bytes), this container has 1, and 1 x {A100} ({SIZE} bytes)",
    ),
    "one model more": (
        node("a", 1),
        [gpu("b", 0), gpu("c", 1, A100)],
        f"snapshot needs 1 x {H100} ({SIZE} bytes), this container has 1 x {H100} ({SIZE} bytes), "
        f"1 x {A100} ({SIZE} bytes)",
    ),
    "its own, but another model": (
        [gpu("a", 0), gpu("b", 1, A100)],
        [gpu("a", 0, A100), gpu("b", 1)],
        f"GPU-a is {H100} ({SIZE} bytes) in the snapshot, here it is {A100} ({SIZE} bytes)",
    ),
    "a UUID twice": ([gpu("a", 0), gpu("a", 1)], node("b", 2), "snapshot: GPU-a is listed twice"),
    "a UUID twice here": (node("b", 2), [gpu("a", 0), gpu("a", 1)], "container: GPU-a is listed twice"),
    "a minor twice": (
        [gpu("a", 3), gpu("b", 3)],
        node("c", 2),
        "snapshot: two GPUs have minor number 3, the second is GPU-b",
    ),
    "hundreds": (node("a", 200), node("b", 2), "snapshot: 200 GPUs are listed, at most 64 are understood"),
    "hundreds here": (node("a", 2), node("b", 200), "container: 200 GPUs are listed, at most 64 are understood"),
}


@pytest.mark.parametrize(("sources", "targets", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_go_together(sources: list[Gpu], targets: list[Gpu], message: str) -> None:
    with pytest.raises(CannotPair) as caught:
        pair(sources, targets)
    assert str(caught.value) == message


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no UUID": ({"uuid": None}, "None is no GPU's UUID"),
    "UUID of another type": ({"uuid": ["GPU-a"]}, "a list is no GPU's UUID"),
    "UUID too long": ({"uuid": "GPU-" + "a" * 100_000}, "is no GPU's UUID"),
    "UUID of a MIG device": ({"uuid": "MIG-ad04c04b"}, "MIG-ad04c04b is no GPU's UUID"),
    "UUID with a line in it": ({"uuid": "GPU-a\nb"}, "is no GPU's UUID"),
    "UUID of other digits": ({"uuid": "GPU-\u0661"}, "is no GPU's UUID"),
    "empty model": ({"model": ""}, "no usable model name"),
    "model with an escape": ({"model": "H100\x1b[2J"}, r"no usable model name: H100\x1b[2J"),
    "model with half a character": ({"model": "\ud800"}, "no usable model name"),
    "model too long": ({"model": "H" * 100_000}, "no usable model name"),
    "model of another type": ({"model": {}}, "no usable model name: a dict"),
    "no memory": ({"memory_bytes": 0}, "no usable memory size: 0"),
    "memory below zero": ({"memory_bytes": -1}, "no usable memory size: -1"),
    "memory without end": ({"memory_bytes": 10**4000}, "no usable memory size: a int"),
    "memory in words": ({"memory_bytes": "80 GB"}, "no usable memory size: 80 GB"),
    "memory as a truth": ({"memory_bytes": True}, "no usable memory size: True"),
    "memory in parts": ({"memory_bytes": 1.5}, "no usable memory size: a float"),
    "no minor": ({"minor": None}, "no usable minor number: None"),
    "minor of nvidiactl": ({"minor": 255}, "no usable minor number: 255"),
    "minor below zero": ({"minor": -1}, "no usable minor number: -1"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_entries_that_are_no_gpu(change: dict[str, Any], message: str) -> None:
    entry = {**as_objects([gpu("a", 0)])[0], **change}
    for attempt in (lambda: from_objects([entry], "snapshot"), lambda: pair([Gpu(**entry)], node("b", 1))):
        with pytest.raises(CannotPair) as caught:
            attempt()
        text = str(caught.value)
        assert text.startswith("snapshot: ") and message in text
        assert len(text) < 400 and text.isprintable()


@pytest.mark.parametrize("value", [None, {}, "GPU-a", 3, [3], [None], [[]], [as_objects([gpu("a", 0)])] * 2])
def test_json_that_is_no_list_of_gpus(value: object) -> None:
    with pytest.raises(CannotPair, match=r"^node: "):
        from_objects(value, "node")


def test_json_there_and_back() -> None:
    gpus = [gpu("a", 1), gpu("b", 0, A100)]
    assert from_objects(json.loads(json.dumps(as_objects(gpus))), "node") == gpus


kinds = st.sampled_from([(H100, SIZE), (H100, SIZE // 2), (A100, SIZE)])


@st.composite
def sides(draw: st.DrawFn) -> tuple[list[Gpu], list[Gpu]]:
    """Two nodes' GPUs of the same kinds, some of them the same ones, in any order and under any minor numbers."""
    kinds_of = draw(st.lists(kinds, max_size=MOST // 4))
    minors = st.permutations(range(254))
    there = [Gpu(f"GPU-s{at}", *kind, minor) for (at, kind), minor in zip(enumerate(kinds_of), draw(minors))]  # noqa: B905
    here = [
        Gpu(source.uuid if draw(st.booleans()) else f"GPU-t{at}", source.model, source.memory_bytes, minor)
        for (at, source), minor in zip(enumerate(there), draw(minors))  # noqa: B905
    ]
    return draw(st.permutations(there)), draw(st.permutations(here))


@given(sides())
def test_a_bijection_that_keeps_kinds_and_identities(both: tuple[list[Gpu], list[Gpu]]) -> None:
    there, here = both
    found = pair(there, here)
    assert [source for source, _ in found] == there
    assert Counter(target for _, target in found) == Counter(here)
    own = {target.uuid for target in here}
    for source, target in found:
        assert source[1:3] == target[1:3]
        assert source.uuid not in own or target.uuid == source.uuid
    moved = sorted((pair for pair in found if pair[0].uuid != pair[1].uuid), key=lambda pair: pair[0].minor)
    for kind in {source[1:3] for source, _ in moved}:
        minors = [target.minor for source, target in moved if source[1:3] == kind]
        assert minors == sorted(minors)
    assert bool(device_map(found)) == bool(moved)


@given(st.lists(st.tuples(st.text(), st.text(), st.integers(), st.integers()).map(lambda t: Gpu(*t)), max_size=80))
def test_any_list_is_paired_or_refused_in_words(gpus: list[Gpu]) -> None:
    try:
        assert len(pair(gpus, gpus)) == len(gpus)
    except CannotPair as error:
        assert str(error).isprintable()
