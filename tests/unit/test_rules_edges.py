"""Borders of the rules that no call of a program reaches, each with the kernel's own condition as the source."""

from __future__ import annotations

import pytest

from vmatrace.kernel import rule_set
from vmatrace.rules.anon_vma import _compatible, populate_writes, write_fault_needs_anon_vma
from vmatrace.rules.context import Kernel
from vmatrace.rules.copy import copy_vma
from vmatrace.rules.hooks import Mapping
from vmatrace.rules.ksm import flag_is_set_before_merge
from vmatrace.rules.lifecycle import userfaultfd_is_lost
from vmatrace.rules.merge_old import _two_anon_vmas
from vmatrace.rules.mmap import check_picked, free_hint_is_honoured, offset_is_past_any_file
from vmatrace.rules.split import PUD_SIZE, _unshares
from vmatrace.simulator import (
    AddressSpace,
    Config,
    FileGiven,
    ImpossibleInput,
    Limits,
    Merge,
    MmState,
    Operation,
    Result,
    Unmodelled,
    apply,
)
from vmatrace.vma import (
    ACCOUNT,
    DONTDUMP,
    DONTEXPAND,
    GROWSDOWN,
    HUGETLB,
    LOCKED,
    MAY_ALL,
    MAYBE_GUARD,
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
    parse_flags,
)

PAGE = 4096
RW = parse_flags(["READ", "WRITE", "MAYREAD", "MAYWRITE", "MAYEXEC"])
RO = parse_flags(["READ", "MAYREAD", "MAYWRITE", "MAYEXEC"])
PLAIN = Limits(config=Config(soft_dirty=False))
ANON_FIXED = 0x32


def vma(start: int, end: int, flags: int = RW, **more: object) -> Vma:
    made = Vma(start * PAGE, end * PAGE, flags, start, obj=start)
    return made._replace(**more)  # type: ignore[arg-type]


def kernel(
    rules: str = "7.3", vmas: tuple[Vma, ...] = (), limits: Limits = PLAIN, off: tuple[str, ...] = (), **inputs: object
) -> Kernel:
    return Kernel(AddressSpace(vmas), MmState(map_count=len(vmas)), rule_set(rules), limits, off, inputs)


def run(
    rules: str, vmas: list[Vma], call: str, args: dict[str, int], limits: Limits = PLAIN, mm: MmState | None = None,
    off: tuple[str, ...] = (), **inputs: object,
) -> Result:  # fmt: skip
    return apply(AddressSpace(vmas), Operation(call, args, inputs), rule_set(rules), mm, limits, off)


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


# --- whose anon_vma (mm/mmap.c and mm/rmap.c: anon_vma_compatible, reusable_anon_vma) ---

LOW, HIGH = vma(0, 2), vma(2, 4, anon_vma="a")


@pytest.mark.parametrize(
    ("lower", "upper", "fits"),
    [
        (LOW, HIGH, True),
        (LOW, vma(3, 5), False), (LOW, vma(1, 5), False),
        (LOW, vma(2, 4, policy="p"), False), (LOW, vma(2, 4, file="f"), False), (vma(0, 2, policy="p"), HIGH, False),
        (LOW, vma(2, 4, RO), True), (LOW, vma(2, 4, RW | SOFTDIRTY), True), (LOW, vma(2, 4, RW | ACCOUNT), False),
        (LOW, vma(2, 4, pgoff=3), False), (LOW, vma(2, 4, pgoff=1), False),
        (LOW, vma(2, 4, anon_pgoff=9), True), (vma(0, 2, anon_pgoff=9), HIGH, True),
        (vma(0, 2, anon_pgoff=0), vma(2, 4, anon_pgoff=2), True),
        (vma(0, 2, anon_pgoff=0), vma(2, 4, anon_pgoff=3), False),
        (vma(0, 2, anon_pgoff=0), vma(2, 4, anon_pgoff=1), False),
        (vma(0, 2, anon_pgoff=5), vma(2, 4, anon_pgoff=3), False),
    ],
)  # fmt: skip
def test_neighbours_that_may_share_an_anon_vma(lower: Vma, upper: Vma, fits: bool) -> None:
    assert _compatible(kernel(), lower, upper) is fits


def test_guard_flags_are_passed_over_where_they_stick() -> None:
    guarded = vma(2, 4, RW | MAYBE_GUARD, anon_vma="a")
    assert _compatible(kernel("6.19"), LOW, guarded)
    assert not _compatible(kernel("6.18"), LOW, guarded)
    assert _compatible(kernel("6.18"), LOW, HIGH)
    # READ, WRITE and EXEC are passed over, no other bit is.
    assert not _compatible(kernel("6.18"), LOW, vma(2, 4, RW | NOHUGEPAGE))


