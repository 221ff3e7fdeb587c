"""What happened in a trace, event by event: each effect of each operation, births and deaths of address
spaces."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np

from vmatrace.errors import UsageError, nearest
from vmatrace.ingest import Decision, Effect, Operation, Trace, errno_name
from vmatrace.ingest import match as matching
from vmatrace.schema import FILE_BITS
from vmatrace.timeline.document import file_document, hooks_document, short_id
from vmatrace.timeline.space import Event, Timeline
from vmatrace.vma import Vma, flag_names

EVENT_KINDS: Final = {
    "merge": "a merge step succeeded; side: where the survivor lay, victims: the VMAs it swallowed",
    "split": "a VMA was cut at an address; new_side: whether the new object is the piece below or above",
    "unmap": "a VMA was removed other than by a merge",
    "new": "a VMA was born other than by split or copy",
    "copy": "a VMA was born as the copy of another (mremap)",
    "grow": "a VMA took free address space: brk, mremap in place, a stack",
    "change": "VMAs changed in place: flags, policy, name",
    "mmap_prepare": "a file's mmap_prepare hook was called; without the decisions layer: a file that has it was mapped",
    "compat_mmap": "mmap_prepare was called for a stacked file, by the compatibility layer",
    "merge_attempt": "the kernel tried to merge (decisions layer; only where it is asked for)",
    "merge_refused": "what merged with no neighbour, and why; else inferred (only where it is asked for)",
    "anon_vma": "a VMA of this address space gained an anon_vma (which one the decisions layer tells)",
    "fork": "an address space was born as a copy",
    "exec": "an address space was born for a new program",
    "exit": "an address space ended",
    "error": "a call failed",
    "other": "something changed for no cause that is listed",
    "call": "any listed call (only where it is asked for)",
}
"""The kinds of events, with what they mean."""

_COLUMNS: Final = (
    "time", "pid", "tid", "space", "op", "kind", "syscall", "start", "end", "side", "address", "new_side",
    "object", "new", "victims", "args", "result", "errno", "file", "hooks", "function", "set", "cleared", "reasons",
    "text",
)  # fmt: skip
_ON_REQUEST: Final = frozenset(("call", "merge_attempt", "merge_refused"))
_ATTEMPTS: Final = frozenset(("merge_attempt", "merge_refused"))
_HOOKS: Final = frozenset(("mmap_prepare", "compat_mmap"))
_EFFECT_KINDS: Final = ("merge", "split", "unmap", "new", "copy", "grow")


class Reasons(Protocol):
    """Why merges were refused."""

    def of_decision(self, place: int) -> Sequence[Mapping[str, Any]]:
        """The conditions that refused the attempt which is the decision at that index."""

    def of_operation(self, operation: Operation) -> Sequence[Mapping[str, Any]]:
        """Without the decisions layer: ``start``, ``end`` and ``reasons`` of each refused merge of an operation."""


def event_columns() -> tuple[str, ...]:
    """The names of an event's fields, all of them present in each event."""
    return _COLUMNS


def iter_events(
    trace: Trace,
    pid: int | None = None,
    kinds: Collection[str] = (),
    address: int | None = None,
    reasons: Reasons | None = None,
) -> Iterator[dict[str, Any]]:
    """The events in order; of one process, of some kinds, or those at one address.

    Each is a dict with the keys of `event_columns`: times in ns since the first record, None for what an
    event of its kind has not. ``reasons``: why merge attempts were refused, without which none are told of a trace that
    has no decisions layer. A refused attempt is an attempt too. Raises UsageError for a process or kind that is not
    known.
    """
    _check(trace, pid, kinds)
    wanted = set(kinds) or set(EVENT_KINDS) - _ON_REQUEST
    if "merge_attempt" in wanted:
        wanted.add("merge_refused")
    if address is not None:
        found = _at_address(trace, pid, address, wanted, reasons)
    else:
        found = _in_order(trace, pid, wanted, reasons)
    return (event for event in found if event["kind"] in wanted)


