"""Between records and model: inputs go in, what was read is compared, and taken over where it must be."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from vmatrace.replay.evidence import STORE
from vmatrace.replay.intervals import Intervals
from vmatrace.replay.occurrence import EVERYTHING, Occurrence
from vmatrace.replay.state import SpaceState
from vmatrace.replay.stream import Section
from vmatrace.schema import KINDS
from vmatrace.simulator import counters_of

COUNTERS: Final = ("map_count", "total_vm", "data_vm", "stack_vm", "locked_vm")
# Bits of mm->flags (include/linux/mm_types.h): MDWE refuse-exec-gain, and PR_SET_MEMORY_MERGE.
_MMF_HAS_MDWE: Final = 1 << 28
_MMF_VM_MERGE_ANY: Final = 1 << 30


def take_inputs(state: SpaceState, section: Section) -> None:
    """The mm's own fields that are inputs, as they were when the lock was taken."""
    mm = state.mm
    mm.def_flags = section.def_flags
    mm.ksm = section.mm_flags & _MMF_VM_MERGE_ANY != 0
    mm.mdwe = section.mm_flags & _MMF_HAS_MDWE != 0
    if section.start_brk or section.brk_before:
        mm.start_brk = section.start_brk
        mm.brk = section.brk_before


def read_before(state: SpaceState, seen: Occurrence) -> str:
    """Hold what was read when the lock was taken against the model: "" or the difference.

    Afterwards the model has it.
    """
    if not seen.sections:
        return ""
    take_inputs(state, seen.sections[0])
    found = ""
    for lo, hi, flags, vmas in seen.before:
        if flags:
            continue
        if state.unknown and not state.is_known(lo, hi):
            state.learn_interval(lo, hi)
            state.adopt(lo, hi, vmas)
            continue
        problem = state.check(lo, hi, vmas, {}, True)
        if problem:
            found = found or f"before: {problem}"
            state.adopt(lo, hi, vmas)
    return found


def after_differs(state: SpaceState, seen: Occurrence, names: dict[Hashable, Hashable], gains: bool) -> str:
    """Hold what was read when the lock was let go against the model: "" or the first difference.

    ``names``: the objects born in between. ``gains``: what may change outside the write lock may have.
    """
    several = len(seen.sections) > 1
    read = None if several else [(walk.lo, walk.hi) for walk in seen.before]
    for at, (lo, hi, flags, vmas) in enumerate(seen.after):
        if flags or (several and seen.overwritten(at)):
            continue
        if state.unknown and not state.is_known(lo, hi):
            continue
        loose = gains or not any(walk.lo <= lo and hi <= walk.hi for walk in seen.before)
        problem = state.check(lo, hi, vmas, names, loose, read)
        if problem:
            return problem
    return ""


def is_read(state: SpaceState, seen: Occurrence) -> bool:
    """Whether all that the rules changed was read when the lock was let go."""
    walks = [walk for walk in seen.after if not walk.flags]
    if len(walks) == 1:
        lo, hi = walks[0][:2]
        return all(
            lo <= vma.start and vma.end <= hi for old, new in state.space.journal if old != new for vma in (*old, *new)
        )
    read = Intervals()
    for walk in walks:
        read.add(walk.lo, walk.hi)
    for old, new in state.space.journal:
        start = min(vma.start for vma in (*old, *new))
        end = max(vma.end for vma in (*old, *new))
        if old != new and not read.contains(start, end):
            return False
    return True


def counters_differ(state: SpaceState, section: Section) -> str:
    """The mm's counters and break against the model's: "" or the first difference."""
    if not state.counters_known:
        return ""
    mm = state.mm
    if (mm.map_count, mm.total_vm, mm.data_vm, mm.stack_vm, mm.locked_vm) != section[15:20]:
        for name in COUNTERS:
            mine, seen = getattr(mm, name), getattr(section, name)
            if section.kind == KINDS["LAST"] and name == "map_count" and seen == 0:
                continue  # exit_mmap has taken the VMAs away already
            if mine != seen:
                return f"{name} is {seen}, expected {mine}"
    if section.brk and mm.brk != section.brk:
        return f"brk is {section.brk:#x}, expected {mm.brk:#x}"
    return ""


def adopt_after(state: SpaceState, seen: Occurrence) -> None:
    """The model becomes what was seen; where nothing was read after a change it is not known."""
    if seen.events:
        _forget_unread(state, seen)
    unread = seen.unread_from if seen.cut else None
    if unread is not None:
        state.forget_interval(unread, EVERYTHING)
    for lo, hi, flags, vmas in seen.after:
        if not flags:
            state.learn_interval(lo, hi)
            state.adopt(lo, hi, vmas)


def _forget_unread(state: SpaceState, seen: Occurrence) -> None:
    """What changed by the evidence and was not read to the end afterwards is unknown.

    A store tells its range; an object that died without being read again may have been anywhere.
    """
    read = [(walk.lo, walk.hi) for walk in seen.after if not walk.flags]
    if len(read) == len(seen.after) and read and not seen.cut:
        return
    stores = [(start, end) for what, _, start, end in seen.events if what == STORE]
    if len(stores) < len(seen.events) - len(seen.born):
        state.forget()
        return
    for start, end in stores:
        if not any(lo <= start and end <= hi for lo, hi in read):
            state.adopt(start, end, ())
            state.forget_interval(start, end)


def learn_after(state: SpaceState, seen: Occurrence) -> None:
    """What was unknown and has been read is known."""
    if not state.unknown:
        return
    for lo, hi, flags, vmas in seen.after:
        if not flags and not state.is_known(lo, hi):
            state.learn_interval(lo, hi)
            state.adopt(lo, hi, vmas)


def take_counters(state: SpaceState, seen: Occurrence) -> None:
    """The model's counters become those that were seen."""
    if not seen.sections:
        return
    section = seen.sections[-1]
    if section.kind != KINDS["SECTION"] or not section.map_count:
        return
    set_counters(state, section[15:20])
    state.mm.brk = section.brk
    state.counters_known = True


def set_counters(state: SpaceState, values: tuple[int, ...]) -> None:
    """Set map_count, total_vm, data_vm, stack_vm and locked_vm."""
    mm = state.mm
    mm.map_count, mm.total_vm, mm.data_vm, mm.stack_vm, mm.locked_vm = values


def start_from(state: SpaceState, seen: Occurrence, task_size: int, page_size: int) -> str:
    """The rows, complete for the whole space, become the model; "" or what no layout may show."""
    section = seen.sections[0]
    state.forget_interval(0, EVERYTHING)
    adopt_after(state, seen)
    if state.is_known(0, task_size):
        state.learn_interval(0, EVERYTHING)
    mm = state.mm = counters_of(state.space, page_size)
    problem = ""
    if not state.unknown and mm.map_count != section.map_count:
        problem = f"map_count is {section.map_count}, {mm.map_count} VMAs were read"
    elif not state.unknown and mm.total_vm != section.total_vm:
        problem = f"total_vm is {section.total_vm}, the VMAs have {mm.total_vm} pages"
    state.counters_known = True
    set_counters(state, section[15:20])
    take_inputs(state, section)
    mm.brk = section.brk or section.brk_before
    return problem
