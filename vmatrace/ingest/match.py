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

from vmatrace.ingest.changes import CHANGED, UNCHANGED, UNTOLD
from vmatrace.ingest.effects import EFFECTS
from vmatrace.ingest.records import Records
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

_CHUNK: Final = 1 << 17
_INDEX_MASK: Final = np.uint64((1 << 40) - 1)

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
    ends = np.r_[starts[1:], len(space)][: len(starts)]
    ids = ordered[starts].tolist()
    return Groups(order, {n: slice(lo, hi) for n, lo, hi in zip(ids, starts.tolist(), ends.tolist(), strict=True)})


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
    sum_up(records, operations, groups)
    return operations


def sum_up(records: Records, operations: Operations, groups: Groups) -> None:
    """Fill in the effects and flags of operations from those of their sections (again, if these changed)."""
    operations.flags[:] = 0
    _sum_effects(records, operations)
    _flag(records, operations, groups)


def _child_returns(records: Records) -> Array:
    """Calls that are a fork seen from the child: no calls of their own."""
    calls = records.calls
    found: Array = (calls["op_class"] == _FORK_CLASS) & (calls["result"] == 0)
    return found


def _calls_of_sections(records: Records) -> Array:
    """The call that each section belongs to (its task's next one, with the same number), or -1."""
    sections, calls = records.sections, records.calls
    call_of = np.full(len(sections["index"]), -1, np.int32)
    if not len(calls["index"]):
        return call_of
    key = _task_order(calls, slice(None))
    sort = None if bool((key[1:] >= key[:-1]).all()) else np.argsort(key, kind="stable").astype(np.int32)
    if sort is not None:
        key = key[sort]
    returns = _child_returns(records)
    for first in range(0, len(call_of), _CHUNK):
        part = slice(first, first + _CHUNK)
        call = np.minimum(np.searchsorted(key, _task_order(sections, part)), len(key) - 1)
        if sort is not None:
            call = sort[call]
        own = {name: sections[name][part] for name in ("tid", "index", "nr", "abi", "kind", "op_class", "grew")}
        fits = (own["kind"] == KINDS["SECTION"]) & (own["op_class"] != _FAULT_CLASS) & (own["grew"] == 0)
        fits &= (own["nr"] == calls["nr"][call]) & (own["abi"] == calls["abi"][call])
        fits |= (own["kind"] == KINDS["EXEC"]) & (calls["op_class"][call] == _EXEC_CLASS)
        fits &= (own["tid"] == calls["tid"][call]) & (own["index"] < calls["index"][call]) & ~returns[call]
        call_of[part] = np.where(fits, call, -1)
    return call_of


def _task_order(table: dict[str, Array], part: slice) -> Array:
    """A number that sorts records by task, then in the order in which they were made."""
    return table["tid"][part].astype(np.uint64) << np.uint64(40) | table["index"][part] & _INDEX_MASK


class _Draft:
    """Operations before they are sorted."""

    def __init__(self, records: Records, call_of: Array) -> None:
        self.records = records
        self.parts: dict[str, list[Array]] = {name: [] for name in ("space", "kind", "call", "task", "order")}
        self.count = 0
        self.of_section = np.full(len(call_of), -1, np.int32)
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
        own = np.flatnonzero(call_of >= 0).astype(np.int32)
        if not bool((np.diff(call_of[own]) > 0).all()):
            own = own[np.lexsort((sections["space"][own], call_of[own]))]
        call, space = call_of[own], sections["space"][own]
        fresh = np.ones(len(own), bool)
        fresh[1:] = (call[1:] != call[:-1]) | (space[1:] != space[:-1])
        self.of_section[own] = np.cumsum(fresh, dtype=np.int32) - 1
        kind = np.full(int(fresh.sum()), CALL, np.uint8)
        kind[self.of_section[own[sections["kind"][own] == KINDS["EXEC"]]]] = EXEC
        call, space = call[fresh], space[fresh]
        nothing = np.full(len(call), -1, np.int32)
        self._add(space, kind, call, nothing, sections["index"][own[fresh]])
        idle = np.ones(len(calls["index"]), bool)
        idle[call] = False
        idle &= ~_child_returns(self.records)
        rest = np.flatnonzero(idle).astype(np.int32)
        nothing = np.full(len(rest), -1, np.int32)
        self._add(calls["space"][rest], np.full(len(rest), CALL, np.uint8), rest, nothing, calls["index"][rest])

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
        nothing = np.full(len(lonely), -1, np.int32)
        self._add(sections["space"][lonely], kind, nothing, nothing, sections["index"][lonely])

    def _add_forks(self) -> None:
        rows = [
            (row, task)
            for row, task in enumerate(self.records.tasks)
            if task["kind"] == KINDS["FORK"] and task["parent_space"] not in (0, task["space"])
        ]
        number = np.array([row for row, _ in rows], np.int32)
        space = np.array([task["space"] for _, task in rows], np.uint32)
        order = np.array([task["index"] for _, task in rows], np.uint64)
        self._add(space, np.full(len(rows), FORK, np.uint8), np.full(len(rows), -1, np.int32), number, order)

    def finish(self) -> Operations:
        space, order = np.concatenate(self.parts.pop("space")), np.concatenate(self.parts.pop("order"))
        sort = np.lexsort((order, space)).astype(np.int32)
        place = np.empty(self.count, np.int32)
        place[sort] = np.arange(self.count, dtype=np.int32)
        space, order = space[sort], order[sort]
        columns = {name: np.concatenate(self.parts.pop(name))[sort] for name in ("kind", "call", "task")}
        has = self.of_section >= 0
        of_section = np.full(len(has), -1, np.int32)
        of_section[has] = place[self.of_section[has]]  # a trace may have sections and no operation at all
        listed = np.flatnonzero(has).astype(np.uint32)
        if not bool((np.diff(of_section[listed]) >= 0).all()):
            listed = listed[np.argsort(of_section[listed], kind="stable")]
        first = np.zeros(self.count + 1, np.uint32)
        np.cumsum(np.bincount(of_section[listed], minlength=self.count), out=first[1:])
        starts = np.flatnonzero(np.r_[True, space[1:] != space[:-1]][: self.count]).astype(np.uint32)
        number = np.arange(self.count, dtype=np.uint32)
        number -= np.repeat(starts, np.diff(np.r_[starts, self.count]))
        return Operations(
            space, number, columns["kind"].astype(np.uint8), columns["call"].astype(np.int32),
            columns["task"].astype(np.int32), order, np.zeros(self.count, np.uint8),
            np.zeros(self.count, np.uint8), first, listed, {}, self.dropped, of_section,
        )  # fmt: skip


