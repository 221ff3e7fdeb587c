"""Walks a trace through the simulator in the order of events: one verdict for each operation."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Final

from vmatrace.ingest import match as matching
from vmatrace.ingest.effects import EFFECTS
from vmatrace.ingest.trace import Trace
from vmatrace.kernel import KernelProfile, RuleSet, rule_set
from vmatrace.replay import kinds
from vmatrace.replay.decisions import judge_decisions
from vmatrace.replay.doubts import NEVER, Losses
from vmatrace.replay.files import FileInfo, Files, info_of, kind_of
from vmatrace.replay.hooks import hook_of
from vmatrace.replay.judge import Judge, Layouts
from vmatrace.replay.limits import LimitBook
from vmatrace.replay.occurrence import Occurrence
from vmatrace.replay.requests import policy_of
from vmatrace.replay.result import FAILED, DecisionVerdict, ReplayResult, Verdict
from vmatrace.replay.space import TracedSpace
from vmatrace.replay.state import KernelFacts, SpaceState
from vmatrace.replay.stream import (
    FAULT,
    FILE,
    LIMIT,
    SECTION,
    TASK,
    OperationRow,
    Reader,
    Row,
    late_sections,
    walk,
)  # fmt: skip
from vmatrace.rules.model import MmState
from vmatrace.schema import KINDS, ROW_BITS
from vmatrace.simulator import check_rule_ids
from vmatrace.vma import Vma

_ANONYMOUS: Final = ROW_BITS["ROW_ANONYMOUS"]
_CLOSE: Final = ROW_BITS["ROW_CLOSE"]
_FORKED: Final = ROW_BITS["ROW_FORKED"]
_MOST_ROWS: Final = 1 << 16


class Replayer:
    """One replay of one trace. `run` is the way in."""

    def __init__(self, trace: Trace, rules: RuleSet, without: Collection[str] = ()) -> None:
        self.trace = trace
        self.rules = rules
        self.without = frozenset(without)
        self.profile = KernelProfile.from_dict(trace.kernel)
        self.page = self.profile.page_size
        self.limits = LimitBook(self.profile, trace.credentials)
        self.files = Files()
        self.states: dict[int, SpaceState] = {}
        #: What each forking task's child should be.
        self.children: dict[int, kinds.Child] = {}
        self.verdicts: list[Verdict] = []
        self.decided: list[DecisionVerdict] = []
        self.merges_refused = 0
        #: Kinds of evidence that this trace is known to tell apart.
        self.told: set[int] = set()
        #: No record is known to be lost.
        self.whole = trace.lost_records == 0
        self.losses = None if self.whole else Losses(trace.records.gaps or [(-1, NEVER)])
        #: Where the last write section of the trace stands; calls that come later were cut off from theirs.
        self.last_section = int(trace.records.sections["index"].max(initial=0))
        #: Where the last operation of each task ended.
        self._ended: dict[int, int] = {}
        features = rules.features
        self.kernel = KernelFacts(
            self.page.bit_length() - 1,
            features["guard_regions"] is not False and features["guard_av_anon_only"] is not True,
            features["anon_pgoff"] is True,
        )
        for row in trace.records.files:
            info = info_of(row)
            self.files.first.setdefault(info.identity, info)
        self._reader = Reader(trace.file, trace.records)
        self._pids = frozenset(trace.pids())
        self._late_sections = late_sections(trace.records, trace.operations)
        self._late = frozenset(self._late_sections.tolist())
        self._lost = frozenset(trace.lost_sections.tolist())
        self._tgids: dict[int, int] = {}
        #: Rows as VMAs: most rows are read again and again, unchanged.
        self._vmas: dict[Row, Vma] = {}

    def run(self) -> ReplayResult:
        """Judge every operation of the trace."""
        # Verdicts pile up and hold no cycles: looking for some again and again costs a sixth of the time.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._walk()
        finally:
            if collecting:
                gc.enable()
        return ReplayResult(
            self._about(), self.rules, self.verdicts, self._effects(), self.trace.lost_records,
            self.trace.operations.dropped, self.merges_refused, tuple(sorted(self.without)), self.decided,
        )  # fmt: skip

    def _walk(self) -> None:
        records = self.trace.records
        for what, number, columns in walk(records, self.trace.operations, self._late_sections):
            if columns is not None:
                self._operation(columns)
            elif what == FAULT:
                state = self.states.get(int(records.faults["space"][number]))
                if state is not None:
                    state.credits += 1
                    state.events += 1
            elif what == FILE:
                self._describe(info_of(records.files[number]))
            elif what == TASK:
                self._task(records.tasks[number])
            elif what == LIMIT:
                self.limits.row(records.limits[number], self._pids)
            elif what == SECTION:
                self._idle_section(number)

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
        self._tgids[tid] = pid
        if pid == tid:
            self.limits.fork(self._tgids.get(parent, parent), pid)

    def _describe(self, info: FileInfo) -> None:
        """Take in what a file is; a description that is not its first changes what its VMAs are."""
        known = self.files.info(info.identity)
        self.files.known[info.identity] = info
        if known is not info and known != info:
            self._vmas.clear()

    def _operation(self, columns: OperationRow) -> None:
        numbers = self.trace.operations.sections[columns.first : columns.end].tolist()
        interleaved = bool(self._late) and not self._late.isdisjoint(numbers)
        if interleaved:
            numbers = [number for number in numbers if number not in self._late]
        sections = [self._reader.section(number) for number in numbers]
        call = self._reader.call(columns.call) if columns.call >= 0 else None
        lost = not self._lost.isdisjoint(numbers)
        seen = Occurrence(columns, self.profile.arch, sections, call, lost, self.vma, interleaved)
        judge = self._judge(seen)
        kind = columns.kind
        if self.trace.decisions.present:
            made = self.trace.decisions.of(columns.row)
            self.decided += judge_decisions(self, judge.seen, made, judge.state.space)
            judge.seen.hook = hook_of(made)
        if kind == matching.CALL:
            kinds.judge_call(judge)
        elif kind == matching.FORK:
            kinds.judge_copy(judge, self.trace.records.tasks[columns.task])
        elif kind == matching.EXEC:
            kinds.judge_exec(judge)
        elif kind == matching.EXIT:
            kinds.judge_exit(judge)
        elif kind == matching.FAULT:
            kinds.judge_fault(judge)
        else:
            kinds.judge_other(judge)
        if self.losses is not None:
            self._ended[seen.tid] = seen.last_index

    def _idle_section(self, number: int) -> None:
        """A section without an operation, or a late one of an operation that has its verdict."""
        section = self._reader.section(number)
        columns = OperationRow(-1, -1, section.space, -1, 0, 0, -1, -1, section.place, 0, 0, ())
        lost = number in self._lost
        judge = self._judge(Occurrence(columns, self.profile.arch, [section], None, lost, self.vma))
        if number in self._late:
            judge.adopt()
        else:
            kinds.check_idle(judge)

    def _judge(self, seen: Occurrence) -> Judge:
        state = self.states.get(seen.columns.space)
        if state is None:
            state = SpaceState(TracedSpace(), MmState(), seen.pid, self.kernel)
            state.forget()
            self.states[seen.columns.space] = state
        if self.losses is not None and not state.lossy:
            state.lossy = self.losses.between(-1, seen.last_index)
        state.now = (seen.columns.space, seen.columns.number)
        state.contradicted = None
        if seen.lost:
            state.forget()
        if seen.sections:
            state.seq = max(state.seq, seen.sections[-1].seq)
        return Judge(self, seen, state)

    def ended(self, tid: int) -> int:
        """Where the last operation of a task ended, -1: none was seen."""
        return self._ended.get(tid, -1)

    def fit(self, feature: str, value: bool) -> None:
        """Take the value of an unknown feature from an operation that is not judged by it."""
        fitted = self.rules.fitted | {feature}
        self.rules = replace(self.rules.changed(**{feature: value}), fitted=fitted)

    def vma(self, row: Row) -> Vma:
        """A row of the trace as a VMA."""
        found = self._vmas.get(row)
        if found is None:
            if len(self._vmas) > _MOST_ROWS:
                self._vmas.clear()
            found = self._vmas[row] = self._make_vma(row)
        return found

    def _make_vma(self, row: Row) -> Vma:
        start, end, flags, pgoff, bits, obj, anon_vma, file, uffd, policy, name = row
        anonymous, close = bits & _ANONYMOUS != 0, bits & _CLOSE != 0
        kind, huge = "", 0
        if file or not anonymous:
            info = self.files.info(file)
            # What is not described is taken for an ordinary file, and no difference counts.
            kind, huge = kind_of(info, anonymous or bool(file and info is None), close)
        # At first the second offset is that of the place; the model knows it better later.
        second = None if not self.kernel.two_offsets else start >> self.kernel.shift if file else pgoff
        return Vma(
            start, end, flags, pgoff, file or None, anonymous, close, anon_vma or None, bits & _FORKED != 0,
            uffd or None, policy_of(policy) if policy else None, name or None, obj, kind, second, huge,
        )  # fmt: skip

    def note(
        self,
        seen: Occurrence,
        state: SpaceState,
        verdict: str,
        reason: str,
        rules: tuple[str, ...],
        expected: str,
        observed: str,
        layouts: Layouts,
    ) -> None:
        """Keep a verdict."""
        columns = seen.columns
        name = seen.name or (matching.KIND_NAMES[columns.kind] if columns.number >= 0 else "section")
        call = seen.text() if verdict == FAILED else ""
        noted = Verdict(
            columns.space, seen.pid or state.pid, columns.number, name, verdict, reason, rules, columns.effects,
            bool(columns.changed), expected, observed, call, seen.tid or state.pid, columns.order, layouts,
        )  # fmt: skip
        self.verdicts.append(noted)


    def contradict(self, where: tuple[int, int], by: tuple[int, int], problem: str) -> None:
        """Of two reads that cannot both be true the first has its verdict already: it FAILED as well."""
        for at in range(len(self.verdicts) - 1, -1, -1):
            found = self.verdicts[at]
            if (found.space, found.op) == where and found.op >= 0:
                reason = f"what it read does not agree with operation {by[1]} of address space {by[0]}: {problem}"
                self.verdicts[at] = found._replace(verdict=FAILED, reason=reason, observed=reason)
                return


def run(trace: Trace, rules: str | RuleSet = "auto", without: Collection[str] = ()) -> ReplayResult:
    """Replay a trace under a rule set (``auto``: the features in the trace).

    Raises UsageError for an unknown rule set or rule.
    """
    check_rule_ids(without)
    profile = KernelProfile.from_dict(trace.kernel)
    chosen = rules if isinstance(rules, RuleSet) else rule_set(rules, profile.rule_set())
    return Replayer(trace, chosen, without).run()
