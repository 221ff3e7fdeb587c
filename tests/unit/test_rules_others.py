"""Shared memory, stacks, userfaultfd, prctl and munmap at their borders, the kernel's own condition as the source."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.layouts import NONE, PAGE, PLAIN, RO, RW, kernel, run, vma
from vmatrace.rules.objects import VmaObject, allocate, attach, detach, free
from vmatrace.rules.split import cut_breaks_a_huge_page
from vmatrace.rules.survivor import clone_copied_anon_vma
from vmatrace.simulator import MmState, Unmodelled
from vmatrace.vma import (
    DONTEXPAND,
    DROPPABLE,
    GROWSDOWN,
    HUGETLB,
    LOCKED,
    MAYSHARE,
    MAYWRITE,
    MERGEABLE,
    SHARED,
    UFFD_MINOR,
    UFFD_MISSING,
    UFFD_WP,
    WRITE,
    Vma,
)

SHARED_RW = RW | SHARED | MAYSHARE


def segment(start: int, end: int, pgoff: int, file: str = "s", kind: str = "sysv") -> Vma:
    return vma(start, end, SHARED_RW, file=file, anonymous=False, kind=kind, close=True, pgoff=pgoff)


# --- System V segments (ipc/shm.c) ---


@pytest.mark.parametrize(
    ("addr", "flags", "result"),
    [
        (0, 0, 64 * PAGE), (0, 0o40000, "EINVAL"), (8 * PAGE, 0, 8 * PAGE), (8 * PAGE + 5, 0, "EINVAL"),
        (8 * PAGE + 5, 0o20000, 8 * PAGE), (5, 0o60000, "EINVAL"), (5, 0o20000, 64 * PAGE), (2 * PAGE, 0, "EINVAL"),
        (2 * PAGE, 0o40000, 2 * PAGE), (2 * PAGE + 5, 0o60000, 2 * PAGE), (PAGE, 0o40000, PAGE),
    ],
)  # fmt: skip
def test_where_a_segment_is_attached(addr: int, flags: int, result: int | str) -> None:
    call = {"shmid": 3, "shmaddr": addr, "shmflg": flags}
    done = run("6.18", [vma(2, 4)], "shmat", call, size=2 * PAGE, picked=64 * PAGE)
    assert (done.errno or done.ret) == result


@pytest.mark.parametrize(("id", "errno"), [(0, None), (1 << 30, None), (0x7FFFFFFF, None), (1 << 31, "EINVAL"),
                                           (0xFFFFFFFF, "EINVAL")])  # fmt: skip
def test_a_negative_id_is_no_segment(id: int, errno: str | None) -> None:
    done = run("6.18", [], "shmat", {"shmid": id, "shmaddr": 8 * PAGE, "shmflg": 0}, size=PAGE)
    assert done.errno == errno


@pytest.mark.parametrize(("flags", "access"), [(0, 3), (0o10000, 1), (0o100000, 7), (0o110000, 5)])
def test_access_to_a_segment(flags: int, access: int) -> None:
    done = run("6.18", [], "shmat", {"shmid": 0, "shmaddr": 8 * PAGE, "shmflg": flags}, size=PAGE)
    made = next(iter(done.space))
    assert (made.flags & 7, made.kind, made.close) == (access, "sysv", True)
    assert bool(made.flags & MAYWRITE) is not bool(flags & 0o10000)


@pytest.mark.parametrize(
    ("layout", "size", "left"),
    [
        ([segment(8, 12, 0)], 4, []),
        ([segment(8, 10, 0), vma(10, 11), segment(11, 12, 3)], 4, [10]),
        ([segment(9, 12, 1)], 4, []),
        ([segment(8, 10, 0), segment(10, 12, 9)], 4, [10]),
        ([segment(8, 10, 0), segment(10, 12, 2, "t")], 4, [10]),
        ([segment(8, 10, 0, "t"), segment(10, 12, 2)], 4, [10]),
        ([segment(8, 10, 0), segment(10, 12, 1)], 4, [10]),
        ([segment(8, 10, 0, kind="shmem"), segment(10, 12, 2)], 4, [8]),
        ([vma(8, 10, pgoff=0), segment(10, 12, 2)], 4, [8]),
        ([segment(8, 10, 0), segment(10, 14, 2)], 4, [10]),
        ([segment(8, 14, 0)], 4, []),
        ([segment(8, 10, 0), segment(10, 14, 2)], None, []),
        ([vma(8, 10), vma(10, 12)], 4, "EINVAL"),
    ],
)  # fmt: skip
def test_which_pieces_shmdt_takes(layout: list[Vma], size: int | None, left: object) -> None:
    inputs = {} if size is None else {"size": size * PAGE}
    done = run("6.18", layout, "shmdt", {"shmaddr": 8 * PAGE}, **inputs)
    assert (done.errno or [each.start // PAGE for each in done.space]) == left
    if done.errno is None:
        assert done.ret == 0
    assert run("6.18", layout, "shmdt", {"shmaddr": 8 * PAGE + 5}, **inputs).errno == "EINVAL"


def test_rings_of_aio() -> None:
    made = run("6.18", [], "io_setup", {"nr_events": 8, "ctxp": 0}, size=2 * PAGE, picked=8 * PAGE)
    ring = next(iter(made.space))
    assert (made.ret, ring.start, ring.end, ring.kind) == (0, 8 * PAGE, 10 * PAGE, "aio")
    assert ring.flags == SHARED_RW | DONTEXPAND
    gone = run("6.18", [ring, vma(12, 14)], "io_destroy", {"ctx": 8 * PAGE})
    assert (gone.errno, gone.ret, list(gone.space)) == (None, 0, [vma(12, 14)])
    part = run("6.18", [ring], "io_destroy", {"ctx": 8 * PAGE}, size=PAGE)
    assert [each.start // PAGE for each in part.space] == [9]
    for layout in ([], [vma(8, 10)], [ring._replace(kind="zero")], [ring._replace(kind="")]):
        assert run("6.18", layout, "io_destroy", {"ctx": 8 * PAGE}).errno == "EINVAL"


# --- stacks (mm/vma.c, expand_downwards) ---

STACK = vma(100, 104, RW | GROWSDOWN, anon_vma="a")
NARROW = replace(PLAIN, stack_guard_gap=8, mmap_min_addr=16 * PAGE)


def grow(to: int, *below: Vma, stack: Vma = STACK, **limits: object) -> str | None:
    narrow = replace(NARROW, **limits)  # type: ignore[arg-type]
    mm = MmState(map_count=1, total_vm=4, stack_vm=4, locked_vm=4)
    return run("6.18", [*below, stack], "expand_stack", {"address": to * PAGE + 8}, narrow, mm).errno


def test_how_far_a_stack_grows() -> None:
    assert [grow(n) for n in (104, 103, 100, 99, 16, 15)] == ["EFAULT", None, None, None, None, "EPERM"]
    assert [grow(n, vma(50, 60)) for n in (68, 67)] == [None, "ENOMEM"]
    assert [grow(n, vma(50, 60, NONE)) for n in (67, 60)] == [None, None]
    assert [grow(n, vma(50, 60, RW | GROWSDOWN)) for n in (67, 60)] == [None, None]
    assert [grow(n, rlimit_stack=10 * PAGE) for n in (94, 93)] == [None, "ENOMEM"]
    assert [grow(n, rlimit_as=10 * PAGE) for n in (94, 93)] == [None, "ENOMEM"]
    locked = STACK.with_flags(STACK.flags | LOCKED)
    assert [grow(n, stack=locked, can_lock=False, rlimit_memlock=10 * PAGE) for n in (94, 93)] == [None, "ENOMEM"]
    assert [grow(n, stack=STACK._replace(pgoff=6)) for n in (95, 94, 93)] == [None, None, "ENOMEM"]
    assert grow(99, stack=STACK.with_flags(RW)) == "EFAULT"
    refused = run("6.18", [STACK], "expand_stack", {"address": 99 * PAGE}, NARROW, overcommit_ok=False)
    assert refused.errno == "ENOMEM"


@pytest.mark.parametrize(("rules", "second"), [("6.18", None), ("7.3", 96)])
def test_a_grown_stack_keeps_its_offsets(rules: str, second: int | None) -> None:
    stack = STACK._replace(anon_pgoff=None if second is None else 100, pgoff=200)
    for address in (96 * PAGE, 97 * PAGE - 1):
        result = run(rules, [stack], "expand_stack", {"address": address}, NARROW)
        grown = next(iter(result.space))
        assert (grown.start // PAGE, grown.pgoff, grown.anon_pgoff, result.ret) == (96, 196, second, 0)
        assert run(rules, [stack], "expand_stack", {"address": 101 * PAGE}, NARROW).ret == 0


# --- userfaultfd ---


def register(layout: list[Vma], start: int, end: int, mode: int = 1, rules: str = "6.18", **inputs: object) -> object:
    call = {"start": start * PAGE, "len": (end - start) * PAGE, "mode": mode}
    result = run(rules, layout, "uffd_register", call, replace(PLAIN, task_size=1024 * PAGE), uffd="u", **inputs)
    return result.errno or [(each.start // PAGE, each.end // PAGE) for each in result.space if each.uffd == "u"]


def test_what_can_be_watched() -> None:
    shmem = vma(0, 4, SHARED_RW, file="f", anonymous=False, kind="shmem")
    disk = vma(0, 4, RW, file="f", anonymous=False)
    huge = vma(0, 1024, SHARED_RW | HUGETLB, file="h", anonymous=False, kind="hugetlb", huge_size=2 << 20)
    plain = vma(16, 20)
    low = replace(PLAIN, mmap_min_addr=0, task_size=4096 * PAGE)

    def answer(one: Vma, mode: int, **inputs: object) -> str | None:
        call = {"start": one.start, "len": one.end - one.start, "mode": mode}
        return run("6.18", [one], "uffd_register", call, low, uffd="u", **inputs).errno

    assert [answer(plain, mode) for mode in (0, 1, 2, 3, 4, 8)] == ["EINVAL", None, None, None, "EINVAL", "EINVAL"]
    assert [answer(shmem, mode) for mode in (1, 2, 4, 7)] == [None, None, None, None]
    assert [answer(disk, mode) for mode in (1, 2, 4)] == ["EINVAL", "EINVAL", "EINVAL"]
    assert [answer(disk, mode, wp_async=True) for mode in (1, 2, 3, 4)] == ["EINVAL", None, "EINVAL", "EINVAL"]
    assert [answer(huge, mode) for mode in (1, 4)] == [None, None]
    assert answer(plain.with_flags(RW | DROPPABLE), 1) == "EINVAL"
    assert answer(shmem.with_flags((RO | SHARED) & ~MAYWRITE), 1) == "EPERM"


@pytest.mark.parametrize(
    ("start", "end", "watched"),
    [(16, 18, [(16, 18)]), (17, 22, [(17, 18), (20, 22)]), (15, 16, "EINVAL"), (14, 17, "EINVAL"), (18, 20, "EINVAL"),
     (16, 16, "EINVAL"), (20, 1024, [(20, 22), (1020, 1024)]), (20, 1025, "EINVAL"), (1024, 1025, "EINVAL"),
     (1020, 1021, [(1020, 1021)]), (16, 20, [(16, 18)]), (18, 21, [(20, 21)])],
)  # fmt: skip
def test_which_range_is_watched(start: int, end: int, watched: object) -> None:
    assert register([vma(16, 18), vma(20, 22), vma(1020, 1024)], start, end) == watched


def test_ranges_begin_and_end_on_pages() -> None:
    for start, length in ((16 * PAGE + 5, PAGE), (16 * PAGE, PAGE + 5), (16 * PAGE, 5)):
        call = {"start": start, "len": length, "mode": 1}
        assert run("6.18", [vma(16, 18)], "uffd_register", call, NARROW, uffd="u").errno == "EINVAL"


def test_huge_pages_are_watched_as_a_whole() -> None:
    def huge(start: int, end: int) -> Vma:
        made = vma(start * 512, end * 512, SHARED_RW | HUGETLB, file="h", anonymous=False, kind="hugetlb")
        return made._replace(huge_size=2 << 20)

    low = replace(PLAIN, mmap_min_addr=0)
    layouts = [huge(0, 2)], [huge(0, 2), vma(1024, 1030)], [huge(0, 1), huge(1, 2)], [vma(0, 4), huge(1, 2)]
    for layout, start, end, errno in (
        (layouts[0], 0, 512, None), (layouts[0], 512, 1024, None), (layouts[0], 0, 1024, None),
        (layouts[0], 0, 500, "EINVAL"),
        (layouts[0], 4, 1024, "EINVAL"), (layouts[1], 512, 1026, None), (layouts[1], 4, 1026, "EINVAL"),
        (layouts[2], 0, 600, "EINVAL"), (layouts[2], 0, 1024, None), (layouts[3], 1, 1024, None),
        (layouts[0], 0, 1500, None),
        (layouts[1], 1025, 1026, None),
    ):  # fmt: skip
        call = {"start": start * PAGE, "len": (end - start) * PAGE, "mode": 1}
        assert run("6.18", layout, "uffd_register", call, low, uffd="u").errno == errno, (start, end)


@pytest.mark.parametrize("other", ["a", "z"])
def test_a_vma_belongs_to_one_userfaultfd(other: str) -> None:
    layout = [vma(16, 18), vma(18, 20, RW | UFFD_MISSING, uffd=other)]
    assert register(layout, 16, 20) == "EBUSY"
    call = {"start": 16 * PAGE, "len": 4 * PAGE}
    assert run("6.18", layout, "uffd_unregister", call, NARROW, uffd="u").errno == "EINVAL"
    ours = run("6.18", layout, "uffd_unregister", call, NARROW, uffd=other)
    assert (ours.errno, [each.uffd for each in ours.space]) == (None, [None])


def test_modes_are_replaced_or_kept() -> None:
    layout = [vma(16, 20, RW | UFFD_MISSING | UFFD_WP, uffd="u")]
    for rules, mode, flags in (("6.18", 2, UFFD_WP), ("6.18", 3, UFFD_MISSING | UFFD_WP)):
        call = {"start": 16 * PAGE, "len": 4 * PAGE, "mode": mode}
        result = run(rules, layout, "uffd_register", call, NARROW, uffd="u")
        if result.errno is None:
            kept = {each.flags & (UFFD_MISSING | UFFD_WP | UFFD_MINOR) for each in result.space}
            assert kept in ({flags}, {UFFD_MISSING | UFFD_WP})
    more = run("6.18", [vma(16, 20, RW | UFFD_MISSING, uffd="u")], "uffd_register",
               {"start": 16 * PAGE, "len": 2 * PAGE, "mode": 3}, NARROW, uffd="u")  # fmt: skip
    assert [each.flags & (UFFD_MISSING | UFFD_WP) for each in more.space] == [UFFD_MISSING | UFFD_WP, UFFD_MISSING]


def test_unwatching_leaves_the_other_flags() -> None:
    layout = [vma(16, 20, NONE | UFFD_MISSING, uffd="u")]
    for start, end, flags in ((16, 20, [NONE]), (17, 18, [NONE | UFFD_MISSING, NONE, NONE | UFFD_MISSING])):
        call = {"start": start * PAGE, "len": (end - start) * PAGE}
        result = run("6.18", layout, "uffd_unregister", call, NARROW, uffd="u")
        assert [each.flags for each in result.space] == flags
    # A part of a VMA needs memory to be cut; only a whole one gives up quietly.
    broke = replace(NARROW, config=replace(NARROW.config, fail_prealloc=True))
    beside = [vma(14, 16), vma(16, 20, RW | UFFD_MISSING, uffd="u"), vma(20, 22)]
    for start, end, errno in ((16, 20, None), (16, 18, "ENOMEM"), (18, 20, "ENOMEM"), (17, 18, "ENOMEM")):
        call = {"start": start * PAGE, "len": (end - start) * PAGE}
        assert run("6.18", beside, "uffd_unregister", call, broke, uffd="u").errno == errno


def test_the_last_close_clears_from_the_first_page_on() -> None:
    layout = [vma(0, 1, RW | UFFD_MISSING, uffd="u"), vma(4, 5, RW | UFFD_MISSING, uffd="t")]
    assert [each.uffd for each in run("6.18", layout, "uffd_release", {}, uffd="u").space] == [None, "t"]


# --- prctl ---


@pytest.mark.parametrize(("option", "arg", "denies"), [(65, 1, True), (65, 3, True), (65, 2, False), (65, 0, False),
                                                       (64, 1, False), (66, 1, False), (15, 1, False)])  # fmt: skip
def test_which_option_denies_write_exec(option: int, arg: int, denies: bool) -> None:
    assert run("6.18", [vma(0, 2)], "prctl", {"option": option, "arg2": arg}).mm.mdwe is denies


def test_options_that_set_names_and_ksm() -> None:
    name = {"option": 0x53564D41, "arg2": 0, "arg3": 0, "arg4": PAGE}
    for change, errno, names in (({}, None, 1), ({"arg2": 1}, "EINVAL", 0), ({"arg2": -1}, "EINVAL", 0),
                                 ({"option": 0x53564D42}, None, 0), ({"option": 0x53564D40}, None, 0)):  # fmt: skip
        result = run("6.18", [vma(0, 2)], "prctl", {**name, **change}, name="x")
        assert (result.errno, sum(each.name is not None for each in result.space)) == (errno, names)
    for rules, option, ksm, errno in (("6.18", 67, True, None), ("6.1", 67, True, "EINVAL"),
                                      ("6.18", 67, False, "EINVAL"),
                                      ("6.18", 68, True, None), ("6.18", 66, True, None)):  # fmt: skip
        limits = replace(PLAIN, config=replace(PLAIN.config, ksm=ksm))
        result = run(rules, [vma(0, 2)], "prctl", {"option": option, "arg2": 1}, limits)
        assert (result.errno, result.mm.ksm) == (errno, errno is None and option == 67)
    off = run("6.18", [vma(0, 2), vma(2, 4, RO | MERGEABLE)], "prctl", {"option": 67, "arg2": 0}, mm=MmState(ksm=True))
    assert [each.flags for each in off.space] == [RW, RO]
    assert len([effect for effect in off.effects]) == 1


# --- munmap, splits, objects ---


@pytest.mark.parametrize(
    ("start", "length", "errno"),
    [(0, 1, None), (0, 0, "EINVAL"), (0.5, 1, "EINVAL"), (62, 2, None), (63, 2, "EINVAL"), (64, 0, "EINVAL"),
     (64, 1, "EINVAL"),
     (65, 1, "EINVAL"), (0, 64, None), (0, 65, "EINVAL"), (0, 0.5, None)],
)  # fmt: skip
def test_arguments_of_munmap(start: float, length: float, errno: str | None) -> None:
    call = {"addr": int(start * PAGE), "len": int(length * PAGE)}
    assert run("6.18", [vma(0, 2)], "munmap", call, replace(PLAIN, task_size=64 * PAGE)).errno == errno


@pytest.mark.parametrize(
    ("start", "end", "errno"), [(1, 2, "ENOMEM"), (0, 2, None), (2, 4, None), (0, 4, None), (2, 6, None)]
)
def test_only_a_hole_needs_room(start: int, end: int, errno: str | None) -> None:
    call = {"addr": start * PAGE, "len": (end - start) * PAGE}
    limits = replace(PLAIN, max_map_count=9)
    assert run("6.18", [vma(0, 4)], "munmap", call, limits, MmState(map_count=9)).errno == errno


@pytest.mark.parametrize("at", [0, 1, 511, 512, 513, 1024])
def test_cuts_of_huge_pages(at: int) -> None:
    huge = vma(0, 1024, huge_size=2 << 20)
    assert cut_breaks_a_huge_page(kernel(), huge, at * PAGE) is (at % 512 != 0)
    assert not cut_breaks_a_huge_page(kernel(), vma(0, 1024), at * PAGE)


def test_an_object_is_in_the_tree_or_not() -> None:
    under = kernel("6.18")
    made = allocate(under)
    assert (made.generation, made.refcnt, made.freed, made.attached) == (0, 0, False, False)
    attach(under, made)
    assert (made.refcnt, made.attached) == (1, True)
    detach(under, made)
    assert (made.refcnt, made.attached) == (0, False)
    free(under, made)
    assert made.freed
    with pytest.raises(ValueError, match="twice"):
        free(under, made)
    with pytest.raises(ValueError, match="after free"):
        attach(under, made)
    again = allocate(under, made)
    assert (again.generation, again.refcnt, again.freed) == (1, 0, False)
    assert allocate(under, VmaObject(generation=4)).generation == 0
    assert VmaObject(refcnt=2).attached
    assert (VmaObject().refcnt, VmaObject().attached) == (0, False)


def test_a_moved_vmas_anon_vma_is_taken_only_by_one_without() -> None:
    none, some, moved = vma(0, 2), vma(0, 2, anon_vma="b"), vma(9, 10, anon_vma="a")
    answers = [bool(clone_copied_anon_vma(kernel("6.19"), target, source))
               for target in (none, some) for source in (None, none, moved)]  # fmt: skip
    assert answers == [False, False, True, False, False, False]


def test_seals_of_the_first_kernels_are_looked_for_everywhere() -> None:
    era, sealed = "6.12-mseal_per_vma-vmg", 1 << 63
    for flags, errno in ((RW, None), (RW | sealed, "EPERM")):
        layout = [vma(0, 2), vma(2, 4, flags & ~WRITE)]
        result = run(era, layout, "munmap", {"addr": 0, "len": 4 * PAGE})
        assert (result.errno, len(result.space)) == (errno, 0 if errno is None else 2)


def test_an_unmodelled_step_says_so() -> None:
    with pytest.raises(Unmodelled):
        run("6.18", [], "shmat", {"shmid": 0, "shmaddr": 8 * PAGE, "shmflg": 0})


def test_what_is_sealed_already_is_left_alone() -> None:
    sealed = next(iter(run("6.18", [vma(0, 2, NONE)], "mseal", {"start": 0, "len": 2 * PAGE, "flags": 0}).space))
    again = run("6.18", [sealed], "mseal", {"start": 0, "len": 2 * PAGE, "flags": 0})
    assert (again.errno, again.effects, list(again.space)) == (None, (), [sealed])
