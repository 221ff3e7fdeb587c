"""The records of a trace as plain values, in the order in which they happened, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vmatrace.ingest.decode import common_flags
from vmatrace.ingest.effects import EFFECTS
from vmatrace.ingest.match import Operations
from vmatrace.ingest.records import Records
from vmatrace.tracefile import Table, TraceFile

Array = npt.NDArray[Any]
Row = tuple[int, int, int, int, int, int, int, int, int, int, str]
Cover = tuple[int, int, int, int]
Event = tuple[int, int, int, int]

_SECTION: Final = (
    "index", "time", "space", "seq", "pid", "tid", "kind", "op_class", "abi", "nr", "def_flags", "mm_flags",
    "brk_before", "start_brk", "brk", "map_count", "total_vm", "data_vm", "stack_vm", "locked_vm",
)  # fmt: skip
_VMA: Final = ("start", "end", "flags", "pgoff", "bits", "object", "anon_vma", "file", "uffd", "policy")
_CALL: Final = (
    "index", "time", "space", "seq", "pid", "tid", "abi", "nr", "result", "file",
    "arg0", "arg1", "arg2", "arg3", "arg4", "arg5",
)  # fmt: skip


class Section(NamedTuple):
    """One write section (or first or last look) of an address space; columns as in the schema."""

    place: int
    time: int
    space: int
    seq: int
    pid: int
    tid: int
    kind: int
    op_class: int
    abi: int
    nr: int
    def_flags: int
    mm_flags: int
    brk_before: int
    start_brk: int
    brk: int
    map_count: int
    total_vm: int
    data_vm: int
    stack_vm: int
    locked_vm: int
    before: list[Row]
    before_cover: list[Cover]
    after: list[Row]
    after_cover: list[Cover]
    evidence: list[Event]


class OperationRow(NamedTuple):
    """The columns of one operation (`vmatrace.ingest.match.Operations`); ``number`` -1: it is none."""

    row: int
    kind: int
    space: int
    number: int
    flags: int
    changed: int
    call: int
    task: int
    order: int
    #: Its sections are ``Operations.sections[first:end]``.
    first: int
    end: int
    #: Counts by `vmatrace.ingest.effects.EFFECTS`.
    effects: tuple[int, ...]


class Call(NamedTuple):
    """One system call that returned."""

    place: int
    time: int
    space: int
    seq: int
    pid: int
    tid: int
    abi: int
    nr: int
    result: int
    #: A failed mmap's file, 0 where there is none of that number.
    file: int
    args: tuple[int, ...]


class _Batch:
    """One batch with its columns as lists; each section is put together when it is asked for."""

    def __init__(self, tables: dict[str, Table], machine: str | None) -> None:
        sections, calls = tables["sections"], tables["calls"]
        self._heads = list(zip(*(sections[name].tolist() for name in _SECTION), strict=True))
        self._before, self._before_cover = _rows(sections, "before", machine), _covers(sections, "before_cover")
        self._after, self._after_cover = _rows(sections, "after", machine), _covers(sections, "after_cover")
        self._offsets = [
            sections.offsets(name).tolist() for name in ("before", "before_cover", "after", "after_cover", "evidence")
        ]
        evidence = sections.child("evidence")
        self._evidence: list[Event] = list(
            zip(*(evidence[name].tolist() for name in ("what", "object", "start", "end")), strict=True)
        )
        self._calls = list(zip(*(calls[name].tolist() for name in _CALL), strict=True))

    def section(self, row: int) -> Section:
        """The section in row ``row`` of the batch's table."""
        b, bc, a, ac, e = self._offsets
        n = row + 1
        lists = (
            self._before[b[row] : b[n]], self._before_cover[bc[row] : bc[n]], self._after[a[row] : a[n]],
            self._after_cover[ac[row] : ac[n]], self._evidence[e[row] : e[n]],
        )  # fmt: skip
        return Section._make((*self._heads[row], *lists))

    def call(self, row: int) -> Call:
        """The call in row ``row`` of the batch's table."""
        values = self._calls[row]
        return Call._make((*values[:10], values[10:]))


def _rows(sections: Table, name: str, machine: str | None) -> list[Row]:
    child = sections.child(name)
    names = child.text("name") if child.has_text("name") else [""] * child.rows
    columns = (common_flags(child[column], machine) if column == "flags" else child[column] for column in _VMA)
    return list(zip(*(column.tolist() for column in columns), names, strict=True))


def _covers(sections: Table, name: str) -> list[Cover]:
    child = sections.child(name)
    return list(zip(*(child[column].tolist() for column in ("start", "end", "flags", "rows")), strict=True))


