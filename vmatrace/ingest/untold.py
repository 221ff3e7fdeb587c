"""Decides for sections that read nothing when they began whether they changed anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vmatrace.vma import MAYBE_GUARD, SOFTDIRTY, Vma

if TYPE_CHECKING:
    from vmatrace.ingest.trace import Trace

# These change without the write lock, or without anybody's doing.
_RESTLESS = MAYBE_GUARD | SOFTDIRTY


def resolve(trace: Trace, untold: list[int]) -> list[bool]:
    """Whether each section left its address space other than it was; True where that is unknown."""
    return [_changed(trace, number) for number in untold]


def _changed(trace: Trace, number: int) -> bool:
    space = int(trace.records.sections["space"][number])
    states = trace.states(space)
    at = int(np.searchsorted(states.sections, number))
    after = trace.records.after
    walks = range(int(after.first[number]), int(after.first[number + 1]))
    if not walks or any(after.flags[walk] for walk in walks):
        return True
    vmas, holes = trace.known(space, states.picture(at))
    for walk in walks:
        start, end = int(after.start[walk]), int(after.end[walk])
        if any(lo < end and start < hi for lo, hi in holes):
            return True
        was = [_key(vma) for vma, _ in vmas if vma.start < end and start < vma.end]
        if was != [_key(vma) for vma in trace.walk_vmas(2 * walk + 1)]:
            return True
    return False


def _key(vma: Vma) -> tuple[Any, ...]:
    return (vma.start, vma.end, vma.flags & ~_RESTLESS, vma.pgoff, vma.file, vma.policy, vma.name)
