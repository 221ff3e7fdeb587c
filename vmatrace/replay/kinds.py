"""What is judged for each kind of operation: call, fork and its copy, exec, exit, fault, and the rest."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from vmatrace.ingest import match as matching
from vmatrace.replay import sync
from vmatrace.replay.doubts import FORKED_UFFD, LOST, UNKNOWN_STATE, excuse
from vmatrace.replay.judge import Judge
from vmatrace.replay.occurrence import EVERYTHING
from vmatrace.replay.requests import GUARD_INSTALL, LIMIT_CALLS, Open, request
from vmatrace.replay.result import INPUT, PASSED, UNDECIDED
from vmatrace.replay.space import TracedSpace
from vmatrace.replay.state import SpaceState
from vmatrace.rules.model import Operation, Unmodelled
from vmatrace.schema import KINDS, OP_CLASSES
from vmatrace.simulator import apply
from vmatrace.syscalls import FAULT_NR

_NO_CAUSE: Final = "no listed system call explains the change"
_OP_FORK: Final = OP_CLASSES["OP_FORK"]
_TAKE_KEYS: Final = ("mmap", "mprotect", "pkey_mprotect")


class Child(NamedTuple):
    """What a fork should give: the child's start, or why it is not known."""

    state: SpaceState | None
    reason: str
    rules: tuple[str, ...]
    #: The write section of the parent in which it was copied.
    seq: int = -1


def judge_call(judge: Judge) -> None:
    """A system call."""
    seen = judge.seen
    call, entry = seen.call, seen.entry
    assert call is not None
    op_class = entry.op_class if entry is not None else ""
    if op_class == "OP_FORK":
        _judge_fork(judge)
    elif op_class == "OP_EXEC":
        judge.skip("no_exec")
    else:
        if entry is not None and op_class in LIMIT_CALLS:
            judge.all.limits.call(entry, call.pid, call.args, call.result)
        state = judge.state
        whole = judge.all.whole and not state.unknown
        asked = request(seen, judge.all.files, judge.all.page, whole, state.execute_pkey)
        if isinstance(asked, Operation) and asked.name in _TAKE_KEYS:
            state.execute_pkey = asked.inputs.get("execute_pkey", 0)
            _allow_key(state, asked, call.result)
        if asked == GUARD_INSTALL:
            start, length = call.args[:2] if seen.name == "madvise" else (0, EVERYTHING)
            state.guards.append((start, start + length))
        judge.judge(asked)


def _allow_key(state: SpaceState, asked: Operation, result: int) -> None:
    """A key that pkey_mprotect took must have been allocated: pkey_alloc is in no record."""
    pkey = asked.args.get("pkey", -1)
    if 0 < pkey < 16 and result == 0:
        state.mm.pkeys |= 1 << pkey


def _judge_fork(judge: Judge) -> None:
    """A fork as the parent sees it: nothing of its own changes; what the child should be is kept."""
    call = judge.seen.call
    assert call is not None
    copies = [section for section in judge.seen.sections if section.op_class == _OP_FORK]
    if not copies:
        judge.skip("thread" if call.result >= 0 else "no_fork")
        return
    problem = judge.before or ("the parent changed in a fork" if judge.seen.events else "")
    problem = problem or sync.counters_differ(judge.state, copies[-1])
    if problem:
        judge.failed(problem)
        return
    child = _copy(judge)
    if call.result > 0:
        judge.all.children[call.tid] = child._replace(seq=copies[-1].seq)
    if child.state is None:
        judge.finish(UNDECIDED, child.reason)
    else:
        judge.finish(PASSED, "", child.rules)


def _copy(judge: Judge) -> Child:
    """The child's start by the rules (dup_mmap)."""
    state = judge.state
    if state.unknown and not len(state.space):
        return Child(None, UNKNOWN_STATE, ())
    try:
        operation = Operation("fork")
        result = apply(
            state.space, operation, judge.all.rules, state.mm, judge.limits(), judge.all.without
        )
    except Unmodelled as error:
        return Child(None, error.reason, ())
    if result.child is None or result.child_mm is None:
        return Child(None, f"a fork fails with {result.errno}", result.rules)
    space = TracedSpace(result.child)
    # The child's own symbols go on below those it inherited.
    space.serial = min(space.serial, state.space.serial)
    child = SpaceState(space, result.child_mm, 0, state.kernel)
    child.unknown = state.unknown.copy()
    child.watch()
    child.counters_known = state.counters_known
    child.inherited = state.credits + state.inherited
    child.guards = list(state.guards)
    if state.taken:
        parents = ((vma, state.space.at(vma.start)) for vma in child.space)
        child.taken = {vma.obj: state.taken[old.obj] for vma, old in parents if old and old.obj in state.taken}
    child.forked_uffd = [vma[:2] for vma in state.space if vma.uffd is not None]
    child.lossy = state.lossy
    child.execute_pkey = state.execute_pkey
    return Child(child, "", result.rules)