def test_only_a_private_page_that_is_written_needs_an_anon_vma() -> None:
    shared, has = vma(0, 2, RW | SHARED), vma(0, 2, anon_vma="a")
    answers = [bool(write_fault_needs_anon_vma(kernel(), each, True)) for each in (LOW, shared, has)]
    assert answers == [True, False, False]
    assert not write_fault_needs_anon_vma(kernel(), LOW, False)
    assert not write_fault_needs_anon_vma(kernel(), shared, False)
    layouts = (LOW, shared, has, vma(0, 2, RO), vma(0, 2, RO | SHARED), vma(0, 2, RW | HUGETLB), vma(0, 2, WRITE))
    assert [populate_writes(kernel(), each) for each in layouts] == [True, False, False, False, False, False, True]


def test_populating_reaches_its_range_only() -> None:
    layout = [vma(0, 2), vma(2, 4, RO), vma(4, 6), vma(6, 8, RW | SHARED)]
    after = run("7.3", layout, "populate", {"addr": PAGE, "len": 2 * PAGE}).space
    assert [each.anon_vma is not None for each in after] == [True, False, False, False]
    assert run("7.3", [vma(0, 2)], "fault", {"address": 0}).count(Merge) == 0
    for write, gains in ((None, True), (1, True), (0, False)):
        args = {"address": 0} if write is None else {"address": 0, "write": write}
        assert (next(iter(run("7.3", [vma(0, 2)], "fault", args).space)).anon_vma is not None) is gains


@pytest.mark.parametrize("child", [True, False])
def test_a_fork_childs_anon_vma_is_not_shared(child: bool) -> None:
    for other in (vma(2, 4, anon_vma="a", forked=child), None):
        layout = [vma(0, 2)] + ([other] if other else [])
        after = next(iter(run("6.18", layout, "fault", {"address": 0}).space)).anon_vma
        assert (after == "a") is (other is not None and not child)
    below = [vma(0, 2, anon_vma="a", forked=child), vma(2, 4)]
    assert (list(run("6.18", below, "fault", {"address": 2 * PAGE}).space)[1].anon_vma == "a") is not child


# --- copy_vma ---


def test_what_copy_vma_answers() -> None:
    source = vma(4, 6)
    for at, below, alone in ((6, 4, False), (2, 2, False), (20, 20, True)):
        under = kernel(vmas=(source,))
        made, left = copy_vma(under, source, at * PAGE, 2 * PAGE, at)
        assert made.start == below * PAGE
        assert (made == left) is not alone
        assert left in (source, made)
    # Merged with another than the source: the source stays.
    for at, neighbour in ((6, vma(8, 10)), (12, vma(10, 12)), (2, vma(0, 2))):
        faulted = vma(4, 6, anon_vma="a", pgoff=at) if at != 12 else vma(4, 6, pgoff=4)
        under = kernel(vmas=tuple(sorted((faulted, neighbour))))
        made, left = copy_vma(under, faulted, at * PAGE, 2 * PAGE, faulted.pgoff)
        assert left == faulted
        assert made != faulted


def test_copy_vma_looks_at_the_vma_that_begins_where_it_ends() -> None:
    source, gap, near = vma(20, 22), vma(3, 5), vma(2, 4)
    under = kernel(vmas=(gap, source))
    made, _ = copy_vma(under, source, 0, 2 * PAGE, 0)
    assert (made.start, made.end) == (0, 2 * PAGE)
    under = kernel(vmas=(near, source))
    made, _ = copy_vma(under, source, 0, 2 * PAGE, 0)
    assert (made.start, made.end) == (0, 4 * PAGE)


def test_the_second_offset_moves_with_the_first() -> None:
    source = vma(20, 24, file="f", anonymous=False, anon_vma="a", pgoff=7, anon_pgoff=20)
    under = kernel(vmas=(source,))
    made, _ = copy_vma(under, source, 40 * PAGE, 2 * PAGE, 9)
    assert (made.pgoff, made.anon_pgoff) == (9, 22)


def test_a_source_that_must_stay_is_nobodys_neighbour() -> None:
    # 838bb60dc215 (in v7.3); its backports to kernels before v6.12 try no merge at all where the two touch.
    for rules in ("7.3", "6.1+no_dontunmap_self_merge"):
        source, other = vma(4, 6), vma(0, 2)
        under = kernel(rules, (other, source))
        made, _ = copy_vma(under, source, 2 * PAGE, 2 * PAGE, 2, True)
        assert ((made.start, made.end) == (0, 4 * PAGE)) is (rules == "7.3")
        under = kernel(rules, (source, vma(8, 10)))
        made, _ = copy_vma(under, source, 6 * PAGE, 2 * PAGE, 6, True)
        assert ((made.start, made.end) == (6 * PAGE, 10 * PAGE)) is (rules == "7.3")
        under = kernel(rules, (other, vma(8, 10), vma(20, 22)))
        made, _ = copy_vma(under, vma(20, 22), 2 * PAGE, 2 * PAGE, 2, True)
        assert (made.start, made.end) == (0, 4 * PAGE)
        under = kernel(rules, (vma(8, 10), vma(20, 22)))
        made, _ = copy_vma(under, vma(20, 22), 6 * PAGE, 2 * PAGE, 6, True)
        assert (made.start, made.end) == (6 * PAGE, 10 * PAGE)
    under = kernel("7.3", (vma(0, 2),))
    assert copy_vma(under, vma(0, 2), 2 * PAGE, 2 * PAGE, 2)[0].end == 4 * PAGE


