"""Which walk tells the state of each interval of an address space at any moment: the latest that covers it.

States are kept as intervals with the walk that tells them, so that looking up the state after any of a
million sections needs no step through those before it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmatrace.ingest.changes import CHANGED, EVERYTHING
from vmatrace.ingest.effects import row_ranges
from vmatrace.ingest.match import Groups
from vmatrace.ingest.records import Covers, Records
from vmatrace.schema import COVER_FLAGS, KINDS, OP_CLASSES

Array = npt.NDArray[Any]

UNKNOWN: Final = -1
BASE: Final = -2
"""Sources that are no walk: nothing is known here; as the address space began (a fork's copy)."""

CUT: Final = COVER_FLAGS["COVER_CUT"]
TELLING: Final = tuple(
    OP_CLASSES["OP_" + name]
    for name in ("MMAP", "OLD_MMAP", "BRK", "MREMAP", "OTHER", "FAULT", "FORK", "EXEC", "ATTACH", "FROM")
)
"""Classes of calls that change no VMA in place outside the ranges that they name."""
_CHUNK: Final = 16384
_KEPT: Final = 32


@dataclass(frozen=True, slots=True)
class Picture:
    """Disjoint intervals in order, each with its source: ``2 * walk + side`` (1: after), UNKNOWN or BASE."""

    start: Array
    end: Array
    source: Array


class SpaceStates:
    """The states of one address space, by how many of its write sections are over."""

    def __init__(self, records: Records, sections: Array, lost: Array, based: bool) -> None:
        """``lost``: whether sections are missing before each; ``based``: it began as a fork's copy."""
        self.sections = sections
        self._records = records
        self._lost = lost
        self._kept: dict[int, Picture] = {0: _whole(BASE if based else UNKNOWN)}
        self._resets = self._whole_walks()

    def picture(self, count: int, with_before: bool = False) -> Picture:
        """The state after ``count`` sections; ``with_before``: and what the next one read at first."""
        picture = self._after(count)
        if with_before and count < len(self.sections):
            picture = self._paint(picture, count, count + 1, before_only=True)
        return picture

    def _after(self, count: int) -> Picture:
        places = sorted(self._kept)
        at = places[bisect_right(places, count) - 1]
        reset = int(np.searchsorted(self._resets, count)) - 1
        picture = self._kept[at]
        if reset >= 0 and self._resets[reset] >= at:
            at, picture = int(self._resets[reset]), _whole(UNKNOWN)
        while at < count:
            step = min(count, at + _CHUNK)
            picture = self._paint(picture, at, step)
            at = step
            self._keep(at, picture)
        return picture

    def _keep(self, at: int, picture: Picture) -> None:
        if len(self._kept) > _KEPT:
            places = [place for place in self._kept if place]
            del self._kept[places[len(places) // 2]]
        self._kept[at] = picture

    def _whole_walks(self) -> Array:
        """Sections after (or, for the last, before) which the whole address space was read."""
        return np.flatnonzero(np.isin(self.sections, self._records.whole_walks()))

    def _paint(self, base: Picture, first: int, last: int, before_only: bool = False) -> Picture:
        starts, ends, sources = [base.start], [base.end], [base.source]
        sections = self.sections[first:last]
        phases = [np.full(len(base.start), -1, np.int64)]
        for layer in self._layers(sections, first, before_only):
            for column, values in zip((starts, ends, sources, phases), layer, strict=True):
                column.append(values)
        order = np.argsort(np.concatenate(phases), kind="stable")
        return paint(np.concatenate(starts)[order], np.concatenate(ends)[order], np.concatenate(sources)[order])

    def _layers(self, sections: Array, first: int, before_only: bool) -> list[tuple[Array, Array, Array, Array]]:
        """What the sections tell, as (start, end, source, phase): later phases hide earlier ones."""
        layers = []
        gaps = np.flatnonzero(self._lost[first : first + len(sections)])
        layers.append(_unknown([0] * len(gaps), [EVERYTHING] * len(gaps), gaps * 4))
        before, owner = _walks_of(self._records.before, sections)
        covers = self._records.before
        good = covers.flags[before] & ~np.uint8(CUT) == 0
        layers.append((covers.start[before[good]], covers.end[before[good]], before[good] * 2, owner[good] * 4 + 1))
        if before_only:
            return layers
        layers.append(self._unread(sections))
        after, owner = _walks_of(self._records.after, sections)
        covers = self._records.after
        flags = covers.flags[after]
        good = flags & ~np.uint8(CUT) == 0
        source = np.where(good, after * 2 + 1, UNKNOWN)
        # Beyond a walk that was cut nothing changed if all that such a call changes leaves evidence.
        silent = ~np.isin(self._records.sections["op_class"][sections], TELLING)
        cut = (flags & CUT != 0) & silent[owner]
        layers.append(_unknown(covers.end[after[cut]], [EVERYTHING] * int(cut.sum()), owner[cut] * 4 + 2))
        layers.append((covers.start[after], covers.end[after], source, owner * 4 + 3))
        return layers

    def _unread(self, sections: Array) -> tuple[Array, Array, Array, Array]:
        """Ranges that sections changed without a walk that tells their state afterwards."""
        table = self._records.sections
        blind = (table["changed"][sections] == CHANGED) & (table["kind"][sections] == KINDS["SECTION"])
        blind &= table["op_class"][sections] != OP_CLASSES["OP_FORK"]
        blind &= self._records.after.first[sections + 1] == self._records.after.first[sections]
        spans = {int(at): (0, EVERYTHING) for at in np.flatnonzero(blind)}
        if self._records.uncovered:
            for at, number in enumerate(sections.tolist()):
                if number in self._records.uncovered:
                    spans[at] = self._records.uncovered[number]
        phases = np.array(list(spans), np.int64) * 4 + 2
        return _unknown([lo for lo, _ in spans.values()], [hi for _, hi in spans.values()], phases)


def _whole(source: int) -> Picture:
    return Picture(np.zeros(1, np.uint64), np.full(1, EVERYTHING, np.uint64), np.full(1, source, np.int64))


def _unknown(start: Any, end: Any, phase: Array) -> tuple[Array, Array, Array, Array]:
    return (
        np.array(start, np.uint64), np.array(end, np.uint64), np.full(len(phase), UNKNOWN, np.int64), phase,
    )  # fmt: skip


def _walks_of(covers: Covers, sections: Array) -> tuple[Array, Array]:
    """The walks of some sections, and for each its section's place among them."""
    sections = sections.astype(np.int64)
    lo, hi = covers.first[sections], covers.first[sections + 1]
    return row_ranges(lo, hi), np.repeat(np.arange(len(sections)), hi - lo)


def paint(start: Array, end: Array, source: Array) -> Picture:
    """Lay intervals over each other, later ones on top, and tell what is seen.

    Each interval is put into two overlapping power-of-two blocks of the cut points; blocks then pass the
    latest interval down to their halves: no loop over intervals.
    """
    real = start < end
    start, end, source = start[real], end[real], source[real]
    points = np.unique(np.concatenate([start, end]))
    lo, hi = np.searchsorted(points, start), np.searchsorted(points, end)
    number = np.arange(len(start))
    level = np.frexp((hi - lo).astype(np.float64))[1] - 1
    slots = max(len(points) - 1, 0)
    seen = np.full(slots, -1, np.int64)
    for step in range(int(level.max(initial=-1)), -1, -1):
        width = 1 << step
        if width < slots:
            np.maximum(seen[width:], seen[:-width].copy(), out=seen[width:])
        mine = level == step
        np.maximum.at(seen, lo[mine], number[mine])
        np.maximum.at(seen, hi[mine] - width, number[mine])
    shown = np.flatnonzero(seen >= 0)
    top = seen[shown]
    fresh = np.ones(len(shown), bool)
    fresh[1:] = (top[1:] != top[:-1]) | (np.diff(shown) != 1)
    begins = np.flatnonzero(fresh)
    lasts = np.r_[begins[1:], len(shown)] - 1 if len(begins) else begins
    return Picture(points[shown[begins]], points[shown[lasts] + 1], source[top[begins]])


def states_of(records: Records, groups: Groups, lost: Array, space: int, based: bool) -> SpaceStates:
    """The states of one address space; ``lost``: numbers of all sections with a loss just before them."""
    sections = groups.of(space)
    return SpaceStates(records, sections, np.isin(sections, lost), based)
