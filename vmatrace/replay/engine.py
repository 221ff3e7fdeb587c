"""Walks a trace through the simulator: each operation is predicted, compared with what was seen, and gets a verdict."""

from __future__ import annotations

import errno as errno_names
from collections.abc import Collection, Hashable, Sequence
from typing import Any, Final

from vmatrace.ingest import match as matching
from vmatrace.ingest.effects import EFFECTS
from vmatrace.ingest.trace import Trace
from vmatrace.kernel import KernelProfile, RuleSet, rule_set
from vmatrace.replay import evidence as second
from vmatrace.replay.files import Files, info_of, kind_of
from vmatrace.replay.limits import LimitBook
from vmatrace.replay.requests import SKIPPED_KINDS, Open, Request, Seen, Skip, Wrong, policy_of, request
from vmatrace.replay.result import FAILED, INPUT, PASSED, SKIPPED, UNDECIDED, ReplayResult, Verdict
from vmatrace.replay.state import EVERYTHING, SpaceState, TracedSpace
from vmatrace.replay.stream import (
    FAULT, FILE, LIMIT, OPERATION, SECTION, TASK, Call, Cover, Reader, Row, Section, items,
)  # fmt: skip
from vmatrace.rules.model import ImpossibleInput, Limits, MmState, New, Operation, Result, Unmodelled
from vmatrace.schema import KINDS, OP_CLASSES, ROW_BITS
from vmatrace.simulator import RULES, apply, check_rule_ids, counters_of
from vmatrace.syscalls import call_name, find_call
from vmatrace.vma import GROWSDOWN, MAYBE_GUARD, Vma

_ANONYMOUS: Final = ROW_BITS["ROW_ANONYMOUS"]
_CLOSE: Final = ROW_BITS["ROW_CLOSE"]
_FORKED: Final = ROW_BITS["ROW_FORKED"]
_OP_FORK: Final = OP_CLASSES["OP_FORK"]
_OP_LIMITS: Final = OP_CLASSES["OP_LIMITS"]
# Bits of mm->flags (include/linux/sched/coredump.h): MDWE refuse-exec-gain, and PR_SET_MEMORY_MERGE.
_MMF_HAS_MDWE: Final = 1 << 28
_MMF_VM_MERGE_ANY: Final = 1 << 30

_LOST: Final = "records were lost just before"
_INTERLEAVED: Final = "another thread's write section lies inside the operation"
_UNKNOWN_STATE: Final = "the address space is not known here"
_NO_CALL: Final = "no listed system call explains the change"
_MERGE_RULES: Final = frozenset(
    id for id, rule in RULES.items() if rule.module in ("vmatrace.rules.mergeable", "vmatrace.rules.merge")
)


