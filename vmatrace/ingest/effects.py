"""What the kernel did in a write section, told from its evidence: merges, splits, unmaps, births.

`count_effects` counts for a whole batch of sections at once; `interpret` tells one section in detail. Both
follow the definitions of effects in the design, and a test holds them equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vmatrace.schema import EVIDENCE, OP_CLASSES
from vmatrace.tracefile import Table
from vmatrace.vma import GROWSDOWN

Array = npt.NDArray[Any]

STORE: Final = EVIDENCE["EVIDENCE_STORE"]
ALLOC: Final = EVIDENCE["EVIDENCE_ALLOC"]
DUP: Final = EVIDENCE["EVIDENCE_DUP"]
MERGED: Final = EVIDENCE["EVIDENCE_MERGED"]
UNMAPPED: Final = EVIDENCE["EVIDENCE_UNMAPPED"]
FREED: Final = EVIDENCE["EVIDENCE_FREED"]

OP_BRK: Final = OP_CLASSES["OP_BRK"]
OP_MREMAP: Final = OP_CLASSES["OP_MREMAP"]
OP_FAULT: Final = OP_CLASSES["OP_FAULT"]
# These map a range where nothing is left: whatever a merge takes away there is a neighbour on the other side.
_MAPS_ANEW: Final = frozenset(
    OP_CLASSES[name] for name in ("OP_MMAP", "OP_OLD_MMAP", "OP_BRK", "OP_MREMAP", "OP_OTHER", "OP_ATTACH")
)
# Calls of these classes move no VMA's start down themselves: such a store is a stack that grew in a fault.
_MAY_FAULT: Final = tuple(OP_CLASSES[name] for name in ("OP_NONE", "OP_LIMITS", "OP_CREDENTIALS", "OP_EXEC", "OP_FORK"))

EFFECTS: Final = ("merge", "split", "unmap", "new", "copy", "grow", "victim")
"""Names of the counted effects; ``victim``: VMAs that a merge took away (not an effect of its own)."""


class Evidence(NamedTuple):
    """One store, birth or death of a VMA object; ``what`` is a value of ``schema.EVIDENCE``."""

    what: int
    obj: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Effect:
    """One thing the kernel did. ``kind`` is one of merge split unmap new copy grow.

    ``obj``: the survivor (merge), the cut VMA (split), the removed, born or grown one. ``start`` and ``end``:
    its range afterwards (unmap: before), None where the evidence does not tell. ``old``: its range before a
    merge or growth. ``side`` (merge): left, right or both, where the survivor lay as seen from the range;
    ``victims``: the VMAs taken away. ``address`` (split): of the cut; ``new``: the object born, ``new_side``:
    below or above it.
    """

    kind: str
    obj: int
    start: int | None = None
    end: int | None = None
    old: tuple[int, int] | None = None
    side: str | None = None
    victims: tuple[int, ...] = ()
    address: int | None = None
    new: int | None = None
    new_side: str | None = None


# ---- many sections at once ---------------------------------------------------------------------------------


def count_effects(sections: Table) -> tuple[dict[str, Array], Array]:
    """Count the effects of each section: arrays by the names of ``EFFECTS``, and where only a stack grew."""
    evidence, offsets = sections.child("evidence"), sections.offsets("evidence")
    what, obj = evidence["what"], evidence["object"]
    op_class = sections["op_class"]
    owner = np.repeat(np.arange(sections.rows), np.diff(offsets))
    store = what == STORE
    birth = (what == ALLOC) | (what == DUP)
    # A new VMA is stored right after its birth; anything else is told one section at a time.
    follows = np.zeros(len(what), bool)
    if len(what) > 1:
        follows[1:] = store[1:] & birth[:-1] & (obj[1:] == obj[:-1]) & (owner[1:] == owner[:-1])
    born = np.zeros(len(what), np.uint8)
    born[1:][follows[1:]] = what[:-1][follows[1:]]
    unstored = birth.copy()
    unstored[:-1] &= ~follows[1:]
    copied = (born == DUP) & (op_class[owner] == OP_MREMAP)
    slow = np.zeros(sections.rows, bool)
    slow[owner[unstored | (what == FREED) | (what == 0) | (what > FREED)]] = True
    slow[owner[copied & _inside_before(sections, owner, evidence, copied)]] = True
    # A store inside an earlier one of the section: a mremap that merged with its own source, then cut it.
    slow[owner[copied]] |= np.bincount(owner[store], minlength=sections.rows)[owner[copied]] > 1
    marks = {
        "merge": store & (born == 0),
        "split": (born == DUP) & ~copied,
        "unmap": what == UNMAPPED,
        "new": born == ALLOC,
        "copy": copied,
        "victim": what == MERGED,
    }
    counts = {name: np.bincount(owner[mark], minlength=sections.rows) for name, mark in marks.items()}
    counts["grow"] = np.where((op_class == OP_BRK) | (op_class == OP_FAULT), counts["merge"], 0)
    grown = _stack_grew(sections, counts, offsets, obj)
    counts["grow"][grown] = 1
    counts["merge"][grown | (op_class == OP_FAULT)] = 0
    for number in np.flatnonzero(slow & ~grown).tolist():
        _recount(sections, number, counts)
    return counts, grown


def _inside_before(sections: Table, owner: Array, evidence: Table, stores: Array) -> Array:
    """Which of the marked stores lie inside a VMA that was there when the lock was taken."""
    inside = np.zeros(len(owner), bool)
    at = np.flatnonzero(stores)
    if not len(at):
        return inside
    before, offsets = sections.child("before"), sections.offsets("before")
    lo, hi = offsets[owner[at]], offsets[owner[at] + 1]
    which = np.repeat(at, hi - lo)
    rows = row_ranges(lo, hi)
    within = (before["start"][rows] <= evidence["start"][which]) & (evidence["end"][which] <= before["end"][rows])
    inside[which[within]] = True
    return inside


def row_ranges(lo: Array, hi: Array) -> Array:
    """The numbers in all half-open ranges ``[lo[i], hi[i])``, one range after the other."""
    sizes = (hi - lo).astype(np.int64)
    total = int(sizes.sum())
    steps = np.ones(total, np.int64)
    filled = sizes > 0
    starts = np.cumsum(sizes[filled]) - sizes[filled]
    firsts, lasts = lo[filled].astype(np.int64), hi[filled].astype(np.int64)
    if total:
        steps[starts] = firsts
        steps[starts[1:]] -= lasts[:-1] - 1
    return np.cumsum(steps)


def _stack_grew(sections: Table, counts: dict[str, Array], offsets: Array, obj: Array) -> Array:
    """Sections of calls that change no VMA, in which one GROWSDOWN VMA took a new start."""
    grown = np.zeros(sections.rows, bool)
    single = (np.diff(offsets) == 1) & (counts["merge"] == 1) & np.isin(sections["op_class"], _MAY_FAULT)
    if not single.any():
        return grown
    after, rows = sections.child("after"), sections.offsets("after")
    for number in np.flatnonzero(single).tolist():
        part = slice(rows[number], rows[number + 1])
        match = (after["object"][part] == obj[offsets[number]]) & (after["flags"][part] & np.uint64(GROWSDOWN) != 0)
        grown[number] = bool(match.any())
    return grown


def _recount(sections: Table, number: int, counts: dict[str, Array]) -> None:
    found = interpret(int(sections["op_class"][number]), before_ranges(sections, number), evidence_of(sections, number))
    for name in EFFECTS[:-1]:
        counts[name][number] = sum(effect.kind == name for effect in found)
    counts["victim"][number] = sum(len(effect.victims) for effect in found)


def before_ranges(sections: Table, number: int) -> list[tuple[int, int, int]]:
    """Object, start and end of the VMAs that were there when section ``number`` of the table began."""
    offsets, before = sections.offsets("before"), sections.child("before")
    part = slice(offsets[number], offsets[number + 1])
    return list(
        zip(
            before["object"][part].tolist(),
            before["start"][part].tolist(),
            before["end"][part].tolist(),
            strict=True,
        )
    )


def evidence_of(sections: Table, number: int) -> list[Evidence]:
    """The evidence of section ``number`` of the table, in order."""
    offsets, evidence = sections.offsets("evidence"), sections.child("evidence")
    part = slice(offsets[number], offsets[number + 1])
    columns = (evidence[name][part].tolist() for name in ("what", "object", "start", "end"))
    return [Evidence(*row) for row in zip(*columns, strict=True)]


# ---- one section in detail ---------------------------------------------------------------------------------


def interpret(
    op_class: int,
    before: Iterable[tuple[int, int, int]],
    evidence: Sequence[Evidence],
    span: tuple[int, int] | None = None,
    stack_grew: bool = False,
    left: Collection[int] | None = None,
) -> list[Effect]:
    """Tell the effects of one section in order.

    ``before``: object, start, end of the VMAs known to have been there. ``span``: the range that the call
    named; it tells a merge with both neighbours from one with a single one. ``stack_grew``: the store is a
    growth. ``left``: the objects that were there afterwards, given where the kernel frees VMAs too late for
    their deaths to be seen: then what is not among them has died.
    """
    ranges = {obj: (start, end) for obj, start, end in before}
    reader = _Reader(op_class, ranges, span, stack_grew, left)
    for item in evidence:
        reader.take(item)
    return reader.finish()


class _Reader:
    """Follows the ranges of VMA objects through one section's evidence."""

    def __init__(
        self,
        op_class: int,
        ranges: dict[int, tuple[int, int]],
        span: tuple[int, int] | None,
        grew: bool,
        left: Collection[int] | None,
    ) -> None:
        self.left = left
        self.cut_off: dict[tuple[int, int], int] = {}
        self.op_class = op_class
        self.span = span
        self.growth = grew or op_class == OP_FAULT
        self.ranges = ranges
        self.newborn: dict[int, int] = {}
        self.covered: set[int] = set()
        self.effects: list[Effect] = []
        self.victims: list[tuple[int, tuple[int, int] | None]] = []
        self.merge: Effect | None = None

    def take(self, item: Evidence) -> None:
        if item.what in (ALLOC, DUP):
            self.newborn[item.obj] = item.what
            self.ranges.pop(item.obj, None)
            self.covered.discard(item.obj)
        elif item.what == STORE:
            self._close_merge()
            self._store(item.obj, item.start, item.end)
        elif item.what in (MERGED, UNMAPPED, FREED) and self.left is None:
            self._death(item.what, item.obj)

    def finish(self) -> list[Effect]:
        self._close_merge()
        if self.left is not None:
            gone = [obj for obj in self.ranges if obj not in self.left]
            self.effects += [Effect("unmap", obj, *self.ranges[obj]) for obj in gone]
        # brk's first heap is stored without a word (mas_store_gfp).
        self.effects += [Effect("new", obj) for obj, what in self.newborn.items() if what == ALLOC]
        return self.effects

    def _store(self, obj: int, start: int, end: int) -> None:
        birth = self.newborn.pop(obj, None)
        old = self.ranges.get(obj)
        if birth == ALLOC:
            self.effects.append(Effect("new", obj, start, end))
        elif birth == DUP:
            self.effects.append(self._split_or_copy(obj, start, end))
        elif self.growth:
            self.effects.append(Effect("grow", obj, start, end, old))
        elif old is not None and old[0] <= start and end <= old[1]:
            # Before 6.3 a split stores what is left of the old VMA too, ahead of the new one.
            self.cut_off[(old[0], start) if old[0] < start else (end, old[1])] = obj
        else:
            self.merge = Effect("merge", obj, start, end, old)
            if self.left is not None:
                self._take_swallowed(obj, start, end)
        self._place(obj, start, end)

    def _take_swallowed(self, survivor: int, start: int, end: int) -> None:
        """Without deaths: what lies in a merge's new range was swallowed, or unmapped by the call before."""
        left = self.left or ()
        for obj, (lo, hi) in list(self.ranges.items()):
            if obj == survivor or obj in left or lo < start or end < hi:
                continue
            named = self.span is not None and lo < self.span[1] and self.span[0] < hi
            self._death(UNMAPPED if named and self.op_class in _MAPS_ANEW else MERGED, obj)

    def _split_or_copy(self, obj: int, start: int, end: int) -> Effect:
        cut = self.cut_off.pop((start, end), None)
        if cut is not None:
            below = self.ranges[cut][0] == end
            address, side = (end, "below") if below else (start, "above")
            return Effect("split", cut, address=address, new=obj, new_side=side)
        for source, (lo, hi) in self.ranges.items():
            if lo <= start and end <= hi and (lo == start) != (hi == end):
                below = lo == start
                address = end if below else start
                return Effect("split", source, address=address, new=obj, new_side="below" if below else "above")
        if self.op_class == OP_MREMAP:
            return Effect("copy", obj, start, end)
        return Effect("split", 0, new=obj)

    def _place(self, obj: int, start: int, end: int) -> None:
        for other, (lo, hi) in list(self.ranges.items()):
            if other == obj or hi <= start or end <= lo:
                continue
            if start <= lo and hi <= end:
                self.covered.add(other)
            elif lo < start:
                self.ranges[other] = (lo, start)
            else:
                self.ranges[other] = (end, hi)
        self.ranges[obj] = (start, end)

    def _death(self, what: int, obj: int) -> None:
        known = self.ranges.pop(obj, None)
        if self.newborn.pop(obj, None) is not None and what == FREED:
            return  # taken back before it was ever in the tree
        merged = what == FREED and obj in self.covered and self.merge is not None and not self._mapped_over(known)
        if what == MERGED or merged:
            self.victims.append((obj, known))
        else:
            self.effects.append(Effect("unmap", obj, *(known or (None, None))))

    def _mapped_over(self, known: tuple[int, int] | None) -> bool:
        """Whether a VMA lay where the call maps anew: then it was unmapped, whatever merged there afterwards."""
        if self.span is None or known is None or self.op_class not in _MAPS_ANEW:
            return False
        return known[0] < self.span[1] and self.span[0] < known[1]

    def _close_merge(self) -> None:
        merge, victims = self.merge, tuple(obj for obj, _ in self.victims)
        if merge is not None:
            at = len(self.effects)
            self.effects.append(
                Effect("merge", merge.obj, merge.start, merge.end, merge.old, self._side(merge), victims)
            )
            if self.op_class == OP_BRK:
                self.effects.insert(at + 1, Effect("grow", merge.obj, merge.start, merge.end, merge.old))
        self.merge, self.victims = None, []

    def _side(self, merge: Effect) -> str | None:
        if merge.old is None or merge.start is None:
            return None
        if self.span is None:
            far = len(self.victims) > (self.op_class not in _MAPS_ANEW)
        else:
            lo, hi = self.span
            far = any(known is None or known[1] <= lo or hi <= known[0] for _, known in self.victims)
        if far or (merge.start < merge.old[0] and merge.end is not None and merge.old[1] < merge.end):
            return "both"
        return "right" if merge.start < merge.old[0] else "left"
