"""Reads all records of a trace once and keeps of each what ordering and matching need, as NumPy columns.

VMA rows, arguments and evidence stay in the file and are decoded again when asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmatrace.errors import BadTrace
from vmatrace.ingest.changes import EVERYTHING, changes, uncovered
from vmatrace.ingest.effects import (
    ALLOC,
    DUP,
    EFFECTS,
    FREED,
    MERGED,
    UNMAPPED,
    count_effects,
    row_ranges,
)
from vmatrace.ingest.losses import CpuNumbers
from vmatrace.schema import FILE_FIELDS, KINDS, LIMIT_FIELDS, LOSS_FIELDS, OP_CLASSES, TASK_FIELDS, Field
from vmatrace.tracefile import Table, TraceFile

Array = npt.NDArray[Any]

_OP_MREMAP: Final = OP_CLASSES["OP_MREMAP"]
_SECTION: Final = {
    "index": np.uint64, "time": np.uint64, "acquired": np.uint64, "space": np.uint32, "seq": np.uint32,
    "pid": np.uint32, "tid": np.uint32, "nr": np.uint16, "kind": np.uint8, "op_class": np.uint8,
    "abi": np.uint8, "map_count": np.uint32,
}  # fmt: skip
_CALL: Final = {
    "index": np.uint64, "time": np.uint64, "space": np.uint32, "pid": np.uint32, "tid": np.uint32,
    "nr": np.uint16, "op_class": np.uint8, "abi": np.uint8, "result": np.int64,
}  # fmt: skip
_FAULT: Final = {"index": np.uint64, "time": np.uint64, "space": np.uint32, "tid": np.uint32}
_COVER: Final = {"start": np.uint64, "end": np.uint64, "flags": np.uint8, "rows": np.uint32}


@dataclass(slots=True)
class Covers:
    """The walked intervals of all sections, on one side: ``first[i]:first[i + 1]`` are those of section i."""

    first: Array
    start: Array
    end: Array
    flags: Array
    #: How many rows of the VMA table belong to it.
    rows: Array


@dataclass(slots=True)
class Records:
    """Columns of all records in the order of ``index``; sections also have effects and covers.

    ``sections["changed"]``: UNCHANGED, CHANGED or UNTOLD. ``sections["grew"]``: its only effect is a stack
    that grew. ``uncovered``: section -> the stored range that no trusted walk read afterwards.
    """

    sections: dict[str, Array]
    calls: dict[str, Array]
    faults: dict[str, Array]
    tasks: list[dict[str, Any]]
    files: list[dict[str, Any]]
    limits: list[dict[str, Any]]
    losses: list[dict[str, Any]]
    before: Covers
    after: Covers
    births: dict[str, Array]
    uncovered: dict[int, tuple[int, int]]
    #: First section and call of each batch, and the rows of the file in the order of these columns (None: the
    #: same).
    section_batch: Array
    call_batch: Array
    section_row: Array | None
    call_row: Array | None
    first_time: int = 0
    last_time: int = 0
    #: Intervals of ``index`` in which at least one record of a CPU is missing.
    gaps: list[tuple[int, int]] = field(default_factory=list)
    #: The death of at least one VMA object was seen.
    deaths: bool = True
    #: Sections with a death of which the cause is not told.
    freed: list[int] = field(default_factory=list)
    #: Address space -> name of the program that was executed in it.
    comms: dict[int, str] = field(default_factory=dict)
    _whole: Array | None = None

    def whole_walks(self) -> Array:
        """The sections that read their whole address space, before or after."""
        if self._whole is None:
            found = []
            for covers in (self.before, self.after):
                full = (covers.start == 0) & (covers.end == EVERYTHING) & (covers.flags == 0)
                found.append(np.searchsorted(covers.first, np.flatnonzero(full), side="right") - 1)
            self._whole = np.unique(np.concatenate(found))
        return self._whole


class _Column:
    """A column that grows in place: what is not used yet costs no memory."""

    def __init__(self, dtype: Any) -> None:
        self.data = np.empty(0, dtype)
        self.used = 0

    def add(self, values: Array) -> None:
        end = self.used + len(values)
        if end > len(self.data):
            self.data.resize(max(end, len(self.data) * 3 // 2), refcheck=False)
        self.data[self.used : end] = values
        self.used = end

    def finish(self) -> Array:
        self.data.resize(self.used, refcheck=False)
        return self.data


class _SmallColumn(_Column):
    """A column of counts that are nearly always small: as wide as its largest value needs."""

    def __init__(self) -> None:
        super().__init__(np.uint8)

    def add(self, values: Array) -> None:
        needed = np.min_scalar_type(int(values.max(initial=0)))
        if needed.itemsize > self.data.itemsize:
            self.data = self.data[: self.used].astype(needed)
        super().add(values)


class _Collector:
    """Columns that grow batch by batch; those without a dtype are small counts."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.columns = {n: _SmallColumn() if dtype is None else _Column(dtype) for n, dtype in columns.items()}

    def add(self, source: Table | Mapping[str, Array], names: Iterable[str] | None = None) -> None:
        for name in names or self.columns:
            self.columns[name].add(source[name])

    def put(self, name: str, values: Array) -> None:
        self.columns[name].add(values)

    def finish(self) -> dict[str, Array]:
        return {name: column.finish() for name, column in self.columns.items()}


