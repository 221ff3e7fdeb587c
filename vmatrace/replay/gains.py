"""Whether a VMA may have gained the anon_vma that a read shows: by a fault since it was last read without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from vmatrace.replay.space import Change, TracedSpace
from vmatrace.vma import ACCESS, MAYBE_GUARD, MAYWRITE, SHARED, SOFTDIRTY, Vma

if TYPE_CHECKING:
    from vmatrace.replay.state import SpaceState

Interval = tuple[int, int]

REMEMBERED: Final = 256
"""Operations of an address space that are remembered; what was last read before them counts as long ago."""


class Past(NamedTuple):
    """An operation that is over: what it read, what it changed, and the gains that were seen as events by then."""

    walks: list[Interval]
    changes: list[Change]
    events: int


LOST: Final = Past([], [], 0)
"""Stands in the history where anything may have happened."""


class Gains(NamedTuple):
    """Where in a comparison a VMA stands.

    ``allowed``: what may change outside the write lock may have changed. ``read``: what this operation read
    before; None where faults may have come between its sections.
    """

    allowed: bool
    read: Sequence[Interval] | None
    model: Sequence[Vma]
    rows: Sequence[Vma]
    at: int

    def neighbours(self, space: TracedSpace) -> list[tuple[Vma, bool]]:
        """The VMAs above and below, as seen, each with whether it had its anon_vma before this comparison."""
        rows, at = self.rows, self.at
        found: list[tuple[Vma, bool]] = []
        above = space.find(rows[at].end) if at + 1 == len(rows) else None
        below = space.below(rows[at].start) if at == 0 else None
        if at + 1 < len(rows):
            found.append((rows[at + 1], self.model[at + 1].anon_vma is not None))
        if at:
            found.append((rows[at - 1], self.model[at - 1].anon_vma is not None))
        return found + [(vma, True) for vma in (above, below) if vma is not None]


def gain(state: SpaceState, seen: Vma, gains: Gains) -> str:
    """A VMA has an anon_vma that the model does not know: "" where it may have gained it, else why not."""
    at = f"[{seen.start:#x}, {seen.end:#x})"
    if seen.flags & (SHARED | MAYWRITE) != MAYWRITE and not _guarded(state, seen):
        return f"{at}: an anon_vma in a mapping that can have none"
    if seen.forked:
        if state.inherited <= 0 and not state.lossy:
            return f"{at}: a forked anon_vma that no fork explains"
        state.inherited -= 1
        return ""
    if state.credits <= 0 and not state.lossy:
        return f"{at}: an anon_vma that no fault explains"
    if not state.lossy and _events_since_read(state, seen, gains.read) <= 0:
        return f"{at}: an anon_vma, and no fault gave any since this VMA was read without one"
    state.credits -= 1
    state.history.append(Past([], [((), (seen,))], _events_before(state)))
    return _source_differs(state, seen, gains)


def _source_differs(state: SpaceState, seen: Vma, gains: Gains) -> str:
    """Whether it is the anon_vma that find_mergeable_anon_vma gives: a neighbour's, or a new one."""
    donors = [(v, old) for v, old in gains.neighbours(state.space) if _may_share(v, seen, state.kernel.shift)]
    if any(donor.anon_vma == seen.anon_vma for donor, _ in donors) or _changed_beside(state, seen):
        return ""
    if _handed_on(state, seen) or _unread_donor(state, seen, gains):
        return ""
    at = f"[{seen.start:#x}, {seen.end:#x})"
    if any(old for _, old in donors):
        return f"{at}: a new anon_vma, expected the neighbour's"
    home = state.homes.get(seen.anon_vma)
    other = state.space.at(home) if home is not None else None
    if other is not None and other.anon_vma == seen.anon_vma and other.start != seen.start:
        return f"{at}: the anon_vma of a VMA that cannot share it"
    state.homes[seen.anon_vma] = seen.start
    return ""


