"""Whatever is done in whatever order under whatever rules: the space stays a space, and the counts add up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vmatrace.kernel import NAMED, rule_set
from vmatrace.rules.constants import MADV
from vmatrace.simulator import (
    AddressSpace,
    Config,
    Copy,
    FileGiven,
    Limits,
    Merge,
    MmState,
    New,
    Operation,
    Policy,
    Result,
    Split,
    Unmap,
    Unmodelled,
    apply,
    counters_of,
)
from vmatrace.vma import Vma

PAGE = 4096
BASE = 0x100000
SPAN = 24

addresses = st.integers(0, SPAN - 1).map(lambda page: BASE + page * PAGE)
lengths = st.integers(1, 6).map(lambda count: count * PAGE)
prots = st.sampled_from([0, 1, 3, 3, 3, 5, 7])
rule_names = st.sampled_from([*NAMED, "6.18+copied_from", "6.18+copied_from+sticky_flags+guard_av_anon_only"])
FILES = (
    None,
    None,
    FileGiven("f"),
    FileGiven("g", prepare=True),
    FileGiven("z", anonymous=True, kind="zero"),
)


@st.composite
def mmaps(draw: st.DrawFn) -> Operation:
    given_file = draw(st.sampled_from(FILES))
    flags = (
        draw(st.sampled_from([1, 2, 2, 2]))
        | 0x10
        | draw(st.sampled_from([0, 0, 0x2000, 0x4000, 0x20000, 0x100]))
    )
    start = draw(addresses)
    args = {"addr": start, "len": draw(lengths), "prot": draw(prots), "off": start - BASE}
    if given_file is None:
        return Operation("mmap", {**args, "flags": flags | 0x20})
    return Operation("mmap", {**args, "flags": flags}, {"file": given_file})


def ranged(name: str, *keys: str, **more: st.SearchStrategy[int]) -> st.SearchStrategy[Operation]:
    fields = {keys[0]: addresses, keys[1]: lengths, **more}
    return st.fixed_dictionaries(fields).map(lambda args: Operation(name, args))


@st.composite
def moves(draw: st.DrawFn) -> Operation:
    length = draw(lengths)
    flags = draw(st.sampled_from([0, 0, 3, 3, 7]))
    new_len = length if flags == 7 else draw(st.sampled_from([length, length, PAGE, 4 * PAGE]))
    return Operation(
        "mremap",
        {
            "addr": draw(addresses),
            "old_len": length,
            "new_len": new_len,
            "flags": flags,
            "new_addr": draw(addresses),
        },
    )


operations = st.one_of(
    mmaps(),
    mmaps(),
    ranged("munmap", "addr", "len"),
    ranged("mprotect", "start", "len", prot=prots),
    ranged("madvise", "start", "len_in", behavior=st.sampled_from(sorted(MADV.values()))),
    ranged("mlock", "start", "len"),
    ranged("munlock", "start", "len"),
    ranged("mseal", "start", "len"),
    ranged("uffd_register", "start", "len", mode=st.integers(1, 3)),
    ranged("uffd_unregister", "start", "len"),
    ranged("mbind", "start", "len", mode=st.just(2)).map(
        lambda each: Operation("mbind", each.args, {"policy": Policy(2, nodes=1)})
    ),
    st.builds(lambda flags: Operation("mlockall", {"flags": flags}), st.integers(1, 7)),
    st.just(Operation("munlockall")),
    st.builds(lambda address: Operation("fault", {"address": address}), addresses),
    st.builds(lambda brk: Operation("brk", {"brk": brk}), addresses),
    moves(),
)

LIMITS = Limits(mmap_min_addr=0, max_map_count=40, config=Config(soft_dirty=False))


def check_space(space: AddressSpace) -> None:
    last: Vma | None = None
    for vma in space:
        assert vma.start < vma.end
        assert not vma.start % PAGE
        assert not vma.end % PAGE
        assert last is None or last.end <= vma.start
        assert vma.anon_vma is not None or not vma.forked
        last = vma
    objects = [vma.obj for vma in space]
    assert len(set(objects)) == len(objects)


def check_effects(result: Result, before: int) -> None:
    victims = sum(len(effect.victims) for effect in result.effects if isinstance(effect, Merge))
    born = result.count(New) + result.count(Split) + (result.count(Copy) if result.child is None else 0)
    assert len(result.space) - before == born - result.count(Unmap) - victims


@given(rule_names, st.lists(operations, max_size=30))
@settings(max_examples=150, deadline=None)
def test_invariants_hold_after_any_program(rules: str, program: list[Operation]) -> None:
    chosen = rule_set(rules)
    space, mm = AddressSpace(), MmState(start_brk=BASE, brk=BASE)
    for operation in program:
        before = len(space)
        try:
            result = apply(space, operation, chosen, mm, LIMITS)
        except Unmodelled:
            assert len(space) == before
            continue
        check_space(space)
        check_effects(result, before)
        counted = counters_of(space)
        assert mm.map_count == len(space)
        assert (mm.total_vm, mm.stack_vm) == (counted.total_vm, counted.stack_vm)
        assert mm.locked_vm >= counted.locked_vm  # DONTUNMAP leaks some


@given(rule_names, st.lists(operations, max_size=20))
@settings(max_examples=80, deadline=None)
def test_a_run_is_a_function_of_its_input(rules: str, program: list[Operation]) -> None:
    spaces = []
    for _ in range(2):
        space, mm = AddressSpace(), MmState(start_brk=BASE, brk=BASE)
        for operation in program:
            try:
                apply(space, operation, rule_set(rules), mm, LIMITS)
            except Unmodelled:
                continue
        spaces.append((list(space), mm))
    assert spaces[0] == spaces[1]


@given(rule_names, st.lists(operations, max_size=25))
@settings(max_examples=80, deadline=None)
def test_fork_copies_and_leaves_the_parent_alone(rules: str, program: list[Operation]) -> None:
    chosen = rule_set(rules)
    space, mm = AddressSpace(), MmState(start_brk=BASE, brk=BASE)
    for operation in program:
        try:
            apply(space, operation, chosen, mm, LIMITS)
        except Unmodelled:
            continue
    parent, counters = list(space), mm.copy()
    result = apply(space, Operation("fork"), chosen, mm, LIMITS)
    assert (list(space), mm) == (parent, counters)
    assert result.child is not None
    assert result.child_mm is not None
    check_space(result.child)
    assert result.child_mm.map_count == len(result.child)
    assert result.child_mm.locked_vm == 0
    kept = {(vma.start, vma.end, vma.pgoff) for vma in result.child}
    assert kept <= {(vma.start, vma.end, vma.pgoff) for vma in parent}


@given(st.lists(operations, max_size=25), operations)
@settings(max_examples=80, deadline=None)
def test_an_unmodelled_operation_changes_nothing(program: list[Operation], last: Operation) -> None:
    space, mm = AddressSpace(), MmState(start_brk=BASE, brk=BASE)
    for operation in [*program, last]:
        before, counters = list(space), mm.copy()
        try:
            apply(space, operation, rule_set("7.3"), mm, LIMITS)
        except Unmodelled:
            assert (list(space), mm) == (before, counters)