def _check(trace: Trace, pid: int | None, kinds: Collection[str]) -> None:
    for kind in kinds:
        if kind not in EVENT_KINDS:
            near = nearest(kind, EVENT_KINDS)
            raise UsageError(f"no events are of kind {kind!r}", f"did you mean {near}?" if near else _kind_hint())
    if pid is not None and not trace.spaces_of(pid):
        raise UsageError(f"process {pid} is not in the trace", f"it has {', '.join(map(str, trace.pids()[:8]))}")


def _kind_hint() -> str:
    return "kinds are " + ", ".join(EVENT_KINDS)


def _in_order(trace: Trace, pid: int | None, wanted: set[str], reasons: Reasons | None) -> Iterator[dict[str, Any]]:
    rows = _candidates(trace, wanted)
    gains = _gains(trace, pid) if "anon_vma" in wanted else []
    order = trace.operations.order
    at = 0
    for row in rows.tolist():
        while at < len(gains) and gains[at][0] < order[row]:
            yield gains[at][1]
            at += 1
        operation = trace.operation(row)
        if pid is None or operation.pid == pid:
            yield from _decision_events(trace, row, operation, wanted, reasons)
            yield from _events_of(operation, trace)
            if reasons is not None and wanted & _ATTEMPTS and not trace.decisions.present:
                yield from _inferred_refusals(trace, operation, reasons)
    yield from (event for _, event in gains[at:])


def _candidates(trace: Trace, wanted: set[str]) -> Any:
    """Rows of the operations that may have an event that is wanted, in the order in which they began."""
    table = trace.operations
    keep = np.zeros(len(table), bool)
    for name in _EFFECT_KINDS:
        if name in wanted:
            keep |= table.effects[name] > 0
    if wanted & {"change", "other", "mmap_prepare", "merge_refused"}:
        keep |= table.changed != 0
    for name in ("fork", "exec", "exit"):
        if name in wanted:
            keep |= table.kind == matching.KIND_NAMES.index(name)
    if wanted & (_HOOKS | _ATTEMPTS) and len(trace.decisions):
        made = trace.decisions.op
        keep[made[made >= 0]] = True
    calls = table.call >= 0
    if "error" in wanted:
        result = np.zeros(len(table), np.int64)
        result[calls] = trace.records.calls["result"][table.call[calls]]
        keep |= (result < 0) & (result >= -4095)
    if "call" in wanted:
        keep |= calls
    rows = np.flatnonzero(keep)
    return rows[np.argsort(table.order[rows], kind="stable")]


def _gains(trace: Trace, pid: int | None) -> list[tuple[int, dict[str, Any]]]:
    faults = trace.records.faults
    spaces = None if pid is None else {space.id for space in trace.spaces_of(pid)}
    prepared = _prepared(trace)
    found = []
    for index, time, space, tid in zip(
        *(faults[name].tolist() for name in ("index", "time", "space", "tid")), strict=True
    ):
        if spaces is None or space in spaces:
            owner = trace.spaces[space].pid if space in trace.spaces else None
            event = _event(trace, time, owner, tid, space, None, "anon_vma", "fault")
            entered, made = prepared.get(tid, ((), ()))
            at = bisect_right(entered, time) - 1
            if at >= 0 and time <= made[at].time:
                event["start"], event["end"] = made[at].rows["source"][:2]
            found.append((index, event))
    return sorted(found, key=lambda item: item[0])


def _prepared(trace: Trace) -> dict[int, tuple[list[int], list[Decision]]]:
    """By task, when it gave which VMAs an anon_vma, in order; nothing without the decisions layer."""
    found: dict[int, tuple[list[int], list[Decision]]] = {}
    for made in trace.decisions:
        if made.what == "ANON_PREPARE" and "source" in made.rows:
            entered, all_made = found.setdefault(made.tid, ([], []))
            entered.append(made.entered)
            all_made.append(made)
    return found


def _events_of(operation: Operation, trace: Trace) -> Iterator[dict[str, Any]]:
    """The events of one operation."""
    if operation.raw_args:
        yield _of(operation, trace, "call")
    if operation.kind in ("fork", "exec", "exit", "other"):
        yield _of(operation, trace, operation.kind, text=operation.reason)
    failure = errno_name(operation.result)
    if failure is not None:
        yield _of(operation, trace, "error")
    for effect in operation.detail:
        yield _of(operation, trace, effect.kind, **_effect_fields(effect))
    if operation.kind in ("call", "other") and operation.changed and not operation.detail:
        yield _of(operation, trace, "change", text=_changes(operation))
    if not trace.decisions.sees("MMAP_PREPARE"):
        yield from _inferred_hook(operation, trace)


