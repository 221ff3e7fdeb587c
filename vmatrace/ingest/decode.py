"""Makes values of the rows of one decoded batch: VMAs, walks, sections, arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from vmatrace.ingest.changes import CHANGED
from vmatrace.ingest.effects import Evidence
from vmatrace.ingest.objects import ObjectIds
from vmatrace.ingest.records import Records
from vmatrace.ingest.views import Section, Walk
from vmatrace.schema import KINDS, ROW_BITS
from vmatrace.tracefile import Table
from vmatrace.vma import Vma

Array = npt.NDArray[Any]

_ANONYMOUS: Final = ROW_BITS["ROW_ANONYMOUS"]
_CLOSE: Final = ROW_BITS["ROW_CLOSE"]
_FORKED: Final = ROW_BITS["ROW_FORKED"]
_SIDES: Final = ("before", "after")
_EXEC: Final = KINDS["EXEC"]
# In the order of the fields of Section.
_SECTION_NUMBERS: Final = (
    "index", "time", "acquired", "space", "seq", "pid", "tid", "kind", "op_class", "abi", "nr", "def_flags",
    "mm_flags", "brk_before", "start_brk", "brk", "map_count", "total_vm", "data_vm", "stack_vm", "locked_vm",
)  # fmt: skip
_VMA_NUMBERS: Final = ("start", "end", "flags", "pgoff", "bits", "anon_vma", "file", "uffd", "policy")


class Files(Protocol):
    """Finds the id of a file by the address of its struct file at the time of a record."""

    def find(self, pointer: int, index: int) -> int:
        """The id of the file at ``pointer`` when record ``index`` was made."""


class BatchRows:
    """The rows of one batch; ``numbers``: the section number of each row of its sections."""

    def __init__(
        self,
        tables: Mapping[str, Table],
        numbers: Array,
        objects: ObjectIds,
        files: Files,
        machine: str | None = None,
    ) -> None:
        self._machine = machine
        self._sections, self._calls = tables["sections"], tables["calls"]
        self._numbers = numbers
        self._objects = objects
        self._files = files
        self._ids: dict[str, Array] = {}
        self._rows: dict[str, Array] = {}
        self._args: Array | None = None

    def call_args(self, row: int) -> tuple[int, ...]:
        """The six arguments of a call."""
        if self._args is None:
            self._args = np.stack([self._calls[f"arg{n}"] for n in range(6)], axis=1)
        return tuple(self._args[row].tolist())

    def vmas(self, row: int, side: int, first: int, last: int) -> tuple[Vma, ...]:
        """VMAs ``first`` to ``last`` (exclusive) of the rows that a section has on one side (0: before)."""
        name = _SIDES[side]
        origin = int(self._sections.offsets(name)[row])
        part = slice(origin + first, origin + last)
        names: list[str] = self._names(name)
        index = int(self._sections["index"][row])
        found = []
        for at, (start, end, flags, pgoff, bits, anon_vma, file, uffd, policy, obj) in enumerate(
            self._vma_rows(name)[part].tolist(), part.start
        ):
            found.append(
                Vma(
                    start,
                    end,
                    flags,
                    pgoff,
                    self._files.find(file, index) if file else None,
                    bits & _ANONYMOUS != 0,
                    bits & _CLOSE != 0,
                    anon_vma or None,
                    bits & _FORKED != 0,
                    uffd or None,
                    policy or None,
                    names[at] or None if names else None,
                    obj,
                )
            )
        return tuple(found)

    def section(self, row: int, number: int, lost_before: bool, records: Records) -> Section:
        """The section in that row; ``number``: its place among all sections."""
        rows = self._rows.get("sections")
        if rows is None:
            rows = self._rows["sections"] = _as_rows(self._sections, _SECTION_NUMBERS)
        comm = self._sections.text("comm")[row] if int(rows[row]["kind"]) == _EXEC else ""
        grew = bool(records.sections["grew"][number])
        changed = bool(records.sections["changed"][number] == CHANGED)
        looks = (self._walks(row, 0), self._walks(row, 1), self._evidence(row))
        values = (number, *rows[row].tolist(), comm, *looks, grew, changed, lost_before)
        return Section(*values)

    def _walks(self, row: int, side: int) -> tuple[Walk, ...]:
        name = _SIDES[side] + "_cover"
        rows = self._rows.get(name)
        if rows is None:
            rows = self._rows[name] = _as_rows(self._sections.child(name), ("start", "end", "flags", "rows"))
        offsets = self._sections.offsets(name)
        found, first = [], 0
        for start, end, flags, count in rows[offsets[row] : offsets[row + 1]].tolist():
            if end > start:
                found.append(Walk(start, end, flags, self.vmas(row, side, first, first + count)))
            first += count
        return tuple(found)

    def _evidence(self, row: int) -> tuple[Evidence, ...]:
        offsets = self._sections.offsets("evidence")
        first, last = int(offsets[row]), int(offsets[row + 1])
        if first == last:
            return ()
        rows = self._rows.get("evidence")
        if rows is None:
            rows = _as_rows(self._sections.child("evidence"), ("what", "object", "start", "end"))
            rows["object"] = self._object_ids("evidence")
            self._rows["evidence"] = rows
        return tuple(Evidence(*item) for item in rows[first:last].tolist())

    def _vma_rows(self, side: str) -> Array:
        rows = self._rows.get(side)
        if rows is None:
            rows = _as_rows(self._sections.child(side), (*_VMA_NUMBERS, "object"))
            rows["object"] = self._object_ids(side)
            rows["flags"] = common_flags(rows["flags"], self._machine)
            self._rows[side] = rows
        return rows

    def _names(self, side: str) -> list[str]:
        """The anonymous names of all VMAs of a side; no list at all where none has one."""
        table = self._sections.child(side)
        key = side + " names"
        if key not in self._rows:
            self._rows[key] = np.array(table.has_text("name"))
        return table.text("name") if self._rows[key] else []

    def _object_ids(self, name: str) -> Array:
        """Ids of all objects in a child table, each as of its moment."""
        found = self._ids.get(name)
        if found is not None:
            return found
        table, offsets = self._sections.child(name), self._sections.offsets(name)
        owner = np.repeat(np.arange(self._sections.rows), np.diff(offsets))
        numbers = self._numbers[owner]
        births = self._objects.births_before(numbers + (1 if name == "after" else 0))
        if name == "evidence":
            births = births + self._births_inside(table, owner)
        ids = self._objects.ids(table["object"], self._sections["space"][owner], births)
        self._ids[name] = ids
        return ids

    def _births_inside(self, evidence: Table, owner: Array) -> Array:
        """How many births of its own section came before or with each row of evidence."""
        birth = self._objects.is_birth(evidence["what"])
        total = np.cumsum(birth)
        counts = np.bincount(owner, weights=birth, minlength=self._sections.rows).astype(np.int64)
        ahead = np.cumsum(counts) - counts
        inside: Array = total - ahead[owner]
        return inside


def common_flags(flags: Array, machine: str | None) -> Array:
    """Flags of any architecture in the bits of x86: arm64's MTE_ALLOWED (37) and shadow stack (38) change places."""
    if machine != "aarch64":
        return flags
    differ = (flags >> np.uint64(37) ^ flags >> np.uint64(38)) & np.uint64(1)
    swapped: Array = flags ^ (differ << np.uint64(37) | differ << np.uint64(38))
    return swapped


def _as_rows(table: Table, names: Sequence[str]) -> Array:
    """Columns as one array of rows, of which a slice becomes Python values in one step."""
    columns = [table[name] for name in names]
    rows = np.empty(table.rows, [(name, column.dtype) for name, column in zip(names, columns, strict=True)])
    for name, column in zip(names, columns, strict=True):
        rows[name] = column
    return rows
