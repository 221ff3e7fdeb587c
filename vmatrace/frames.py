"""A trace as pandas frames: operations, events, VMAs over time, verdicts; every column is documented.

Addresses and object ids are ``uint64``, times ``int64`` ns since the trace's first record, pgoff pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from vmatrace.ingest import KIND_NAMES, Decision, Operation, Section, Trace, errno_name
from vmatrace.ingest.match import LOST
from vmatrace.replay.result import DecisionVerdict, ReplayResult
from vmatrace.syscalls import call_name
from vmatrace.timeline import Snapshot
from vmatrace.vma import Vma, flag_names

Array = npt.NDArray[Any]

EFFECTS: Final = ("merge", "split", "unmap", "new", "copy", "grow")

_TIME: Final = ("time", "int64", "when it began, ns since the trace's first record")
_WHO: Final = (
    ("pid", "uint32", "process (thread group), initial PID namespace"),
    ("space", "uint32", "address space: a number per mm_struct and generation"),
    ("op", "uint32", "number of the operation in its address space"),
)
_VMA: Final = (
    ("start", "uint64", "vm_start, bytes"),
    ("end", "uint64", "vm_end, bytes, exclusive"),
    ("flags", "string", "names of vm_flags without VM_, joined by |"),
    ("pgoff", "uint64", "vm_pgoff, pages"),
    ("file", "string", "path of the mapped file, NA without one"),
    ("anon_vma", "UInt64", "opaque id of the anon_vma, NA without one or where it was not seen"),
    ("forked", "bool", "the anon_vma chain holds more than one entry"),
    ("obj", "UInt64", "which vm_area_struct: an id that is never used again, NA where it was not seen"),
)

COLUMNS: Final[dict[str, tuple[tuple[str, str, str], ...]]] = {
    "operations": (
        _TIME,
        *_WHO,
        ("tid", "uint32", "the task"),
        ("kind", "string", "call, fork (the child's copy), exec, exit, fault or other"),
        ("syscall", "string", "name of the system call, else the kind"),
        ("result", "Int64", "return value as signed number, NA where the call did not return"),
        ("errno", "string", "symbolic errno of a failed call, else NA"),
        ("changed", "bool", "a VMA changed"),
        *((name, "uint32", f"how many effects of kind {name}") for name in EFFECTS),
        ("reason", "string", "why nothing can be decided about it, else empty"),
    ),
    "events": (
        _TIME,
        *_WHO,
        ("syscall", "string", "the operation's system call or kind"),
        ("event", "string", "merge, split, unmap, new, copy or grow"),
        ("start", "UInt64", "the VMA's range afterwards (unmap: before), NA where it is not told"),
        ("end", "UInt64", "its end, exclusive"),
        ("obj", "UInt64", "survivor (merge), the cut VMA (split), else the VMA itself"),
        ("side", "string", "merge: where the survivor lay, left, right or both; split: where the new VMA is"),
        ("victims", "uint32", "merge: how many VMAs it took away"),
        ("address", "UInt64", "split: where it was cut"),
        ("new", "UInt64", "split: the VMA born"),
    ),
    "vmas": (
        ("space", "uint32", "address space"),
        ("pid", "uint32", "the process that the space was born in"),
        ("since", "int64", "seen so from here, ns since the trace's first record"),
        ("until", "int64", "to here: replaced, or the space died, or the recording ended"),
        *_VMA,
    ),
    "verdicts": (
        *_WHO,
        ("syscall", "string", "name of the system call, else the kind"),
        ("verdict", "string", "passed, failed, undecided, skipped or inputs"),
        ("reason", "string", "why it is not passed"),
        ("rule", "string", "the last rule that decided"),
        ("changed", "bool", "a VMA changed"),
        ("expected", "string", "failed: what the rules say"),
        ("observed", "string", "failed: what the kernel did"),
    ),
    "decisions": (
        _TIME,
        *_WHO[:2],
        ("op", "UInt32", "number of the operation in its address space, NA outside of one"),
        ("tid", "uint32", "the task"),
        ("what", "string", "kind of decision: MERGE_NEW, MERGE_EXISTING, SPLIT, MMAP_PREPARE, ... (schema.DECISIONS)"),
        ("function", "string", "the kernel function that was probed"),
        ("start", "UInt64", "the range that the kernel was asked about, NA where it has none"),
        ("end", "UInt64", "its end, exclusive"),
        ("flags", "string", "vm_flags asked for, names without VM_, joined by |"),
        ("merged", "boolean", "whether a merge attempt succeeded, NA for anything else"),
        ("errno", "string", "symbolic errno of one that failed, else NA"),
        ("refused_by", "string", "left:rule or right:rule for every condition that refused, joined by blanks"),
        ("set", "string", "mmap_prepare: flags that the hook set, joined by |"),
        ("cleared", "string", "mmap_prepare: flags that it cleared"),
        ("verdict", "string", "passed, failed or undecided; empty for kinds that are not judged"),
        ("reason", "string", "why it is not passed"),
    ),
}
"""Kind of frame -> (column, pandas type, meaning), in order."""


def operations_frame(trace: Trace) -> pd.DataFrame:
    """One row per operation, in the order in which they began."""
    table, calls = trace.operations, trace.records.calls
    rows = np.argsort(table.order, kind="stable")
    has_call = table.call[rows] >= 0
    call = np.where(has_call, table.call[rows], 0)
    columns: dict[str, Any] = {name: _pick(calls[name], call, has_call) for name in ("time", "pid", "tid", "result")}
    syscall = _names(trace, _pick(calls["abi"], call, has_call), _pick(calls["nr"], call, has_call))
    syscall = np.where(has_call, syscall, np.array(KIND_NAMES, dtype=object)[table.kind[rows]])
    reason = np.full(len(rows), "", dtype=object)
    # What has no call of its own, or a multiplexed one, or a reason, is decoded one by one; it is rare.
    odd = ~has_call | (table.flags[rows] & LOST != 0) | np.isin(syscall, ["ipc", "mmap2"])
    for at in np.flatnonzero(odd).tolist():
        operation = trace.operation(int(rows[at]))
        for name in ("time", "pid", "tid"):
            columns[name][at] = getattr(operation, name)
        syscall[at], reason[at] = operation.name, operation.reason
    columns["result"] = pd.array(columns["result"], dtype="Int64")
    columns["result"][~has_call] = pd.NA
    return _frame(
        "operations",
        {
            **columns,
            "time": columns["time"].astype(np.int64) - trace.records.first_time,
            "space": table.space[rows],
            "op": table.number[rows],
            "kind": np.array(KIND_NAMES, dtype=object)[table.kind[rows]],
            "syscall": syscall,
            "errno": [errno_name(None if value is pd.NA else int(value)) for value in columns["result"]],
            "changed": table.changed[rows].astype(bool),
            **{name: table.effects[name][rows] for name in EFFECTS},
            "reason": reason,
        },
    )


def events_frame(trace: Trace) -> pd.DataFrame:
    """One row per effect of an operation, in the order in which the kernel made them."""
    table = trace.operations
    rows = np.argsort(table.order, kind="stable")
    rows = rows[table.changed[rows].astype(bool)]
    first = trace.records.first_time
    operations = (trace.operation(int(row)) for row in rows)
    return _rows_frame("events", (event for op in operations for event in _events(op, first)))


def vmas_frame(trace: Trace) -> pd.DataFrame:
    """One row per VMA and state of it: what it was, and from when to when it was seen so."""
    return _rows_frame("vmas", (row for space in trace.spaces for row in _History(trace, space).rows()))


def snapshot_frame(trace: Trace, snapshot: Snapshot) -> pd.DataFrame:
    """The VMAs of one moment (`vmatrace.timeline.Timeline.at`), one row each."""
    rows = [_vma_row(trace, vma) for vma in snapshot.vmas]
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=dtype) for name, dtype, _ in _VMA})


def verdicts_frame(result: ReplayResult) -> pd.DataFrame:
    """One row per verdict, in the order in which the operations were judged."""
    names = [name for name, _, _ in COLUMNS["verdicts"]]
    return _rows_frame("verdicts", ({name: getattr(verdict, name) for name in names} for verdict in result))


def decisions_frame(trace: Trace, result: ReplayResult) -> pd.DataFrame:
    """One row per decision in the order in which they were made, with its verdict; none without that layer."""
    verdicts = {verdict.place: verdict for verdict in result.decisions if verdict.function}
    number = trace.operations.number
    rows = (
        _decision(each, int(number[op]) if op >= 0 else None, verdicts.get(each.place), trace.records.first_time)
        for each, op in zip(trace.decisions, trace.decisions.op.tolist(), strict=True)
    )
    return _rows_frame("decisions", rows)


def _decision(made: Decision, op: int | None, verdict: DecisionVerdict | None, first: int) -> dict[str, Any]:
    before, after = (desc.flags for desc in made.descs) if len(made.descs) == 2 else (0, 0)
    refusals = verdict.refusals if verdict is not None else ()
    return {
        "time": made.entered - first,
        "pid": made.pid,
        "space": made.space,
        "op": op,
        "tid": made.tid,
        "what": made.what,
        "function": made.function,
        "start": made.start if made.end else None,
        "end": made.end or None,
        "flags": "|".join(flag_names(made.flags)),
        "merged": made.merged if made.attempt else None,
        "errno": errno_name(made.error),
        "refused_by": " ".join(f"{each.side or 'range'}:{each.rule or 'alone'}" for each in refusals),
        "set": "|".join(flag_names(after & ~before)),
        "cleared": "|".join(flag_names(before & ~after)),
        "verdict": verdict.verdict if verdict is not None else "",
        "reason": verdict.reason if verdict is not None else "",
    }


def _pick(column: Array, at: Array, where: Array) -> Array:
    found = column[at] if len(column) else np.zeros(len(at), column.dtype)
    return np.where(where, found, np.zeros(1, column.dtype))


def _names(trace: Trace, abi: Array, nr: Array) -> Array:
    keys = abi.astype(np.uint32) << 16 | nr
    unique, where = np.unique(keys, return_inverse=True)
    names = [call_name(trace.arch, key >> 16, key & 0xFFFF) for key in unique.tolist()]
    return np.array(names, dtype=object)[where] if names else np.zeros(0, object)


def _events(operation: Operation, first_time: int) -> Iterator[dict[str, Any]]:
    for effect in operation.detail:
        yield {
            "time": operation.time - first_time,
            "pid": operation.pid,
            "space": operation.space,
            "op": operation.n,
            "syscall": operation.name,
            "event": effect.kind,
            "start": effect.start,
            "end": effect.end,
            "obj": effect.obj,
            "side": effect.side or effect.new_side,
            "victims": len(effect.victims),
            "address": effect.address,
            "new": effect.new,
        }


@dataclass(slots=True)
class _History:
    """Follows one address space from walk to walk and notes how long each VMA was seen unchanged."""

    trace: Trace
    space: int
    now: dict[int, tuple[Vma, int]] = field(default_factory=dict)

    def rows(self) -> Iterator[dict[str, Any]]:
        space = self.trace.spaces[self.space]
        if space.origin == "fork":
            self.now = {vma.start: (vma, space.time) for vma in self.trace.base(self.space)[0]}
        for number in self.trace.groups.of(self.space).tolist():
            yield from self._take(self.trace.section(number))
        end = space.ended if space.ended is not None else self.trace.records.last_time
        for vma, since in self.now.values():
            yield self._row(vma, since, end)

    def _take(self, section: Section) -> Iterator[dict[str, Any]]:
        for moment, walks in (
            (section.acquired or section.time, section.before),
            (section.time, section.after),
        ):
            for walk in walks:
                if walk.flags == 0:
                    yield from self._replace(walk.start, walk.end, walk.vmas, moment)

    def _replace(self, start: int, end: int, vmas: tuple[Vma, ...], moment: int) -> Iterator[dict[str, Any]]:
        seen = {vma.start: vma for vma in vmas}
        for address, (vma, since) in list(self.now.items()):
            if vma.start < end and start < vma.end and seen.get(address) != vma:
                del self.now[address]
                if since < moment:
                    yield self._row(vma, since, moment)
        for vma in vmas:
            self.now.setdefault(vma.start, (vma, moment))

    def _row(self, vma: Vma, since: int, until: int) -> dict[str, Any]:
        first = self.trace.records.first_time
        who = {"space": self.space, "pid": self.trace.spaces[self.space].pid}
        return {**who, "since": since - first, "until": until - first, **_vma_row(self.trace, vma)}


def _vma_row(trace: Trace, vma: Vma) -> dict[str, Any]:
    info = trace.file_info(vma.file)
    return {
        "start": vma.start,
        "end": vma.end,
        "flags": "|".join(flag_names(vma.flags)),
        "pgoff": vma.pgoff,
        "file": info.path if info is not None else None,
        "anon_vma": _seen_id(vma.anon_vma),
        "forked": vma.forked,
        "obj": _seen_id(vma.obj),
    }


def _seen_id(identity: object) -> int | None:
    """An id that the kernel's records gave; a fork's copies have placeholders until they are seen."""
    return identity if isinstance(identity, int) and identity >= 0 else None


def _rows_frame(kind: str, rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    columns: dict[str, list[Any]] = {name: [] for name, _, _ in COLUMNS[kind]}
    for row in rows:
        for name, values in columns.items():
            values.append(row[name])
    return _frame(kind, columns)


def _frame(kind: str, columns: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(columns[name], dtype=dtype) for name, dtype, _ in COLUMNS[kind]})
