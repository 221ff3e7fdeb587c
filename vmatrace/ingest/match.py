"""Joins write sections, calls and task events into operations, and numbers them in each address space.

An operation is a call with its write sections in one address space, a fault that grew a stack, a child's copy
at fork, an exec, an exit, or (``OTHER``) a section that changed something and has none of these causes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmatrace.ingest.effects import EFFECTS
from vmatrace.ingest.records import CHANGED, UNCHANGED, UNTOLD, Records
from vmatrace.schema import KINDS, OP_CLASSES
from vmatrace.syscalls import FAULT_NR

Array = npt.NDArray[Any]

CALL: Final = 0
FORK: Final = 1
EXEC: Final = 2
EXIT: Final = 3
FAULT: Final = 4
OTHER: Final = 5
KIND_NAMES: Final = ("call", "fork", "exec", "exit", "fault", "other")
"""Kinds of operations; ``fork`` is the copy in the child, the parent's fork is a call."""

LOST: Final = 1
"""Flag: records of this address space are missing just before one of its sections, or its call is."""
MISCOUNTED: Final = 2
"""Flag: map_count did not change as the effects say."""

_FORK_CLASS: Final = OP_CLASSES["OP_FORK"]
_EXEC_CLASS: Final = OP_CLASSES["OP_EXEC"]
_FAULT_CLASS: Final = OP_CLASSES["OP_FAULT"]


@dataclass(slots=True)
class Operations:
    """Columns of all operations, sorted by address space and number.

    ``call``: row of the call or -1. ``task``: row of the task event (FORK) or -1. ``order``: where it stands
    among all records. ``sections[first[i]:first[i + 1]]``: its write sections. ``effects``: counts by name.
    """

    space: Array
    number: Array
    kind: Array
    call: Array
    task: Array
    order: Array
    changed: Array
    flags: Array
    first: Array
    sections: Array
    effects: dict[str, Array]
    #: Write sections without a cause that changed nothing.
    dropped: int
    #: Operation of each section, -1: none.
    of_section: Array

    def __len__(self) -> int:
        return len(self.space)


@dataclass(slots=True)
class Groups:
    """All sections ordered by address space: ``spans[space]`` is the slice of ``order`` with its sections."""

    order: Array
    spans: dict[int, slice]

    def of(self, space: int) -> Array:
        """The numbers of the sections of one address space, in order."""
        found: Array = self.order[self.spans.get(space, slice(0, 0))]
        return found