def load(file: TraceFile) -> Records:
    """Read a whole trace. Raises BadTrace where it holds no batch at all."""
    loader = _Loader()
    for tables in file.batches():
        loader.add(tables)
    if not loader.batches:
        raise BadTrace(f"{file.path} holds no records", "record again; the recording ended before anything was written")
    return loader.finish(file.end.get("cpu_seq", ()))


class _Loader:
    def __init__(self) -> None:
        extra: dict[str, Any] = dict.fromkeys(EFFECTS) | {"changed": np.uint8, "grew": np.uint8}
        self.sections = _Collector({**_SECTION, **extra})
        self.calls = _Collector({**_CALL, "in_place": np.uint8})
        self.faults = _Collector(_FAULT)
        self.covers = {side: _CoverCollector() for side in ("before", "after")}
        self.births = _Collector({"object": np.uint64, "section": np.uint32})
        self.cpus = CpuNumbers()
        self.plain: dict[str, list[dict[str, Any]]] = {"tasks": [], "files": [], "limits": [], "losses": []}
        self.uncovered: dict[int, tuple[int, int]] = {}
        self.comms: dict[int, str] = {}
        self.freed: list[int] = []
        self.section_batch, self.call_batch = [0], [0]
        self.batches = 0
        self.deaths = False
        self.times: list[int] = []

    def add(self, tables: Mapping[str, Table]) -> None:
        self.batches += 1
        self._add_sections(tables["sections"])
        calls = tables["calls"]
        self.calls.add(calls, _CALL)
        self.calls.put("in_place", _grew_in_place(calls))
        self.call_batch.append(self.call_batch[-1] + calls.rows)
        self.faults.add(tables["faults"])
        for name, fields in (
            ("tasks", TASK_FIELDS), ("files", FILE_FIELDS), ("limits", LIMIT_FIELDS), ("losses", LOSS_FIELDS),
        ):  # fmt: skip
            self.plain[name] += _plain_rows(tables[name], fields)
        self.cpus.add(tables)
        for name in ("sections", "calls", "tasks", "faults", "files"):
            if tables[name].rows:
                self.times += [int(tables[name]["time"].min()), int(tables[name]["time"].max())]

    def _add_sections(self, sections: Table) -> None:
        first = self.section_batch[-1]
        counts, grew = count_effects(sections)
        self.sections.add(sections, [name for name in _SECTION if name != "acquired"])
        self.sections.put("acquired", np.where(sections["acquired"] > 0, sections["acquired"], sections["time"]))
        for name in EFFECTS:
            self.sections.put(name, counts[name])
        self.sections.put("grew", grew)
        self.sections.put("changed", changes(sections))
        for side, collector in self.covers.items():
            collector.add(sections, side)
        evidence = sections.child("evidence")
        owner = np.repeat(np.arange(sections.rows), np.diff(sections.offsets("evidence")))
        born = (evidence["what"] == ALLOC) | (evidence["what"] == DUP)
        self.deaths |= bool(np.isin(evidence["what"], (MERGED, UNMAPPED, FREED)).any())
        self.freed += np.unique(owner[evidence["what"] == FREED] + first).tolist()
        self.births.put("object", evidence["object"][born])
        self.births.put("section", owner[born] + first)
        for number in np.flatnonzero(sections["kind"] == KINDS["EXEC"]).tolist():
            self.comms[int(sections["space"][number])] = sections.text("comm")[number]
        for number, span in uncovered(sections, owner):
            self.uncovered[first + number] = span
        self.section_batch.append(first + sections.rows)

    def finish(self, last: Sequence[int]) -> Records:
        sections, calls, faults = self.sections.finish(), self.calls.finish(), self.faults.finish()
        births = self.births.finish()
        before, after = self.covers["before"].finish(), self.covers["after"].finish()
        section_row = call_row = None
        if not _ascending(sections["index"]):
            section_row = np.argsort(sections["index"], kind="stable").astype(np.uint32)
            sections = _take(sections, section_row)
            before, after = _take_covers(before, section_row), _take_covers(after, section_row)
            place = np.argsort(section_row).astype(np.uint32)
            births["section"] = place[births["section"]]
            self.uncovered = {int(place[number]): span for number, span in self.uncovered.items()}
            self.freed = sorted(int(place[number]) for number in self.freed)
        if not _ascending(calls["index"]):
            call_row = np.argsort(calls["index"], kind="stable").astype(np.uint32)
            calls = _take(calls, call_row)
        for rows in self.plain.values():
            rows.sort(key=lambda row: int(row["index"]))
        return Records(
            sections, calls, faults, self.plain["tasks"], self.plain["files"], self.plain["limits"],
            self.plain["losses"], before, after, births, self.uncovered, np.array(self.section_batch),
            np.array(self.call_batch), section_row, call_row, min(self.times, default=0),
            max(self.times, default=0), self.cpus.gaps(last), self.deaths, self.freed, self.comms,
        )  # fmt: skip


