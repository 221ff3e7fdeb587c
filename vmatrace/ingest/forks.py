"""The state that an address space born by fork begins with, told from its parent's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from vmatrace.ingest.changes import EVERYTHING
from vmatrace.ingest.views import Space
from vmatrace.vma import DONTCOPY, LOCKED_MASK, UFFD_FLAGS, WIPEONFORK, Vma

if TYPE_CHECKING:
    from vmatrace.ingest.trace import Trace

Base = tuple[tuple[Vma, ...], tuple[tuple[int, int], ...]]

_NOTHING_KNOWN: Final[Base] = ((), ((0, EVERYTHING),))


def copied_state(trace: Trace, child: Space) -> Base:
    """The VMAs and unknown intervals that ``child`` began with.

    Identities of copied objects and of their own anon_vmas are not known before they are read: ``obj`` is
    None, and an anon_vma is a negative number that no other VMA has.
    """
    if child.parent is None or child.fork_section is None:
        return _NOTHING_KNOWN
    lineage = [child]
    while True:  # a chain of forks may be long: oldest first, without recursion
        parent = trace.spaces.get(lineage[-1].parent or 0)
        if parent is None or parent.origin != "fork" or parent.id in trace._bases or parent in lineage:
            break
        lineage.append(parent)
    for space in reversed(lineage[1:]):
        trace.base(space.id)
    states = trace.states(child.parent)
    at = int(np.searchsorted(states.sections, child.fork_section))
    vmas, holes = trace.known(child.parent, states.picture(at + 1))
    return tuple(copy for n, (vma, _) in enumerate(vmas) if (copy := _copy(vma, child.id, n))), tuple(holes)


def _copy(vma: Vma, space: int, n: int) -> Vma | None:
    """One VMA as dup_mmap copies it; None where it is left out."""
    if vma.flags & DONTCOPY:
        return None
    flags = vma.flags & ~LOCKED_MASK
    if vma.uffd is not None:
        flags &= ~UFFD_FLAGS
    wiped = bool(flags & WIPEONFORK)
    faulted = vma.anon_vma is not None and not wiped
    return vma._replace(
        flags=flags,
        obj=None,
        uffd=None,
        anon_vma=-(space << 24 | (n + 1)) if faulted else None,
        forked=faulted,
    )