# --- what a merge says of itself ---

MERGES = [
    ([vma(0, 2)], "merge_new", (2, 4), Merge("left", 0, ())),
    ([vma(4, 6)], "merge_new", (2, 4), Merge("right", 4, ())),
    ([vma(0, 2), vma(4, 6)], "merge_new", (2, 4), Merge("both", 0, (4,))),
    ([vma(0, 2), vma(2, 4, RO)], "modify", (2, 4), Merge("left", 0, (2,))),
    ([vma(0, 2), vma(2, 4, RO)], "modify", (2, 3), Merge("left", 0, ())),
    ([vma(2, 4, RO), vma(4, 6)], "modify", (2, 4), Merge("right", 4, (2,))),
    ([vma(2, 4, RO), vma(4, 6)], "modify", (3, 4), Merge("right", 4, ())),
    ([vma(0, 2), vma(2, 4, RO), vma(4, 6)], "modify", (2, 4), Merge("both", 0, (2, 4))),
]


@pytest.mark.parametrize("rules", ["6.1", "6.6", "6.12", "7.3"])
@pytest.mark.parametrize(("layout", "step", "place", "merge"), MERGES)
def test_sides_survivors_and_victims(
    rules: str, layout: list[Vma], step: str, place: tuple[int, int], merge: Merge
) -> None:
    args = {"start": place[0] * PAGE, "end": place[1] * PAGE, "pgoff": place[0], "flags": RW}
    result = run(rules, layout, step, args)
    assert [effect for effect in result.effects if isinstance(effect, Merge)] == [merge]
    assert result.mm.map_count == len(result.space)
    assert all(each.pgoff == each.start // PAGE for each in result.space)


@pytest.mark.parametrize("rules", ["6.1", "6.6", "6.12", "7.3"])
def test_a_neighbour_that_does_not_touch_is_none(rules: str) -> None:
    for layout in ([vma(0, 1), vma(5, 6)], [vma(0, 1, pgoff=1), vma(5, 6, pgoff=4)]):
        args = {"start": 2 * PAGE, "end": 4 * PAGE, "pgoff": 2, "flags": RW}
        assert run(rules, layout, "merge_new", args).count(Merge) == 0
    inside = [vma(0, 2), vma(2, 8, RO), vma(8, 10)]
    args = {"start": 4 * PAGE, "end": 6 * PAGE, "flags": RW}
    assert run(rules, inside, "modify", args).count(Merge) == 0
    # An expansion upwards never asks what lies above (brk).
    args = {"start": 2 * PAGE, "end": 4 * PAGE, "pgoff": 2, "flags": RW}
    assert run(rules, [vma(4, 6)], "expand_only", args).count(Merge) == 0
    assert run(rules, [vma(0, 2), vma(4, 6)], "expand_only", args).count(Merge) == 1


@pytest.mark.parametrize(
    ("prev", "next", "two"),
    [(None, None, False), ("a", None, False), (None, "a", False), ("a", "a", False), ("a", "b", True),
     ("b", "a", True)],
)  # fmt: skip
def test_two_anon_vmas(prev: str | None, next: str | None, two: bool) -> None:
    lower, upper = vma(0, 2, anon_vma=prev), vma(4, 6, anon_vma=next)
    assert _two_anon_vmas(lower, upper) is two
    if two:
        layout = [lower, vma(2, 4, RO), upper]
        args = {"start": 2 * PAGE, "end": 4 * PAGE, "flags": RW}
        for rules in ("6.1", "7.3"):
            after = list(run(rules, layout, "modify", args).space)
            assert [each.anon_vma for each in after] == [prev, next]


def test_the_anon_vma_of_a_deleted_next_wins() -> None:
    layout = [vma(0, 2), vma(2, 4, RO), vma(4, 6, anon_vma="b", forked=False)]
    args = {"start": 2 * PAGE, "end": 4 * PAGE, "flags": RW}
    for rules in ("6.1", "6.12", "7.3"):
        after = list(run(rules, layout, "modify", args).space)
        assert [(each.end // PAGE, each.anon_vma) for each in after] == [(6, "b")]


# --- flags where a rule is off ---

NONE = MAY_ALL


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
