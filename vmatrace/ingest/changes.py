"""Whether a write section changed any VMA, and where nobody looked afterwards: by its evidence and its rows."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmatrace.ingest.effects import ALLOC, DUP, FREED, MERGED, STORE, UNMAPPED, row_ranges
from vmatrace.schema import OP_CLASSES
from vmatrace.tracefile import Table

Array = npt.NDArray[Any]

UNCHANGED: Final = 0
CHANGED: Final = 1
UNTOLD: Final = 2
"""The section alone does not tell whether it changed anything: nothing was read before it."""

EVERYTHING: Final = (1 << 64) - 1

_OP_FORK: Final = OP_CLASSES["OP_FORK"]
_COMPARED: Final = ("start", "end", "flags", "pgoff", "file", "uffd", "policy", "object")


def changes(sections: Table) -> Array:
    """Whether each section changed a VMA: by its evidence, or by its rows before and after."""
    changed = np.where(_left_a_trace(sections), CHANGED, UNCHANGED).astype(np.uint8)
    quiet = (changed == UNCHANGED) & (sections["op_class"] != _OP_FORK) & (sections["kind"] == 1)
    nb, na = np.diff(sections.offsets("before")), np.diff(sections.offsets("after"))
    changed[quiet & ~_walked(sections, "before")] = UNTOLD
    quiet &= changed == UNCHANGED
    for number in np.flatnonzero(quiet & (nb != na)).tolist():
        changed[number] = _differs(sections, number)
    even = np.flatnonzero(quiet & (nb == na) & (nb > 0))
    if not len(even):
        return changed
    before, after = sections.child("before"), sections.child("after")
    b = row_ranges(sections.offsets("before")[even], sections.offsets("before")[even + 1])
    a = row_ranges(sections.offsets("after")[even], sections.offsets("after")[even + 1])
    differs = np.zeros(len(b), bool)
    for name in _COMPARED:
        differs |= before[name][b] != after[name][a]
    if before.has_text("name") or after.has_text("name"):
        names, others = before.text("name"), after.text("name")
        differs |= np.array([names[i] != others[j] for i, j in zip(b.tolist(), a.tolist(), strict=True)], bool)
    owner = np.repeat(even, nb[even])
    for number in np.unique(owner[differs]).tolist():
        changed[number] = _differs(sections, number)
    return changed


def _left_a_trace(sections: Table) -> Array:
    """Whether the evidence of each section tells of a change: VMAs born and freed again at once are none."""
    what, offsets = sections.child("evidence")["what"], sections.offsets("evidence")
    owner = np.repeat(np.arange(sections.rows), np.diff(offsets))
    balance = np.zeros(sections.rows, np.int64)
    balance += np.bincount(owner[(what == ALLOC) | (what == DUP)], minlength=sections.rows)
    balance -= np.bincount(owner[what == FREED], minlength=sections.rows)
    kept = (what == STORE) | (what == MERGED) | (what == UNMAPPED)
    found: Array = (balance != 0) | (np.bincount(owner[kept], minlength=sections.rows) > 0)
    return found


def _walked(sections: Table, side: str) -> Array:
    covers, offsets = sections.child(side + "_cover"), sections.offsets(side + "_cover")
    owner = np.repeat(np.arange(sections.rows), np.diff(offsets))
    walked: Array = np.bincount(owner[covers["end"] > covers["start"]], minlength=sections.rows) > 0
    return walked


def _differs(sections: Table, number: int) -> int:
    """Compare the rows before and after one section where both were walked."""
    sides = []
    for side in ("before", "after"):
        rows, offsets = sections.child(side), sections.offsets(side)
        part = slice(offsets[number], offsets[number + 1])
        columns = [rows[name][part].tolist() for name in _COMPARED]
        columns.append(rows.text("name")[part])
        covers, cover_offsets = sections.child(side + "_cover"), sections.offsets(side + "_cover")
        at = slice(cover_offsets[number], cover_offsets[number + 1])
        spans = list(zip(covers["start"][at].tolist(), covers["end"][at].tolist(), strict=True))
        sides.append((set(zip(*columns, strict=True)), spans))
    (before, before_spans), (after, after_spans) = sides

    def within(row: Any, spans: Any) -> bool:
        return any(lo < row[1] and row[0] < hi for lo, hi in spans)

    lost = any(within(row, after_spans) for row in before - after)
    return CHANGED if lost or any(within(row, before_spans) for row in after - before) else UNCHANGED


def uncovered(sections: Table, owner: Array) -> list[tuple[int, tuple[int, int]]]:
    """Sections that stored where no trusted walk looked afterwards, with the range of their stores."""
    evidence = sections.child("evidence")
    store = evidence["what"] == STORE
    if not store.any():
        return []
    lo = np.full(sections.rows, EVERYTHING, np.uint64)
    hi = np.zeros(sections.rows, np.uint64)
    np.minimum.at(lo, owner[store], evidence["start"][store])
    np.maximum.at(hi, owner[store], evidence["end"][store])
    covers, offsets = sections.child("after_cover"), sections.offsets("after_cover")
    cover_owner = np.repeat(np.arange(sections.rows), np.diff(offsets))
    good = (covers["flags"] == 0) & (covers["start"] <= lo[cover_owner]) & (hi[cover_owner] <= covers["end"])
    missing = hi > 0
    missing[cover_owner[good]] = False
    # The stores of one section may lie far apart: then each has to lie in some interval.
    at = np.flatnonzero(store & missing[owner])
    which = np.repeat(at, np.diff(offsets)[owner[at]])
    walks = row_ranges(offsets[owner[at]], offsets[owner[at] + 1])
    fits = (covers["start"][walks] <= evidence["start"][which]) & (evidence["end"][which] <= covers["end"][walks])
    read = np.zeros(len(store), bool)
    read[which[fits & (covers["flags"][walks] == 0)]] = True
    unread = np.unique(owner[at[~read[at]]]).tolist()
    return [(n, (int(lo[n]), int(hi[n]))) for n in unread]