class Reader:
    """Gives sections and calls by their number in ``Records``; few batches are decoded at a time."""

    def __init__(self, file: TraceFile, records: Records) -> None:
        self._file = file
        self._section_row = _places(records.section_row, len(records.sections["index"]))
        self._call_row = _places(records.call_row, len(records.calls["index"]))
        self._section_batch = records.section_batch.tolist()
        self._call_batch = records.call_batch.tolist()
        self._section_at = np.searchsorted(records.section_batch, self._section_row, side="right") - 1
        self._call_at = np.searchsorted(records.call_batch, self._call_row, side="right") - 1
        self._batches: dict[int, _Batch] = {}
        self._machine: str | None = file.header.get("machine")

    def section(self, number: int) -> Section:
        """Section ``number`` in the order of ``index``."""
        at = int(self._section_at[number])
        return self._batch(at).section(int(self._section_row[number]) - self._section_batch[at])

    def call(self, number: int) -> Call:
        """Call ``number`` in the order of ``index``."""
        at = int(self._call_at[number])
        return self._batch(at).call(int(self._call_row[number]) - self._call_batch[at])

    def _batch(self, number: int) -> _Batch:
        batch = self._batches.get(number)
        if batch is None:
            tables = self._file.batch(number)
            if tables is None:
                raise IndexError(number)
            if len(self._batches) > 3:
                del self._batches[min(self._batches)]
            batch = self._batches[number] = _Batch(tables, self._machine)
        return batch


def _places(rows: Any, count: int) -> Any:
    """Rows of the file by number; None: they stand in the file as they are numbered."""
    return np.arange(count, dtype=np.uint32) if rows is None else rows


OPERATION: Final = "operation"
SECTION: Final = "section"
FAULT: Final = "fault"
TASK: Final = "task"
FILE: Final = "file"
LIMIT: Final = "limit"
# Of things at one index: a fork's task row stands before the copy that it tells of.
_KINDS: Final = (LIMIT, FILE, TASK, FAULT, OPERATION, SECTION)
_CHUNK: Final = 1 << 16


def late_sections(records: Records, operations: Operations) -> Array:
    """Sections of operations in which another section of the address space came between: those after it."""
    listed = operations.sections
    owner, seq = operations.of_section[listed], records.sections["seq"][listed].astype(np.int64)
    same = owner[1:] == owner[:-1]
    broken = np.flatnonzero(same & (seq[1:] != seq[:-1] + 1)) + 1
    late = np.zeros(len(listed), bool)
    for at in broken.tolist():
        late[at : int(operations.first[owner[at] + 1])] = True
    found: Array = listed[late]
    return found


def walk(
    records: Records, operations: Operations, late: Array
) -> Iterator[tuple[str, int, OperationRow | None]]:
    """Everything in the order of ``index``: what it is, its row in its table, and an operation's columns.

    Operations stand where their first record does; sections are those that belong to no operation, and
    the ``late`` ones.
    """
    idle = np.union1d(np.flatnonzero(operations.of_section < 0), late)
    columns = [
        (_index(records.limits), None), (_index(records.files), None), (_index(records.tasks), None),
        (records.faults["index"], None), (operations.order, None), (records.sections["index"][idle], idle),
    ]  # fmt: skip
    index = np.concatenate([column for column, _ in columns])
    kind = np.repeat(np.arange(len(columns)), [len(column) for column, _ in columns])
    number = np.concatenate([np.arange(len(c)) if at is None else at for c, at in columns])
    order = np.lexsort((kind, index))
    kind, number = kind[order], number[order]
    for low in range(0, len(order), _CHUNK):
        kinds, numbers = kind[low : low + _CHUNK], number[low : low + _CHUNK]
        found = iter(_rows_of(operations, numbers[kinds == _KINDS.index(OPERATION)]))
        for k, n in zip(kinds.tolist(), numbers.tolist(), strict=True):
            what = _KINDS[k]
            yield what, n, next(found) if what == OPERATION else None


def _rows_of(operations: Operations, rows: Any) -> list[OperationRow]:
    columns = (
        operations.kind, operations.space, operations.number, operations.flags, operations.changed,
        operations.call, operations.task, operations.order, operations.first[:-1], operations.first[1:],
    )  # fmt: skip
    effects = zip(*(operations.effects[name][rows].tolist() for name in EFFECTS), strict=True)
    return list(map(OperationRow, rows.tolist(), *(column[rows].tolist() for column in columns), effects))


def _index(rows: list[dict[str, Any]]) -> Any:
    return np.array([row["index"] for row in rows], np.uint64)