class Replayer:
    """One replay of one trace. `run` is the way in."""

    def __init__(self, trace: Trace, rules: RuleSet, without: Collection[str] = ()) -> None:
        self.trace = trace
        self.rules = rules
        self.without = frozenset(without)
        self.profile = KernelProfile.from_dict(trace.kernel)
        self.arch = self.profile.arch
        self.page = self.profile.page_size
        self.shift = self.page.bit_length() - 1
        self.limits = LimitBook(self.profile)
        self.files = Files()
        self.states: dict[int, SpaceState] = {}
        self.children: dict[int, tuple[SpaceState | None, str, tuple[str, ...]]] = {}
        self.verdicts: list[Verdict] = []
        self.reader = Reader(trace.file, trace.records)
        self.pids = frozenset(trace.pids())
        self.lost = set(trace.lost_sections.tolist())
        self.merges_refused = 0
        #: Kinds of evidence that this trace is known to tell apart.
        self.told: set[int] = set()
        self.lossy = trace.lost_records > 0
        self.tgids: dict[int, int] = {}

    # ---- the walk ----

    def run(self) -> ReplayResult:
        """Judge every operation of the trace."""
        records, operations = self.trace.records, self.trace.operations
        for what, number in items(records, operations):
            if what == OPERATION:
                self._operation(number)
            elif what == FAULT:
                state = self.states.get(int(records.faults["space"][number]))
                if state is not None:
                    state.credits += 1
            elif what == FILE:
                info = info_of(records.files[number])
                self.files.known[info.identity] = info
            elif what == TASK:
                self._task(records.tasks[number])
            elif what == LIMIT:
                self.limits.row(records.limits[number], self.pids)
            elif what == SECTION:
                self._idle_section(number)
        return ReplayResult(
            self._about(), self.rules, self.verdicts, self._effects(), self.trace.lost_records,
            operations.dropped, self.merges_refused, tuple(sorted(self.without)),
        )  # fmt: skip

    def _about(self) -> dict[str, Any]:
        return {
            "path": str(self.trace.path),
            "kernel": self.profile.release,
            "arch": self.profile.arch,
            "page_size": self.page,
            "layers": list(self.trace.header.get("layers", [])),
            "complete": self.trace.complete,
        }

    def _effects(self) -> dict[str, int]:
        found = {name: int(self.trace.operations.effects[name].sum()) for name in EFFECTS}
        found["victims"] = found.pop("victim")
        return found

    def _task(self, row: dict[str, Any]) -> None:
        if row["kind"] != KINDS["FORK"]:
            return
        pid, tid, parent = int(row["pid"]), int(row["tid"]), int(row["parent_tid"])
        self.tgids[tid] = pid
        if pid == tid:
            self.limits.fork(self.tgids.get(parent, parent), pid)

    # ---- one operation ----

    def _operation(self, row: int) -> None:
        table = self.trace.operations
        kind = int(table.kind[row])
        numbers = table.sections[table.first[row] : table.first[row + 1]].tolist()
        sections = [self.reader.section(number) for number in numbers]
        call = self.reader.call(int(table.call[row])) if table.call[row] >= 0 else None
        lost = bool(table.flags[row] & matching.LOST) or any(number in self.lost for number in numbers)
        judge = _Judge(self, row, int(table.space[row]), sections, call, lost)
        if kind == matching.CALL:
            judge.call_operation()
        elif kind == matching.FORK:
            judge.fork_copy(self.trace.records.tasks[int(table.task[row])])
        elif kind == matching.EXEC:
            judge.exec_operation()
        elif kind == matching.EXIT:
            judge.exit_operation()
        elif kind == matching.FAULT:
            judge.fault()
        else:
            judge.other()

    def _idle_section(self, number: int) -> None:
        """A section without an operation: nothing changed in it, or it is a first or last look."""
        section = self.reader.section(number)
        judge = _Judge(self, -1, section.space, [section], None, number in self.lost)
        judge.idle()

    # ---- values ----

    def vma(self, row: Row) -> Vma:
        """A row as a VMA."""
        start, end, flags, pgoff, bits, obj, anon_vma, file, uffd, policy, name = row
        anonymous = bits & _ANONYMOUS != 0
        close = bits & _CLOSE != 0
        kind, huge = ("", 0)
        if file or not anonymous:
            kind, huge = kind_of(self.files.known.get(file), anonymous, close)
        return Vma(
            start, end, flags, pgoff, file or None, anonymous, close, anon_vma or None, bits & _FORKED != 0, uffd or None,
            policy_of(policy) if policy else None, name or None, obj, kind, None, huge,
        )  # fmt: skip

    def walks(self, covers: Sequence[Cover], rows: Sequence[Row]) -> list[tuple[int, int, int, list[Vma]]]:
        """Each walked interval with its flags and VMAs."""
        found, at = [], 0
        for start, end, flags, count in covers:
            if end:
                found.append((start, end, flags, [self.vma(row) for row in rows[at : at + count]]))
            at += count
        return found


