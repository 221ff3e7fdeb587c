"""Tells apart the VMA objects that shared one address: an id for each pointer, address space and generation.

A ``vm_area_struct`` is handed out again as soon as it is freed, so its pointer names it only until the next
birth at the same place. A VMA object never changes its address space.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmatrace.ingest.effects import ALLOC, DUP

Array = npt.NDArray[Any]

UNBORN: Final = 1 << 62
"""Ids from here on: objects that were there before the trace saw a birth at their place."""

_MIX_POINTER: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_SPACE: Final = np.uint64(0xD1B54A32D192ED03)


class ObjectIds:
    """Ids of VMA objects, made from all births of a trace in order."""

    def __init__(self, pointers: Array, spaces: Array, sections: Array) -> None:
        """``sections``: the number of the section of each birth, ascending."""
        self._sections = sections
        keys = _mix(pointers, spaces)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        self._keys, first, inverse = np.unique(ordered, return_index=True, return_inverse=True)
        self._first = first
        self._places = inverse.astype(np.uint64) << np.uint64(32) | order.astype(np.uint64)
        self._order = order

    def births_before(self, sections: Array) -> Array:
        """How many births happened before each of these sections began."""
        found: Array = np.searchsorted(self._sections, sections)
        return found

    @staticmethod
    def is_birth(what: Array) -> Array:
        """Which rows of evidence are births."""
        found: Array = (what == ALLOC) | (what == DUP)
        return found

    def ids(self, pointers: Array, spaces: Array, births: Array) -> Array:
        """Ids (int64) of the objects at ``pointers``, after the first ``births`` births of the trace.

        A null pointer has id 0; birth number n (from 0) made the object n + 1.
        """
        keys = _mix(pointers, spaces)
        found = np.asarray(keys >> np.uint64(2), dtype=np.int64) | UNBORN
        if len(self._keys):
            rank = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            known = self._keys[rank] == keys
            goal = rank.astype(np.uint64) << np.uint64(32) | np.asarray(births, np.uint64)
            place = np.searchsorted(self._places, goal)
            born = known & (place > self._first[rank])
            found[born] = self._order[place[born] - 1] + 1
        found[pointers == 0] = 0
        return found


def _mix(pointers: Array, spaces: Array) -> Array:
    with np.errstate(over="ignore"):
        mixed: Array = pointers * _MIX_POINTER ^ np.asarray(spaces, np.uint64) * _MIX_SPACE
    return mixed