def group_sections(records: Records) -> Groups:
    """Group the sections of a trace by address space."""
    space = records.sections["space"]
    order = np.argsort(space, kind="stable").astype(np.uint32)
    ordered = space[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(space) else np.zeros(0, np.int64)
    ends = np.r_[starts[1:], len(space)]
    ids = ordered[starts].tolist()
    return Groups(
        order, {n: slice(lo, hi) for n, lo, hi in zip(ids, starts.tolist(), ends.tolist(), strict=True)}
    )


def match(records: Records, groups: Groups, resolve: Callable[[list[int]], list[bool]]) -> Operations:
    """Build the operations of a trace.

    ``resolve`` says for sections that do not tell it themselves whether they changed anything.
    """
    call_of = _calls_of_sections(records)
    sections = records.sections
    sections["changed"][is_snapshot(sections, slice(None))] = UNCHANGED
    untold = np.flatnonzero(sections["changed"] == UNTOLD).tolist()
    if untold:
        sections["changed"][untold] = [CHANGED if changed else UNCHANGED for changed in resolve(untold)]
    operations = _Draft(records, call_of).finish()
    _sum_effects(records, operations)
    _flag(records, operations, groups)
    return operations


def _child_returns(records: Records) -> Array:
    """Calls that are a fork seen from the child: no calls of their own."""
    calls = records.calls
    found: Array = (calls["op_class"] == _FORK_CLASS) & (calls["result"] == 0)
    return found


def _calls_of_sections(records: Records) -> Array:
    """The call that each section belongs to (its task's next one, with the same number), or -1."""
    sections, calls = records.sections, records.calls
    n = len(sections["index"])
    merged = np.argsort(np.concatenate([sections["index"], calls["index"]]), kind="stable")
    tid = np.concatenate([sections["tid"], calls["tid"]])[merged]
    if len(tid) and (tid != tid[0]).any():
        merged = merged[np.argsort(tid, kind="stable")]
        tid = np.concatenate([sections["tid"], calls["tid"]])[merged]
    total = len(merged)
    following = np.where(merged >= n, np.arange(total), total)
    following = np.minimum.accumulate(following[::-1])[::-1]
    at = np.flatnonzero(merged < n)
    place = following[at]
    place[place < total] = np.where(
        tid[place[place < total]] == tid[at[place < total]], place[place < total], total
    )
    has = place < total
    section, call = merged[at[has]], merged[place[has]] - n
    same = (sections["nr"][section] == calls["nr"][call]) & (sections["abi"][section] == calls["abi"][call])
    plain = (sections["kind"][section] == KINDS["SECTION"]) & (sections["op_class"][section] != _FAULT_CLASS)
    fits = plain & same & (sections["grew"][section] == 0)
    fits |= (sections["kind"][section] == KINDS["EXEC"]) & (calls["op_class"][call] == _EXEC_CLASS)
    fits &= ~_child_returns(records)[call]
    call_of = np.full(n, -1, np.int64)
    call_of[section[fits]] = call[fits]
    return call_of


class _Draft:
    """Operations before they are sorted."""

    def __init__(self, records: Records, call_of: Array) -> None:
        self.records = records
        self.parts: dict[str, list[Array]] = {name: [] for name in ("space", "kind", "call", "task", "order")}
        self.count = 0
        self.of_section = np.full(len(call_of), -1, np.int64)
        self._add_calls(call_of)
        self._add_lonely_sections(np.flatnonzero(call_of < 0))
        self._add_forks()

    def _add(self, space: Array, kind: Array, call: Array, task: Array, order: Array) -> None:
        for name, values in (
            ("space", space),
            ("kind", kind),
            ("call", call),
            ("task", task),
            ("order", order),
        ):
            self.parts[name].append(np.asarray(values))
        self.count += len(space)

    def _add_calls(self, call_of: Array) -> None:
        sections, calls = self.records.sections, self.records.calls
        own = np.flatnonzero(call_of >= 0)
        key = call_of[own].astype(np.uint64) << np.uint64(32) | sections["space"][own]
        keys, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        self.of_section[own] = inverse
        kind = np.full(len(keys), CALL, np.uint8)
        kind[inverse[sections["kind"][own] == KINDS["EXEC"]]] = EXEC
        nothing = np.full(len(keys), -1, np.int64)
        call = (keys >> np.uint64(32)).astype(np.int64)
        space = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        self._add(space, kind, call, nothing, sections["index"][own[first]])
        idle = np.ones(len(calls["index"]), bool)
        idle[call] = False
        idle &= ~_child_returns(self.records)
        rest = np.flatnonzero(idle)
        nothing = np.full(len(rest), -1, np.int64)
        self._add(
            calls["space"][rest], np.full(len(rest), CALL, np.uint8), rest, nothing, calls["index"][rest]
        )

    def _add_lonely_sections(self, lonely: Array) -> None:
        sections = self.records.sections
        kind = np.full(len(lonely), OTHER, np.uint8)
        fault = (sections["op_class"][lonely] == _FAULT_CLASS) | (sections["grew"][lonely] != 0)
        kind[fault] = FAULT
        kind[sections["kind"][lonely] == KINDS["EXEC"]] = EXEC
        kind[sections["kind"][lonely] == KINDS["LAST"]] = EXIT
        keep = (kind == EXEC) | (kind == EXIT) | (sections["changed"][lonely] == CHANGED)
        self.dropped = int((~keep).sum())
        lonely, kind = lonely[keep], kind[keep]
        self.of_section[lonely] = self.count + np.arange(len(lonely))
        nothing = np.full(len(lonely), -1, np.int64)
        self._add(sections["space"][lonely], kind, nothing, nothing, sections["index"][lonely])

    def _add_forks(self) -> None:
        rows = [
            (row, task)
            for row, task in enumerate(self.records.tasks)
            if task["kind"] == KINDS["FORK"] and task["parent_space"] not in (0, task["space"])
        ]
        number = np.array([row for row, _ in rows], np.int64)
        space = np.array([task["space"] for _, task in rows], np.uint32)
        order = np.array([task["index"] for _, task in rows], np.uint64)
        self._add(space, np.full(len(rows), FORK, np.uint8), np.full(len(rows), -1, np.int64), number, order)

    def finish(self) -> Operations:
        columns = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        sort = np.lexsort((columns["order"], columns["space"]))
        columns = {name: values[sort] for name, values in columns.items()}
        place = np.empty(self.count, np.int64)
        place[sort] = np.arange(self.count)
        has = self.of_section >= 0
        of_section = np.where(has, place[self.of_section], -1).astype(np.int32)
        listed = np.flatnonzero(has)
        listed = listed[np.argsort(of_section[listed], kind="stable")]
        first = np.zeros(self.count + 1, np.int64)
        np.cumsum(np.bincount(of_section[listed], minlength=self.count), out=first[1:])
        space = columns["space"]
        starts = np.r_[0, np.flatnonzero(space[1:] != space[:-1]) + 1].astype(np.int64) if self.count else []
        number = np.arange(self.count) - np.repeat(starts, np.diff(np.r_[starts, self.count]))
        return Operations(
            space, number.astype(np.uint32), columns["kind"].astype(np.uint8),
            columns["call"].astype(np.int32), columns["task"].astype(np.int32), columns["order"],
            np.zeros(self.count, np.uint8), np.zeros(self.count, np.uint8), first, listed.astype(np.uint32),
            {}, self.dropped, of_section,
        )  # fmt: skip


def _sum_effects(records: Records, operations: Operations) -> None:
    sections, total = records.sections, len(operations)
    listed = operations.sections
    owner = operations.of_section[listed]
    for name in EFFECTS:
        weights = sections[name][listed]
        operations.effects[name] = np.bincount(owner, weights=weights, minlength=total).astype(np.uint32)
    operations.changed[owner[sections["changed"][listed] == CHANGED]] = 1
    operations.changed[np.isin(operations.kind, (FORK, EXEC, EXIT))] = 1
    calls = operations.call >= 0
    in_place = np.zeros(total, bool)
    in_place[calls] = records.calls["in_place"][operations.call[calls]] != 0
    operations.effects["grow"][in_place] = np.minimum(operations.effects["merge"][in_place], 1)
    for at in np.flatnonzero(operations.kind == FORK).tolist():
        operations.effects["copy"][at] = records.tasks[operations.task[at]]["map_count"]


def _flag(records: Records, operations: Operations, groups: Groups) -> None:
    lost, wrong = section_faults(records, groups.order)
    for sections, flag in ((lost, LOST), (wrong, MISCOUNTED)):
        owner = operations.of_section[sections]
        operations.flags[owner[owner >= 0]] |= flag
    last = max((hi for _, hi in records.gaps), default=-1)
    last = max([last, *(int(row["index"]) for row in records.losses if row["lost"])])
    if last >= 0:
        orphan = (operations.kind == OTHER) & (operations.order <= last)
        operations.flags[orphan] |= LOST


def is_snapshot(sections: dict[str, Array], part: Any) -> Array:
    """Which of these sections are looks at a living address space, not write sections."""
    found: Array = sections["kind"][part] == KINDS["SECTION"]
    found &= (sections["nr"][part] == FAULT_NR) & (sections["op_class"][part] == 0)
    return found


def section_faults(records: Records, by_space: Array) -> tuple[Array, Array]:
    """Sections before which others of their space are missing, and those whose map_count does not add up."""
    sections = records.sections
    space, seq = sections["space"][by_space], sections["seq"][by_space].astype(np.int64)
    count = sections["map_count"][by_space].astype(np.int64)
    same = np.zeros(len(by_space), bool)
    same[1:] = space[1:] == space[:-1]
    previous_seq, previous = np.r_[0, seq[:-1]], np.r_[0, count[:-1]]
    previous_seq[~same] = seq[~same] - 1
    forks = {task["space"]: task for task in records.tasks if task["kind"] == KINDS["FORK"]}
    known = same.copy()
    for at in np.flatnonzero(~same).tolist():
        task = forks.get(int(space[at]))
        if task is not None and task["parent_space"] not in (0, task["space"]):
            previous_seq[at], previous[at], known[at] = task["seq"], task["map_count"], True
    # A snapshot stands right behind the section whose state it shows.
    snapshot = is_snapshot(sections, by_space)
    gap = seq != np.where(snapshot & same, previous_seq, previous_seq + 1)
    effects = {name: sections[name][by_space].astype(np.int64) for name in EFFECTS}
    expected = effects["new"] + effects["copy"] + effects["split"] - effects["unmap"] - effects["victim"]
    # An exec starts anew, the last look comes after the VMAs are gone, and a snapshot counts nothing.
    counted = (sections["kind"][by_space] == KINDS["SECTION"]) & (count > 0)
    wrong = known & ~gap & counted & (previous > 0) & (count - previous != expected)
    return by_space[gap], by_space[wrong]