class _Judge:
    """One operation on its way to a verdict."""

    def __init__(
        self, replayer: Replayer, row: int, space: int, sections: list[Section], call: Call | None, lost: bool
    ) -> None:
        self.all = replayer
        self.row = row
        self.space_id = space
        self.sections = sections
        self.call = call
        self.result: Result | None = None
        self.saved: tuple[int | bool, ...] = ()
        self.layouts: tuple[tuple[str, tuple[Vma, ...]], ...] = ()
        self.changed = False
        state = replayer.states.get(space)
        if state is None:
            pid = sections[0].pid if sections else call.pid if call else 0
            state = SpaceState(TracedSpace(), MmState(), pid, replayer.shift)
            state.forget()
            state.lossy = replayer.lossy
            replayer.states[space] = state
        self.state = state
        if lost:
            state.forget()
        if sections:
            state.seq = max(state.seq, sections[-1].seq)
        self.lost = lost
        self.before = ""
        self.after: list[tuple[int, int, int, list[Vma]]] = []
        self.before_rows: list[Vma] = []
        self.before_covers: list[tuple[int, int]] = []

    # ---- kinds ----

    def call_operation(self) -> None:
        """A system call."""
        call = self.call
        assert call is not None
        self._read_before()
        self._read_after()
        entry = find_call(self.all.arch, call.abi, call.nr)
        if entry is not None and entry.op_class == "OP_FORK":
            self._fork_call()
            return
        if entry is not None and entry.op_class == "OP_EXEC":
            self._idle_kind("no_exec")
            return
        if entry is not None and entry.op_class == "OP_LIMITS":
            self.all.limits.call(entry.name, call.pid, call.args, call.result)
        self._judge(self._request())

    def fork_copy(self, task: dict[str, Any]) -> None:
        """The child's side of a fork: its counters, and its model from here on."""
        parent_tid = int(task["parent_tid"])
        child, why, rules = self.all.children.pop(parent_tid, (None, "the copy's parent was not seen", ()))
        if child is None:
            self.state.pid = int(task["pid"])
            self._set_counters(
                int(task["map_count"]), int(task["total_vm"]), int(task["data_vm"]), int(task["stack_vm"]),
                int(task["locked_vm"]),
            )  # fmt: skip
            self._finish(UNDECIDED, why)
            return
        child.pid = int(task["pid"])
        self.state = self.all.states[self.space_id] = child
        mm = child.mm
        mm.brk = int(task["brk"])
        mm.def_flags = int(task["def_flags"])
        for name in ("map_count", "total_vm", "data_vm", "stack_vm", "locked_vm"):
            mine, seen = int(getattr(mm, name)), int(task[name])
            if mine != seen and child.counters_known:
                self._set_counters(*(int(task[n]) for n in _COUNTERS))
                self._finish(FAILED, f"the child's {name} is {seen}, expected {mine}", rules, str(mine), str(seen))
                return
        if not child.counters_known or child.unknown:
            self._set_counters(*(int(task[n]) for n in _COUNTERS))
            self._finish(UNDECIDED, _UNKNOWN_STATE)
            return
        self._finish(PASSED, "", rules)

    def exec_operation(self) -> None:
        """A new program: the layout is an input; what must hold of any layout is checked."""
        section = self.sections[0]
        self._read_after()
        self.state.pid = section.pid
        problem = self._start_from(section)
        self.changed = True
        if problem:
            self._finish(FAILED, problem, observed=problem)
        else:
            self._finish(INPUT, "exec: the new layout is an input")

    def exit_operation(self) -> None:
        """The last look: all of the model is held against it."""
        self._read_before()
        self.changed = True
        section = self.sections[0]
        problem = self.before or self._counters_differ(section, self.state)
        if problem:
            self._finish(FAILED, problem, observed=problem)
        elif self.state.unknown:
            self._finish(UNDECIDED, _UNKNOWN_STATE)
        else:
            self._finish(INPUT, "exit: the last state is as the model says")

    def fault(self) -> None:
        """A stack grew."""
        self._read_before()
        self._read_after()
        grown = self._grown_stack()
        if grown is None:
            self._judge(Open("a fault changed something else than one stack"))
        else:
            self._judge(Operation("expand_stack", {"address": grown}))

    def other(self) -> None:
        """A section without a known cause."""
        self._read_before()
        self._read_after()
        grown = self._grown_stack()
        if grown is not None:
            self._judge(Operation("expand_stack", {"address": grown}))
            return
        released = self._released_uffd()
        if released is not None:
            self._judge(Operation("uffd_release", {}, {"uffd": released}))
            return
        self._judge(Open(_LOST if self.lost else _NO_CALL))

    def idle(self) -> None:
        """A section in which nothing changed, or a look from outside at a living space."""
        section = self.sections[0]
        if section.kind == KINDS["SECTION"] and section.op_class == 0 and section.nr == 65535:
            self._look(section)
            return
        self._read_before()
        self._read_after()
        problem = self.before or self._after_differs({}, True)
        if not problem and not self.state.unknown:
            problem = self._counters_differ(section, self.state)
        self._adopt_after()
        if problem:
            self._finish(FAILED, f"a section that changed nothing: {problem}", observed=problem)

    def _look(self, section: Section) -> None:
        self._read_after()
        if not self.state.counters_known and any(lo == 0 for lo, _, _, _ in self.after):
            self._start_from(section)
            return
        problem = self._after_differs({}, True) or self._counters_differ(section, self.state)
        self._adopt_after()
        if problem:
            self._finish(FAILED, f"seen from outside: {problem}", observed=problem)

    # ---- what was read ----

    def _read_before(self) -> None:
        if not self.sections:
            return
        state, section = self.state, self.sections[0]
        walks = self.all.walks(section.before_cover, section.before)
        self._sync(section)
        for lo, hi, flags, rows in walks:
            self.before_rows += rows
            if flags:
                continue
            self.before_covers.append((lo, hi))
            if state.unknown and not state.is_known(lo, hi):
                state.learn_interval(lo, hi)
                state.adopt(lo, hi, rows)
                continue
            problem = state.check(lo, hi, rows, {}, True)
            if problem:
                self.before = self.before or f"before: {problem}"
                state.adopt(lo, hi, rows)

    def _sync(self, section: Section) -> None:
        """The mm's fields that are inputs."""
        mm = self.state.mm
        mm.def_flags = section.def_flags
        mm.ksm = bool(section.mm_flags & _MMF_VM_MERGE_ANY)
        mm.mdwe = bool(section.mm_flags & _MMF_HAS_MDWE)
        if section.start_brk or section.brk_before:
            mm.start_brk = section.start_brk
            mm.brk = section.brk_before

    def _read_after(self) -> None:
        for section in self.sections:
            self.after += self.all.walks(section.after_cover, section.after)

    def _events(self) -> list[second.Event]:
        return [event for section in self.sections for event in section.evidence]

    def _grown_stack(self) -> int | None:
        """The new start of a stack, where its growth is all that the evidence tells."""
        events = self._events()
        if len(events) != 1 or events[0][0] != second.STORE:
            return None
        _, obj, start, _ = events[0]
        for _, _, _, rows in self.after:
            for vma in rows:
                if vma.obj == obj and vma.flags & GROWSDOWN:
                    return start
        return None

    def _released_uffd(self) -> Hashable:
        """The one userfaultfd context that is gone everywhere after the section."""
        if not any(lo == 0 and hi == EVERYTHING for lo, hi, _, _ in self.after):
            return None
        was = {vma.uffd for vma in self.state.space if vma.uffd is not None}
        left = {vma.uffd for _, _, _, rows in self.after for vma in rows if vma.uffd is not None}
        gone = was - left
        return gone.pop() if len(gone) == 1 else None

    def _request(self) -> Request:
        call = self.call
        assert call is not None
        born: dict[int, tuple[int, int]] = {}
        for what, obj, start, end in self._events():
            if what in (second.ALLOC, second.DUP):
                born[obj] = (0, 0)
            elif what == second.STORE and born.get(obj) == (0, 0):
                born[obj] = (start, end)
        after = [vma for _, _, _, rows in self.after for vma in rows]
        name = call_name(self.all.arch, call.abi, call.nr)
        seen = Seen(
            name, call.abi, call.args, call.result, call.file, self.all.page, after, self.before_rows, self.all.files, born,
            not self.all.trace.lost_records and not self.state.unknown,
        )
        return request(self.all.arch, call.nr, seen)

    # ---- judging ----

    def _judge(self, asked: Request) -> None:
        state = self.state
        if isinstance(asked, Skip):
            self._skip(asked)
            return
        if isinstance(asked, Open):
            self._undecided(asked.reason)
            return
        if isinstance(asked, Wrong):
            self._failed(asked.reason)
            return
        if self._is_interleaved():
            self._undecided(_INTERLEAVED)
            return
        if state.unknown and not self.before_rows and not self._covered():
            self._undecided(_UNKNOWN_STATE)
            return
        if self.before:
            self._failed(self.before)
            return
        self._predict(asked)

    def _covered(self) -> bool:
        return bool(self.sections) and any(end for _, end, _, _ in self.sections[0].before_cover)

    def _predict(self, asked: Operation) -> None:
        state = self.state
        limits = self._limits()
        saved = self.saved = state.mm.snapshot()
        serial = state.space.serial
        try:
            result = apply(state.space, asked, self.all.rules, state.mm, limits, self.all.without)
        except ImpossibleInput as error:
            self._failed(error.reason)
            return
        except Unmodelled as error:
            self._undecided(error.reason)
            return
        self.result = result
        if result.features_asked:
            open_ids = self._features_that_matter(asked, saved, serial, result, limits)
            if open_ids:
                self._undecided("the kernel's features are not known: " + ", ".join(open_ids))
                return
        self._compare(asked, result)

    def _features_that_matter(
        self, asked: Operation, saved: tuple[int | bool, ...], serial: int, result: Result, limits: Limits
    ) -> list[str]:
        """The unknown features whose values lead to different predictions."""
        found = []
        before = self.state.space.copy()
        before.journal = self.state.space.journal
        before.take_back()
        before.serial = serial
        mine = (result.errno, list(self.state.space), self.state.mm.snapshot())
        for feature in result.features_asked:
            space, mm = before.copy(), MmState()
            mm.restore(saved)
            rules = self.all.rules.changed(**{feature: True})
            try:
                other = apply(space, asked, rules, mm, limits, self.all.without)
            except Unmodelled:
                found.append(feature)
                continue
            if (other.errno, list(space), mm.snapshot()) != mine:
                found.append(feature)
        return found

    def _limits(self) -> Limits:
        call = self.call
        if call is not None:
            return self.all.limits.of(call.pid, call.abi)
        return self.all.limits.of(self.sections[0].pid, self.sections[0].abi)

    def _compare(self, asked: Operation, result: Result) -> None:
        state = self.state
        problem, pages = self._result_differs(asked, result), False
        if problem and self.call is not None and self.call.result < 0:
            name = _errno_name(self.call.result)
            uncaptured = bool(state.space.journal) or asked.name in _CHECKED_LATE
            if name in result.maybe_errnos:
                problem, pages = "", True
            elif uncaptured and name in _UNCAPTURED.get(asked.name, ()) and not self._was_changed():
                self._undecided(f"{name} of {asked.name}: its cause is not captured")
                return
        expected = second.expect(state.space.journal)
        unstored = asked.name == "brk" and any(type(e) is New for e in result.effects)
        why, names = second.compare(expected, self._events(), result.effects, unstored, self.all.told)
        if not self.sections:
            if not problem and (expected.births or expected.stores or expected.deaths):
                if self._misses_section():
                    state.forget()
                    self._undecided(_LOST)
                    return
                problem = "a change was predicted and no write section was seen"
        else:
            problem = problem or why
            problem = problem or self._after_differs(names, self._downgraded())
            problem = problem or self._last_fields_differ()
        if problem:
            self._failed(problem)
            return
        if state.unknown or not state.counters_known:
            self._learn_after()
            self._take_counters()
        if result.effects and not state.space.journal:
            self.changed = True
        self._learn_driver(asked, result)
        self._count_refusal(result)
        if pages:
            self._finish(UNDECIDED, f"{asked.name}: the errno depends on pages, the layout is as predicted")
            return
        self._finish(PASSED, "", result.rules)

    def _misses_section(self) -> bool:
        """Whether a write section that this call made is lost: more were counted than seen."""
        return self.call is not None and self.call.seq > self.state.seq

    def _result_differs(self, asked: Operation, result: Result) -> str:
        call = self.call
        if call is None:
            return f"predicted {result.errno}" if result.errno is not None else ""
        if call.result < 0 and call.result >= -4095:
            seen = _errno_name(call.result)
            if result.errno == seen:
                return ""
            return f"the call failed with {seen}, expected {result.errno or hex(result.ret)}"
        if result.errno is not None:
            return f"the call returned {call.result:#x}, expected {result.errno}"
        expected = result.ret if asked.name in _RETURNS else 0
        if expected != call.result and call_name(self.all.arch, call.abi, call.nr) != "process_madvise":
            return f"the call returned {call.result:#x}, expected {expected:#x}"
        return ""

    def _was_changed(self) -> bool:
        return bool(self.all.trace.operations.changed[self.row])

    def _take_back(self) -> None:
        """The prediction is not what happened: the model goes back to what was before it."""
        if self.result is not None and self.saved:
            self.state.space.take_back()
            self.state.mm.restore(self.saved)

    def _after_differs(self, names: dict[Hashable, Hashable], gains: bool) -> str:
        last = len(self.after)
        for at, (lo, hi, flags, rows) in enumerate(self.after):
            if flags:
                continue
            if len(self.sections) > 1 and self._is_overwritten(at, last):
                continue
            if self.state.unknown and not self.state.is_known(lo, hi):
                continue
            loose = gains or not any(start <= lo and hi <= end for start, end in self.before_covers)
            problem = self.state.check(lo, hi, rows, names, loose)
            if problem:
                return problem
        return ""

    def _is_overwritten(self, at: int, last: int) -> bool:
        lo, hi, _, _ = self.after[at]
        return any(self.after[i][0] < hi and lo < self.after[i][1] for i in range(at + 1, last))

    def _last_fields_differ(self) -> str:
        section = self.sections[-1]
        if self.state.unknown or not self.state.counters_known:
            return ""
        return self._counters_differ(section, self.state)

    def _counters_differ(self, section: Section, state: SpaceState) -> str:
        if not state.counters_known or state.unknown:
            return ""
        mm = state.mm
        if (mm.map_count, mm.total_vm, mm.data_vm, mm.stack_vm, mm.locked_vm) != section[15:20]:
            for name in _COUNTERS:
                mine, seen = getattr(mm, name), getattr(section, name)
                if section.kind == KINDS["LAST"] and name == "map_count" and seen == 0:
                    continue
                if mine != seen:
                    return f"{name} is {seen}, expected {mine}"
        if section.brk and mm.brk != section.brk:
            return f"brk is {section.brk:#x}, expected {mm.brk:#x}"
        return ""

    def _downgraded(self) -> bool:
        """Whether others may have read-locked the mm before the last read: unmapping lets go of the write lock early."""
        return any(event[0] == second.UNMAPPED for event in self._events())

    def _is_interleaved(self) -> bool:
        sections = self.sections
        return any(b.seq != a.seq + 1 for a, b in zip(sections, sections[1:], strict=False))

    # ---- what follows a verdict ----

    def _skip(self, asked: Skip) -> None:
        if asked.kind == "guard":
            self._note_guard()
        if self.before:
            self._failed(self.before)
            return
        problem = ""
        if self.sections:
            problem = self._after_differs({}, True) or self._last_fields_differ()
            if self._events():
                problem = "a call that changes no VMA changed one"
        if problem:
            self._failed(problem)
            return
        self._learn_after()
        self._finish(SKIPPED, SKIPPED_KINDS[asked.kind])

    def _idle_kind(self, kind: str) -> None:
        self._skip(Skip(kind))

    def _note_guard(self) -> None:
        call = self.call
        assert call is not None
        start, length = (call.args[0], call.args[1])
        name = call_name(self.all.arch, call.abi, call.nr)
        if name == "process_madvise":
            start, length = 0, EVERYTHING
        self.state.guards.append((start, start + length))

    def _failed(self, problem: str) -> None:
        rules = self.result.rules if self.result is not None else ()
        lo, hi = self._span()
        expected_layout = tuple(self.state.space.overlapping(lo, hi))
        expected = ""
        if self.result is not None:
            expected = self.result.errno or ", ".join(str(effect) for effect in self.result.effects)
        self._take_back()
        before = tuple(self.state.space.overlapping(lo, hi))
        self._adopt_after()
        self._take_counters()
        seen = tuple(self.state.space.overlapping(lo, hi))
        self.layouts = (("before", before), ("expected", expected_layout), ("observed", seen))
        self._finish(FAILED, problem, rules, expected, problem)

    def _span(self) -> tuple[int, int]:
        """What the operation touched by either account, and a page on each side."""
        edges = [edge for old, new in self.state.space.journal for vma in (*old, *new) for edge in vma[:2]]
        edges += [edge for event in self._events() for edge in event[2:] if edge]
        if self.before or not edges:
            edges += [edge for vma in self.before_rows[:8] for edge in vma[:2]]
        if not edges:
            return 0, 0
        return max(min(edges) - self.all.page, 0), max(edges) + self.all.page

    def _undecided(self, reason: str) -> None:
        if self.before and reason != _LOST:
            self._failed(self.before)
            return
        self._take_back()
        self.result = None
        problem = self._unchanged_differs()
        if problem:
            self._failed(problem)
            return
        self._adopt_after()
        self._take_counters()
        self._finish(UNDECIDED, reason)

    def _unchanged_differs(self) -> str:
        """Where nothing changed, what was read must be as it was, whatever the call meant."""
        if self.row < 0 or not self.sections or self._was_changed() or self.lost:
            return ""
        return self._after_differs({}, True) or self._last_fields_differ()

    def _adopt_after(self) -> None:
        """The model becomes what was seen; where nothing was read it is not known."""
        state = self.state
        if self.row >= 0 and not self.after and self.sections and self._events():
            state.forget()
        for lo, hi, flags, rows in self.after:
            if flags:
                continue
            state.learn_interval(lo, hi)
            state.adopt(lo, hi, rows)

    def _learn_after(self) -> None:
        state = self.state
        if not state.unknown:
            return
        for lo, hi, flags, rows in self.after:
            if not flags and not state.is_known(lo, hi):
                state.learn_interval(lo, hi)
                state.adopt(lo, hi, rows)

    def _take_counters(self) -> None:
        if not self.sections:
            return
        section = self.sections[-1]
        if section.kind != KINDS["SECTION"] or not section.map_count:
            return
        self._set_counters(*(getattr(section, name) for name in _COUNTERS))
        self.state.mm.brk = section.brk
        if not self.state.unknown and not self.state.counters_known:
            self.state.counters_known = True

    def _set_counters(self, map_count: int, total_vm: int, data_vm: int, stack_vm: int, locked_vm: int) -> None:
        mm = self.state.mm
        mm.map_count, mm.total_vm, mm.data_vm, mm.stack_vm, mm.locked_vm = (
            map_count, total_vm, data_vm, stack_vm, locked_vm,
        )  # fmt: skip

    def _start_from(self, section: Section) -> str:
        """The rows, complete for the whole space, become the model. Returns what no layout may show, or nothing."""
        state = self.state
        state.unknown = [(0, EVERYTHING)]
        for lo, hi, flags, rows in self.after:
            if not flags:
                state.learn_interval(lo, hi)
                state.adopt(lo, hi, rows)
        if state.unknown and all(lo >= self.all.limits.of(state.pid, 0).task_size for lo, _ in state.unknown):
            state.unknown = []
        mm = counters_of(state.space, self.all.page)
        state.mm = mm
        problem = ""
        if mm.map_count != section.map_count and not state.unknown:
            problem = f"map_count is {section.map_count}, {mm.map_count} VMAs were read"
        elif mm.total_vm != section.total_vm and not state.unknown:
            problem = f"total_vm is {section.total_vm}, the VMAs have {mm.total_vm} pages"
        state.counters_known = not state.unknown
        self._set_counters(*(getattr(section, name) for name in _COUNTERS))
        self._sync(section)
        mm.brk = section.brk or section.brk_before
        return problem

    def _learn_driver(self, asked: Operation, result: Result) -> None:
        """A mapping that was made anew teaches what its driver sets."""

    def _count_refusal(self, result: Result) -> None:
        if not any(type(effect).__name__ == "Merge" for effect in result.effects):
            if not _MERGE_RULES.isdisjoint(result.rules):
                self.all.merges_refused += 1

    # ---- fork ----

    def _fork_call(self) -> None:
        call = self.call
        assert call is not None
        copies = [section for section in self.sections if section.op_class == _OP_FORK]
        if not copies:
            self._idle_kind("thread" if call.result >= 0 else "no_fork")
            return
        if self.before or self._events():
            self._failed(self.before or "the parent changed in a fork")
            return
        self._sync(copies[0])
        problem = self._counters_differ(copies[-1], self.state)
        if problem:
            self._failed(problem)
            return
        child, why, rules = self._copy()
        if call.result > 0:
            self.all.children[call.tid] = (child, why, rules)
        self.changed = False
        if child is None:
            self._finish(UNDECIDED, why)
            return
        self._finish(PASSED, "", rules)

    def _copy(self) -> tuple[SpaceState | None, str, tuple[str, ...]]:
        """The child's start by the rules."""
        state = self.state
        if state.unknown and not len(state.space):
            return None, _UNKNOWN_STATE, ()
        try:
            result = apply(
                state.space, Operation("fork"), self.all.rules, state.mm, self._limits(), self.all.without
            )
        except Unmodelled as error:
            return None, error.reason, ()
        if result.child is None or result.child_mm is None:
            return None, f"a fork fails with {result.errno}", result.rules
        space = TracedSpace(result.child)
        # The child's own symbols go on below those it inherited.
        space.serial = min(space.serial, state.space.serial)
        child = SpaceState(space, result.child_mm, 0, self.all.shift)
        child.unknown = list(state.unknown)
        child.counters_known = state.counters_known
        child.inherited = state.credits + state.inherited
        child.guards = list(state.guards)
        child.lossy = state.lossy
        child.soft_dirty_unknown = state.soft_dirty_unknown
        return child, "", result.rules

    # ---- verdicts ----

    def _call_text(self) -> str:
        """The call with its arguments and result, as strace would put it."""
        call = self.call
        if call is None:
            return ""
        entry = find_call(self.all.arch, call.abi, call.nr)
        names = entry.arguments if entry is not None else ()
        args = ", ".join(f"{name}={_argument(value)}" for name, value in zip(names, call.args, strict=False))
        result = _errno_name(call.result) if -4096 < call.result < 0 else _argument(call.result)
        return f"{call_name(self.all.arch, call.abi, call.nr)}({args}) = {result}"

    def _finish(
        self, verdict: str, reason: str, rules: tuple[str, ...] = (), expected: str = "", observed: str = ""
    ) -> None:
        table, row = self.all.trace.operations, self.row
        call = self.call
        if call is not None:
            name = call_name(self.all.arch, call.abi, call.nr)
            pid, tid = call.pid, call.tid
        elif self.sections:
            section = self.sections[0]
            name = matching.KIND_NAMES[table.kind[row]] if row >= 0 else "section"
            pid, tid = section.pid, section.tid
        else:
            name, pid, tid = "fork", self.state.pid, self.state.pid
        effects = {n: int(table.effects[n][row]) for n in EFFECTS if table.effects[n][row]} if row >= 0 else {}
        changed = bool(table.changed[row]) if row >= 0 else False
        self.all.verdicts.append(
            Verdict(
                self.space_id, pid, int(table.number[row]) if row >= 0 else -1, name, verdict, reason, rules, effects,
                changed, expected, observed, self._call_text() if verdict == FAILED else "", tid,
                int(table.order[row]) if row >= 0 else 0, self.layouts,
            )
        )  # fmt: skip