def judge_copy(judge: Judge, task: dict[str, Any]) -> None:
    """The child's side of a fork: its counters now, its VMAs when they are read."""
    nobody = Child(None, "the fork of the parent was not seen", ())
    expected = judge.all.children.pop(int(task["parent_tid"]), nobody)
    if judge.all.losses is not None and expected.seq != int(task["parent_seq"]):
        expected = nobody  # of an earlier fork, whose child's record was lost
    counters = tuple(int(task[name]) for name in sync.COUNTERS)
    child = expected.state
    if child is None:
        judge.state.pid = int(task["pid"])
        sync.set_counters(judge.state, counters)
        judge.finish(UNDECIDED, expected.reason)
        return
    child.pid = int(task["pid"])
    judge.state = judge.all.states[judge.seen.columns.space] = child
    child.mm.brk, child.mm.def_flags = int(task["brk"]), int(task["def_flags"])
    mine = tuple(int(getattr(child.mm, name)) for name in sync.COUNTERS)
    sync.set_counters(child, counters)
    known, child.counters_known = child.counters_known, True
    if child.unknown or not known:
        judge.finish(UNDECIDED, UNKNOWN_STATE)
        return
    for name, wanted, found in zip(sync.COUNTERS, mine, counters, strict=True):
        if wanted != found and child.forked_uffd:
            child.forget()
            judge.finish(UNDECIDED, FORKED_UFFD, expected.rules)
            return
        if wanted != found:
            problem = f"the child's {name} is {found}, expected {wanted}"
            judge.failed(problem, str(wanted), expected.rules)
            return
    judge.finish(PASSED, "", expected.rules)


def judge_exec(judge: Judge) -> None:
    """A new program: the layout is an input; what must hold of any layout is checked."""
    judge.state.pid = judge.seen.pid
    call, entry = judge.seen.call, judge.seen.entry
    if call is not None and entry is not None:
        judge.all.limits.call(entry, call.pid, call.args, call.result)
    task_size = judge.all.limits.of(judge.state.pid, 0).task_size
    problem = sync.start_from(judge.state, judge.seen, task_size, judge.all.page)
    if call is not None and judge.all.trace.credentials:
        judge.state.mm.end_data = call.args[4]  # the size of the data segment: start_data stays 0
    if problem:
        judge.failed(problem)
    else:
        judge.finish(INPUT, "exec: the new layout is an input")


def judge_exit(judge: Judge) -> None:
    """The last look: all of the model is held against it."""
    problem = judge.before or sync.counters_differ(judge.state, judge.seen.sections[0])
    if problem:
        judge.failed(problem)
    elif judge.state.unknown:
        judge.finish(UNDECIDED, UNKNOWN_STATE)
    else:
        judge.finish(INPUT, "exit: the last state is as the model says")


def judge_fault(judge: Judge) -> None:
    """A stack grew."""
    start = judge.seen.grown_stack
    if start is None:
        judge.judge(Open("a fault changed something else than one stack"))
    else:
        judge.judge(Operation("expand_stack", {"address": start}))


def judge_other(judge: Judge) -> None:
    """A write section that no call explains: a stack that grew, the end of a userfaultfd, or unknown."""
    if judge.seen.grown_stack is not None:
        judge_fault(judge)
        return
    held = {vma.uffd for vma in judge.state.space if vma.uffd is not None}
    released = judge.seen.released_uffd(held) if held else None
    if released is not None:
        judge.judge(Operation("uffd_release", {}, {"uffd": released}))
    else:
        lost = judge.seen.columns.flags & matching.LOST
        judge.judge(Open(LOST if lost else _NO_CAUSE))


def check_idle(judge: Judge) -> None:
    """A section in which nothing changed, or a look at a living space: only a difference is told."""
    section, state, seen = judge.seen.sections[0], judge.state, judge.seen
    look = section.kind == KINDS["SECTION"] and section.op_class == 0 and section.nr == FAULT_NR
    if look and not state.counters_known and any(walk.lo == 0 for walk in seen.after):
        task_size = judge.all.limits.of(section.pid, 0).task_size
        sync.start_from(state, seen, task_size, judge.all.page)
        return
    problem = judge.before or sync.after_differs(state, seen, {}, True)
    problem = problem or sync.counters_differ(state, section)
    if problem and not excuse(judge):
        head = "seen from outside" if look else "a section that changed nothing"
        judge.failed(f"{head}: {problem}")
        return
    sync.adopt_after(state, seen)
    if problem or not state.counters_known:
        sync.take_counters(state, seen)
