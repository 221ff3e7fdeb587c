"""What an address space looked like at any moment, and how it came to be: at, history, lifetimes, diff.

Everything here is what the kernel did; nothing is predicted but the copy that a fork makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmatrace.errors import BadTrace, UsageError
from vmatrace.ingest import Effect, Operation, Section, Space, Trace
from vmatrace.ingest.changes import CHANGED, EVERYTHING
from vmatrace.ingest.effects import row_ranges
from vmatrace.schema import KINDS
from vmatrace.vma import SHARED, Vma

Array = npt.NDArray[Any]

_LOOK_AHEAD: Final = 4096


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of an address space at one moment.

    ``time``: CLOCK_MONOTONIC ns. ``sections``: how many of its write sections were over. ``unknown``:
    intervals about which nothing is known. ``anon_vma_since``: for a VMA (by start) that gained its anon_vma
    in between two looks, the times of these, where it cannot be told whether it had it yet. ``mm``: counters,
    None if unknown.
    """

    space: Space
    time: int
    sections: int
    vmas: tuple[Vma, ...]
    unknown: tuple[tuple[int, int], ...]
    anon_vma_since: dict[int, tuple[int, int]]
    mm: dict[str, int] | None


@dataclass(frozen=True, slots=True)
class Event:
    """One change at an address: the operation, and the VMA there before and after (None: none, or
    unknown)."""

    operation: Operation
    section: Section | None
    before: Vma | None
    after: Vma | None
    effects: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class Lifetime:
    """One VMA object's life: how it was born (exec, fork, new, copy, split, found) and died (unmap, merge,
    exit).

    ``born`` and ``died`` are operation numbers, None for "before the trace" and "alive at its end".
    ``parent``: the object it was split from or copied of; ``heir``: the survivor that took its range in a
    merge.
    """

    obj: int
    birth: str
    born: int | None
    parent: int | None
    death: str | None
    died: int | None
    heir: int | None


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two moments; ``changed`` pairs VMAs of the same start or the same object."""

    added: tuple[Vma, ...]
    removed: tuple[Vma, ...]
    changed: tuple[tuple[Vma, Vma], ...]


class Timeline:
    """The history of one address space of a trace."""

    def __init__(self, trace: Trace, space: int) -> None:
        """Raises UsageError where the trace has no such address space."""
        if space not in trace.spaces:
            raise UsageError(f"the trace has no address space {space}")
        self.trace = trace
        self.space = trace.spaces[space]
        self._states = trace.states(space)
        faults = trace.records.faults
        self._gains = np.sort(faults["time"][faults["space"] == space])

    # ---- states ----

    def at(self, time: int) -> Snapshot:
        """The state ``time`` ns after the trace's first record."""
        moment = self.trace.records.first_time + time
        if moment < self.space.time:
            born = self.space.time - self.trace.records.first_time
            raise UsageError(f"the address space began {born} ns after the first record", f"give {born} or later")
        sections, table = self._states.sections, self.trace.records.sections
        count = int(np.searchsorted(table["time"][sections], moment, side="right"))
        entered = count < len(sections) and int(table["acquired"][sections[count]]) <= moment
        over = count == len(sections) and count > 0 and moment > int(table["time"][sections[-1]])
        return self._snapshot(count, entered, moment, after_all=over)

    def at_op(self, n: int) -> Snapshot:
        """The state after the last write section of operation ``n``."""
        rows = self.trace.operation_rows(self.space.id)
        if not 0 <= n < len(rows):
            raise UsageError(f"there is no operation {n}: this address space has 0 to {len(rows) - 1}")
        table, row = self.trace.operations, rows[n]
        last = table.sections[table.first[row] : table.first[row + 1]]
        sections, records = self._states.sections, self.trace.records
        if len(last):
            count = int(np.searchsorted(sections, last[-1])) + 1
            return self._snapshot(count, False, int(records.sections["time"][last[-1]]))
        count = int(np.searchsorted(records.sections["index"][sections], table.order[row]))
        call = table.call[row]
        return self._snapshot(count, False, int(records.calls["time"][call]) if call >= 0 else self.space.time)

    def at_end(self) -> Snapshot:
        """The last state before the address space died or the recording ended."""
        end = self.space.ended if self.space.ended is not None else self.trace.records.last_time
        return self._snapshot(len(self._states.sections), False, end, after_all=True)

    def _snapshot(self, count: int, entered: bool, time: int, after_all: bool = False) -> Snapshot:
        if after_all and self.trace.tail_lost(self.space.id):
            return Snapshot(self.space, time, count, (), ((0, EVERYTHING),), {}, None)
        known, unknown = self.trace.known(self.space.id, self._states.picture(count, entered))
        vmas, since = self._with_gains(known, count + entered, time)
        return Snapshot(self.space, time, count, vmas, tuple(unknown), since, self._mm(count))

    def _mm(self, count: int) -> dict[str, int] | None:
        names = ("map_count", "total_vm", "data_vm", "stack_vm", "locked_vm", "brk", "start_brk")
        for number in self._states.sections[:count][::-1][:2].tolist():
            section = self.trace.section(number)
            if section.map_count:
                return {name: getattr(section, name) for name in names}
        task = self.space.fork_task
        return {name: task[name] for name in names[:-1]} | {"start_brk": 0} if task and not count else None

    # ---- anon_vmas, which come between the sections ----

    def _with_gains(
        self, known: list[tuple[Vma, int]], count: int, time: int
    ) -> tuple[tuple[Vma, ...], dict[int, tuple[int, int]]]:
        """Add the anon_vmas that VMAs gained since they were read, as far as the next look tells."""
        since: dict[int, tuple[int, int]] = {}
        vmas = []
        open_end = len(self._gains) > 0 and count < len(self._states.sections)
        for vma, source in known:
            if open_end and vma.anon_vma is None and not vma.flags & SHARED:
                read = self._read_time(source)
                if self._gains[-1] > read:
                    vma = self._gained(vma, read, count, time, since)
            vmas.append(vma)
        return tuple(vmas), since

    def _gained(self, vma: Vma, read: int, count: int, time: int, since: dict[int, tuple[int, int]]) -> Vma:
        later = self._next_look(vma.start, count)
        if later is None or later[0].anon_vma is None or vma.obj not in (None, later[0].obj):
            return vma
        inside = self._gains[(self._gains > read) & (self._gains <= later[1])]
        if len(inside) and int(inside[-1]) <= time:
            return vma._replace(anon_vma=later[0].anon_vma)
        if not len(inside) or int(inside[0]) <= time:
            since[vma.start] = (int(inside[0]), int(inside[-1])) if len(inside) else (read, later[1])
        return vma

    def _next_look(self, address: int, count: int) -> tuple[Vma, int] | None:
        """The VMA at an address as the next section that looks there sees it, and when."""
        covers, sections = self.trace.records.before, self._states.sections.astype(np.int64)
        for first in range(count, len(sections), _LOOK_AHEAD):
            part = sections[first : first + _LOOK_AHEAD]
            walks = row_ranges(covers.first[part], covers.first[part + 1])
            hit = (covers.start[walks] <= address) & (address < covers.end[walks]) & (covers.flags[walks] == 0)
            if hit.any():
                source = int(walks[np.argmax(hit)]) * 2
                vma = next((v for v in self.trace.walk_vmas(source) if v.start <= address < v.end), None)
                return (vma, self._read_time(source)) if vma else None
        return None

    def _read_time(self, source: int) -> int:
        if source < 0:
            return self.space.time
        number = self.trace.walk_section(source)
        return int(self.trace.records.sections["time" if source & 1 else "acquired"][number])

    # ---- what happened ----

    def history(self, address: int) -> list[Event]:
        """What happened at one address, oldest first: every change of the VMA that holds it."""
        events = []
        for operation, section in self._touching(address):
            before, after = self._around(section, address)
            effects = tuple(e for e in operation.detail if _concerns(e, before, after))
            if _differ(before, after) or any(e.address == address for e in effects):
                events.append(Event(operation, section, before, after, effects))
        if self.space.origin == "fork":
            first = next(self.trace.iter_operations(self.space.id))
            found = next((v for v in self.trace.base(self.space.id)[0] if v.start <= address < v.end), None)
            if found is not None:
                events.insert(0, Event(first, None, None, found, ()))
        return events

    def _around(self, section: Section, address: int) -> tuple[Vma | None, Vma | None]:
        """The VMA at an address before and after a section; by the state around where it did not look."""
        at = int(np.searchsorted(self._states.sections, section.number))
        found = []
        for walks, count in ((section.before, at), (section.after, at + 1)):
            vmas: Iterable[Vma] = (vma for walk in walks for vma in walk.vmas)
            if not any(walk.start <= address < walk.end for walk in walks) and section.kind == KINDS["SECTION"]:
                vmas = (vma for vma, _ in self.trace.known(self.space.id, self._states.picture(count))[0])
            found.append(next((vma for vma in vmas if vma.start <= address < vma.end), None))
        return found[0], found[1]

    def _touching(self, address: int) -> Iterator[tuple[Operation, Section]]:
        """The sections that changed something and looked at an address, each with its operation."""
        records, sections = self.trace.records, self._states.sections.astype(np.int64)
        hit = np.zeros(len(sections), bool)
        for covers in (records.before, records.after):
            walks = row_ranges(covers.first[sections], covers.first[sections + 1])
            owner = np.repeat(np.arange(len(sections)), covers.first[sections + 1] - covers.first[sections])
            hit[owner[(covers.start[walks] <= address) & (address < covers.end[walks])]] = True
        hit &= (records.sections["changed"][sections] == CHANGED) | (records.sections["kind"][sections] > 1)
        for number in sections[hit].tolist():
            row = int(self.trace.operations.of_section[number])
            if row >= 0:
                yield self.trace.operation(row), self.trace.section(number)

    def lifetimes(self) -> list[Lifetime]:
        """The lives of all VMA objects, in the order of their births."""
        found: dict[int, Lifetime] = {}
        for operation in self.trace.iter_operations(self.space.id):
            for section in operation.sections:
                for walk in (*section.before, *section.after):
                    for vma in walk.vmas:
                        if isinstance(vma.obj, int) and vma.obj not in found:
                            found[vma.obj] = _found_life(vma.obj, operation, self.space)
            for effect in operation.detail:
                _record_effect(found, effect, operation.n)
            if operation.kind == "exit":
                for obj, life in found.items():
                    if life.death is None:
                        found[obj] = _died(life, "exit", operation.n, None)
        return list(found.values())


