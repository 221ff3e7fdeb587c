"""The parts of replay, each from literal values: what a read may show, evidence, inputs, limits, files."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from vmatrace.kernel import KernelProfile
from vmatrace.replay import evidence
from vmatrace.replay.evidence import ALLOC, DUP, FREED, MERGED, STORE, UNMAPPED, Expected, compare, expect
from vmatrace.replay.files import FileInfo, Files, HookSeen, Unlearnt, access_of, kind_of
from vmatrace.replay.limits import LimitBook
from vmatrace.replay.requests import policy_of
from vmatrace.replay.state import EVERYTHING, KernelFacts, SpaceState, TracedSpace
from vmatrace.replay.tags import untagged
from vmatrace.rules.model import FileGiven, Merge, MmState, Policy
from vmatrace.schema import FILE_BITS
from vmatrace.syscalls import SystemCall, system_calls
from vmatrace.vma import (
    DONTEXPAND,
    IO,
    MAY_ALL,
    MAYBE_GUARD,
    MAYSHARE,
    MAYWRITE,
    MIXEDMAP,
    PFNMAP,
    READ,
    SHARED,
    WRITE,
    Vma,
)

PAGE = 4096
RW = READ | WRITE | MAY_ALL
FACTS = KernelFacts(12, False, False)


def vma(first: int, last: int, obj: Hashable = 1, **fields: object) -> Vma:
    made = Vma(first * PAGE, last * PAGE, RW, first, obj=obj)
    return made._replace(**fields)  # type: ignore[arg-type]


def state(*vmas: Vma) -> SpaceState:
    return SpaceState(TracedSpace(vmas), MmState(), 1, FACTS)


def seen(model: SpaceState, *rows: Vma, gains: bool = True, names: dict[Hashable, Hashable] | None = None) -> str:
    return model.check(0, EVERYTHING, rows, names or {}, gains)


# ---- what a read may show ----


def test_what_is_equal_agrees() -> None:
    assert seen(state(vma(1, 3)), vma(1, 3)) == ""


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (vma(1, 4), "expected"),
        (vma(1, 3, flags=RW & ~WRITE), "flags"),
        (vma(1, 3, pgoff=9), "pgoff"),
        (vma(1, 3, file=4), "another file"),
        (vma(1, 3, 2), "another VMA object"),
        (vma(1, 3, policy=Policy(2)), "policy"),
        (vma(1, 3, uffd=3), "userfaultfd"),
        (vma(1, 3, name="x"), "name"),
        (vma(1, 3, anonymous=False), "anonymous"),
        (vma(1, 3, close=True), "close hook"),
        (vma(1, 3, forked=True), "forked"),
    ],
)
def test_each_difference_is_named(row: Vma, word: str) -> None:
    assert word in seen(state(vma(1, 3)), row)


def test_a_gain_needs_a_fault_event() -> None:
    model = state(vma(1, 3))
    gained = vma(1, 3, anon_vma=7)
    assert "no fault explains" in seen(model, gained)
    model.credits = 1
    assert seen(model, gained) == ""
    assert model.credits == 0


def test_a_gain_is_refused_inside_a_section() -> None:
    model = state(vma(1, 3))
    model.credits = 1
    assert "anon_vma" in seen(model, vma(1, 3, anon_vma=7), gains=False)


def test_an_anon_vma_never_changes_nor_goes() -> None:
    model = state(vma(1, 3, anon_vma=7))
    model.credits = 5
    assert "anon_vma" in seen(model, vma(1, 3, anon_vma=8))
    assert "no anon_vma" in seen(model, vma(1, 3))


def test_a_shared_mapping_gains_none() -> None:
    flags = RW | SHARED | MAYSHARE
    model = state(vma(1, 3, flags=flags, anonymous=False))
    model.credits = 1
    assert "can have none" in seen(model, vma(1, 3, flags=flags, anonymous=False, anon_vma=7))


def test_a_gain_takes_the_neighbours() -> None:
    upper = vma(3, 5, 2, anon_vma=7, flags=RW & ~WRITE)
    for anon_vma, good in ((7, True), (9, False)):
        model = state(vma(1, 3), upper)
        model.credits = 1
        assert (seen(model, vma(1, 3, anon_vma=anon_vma), upper) == "") is good


def test_a_fork_child_may_have_been_touched_before_the_fork() -> None:
    model = state(vma(1, 3, -4))
    model.inherited = 1
    assert seen(model, vma(1, 3, 9, anon_vma=7, forked=True)) == ""
    assert "no fork explains" in seen(state(vma(1, 3)), vma(1, 3, anon_vma=7, forked=True))


def test_guard_flag_only_where_guards_were_installed() -> None:
    row = vma(1, 3, flags=RW | MAYBE_GUARD)
    model = state(vma(1, 3))
    assert "flags" in seen(model, row)
    model.guards.append((PAGE, 2 * PAGE))
    assert seen(model, row) == ""
    assert "flags" in seen(state(row), vma(1, 3))  # never cleared


def test_symbols_are_bound_once() -> None:
    model = state(vma(1, 3, -1, anon_vma=-7), vma(4, 5, -2, anon_vma=-7))
    assert seen(model, vma(1, 3, 11, anon_vma=70), vma(4, 5, 12, anon_vma=70)) == ""
    again = state(vma(1, 3, -1, anon_vma=-7), vma(4, 5, -2, anon_vma=-7))
    assert "anon_vma" in seen(again, vma(1, 3, 11, anon_vma=70), vma(4, 5, 12, anon_vma=71))
    born = state(vma(1, 3, -1))
    assert "object" in seen(born, vma(1, 3, 11), names={-1: 12})


def test_adopting_cuts_what_reaches_out() -> None:
    model = state(vma(1, 9))
    model.adopt(3 * PAGE, 5 * PAGE, [vma(3, 4, 5)])
    assert [(v.start // PAGE, v.end // PAGE) for v in model.space] == [(1, 3), (3, 4), (5, 9)]


def test_rows_that_cannot_be_make_the_interval_unknown() -> None:
    model = state()
    model.adopt(0, 9 * PAGE, [vma(1, 4), vma(3, 5, 2)])
    assert list(model.unknown) == [(0, 9 * PAGE)]
    model.learn_interval(0, 3 * PAGE)
    assert list(model.unknown) == [(3 * PAGE, 9 * PAGE)]
    assert model.is_known(0, 3 * PAGE)
    assert not model.is_known(2 * PAGE, 4 * PAGE)


def test_a_prediction_can_be_taken_back() -> None:
    space = TracedSpace([vma(1, 4)])
    space.begin()
    space.substitute([vma(1, 4)], [vma(1, 2), vma(2, 4, -1)])
    space.commit()
    assert len(space) == 2
    space.take_back()
    assert list(space) == [vma(1, 4)]


# ---- evidence ----


def test_journals_imply_evidence() -> None:
    whole, lower, upper = vma(1, 4), vma(1, 2, -1), vma(2, 4)
    split = expect([((whole,), (lower, upper))])
    assert (split.births, split.stores, split.deaths) == ([-1], [(-1, PAGE, 2 * PAGE)], [])
    merge = expect([((vma(1, 2), vma(2, 4, 2)), (vma(1, 4),))])
    assert (merge.births, merge.stores, merge.deaths) == ([], [(1, PAGE, 4 * PAGE)], [2])
    assert not expect([((whole,), (whole._replace(flags=READ),))]).anything
    assert not expect([((whole,), ()), ((), (whole,))]).anything  # put back: it never left


def _compare(expected: Expected, *events: evidence.Event, merged: tuple[Hashable, ...] = ()) -> str:
    effects = (Merge("left", 1, merged),) if merged else ()
    return compare(expected, events, effects, False, set())[0]


def test_evidence_is_compared_as_a_whole() -> None:
    split = Expected([-1], [(-1, PAGE, 2 * PAGE)], [])
    store = (STORE, 5, PAGE, 2 * PAGE)
    assert _compare(split, (DUP, 5, 0, 0), store) == ""
    assert "born" in _compare(split, store)
    assert "expected" in _compare(split, (DUP, 5, 0, 0))
    assert "expected" in _compare(split, (DUP, 5, 0, 0), (STORE, 5, PAGE, 3 * PAGE))
    assert "range" in _compare(split, (DUP, 5, PAGE, 0), store)


def test_a_death_has_its_cause() -> None:
    gone = Expected([], [], [2])
    assert _compare(gone, (UNMAPPED, 2, 0, 0)) == ""
    assert _compare(gone, (MERGED, 2, 0, 0)) != ""
    assert _compare(gone, (MERGED, 2, 0, 0), merged=(2,)) == ""
    assert _compare(gone, (FREED, 2, 0, 0)) == ""  # no trace of this kernel tells more
    told = {UNMAPPED}
    assert compare(gone, [(FREED, 2, 0, 0)], (), False, told)[0] != ""


def test_what_was_never_stored_never_was() -> None:
    assert _compare(Expected(), (ALLOC, 8, 0, 0), (FREED, 8, 0, 0)) == ""
    # Without deaths: the memory of a VMA that was stored, and given out again for one that never was.
    events = [(DUP, 8, 0, 0), (STORE, 8, PAGE, 2 * PAGE), (ALLOC, 8, 0, 0)]
    cut = Expected([-1], [(-1, PAGE, 2 * PAGE)], [])
    assert compare(cut, events, (), False, set(), deaths=False)[0] == ""
    assert "born" in compare(cut, events, (), False, set())[0]


# ---- inputs ----


def test_policies_are_compared_as_the_kernel_does() -> None:
    local, other = 5 | 0x1FF << 28, 5 | 0x7 << 28 | 0xAB << 44
    assert policy_of(local) == policy_of(other) == Policy(4, 0, 0, 0, 0)
    static = 3 | 0x8000 << 4 | 1 << 28
    assert policy_of(static | 1 << 44) != policy_of(static | 3 << 44)
    assert policy_of(0) is None


def _profile() -> KernelProfile:
    return KernelProfile("x", "x86_64", PAGE, {}, {}, {"max_map_count": 100, "personality": 0})


def entry(name: str) -> SystemCall:
    return next(call for call in system_calls("x86_64").values() if call.name == name)


def test_what_may_be_locked_follows_credentials() -> None:
    book = LimitBook(_profile(), credentials=True)
    assert book.of(1, 0).can_lock
    book.call(entry("setresuid"), 1, (9, 9, 9, 0, 0, 0), -1)
    assert book.of(1, 0).can_lock, "refused"
    book.call(entry("setresuid"), 1, (9, 9, 9, 0, 0, 0), 0)
    book.fork(1, 2)
    assert (book.of(1, 0).can_lock, book.of(2, 0).can_lock) == (False, False)
    book.call(entry("execve"), 2, (0, 0, 0, 0, 512, 1), 0)
    assert (book.of(1, 0).can_lock, book.of(2, 0).can_lock) == (False, True)
    book = LimitBook(_profile(), credentials=False)
    book.call(entry("execve"), 1, (0,) * 6, 0)
    assert book.of(1, 0).can_lock, "an older trace does not say"


def test_limits_follow_calls_and_forks() -> None:
    book = LimitBook(_profile(), credentials=True)
    book.row({"pid": 4711, "name": "RLIMIT_AS", "value": 9 << 20}, frozenset({1, 2}))
    assert book.of(1, 0).rlimit_as == 9 << 20  # of nobody traced: everybody's
    book.call(entry("setrlimit"), 1, (9, 0x1000, 0, 0, 5 << 20, 5 << 20), 0)
    book.fork(1, 2)
    assert (book.of(1, 0).rlimit_as, book.of(2, 0).rlimit_as) == (5 << 20, 5 << 20)
    book.call(entry("prlimit64"), 1, (2, 8, 0x1000, 0, 64, 64), 0)
    assert (book.of(1, 0).rlimit_memlock, book.of(2, 0).rlimit_memlock) != (64, 64)
    assert book.of(2, 0).rlimit_memlock == 64
    book.call(entry("prlimit64"), 1, (0, 9, 0, 0x1000, 1, 1), 0)  # only asks
    assert book.of(1, 0).rlimit_as == 5 << 20
    book.call(entry("personality"), 1, (0x0400000,), 0)
    assert book.of(1, 0).read_implies_exec
    assert book.of(1, 1).task_size < 1 << 32 < book.of(1, 0).task_size
    assert book.of(1, 0).max_map_count == 100


# ---- files ----

REGULAR, DEVICE = 0o100644, 0o020644


def test_kinds_of_files() -> None:
    assert kind_of(None, True, False) == ("", 0)
    assert kind_of(None, False, False) == ("special", 0)
    assert kind_of(FileInfo(1, 0, REGULAR, 0xEF53, 0, "/a"), False, False) == ("", 0)
    assert kind_of(FileInfo(1, 0, REGULAR, 0x01021994, 0, "/memfd:a (deleted)"), False, False) == ("shmem", 0)
    assert kind_of(FileInfo(1, 0, REGULAR, 0x01021994, 0, "/SYSV00 (deleted)"), False, True) == ("sysv", 0)
    assert kind_of(FileInfo(1, 0, REGULAR, 0x01021994, 0, "/dev/zero (deleted)"), False, False) == ("shmem_anon", 0)


def test_a_driver_is_learnt_from_another_mapping() -> None:
    files = Files()
    bits = FILE_BITS["FILE_READ"] | FILE_BITS["FILE_WRITE"] | FILE_BITS["FILE_MMAP"]
    files.known[7] = FileInfo(7, 0, DEVICE, 0x9041934, bits, "/dev/thing")
    wanted = READ | SHARED | MAY_ALL | MAYSHARE
    access = access_of(wanted)
    assert isinstance(files.given(7, access, True), Unlearnt)
    files.learn(vma(1, 3, file=7, flags=(wanted | MIXEDMAP | DONTEXPAND) & ~MAYWRITE, anonymous=False), wanted)
    given = files.given(7, access, True)
    assert isinstance(given, FileGiven)
    assert (given.set_flags, given.clear_flags) == (MIXEDMAP | DONTEXPAND, MAYWRITE)
    assert isinstance(files.given(7, access | WRITE, True), Unlearnt)
    assert files.doubt(7, access)
    assert isinstance(files.given(7, access, True), str)


def test_ordinary_files_set_nothing() -> None:
    files = Files()
    files.known[7] = FileInfo(7, 0, REGULAR, 0xEF53, FILE_BITS["FILE_READ"], "/a")
    given = files.given(7, READ | SHARED, True)
    assert isinstance(given, FileGiven)
    assert not given.set_flags | given.clear_flags
    assert (given.readable, given.writable) == (True, False)


def test_a_hook_that_was_seen_is_an_input() -> None:
    files = Files()
    files.known[7] = FileInfo(7, 0, DEVICE, 0x9041934, FILE_BITS["FILE_READ"] | FILE_BITS["FILE_WRITE"], "/dev/thing")
    without_ops = files.given(7, READ, True, HookSeen(IO | PFNMAP, 0, False, False))
    assert isinstance(without_ops, FileGiven)
    assert (without_ops.set_flags, without_ops.anonymous) == (IO | PFNMAP, True)
    # Whether vm_ops have a close hook no record says: another mapping has to show it.
    assert isinstance(files.given(7, READ, True, HookSeen(IO, 0, True, False)), Unlearnt)
    assert isinstance(files.given(7, READ, True, HookSeen(WRITE, 0, False, False)), str)


def test_a_file_behind_a_stacked_one_is_not_the_file_that_was_given() -> None:
    files = Files()
    bits = FILE_BITS["FILE_READ"] | FILE_BITS["FILE_STACKED"] | FILE_BITS["FILE_MMAP_PREPARE"]
    files.known[7] = FileInfo(7, 0, REGULAR, 0xEF53, bits, "/a")
    given = files.given(7, READ, True)
    assert isinstance(given, FileGiven)
    assert given.identity != 7
    assert (given.kept, given.prepare) == (7, False)


@pytest.mark.parametrize(
    ("arch", "name", "start", "taken"),
    [
        ("aarch64", "munmap", 0x4000_0000_0000_0000, 0),
        ("aarch64", "munmap", 0x4100_0000_0001_0000, 0x10000),
        ("aarch64", "munmap", 0x4180_0000_0001_0000, 0x4180_0000_0001_0000),
        ("aarch64", "mmap", 0x4000_0000_0000_0000, 0x4000_0000_0000_0000),
        ("x86_64", "munmap", 0x4000_0000_0000_0000, 0x4000_0000_0000_0000),
    ],
)
def test_tags_of_arm64_are_taken_off_where_the_kernel_does(arch: str, name: str, start: int, taken: int) -> None:
    assert untagged(arch, name, {"addr": start, "len": 1}) == {"addr": taken, "len": 1}
