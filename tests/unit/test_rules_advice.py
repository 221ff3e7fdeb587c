"""madvise, mbind, mlock and KSM at their borders, each with the kernel's own condition as the source."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.layouts import NONE, PAGE, PLAIN, RO, RW, run, vma
from vmatrace.simulator import (
    Config,
    Limits,
    MmState,
    Policy,
)
from vmatrace.vma import (
    DONTEXPAND,
    HUGETLB,
    IO,
    LOCKED,
    MAYBE_GUARD,
    MAYSHARE,
    MERGEABLE,
    PFNMAP,
    PKEY_SHIFT,
    SEALED,
    SEALED_OLD,
    SHARED,
    UFFD_MISSING,
    WRITE,
    Vma,
    parse_flags,
)

# --- KSM, huge pages ---


def test_a_mapping_unfit_for_ksm_gains_nothing() -> None:
    opted_in = MmState(ksm=True)
    for rules in ("6.6", "6.18"):
        for flags, expected in ((0x32, NONE | MERGEABLE), (0x31, NONE | SHARED | MAYSHARE)):
            call = {"addr": 0, "len": PAGE, "prot": 0, "flags": flags}
            made = next(iter(run(rules, [], "mmap", call, mm=opted_in.copy()).space))
            assert made.flags == expected


@pytest.mark.parametrize("advice", [12, 13, 14, 15, 25, 10])
def test_advice_of_what_is_not_configured(advice: int) -> None:
    # mm/madvise.c, madvise_behavior_valid.
    call = {"start": 0, "len_in": PAGE, "behavior": advice}
    for ksm, thp in ((True, True), (False, True), (True, False)):
        limits = Limits(config=Config(soft_dirty=False, ksm=ksm, thp=thp))
        known = {12: ksm, 13: ksm, 14: thp, 15: thp, 25: thp}.get(advice, True)
        assert run("6.18", [vma(0, 2)], "madvise", call, limits).errno == (None if known else "EINVAL")


def test_populating_may_fail_for_reasons_that_no_rule_sees() -> None:
    doubtful = [vma(0, 2, RW | MAYBE_GUARD), vma(0, 2, RW | UFFD_MISSING, uffd="u"),
                vma(0, 2, RW | 1 << PKEY_SHIFT), vma(0, 2, file="f", anonymous=False)]  # fmt: skip
    calls = (("madvise", {"start": 0, "len_in": PAGE, "behavior": 23}), ("mlock", {"start": 0, "len": PAGE}))
    for call, args in calls:
        doubts = [
            run("6.19", [each], call, args).maybe_errnos & {"ENOMEM", "EFAULT"} for each in [vma(0, 2), *doubtful]
        ]
        assert [bool(each) for each in doubts] == [False, True, True, True, True]
    # Before guard regions had a flag any VMA with an anon_vma may hide some.
    for rules, doubt in (("6.12", False), ("6.18", True), ("6.19", False)):
        result = run(rules, [vma(0, 2, anon_vma="a")], "mlock", {"start": 0, "len": PAGE})
        assert ("ENOMEM" in result.maybe_errnos) is doubt
        assert "ENOMEM" not in run(rules, [vma(0, 2)], "mlock", {"start": 0, "len": PAGE}).maybe_errnos


# --- policies: loops that end ---

BIND, OTHER = Policy(2, nodes=1), Policy(3, nodes=1)


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("end", [1, 2, 3, 4, 5, 6, 8])
def test_a_default_policy_reaches_its_range_and_no_more(start: int, end: int) -> None:
    layout = [vma(0, 2), vma(4, 6, policy=BIND), vma(8, 12, policy=OTHER), vma(20, 22, policy=BIND)]
    if end <= start:
        return
    call = {"start": start * PAGE, "len": (end - start) * PAGE, "mode": 0, "flags": 0}
    result = run("6.18", layout, "mbind", call, policy=None)
    found = result.space.overlapping(start * PAGE, end * PAGE)
    assert result.errno == (None if found else "EFAULT")
    assert {each.policy for each in found} <= {None}
    assert all(each.start < each.end for each in result.space)
    beyond = [each for each in result.space if each.start >= end * PAGE]
    assert sum(each.end - each.start for each in beyond if each.policy is not None) == (
        sum(each.end - max(each.start, end * PAGE) for each in layout[1:] if each.end > end * PAGE)
    )


@pytest.mark.parametrize(("start", "end", "homes"), [
    (0, 2, "ENOENT"), (0, 4, "ENOENT"), (0, 6, [(4, 6)]), (3, 5, [(4, 5)]), (4, 6, [(4, 6)]), (5, 8, [(5, 6)]),
    (4, 9, "EOPNOTSUPP"), (6, 8, "ENOENT"), (16, 18, [(16, 18)]), (14, 24, [(16, 24)]), (0, 20, "EOPNOTSUPP"),
])  # fmt: skip
def test_a_home_node_reaches_its_range_and_no_more(start: int, end: int, homes: object) -> None:
    bound = [vma(first, last, policy=BIND) for first, last in ((4, 6), (16, 32), (40, 42))]
    layout = [vma(0, 2), vma(8, 12, policy=OTHER), *bound]
    call = {"start": start * PAGE, "len": (end - start) * PAGE, "home_node": 0}
    result = run("6.18", layout, "set_mempolicy_home_node", call)
    at_home = [each for each in result.space if isinstance(each.policy, Policy) and each.policy.home_node == 0]
    if isinstance(homes, list):
        assert (result.errno, [(each.start // PAGE, each.end // PAGE) for each in at_home]) == (None, homes)
        again = run("6.18", list(result.space), "set_mempolicy_home_node", {**call, "len": PAGE})
        assert again.space == result.space or start * PAGE not in {each.start for each in at_home}
    else:
        assert result.errno == homes


# --- mlock ---


def test_mlock_rounds_to_pages_and_wraps() -> None:
    for start, length, locked in ((5, 1, [(0, 1)]), (PAGE + 1, PAGE - 1, [(1, 2)]), (PAGE + 1, PAGE, [(1, 3)]),
                                  (PAGE - 1, 2, [(0, 2)]), (0, 1, [(0, 1)])):  # fmt: skip
        result = run("6.18", [vma(0, 4)], "mlock", {"start": start, "len": length})
        pages = [(each.start // PAGE, each.end // PAGE) for each in result.space if each.flags & LOCKED]
        assert pages == locked
        assert result.mm.locked_vm == locked[0][1] - locked[0][0]
    # PAGE_ALIGN of the length wraps to 0, which is no range at all.
    assert run("6.18", [vma(0, 4)], "mlock", {"start": PAGE, "len": (1 << 64) - 1}).errno is None
    assert run("6.18", [vma(0, 4)], "mlock", {"start": 0, "len": 1 << 63}).errno == "ENOMEM"


def test_mlockall_begins_with_the_first_page() -> None:
    result = run("6.18", [vma(0, 1), vma(1, 2, RO)], "mlockall", {"flags": 1})
    assert [each.flags & LOCKED for each in result.space] == [LOCKED, LOCKED]
    future = run("6.18", [vma(0, 1, RW | LOCKED)], "mlockall", {"flags": 2})
    assert [each.flags & LOCKED for each in future.space] == [LOCKED]
    assert future.mm.def_flags == LOCKED
    both = run("6.18", [vma(0, 1)], "mlockall", {"flags": 3})
    assert [each.flags & LOCKED for each in both.space] == [LOCKED]


@pytest.mark.parametrize(
    ("flags", "can", "total", "errno"),
    [
        (1, False, 7, None),
        (1, False, 8, None),
        (1, False, 9, "ENOMEM"),
        (2, False, 9, None),
        (1, True, 9, None),
        (3, False, 9, "ENOMEM"),
    ],
)
def test_mlockall_within_the_limit(flags: int, can: bool, total: int, errno: str | None) -> None:
    limits = replace(PLAIN, can_lock=can, rlimit_memlock=8 * PAGE)
    assert run("6.18", [vma(0, 1)], "mlockall", {"flags": flags}, limits, MmState(total_vm=total)).errno == errno


# --- madvise ---


@pytest.mark.parametrize(
    ("start", "end", "errno", "filled"),
    [(0, 2, None, [0]), (0, 4, "ENOMEM", [0]), (3, 6, "ENOMEM", [4]), (2, 4, "ENOMEM", []), (4, 6, None, [4]),
     (3, 8, "ENOMEM", [4]), (12, 14, "ENOMEM", []), (1, 5, "ENOMEM", [0]), (1, 2, None, [0])],
)  # fmt: skip
@pytest.mark.parametrize("rules", ["6.1", "6.18"])
def test_populating_stops_at_a_gap(rules: str, start: int, end: int, errno: str | None, filled: list[int]) -> None:
    # Before v6.12 a gap at the head is passed over and reported at the end.
    layout = [vma(0, 2), vma(4, 6), vma(8, 10, file="f", anonymous=False)]
    call = {"start": start * PAGE, "len_in": (end - start) * PAGE, "behavior": 23}
    result = run(rules, layout, "madvise", call)
    late = rules == "6.1" and start not in (0, 1)
    faulted = [each.start // PAGE for each in result.space if each.anon_vma is not None]
    assert result.errno == errno
    assert faulted == (filled if late or start in (0, 1, 4) else [])


def test_populating_needs_write_access() -> None:
    for flags, errno in ((RO, "EINVAL"), (RW | IO, "EINVAL"), (RW | PFNMAP, "EINVAL"), (RW, None), (RW | SHARED, None)):
        layout = [vma(0, 2, flags)]
        assert run("6.18", layout, "madvise", {"start": 0, "len_in": PAGE, "behavior": 23}).errno == errno


SEALED_RO = RO | SEALED


@pytest.mark.parametrize(
    ("one", "before", "after"),
    [
        (vma(0, 2, SEALED_RO), "EPERM", "EPERM"),
        (vma(0, 2, SEALED_RO | WRITE), None, None),
        (vma(0, 2, SEALED_RO, file="z", anonymous=True), None, "EPERM"),
        (vma(0, 2, SEALED_RO, file="f", anonymous=False), None, None),
        (vma(0, 2, SEALED_RO | SHARED, file="f", anonymous=False), None, None),
        (vma(0, 2, SEALED_RO | SHARED, anonymous=False), None, None),
        (vma(0, 2, SEALED_RO, anonymous=False, close=True), "EPERM", None),
    ],
)
def test_what_a_seal_keeps_from_being_thrown_away(one: Vma, before: str | None, after: str | None) -> None:
    # 2dc72a5acf3a (in v6.17) asks for vm_ops where the file was asked for.
    call = {"start": 0, "len_in": PAGE, "behavior": 10}
    assert run("6.18-seal_discard_by_ops", [one], "madvise", call).errno == before
    assert run("6.18", [one], "madvise", call).errno == after
    assert run("6.18", [one], "madvise", {**call, "behavior": 16}).errno is None


def test_the_first_guard_regions_were_for_writable_anonymous_memory() -> None:
    call = {"start": 0, "len_in": PAGE, "behavior": 102}
    first = "6.12+guard_regions"
    readonly = RO & ~parse_flags(["MAYWRITE"])
    for layout, at_first in ((vma(0, 2), None), (vma(0, 2, RO), None), (vma(0, 2, readonly), "EINVAL"),
                             (vma(0, 2, file="f", anonymous=False), "EINVAL"),
                             (vma(0, 2, readonly, file="f", anonymous=False), "EINVAL")):  # fmt: skip
        assert run(first, [layout], "madvise", call).errno == at_first
        assert run("6.18", [layout], "madvise", call).errno is None


@pytest.mark.parametrize("advice", [0, 1, 2, 10, 11, 14, 15, 16, 17, 18, 19])
def test_only_some_advice_is_refused_on_special_memory(advice: int) -> None:
    call = {"start": 0, "len_in": PAGE, "behavior": advice}
    refused = {
        vma(0, 2): set[int](), vma(0, 2, RW | IO): {11, 17}, vma(0, 2, RW | DONTEXPAND): {17},
        vma(0, 2, RW | DONTEXPAND | HUGETLB): set(), vma(0, 2, file="f", anonymous=False): {18},
        vma(0, 2, RW | SHARED, file="f", anonymous=False): {18},
    }  # fmt: skip
    for layout, advices in refused.items():
        assert run("6.18", [layout], "madvise", call).errno == ("EINVAL" if advice in advices else None)


def test_seals_come_first_for_what_discards_only() -> None:
    # can_modify_mm_madv of v6.10 and v6.11.
    era = "6.12-mseal_per_vma-vmg"
    layout = [vma(0, 2, RO), vma(2, 4, RO | SEALED_OLD)]
    for advice, errno in ((10, "EPERM"), (16, None)):
        result = run(era, layout, "madvise", {"start": 0, "len_in": 4 * PAGE, "behavior": advice})
        assert (result.errno, result.effects == ()) == (errno, errno is not None)


# --- mlock's limit ---


@pytest.mark.parametrize(("pages", "errno"), [(3, None), (4, None), (5, "ENOMEM"), (6, "ENOMEM")])
def test_mlock_within_the_limit(pages: int, errno: str | None) -> None:
    limits = replace(PLAIN, can_lock=False, rlimit_memlock=4 * PAGE)
    assert run("6.18", [vma(0, 8)], "mlock", {"start": 0, "len": pages * PAGE}, limits).errno == errno
    counted = run("6.18", [vma(0, 8)], "mlock", {"start": 0, "len": (pages - 2) * PAGE}, limits, MmState(locked_vm=2))
    assert counted.errno == errno


def test_no_length_is_nothing_to_populate() -> None:
    for rules in ("6.1", "6.18"):
        for start in (0, 3):
            call = {"start": start * PAGE, "len_in": 0, "behavior": 23}
            assert run(rules, [vma(4, 6)], "madvise", call).errno is None


@pytest.mark.parametrize("kind", ["", "shmem", "sysv", "zero", "special", "shmem_anon"])
def test_which_files_can_be_named(kind: str) -> None:
    # vma_is_anon_shmem: shmem without a link; a segment has vm_ops of its own.
    call = {"option": 0x53564D41, "arg2": 0, "arg3": 0, "arg4": PAGE}
    layout = [vma(0, 2, RW | SHARED, file="f", anonymous=False, kind=kind)]
    errno = run("6.18", layout, "prctl", call, name="x").errno
    assert errno == (None if kind == "shmem_anon" else "EBADF")


@pytest.mark.parametrize(("mode", "errno"), [(5, None), (6, None), (7, "EINVAL"), (0x8006, None), (0x8007, "EINVAL")])
def test_modes_of_policies(mode: int, errno: str | None) -> None:
    call = {"start": 0, "len": PAGE, "mode": mode, "flags": 0}
    assert run("6.18", [vma(0, 2)], "mbind", call, policy=None).errno == errno


def test_a_change_that_begins_in_a_gap_still_merges() -> None:
    layout = [vma(4, 6, policy=BIND), vma(6, 8)]
    call = {"start": 3 * PAGE, "len": 3 * PAGE, "mode": 0, "flags": 0}
    assert [
        (each.start // PAGE, each.end // PAGE) for each in run("6.18", layout, "mbind", call, policy=None).space
    ] == ([(4, 8)])
    layout = [vma(4, 6, policy=BIND), vma(6, 8, policy=BIND._replace(home_node=0))]
    call = {"start": 3 * PAGE, "len": 3 * PAGE, "home_node": 0}
    result = run("6.18", layout, "set_mempolicy_home_node", call)
    assert [(each.start // PAGE, each.end // PAGE) for each in result.space] == [(4, 8)]


def test_the_end_of_a_range_does_not_wrap() -> None:
    for length, errno in (
        ((1 << 64) - PAGE, "EINVAL"),
        ((1 << 64) - 2 * PAGE, "EINVAL"),
        ((1 << 64) - 3 * PAGE, "ENOENT"),
    ):
        call = {"start": 2 * PAGE, "len": length, "home_node": 0}
        assert run("6.18", [vma(2, 4)], "set_mempolicy_home_node", call).errno == errno


def test_mlockall_goes_on_where_memory_is_short() -> None:
    broke = Limits(config=Config(soft_dirty=False, fail_prealloc=True))
    result = run("6.18", [vma(0, 2), vma(2, 4, RW | LOCKED), vma(8, 9)], "mlockall", {"flags": 1}, broke)
    assert (result.errno, [bool(each.flags & LOCKED) for each in result.space]) == (None, [False, True, True])