def difference(old: Snapshot, new: Snapshot) -> Difference:
    """What changed from one moment to another (of one address space, or of a parent and its child)."""
    gone = {vma.start: vma for vma in old.vmas}
    come = {vma.start: vma for vma in new.vmas}
    pairs = [(gone[start], come[start]) for start in sorted(gone.keys() & come.keys())]
    left = [vma for start, vma in gone.items() if start not in come]
    fresh = [vma for start, vma in come.items() if start not in gone]
    by_object = {vma.obj: vma for vma in fresh if vma.obj is not None}
    moved = [(vma, by_object[vma.obj]) for vma in left if vma.obj in by_object]
    pairs += moved
    same = {id(one) for pair in moved for one in pair}
    return Difference(
        tuple(vma for vma in fresh if id(vma) not in same),
        tuple(vma for vma in left if id(vma) not in same),
        tuple(sorted((a, b) for a, b in pairs if a != b)) if pairs else (),
    )


def timelines(trace: Trace, pid: int | None = None) -> list[Timeline]:
    """The timelines of a process's address spaces, oldest first (``pid`` None: the first traced process).

    Raises UsageError where the process is not in the trace, BadTrace where no process is.
    """
    pids = trace.pids()
    if pid is None:
        if not pids:
            raise BadTrace("the trace holds no process", "record again; it ends before anything happened")
        pid = pids[0]
    spaces = trace.spaces_of(pid)
    if not spaces:
        known = ", ".join(str(p) for p in pids[:8]) + (" ..." if len(pids) > 8 else "")
        raise UsageError(f"process {pid} is not in the trace", f"it has {known}")
    return [Timeline(trace, space.id) for space in spaces]


