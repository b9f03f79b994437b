"""Carving: what CRIU and the fill bring back together is what was captured, for memory of any layout."""

from __future__ import annotations

import itertools
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewarm.criu import align, density, images, vmas
from rewarm.criu import carve as carving
from rewarm.criu.carve import Carved, carve
from rewarm.memory import places, plan
from support import memory_images as made
from support.memory_images import PAGE, Area, Process

TOP = 0x7F00_0000_0000
# Small, so that small random mappings are carved; what it really is has a test of its own.
TINY = 2 * PAGE


class Result:
    """The chunks, and the images as carving left them."""

    def __init__(self, directory: Path, carved: Carved, chunks: list[bytes]) -> None:
        self.directory = directory
        self.carved = carved
        self.filled: dict[tuple[int, int], bytes] = {}
        for place, chunk in zip(carved.places, chunks, strict=True):
            at = 0
            for number in range(places.WINDOW // PAGE):
                if place.bits >> number & 1:
                    key = (place.pid, place.base + number * PAGE)
                    assert key not in self.filled, "filled twice"
                    self.filled[key] = chunk[at : at + PAGE]
                    at += PAGE
            assert at == len(chunk)

    def left(self, name: str) -> dict[int, bytes]:
        return made.read_pagemap(self.directory, name)[0]


@contextmanager
def carved(
    processes: list[Process],
    shared: dict[int, dict[int, bytes]] | None = None,
    memfds: dict[int, int] | None = None,
    longest: int = 1 << 30,
    smallest: int = TINY,
) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(carving, "SMALLEST", smallest)
        directory = Path(name)
        made.write(directory, processes, shared, memfds, longest)
        chunks: list[bytes] = []
        lock = threading.Lock()

        def add(data: memoryview) -> int:
            with lock:
                chunks.append(bytes(data))
                return len(chunks) - 1

        found = carve(directory, add, 2, lambda total: None)
        yield Result(directory, found, chunks)


def check(
    result: Result,
    processes: list[Process],
    shared: dict[int, dict[int, bytes]] | None = None,
    memfds: dict[int, int] | None = None,
) -> None:
    """Every page is back, from CRIU or from the fill, and nothing else is."""
    for process in processes:
        left, missing = made.read_pagemap(result.directory, str(process.pid))
        assert missing == process.missing
        for address, content in process.content.items():
            back = result.filled.get((process.pid, address), left.get(address))
            if back is None:
                area = next(area for area in process.areas if area.start <= address < area.end)
                assert content == bytes(PAGE) and area.status == made.REGULAR | made.ANON_PRIVATE, hex(address)
            else:
                assert back == content, hex(address)
        assert set(left) <= set(process.content)
        assert all(one == process.content[address] for address, one in left.items())
    for shmid, pages in (shared or {}).items():
        left = result.left(f"shmem-{shmid}")
        for offset, one in pages.items():
            here = _filled_shared(result, processes, shmid, memfds or {}, offset)
            assert here <= {one} and left.get(offset, one) == one
            assert here or offset in left or one == bytes(PAGE), f"offset {offset:#x} of {shmid} is lost"
    known = {(process.pid, address) for process in processes for address in process.content}
    for pid, address in result.filled:
        area = next(a for p in processes if p.pid == pid for a in p.areas if a.start <= address < a.end)
        assert (pid, address) in known or area.flags & made.SHARED


def _filled_shared(
    result: Result, processes: list[Process], shmid: int, memfds: dict[int, int], offset: int
) -> set[bytes]:
    found = set()
    for process in processes:
        for area in process.areas:
            behind = memfds.get(area.shmid) if area.status & made.MEMFD else area.shmid
            if area.flags & made.SHARED and behind == shmid:
                address = area.start + offset - area.pgoff
                if area.start <= address < area.end and (process.pid, address) in result.filled:
                    found.add(result.filled[process.pid, address])
    return found


PAGES = st.integers(0, 6).map(made.page)
KINDS = st.sampled_from(
    [
        {},
        {},
        {},
        {"prot": made.READ},
        {"prot": 0},
        {"flags": made.PRIVATE | made.ANONYMOUS | made.NORESERVE},
        {"flags": made.PRIVATE | made.ANONYMOUS | made.LOCKED},
        {"flags": made.PRIVATE | made.ANONYMOUS | made.GROWSDOWN},
        {"flags": made.PRIVATE | made.ANONYMOUS | made.HUGETLB},
        {"flags": made.PRIVATE, "status": made.REGULAR | made.FILE_PRIVATE, "shmid": 5},
        {"madv": 1 << 15},
        {"madv": 1 << 14},
    ]
)


@st.composite
def trees(draw: st.DrawFn) -> list[Process]:
    """Up to three processes; children have some mappings of their parent, with some pages of it."""
    found: list[Process] = []
    for number in range(draw(st.integers(1, 3))):
        parent = draw(st.sampled_from(found)) if found else None
        areas: list[Area] = []
        content: dict[int, bytes] = {}
        at = TOP
        for area in parent.areas if parent is not None else ():
            if draw(st.booleans()):
                areas.append(area)
                for address in range(area.start, area.end, PAGE):
                    before = parent.content.get(address) if parent is not None else None
                    choice = draw(st.sampled_from(["same", "same", "other", "none"]))
                    if choice == "same" and before is not None:
                        content[address] = before
                    elif choice == "other":
                        content[address] = draw(PAGES)
                at = max(at, area.end)
        for _ in range(draw(st.integers(0 if areas else 1, 3))):
            at += draw(st.sampled_from([0, PAGE, 512 * PAGE, (1 << 32) + PAGE, 5 << 33]))
            area = Area(at, draw(st.integers(1, 40)), **draw(KINDS))
            areas.append(area)
            for address in range(area.start, area.end, PAGE):
                if draw(st.integers(0, 3)):
                    content[address] = draw(PAGES)
            at = area.end
        process = Process(number + 1, parent.pid if parent is not None else 0, areas, content)
        spots = sorted(content)
        if spots:
            process.pointer = draw(st.sampled_from(spots)) + draw(st.integers(0, PAGE - 1))
            process.rseq = draw(st.sampled_from(spots)) + 8 * draw(st.integers(0, 500))
            process.missing = set()
        found.append(process)
    return found


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(trees(), st.sampled_from([1, 3, 1 << 30]))
def test_every_page_comes_back(processes: list[Process], longest: int) -> None:
    with carved(processes, longest=longest) as result:
        check(result, processes)
        by_pid = {process.pid: process for process in processes}
        for process in processes:
            left = result.left(str(process.pid))
            assert process.rseq - process.rseq % PAGE in left or not process.rseq
            assert process.pointer - process.pointer % PAGE in left or not process.pointer
            parent = by_pid.get(process.parent)
            if parent is not None:
                _check_inherited(result, process, parent)


def _check_inherited(result: Result, process: Process, parent: Process) -> None:
    """What parent and child have in common is in the images of both, in mappings that CRIU pairs."""
    mappings = {one.pid: vmas.load(result.directory / f"mm-{one.pid}.img") for one in (process, parent)}
    paired = criu_pairs(mappings[parent.pid], mappings[process.pid])
    for area in process.areas:
        if area not in parent.areas or not area.flags & made.PRIVATE or area.flags & (made.HUGETLB | made.GROWSDOWN):
            continue
        common = [
            address
            for address in range(area.start, area.end, PAGE)
            if address in process.content
            and process.content[address] == parent.content.get(address)
            and (process.content[address] != bytes(PAGE) or not area.flags & made.ANONYMOUS)
        ]
        if len(common) * PAGE < TINY:
            continue
        for one in (process, parent):
            assert set(common) <= set(result.left(str(one.pid))), f"{area.start:#x} of {one.pid}"
        if area.flags & made.ANONYMOUS:
            lost = [address for address in common if not any(start <= address < end for start, end in paired)]
            assert len(lost) <= 2, f"CRIU does not pair {area.start:#x}"


def criu_pairs(ours: list[vmas.Vma], theirs: list[vmas.Vma]) -> set[tuple[int, int]]:
    """What CRIU's walk over the mappings of a parent and a child pairs, step by step as criu/mem.c does it."""
    found = set()
    mine = child = 0
    while True:
        one, other = ours[mine], theirs[child]
        if one.start == other.start and one.end == other.end:
            found.add((one.start, one.end))
        while theirs[child].start <= ours[mine].start:
            child += 1
            if child == len(theirs):
                return found
        while ours[mine].start < theirs[child].start:
            mine += 1
            if mine == len(ours):
                return found


def test_mappings_are_cut_where_criu_would_miss_a_pair() -> None:
    """As it was seen: the parent's mapping grew at its end, the child's at its beginning, and the child has more."""
    parent = [Area(TOP, 300), Area(TOP + 400 * PAGE, 64, madv=1 << 15), Area(TOP + 600 * PAGE, 64)]
    child = [Area(TOP - 8 * PAGE, 208), Area(TOP + 390 * PAGE, 4), Area(TOP + 400 * PAGE, 64, madv=1 << 15)]
    child += [Area(TOP + 500 * PAGE, 2), Area(TOP + 590 * PAGE, 100)]
    processes = [
        Process(
            pid,
            pid - 1,
            areas,
            {a.start + n * PAGE: b"%016x" % (a.start + n * PAGE) * 256 for a in areas for n in range(a.pages)},
        )
        for pid, areas in ((1, parent), (2, child))
    ]
    with carved(processes) as result:
        check(result, processes)
        common = set(processes[0].content) & set(processes[1].content)
        mappings = [vmas.load(result.directory / f"mm-{pid}.img") for pid in (1, 2)]
        paired = criu_pairs(*mappings)
        lost = [address for address in common if not any(start <= address < end for start, end in paired)]
        assert len(lost) <= 4
        for pid, areas in ((1, parent), (2, child)):
            assert common <= set(result.left(str(pid)))
            # Cut, not changed: together they are what they were.
            for area in areas:
                inside = [vma for vma in mappings[pid - 1] if area.start <= vma.start < area.end]
                assert inside[0].start == area.start and inside[-1].end == area.end
                assert all(one.end == two.start for one, two in itertools.pairwise(inside))
                assert {vma.madv for vma in inside} == {area.madv}


def test_guard_pages_are_no_mappings() -> None:
    """CRIU lists them behind all mappings, by the addresses of those in which they lie; they stay where they were."""
    guards = [Area(TOP + 40 * PAGE, 8, status=vmas.GUARD), Area(TOP, 1, status=vmas.GUARD)]
    areas = [[Area(TOP, 300)], [Area(TOP - 8 * PAGE, 208)]]
    pages = [at for at in range(1, 200) if not 40 <= at < 48]
    content = {TOP + at * PAGE: made.page(at) for at in pages}
    processes = [Process(pid, pid - 1, [*areas[pid - 1], *guards], dict(content)) for pid in (1, 2)]
    with carved(processes) as result:
        check(result, [Process(one.pid, one.parent, areas[one.pid - 1], one.content) for one in processes])
        for pid in (1, 2):
            path = result.directory / f"mm-{pid}.img"
            assert not any(vma.status & vmas.GUARD for vma in vmas.load(path))
            (record,) = images.records(path)
            written = [(images.number(one, 1), images.number(one, 2)) for one in images.messages(record, 14)]
            assert written[-2:] == [(guard.start, guard.end) for guard in guards]
            assert len(written) > 3, "the mapping was cut"


def test_pages_in_a_parents_images_stay_as_they_are() -> None:
    area = Area(TOP, 64)
    content = {TOP + at * PAGE: made.page(at + 1) for at in range(0, 64, 2)}
    process = Process(1, 0, [area], content, missing={TOP + at * PAGE for at in range(1, 64, 2)})
    with carved([process]) as result:
        check(result, [process])
        assert result.carved.filled == 32 * PAGE


def test_shared_memory_is_filled_through_a_mapping_that_is_there() -> None:
    shared = {
        77: {at * PAGE: made.page(at % 5) for at in range(100)},
        88: {at * PAGE: made.page(at + 9) for at in range(20)},
        99: {at * PAGE: made.page(at + 50) for at in range(20)},
    }
    anonymous = {"flags": made.SHARED | made.ANONYMOUS, "status": made.REGULAR | made.ANON_SHARED}
    memfd = {"flags": made.SHARED, "status": made.REGULAR | made.FILE_SHARED | made.MEMFD}
    processes = [
        Process(
            1,
            0,
            [
                Area(TOP, 30, shmid=77, pgoff=0, **anonymous),
                Area(TOP + (1 << 30), 60, prot=made.READ, shmid=77, pgoff=30 * PAGE, **anonymous),
                Area(TOP + (2 << 30), 10, shmid=4, pgoff=5 * PAGE, **memfd),
                # The number of an open file may be that of a shared memory: they are not the same.
                Area(TOP + (3 << 30), 20, shmid=99, **memfd),
            ],
            {},
        ),
        Process(2, 1, [Area(TOP + PAGE, 50, shmid=77, pgoff=10 * PAGE, **anonymous)], {}),
    ]
    with carved(processes, shared, {4: 88, 99: 1234}) as result:
        check(result, processes, shared, {4: 88, 99: 1234})
        left = result.left("shmem-77")
        # Mapped writably: 0 to 30 by the first, 10 to 60 by the second.
        assert set(left) == {at * PAGE for at in range(60, 100)}
        assert set(result.left("shmem-88")) == {at * PAGE for at in [*range(5), *range(15, 20)]}
        assert set(result.left("shmem-99")) == {at * PAGE for at in range(20)}


def test_the_pages_below_the_stack_pointer_and_the_alternate_stack_stay() -> None:
    area = Area(TOP, 512)
    content = {TOP + at * PAGE: made.page(at + 1) for at in range(512)}
    pointer, stack = TOP + 100 * PAGE + 8, (TOP + 200 * PAGE, 16 * PAGE)
    process = Process(1, 0, [area], content, pointer=pointer, rseq=TOP + 300 * PAGE - 16, stack=stack)
    with carved([process]) as result:
        check(result, [process])
        left = {(address - TOP) // PAGE for address in result.left("1")}
        assert left == {*range(36, 101), *range(200, 216), 299, 300}


def test_small_mappings_stay() -> None:
    pages = carving.SMALLEST // PAGE
    areas = [Area(TOP, pages - 1), Area(TOP + (1 << 30), pages)]
    content = {area.start + at * PAGE: made.page(at + 1) for area in areas for at in range(area.pages)}
    process = Process(1, 0, areas, content)
    with carved([process], smallest=carving.SMALLEST) as result:
        check(result, [process])
        assert set(result.left("1")) == {address for address in content if address < areas[1].start}


def test_zeros_behind_a_file_are_kept_and_others_are_not() -> None:
    file = {"flags": made.PRIVATE, "status": made.REGULAR | made.FILE_PRIVATE, "shmid": 5}
    areas = [Area(TOP, 64), Area(TOP + (1 << 30), 64, **file)]
    content = {area.start + at * PAGE: made.page(at % 2) for area in areas for at in range(64)}
    with carved([Process(1, 0, areas, content)]) as result:
        check(result, [Process(1, 0, areas, content)])
        assert result.carved.filled == 96 * PAGE and result.carved.zeros == 32 * PAGE and result.carved.left == 0


def test_what_a_process_may_not_write_is_marked() -> None:
    areas = [Area(TOP, 64, prot=made.READ), Area(TOP + (1 << 30), 64, prot=0), Area(TOP + (2 << 30), 64)]
    content = {area.start + at * PAGE: made.page(at + 1) for area in areas for at in range(64)}
    with carved([Process(1, 0, areas, content)]) as result:
        flags = {place.base: place.forced for place in result.carved.places}
        assert flags == {TOP: True, TOP + (1 << 30): True, TOP + (2 << 30): False}


class TestHugePages:
    DENSE, THIN = 512, 20

    def carve(self, filled: list[int], **kind: int) -> tuple[Carved, dict[int, bytes], Area]:
        """A mapping whose 2 MiB number N has `filled[N]` pages."""
        area = Area(TOP, 512 * len(filled), **kind)
        content = {
            TOP + (number * 512 + at) * PAGE: made.page(at + 1)
            for number, count in enumerate(filled)
            for at in range(count)
        }
        with carved([Process(1, 0, [area], content)]) as result:
            check(result, [Process(1, 0, [area], content)])
            return result.carved, result.left("1"), area

    def test_a_dense_mapping_has_them(self) -> None:
        found, left, area = self.carve([512, 512, 505])
        assert [(pid, vma.start, vma.end, extra) for pid, vma, extra in found.huge] == [
            (1, area.start, area.end, 7 * PAGE)
        ]
        assert not left

    def test_a_thin_part_gets_a_small_page_first(self) -> None:
        found, left, _ = self.carve([512] * 10 + [420])
        assert found.huge and set(left) == {TOP + 10 * 512 * PAGE}

    def test_a_thin_mapping_has_none(self) -> None:
        assert not self.carve([512, 100, 100])[0].huge
        assert not self.carve([512] * 10 + [400])[0].huge, "khugepaged could make it 2.2 % more"
        assert not self.carve([400] * 3)[0].huge

    @pytest.mark.parametrize("kind", [{"madv": 1 << 15}, {"flags": made.PRIVATE | made.ANONYMOUS | made.LOCKED}])
    def test_neither_has_one_that_may_not(self, kind: dict[str, int]) -> None:
        assert not self.carve([512, 512], **kind)[0].huge

    def test_the_bit_is_set_in_the_image_and_nothing_else_changes(self, tmp_path: Path) -> None:
        areas = [Area(TOP, 512), Area(TOP + (1 << 30), 512, madv=1 << 3), Area(TOP + (2 << 30), 512)]
        path = tmp_path / "mm-1.img"
        made.write_mm(path, areas)
        before = list(images.records(path))
        plan.allow_huge_pages([(1, area.start, area.end, 0) for area in areas[:2]], [], tmp_path, 0, None)
        assert [vma.madv for vma in vmas.load(path)] == [1 << 14, 1 << 14 | 1 << 3, 0]
        after = list(images.records(path))
        assert [{k: v for k, v in m.items() if k != 14} for m in before] == [
            {k: v for k, v in m.items() if k != 14} for m in after
        ]

    def test_not_near_the_memory_limit(self, tmp_path: Path) -> None:
        areas = [Area(TOP, 512), Area(TOP + (1 << 30), 512)]
        made.write_mm(tmp_path / "mm-1.img", areas)
        mappings = [(1, area.start, area.end, extra) for area, extra in zip(areas, (0, PAGE), strict=True)]
        plan.allow_huge_pages(mappings, [], tmp_path, 96 << 20, 100 << 20)
        assert [vma.madv for vma in vmas.load(tmp_path / "mm-1.img")] == [1 << 14, 0]

    @pytest.mark.parametrize(("mode", "madv"), [("madvise", [1 << 14, 1 << 14]), ("always", [1 << 14, 1 << 15])])
    def test_pieces_of_a_mapping_that_was_cut(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, madv: list[int]
    ) -> None:
        """Their first start and end are still those of the whole: the last ones count."""
        (tmp_path / "thp").mkdir()
        (tmp_path / "thp/enabled").write_text(f"[{mode}] never\n")
        monkeypatch.setattr(plan, "_THP", str(tmp_path / "thp"))
        path = tmp_path / "mm-1.img"
        made.write_mm(path, [Area(TOP, 1024)])
        [whole] = vmas.load(path)
        middle = TOP + (2 << 20)
        align.write(path, [whole._replace(end=middle), whole._replace(start=middle)])
        mappings = [(1, TOP, middle, 0), *([(1, middle, middle + (2 << 20), 0)] if mode == "madvise" else [])]
        thin = [places.Place(1, 0, at, (1).to_bytes(places.MASK_BYTES, "little")) for at in (TOP, middle)]
        plan.allow_huge_pages(mappings, thin, tmp_path, 0, None)
        assert [vma.madv for vma in vmas.load(path)] == madv

    def test_not_on_a_kernel_without_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """madvise(2) would fail there, and CRIU with it."""
        monkeypatch.setattr(plan, "_THP", str(tmp_path / "missing"))
        made.write_mm(tmp_path / "mm-1.img", [Area(TOP, 512)])
        plan.allow_huge_pages([(1, TOP, TOP + (2 << 20), 0)], [], tmp_path, 0, None)
        assert [vma.madv for vma in vmas.load(tmp_path / "mm-1.img")] == [0]


class TestAlways:
    """A node that gives huge pages to all memory: thin mappings are told to have none."""

    def advised(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, masks: list[int]) -> list[int]:
        (tmp_path / "thp").mkdir()
        (tmp_path / "thp/enabled").write_text(mode)
        monkeypatch.setattr(plan, "_THP", str(tmp_path / "thp"))
        areas = [Area(TOP, 512), Area(TOP + (1 << 30), 512), Area(TOP + (2 << 30), 512, madv=1 << 14)]
        made.write_mm(tmp_path / "mm-1.img", areas)
        where = [
            places.Place(1, 0, area.start, mask.to_bytes(places.MASK_BYTES, "little"))
            for area, mask in zip(areas, masks, strict=True)
        ]
        plan.allow_huge_pages([(1, areas[0].start, areas[0].end, 0)], where, tmp_path, 0, None)
        return [vma.madv for vma in vmas.load(tmp_path / "mm-1.img")]

    @pytest.mark.parametrize(
        ("mode", "madv"),
        [("[always] madvise never\n", 1 << 15), ("always [madvise] never\n", 0)],
        ids=["always", "madvise"],
    )
    def test_thin(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, madv: int) -> None:
        """Not the one that was chosen, nor one of which the program has said what it wants."""
        assert self.advised(tmp_path, monkeypatch, mode, [1, 1, 1]) == [1 << 14, madv, 1 << 14]

    def test_dense(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.advised(tmp_path, monkeypatch, "[always]", [1, (1 << 512) - 1, 1]) == [1 << 14, 0, 1 << 14]

    @pytest.mark.parametrize("mode", ["[always]", "[madvise]"])
    def test_a_process_that_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
        """The error is the same, whatever the node's setting."""
        where = [places.Place(number, 0, TOP, bytes([1] * places.MASK_BYTES)) for number in (1, 2)]
        (tmp_path / "thp").mkdir()
        (tmp_path / "thp/enabled").write_text(mode)
        monkeypatch.setattr(plan, "_THP", str(tmp_path / "thp"))
        made.write_mm(tmp_path / "mm-1.img", [Area(TOP, 512)])
        with pytest.raises(plan.Unfounded, match="place 1 is in process 2, which has no memory"):
            plan.allow_huge_pages([(2, TOP, TOP + 4096, 0)], where, tmp_path, 0, None)

    def test_many_mappings(self, tmp_path: Path) -> None:
        areas = [Area(TOP + (at << 30), 512) for at in range(300)]
        made.write_mm(tmp_path / "mm-1.img", areas)
        mappings = [(1, area.start, area.end, 0) for area in areas[1:]]
        plan.allow_huge_pages(mappings, [], tmp_path, 0, None)
        assert [vma.madv for vma in vmas.load(tmp_path / "mm-1.img")] == [0] + [1 << 14] * 299


class TestShared:
    """What is in common with another process is no reason for huge pages: they would end that."""

    def test_costs_what_is_shared(self) -> None:
        full = (1 << 512) - 1
        filled = dict.fromkeys(range(100), full)
        assert density.plan(0, 100 * density.HUGE, filled, {}, {}) == density.Plan((), 0)
        assert density.plan(0, 100 * density.HUGE, filled, {}, {1: full}) == density.Plan((), 0)
        assert density.plan(0, 100 * density.HUGE, filled, {}, {1: full, 2: full}) is None
        assert density.plan(0, density.HUGE, filled, {}, {0: 1}) is None


class TestHostileImages:
    def test_more_mappings_than_can_be(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vmas, "_most", lambda: 3)
        made.write_mm(tmp_path / "mm-1.img", [Area(TOP + at * 2 * PAGE, 1) for at in range(4)])
        with pytest.raises(images.ImageError, match="more than 3 mappings"):
            vmas.load(tmp_path / "mm-1.img")

    def test_a_large_image_takes_little_memory(self, tmp_path: Path) -> None:
        """Two million empty mappings in 4 MB: the first is refused before the others are decoded."""
        record = b"\x72\x00" * 2_000_000
        (tmp_path / "mm-1.img").write_bytes(bytes(8) + len(record).to_bytes(4, "little") + record)
        tracemalloc.start()
        try:
            with pytest.raises(images.ImageError):
                vmas.load(tmp_path / "mm-1.img")
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()

    def test_a_longer_one_is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / "mm-1.img").open("wb") as file:
            file.truncate(17 << 20)
        with pytest.raises(images.ImageError, match="more than any"):
            vmas.load(tmp_path / "mm-1.img")

    def test_a_short_pages_image(self, tmp_path: Path) -> None:
        content = {TOP + at * PAGE: made.page(at + 1) for at in range(64)}
        made.write(tmp_path, [Process(1, 0, [Area(TOP, 64)], content)])
        (tmp_path / "pages-1.img").write_bytes(bytes(63 * PAGE))
        with pytest.raises(images.ImageError, match=r"pages-1\.img"):
            carve(tmp_path, lambda data: 0, 2, lambda total: None)

    def test_overlapping_entries(self, tmp_path: Path) -> None:
        content = {TOP + at * PAGE: made.page(at + 1) for at in range(64)}
        made.write(tmp_path, [Process(1, 0, [Area(TOP, 64)], content)])
        path = tmp_path / "pagemap-1.img"
        path.write_bytes(path.read_bytes() + path.read_bytes()[8 + 4 + 2 :])
        with pytest.raises(images.ImageError, match=r"pagemap-1\.img"):
            carve(tmp_path, lambda data: 0, 2, lambda total: None)