def _events_since_read(state: SpaceState, vma: Vma, read: Sequence[Interval] | None) -> int:
    """How many gains were seen as events since all of a VMA was last read; where that is open, all that are left."""
    if read is None:
        return state.credits
    if any(lo <= vma.start and vma.end <= hi for lo, hi in read):
        return state.events - _events_before(state)
    for past in reversed(state.history):
        if any(lo <= vma.start and vma.end <= hi for lo, hi in past.walks):
            return state.events - past.events
        if past is LOST or any(_concerns(new, vma) for _, news in past.changes for new in news):
            break
    return state.credits


def _events_before(state: SpaceState) -> int:
    """How many gains had been seen as events when the last operation was over."""
    return state.history[-1].events if state.history else 0


def _handed_on(state: SpaceState, seen: Vma) -> bool:
    """Whether neighbours that gained an anon_vma unseen may have handed it on, one to the next."""
    shift, found = state.kernel.shift, state.space
    for up in (False, True):
        vma = seen
        # Each one between that has none yet must have had a fault of its own.
        for _ in range(state.credits + 1):
            beside = found.at(vma.end if up else vma.start - 1)
            if beside is None or not _fit(vma, beside, shift):
                break
            if beside.anon_vma is not None:
                if beside.anon_vma == seen.anon_vma and not beside.forked:
                    return True
                break
            vma = beside
    return False


def _unread_donor(state: SpaceState, seen: Vma, gains: Gains) -> bool:
    """Whether a neighbour that was not read may have gained an anon_vma first, and this VMA shares that."""
    if state.credits <= 0 and not state.lossy:
        return False
    above = state.space.at(seen.end) if gains.at + 1 == len(gains.rows) else None
    below = state.space.at(seen.start - 1) if gains.at == 0 else None
    return any(
        other is not None and other.anon_vma is None and _fit(other, seen, state.kernel.shift)
        for other in (above, below)
    )


def _guarded(state: SpaceState, seen: Vma) -> bool:
    """Whether guard regions gave a VMA its anon_vma where they did that to any: before they spared files."""
    return state.kernel.any_guarded and any(lo < seen.end and seen.start < hi for lo, hi in state.guards)


def _changed_beside(state: SpaceState, seen: Vma) -> bool:
    """Whether a VMA beside this one changed after it was last read: the fault may have come before that."""
    if any(_concerns(vma, seen) for old, new in state.space.journal for vma in (*old, *new)):
        return True
    for past in reversed(state.history):
        if past is LOST:
            return True
        if any(new == (seen,) for _, new in past.changes):
            continue  # this very gain
        if any(lo <= seen.start < hi for lo, hi in past.walks):
            return False
        if any(_concerns(vma, seen) for old, new in past.changes for vma in (*old, *new)):
            return True
    return len(state.history) == REMEMBERED


def _concerns(vma: Vma, seen: Vma) -> bool:
    """Whether a VMA touches another, or has its anon_vma."""
    return (vma.start <= seen.end and seen.start <= vma.end) or vma.anon_vma == seen.anon_vma


def _may_share(donor: Vma, vma: Vma, shift: int) -> bool:
    """Whether find_mergeable_anon_vma would take the anon_vma of ``donor`` for ``vma``."""
    return donor.anon_vma is not None and not donor.forked and _fit(donor, vma, shift)


def _fit(one: Vma, other: Vma, shift: int) -> bool:
    """anon_vma_compatible: adjacent and alike but for what mprotect may change."""
    lower, upper = (one, other) if one.start < other.start else (other, one)
    if lower.end != upper.start:
        return False
    if lower.policy != upper.policy or lower.file != upper.file:
        return False
    if (lower.flags ^ upper.flags) & ~(ACCESS | SOFTDIRTY | MAYBE_GUARD):
        return False
    return lower.pgoff - upper.pgoff == (lower.start - upper.start) >> shift
