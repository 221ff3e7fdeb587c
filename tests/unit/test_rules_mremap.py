"""mremap, mprotect and the bare steps at their borders, each with the kernel's own condition as the source."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.layouts import NONE, PAGE, PLAIN, RO, RW, run, vma
from vmatrace.simulator import Config, FileGiven, Limits, Merge, MmState, Unmodelled
from vmatrace.vma import (
    ACCOUNT,
    EXEC,
    GROWSDOWN,
    LOCKED,
    MAYEXEC,
    MAYSHARE,
    MAYWRITE,
    PKEY_SHIFT,
    SHARED,
    SOFTDIRTY,
    UFFD_MISSING,
    Vma,
)

ERAS = ("6.1", "6.12", "6.16", "6.18", "7.1", "7.3")
SMALL = replace(PLAIN, task_size=64 * PAGE)


def mremap(addr: int, old: int, new: int, flags: int = 0, to: int = 0) -> dict[str, int]:
    pages = {"addr": addr, "old_len": old, "new_len": new, "new_addr": to}
    return {**{name: count * PAGE for name, count in pages.items()}, "flags": flags}


def places(layout: list[Vma], rules: str, call: dict[str, int], limits: Limits = PLAIN, **inputs: object) -> object:
    """The errno, or where the VMAs are, by page."""
    result = run(rules, layout, "mremap", call, limits, **inputs)
    return result.errno or [(each.start // PAGE, each.end // PAGE) for each in result.space]


@pytest.mark.parametrize("rules", ERAS)
def test_where_a_fixed_move_may_go(rules: str) -> None:
    for new, to, expected in ((1, 63, [(63, 64)]), (2, 63, "EINVAL"), (1, 64, "EINVAL"), (1, 65, "EINVAL"),
                              (64, 1, "EINVAL"), (2, 62, [(62, 64)])):  # fmt: skip
        assert places([vma(0, 1)], rules, mremap(0, 1, new, 3, to), SMALL) == expected
    odd = {**mremap(0, 1, 1, 3, 8), "new_addr": 8 * PAGE + 5}
    assert places([vma(0, 1)], rules, odd, SMALL) == "EINVAL"
    assert places([vma(1, 2)], rules, mremap(1, 1, 63, 3, 2), SMALL) == "EINVAL"


@pytest.mark.parametrize("rules", ERAS)
def test_how_far_a_mapping_grows_where_it_is(rules: str) -> None:
    for new, expected in ((32, [(32, 64)]), (33, "ENOMEM"), (64, "ENOMEM")):
        assert places([vma(32, 34)], rules, mremap(32, 2, new), SMALL) == expected
    silly = places([vma(32, 34)], rules, mremap(32, 2, 65), SMALL)
    assert silly == ("EINVAL" if rules in ("6.18", "7.1", "7.3") else "ENOMEM")
    for above, expected in (((38, 40), [(32, 36), (38, 40)]), ((36, 38), [(32, 38)]), ((35, 38), "ENOMEM")):
        assert places([vma(32, 34), vma(*above)], rules, mremap(32, 2, 4)) == expected
    # Only from its end, and the bytes that it has.
    assert places([vma(0, 4)], rules, mremap(0, 2, 3)) == "ENOMEM"
    assert places([vma(0, 4)], rules, mremap(2, 2, 3)) == [(0, 5)]
    assert places([vma(0, 4), vma(6, 8, RO)], rules, mremap(2, 3, 4)) == "EFAULT"


@pytest.mark.parametrize("rules", ERAS)
@pytest.mark.parametrize("dontunmap", [False, True])
def test_a_move_keeps_the_offset_of_its_part(rules: str, dontunmap: bool) -> None:
    whole = vma(4, 10, RW | SHARED | MAYSHARE, file="f", anonymous=False, pgoff=30)
    flags = 7 if dontunmap else 3
    result = run(rules, [whole], "mremap", mremap(6, 2, 2, flags, 20))
    moved = list(result.space)[-1]
    assert (moved.start // PAGE, moved.end // PAGE, moved.pgoff) == (20, 22, 32)
    assert result.ret == 20 * PAGE


@pytest.mark.parametrize(("rules", "room"), [("6.12", 6), ("6.18", 6), ("7.0", 6), ("7.1", 4), ("7.3", 4)])
def test_room_for_a_fixed_move(rules: str, room: int) -> None:
    keeps = room + (1 if rules == "7.3" else 0)
    for flags, needed in ((3, room), (5, keeps), (7, keeps)):
        for free, errno in ((needed - 1, "ENOMEM"), (needed, None), (needed + 1, None)):
            limits = replace(PLAIN, max_map_count=100)
            mm, call = MmState(map_count=100 - free), mremap(0, 2, 2, flags, 20)
            result = run(rules, [vma(0, 2)], "mremap", call, limits, mm, picked=20 * PAGE)
            assert result.errno == errno


@pytest.mark.parametrize(("rules", "room"), [("6.12", 4), ("6.18", 4), ("7.1", 4), ("7.3", 4)])
def test_room_for_a_move_of_the_kernels_choice(rules: str, room: int) -> None:
    layout, limits = [vma(0, 2), vma(2, 4, RO)], replace(PLAIN, max_map_count=100)
    for free, errno in ((room - 1, "ENOMEM"), (room, None), (room + 1, None)):
        mm = MmState(map_count=100 - free)
        assert run(rules, layout, "mremap", mremap(0, 2, 4, 1), limits, mm, picked=20 * PAGE).errno == errno


@pytest.mark.parametrize("rules", ERAS)
def test_offsets_of_a_grown_mapping_do_not_wrap(rules: str) -> None:
    # pgoff + (new_len >> PAGE_SHIFT) < pgoff is EINVAL.
    for pgoff, errno in (((1 << 64) - 4, "EINVAL"), ((1 << 64) - 5, None)):
        layout = [vma(0, 2, RW | SHARED, file="f", anonymous=False, pgoff=pgoff)]
        assert run(rules, layout, "mremap", mremap(0, 2, 4)).errno == errno
        part = [vma(0, 4, RW | SHARED, file="f", anonymous=False, pgoff=pgoff - 2)]
        assert run(rules, part, "mremap", mremap(2, 2, 4)).errno == errno


@pytest.mark.parametrize("rules", ERAS)
def test_a_refused_charge_stops_growth_and_moves(rules: str) -> None:
    for flags, errno in ((RW | ACCOUNT, "ENOMEM"), (RW, None)):
        for call in (mremap(0, 2, 4), mremap(0, 2, 2, 3, 20)):
            assert run(rules, [vma(0, 2, flags)], "mremap", call, overcommit_ok=False).errno == errno
        assert run(rules, [vma(0, 2, flags)], "mremap", mremap(0, 2, 4), overcommit_ok=True).errno is None


@pytest.mark.parametrize("rules", ERAS)
def test_a_kept_source_counts_twice(rules: str) -> None:
    limits = replace(PLAIN, rlimit_as=10 * PAGE)
    for total, flags, errno in ((9, 7, "ENOMEM"), (8, 7, None), (9, 3, None)):
        assert run(
            rules, [vma(0, 2)], "mremap", mremap(0, 2, 2, flags, 20), limits, MmState(map_count=1, total_vm=total)
        ).errno == (errno)


@pytest.mark.parametrize("asked", [True, False])
def test_a_move_ends_the_watch_unless_it_was_asked_for(asked: bool) -> None:
    watched = vma(0, 2, RW | UFFD_MISSING, uffd="u")
    for flags in (3, 7):
        result = run("6.18", [watched], "mremap", mremap(0, 2, 2, flags, 20), event_remap=asked)
        moved = list(result.space)[-1]
        assert (moved.uffd, bool(moved.flags & UFFD_MISSING)) == (("u", True) if asked else (None, False))
        assert [each.uffd for each in result.space][:-1] == ["u"] * (flags == 7)
    plain = run("6.18", [vma(0, 2)], "mremap", mremap(0, 2, 2, 3, 20))
    assert "uffd" not in {getattr(effect, "what", "") for effect in plain.effects}


@pytest.mark.parametrize("rules", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize(("start", "length", "unfaulted"), [(0, 4, True), (0, 2, False), (2, 2, False), (1, 2, False)])
def test_a_source_that_is_kept_whole_is_as_new(rules: str, start: int, length: int, unfaulted: bool) -> None:
    # dontunmap_complete: unlink_anon_vmas only where the whole VMA was moved.
    layout = [vma(0, 4, anon_vma="a", forked=True)]
    kept = next(iter(run(rules, layout, "mremap", mremap(start, length, length, 7, 20)).space))
    assert (kept.anon_vma, kept.forked) == ((None, False) if unfaulted else ("a", True))


HUGE = 512


@pytest.mark.parametrize(
    ("addr", "old", "new", "to", "errno"),
    [(0, 1, 1, 2, None), (0, 2, 1, 4, None), (0, 1, 2, 2, "EINVAL"), (0.5, 1, 1, 4, "EINVAL"), (0, 1, 1, 2.5, "EINVAL"),
     (0.5, 1, 1, 2.5, "EINVAL"), (0, 0.5, 0.5, 2, None)],
)  # fmt: skip
def test_huge_pages_move_as_a_whole(addr: float, old: float, new: float, to: float, errno: str | None) -> None:
    huge = vma(0, 2 * HUGE, RW | SHARED | MAYSHARE, file="h", anonymous=False, kind="hugetlb", huge_size=2 << 20)
    call = mremap(int(addr * HUGE), int(old * HUGE), int(new * HUGE), 3, int(to * HUGE))
    for rules in ("6.12", "6.18", "7.3"):
        assert run(rules, [huge], "mremap", call).errno == errno


@pytest.mark.parametrize(
    ("flags", "old", "new", "errno"),
    [(0, 1, 1, None), (1, 1, 1, None), (2, 1, 1, "EINVAL"), (3, 1, 1, None), (4, 1, 1, "EINVAL"), (5, 1, 1, None),
     (7, 1, 1, None), (7, 2, 1, "EINVAL"), (7, 1, 2, "EINVAL"), (8, 1, 1, "EINVAL"), (9, 1, 1, "EINVAL"),
     (0, 1, 0, "EINVAL")],
)  # fmt: skip
@pytest.mark.parametrize("rules", ERAS)
def test_which_flags_go_together(rules: str, flags: int, old: int, new: int, errno: str | None) -> None:
    result = run(rules, [vma(0, 4)], "mremap", mremap(0, old, new, flags, 20), picked=20 * PAGE)
    assert result.errno == errno


@pytest.mark.parametrize(("rules", "errno"), [("6.16", "EINVAL"), ("6.18", None)])
def test_lengths_are_rounded_before_they_are_compared(rules: str, errno: str | None) -> None:
    # Before v6.17 the lengths of DONTUNMAP are compared as they were given.
    call = {"addr": 0, "old_len": PAGE - 5, "new_len": PAGE, "flags": 7, "new_addr": 20 * PAGE}
    assert run(rules, [vma(0, 4)], "mremap", call).errno == errno


# --- mprotect ---

KEYS = Limits(config=Config(soft_dirty=False, pkeys=True))


@pytest.mark.parametrize(
    ("access", "own", "prot", "after"),
    [(3, 3, 1, 3), (3, 3, 4, 5), (4, 5, 3, 0), (4, 3, 3, 3), (3, 5, 1, 5), (4, 5, 4, 5), (5, 5, 1, 5), (1, 5, 3, 5),
     (3, 0, 5, 0), (3, 3, 5, 3), (3, 3, 6, 3), (0, 5, 3, 5), (4, 6, 3, 6)],
)  # fmt: skip
def test_keys_that_mprotect_keeps(access: int, own: int, prot: int, after: int) -> None:
    # arch/x86/mm/pkeys.c, __arch_override_mprotect_pkey; the mm's execute-only key is 5.
    keyed = vma(0, 2, NONE | access | own << PKEY_SHIFT)
    call = {"start": 0, "len": 2 * PAGE, "prot": prot}
    mm = MmState(map_count=1, pkeys=0xFF)
    for name, more in (("mprotect", {}), ("pkey_mprotect", {"pkey": -1}), ("pkey_mprotect", {"pkey": 0xFFFFFFFF}),
                       ("pkey_mprotect", {})):  # fmt: skip
        result = run("6.18", [keyed], name, {**call, **more}, KEYS, mm.copy(), execute_pkey=5)
        assert [each.flags >> PKEY_SHIFT & 15 for each in result.space] == [after]
    for key, errno in ((0, None), (3, None), (7, None), (8, "EINVAL"), (0xFFFFFFFE, "EINVAL")):
        result = run("6.18", [keyed], "pkey_mprotect", {**call, "pkey": key}, KEYS, mm.copy(), execute_pkey=5)
        assert result.errno == errno
        if errno is None:
            assert [each.flags >> PKEY_SHIFT & 15 for each in result.space] == [key]


@pytest.mark.parametrize(
    ("old", "prot", "gains"),
    [(RO | LOCKED, 3, True), (RO | LOCKED, 5, False), (RO, 3, False), (RO | LOCKED | SHARED, 3, False),
     (RW | LOCKED, 7, False), (NONE | LOCKED, 3, True), (NONE | LOCKED | SHARED, 3, False)],
)  # fmt: skip
def test_a_locked_mapping_that_becomes_writable_is_filled(old: int, prot: int, gains: bool) -> None:
    result = run("6.18", [vma(0, 2, old)], "mprotect", {"start": 0, "len": 2 * PAGE, "prot": prot})
    assert [each.anon_vma is not None for each in result.space] == [gains]


def test_only_what_becomes_writable_counts_as_data() -> None:
    limits, full = replace(PLAIN, rlimit_data=4 * PAGE), MmState(map_count=1, data_vm=4, total_vm=8)
    for prot, errno in ((3, "ENOMEM"), (5, None), (0, None)):
        call = {"start": 0, "len": 2 * PAGE, "prot": prot}
        assert run("6.18", [vma(0, 2, RO)], "mprotect", call, limits, full.copy()).errno == errno
    assert run("6.18", [vma(0, 2)], "mprotect", {"start": 0, "len": PAGE, "prot": 7}, limits, full.copy()).errno is None


def test_reading_implies_executing_where_the_vma_may() -> None:
    limits = replace(PLAIN, read_implies_exec=True)
    layout = [vma(0, 2, NONE), vma(2, 4, NONE & ~MAYEXEC)]
    result = run("6.18", layout, "mprotect", {"start": 0, "len": 4 * PAGE, "prot": 1}, limits)
    assert result.errno is None
    assert [bool(each.flags & EXEC) for each in result.space] == [True, False]


GROWS_DOWN, GROWS_UP = 0x01000000, 0x02000000


@pytest.mark.parametrize(
    ("start", "length", "grows", "changed"),
    [(22, 1, GROWS_DOWN, (20, 23)), (19, 2, GROWS_DOWN, (20, 21)), (20, 4, 0, (20, 24)), (19, 2, 0, "ENOMEM"),
     (18, 2, GROWS_DOWN, "ENOMEM"), (22, 1, GROWS_UP, "EINVAL"), (22, 1, GROWS_DOWN | GROWS_UP, "EINVAL"),
     (31, 1, GROWS_DOWN, "EINVAL"), (10, 1, GROWS_DOWN, "ENOMEM"), (22, 0, GROWS_DOWN, ())],
)  # fmt: skip
def test_where_a_growing_protection_begins(start: int, length: int, grows: int, changed: object) -> None:
    layout = [vma(20, 24, RW | GROWSDOWN), vma(30, 32)]
    result = run("6.18", layout, "mprotect", {"start": start * PAGE, "len": length * PAGE, "prot": 1 | grows})
    got = [(each.start // PAGE, each.end // PAGE) for each in result.space if not each.flags & 2]
    assert (result.errno or (got[0] if got else ())) == changed


@pytest.mark.parametrize(("length", "errno"), [((1 << 64) - PAGE, "ENOMEM"), ((1 << 64) - 2 * PAGE, "ENOMEM"),
                                               (1 << 63, "ENOMEM"), ((1 << 64) - 1, "ENOMEM")])  # fmt: skip
def test_the_end_of_a_protected_range_does_not_wrap(length: int, errno: str) -> None:
    result = run("6.18", [vma(1, 2)], "mprotect", {"start": PAGE, "len": length, "prot": 1})
    assert result.errno == errno
    # What fails at its arguments changes nothing; what fails at a gap has changed what came before.
    assert (result.effects == ()) is (PAGE + length >= 1 << 64 or length > (1 << 64) - PAGE)


# --- what stays where a mapping fails ---


def test_pages_that_a_fixed_mapping_replaces_are_not_counted_twice() -> None:
    for rules in ("6.1", "6.18"):
        for start, end, limit, errno in ((2, 6, 6, None), (2, 7, 6, "ENOMEM"), (2, 7, 7, None), (0, 4, 4, None),
                                         (1, 3, 4, None), (6, 8, 6, None), (6, 8, 5, "ENOMEM")):  # fmt: skip
            limits = replace(PLAIN, rlimit_as=limit * PAGE)
            call = {"addr": start * PAGE, "len": (end - start) * PAGE, "prot": 1, "flags": 0x32}
            assert run(rules, [vma(0, 4)], "mmap", call, limits).errno == errno


def test_a_hook_that_fails_without_the_hole() -> None:
    given = FileGiven("f", hook_error="ENODEV")
    layout, call = [vma(0, 8)], {"addr": 2 * PAGE, "len": 2 * PAGE, "prot": 1, "flags": 0x12, "off": 0}
    result = run("6.18", layout, "mmap", call, file=given, off=("failed_hook_leaves_hole",))
    assert [(each.start // PAGE, each.end // PAGE) for each in result.space] == [(0, 2), (2, 4), (4, 8)]
    assert (result.mm.total_vm, result.mm.map_count) == (8, 3)


@pytest.mark.parametrize("bits", [{"set_flags": MAYWRITE << 20}, {"clear_flags": MAYWRITE}, {}])
def test_a_hook_that_changes_flags_is_asked_again_by_old_kernels(bits: dict[str, int]) -> None:
    wanted = (NONE | bits.get("set_flags", 0)) & ~bits.get("clear_flags", 0)
    layout = [vma(0, 2, wanted, file="f", anonymous=False, pgoff=0)]
    call = {"addr": 2 * PAGE, "len": 2 * PAGE, "prot": 0, "flags": 0x12, "off": 2 * PAGE}
    for rules, prepare in (("6.12", False), ("6.18", False), ("6.18", True)):
        result = run(rules, layout, "mmap", call, file=FileGiven("f", prepare=prepare, **bits))  # type: ignore[arg-type]
        merges = result.count(Merge) == 1
        assert merges is (not bits or rules == "6.12" or prepare)


def test_new_mappings_have_a_second_offset_where_there_is_one() -> None:
    for rules, second in (("6.18", None), ("7.3", 4)):
        call = {"addr": 4 * PAGE, "len": PAGE, "prot": 1, "flags": 0x12, "off": 9 * PAGE}
        made = next(iter(run(rules, [], "mmap", call, file=FileGiven("f")).space))
        assert (made.pgoff, made.anon_pgoff) == (9, second)
        near = vma(0, 4, RO, file="f", anonymous=False, pgoff=5, anon_pgoff=None if second is None else 0)
        assert len(run(rules, [near], "mmap", call, file=FileGiven("f")).space) == 1


# --- bare steps ---


def test_steps_return_and_refuse() -> None:
    new = {"start": 2 * PAGE, "end": 4 * PAGE, "flags": RW}
    assert run("6.18", [vma(0, 2)], "merge_new", new).ret == 0
    assert [each.pgoff for each in run("6.18", [vma(4, 6)], "merge_new", new).space] == [2]
    assert run("6.18", [vma(0, 2)], "expand_only", new).ret == 0
    assert run("6.18", [vma(0, 4)], "modify", {**new, "flags": RO}).ret == 0
    assert run("6.18", [vma(0, 4)], "merge_extend", {"vma": 0, "delta": PAGE}).ret == 0
    assert run("6.18", [vma(0, 4)], "expand", {"vma": 0, "start": 0, "end": 6 * PAGE}).ret == 0
    assert run("6.18", [vma(0, 4)], "shrink", {"vma": 0, "start": 0, "end": 2 * PAGE}).ret == 0
    for layout, step, args in (
        ([vma(3, 5)], "merge_new", new),
        ([vma(0, 3)], "modify", new),
        ([], "modify", new),
        ([vma(0, 2), vma(3, 4)], "merge_extend", {"vma": 0, "delta": 2 * PAGE}),
        ([vma(0, 2)], "merge_extend", {"vma": 1, "delta": PAGE}),
        ([vma(0, 2), vma(3, 5)], "expand", {"vma": 0, "start": 0, "end": 4 * PAGE}),
    ):
        with pytest.raises(Unmodelled):
            run("6.18", layout, step, args)
    broke = Limits(config=Config(soft_dirty=False, fail_prealloc=True))
    for step in ("merge_new", "expand_only"):
        assert run("6.18", [vma(0, 2)], step, new, broke).errno == "ENOMEM"
        assert run("6.18", [vma(0, 1)], step, new, broke).errno is None
        assert run("6.1", [vma(0, 2)], step, new, broke).errno == "ENOMEM"


def test_a_step_swallows_the_next_vma_only_where_it_ends_with_it() -> None:
    layout = [vma(0, 2), vma(3, 5, RW | SOFTDIRTY, anon_vma="a")]
    both = run("6.19", layout, "expand", {"vma": 0, "start": 0, "end": 5 * PAGE})
    assert [(each.end // PAGE, each.anon_vma, each.flags) for each in both.space] == [(5, "a", RW | SOFTDIRTY)]
    assert (both.mm.map_count, both.count(Merge)) == (1, 1)
    alone = run("6.19", layout, "expand", {"vma": 0, "start": 0, "end": 3 * PAGE})
    assert [(each.end // PAGE, each.flags) for each in alone.space] == [(3, RW), (5, RW | SOFTDIRTY)]
    assert (alone.mm.map_count, alone.count(Merge)) == (2, 0)
    none = run("6.19", [vma(0, 2, NONE)], "expand", {"vma": 0, "start": 0, "end": 3 * PAGE})
    assert [each.flags for each in none.space] == [NONE]


@pytest.mark.parametrize("rules", ERAS)
def test_only_shared_mappings_are_duplicated(rules: str) -> None:
    for flags, errno in ((RW, "EINVAL"), (RW | SHARED | MAYSHARE, None)):
        result = run(rules, [vma(4, 6, flags, file="f", anonymous=False)], "mremap", mremap(4, 0, 1, 3, 20))
        assert result.errno == errno
