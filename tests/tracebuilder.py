"""Builds synthetic traces: a toy kernel that leaves records as the real one does, and the true states.

Addresses are pages in tests and bytes in the trace. The toy kernel knows map, protect, unmap, touch, fork,
exec and exit; it hands out freed VMA objects again at once, as the real one does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vmatrace.schema import EVIDENCE, KINDS, LAYER_TABLES, OP_CLASSES, ROW_TABLES, TABLES
from vmatrace.syscalls import system_calls
from vmatrace.tracefile import TraceWriter

PAGE = 4096
END = (1 << 64) - 1
READ, WRITE = 1, 2
PRIVATE = 0x70  # MAYREAD MAYWRITE MAYEXEC
STORE, ALLOC, DUP, MERGED, UNMAPPED = (
    EVIDENCE["EVIDENCE_" + name] for name in ("STORE", "ALLOC", "DUP", "MERGED", "UNMAPPED")
)
NUMBERS = {call.name: (nr, OP_CLASSES[call.op_class]) for (abi, nr), call in system_calls("x86_64").items() if not abi}


@dataclass(frozen=True)
class Area:
    """A VMA of the toy kernel, in pages."""

    start: int
    end: int
    flags: int
    obj: int
    anon_vma: int = 0

    def row(self) -> dict[str, Any]:
        return {
            "start": self.start * PAGE, "end": self.end * PAGE, "flags": self.flags | PRIVATE,
            "pgoff": self.start, "bits": 1, "object": self.obj, "anon_vma": self.anon_vma,
        }  # fmt: skip

    def seen(self) -> tuple[int, int, int, int]:
        """What a timeline must show of it."""
        return self.start * PAGE, self.end * PAGE, self.flags | PRIVATE, self.start


@dataclass
class ToySpace:
    id: int
    pid: int
    areas: list[Area] = field(default_factory=list)
    seq: int = 0
    dead: bool = False
    #: The true state after each operation.
    truth: list[list[tuple[int, int, int, int]]] = field(default_factory=list)
    effects: list[dict[str, int]] = field(default_factory=list)


class ToyKernel:
    """Makes records and remembers what was true."""

    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, Any]]] = []
        self.spaces: list[ToySpace] = []
        self.time = 1000
        self._free: list[int] = []
        self._made = 1 << 40
        self._evidence: list[dict[str, int]] = []
        self._anon = 7 << 40

    # ---- system calls ----

    def start(self, *areas: tuple[int, int, int]) -> ToySpace:
        """A process that has just called execve."""
        space = self._space(100 + len(self.spaces))
        space.areas = [Area(lo, hi, flags, self._born()) for lo, hi, flags in areas]
        space.seq += 1
        self._record(
            "sections", space, kind=KINDS["EXEC"], op_class=OP_CLASSES["OP_EXEC"], nr=59,
            after=self._walk(space, 0, END), comm="toy", map_count=len(space.areas), acquired=self.time,
        )  # fmt: skip
        self._call(space, "execve", 0)
        self._done(space, {})
        return space

    def map(self, space: ToySpace, lo: int, hi: int, flags: int, join: bool = False) -> None:
        """mmap(MAP_FIXED), ``join``: merged with the VMA that ends there, if it has the same flags."""
        with self._section(space, "mmap", lo, hi) as effects:
            self._cut_out(space, lo, hi, effects)
            left = next((a for a in space.areas if a.end == lo and a.flags == flags), None)
            if join and left is not None:
                self._change(space, left, replace(left, end=hi))
                self._evidence.append(_evidence(STORE, left.obj, left.start, hi))
                effects["merge"] += 1
            else:
                area = Area(lo, hi, flags, self._born(ALLOC))
                self._evidence.append(_evidence(STORE, area.obj, lo, hi))
                space.areas.append(area)
                effects["new"] += 1
        self._call(space, "mmap", lo * PAGE, (lo * PAGE, (hi - lo) * PAGE, 3, 0x32))
        self._done(space, effects)

    def unmap(self, space: ToySpace, lo: int, hi: int) -> None:
        with self._section(space, "munmap", lo, hi) as effects:
            self._cut_out(space, lo, hi, effects)
        self._call(space, "munmap", 0, (lo * PAGE, (hi - lo) * PAGE))
        self._done(space, effects)

    def protect(self, space: ToySpace, lo: int, hi: int, flags: int) -> None:
        with self._section(space, "mprotect", lo, hi) as effects:
            for area in [a for a in space.areas if a.start < hi and lo < a.end and a.flags != flags]:
                middle = self._split_off(space, area, lo, hi, effects)
                self._change(space, middle, replace(middle, flags=flags))
        self._call(space, "mprotect", 0, (lo * PAGE, (hi - lo) * PAGE, flags))
        self._done(space, effects)

    def touch(self, space: ToySpace, page: int) -> bool:
        """A write fault: the VMA there gains an anon_vma, without the write lock."""
        area = next((a for a in space.areas if a.start <= page < a.end), None)
        if area is None or area.anon_vma:
            return False
        self._anon += 8
        self._change(space, area, replace(area, anon_vma=self._anon))
        self._record("faults", space)
        return True

    def fork(self, parent: ToySpace) -> ToySpace:
        child = self._space(parent.pid + 1000 * len(self.spaces))
        parent.seq += 1
        nr, op_class = NUMBERS["fork"]
        self._record(
            "sections", parent, kind=1, op_class=op_class, nr=nr, map_count=len(parent.areas),
            acquired=self.time, after_cover=[{}], before_cover=[{}],
        )  # fmt: skip
        child.areas = [replace(a, obj=self._born(), anon_vma=a.anon_vma and a.anon_vma + 1) for a in parent.areas]
        self._record(
            "tasks", child, kind=KINDS["FORK"], parent_space=parent.id, parent_seq=parent.seq,
            parent_tid=parent.pid, map_count=len(child.areas),
        )  # fmt: skip
        self._call(child, "fork", 0)
        self._done(child, {"copy": len(child.areas)})
        self._call(parent, "fork", child.pid)
        self._done(parent, {})
        return child

    def exit(self, space: ToySpace) -> None:
        space.seq += 1
        before = self._walk(space, 0, END)
        self._record("sections", space, kind=KINDS["LAST"], before=before, acquired=self.time, after_cover=[{}])
        self._record("tasks", space, kind=KINDS["SPACE_END"])
        space.dead = True
        space.truth.append(space.truth[-1])
        space.effects.append({})

    def write(
        self, path: Path, batch: int = 50, finish: bool = True, drop: Callable[[int], bool] | None = None
    ) -> Path:
        """Write the records as a trace; ``drop`` says by position which were lost."""
        kept = [record for at, record in enumerate(self.records) if drop is None or not drop(at)]
        with TraceWriter(path, {"kernel": {"arch": "x86_64", "page_size": PAGE}, "clock": _CLOCK}) as writer:
            for first in range(0, max(len(kept), 1), batch):
                writer.write(as_tables(kept[first : first + batch]))
            if finish:
                alive = [space for space in self.spaces if not space.dead]
                seqs = [space.seq for space in alive]
                end = {"reason": "the command ended", "records": len(kept), "lost": len(self.records) - len(kept)}
                writer.finish({**end, "spaces": [space.id for space in alive], "space_seq": seqs})
        return path

    # ---- inside ----

    def _space(self, pid: int) -> ToySpace:
        space = ToySpace(len(self.spaces) + 1, pid)
        self.spaces.append(space)
        return space

    def _born(self, how: int = 0) -> int:
        if self._free:
            obj = self._free.pop()
        else:
            self._made += 64
            obj = self._made
        if how:
            self._evidence.append(_evidence(how, obj))
        return obj

    def _change(self, space: ToySpace, old: Area, new: Area) -> None:
        space.areas[space.areas.index(old)] = new

    def _split_off(self, space: ToySpace, area: Area, lo: int, hi: int, effects: dict[str, int]) -> Area:
        """Cut what lies outside [lo, hi) off; the new object is the outside piece."""
        for outside in ((area.start, lo), (hi, area.end)):
            if outside[0] >= outside[1]:
                continue
            piece = replace(area, start=outside[0], end=outside[1], obj=self._born(DUP))
            self._evidence.append(_evidence(STORE, piece.obj, *outside))
            rest = replace(area, start=max(area.start, lo)) if outside[0] == area.start else replace(area, end=hi)
            self._change(space, area, rest)
            space.areas.append(piece)
            area = rest
            effects["split"] += 1
        return area

    def _cut_out(self, space: ToySpace, lo: int, hi: int, effects: dict[str, int]) -> None:
        for area in [a for a in space.areas if a.start < hi and lo < a.end]:
            middle = self._split_off(space, area, lo, hi, effects)
            space.areas.remove(middle)
            self._evidence.append(_evidence(UNMAPPED, middle.obj))
            self._free.append(middle.obj)
            effects["unmap"] += 1

    def _walk(self, space: ToySpace, lo: int, hi: int) -> tuple[list[dict[str, Any]], list[dict[str, int]]]:
        """Read the slots from the one that holds lo - 1 to the one that holds hi, as the real walker does."""
        space.areas.sort(key=lambda a: a.start)
        if hi == END:
            return [a.row() for a in space.areas], [{"start": 0, "end": END, "rows": len(space.areas)}]
        start, end = _slot(space.areas, lo - 1)[0], _slot(space.areas, hi)[1]
        rows = [a.row() for a in space.areas if a.start < end and start < a.end]
        return rows, [{"start": start * PAGE, "end": end if end == END else end * PAGE, "rows": len(rows)}]

    def _section(self, space: ToySpace, call: str, lo: int, hi: int) -> _Section:
        return _Section(self, space, call, lo, hi)

    def _call(self, space: ToySpace, name: str, result: int, args: tuple[int, ...] = ()) -> None:
        nr, op_class = NUMBERS[name]
        named = {f"arg{n}": value for n, value in enumerate(args)}
        self._record("calls", space, nr=nr, op_class=op_class, result=result, **named)

    def _done(self, space: ToySpace, effects: dict[str, int]) -> None:
        space.truth.append(sorted(area.seen() for area in space.areas))
        space.effects.append({name: count for name, count in effects.items() if count})

    def _record(self, table: str, space: ToySpace, **values: Any) -> None:
        self.time += 10
        for side in ("before", "after"):
            walk = values.pop(side, None)
            if walk is not None:
                values[side], values[side + "_cover"] = walk
        common = {
            "index": 2 * len(self.records), "time": self.time, "cpu_seq": len(self.records) + 1,
            "space": space.id, "seq": space.seq, "pid": space.pid, "tid": space.pid,
        }  # fmt: skip
        if table == "sections":
            common["parts"] = 1
        self.records.append((table, common | values))


class _Section:
    """One write section: what is changed inside shows between its two walks."""

    def __init__(self, kernel: ToyKernel, space: ToySpace, call: str, lo: int, hi: int) -> None:
        self.kernel, self.space, self.call, self.range = kernel, space, call, (lo, hi)
        self.effects = dict.fromkeys(("merge", "split", "unmap", "new"), 0)

    def __enter__(self) -> dict[str, int]:
        self.kernel._evidence = []
        self.acquired = self.kernel.time = self.kernel.time + 5
        self.before = self.kernel._walk(self.space, *self.range)
        return self.effects

    def __exit__(self, *_: object) -> None:
        self.space.seq += 1
        nr, op_class = NUMBERS[self.call]
        self.kernel._record(
            "sections", self.space, kind=1, op_class=op_class, nr=nr, acquired=self.acquired,
            before=self.before, after=self.kernel._walk(self.space, *self.range),
            evidence=self.kernel._evidence, map_count=len(self.space.areas),
        )  # fmt: skip


_CLOCK = {"monotonic_ns": 1000, "realtime_ns": 1_700_000_000_000_001_000}


def _evidence(what: int, obj: int, lo: int = 0, hi: int = 0) -> dict[str, int]:
    return {"what": what, "object": obj, "start": lo * PAGE, "end": hi * PAGE}


def _slot(areas: list[Area], page: int) -> tuple[int, int]:
    """The VMA or the gap that holds a page."""
    lo = 0
    for area in areas:
        if page < area.start:
            return lo, area.start
        if page < area.end:
            return area.start, area.end
        lo = area.end
    return lo, END


def as_tables(records: list[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Records as the columns that a TraceWriter takes."""
    tables: dict[str, dict[str, Any]] = {}
    for name, fields in TABLES.items():
        rows = [values for table, values in records if table == name]
        if not rows and name in LAYER_TABLES:
            continue
        tables[name] = {f.name: _column(f.type, [row.get(f.name) for row in rows]) for f in fields} if rows else {}
    return tables


def _column(kind: str, values: list[Any]) -> Any:
    if kind == "text":
        return [value or "" for value in values]
    if not kind.startswith("list<"):
        return np.array([value or 0 for value in values], np.int64 if kind == "i64" else np.uint64)
    offsets = np.cumsum([0, *(len(value or []) for value in values)]).astype(np.int32)
    rows = [row for value in values for row in value or []]
    fields = ROW_TABLES[kind[5:-1]]
    return offsets, {f.name: _column(f.type, [row.get(f.name) for row in rows]) for f in fields}
