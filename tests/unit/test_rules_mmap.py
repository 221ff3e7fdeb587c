"""mmap and remap_file_pages at their borders, each with the kernel's own condition as the source."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.layouts import ANON_FIXED, NONE, PAGE, PLAIN, RO, RW, run, vma
from vmatrace.simulator import Config, FileGiven, Limits, MmState, Unmodelled
from vmatrace.vma import ACCOUNT, GROWSDOWN, LOCKED, MAYEXEC, MAYSHARE, MAYWRITE, NORESERVE, PKEY_SHIFT, SHARED, Vma

TOP = 1 << 64
SMALL = Limits(config=Config(soft_dirty=False), task_size=64 * PAGE)
SEGMENT = RW | SHARED | MAYSHARE


def mmap(addr: int, length: int, prot: int = 0, flags: int = ANON_FIXED, off: int = 0) -> dict[str, int]:
    return {"addr": addr, "len": length, "prot": prot, "flags": flags, "off": off}


@pytest.mark.parametrize(
    ("addr", "length", "errno"),
    [
        (0, 0, "EINVAL"), (0, TOP - PAGE + 1, "ENOMEM"), (0, TOP - PAGE, "ENOMEM"), (0, 1 << 63, "ENOMEM"),
        (0, 64 * PAGE, None), (PAGE, 64 * PAGE, "ENOMEM"), (0, 65 * PAGE, "ENOMEM"), (62 * PAGE, 2 * PAGE, None),
        (63 * PAGE, 2 * PAGE, "ENOMEM"), (63 * PAGE, PAGE, None), (64 * PAGE, PAGE, "ENOMEM"), (5, PAGE, "EINVAL"),
    ],
)  # fmt: skip
def test_a_fixed_mapping_lies_within_the_address_space(addr: int, length: int, errno: str | None) -> None:
    # get_unmapped_area: a length over TASK_SIZE first, then the address, then its alignment.
    assert run("6.18", [], "mmap", mmap(addr, length), SMALL).errno == errno


@pytest.mark.parametrize("pages", [1, 4])
def test_page_offsets_do_not_wrap(pages: int) -> None:
    # do_mmap: (pgoff + (len >> PAGE_SHIFT)) < pgoff is EOVERFLOW, before the count of VMAs is looked at.
    # A page of one byte: no argument of mmap makes so large an offset of a real page size.
    low, full = Limits(config=Config(soft_dirty=False), max_map_count=0, page_size=1), MmState(map_count=9)
    for short, errno in ((0, "EOVERFLOW"), (1, "ENOMEM"), (-1, "EOVERFLOW")):
        call = mmap(0, pages, flags=0x12, off=TOP - pages - short)
        assert run("6.18", [], "mmap", call, low, full.copy(), file=FileGiven("f")).errno == errno
        call = {"start": 0, "size": pages, "prot": 0, "pgoff": TOP - pages - short, "flags": 0}
        refused = run("6.18", [], "remap_file_pages", call, low, full.copy()).errno
        assert refused == "EINVAL"


@pytest.mark.parametrize("bit", range(32))
def test_which_flags_a_validated_shared_mapping_may_have(bit: int) -> None:
    # LEGACY_MAP_MASK (include/linux/mman.h); MAP_FIXED_NOREPLACE and MAP_SYNC are not of it. Bit 31 is of no size of
    # huge pages in it: EOPNOTSUPP on 6.18.44 too.
    legacy = {0, 1, 4, 5, 6, 8, 11, 12, 13, 14, 15, 16, 17, 18, *range(26, 31)}
    given = FileGiven("f")
    if bit in (2, 3, 5, 7, 8, 18):
        return  # another type of mapping, no file, what not every kernel has, a stack, huge pages
    errno = run("6.18", [], "mmap", mmap(0, PAGE, flags=0x13 | 1 << bit), file=given).errno
    assert errno == (None if bit in legacy else "EOPNOTSUPP")
    known = run("6.18", [], "mmap", mmap(0, PAGE, flags=0x13 | 1 << bit), file=replace(given, sync=True)).errno
    assert known == (None if bit in legacy or bit == 19 else "EOPNOTSUPP")


@pytest.mark.parametrize(("mode", "honoured"), [(0, True), (1, True), (2, False)])
def test_noreserve_by_overcommit_mode(mode: int, honoured: bool) -> None:
    limits = replace(PLAIN, overcommit_memory=mode)
    made = next(iter(run("6.18", [], "mmap", mmap(0, PAGE, 3, ANON_FIXED | 0x4000), limits).space))
    assert made.flags & (NORESERVE | ACCOUNT) == (NORESERVE if honoured else ACCOUNT)
    huge = FileGiven("h", kind="hugetlb", huge_size=2 << 20)
    made = next(iter(run("6.18", [], "mmap", mmap(0, 2 << 20, 3, 0x4012), limits, file=huge).space))
    assert made.flags & NORESERVE


@pytest.mark.parametrize("prot", [0, 1, 4, 5, 6, 7])
def test_only_prot_exec_alone_takes_a_key(prot: int) -> None:
    limits = Limits(config=Config(soft_dirty=False, pkeys=True))
    made = next(iter(run("6.18", [], "mmap", mmap(0, PAGE, prot), limits, execute_pkey=5).space))
    assert made.flags >> PKEY_SHIFT & 15 == (5 if prot == 4 else 0)


def test_flags_of_a_file_on_a_noexec_mount() -> None:
    given = FileGiven("f", noexec=True)
    kept = next(iter(run("6.18", [], "mmap", mmap(0, PAGE, 1, 0x12), file=given, off=("noexec_no_mayexec",)).space))
    lost = next(iter(run("6.18", [], "mmap", mmap(0, PAGE, 1, 0x12), file=given).space))
    assert (kept.flags, lost.flags) == (NONE | 1, (NONE | 1) & ~MAYEXEC)


@pytest.mark.parametrize(
    ("kind", "errno"),
    [(0, "EINVAL"), (1, None), (2, None), (3, "EINVAL"), (8, None), (9, "EINVAL"), (15, "EINVAL")],
)
def test_types_of_an_anonymous_mapping(kind: int, errno: str | None) -> None:
    assert run("6.18", [], "mmap", mmap(0, PAGE, 3, 0x30 | kind)).errno == errno
    assert run("6.18", [], "mmap", mmap(0, PAGE, 3, 0x10 | kind)).errno == "EBADF"


def test_arguments_of_mmap_left_out() -> None:
    assert run("6.18", [], "mmap", {"len": PAGE, "prot": 3}).errno == "EBADF"
    assert run("6.18", [], "mmap", {"len": PAGE, "prot": 3, "flags": ANON_FIXED}).ret == 0
    for flags, errno in ((0x40012, "EINVAL"), (0x40032, None)):
        if errno is None:
            with pytest.raises(Unmodelled, match="huge"):
                run("6.18", [], "mmap", mmap(0, PAGE, 3, flags))
        else:
            assert run("6.18", [], "mmap", mmap(0, PAGE, 3, flags), file=FileGiven("f")).errno == errno


def test_a_mapping_below_4g_is_not_where_the_hint_says() -> None:
    made = run("6.18", [], "mmap", mmap(1 << 40, PAGE, 3, 0x62), picked=1 << 30)
    assert made.ret == 1 << 30
    given = run("6.18", [], "mmap", mmap(1 << 40, PAGE, 1, 0x2), picked=1 << 30, file=FileGiven("f"))
    assert given.ret == 1 << 30
    assert run("6.18", [], "mmap", mmap(1 << 40, PAGE, 3, 0x22), picked=1 << 30).ret == 1 << 40


@pytest.mark.parametrize("kind", ["", "aio", "secretmem", "zero"])
def test_only_secret_memory_is_refused_before_its_place_is_known(kind: str) -> None:
    for flags, refused in ((0x2, kind == "secretmem"), (0x1, False)):
        given = FileGiven("f", kind=kind, prepare=True)
        if refused:
            assert run("6.18", [], "mmap", mmap(0, PAGE, 3, flags), file=given).errno == "EINVAL"
        else:
            with pytest.raises(Unmodelled, match="picked"):
                run("6.18", [], "mmap", mmap(0, PAGE, 3, flags), file=given)
        if not refused:
            assert run("6.18", [], "mmap", mmap(0, PAGE, 1, flags), file=given, picked=8 * PAGE).errno is None


def test_no_memory_may_be_locked() -> None:
    # can_do_mlock: MAP_LOCKED without a limit of its own is EPERM, beyond it EAGAIN.
    for limit, errno in ((0, "EPERM"), (PAGE, "EAGAIN"), (2 * PAGE, None)):
        limits = replace(PLAIN, can_lock=False, rlimit_memlock=limit)
        assert run("6.18", [], "mmap", mmap(0, 2 * PAGE, 3, ANON_FIXED | 0x2000), limits).errno == errno
        locked = run("6.18", [vma(0, 2)], "mlock", {"start": 0, "len": 2 * PAGE}, limits).errno
        assert locked == {"EPERM": "EPERM", "EAGAIN": "ENOMEM", None: None}[errno]


def remap(start: int, size: int, pgoff: int = 0, prot: int = 0, flags: int = 0) -> dict[str, int]:
    return {"start": start * PAGE, "size": size * PAGE, "prot": prot, "pgoff": pgoff, "flags": flags}


def shared(start: int, end: int, **more: object) -> Vma:
    return vma(start, end, SEGMENT, file="f", anonymous=False, **more)


@pytest.mark.parametrize(
    ("layout", "start", "size", "errno"),
    [
        ([shared(0, 4)], 0, 4, None), ([shared(0, 4)], 1, 2, None), ([shared(0, 4)], 3, 2, "EINVAL"),
        ([shared(0, 4)], 4, 1, "EINVAL"), ([shared(0, 4)], 0, 0, "EINVAL"), ([vma(0, 4)], 0, 2, "EINVAL"),
        ([shared(0, 2), shared(2, 4, pgoff=9)], 1, 2, None), ([shared(0, 2), shared(3, 5, pgoff=9)], 1, 4, "EINVAL"),
        ([shared(0, 2), shared(2, 4, pgoff=9), shared(4, 6, pgoff=1)], 0, 6, None),
        ([shared(0, 2), vma(2, 4, SEGMENT, file="e", anonymous=False)], 1, 2, "EINVAL"),
        ([shared(0, 2), vma(2, 4, SEGMENT, file="g", anonymous=False)], 1, 2, "EINVAL"),
        ([shared(0, 2), vma(2, 4, SEGMENT | LOCKED, file="f", anonymous=False)], 1, 2, "EINVAL"),
        ([shared(0, 2), vma(2, 4, RO | SHARED | MAYSHARE, file="f", anonymous=False)], 1, 2, "EINVAL"),
    ],
)  # fmt: skip
def test_what_remap_file_pages_may_cover(layout: list[Vma], start: int, size: int, errno: str | None) -> None:
    result = run("6.18", layout, "remap_file_pages", remap(start, size, 5))
    assert result.errno == errno
    if errno is None:
        made = result.space.at(start * PAGE)
        assert made is not None
        assert made.pgoff + (start * PAGE - made.start) // PAGE == 5


@pytest.mark.parametrize("flags", [0, 1, 0x10000, 0x10001, 0x20000, 0x2000])
@pytest.mark.parametrize("locked", [0, LOCKED])
def test_remap_file_pages_keeps_access_and_lock(flags: int, locked: int) -> None:
    for bits in (SEGMENT, SEGMENT & ~MAYWRITE & ~2, SEGMENT & ~MAYEXEC, SHARED | MAYSHARE | NONE):
        layout = [vma(0, 4, bits | locked, file="f", anonymous=False)]
        result = run("6.18", layout, "remap_file_pages", remap(1, 2, 7, flags=flags))
        assert result.errno is None
        assert {each.flags for each in result.space} == {bits | locked}


@pytest.mark.parametrize(
    ("others", "start", "size", "known"),
    [
        ([], 0, 4, False), ([], 0, 2, True), ([], 2, 2, True), ([], 1, 2, True),
        ([(8, 10, "sysv 1")], 0, 4, True), ([(8, 10, "sysv 2")], 0, 4, False), ([(8, 10, "sysv 0")], 0, 4, False),
    ],
)  # fmt: skip
def test_a_segment_may_die_with_its_last_attach(
    others: list[tuple[int, int, str]], start: int, size: int, known: bool
) -> None:
    layout = [vma(16, 20, SEGMENT, file="sysv 1", anonymous=False, kind="sysv", close=True)]
    for first, last, file in others:
        layout.append(vma(first, last, SEGMENT, file=file, anonymous=False, kind="sysv", close=True))
    if known:
        assert run("6.18", layout, "remap_file_pages", remap(16 + start, size, 1)).errno is None
    else:
        with pytest.raises(Unmodelled, match="segment"):
            run("6.18", layout, "remap_file_pages", remap(16 + start, size, 1))
    for kind in ("shmem", "zero", ""):
        plain = [each._replace(kind=kind, close=False) for each in layout]
        assert run("6.18", plain, "remap_file_pages", remap(16 + start, size, 1)).errno is None


def test_growing_down_is_for_private_anonymous_memory() -> None:
    for flags, errno in ((0x132, None), (0x131, "EINVAL"), (0x138, "EINVAL")):
        result = run("6.18", [], "mmap", mmap(0, PAGE, 3, flags))
        assert result.errno == errno
        assert [bool(each.flags & GROWSDOWN) for each in result.space] == ([True] if errno is None else [])
    assert run("6.18", [], "mmap", mmap(0, PAGE, 3, 0x112), file=FileGiven("f")).errno == "EINVAL"
