"""Rules of kernels that are not at hand, or of configurations and failures that a live test cannot have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.layouts import PAGE, PLAIN, RO, RW, run, vma
from vmatrace.kernel import rule_set
from vmatrace.rules.context import Kernel
from vmatrace.rules.objects import VmaObject, allocate, attach, detach, free
from vmatrace.scenario import Scenario, read_scenarios, run_scenario
from vmatrace.simulator import (
    AddressSpace,
    Config,
    FileGiven,
    Limits,
    Merge,
    MmState,
    Operation,
    Policy,
    Result,
    Split,
    Unmodelled,
    apply,
    counters_of,
)
from vmatrace.vma import (
    ACCOUNT,
    ARCH_1,
    DONTCOPY,
    LOCKED,
    NOHUGEPAGE,
    PKEY_SHIFT,
    SEALED,
    UFFD_MISSING,
    Vma,
    parse_flags,
)

LIVE = "6.18+copied_from+sticky_flags"


def pages(result: Result) -> list[tuple[int, int]]:
    return [(each.start // PAGE, each.end // PAGE) for each in result.space]


def new(start: int, end: int, flags: int = RW) -> dict[str, int]:
    return {"start": start * PAGE, "end": end * PAGE, "pgoff": start, "flags": flags}


def test_before_6_4_a_close_hook_refuses_even_the_survivor() -> None:
    closed = [vma(0, 2, close=True, anonymous=False)]
    assert pages(run("6.1", closed, "merge_new", new(2, 3))) == [(0, 2)]
    assert pages(run("6.6", closed, "merge_new", new(2, 3))) == [(0, 3)]


def test_6_6_a_next_with_close_refuses_but_6_12_takes_it() -> None:
    closed = [vma(3, 5, close=True, anonymous=False)]
    assert pages(run("6.6", closed, "merge_new", new(2, 3))) == [(3, 5)]
    assert pages(run("6.12", closed, "merge_new", new(2, 3))) == [(2, 5)]


def test_between_two_anon_vmas_old_mmap_joins_next_and_new_joins_prev() -> None:
    around = [vma(0, 2, anon_vma="x"), vma(3, 5, anon_vma="y")]
    assert pages(run("6.6", around, "mmap_region", new(2, 3))) == [(0, 2), (2, 3), (3, 5)]  # ACCOUNT
    charged = [each.with_flags(RW | ACCOUNT) for each in around]
    assert pages(run("6.6", charged, "mmap_region", new(2, 3))) == [(0, 2), (2, 5)]
    assert pages(run("6.12", charged, "mmap_region", new(2, 3))) == [(0, 3), (3, 5)]


def test_old_mmap_joins_next_only_where_prev_is_unfaulted_and_next_faulted() -> None:
    around = [vma(0, 2, RW | ACCOUNT), vma(3, 5, RW | ACCOUNT, anon_vma="y")]
    assert pages(run("6.6", around, "mmap_region", new(2, 3))) == [(0, 2), (2, 5)]
    assert pages(run("6.16", around, "mmap_region", new(2, 3))) == [(0, 5)]


def test_6_6_case_7_close_refuses() -> None:
    layout = [vma(0, 3), vma(3, 5, RO, close=True, anonymous=False)]
    assert pages(run("6.6", layout, "modify", new(3, 5))) == [(0, 3), (3, 5)]
    assert pages(run("6.6", layout, "modify", new(3, 5), off=frozenset({"old_case7_close"}))) == [(0, 5)]


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        ([vma(0, 3), vma(3, 7, RO), vma(7, 9)], (3, 7), [(0, 9)]),
        ([vma(0, 3), vma(3, 7, RO)], (3, 7), [(0, 7)]),
        ([vma(3, 7, RO), vma(7, 9)], (3, 7), [(3, 9)]),
        ([vma(0, 3), vma(3, 7, RO)], (3, 5), [(0, 5), (5, 7)]),
        ([vma(3, 7, RO), vma(7, 9)], (5, 7), [(3, 5), (5, 9)]),
        ([vma(3, 7, RO)], (4, 6), [(3, 4), (4, 6), (6, 7)]),
    ],
)
@pytest.mark.parametrize("rules", ["6.1", "6.6", "6.12", "7.3"])
def test_the_cases_of_an_existing_range(
    rules: str, before: list[Vma], change: tuple[int, int], after: list[tuple[int, int]]
) -> None:
    assert pages(run(rules, before, "modify", new(*change))) == after


def test_old_merge_gives_up_quietly_without_memory() -> None:
    layout = [vma(0, 3), vma(3, 5, RO)]
    broke = Limits(config=Config(soft_dirty=False, fail_prealloc=True))
    assert run("6.6", layout, "modify", new(3, 5), broke).errno is None
    assert run("6.12", layout, "modify", new(3, 5), broke).errno == "ENOMEM"


def test_6_1_grows_a_vma_with_close_in_place() -> None:
    layout = [vma(0, 3, close=True, anonymous=False)]
    step = {"vma": 0, "delta": 2 * PAGE}
    assert pages(run("6.1", layout, "merge_extend", step)) == [(0, 5)]
    assert pages(run("6.1", layout, "merge_extend", step, off=frozenset({"old_extend_with_close"}))) == [
        (0, 3)
    ]


def test_before_6_12_a_refused_overlay_leaves_a_hole() -> None:
    call = {"addr": 2 * PAGE, "len": 2 * PAGE, "prot": 3, "flags": 0x32}
    refused = run("6.6", [vma(0, 8)], "mmap", call, overcommit_ok=False)
    assert (refused.errno, pages(refused)) == ("ENOMEM", [(0, 2), (4, 8)])
    refused = run("6.12", [vma(0, 8)], "mmap", call, overcommit_ok=False)
    assert (refused.errno, pages(refused)) == ("ENOMEM", [(0, 2), (2, 4), (4, 8)])


def test_seals_are_checked_first_where_they_are() -> None:
    layout = [vma(0, 2), vma(2, 4, RW | SEALED)]
    call = {"start": 0, "len": 4 * PAGE, "prot": 1}
    early = run("6.12-mseal_per_vma", layout, "mprotect", call)
    assert (early.errno, early.space.at(0)) == ("EPERM", layout[0])
    late = run("6.12", layout, "mprotect", call)
    assert late.errno == "EPERM"
    assert late.space.at(0) != layout[0]


def test_the_retried_merge_of_secret_memory_ends_with_6_16() -> None:
    secret = FileGiven("s", kind="secretmem", set_flags=DONTCOPY)
    flags = parse_flags(["READ", "WRITE", "SHARED", "MAYREAD", "MAYWRITE", "MAYEXEC", "MAYSHARE", "DONTDUMP"])
    kept = vma(0, 2, flags | LOCKED | DONTCOPY, file="s", anonymous=False, pgoff=0, kind="secretmem")
    call = {"addr": 2 * PAGE, "len": 2 * PAGE, "prot": 3, "flags": 0x11, "off": 2 * PAGE}
    assert pages(run("6.12", [kept], "mmap", call, file=secret)) == [(0, 4)]
    off = frozenset({"merge_retried"})
    assert pages(run("6.12", [kept], "mmap", call, file=secret, off=off)) == [(0, 2), (2, 4)]
    assert pages(run("6.16", [kept], "mmap", call, file=secret)) == [(0, 2), (2, 4)]


def test_dontunmap_drops_account_for_three_releases() -> None:
    layout = [vma(0, 2, RW | ACCOUNT)]
    call = {"addr": 0, "old_len": 2 * PAGE, "new_len": 2 * PAGE, "flags": 7, "new_addr": 64 * PAGE}
    for rules, kept in (("6.12", ACCOUNT), ("6.16", 0), ("6.17", 0), ("6.18", ACCOUNT)):
        source = run(rules, layout, "mremap", call).space.at(0)
        assert source is not None
        assert source.flags & ACCOUNT == kept, rules


@pytest.mark.parametrize(
    ("rules", "count", "errno"),
    [("7.0", 94, None), ("7.0", 95, "ENOMEM"), ("7.1", 96, None), ("7.1", 97, "ENOMEM"), ("7.3", 96, None)],
)
def test_room_that_a_fixed_move_needs(rules: str, count: int, errno: str | None) -> None:
    call = {"addr": 0, "old_len": PAGE, "new_len": PAGE, "flags": 3, "new_addr": 64 * PAGE}
    mm = counters_of(AddressSpace([vma(0, 2)]))
    mm.map_count = count
    limits = Limits(max_map_count=100, config=PLAIN.config)
    assert run(rules, [vma(0, 2)], "mremap", call, limits, mm).errno == errno


def test_7_1_tests_a_shrinking_mremap_too() -> None:
    call = {"addr": 0, "old_len": 2 * PAGE, "new_len": PAGE, "flags": 0}
    mm = counters_of(AddressSpace([vma(0, 2)]))
    mm.map_count = 99
    limits = Limits(max_map_count=100, config=PLAIN.config)
    assert run("7.1", [vma(0, 2)], "mremap", call, limits, mm.copy()).errno == "ENOMEM"
    assert run("7.0", [vma(0, 2)], "mremap", call, limits, mm.copy()).errno is None
    off = frozenset({"mremap_count_entry_7_1"})
    assert run("7.1", [vma(0, 2)], "mremap", call, limits, mm.copy(), off).errno is None


def test_7_1_a_growing_move_needs_two() -> None:
    mm = counters_of(AddressSpace([vma(0, 2), vma(2, 3, RO)]))
    mm.map_count = 99
    limits = Limits(max_map_count=100, config=PLAIN.config)
    call = {"addr": 0, "old_len": 2 * PAGE, "new_len": 4 * PAGE, "flags": 1}
    off = frozenset({"mremap_count_entry_7_1"})
    layout = [vma(0, 2), vma(2, 3, RO)]
    assert run("7.1", layout, "mremap", call, limits, mm.copy(), off, picked=64 * PAGE).errno == "ENOMEM"
    both = off | {"mremap_count_move_7_1"}
    assert run("7.1", layout, "mremap", call, limits, mm.copy(), both, picked=64 * PAGE).errno is None


def test_7_3_dontunmap_does_not_merge_with_its_source() -> None:
    call = {"addr": 0, "old_len": 2 * PAGE, "new_len": 2 * PAGE, "flags": 7, "new_addr": 2 * PAGE}
    assert pages(run("7.2", [vma(0, 2)], "mremap", call)) == [(0, 4)]
    assert pages(run("7.3", [vma(0, 2)], "mremap", call)) == [(0, 2), (2, 4)]


def test_7_3_dontunmap_of_part_of_a_locked_vma_cuts_it() -> None:
    call = {"addr": PAGE, "old_len": PAGE, "new_len": PAGE, "flags": 7, "new_addr": 8 * PAGE}
    locked = [vma(0, 3, RW | LOCKED)]
    new_way, old_way = (run(rules, locked, "mremap", call) for rules in ("7.3", "7.2"))
    assert pages(new_way) == [(0, 1), (1, 2), (2, 3), (8, 9)]
    assert [bool(each.flags & LOCKED) for each in new_way.space] == [True, False, True, True]
    assert new_way.mm.locked_vm == 3
    assert pages(old_way) == [(0, 3), (8, 9)]
    assert [bool(each.flags & LOCKED) for each in old_way.space] == [False, True]
    assert old_way.mm.locked_vm == 4


def test_an_unmodelled_operation_changes_nothing() -> None:
    space = AddressSpace([vma(0, 2)])
    mm = counters_of(space)
    before = (list(space), mm.copy())
    with pytest.raises(Unmodelled, match="picked"):
        apply(
            space, Operation("mmap", {"addr": 0, "len": PAGE, "prot": 3, "flags": 0x22}), rule_set("7.3"), mm
        )
    assert (list(space), mm) == before


def test_7_3_private_file_mappings_need_both_offsets_to_continue() -> None:
    near = vma(0, 2, file="f", anonymous=False, anon_pgoff=0)
    far = near._replace(anon_pgoff=77)
    mapping = {**new(2, 3)}
    for rules, left, after in (("7.3", near, [(0, 3)]), ("7.3", far, [(0, 2)]), ("7.2", far, [(0, 3)])):
        assert pages(run(rules, [left], "merge_new", mapping, file="f")) == after
    off = frozenset({"anon_offset_linear"})
    assert pages(run("7.3", [far], "merge_new", mapping, file="f", off=off)) == [(0, 3)]


def test_7_3_an_unfaulted_private_file_mapping_moves_its_second_offset() -> None:
    source = vma(20, 22, file="f", anonymous=False, pgoff=2, anon_pgoff=20)
    left = vma(0, 2, file="f", anonymous=False, anon_pgoff=0)
    call = {"vma": 1, "to": 2 * PAGE, "length": 2 * PAGE}
    assert pages(run("7.3", [left, source], "copy_vma", call)) == [(0, 4), (20, 22)]
    off = frozenset({"copy_unfaulted_anon_pgoff"})
    assert pages(run("7.3", [left, source], "copy_vma", call, off=off)) == [(0, 2), (2, 4), (20, 22)]


def test_munmap_makes_the_staying_pieces_new() -> None:
    call = {"addr": 2 * PAGE, "len": 2 * PAGE}
    after = run("6.6", [vma(0, 8)], "munmap", call)
    assert [each.obj for each in after.space] == [-1, -2]
    before = run("6.1", [vma(0, 8)], "munmap", call)
    assert [each.obj for each in before.space] == [0, -1]
    assert [cut.side for cut in before.effects if isinstance(cut, Split)] == ["above", "below"]
    assert [cut.side for cut in after.effects if isinstance(cut, Split)] == ["below", "above"]


def prctl_name(rules: str, layout: list[Vma], start: int, count: int, name: str | None) -> Result:
    args = {"option": 0x53564D41, "arg2": 0, "arg3": start * PAGE, "arg4": count * PAGE}
    return run(rules, layout, "prctl", args, name=name)


def test_names_split_and_merge() -> None:
    named = prctl_name(LIVE, [vma(0, 4)], 1, 2, "heap")
    assert [each.name for each in named.space] == [None, "heap", None]
    again = prctl_name(LIVE, list(named.space), 1, 2, None)
    assert pages(again) == [(0, 4)]
    off = frozenset({"anon_name_equal"})
    joined = run(LIVE, [vma(0, 2, name="a")], "merge_new", new(2, 3), off=off)
    assert pages(joined) == [(0, 3)]
    assert pages(run(LIVE, [vma(0, 2, name="a")], "merge_new", new(2, 3))) == [(0, 2)]


def test_files_cannot_be_named() -> None:
    assert prctl_name(LIVE, [vma(0, 4, file="f", anonymous=False)], 1, 2, "x").errno == "EBADF"


def test_naming_writes_the_old_flags_back() -> None:
    guard = parse_flags(["MAYBE_GUARD"])
    layout = [vma(0, 2, RW | guard, name="x"), vma(2, 4)]
    after = prctl_name(LIVE, layout, 2, 2, "x")
    assert pages(after) == [(0, 4)]
    assert not next(iter(after.space)).flags & guard


def test_execute_only_mappings_take_a_key_and_mprotect_keeps_keys() -> None:
    keys = Limits(config=Config(soft_dirty=False, pkeys=True))
    call = {"addr": 2 * PAGE, "len": PAGE, "prot": 4, "flags": 0x32}
    made = run(LIVE, [], "mmap", call, keys, execute_pkey=5).space.at(2 * PAGE)
    assert made is not None
    assert made.flags >> PKEY_SHIFT & 15 == 5
    keyed = vma(0, 2, RW | 3 << PKEY_SHIFT)
    after = run(LIVE, [keyed], "mprotect", {"start": 0, "len": 2 * PAGE, "prot": 1}, keys).space.at(0)
    assert after is not None
    assert after.flags >> PKEY_SHIFT & 15 == 3
    wrong = {"start": 0, "len": 2 * PAGE, "prot": 1, "pkey": 7}
    assert run(LIVE, [keyed], "pkey_mprotect", wrong, keys).errno == "EINVAL"


@pytest.mark.parametrize(("bti", "errno", "marked"), [(False, "EINVAL", False), (True, None, True)])
def test_branch_targets_are_guarded_where_the_cpu_has_bti(bti: bool, errno: str | None, marked: bool) -> None:
    limits = replace(PLAIN, config=replace(PLAIN.config, bti=bti))
    args = {"start": 0, "len": 2 * PAGE, "prot": 0x15}
    result = run("7.1", [vma(0, 2)], "mprotect", args, limits)
    assert result.errno == errno
    assert [bool(each.flags & ARCH_1) for each in result.space] == [marked]
    if bti:
        plain = run("7.1", list(result.space), "mprotect", {**args, "prot": 5}, limits)
        assert [bool(each.flags & ARCH_1) for each in plain.space] == [False]
    kept = run("7.1", [vma(0, 2, RW | ARCH_1)], "mprotect", {**args, "prot": 1}, limits)
    assert [bool(each.flags & ARCH_1) for each in kept.space] == [not bti]


def test_bti_is_learnt_from_what_exec_mapped() -> None:
    limits = replace(PLAIN, config=replace(PLAIN.config, bti=None))
    args = {"start": 0, "len": 2 * PAGE, "prot": 0x15}
    with pytest.raises(Unmodelled, match="BTI"):
        run("7.1", [vma(0, 2)], "mprotect", args, limits)
    loader = vma(8, 9, RO | ARCH_1)
    assert run("7.1", [vma(0, 2), loader], "mprotect", args, limits).errno is None


def test_releasing_a_userfaultfd_is_quiet_without_memory() -> None:
    broke = Limits(config=Config(soft_dirty=False, fail_prealloc=True))
    layout = [vma(0, 2), vma(2, 4, RW | UFFD_MISSING, uffd="u")]
    result = run(LIVE, layout, "uffd_release", {}, broke, uffd="u")
    assert result.errno is None
    assert [each.uffd for each in result.space] == [None, None]
    off = frozenset({"uffd_release_quiet"})
    assert run(LIVE, layout, "uffd_release", {}, broke, off=off, uffd="u").errno == "ENOMEM"


@pytest.mark.parametrize(
    ("rules", "flags", "close"),
    [("6.18", DONTCOPY | NOHUGEPAGE, True), ("7.0", NOHUGEPAGE, True)],
)
def test_the_compat_layer_adds_flags_before_7_0_and_assigns_them_after(
    rules: str, flags: int, close: bool
) -> None:
    given = FileGiven(
        "f", nested_prepare=True, nested_close=True, clear_flags=DONTCOPY, set_flags=NOHUGEPAGE, close=False
    )
    mm = MmState(def_flags=DONTCOPY)
    call = {"addr": 2 * PAGE, "len": PAGE, "prot": 1, "flags": 0x12, "off": 0}
    made = run(rules, [], "mmap", call, mm=mm, file=given).space.at(2 * PAGE)
    assert made is not None
    assert made.flags & (DONTCOPY | NOHUGEPAGE) == flags
    assert made.close is close


def test_a_nested_hook_that_fails_leaves_a_hole() -> None:
    given = FileGiven("f", nested_prepare=True, hook_error="ENODEV")
    call = {"addr": 2 * PAGE, "len": PAGE, "prot": 1, "flags": 0x12, "off": 0}
    result = run("6.18", [vma(0, 8)], "mmap", call, file=given)
    assert (result.errno, pages(result)) == ("ENODEV", [(0, 2), (3, 8)])


def test_a_driver_with_two_hooks_cannot_be_mapped() -> None:
    call = {"addr": 2 * PAGE, "len": PAGE, "prot": 1, "flags": 0x12, "off": 0}
    faulty = FileGiven("f", both_hooks=True)
    assert run("6.18", [], "mmap", call, file=faulty).errno == "ENODEV"
    assert run("6.12", [], "mmap", call, file=faulty).errno is None


def test_the_first_stack_vma_and_its_move() -> None:
    top = 1 << 40
    made = run("6.18", [], "create_init_stack", {"top": top})
    stack = next(iter(made.space))
    assert (stack.end, stack.pgoff) == (top, (top - PAGE) >> 12)
    assert {"GROWSDOWN", "RAND_READ", "SEQ_READ"} <= set(str(stack).split()[-1].split("|"))
    moved = run("6.18", [stack], "relocate_stack", {"start": stack.start, "shift": 16 * PAGE})
    after = next(iter(moved.space))
    assert (after.start, after.end, after.pgoff) == (stack.start - 16 * PAGE, top - 16 * PAGE, stack.pgoff)
    off = frozenset({"exec_stack_moves"})
    wrong = run("6.18", [stack], "relocate_stack", {"start": stack.start, "shift": 16 * PAGE}, off=off)
    assert next(iter(wrong.space)).pgoff == stack.pgoff - 16


def test_relocating_over_another_vma_and_without_memory() -> None:
    stack = vma(64, 66)
    shift = {"start": 64 * PAGE, "shift": 8 * PAGE}
    assert run("6.18", [vma(60, 61), stack], "relocate_stack", shift).errno == "EFAULT"
    broke = Limits(config=Config(fail_prealloc=True))
    assert run("6.18", [stack], "relocate_stack", shift, broke).errno == "ENOMEM"
    assert run("6.18", [vma(63, 64)], "create_init_stack", {"top": 64 * PAGE}).errno == "ENOMEM"


def test_a_duplicated_policy_is_equal_by_content() -> None:
    first, second = Policy(2, nodes=1), Policy(2, nodes=1)
    layout = [vma(0, 2, policy=first), vma(2, 4)]
    call = {"start": 2 * PAGE, "len": 2 * PAGE, "mode": 2, "flags": 0}
    assert pages(run(LIVE, layout, "mbind", call, policy=second)) == [(0, 4)]


def test_refused_charges() -> None:
    call = {"addr": 2 * PAGE, "len": PAGE, "prot": 3, "flags": 0x32}
    assert run(LIVE, [], "mmap", call, overcommit_ok=False).errno == "ENOMEM"
    assert run(LIVE, [], "mmap", call, overcommit_ok=False, off=frozenset({"overcommit"})).errno is None


CODE_MOTION = ("vma_alloc_in_mm", "init_stack_in_mm", "vma_exec")


@pytest.mark.parametrize("feature", CODE_MOTION)
def test_code_motion_changes_nothing(feature: str) -> None:
    folder = Path(__file__).parents[1] / "scenarios"
    with_it, without = rule_set("6.18"), rule_set(f"6.18-{feature}")
    for name in ("kernel-6.18.33.jsonl", "userland.jsonl"):
        for scenario in read_scenarios(folder / name):
            assert isinstance(scenario, Scenario)
            both = [run_scenario(scenario, rules) for rules in (with_it, without)]
            assert [each.vmas for each in both[0]] == [each.vmas for each in both[1]]
    top = {"top": 1 << 40}
    assert list(run("6.18", [], "create_init_stack", top).space) == list(
        run(f"6.18-{feature}", [], "create_init_stack", top).space
    )


def kernel(rules: str = "6.18") -> Kernel:
    return Kernel(AddressSpace(), MmState(), rule_set(rules), PLAIN)


def test_the_life_of_an_object() -> None:
    under = kernel()
    obj = allocate(under)
    attach(under, obj)
    assert obj.attached
    with pytest.raises(ValueError, match="attached"):
        attach(under, obj)
    with pytest.raises(ValueError, match="freed while attached"):
        free(under, obj)
    detach(under, obj)
    with pytest.raises(ValueError, match="detached twice"):
        detach(under, obj)
    free(under, obj)
    assert allocate(under, obj).generation == 1
    assert allocate(kernel("6.12"), VmaObject(freed=True)).generation == 0


def test_the_anonymous_merge_fix_for_prev_next_and_both() -> None:
    for layout, change in (
        ([vma(0, 3), vma(3, 5, RO, anon_vma="a")], (3, 5)),
        ([vma(3, 5, RO, anon_vma="a"), vma(5, 8)], (3, 5)),
        ([vma(0, 3), vma(3, 5, RO, anon_vma="a"), vma(5, 8)], (3, 5)),
    ):
        old, fixed = (run(rules, layout, "modify", new(*change)) for rules in ("6.12", "6.16"))
        assert len(old.space) == len(layout)
        assert len(fixed.space) == 1
        assert next(iter(fixed.space)).anon_vma == "a"
        assert fixed.count(Merge) == 1
    child = [vma(0, 3), vma(3, 5, RO, anon_vma="a", forked=True)]
    assert len(run("6.16", child, "modify", new(3, 5)).space) == 2


def test_what_the_fix_opened_for_moves_and_copied_from_closed() -> None:
    layout = [vma(0, 2, pgoff=18), vma(20, 22, anon_vma="a", forked=True)]
    call = {"vma": 1, "to": 2 * PAGE, "length": 2 * PAGE}
    opened = run("6.18", layout, "copy_vma", call)
    assert opened.count(Merge) == 1
    assert next(iter(opened.space)).anon_vma is None  # the bug that copied_from cures
    assert run("6.18+copied_from", layout, "copy_vma", call).count(Merge) == 0
    parent = [layout[0], layout[1]._replace(forked=False)]
    cured = run("6.18+copied_from", parent, "copy_vma", call)
    assert next(iter(cured.space)).anon_vma == "a"
    assert run("6.12", parent, "copy_vma", call).count(Merge) == 0


def test_a_seal_has_the_bit_of_its_kernel() -> None:
    call = {"start": 0, "len": 2 * PAGE, "flags": 0}
    for rules, bit in (("6.12", 1 << 63), ("6.18", SEALED)):
        sealed = run(rules, [vma(0, 2)], "mseal", call).space.at(0)
        assert sealed is not None
        assert sealed.flags == RW | bit
        assert "SEALED" in str(sealed)
