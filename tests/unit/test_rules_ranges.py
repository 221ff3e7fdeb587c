"""Ends of ranges, arguments left out, and moves that keep their source: each with the kernel's own condition."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.layouts import ANON_FIXED, NONE, PAGE, PLAIN, RO, RW, kernel, run, vma
from vmatrace.rules.merge_old import next_is_tested_first
from vmatrace.rules.split import PUD_SIZE, _unshares
from vmatrace.simulator import Change, Config, FileGiven, MmState, Policy, Unmodelled
from vmatrace.vma import (
    LOCKED,
    MAYSHARE,
    SEALED_OLD,
    SHARED,
    UFFD_MISSING,
    UFFD_WP,
    Vma,
)

TOP = 1 << 64
NO_MEMORY = replace(PLAIN, config=Config(soft_dirty=False, fail_prealloc=True))


def pages(result_space: object) -> list[tuple[int, int]]:
    """Where the VMAs are, by page."""
    return [(each.start // PAGE, each.end // PAGE) for each in result_space]  # type: ignore[attr-defined]


# --- mmap ---


def test_whether_a_kernel_has_map_above4g_is_not_known() -> None:
    for kind, flag in ((1, 0x80), (2, 0x80), (3, 0)):
        call = {"addr": 0, "len": PAGE, "prot": 1, "flags": kind | flag, "off": 0}
        assert run("6.18", [], "mmap", call, file=FileGiven("f"), picked=64 * PAGE).errno is None
    with pytest.raises(Unmodelled):
        run("6.18", [], "mmap", {"addr": 0, "len": PAGE, "prot": 1, "flags": 0x83, "off": 0}, file=FileGiven("f"))


def test_a_private_file_map_continues_both_page_offsets_or_none() -> None:
    call = {"addr": 4 * PAGE, "len": PAGE, "prot": 1, "flags": 0x12, "off": 104 * PAGE}
    for second, expected in ((0, [(0, 5)]), (50, [(0, 4), (4, 5)])):
        layout = [vma(0, 4, RO, pgoff=100, file="f", anonymous=False, anon_pgoff=second)]
        assert pages(run("7.3", layout, "mmap", call, file=FileGiven("f")).space) == expected


def test_only_mmap_itself_tests_the_next_vma_first() -> None:
    order = {
        caller: next_is_tested_first(kernel("6.1"), caller) for caller in ("mmap", "retry", "copy", "brk", "extend")
    }
    assert order == {"mmap": True, "retry": False, "copy": False, "brk": False, "extend": False}


def test_the_bare_map_of_a_file_has_vm_ops() -> None:
    args = {"start": 0, "end": PAGE, "flags": NONE}
    assert [each.anonymous for each in run("6.18", [], "mmap_region", args, file="f").space] == [False]
    assert [each.anonymous for each in run("6.18", [], "mmap_region", args).space] == [True]


@pytest.mark.parametrize(("rules", "own"), [("6.16", False), ("7.1", False), ("7.2", True), ("6.12", True)])
@pytest.mark.parametrize("there", [False, True])
def test_whose_close_hook_a_merged_vma_has(rules: str, own: bool, there: bool) -> None:
    call = {"addr": 4 * PAGE, "len": PAGE, "prot": 1, "flags": 0x12, "off": 4 * PAGE}
    for asked in (False, True):
        layout = [vma(0, 4, RO, file="f", anonymous=False, close=there, anon_pgoff=0)]
        merged = run(rules, layout, "mmap", call, file=FileGiven("f", prepare=True, close=asked)).space
        assert [(each.end // PAGE, each.close) for each in merged] == [(5, there if own else asked)]


# --- mprotect ---

GROWSDOWN, GROWSUP = 0x0100_0000, 0x0200_0000


@pytest.mark.parametrize(
    ("start", "length", "grows", "expected"),
    [(0, 4, GROWSUP, "ENOMEM"), (2, 2, GROWSUP, "EINVAL"), (0, 4, GROWSDOWN, "EINVAL"), (0, 4, 0, "ENOMEM"),
     (8, 1, GROWSDOWN | GROWSUP, "EINVAL"), (2, 0, GROWSDOWN | GROWSUP, "EINVAL"), (2, 0, 0, None)],
)  # fmt: skip
def test_which_error_the_growing_forms_of_mprotect_give(
    start: int, length: int, grows: int, expected: str | None
) -> None:
    call = {"start": start * PAGE, "len": length * PAGE, "prot": 1 | grows}
    assert run("6.18", [vma(2, 4)], "mprotect", call).errno == expected


# --- mseal ---


def test_a_sealed_vma_is_passed_over() -> None:
    sealed = vma(0, 2, RW | SEALED_OLD)
    result = run("6.16", [sealed, vma(2, 4)], "mseal", {"start": 0, "len": 4 * PAGE, "flags": 0})
    assert (result.errno, [each.flags for each in result.space]) == (None, [RW | SEALED_OLD])
    alone = run("6.16", [sealed], "mseal", {"start": PAGE, "len": PAGE, "flags": 0})
    assert list(alone.space) == [sealed]


def test_sealing_ends_at_a_hole_that_nobody_tested() -> None:
    layout = [vma(0, 1), vma(3, 4)]
    result = run("6.18", layout, "mseal", {"start": 0, "len": 4 * PAGE, "flags": 0}, off=("mseal_no_holes",))
    assert (result.errno, [each.flags == RW for each in result.space]) == (None, [False, True])


# --- prctl, set_mempolicy_home_node ---


def test_prctl_without_its_second_argument() -> None:
    mm = MmState(map_count=1)
    for args in ({"option": 65}, {"option": 65, "arg2": 2}, {"option": 65, "arg2": 1}):
        run("6.18", [vma(0, 1)], "prctl", args, mm=mm)
        assert mm.mdwe is (args.get("arg2") == 1)
    named = run("6.18", [vma(0, 1)], "prctl", {"option": 0x53564D41, "arg3": 0, "arg4": PAGE}, name="x")
    assert [each.name for each in named.space] == ["x"]
    assert (
        run("6.18", [vma(0, 1)], "prctl", {"option": 0x53564D41, "arg2": 1, "arg3": 0, "arg4": PAGE}).errno == "EINVAL"
    )


def test_a_policy_above_the_range_is_no_policy_in_it() -> None:
    layout = [vma(0, 1), vma(8, 9, policy=Policy(2, 0, (0,)))]
    result = run("6.18", layout, "set_mempolicy_home_node", {"start": 0, "len": 2 * PAGE, "home_node": 0})
    assert (result.errno, list(result.space)) == ("ENOENT", layout)


# --- remap_file_pages, shmdt ---


def shared(start: int, end: int, **more: object) -> Vma:
    made = vma(start, end, RW | SHARED | MAYSHARE, file="f", anonymous=False)
    return made._replace(**more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("start", "size", "pgoff", "expected"),
    [(8, 0, 0, "EINVAL"), (8, 1, TOP - 1, "EINVAL"), (8, 2, TOP - 1, "EINVAL"), (8, 5, 0, "EINVAL"), (8, 4, 0, None)],
)
def test_which_ranges_remap_file_pages_takes(start: int, size: int, pgoff: int, expected: str | None) -> None:
    call = {"start": start * PAGE, "size": size * PAGE, "prot": 0, "pgoff": pgoff, "flags": 0}
    result = run("6.18", [shared(8, 12)], "remap_file_pages", call)
    assert result.errno == expected
    locked = run("6.18", [shared(8, 12, flags=RW | SHARED | MAYSHARE | LOCKED)], "remap_file_pages", call)
    assert locked.errno is not None or [each.flags & LOCKED for each in locked.space] == [LOCKED]


def test_a_segment_that_loses_both_its_pieces_may_die() -> None:
    pieces = [shared(8, 10, kind="sysv", pgoff=0), shared(10, 12, kind="sysv", pgoff=2)]
    call = {"start": 8 * PAGE, "size": 4 * PAGE, "prot": 0, "pgoff": 0, "flags": 0}
    with pytest.raises(Unmodelled):
        run("6.18", pieces, "remap_file_pages", call)
    for more in (shared(4, 6, kind="sysv", pgoff=0), shared(20, 21, kind="sysv", pgoff=0)):
        result = run("6.18", sorted([*pieces, more], key=lambda each: each.start), "remap_file_pages", call)
        assert result.errno is None


def test_shmdt_of_what_is_no_segment() -> None:
    for kind, expected in (("zero", "EINVAL"), ("aio", "EINVAL"), ("sysv", None)):
        layout = [shared(8, 9, kind=kind, pgoff=0)]
        assert run("6.18", layout, "shmdt", {"shmaddr": 8 * PAGE}).errno == expected


# --- cuts and bare steps ---


def test_page_tables_are_unshared_wherever_the_pud_lies_in_the_vma() -> None:
    huge = Vma(0, 4 * PUD_SIZE, RW | MAYSHARE, 0, file="f", anonymous=False, huge_size=2 << 20)
    assert [_unshares(huge, i * PUD_SIZE + (2 << 20)) for i in range(4)] == [True] * 4


def test_the_second_page_offset_goes_down_with_the_start() -> None:
    call = {"vma": 0, "start": 2 * PAGE, "end": 6 * PAGE}
    grown = next(iter(run("7.3", [vma(4, 6, pgoff=104, anon_pgoff=4)], "expand", call).space))
    assert (grown.pgoff, grown.anon_pgoff) == (102, 2)


def test_a_vma_expands_over_the_next_one_only_to_its_end() -> None:
    for end, expected in ((8, [(0, 8)]), (4, [(0, 4), (4, 8)])):
        result = run("6.18", [vma(0, 2), vma(4, 8)], "expand", {"vma": 0, "start": 0, "end": end * PAGE})
        assert pages(result.space) == expected
    for end in (6, 10):
        with pytest.raises(Unmodelled):
            run("6.18", [vma(0, 2), vma(4, 8)], "expand", {"vma": 0, "start": 0, "end": end * PAGE})


# --- userfaultfd ---


def watched(start: int, end: int, flags: int = UFFD_MISSING) -> Vma:
    return vma(start, end, RW | flags, uffd="u")


def test_registering_ends_where_the_range_does() -> None:
    result = run("6.18", [vma(16, 17), vma(24, 25)], "uffd_register", {"start": 16 * PAGE, "len": 2 * PAGE, "mode": 1})
    assert [each.uffd for each in result.space] == ["uffd", None]


def test_registering_again_writes_the_mode_whether_its_bit_is_higher_or_lower() -> None:
    for before, mode, after in ((UFFD_WP, 1, UFFD_MISSING), (UFFD_MISSING, 2, UFFD_WP)):
        call = {"start": 16 * PAGE, "len": PAGE, "mode": mode}
        result = run("6.18", [watched(16, 17, before)], "uffd_register", call, uffd="u")
        assert [each.flags for each in result.space] == [RW | after]


def test_what_merges_into_a_registered_vma_changes_no_more() -> None:
    result = run(
        "6.18", [watched(16, 17), vma(17, 18)], "uffd_register", {"start": 17 * PAGE, "len": PAGE, "mode": 1}, uffd="u"
    )
    assert pages(result.space) == [(16, 18)]
    assert result.count(Change) == 0


def test_a_part_of_a_vma_does_not_give_up_quietly() -> None:
    for first, count, expected in ((16, 1, "ENOMEM"), (17, 1, "ENOMEM"), (16, 2, None)):
        call = {"start": first * PAGE, "len": count * PAGE}
        layout = [vma(15, 16), watched(16, 18), vma(18, 19)]
        assert run("6.18", layout, "uffd_unregister", call, NO_MEMORY, uffd="u").errno == expected


@pytest.mark.parametrize("page", [63, 64, 65])
def test_registering_past_the_end_of_the_space(page: int) -> None:
    small = replace(PLAIN, task_size=64 * PAGE)
    result = run("6.18", [vma(62, 64)], "uffd_register", {"start": page * PAGE, "len": PAGE, "mode": 1}, small)
    assert result.errno == (None if page == 63 else "EINVAL")


# --- mremap ---


def move(addr: int, length: int, to: int, flags: int = 7) -> dict[str, int]:
    return {
        "addr": addr * PAGE,
        "old_len": length * PAGE,
        "new_len": length * PAGE,
        "flags": flags,
        "new_addr": to * PAGE,
    }


def test_a_mapping_does_not_move_unasked() -> None:
    call = {"addr": 0, "old_len": PAGE, "new_len": 2 * PAGE}
    assert run("6.18", [vma(0, 4)], "mremap", call, picked=64 * PAGE).errno == "ENOMEM"


@pytest.mark.parametrize(("pgoff", "expected"), [(TOP - 40, None), (TOP - 30, "EINVAL"), (TOP - 29, "EINVAL")])
def test_a_mapping_does_not_grow_past_the_last_page_offset(pgoff: int, expected: str | None) -> None:
    call = {"addr": 16 * PAGE, "old_len": 4 * PAGE, "new_len": 30 * PAGE, "flags": 0}
    layout = [vma(16, 20, pgoff=pgoff, file="f", anonymous=False)]
    assert run("6.18", layout, "mremap", call).errno == expected


def test_a_seal_anywhere_in_the_range_refused_at_first() -> None:
    rules = "6.12-mseal_per_vma"
    call = {"addr": 0, "old_len": 4 * PAGE, "new_len": 4 * PAGE, "flags": 0}
    assert run(rules, [vma(0, 2), vma(2, 4, RW | SEALED_OLD)], "mremap", call).errno == "EPERM"
    assert run("6.12", [vma(0, 2), vma(2, 4, RW | SEALED_OLD)], "mremap", call).errno is None


def test_a_special_mapping_is_not_cut_by_a_move_of_its_end() -> None:
    special = vma(0, 4, RO, anonymous=False, kind="special")
    for first, count, expected in ((0, 4, None), (1, 3, "EINVAL"), (0, 3, "EINVAL")):
        assert run("6.18", [special], "mremap", move(first, count, 16, 3)).errno == expected


UNLOCKED_PIECES = [
    (0, 2, [(0, 2, 0), (2, 4, -1)]),
    (2, 2, [(0, 2, -1), (2, 4, 0)]),
    (1, 2, [(0, 1, -1), (1, 3, 0), (3, 4, -2)]),
]


@pytest.mark.parametrize(("first", "count", "pieces"), UNLOCKED_PIECES)
def test_a_locked_source_that_is_cut_keeps_its_object_in_the_moved_part(
    first: int, count: int, pieces: list[tuple[int, int, int]]
) -> None:
    locked = [vma(0, 4, RW | LOCKED, anon_pgoff=0)]
    space = run("7.3", locked, "mremap", move(first, count, 16)).space
    left = [each for each in space if each.end <= 4 * PAGE]
    assert pages(left) == [(start, end) for start, end, _ in pieces]
    assert [each.obj == 0 for each in left] == [obj == 0 for *_, obj in pieces]


def kept(rules: str, source: Vma, call: dict[str, int], *others: Vma, off: tuple[str, ...] = ()) -> Vma:
    """The source after a move with DONTUNMAP."""
    layout = sorted([source, *others], key=lambda each: each.start)
    result = run(rules, layout, "mremap", call, off=off)
    assert result.errno is None
    found = result.space.at(source.start)
    assert found is not None
    return found


def test_what_offset_a_source_has_that_was_kept() -> None:
    moved = vma(8, 12, pgoff=100, anon_pgoff=100)
    whole = kept("7.3", moved, move(8, 4, 20))
    assert (whole.pgoff, whole.anon_pgoff) == (8, 8)
    before = kept("7.3", moved, move(8, 4, 20), off=("dontunmap_resets_pgoff",))
    assert (before.pgoff, before.anon_pgoff) == (100, 100)
    for first, count in ((8, 2), (10, 2), (9, 2)):
        part = kept("7.3", moved, move(first, count, 20))
        assert (part.pgoff, part.anon_pgoff) == (100, 100)
    # A neighbour of the new place, with a higher number, takes the copy.
    beside = kept("7.3", moved, move(8, 4, 24), vma(20, 24, anon_pgoff=20))
    assert (beside.pgoff, beside.anon_pgoff) == (8, 8)


def test_a_source_that_was_kept_has_no_anon_vma_wherever_its_copy_went() -> None:
    faulted = vma(8, 12, pgoff=24, anon_vma="a")
    assert kept("6.18", faulted, move(8, 4, 40)).anon_vma is None
    assert kept("6.18", faulted, move(8, 4, 24), vma(20, 24, anon_vma="a")).anon_vma is None
    assert kept("6.18", faulted, move(8, 2, 40)).anon_vma == "a"
    assert kept("6.18", faulted, move(10, 2, 40)).anon_vma == "a"


def test_a_copy_that_merged_with_its_source_takes_the_userfaultfd_from_both() -> None:
    source = vma(0, 2, RW | LOCKED | UFFD_MISSING, uffd="u")
    result = run("6.12", [source], "mremap", move(0, 2, 2))
    assert [(each.uffd, each.flags) for each in result.space] == [(None, RW)]
    assert pages(result.space) == [(0, 4)]


def test_the_source_of_a_move_downwards_is_still_the_source() -> None:
    source = vma(16, 18, RW | LOCKED | UFFD_MISSING, uffd="u", anon_vma="a")
    low, high = run("6.12", [source], "mremap", move(16, 2, 4)).space
    assert (low.uffd, low.flags, high.uffd, high.flags) == (None, RW | LOCKED, "u", RW | UFFD_MISSING)


def test_no_flag_is_added_by_a_plain_map() -> None:
    call = {"addr": 0, "len": PAGE, "prot": 0, "flags": ANON_FIXED}
    assert [each.flags for each in run("6.18", [], "mmap", call).space] == [NONE]
