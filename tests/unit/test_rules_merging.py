"""Merges, copies and anon_vmas at their borders, each with the kernel's own condition as the source."""

from __future__ import annotations

import pytest

from tests.layouts import NONE, PAGE, RO, RW, kernel, run, vma
from vmatrace.rules.anon_vma import _compatible, populate_writes, write_fault_needs_anon_vma
from vmatrace.rules.copy import copy_vma
from vmatrace.rules.merge_old import _two_anon_vmas
from vmatrace.simulator import (
    Merge,
)
from vmatrace.vma import (
    ACCOUNT,
    HUGETLB,
    MAYBE_GUARD,
    MAYWRITE,
    NOHUGEPAGE,
    SHARED,
    SOFTDIRTY,
    WRITE,
    Vma,
)

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
    high = vma(20, 22)
    under = kernel(vmas=(vma(0, 2), high))
    assert copy_vma(under, high, 2 * PAGE, 2 * PAGE, 2)[1] == high
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
    assert ("both_sides_merge" in result.rules) is (merge.side == "both" and rules in ("6.12", "7.3"))
    other = run(rules, layout, step, args, off=("overcommit",))
    assert (other.effects, list(other.space)) == (result.effects, list(result.space))
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


# --- second offsets, and what sticks ---


def test_the_second_offset_follows_the_survivor() -> None:
    middle, above = vma(2, 4, RO, anon_pgoff=12), vma(4, 6, anon_pgoff=14)
    for start in (2, 3):
        result = run("7.3", [middle, above], "modify", {"start": start * PAGE, "end": 4 * PAGE, "flags": RW})
        last = list(result.space)[-1]
        assert (last.start // PAGE, last.pgoff, last.anon_pgoff) == (start, start, start + 10)
    new = {"start": 2 * PAGE, "end": 4 * PAGE, "pgoff": 2, "flags": RW}
    for layout, expected in (([vma(0, 2, anon_pgoff=0)], 0), ([vma(4, 6, anon_pgoff=4)], 2)):
        assert [each.anon_pgoff for each in run("7.3", layout, "merge_new", new).space] == [expected]


@pytest.mark.parametrize(
    ("flags", "file", "breaks"),
    [(RW, "f", True), (RW | SHARED, "f", False), (RW & ~MAYWRITE, "f", False), (RW & ~MAYWRITE | SHARED, "f", False),
     (RW, None, False)],
)  # fmt: skip
def test_which_mappings_need_the_second_offset(flags: int, file: str | None, breaks: bool) -> None:
    near = vma(0, 2, flags, file=file, anonymous=file is None, anon_pgoff=77)
    for sets, answer in (("7.3", breaks), ("7.2", False)):
        call = {"start": 2 * PAGE, "end": 4 * PAGE, "pgoff": 2, "flags": flags}
        assert (run(sets, [near], "merge_new", call, file=file).count(Merge) == 0) is answer


def test_nothing_sticks_that_nobody_has() -> None:
    layout = [vma(0, 2, NONE), vma(2, 4, RO), vma(4, 6, NONE)]
    for change in ((2, 4), (2, 3), (3, 4)):
        args = {"start": change[0] * PAGE, "end": change[1] * PAGE, "flags": NONE}
        assert {each.flags for each in run("6.19", layout, "modify", args).space} <= {NONE, RO}


@pytest.mark.parametrize("rules", ["6.1", "6.6", "6.12", "7.3"])
def test_offsets_that_continue_over_a_gap_do_not_join(rules: str) -> None:
    change = {"start": 2 * PAGE, "end": 4 * PAGE, "flags": RW}
    for layout in ([vma(0, 1, pgoff=1), vma(2, 4, RO)], [vma(2, 4, RO), vma(5, 6, pgoff=4)]):
        assert run(rules, layout, "modify", change).count(Merge) == 0


def test_before_6_12_only_mmap_asks_the_next_one_first() -> None:
    flags = RW | ACCOUNT
    layout = [vma(0, 2, flags, anon_vma="a"), vma(4, 6, flags, anon_vma="b"), vma(20, 22, flags)]
    moved = run("6.1", layout, "copy_vma", {"vma": 2, "to": 2 * PAGE, "length": 2 * PAGE})
    assert [(each.start // PAGE, each.end // PAGE) for each in moved.space] == [(0, 4), (4, 6), (20, 22)]
    mapped = run("6.1", layout, "mmap", {"addr": 2 * PAGE, "len": 2 * PAGE, "prot": 3, "flags": 0x32})
    assert [(each.start // PAGE, each.end // PAGE) for each in mapped.space] == [(0, 2), (2, 6), (20, 22)]


def test_the_last_bit_of_the_first_word_is_compared() -> None:
    # VM_SEALED was bit 63 at first.
    for rules in ("6.12", "7.3"):
        new = {"start": 2 * PAGE, "end": 4 * PAGE, "pgoff": 2, "flags": RW}
        assert run(rules, [vma(0, 2, RW | 1 << 63)], "merge_new", new).count(Merge) == 0