class _CoverCollector:
    def __init__(self) -> None:
        self.columns = _Collector({**_COVER, "rows": None})
        self.counts = _SmallColumn()

    def add(self, sections: Table, side: str) -> None:
        covers, offsets = sections.child(side + "_cover"), sections.offsets(side + "_cover")
        owner = np.repeat(np.arange(sections.rows), np.diff(offsets))
        claimed = np.bincount(owner, weights=covers["rows"], minlength=sections.rows)
        walked = covers["end"] > covers["start"]
        if (claimed != np.diff(sections.offsets(side))).any() or (covers["rows"][~walked] > 0).any():
            raise BadTrace("the trace is damaged: its walks and their VMAs do not fit together", "record again")
        self.columns.add({name: covers[name][walked] for name in _COVER})
        self.counts.add(np.bincount(owner[walked], minlength=sections.rows))

    def finish(self) -> Covers:
        columns = self.columns.finish()
        first = _firsts(self.counts.finish())
        return Covers(first, columns["start"], columns["end"], columns["flags"], columns["rows"])


def _firsts(counts: Array) -> Array:
    """Where the elements of each begin, and the end of all."""
    first = np.zeros(len(counts) + 1, np.uint32)
    np.cumsum(counts, out=first[1:])
    return first


def _ascending(values: Array) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def _take(columns: dict[str, Array], order: Array) -> dict[str, Array]:
    return {name: values[order] for name, values in columns.items()}


def _take_covers(covers: Covers, order: Array) -> Covers:
    lo, hi = covers.first[:-1][order], covers.first[1:][order]
    rows = row_ranges(lo, hi)
    return Covers(_firsts(hi - lo), covers.start[rows], covers.end[rows], covers.flags[rows], covers.rows[rows])


def _plain_rows(table: Table, fields: tuple[Field, ...]) -> list[dict[str, Any]]:
    if not table.rows:
        return []
    columns = {f.name: table.text(f.name) if f.type == "text" else table[f.name].tolist() for f in fields}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _grew_in_place(calls: Table) -> Array:
    """Which calls are an mremap that grew its mapping where it was."""
    mremap: Array = calls["op_class"] == _OP_MREMAP
    if not mremap.any():
        return mremap
    same = calls["result"].astype(np.uint64) == calls["arg0"]
    low = np.uint64(0xFFFFFFFF)
    same |= (calls["abi"] == 1) & ((calls["result"].astype(np.uint64) & low) == (calls["arg0"] & low))
    grown: Array = mremap & same & (calls["arg2"] > calls["arg1"])
    return grown