def _argument(value: int) -> str:
    signed = value - (1 << 64) if value >> 63 else value
    return str(signed) if -4096 < signed < 4096 else hex(value)


_COUNTERS: Final = ("map_count", "total_vm", "data_vm", "stack_vm", "locked_vm")
# Calls whose return value the rules give.
_RETURNS: Final = frozenset(("mmap", "brk", "mremap", "shmat", "map_shadow_stack"))
# errnos that depend on what no record holds: overcommit, descriptors, credentials.
_UNCAPTURED: Final[dict[str, tuple[str, ...]]] = {
    "mmap": ("ENOMEM", "EACCES", "ENODEV", "EBADF", "EPERM", "EAGAIN", "ENFILE", "EINVAL"),
    "mprotect": ("ENOMEM", "EINTR"),
    "mremap": ("ENOMEM", "EINTR"),
    "munmap": ("EINTR",),
    "mlock": ("EPERM", "ENOMEM", "EINTR", "EAGAIN"),
    "mlock2": ("EPERM", "ENOMEM", "EINTR", "EAGAIN"),
    "mbind": ("EINVAL", "EPERM", "EFAULT", "EIO"),
    "pkey_mprotect": ("EINVAL", "EINTR"),
    "madvise": ("EINTR", "EAGAIN"),
    "uffd_register": ("EBADF", "ENOTTY", "EPERM", "EBUSY", "ENOMEM", "EINVAL", "EFAULT"),
    "uffd_unregister": ("EBADF", "ENOTTY", "EINVAL", "ENOMEM", "EFAULT"),
}


# Calls whose uncaptured checks come before those that the rules make.
_CHECKED_LATE: Final = frozenset(("mmap", "mbind", "uffd_register", "uffd_unregister"))


def _errno_name(result: int) -> str:
    """The symbolic name of a failed call's result; of two names the kernel's own."""
    name = errno_names.errorcode.get(-result, str(result))
    return "EOPNOTSUPP" if name == "ENOTSUP" else name


def run(trace: Trace, rules: str | RuleSet = "auto", without: Collection[str] = ()) -> ReplayResult:
    """Replay a trace under a rule set (``auto``: the features in the trace). Raises UsageError for unknown names."""
    check_rule_ids(without)
    profile = KernelProfile.from_dict(trace.kernel)
    chosen = rules if isinstance(rules, RuleSet) else rule_set(rules, profile.rule_set())
    return Replayer(trace, chosen, without).run()
