"""Makes values of the rows of one decoded batch: VMAs, walks, sections, arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from vmatrace.ingest.effects import Evidence
from vmatrace.ingest.objects import ObjectIds
from vmatrace.ingest.records import CHANGED, Records
from vmatrace.ingest.views import Section, Walk
from vmatrace.schema import ROW_BITS
from vmatrace.tracefile import Table
from vmatrace.vma import Vma

Array = npt.NDArray[Any]

_ANONYMOUS: Final = ROW_BITS["ROW_ANONYMOUS"]
_CLOSE: Final = ROW_BITS["ROW_CLOSE"]
_FORKED: Final = ROW_BITS["ROW_FORKED"]
_SIDES: Final = ("before", "after")
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

    def __init__(self, tables: Mapping[str, Table], numbers: Array, objects: ObjectIds, files: Files) -> None:
        self._sections, self._calls = tables["sections"], tables["calls"]
        self._numbers = numbers
        self._objects = objects
        self._files = files
        self._ids: dict[str, Array] = {}
        self._columns: dict[str, list[Array]] = {}

    def call_args(self, row: int) -> tuple[int, ...]:
        """The six arguments of a call."""
        return tuple(int(self._calls[f"arg{n}"][row]) for n in range(6))

    def vmas(self, row: int, side: int, first: int, last: int) -> tuple[Vma, ...]:
        """VMAs ``first`` to ``last`` (exclusive) of the rows that a section has on one side (0: before)."""
        name = _SIDES[side]
        origin = int(self._sections.offsets(name)[row])
        part = slice(origin + first, origin + last)
        table = self._sections.child(name)
        columns = [column[part].tolist() for column in self._vma_columns(name)]
        objects = self._object_ids(name)[part].tolist()
        names = table.text("name")[part] if table.has_text("name") else [""] * len(objects)
        index = int(self._sections["index"][row])
        found = []
        for start, end, flags, pgoff, bits, anon_vma, file, uffd, policy, obj, text in zip(
            *columns, objects, names, strict=True
        ):
            found.append(
                Vma(
                    start,
                    end,
                    flags,
                    pgoff,
                    self._files.find(file, index) if file else None,
                    bool(bits & _ANONYMOUS),
                    bool(bits & _CLOSE),
                    anon_vma or None,
                    bool(bits & _FORKED),
                    uffd or None,
                    policy or None,
                    text or None,
                    obj,
                )
            )
        return tuple(found)

    def section(self, row: int, number: int, lost_before: bool, records: Records) -> Section:
        """The section in that row; ``number``: its place among all sections."""
        table = self._sections
        values = {name: int(table[name][row]) for name in _SECTION_NUMBERS}
        return Section(
            number=number,
            comm=table.text("comm")[row] if table.has_text("comm") else "",
            before=self._walks(row, 0),
            after=self._walks(row, 1),
            evidence=self._evidence(row),
            grew=bool(records.sections["grew"][number]),
            changed=bool(records.sections["changed"][number] == CHANGED),
            lost_before=lost_before,
            **values,
        )

    def _walks(self, row: int, side: int) -> tuple[Walk, ...]:
        name = _SIDES[side] + "_cover"
        covers, offsets = self._sections.child(name), self._sections.offsets(name)
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        found, first = [], 0
        for start, end, flags, rows in zip(
            *(covers[column][part].tolist() for column in ("start", "end", "flags", "rows")), strict=True
        ):
            if end > start:
                found.append(Walk(start, end, flags, self.vmas(row, side, first, first + rows)))
            first += rows
        return tuple(found)

    def _evidence(self, row: int) -> tuple[Evidence, ...]:
        offsets, table = self._sections.offsets("evidence"), self._sections.child("evidence")
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        if part.start == part.stop:
            return ()
        objects = self._object_ids("evidence")[part].tolist()
        what, start, end = (table[name][part].tolist() for name in ("what", "start", "end"))
        return tuple(Evidence(*item) for item in zip(what, objects, start, end, strict=True))

    def _vma_columns(self, side: str) -> list[Array]:
        found = self._columns.get(side)
        if found is None:
            table = self._sections.child(side)
            found = self._columns[side] = [table[name] for name in _VMA_NUMBERS]
        return found

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
