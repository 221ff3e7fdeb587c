"""Borders of the other rules that no call of a program reaches, with the kernel's own condition as the source."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.layouts import ANON_FIXED, NONE, PAGE, RO, RW, kernel, run, vma
from vmatrace.rules.hooks import Mapping
from vmatrace.rules.ksm import flag_is_set_before_merge
from vmatrace.rules.lifecycle import userfaultfd_is_lost
from vmatrace.rules.mmap import check_picked, free_hint_is_honoured, offset_is_past_any_file
from vmatrace.rules.split import PUD_SIZE, _unshares
from vmatrace.simulator import (
    AddressSpace,
    Config,
    FileGiven,
    ImpossibleInput,
    Limits,
    MmState,
    Unmodelled,
    counters_of,
)
from vmatrace.vma import (
    ACCOUNT,
    DONTDUMP,
    DONTEXPAND,
    EXEC,
    GROWSDOWN,
    HUGETLB,
    LOCKED,
    MAY_ALL,
    MAYSHARE,
    NOHUGEPAGE,
    RAND_READ,
    READ,
    SEQ_READ,
    SHADOW_STACK,
    SHARED,
    SOFTDIRTY,
    WRITE,
    Vma,
)

# --- what calls return ---

ONE = [vma(0, 4)]
CALLS = [
    ("fault", {"address": 0}), ("populate", {"addr": 0, "len": PAGE}), ("fork", {}), ("exit", {}),
    ("munlockall", {}), ("mlockall", {"flags": 1}), ("munmap", {"addr": 0, "len": PAGE}),
    ("mprotect", {"start": 0, "len": PAGE, "prot": 1}), ("mlock", {"start": 0, "len": PAGE}),
    ("munlock", {"start": 0, "len": PAGE}), ("mseal", {"start": 0, "len": PAGE, "flags": 0}),
    ("mseal", {"start": 0, "len": 0, "flags": 0}), ("mprotect", {"start": 0, "len": 0, "prot": 1}),
    ("mlock2", {"start": 0, "len": PAGE}), ("madvise", {"start": 0, "len_in": PAGE, "behavior": 10}),
    ("madvise", {"start": 0, "len_in": 0, "behavior": 10}), ("madvise", {"start": 0, "len_in": PAGE, "behavior": 4}),
    ("prctl", {"option": 0x53564D41, "arg2": 0, "arg3": 0, "arg4": PAGE}), ("prctl", {"option": 67, "arg2": 1}),
    ("prctl", {"option": 15}), ("uffd_release", {}),
]  # fmt: skip


@pytest.mark.parametrize(("call", "args"), CALLS)
def test_a_call_without_an_answer_returns_0(call: str, args: dict[str, int]) -> None:
    result = run("7.3", ONE, call, args, name="x")
    assert (result.errno, result.ret) == (None, 0)


@pytest.mark.parametrize(
    ("call", "args", "left_out"),
    [
        ("mbind", {"start": 0, "len": PAGE, "mode": 0, "flags": 0}, ("mode", "flags")),
        ("set_mempolicy_home_node", {"start": 0, "len": PAGE, "home_node": 0, "flags": 0}, ("flags",)),
        ("mlock2", {"start": 0, "len": PAGE, "flags": 0}, ("flags",)),
        ("mmap", {"addr": 0, "len": PAGE, "prot": 0, "flags": 0x22, "off": 0}, ("addr", "off")),
        ("map_shadow_stack", {"addr": 0, "size": PAGE, "flags": 0}, ("addr", "flags")),
        ("remap_file_pages", {"start": 8 * PAGE, "size": PAGE, "prot": 0, "pgoff": 0, "flags": 0},
         ("prot", "pgoff", "flags")),
        ("shmat", {"shmid": 0, "shmaddr": 0, "shmflg": 0}, ("shmid", "shmaddr", "shmflg")),
        ("prctl", {"option": 67, "arg2": 0, "arg3": 0, "arg4": 0, "arg5": 0}, ("arg2", "arg3", "arg4", "arg5")),
        ("mremap", {"addr": 0, "old_len": PAGE, "new_len": PAGE, "flags": 0, "new_addr": 0}, ("flags", "new_addr")),
        ("mseal", {"start": 0, "len": PAGE, "flags": 0}, ("flags",)),
        ("pkey_mprotect", {"start": 0, "len": PAGE, "prot": 1, "pkey": -1}, ("pkey",)),
    ],
)  # fmt: skip
def test_arguments_left_out_are_zero(call: str, args: dict[str, int], left_out: tuple[str, ...]) -> None:
    layout = [vma(0, 4, policy=None), vma(8, 10, RW | SHARED | MAYSHARE, file="f", anonymous=False, pgoff=3)]
    inputs = {"policy": None, "picked": 64 * PAGE, "size": PAGE}
    full = run("7.3", layout, call, args, **inputs)
    bare = run("7.3", layout, call, {k: v for k, v in args.items() if k not in left_out}, **inputs)
    assert (full.errno, full.ret, list(full.space)) == (bare.errno, bare.ret, list(bare.space))


# --- flags where a rule is off ---


@pytest.mark.parametrize(
    "off",
    ["softdirty_on_new", "stack_no_hugepage", "noreserve_honoured", "future_lock", "sticky_flags_kept", "ksm_opt_in",
     "read_implies_exec", "execute_only_pkey"],
)  # fmt: skip
def test_a_rule_that_is_off_adds_no_flag(off: str) -> None:
    call = {"addr": 0, "len": PAGE, "prot": 0, "flags": ANON_FIXED}
    for rules in ("6.1", "6.18", "7.3"):
        for layout in ([], [vma(1, 2, NONE)], [vma(1, 2, NONE, anon_vma="a")]):
            result = run(rules, layout, "mmap", call, off=(off,))
            assert {each.flags for each in result.space} == {NONE}


def mapped(file: FileGiven, prot: int = 0, shared: bool = True, off: tuple[str, ...] = (), rules: str = "6.18") -> int:
    call = {"addr": 0, "len": file.huge_size or PAGE, "prot": prot, "flags": 0x11 if shared else 0x12, "off": 0}
    result = run(rules, [], "mmap", call, off=off, file=file)
    assert result.errno is None
    return next(iter(result.space)).flags


def test_what_hooks_set_and_what_is_left_without_them() -> None:
    secret, huge = FileGiven("s", kind="secretmem", prepare=True), FileGiven("h", kind="hugetlb", huge_size=2 << 20)
    base = NONE | SHARED | MAYSHARE
    assert mapped(secret) == base | DONTDUMP | LOCKED
    assert mapped(secret, off=("secretmem_not_dumped",)) == base | LOCKED
    assert mapped(secret, off=("secretmem_locked",)) == base | DONTDUMP
    assert mapped(secret, rules="7.3") == base | DONTDUMP
    assert mapped(huge) == base | HUGETLB | DONTEXPAND
    assert mapped(huge, off=("hugetlb_flags",)) == base
    nested = FileGiven("n", nested_prepare=True, set_flags=NOHUGEPAGE)
    assert mapped(nested, shared=False) == NONE | NOHUGEPAGE
    assert mapped(nested, shared=False, off=("compat_only_adds_flags",)) == NONE | NOHUGEPAGE


@pytest.mark.parametrize(("own", "nested"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_nested_files_close_hook_is_the_one_that_counts(own: bool, nested: bool) -> None:
    given = FileGiven("n", nested_prepare=True, close=own, nested_close=nested)
    call = {"addr": 0, "len": PAGE, "prot": 0, "flags": 0x12, "off": 0}
    made = next(iter(run("6.18", [], "mmap", call, file=given).space))
    assert made.close is nested
    assert not made.anonymous
    assert made.huge_size == 0
    plain = next(iter(run("6.18", [], "mmap", {**call, "flags": ANON_FIXED}).space))
    assert (plain.close, plain.anonymous, plain.huge_size) == (False, True, 0)


def test_which_files_are_marked_for_ksm_before_the_merge() -> None:
    # cf7e7a3503df (in v6.17): anonymous memory, shmem, and files with mmap_prepare.
    files = {None: True, FileGiven("a", kind="shmem"): True, FileGiven("b", prepare=True): True,
             FileGiven("c", kind="aio"): False, FileGiven("d", kind="zero"): False, FileGiven("e"): False}  # fmt: skip
    for given, early in files.items():
        assert bool(flag_is_set_before_merge(kernel("6.18"), Mapping(0, PAGE, RW, 0, given))) is early


# --- exec's stack, fork ---

STACK = READ | WRITE | MAY_ALL | GROWSDOWN | ACCOUNT | RAND_READ | SEQ_READ


def test_the_first_stack() -> None:
    for dirty in (True, False):
        limits = Limits(config=Config(soft_dirty=dirty))
        made = run("6.18", [], "create_init_stack", {"top": 64 * PAGE}, limits, MmState())
        stack = next(iter(made.space))
        assert stack.flags == STACK | (SOFTDIRTY if dirty else 0)
        assert (made.ret, stack.start, stack.end, stack.pgoff) == (63 * PAGE, 63 * PAGE, 64 * PAGE, 63)
        assert (made.mm.total_vm, made.mm.stack_vm, made.mm.data_vm) == (1, 1, 0)
    for rules, second in (("6.18", None), ("7.3", 63)):
        stack = next(iter(run(rules, [], "create_init_stack", {"top": 64 * PAGE}).space))
        assert stack.anon_pgoff == second
    bare = run("6.18", [], "create_init_stack", {"top": 64 * PAGE}, off=("exec_stack_setup",))
    assert next(iter(bare.space)).flags == 0


def test_how_far_the_stack_can_move() -> None:
    stack = vma(8, 10)
    moved = run("6.18", [stack], "relocate_stack", {"start": 8 * PAGE, "shift": 8 * PAGE})
    assert [(each.start, each.end, each.pgoff) for each in moved.space] == [(0, 2 * PAGE, 8)]
    assert moved.ret == 0
    for shift in (0, -PAGE, 9 * PAGE):
        with pytest.raises(Unmodelled):
            run("6.18", [stack], "relocate_stack", {"start": 8 * PAGE, "shift": shift})
    with pytest.raises(Unmodelled):
        run("6.18", [], "relocate_stack", {"start": 8 * PAGE, "shift": PAGE})
    near = run("6.18", [stack], "relocate_stack", {"start": 8 * PAGE, "shift": PAGE})
    assert [(each.start, each.end) for each in near.space] == [(7 * PAGE, 9 * PAGE)]


def test_what_a_child_inherits() -> None:
    parent = MmState(def_flags=LOCKED | NOHUGEPAGE | READ, locked_vm=2, total_vm=4)
    result = run("6.18", [vma(0, 2, RW | LOCKED), vma(2, 4, uffd="u")], "fork", {}, mm=parent)
    assert result.child_mm is not None
    assert result.child is not None
    assert (result.child_mm.def_flags, result.child_mm.locked_vm, result.child_mm.map_count) == (NOHUGEPAGE, 0, 2)
    assert [(each.uffd, each.flags) for each in result.child] == [(None, RW), (None, RW)]
    assert run("6.18", [vma(0, 2)], "fork", {}, mm=MmState(def_flags=READ), off=("fork_default_flags",)).child_mm == (
        MmState(def_flags=READ, map_count=1)
    )
    gone = run("6.18", [vma(0, 2)], "exit", {}, mm=MmState(map_count=1, total_vm=2, data_vm=2))
    assert gone.mm == MmState()


def test_a_child_keeps_the_userfaultfd_that_asked_for_it() -> None:
    watched, plain = vma(0, 2, uffd="u"), vma(0, 2)
    assert userfaultfd_is_lost(kernel(), watched)
    assert not userfaultfd_is_lost(kernel(event_fork=True), watched)
    assert not userfaultfd_is_lost(kernel(), plain)
    assert not userfaultfd_is_lost(kernel(event_fork=True), plain)


# --- where a mapping goes ---

ROOM = Limits(config=Config(soft_dirty=False), mmap_min_addr=16 * PAGE, task_size=1024 * PAGE, stack_guard_gap=8)


@pytest.mark.parametrize(
    ("hint", "length", "next", "answer"),
    [
        (0, 1, None, 0), (100, 2, None, 100), (1, 2, None, 16), (16, 2, None, 16), (15, 1, None, 16),
        (1022, 2, None, 1022), (1023, 2, None, 0), (100, 2, vma(102, 104), 100), (100, 2, vma(101, 104), 0),
        (100, 2, vma(103, 104), 100), (100, 2, vma(110, 112, RW | GROWSDOWN), 100),
        (100, 2, vma(109, 112, RW | GROWSDOWN), 0), (100, 2, vma(103, 112, RW | SHADOW_STACK), 100),
        (100, 2, vma(102, 112, RW | SHADOW_STACK), 0), (100, 2, vma(98, 101), 0),
    ],
)  # fmt: skip
def test_a_hint_that_is_free_is_taken(hint: int, length: int, next: Vma | None, answer: int) -> None:
    under = kernel(vmas=(next,) if next else (), limits=ROOM)
    assert (free_hint_is_honoured(under, hint * PAGE, length * PAGE) or 0) == answer * PAGE
    if hint:
        assert (free_hint_is_honoured(under, hint * PAGE + 5, length * PAGE) or 0) == answer * PAGE


def test_an_address_that_no_kernel_picks() -> None:
    top = 1 << 56
    for picked in (5, top - PAGE + 1, 2 * PAGE, top, top - PAGE, 1 << 57):
        with pytest.raises(ImpossibleInput):
            check_picked(kernel(vmas=(vma(2, 4),)), picked, 2 * PAGE)
    for picked in (0, 4 * PAGE, top - 2 * PAGE, 64 * PAGE):
        assert check_picked(kernel(vmas=(vma(2, 4),)), picked, 2 * PAGE) == picked


def test_the_last_offset_of_a_file() -> None:
    # mm/mmap.c, file_mmap_size_max: MAX_LFS_FILESIZE at most for a regular file, ULONG_MAX for a driver's.
    for given, most in ((FileGiven("f", regular=True), (1 << 63) - 1), (FileGiven("d", regular=False), (1 << 64) - 1)):
        for length in (PAGE, 4 * PAGE):
            last = (most - length) >> 12
            assert not offset_is_past_any_file(kernel(), given, length, last)
            assert offset_is_past_any_file(kernel(), given, length, last + 1)


def test_shadow_stacks() -> None:
    # arch/x86/kernel/shstk.c: SET_TOKEN is the only flag (SET_MARKER came later), an address is not replaced.
    free = run("6.18", [], "map_shadow_stack", {"addr": 0, "size": PAGE, "flags": 1}, picked=64 * PAGE)
    assert free.ret == 64 * PAGE
    made = next(iter(free.space))
    assert made.flags == (READ | WRITE | MAY_ALL | SHADOW_STACK | ACCOUNT)
    assert made.pgoff == 64
    for flags, errno in ((0, None), (2, None), (3, None), (4, "EINVAL"), (8, "EINVAL")):
        result = run("6.18", [], "map_shadow_stack", {"addr": 0, "size": PAGE, "flags": flags}, picked=64 * PAGE)
        assert result.errno == errno
    taken = {"addr": 4 * PAGE, "size": PAGE, "flags": 0}
    assert run("6.18", [vma(4, 6)], "map_shadow_stack", taken).errno == "EEXIST"
    assert run("6.18", [], "map_shadow_stack", taken).ret == 4 * PAGE


# --- hugetlb's shared page tables (mm/hugetlb.c: hugetlb_split) ---


@pytest.mark.parametrize(
    ("start", "end", "cut", "unshares"),
    [(0, 2, 1.5, True), (0, 2, 1, False), (1, 2, 1.5, True), (0.5, 2, 0.75, False), (0, 1.75, 1.5, False),
     (0, 1, 0.5, True), (0.5, 1.5, 1.25, False)],
)  # fmt: skip
def test_where_a_cut_unshares(start: float, end: float, cut: float, unshares: bool) -> None:
    first, last = int(start * PUD_SIZE), int(end * PUD_SIZE)
    huge = Vma(first, last, RW | MAYSHARE, 0, file="f", anonymous=False, huge_size=2 << 20)
    at = int(cut * PUD_SIZE)
    assert _unshares(huge, at) is unshares
    assert not _unshares(huge.with_flags(RW), at)
    assert not _unshares(huge._replace(huge_size=0), at)


# --- brk (mm/mmap.c: sys_brk) ---

HEAP = MmState(map_count=1, start_brk=16 * PAGE, brk=20 * PAGE, start_data=2 * PAGE, end_data=5 * PAGE)


def set_break(wanted: int, limits: Limits = ROOM, mm: MmState = HEAP, more: tuple[Vma, ...] = ()) -> int:
    return run("6.18", [vma(16, 20, RW | ACCOUNT), *more], "brk", {"brk": wanted}, limits, mm.copy()).ret // PAGE


def with_room(**limits: int | bool) -> Limits:
    return replace(ROOM, **limits)  # type: ignore[arg-type]


def test_the_break_moves_within_its_limits() -> None:
    assert [set_break(n * PAGE) for n in (15, 16, 17, 20, 24, 1023, 1024, 1025)] == [20, 16, 17, 20, 24, 1023, 1024, 20]
    # Heap (8 pages) and data segment (3 pages) together.
    assert set_break(24 * PAGE, with_room(rlimit_data=11 * PAGE)) == 24
    assert set_break(24 * PAGE, with_room(rlimit_data=11 * PAGE - 1)) == 20
    assert set_break(24 * PAGE, with_room(rlimit_data=10 * PAGE)) == 20
    locked = replace(HEAP, def_flags=LOCKED, locked_vm=2)
    assert set_break(24 * PAGE, with_room(can_lock=False, rlimit_memlock=6 * PAGE), locked) == 24
    assert set_break(24 * PAGE, with_room(can_lock=False, rlimit_memlock=5 * PAGE), locked) == 20
    assert set_break(24 * PAGE, with_room(can_lock=False, rlimit_memlock=5 * PAGE)) == 24


def test_the_break_keeps_away_from_what_is_above() -> None:
    for flags, room in ((RW, 1), (RW | GROWSDOWN, 9), (RW | SHADOW_STACK, 2)):
        above = (vma(40, 42, flags, file="f", anonymous=False),)
        assert set_break((40 - room) * PAGE, more=above) == 40 - room
        assert set_break((41 - room) * PAGE, more=above) == 20


def test_a_heap_that_is_gone_cannot_shrink() -> None:
    for above in ((), (vma(20, 22),), (vma(30, 32),)):
        result = run("6.18", list(above), "brk", {"brk": 18 * PAGE}, ROOM, HEAP.copy())
        assert (result.ret, list(result.space)) == (20 * PAGE, list(above))


@pytest.mark.parametrize(("rules", "second"), [("6.18", None), ("7.3", 20)])
def test_a_new_heap_vma_has_both_offsets(rules: str, second: int | None) -> None:
    made = next(iter(run(rules, [], "brk", {"brk": 24 * PAGE}, ROOM, HEAP.copy()).space))
    assert (made.pgoff, made.anon_pgoff, made.flags) == (20, second, RW | ACCOUNT)


# --- counters ---


def test_what_the_vmas_alone_count() -> None:
    layout = [vma(0, 2), vma(4, 5, RO), vma(8, 11, RO | EXEC), vma(16, 20, RW | GROWSDOWN | LOCKED)]
    assert counters_of(AddressSpace(layout)) == MmState(
        map_count=4, total_vm=10, data_vm=2, stack_vm=4, exec_vm=3, locked_vm=4
    )
    assert counters_of(AddressSpace(layout), 2 * PAGE).total_vm == 4
    assert counters_of(AddressSpace([vma(0, 8192)])).total_vm == 8192


@pytest.mark.parametrize(("count", "errno"), [(98, None), (99, "ENOMEM"), (100, "ENOMEM"), (120, "ENOMEM")])
def test_a_limit_may_be_lowered_below_the_count(count: int, errno: str | None) -> None:
    limits = Limits(max_map_count=99, config=Config(soft_dirty=False))
    call = {"start": 0, "len": PAGE, "prot": 1}
    assert run("6.18", [vma(0, 2)], "mprotect", call, limits, MmState(map_count=count)).errno == errno