def _differ(before: Vma | None, after: Vma | None) -> bool:
    """Whether two looks at one place differ by more than an object not yet seen or an anon_vma gained."""
    if before is None or after is None:
        return before is not after
    same = before._replace(obj=after.obj if before.obj is None else before.obj, anon_vma=None, forked=False)
    return same != after._replace(anon_vma=None, forked=False)


def _concerns(effect: Effect, before: Vma | None, after: Vma | None) -> bool:
    objects = {vma.obj for vma in (before, after) if vma is not None}
    return bool(objects & {effect.obj, effect.new, *effect.victims})


def _found_life(obj: int, operation: Operation, space: Space) -> Lifetime:
    if operation.kind == "exec":
        return Lifetime(obj, "exec", operation.n, None, None, None, None)
    return Lifetime(obj, "fork" if space.origin == "fork" else "found", None, None, None, None, None)


def _record_effect(found: dict[int, Lifetime], effect: Effect, n: int) -> None:
    if effect.kind in ("new", "copy"):
        found[effect.obj] = Lifetime(effect.obj, effect.kind, n, None, None, None, None)
    elif effect.kind == "split" and effect.new is not None:
        found[effect.new] = Lifetime(effect.new, "split", n, effect.obj or None, None, None, None)
    elif effect.kind == "unmap" and effect.obj in found:
        found[effect.obj] = _died(found[effect.obj], "unmap", n, None)
    elif effect.kind == "merge":
        for victim in effect.victims:
            if victim in found:
                found[victim] = _died(found[victim], "merge", n, effect.obj)


def _died(life: Lifetime, death: str, n: int, heir: int | None) -> Lifetime:
    return Lifetime(life.obj, life.birth, life.born, life.parent, death, n, heir)