def _sum_effects(records: Records, operations: Operations) -> None:
    sections, total = records.sections, len(operations)
    listed = operations.sections
    owner = operations.of_section[listed]
    for name in EFFECTS:
        weights = sections[name][listed]
        sums = np.bincount(owner, weights=weights, minlength=total)
        operations.effects[name] = sums.astype(np.min_scalar_type(int(sums.max(initial=0))))
    operations.changed[owner[sections["changed"][listed] == CHANGED]] = 1
    operations.changed[np.isin(operations.kind, (FORK, EXEC, EXIT))] = 1
    calls = operations.call >= 0
    in_place = np.zeros(total, bool)
    in_place[calls] = records.calls["in_place"][operations.call[calls]] != 0
    operations.effects["grow"][in_place] = operations.effects["merge"][in_place] > 0
    copies = operations.effects["copy"].astype(np.uint32)
    for at in np.flatnonzero(operations.kind == FORK).tolist():
        copies[at] = records.tasks[operations.task[at]]["map_count"]
    operations.effects["copy"] = copies.astype(np.min_scalar_type(int(copies.max(initial=0))))


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
    forks = {
        task["space"]: (task["seq"], task["map_count"])
        for task in records.tasks
        if task["kind"] == KINDS["FORK"] and task["parent_space"] not in (0, task["space"])
    }
    lost, wrong = [], []
    for first in range(0, len(by_space), _CHUNK):
        part = by_space[first : first + _CHUNK]
        ahead = by_space[first - 1 : first]
        gap, off = _chunk_faults(records.sections, part, ahead, forks)
        lost.append(part[gap])
        wrong.append(part[off])
    nothing = np.zeros(0, np.uint32)
    return np.concatenate([nothing, *lost]), np.concatenate([nothing, *wrong])


def _chunk_faults(
    sections: dict[str, Array], part: Array, ahead: Array, forks: dict[int, tuple[int, int]]
) -> tuple[Array, Array]:
    """Which of these sections have a loss before them, and which count wrongly; ``ahead``: the one before."""
    chain = np.concatenate([ahead, part]) if len(ahead) else np.concatenate([part[:1], part])
    space = sections["space"][chain]
    seq, count = sections["seq"][chain].astype(np.int64), sections["map_count"][chain].astype(np.int64)
    same = space[1:] == space[:-1]
    if not len(ahead):
        same[0] = False
    previous_seq, previous = np.where(same, seq[:-1], seq[1:] - 1), count[:-1].copy()
    known = same.copy()
    for at in np.flatnonzero(~same).tolist():
        if int(space[at + 1]) in forks:
            previous_seq[at], previous[at] = forks[int(space[at + 1])]
            known[at] = True
    # A snapshot stands right behind the section whose state it shows.
    snapshot = is_snapshot(sections, part)
    gap = seq[1:] != np.where(snapshot & known, previous_seq, previous_seq + 1)
    effects = {name: sections[name][part].astype(np.int64) for name in EFFECTS}
    expected = effects["new"] + effects["copy"] + effects["split"] - effects["unmap"] - effects["victim"]
    # An exec starts anew, the last look comes after the VMAs are gone.
    counted = (sections["kind"][part] == KINDS["SECTION"]) & (count[1:] > 0)
    error = np.where(known & ~gap & counted & (previous > 0), count[1:] - previous - expected, 0)
    # One wrong count makes two wrong steps: the second only leads back.
    echo = np.zeros(len(error), bool)
    echo[1:] = (error[1:] == -error[:-1]) & same[1:]
    return gap, (error != 0) & ~echo