def _inferred_hook(operation: Operation, trace: Trace) -> Iterator[dict[str, Any]]:
    """Without a probe on the hooks: a file that has mmap_prepare was mapped."""
    mapped = mapped_file(operation)
    info = trace.file_info(mapped.file) if mapped is not None else None
    if mapped is not None and info is not None and info.hooks & FILE_BITS["FILE_MMAP_PREPARE"]:
        yield _of(
            operation, trace, "mmap_prepare", start=mapped.start, end=mapped.end,
            file=file_document(info), hooks=hooks_document(info),
        )  # fmt: skip


def _inferred_refusals(trace: Trace, operation: Operation, reasons: Reasons) -> Iterator[dict[str, Any]]:
    """Without a probe on the merge step: VMAs that stayed neighbours, and what the rules say keeps them apart."""
    for refused in reasons.of_operation(operation):
        yield _of(operation, trace, "merge_refused", **refused)


# ---- decisions ----


def _decision_events(
    trace: Trace, row: int, operation: Operation, wanted: set[str], reasons: Reasons | None
) -> Iterator[dict[str, Any]]:
    """The merge attempts and hooks of an operation, in the order in which they were made."""
    if not wanted & (_HOOKS | _ATTEMPTS) or not len(trace.decisions):
        return
    made = trace.decisions.of(row)
    for each in made:
        if each.what == "MMAP_PREPARE" or each.what == "COMPAT_MMAP":
            yield _hook_event(trace, operation, each)
        elif each.attempt and not any(each.contains(other) for other in made if other.attempt):
            yield _attempt_event(trace, operation, each, reasons)


def _attempt_event(trace: Trace, operation: Operation, made: Decision, reasons: Reasons | None) -> dict[str, Any]:
    kind = "merge_attempt" if made.merged else "merge_refused"
    event = _of(operation, trace, kind, start=made.start, end=made.end, function=made.function)
    result = made.rows.get("result")
    if made.merged:
        event["text"] = f"merged to {result[0]:x}-{result[1]:x}" if result is not None else "merged"
    else:
        event["reasons"] = [dict(reason) for reason in reasons.of_decision(made.place)] if reasons else []
    return {**event, "time": made.time - trace.records.first_time}


def _hook_event(trace: Trace, operation: Operation, made: Decision) -> dict[str, Any]:
    before, after = made.descs if len(made.descs) == 2 else (None, None)
    # The file that is mapped: one that is not (beneath a SysV segment) is described nowhere.
    mapped = mapped_file(operation)
    info = trace.file_info(mapped.file) if mapped is not None else None
    kind = "compat_mmap" if made.what == "COMPAT_MMAP" else "mmap_prepare"
    event = _of(operation, trace, kind, file=file_document(info), function=made.function)
    hooks = hooks_document(info)
    event["hooks"] = {**hooks, "inferred": False} if hooks is not None else None
    event["errno"] = errno_name(made.error)
    if before is not None and after is not None:
        event.update(start=before.start, end=before.end)
        event["set"] = flag_names(after.flags & ~before.flags)
        event["cleared"] = flag_names(before.flags & ~after.flags)
        changes = [f"vm_ops {after.ops}"] if after.ops else []
        changes += ["another file"] if after.file != before.file else []
        changes += [f"pgoff {after.pgoff:#x}"] if after.pgoff != before.pgoff else []
        event["text"] = ", ".join(changes)
    return {**event, "time": made.time - trace.records.first_time}


def _effect_fields(effect: Effect) -> dict[str, Any]:
    return {
        "start": effect.start,
        "end": effect.end,
        "side": effect.side,
        "address": effect.address,
        "new_side": effect.new_side,
        "object": short_id(effect.obj),
        "new": short_id(effect.new),
        "victims": [short_id(victim) for victim in effect.victims],
    }


def _changes(operation: Operation) -> str:
    """Which ranges changed in place, and what of them."""
    words = []
    for section in operation.sections:
        was = {vma.start: vma for walk in section.before for vma in walk.vmas}
        for vma in (vma for walk in section.after for vma in walk.vmas):
            old = was.get(vma.start)
            if old is not None and old != vma and old.end == vma.end:
                names = [n for n in Vma._fields if getattr(old, n) != getattr(vma, n) and n != "anon_vma"]
                words.append(f"{vma.start:x}-{vma.end:x} {','.join(names)}")
    return "; ".join(words)


def mapped_file(operation: Operation) -> Vma | None:
    """The VMA of a file that a successful mmap or shmat put its range into."""
    if operation.name not in ("mmap", "shmat") or operation.result is None or errno_name(operation.result):
        return None
    address = operation.result if operation.result >= 0 else operation.result + (1 << 64)
    for section in operation.sections:
        for walk in section.after:
            for vma in walk.vmas:
                if vma.start <= address < vma.end and vma.file is not None:
                    return vma
    return None


def _of(operation: Operation, trace: Trace, kind: str, **fields: Any) -> dict[str, Any]:
    event = _event(
        trace,
        operation.time,
        operation.pid,
        operation.tid,
        operation.space,
        operation.n,
        kind,
        operation.name,
    )
    event.update(args=dict(operation.args), result=operation.result, errno=errno_name(operation.result))
    event.update(fields)
    return event


def _event(
    trace: Trace, time: int, pid: int | None, tid: int, space: int, op: int | None, kind: str, syscall: str
) -> dict[str, Any]:
    event: dict[str, Any] = dict.fromkeys(_COLUMNS)
    event.update(time=time - trace.records.first_time, pid=pid, tid=tid, space=space, op=op, kind=kind, syscall=syscall)
    return event


# ---- one address -------------------------------------------------------------------------------------------


def _at_address(
    trace: Trace, pid: int | None, address: int, wanted: set[str], reasons: Reasons | None
) -> Iterator[dict[str, Any]]:
    spaces = trace.spaces.values() if pid is None else trace.spaces_of(pid)
    found: list[tuple[int, dict[str, Any]]] = []
    for space in spaces:
        history = Timeline(trace, space.id).history(address)
        # Children that only inherited the place say nothing about it, unless they are asked for.
        if pid is not None or any(event.operation.kind not in ("fork", "exit") for event in history):
            found += [(each.operation.index, event) for each in history for event in _history_events(each, trace)]
            if reasons is not None and wanted & _ATTEMPTS and not trace.decisions.present:
                for operation in (each.operation for each in history):
                    refused = _inferred_refusals(trace, operation, reasons)
                    found += [(operation.index, event) for event in refused if _holds(event, address)]
    if wanted & (_HOOKS | _ATTEMPTS) and len(trace.decisions):
        found += _decisions_at(trace, {space.id for space in spaces}, address, wanted, reasons)
    return (event for _, event in sorted(found, key=lambda item: item[0]))


def _decisions_at(
    trace: Trace, spaces: set[int], address: int, wanted: set[str], reasons: Reasons | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The merge attempts and hooks whose range holds an address, each with its operation's index."""
    rows = np.unique(trace.decisions.op)
    for row in rows[rows >= 0].tolist():
        if int(trace.operations.space[row]) in spaces:
            operation = trace.operation(row)
            for event in _decision_events(trace, row, operation, wanted, reasons):
                if _holds(event, address):
                    yield operation.index - 1, event


def _holds(event: dict[str, Any], address: int) -> bool:
    return event["start"] is not None and bool(event["start"] <= address < event["end"])


def _history_events(event: Event, trace: Trace) -> Iterator[dict[str, Any]]:
    text = f"{_brief(event.before)} -> {_brief(event.after)}"
    operation = event.operation
    if operation.kind in ("fork", "exec", "exit", "other"):
        yield _of(operation, trace, operation.kind, text=text)
    elif not event.effects:
        yield _of(operation, trace, "change", text=text)
    for effect in event.effects:
        yield _of(operation, trace, effect.kind, **_effect_fields(effect), text=text)


def _brief(vma: Vma | None) -> str:
    if vma is None:
        return "nothing"
    letters = "".join(letter if vma.flags >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
    return f"{vma.start:x}-{vma.end:x} {letters}{'s' if vma.flags & 0x80 else 'p'}"
