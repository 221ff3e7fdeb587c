"""First and last looks at address spaces that are alive: iterator rows -> sections and tasks of the trace.

A snapshot is consistent when all rows of an address space carry the same count of write sections and none was
open: then it is the state after that section, and stands in the file right behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vmatrace.capture.decode import Cloak, Columns
from vmatrace.capture.ring import Cells, Places
from vmatrace.schema import KINDS

ADDRESS_END = 2**64 - 1
NO_CALL = 65535


@dataclass(frozen=True, slots=True)
class SpaceView:
    """The rows of one address space in one run of the iterator (see bpf_iter__task_vma in bpf/operations.c)."""

    mm: int
    pid: int
    space: int
    seq: int
    consistent: bool
    rows: Cells


def split_views(rows: Cells) -> list[SpaceView]:
    """One view per address space; tasks that share one (CLONE_VM) give it once."""
    views: dict[int, SpaceView] = {}
    who = rows[:, 0]
    borders = np.flatnonzero(np.diff(who)) + 1
    for part in np.split(rows, borders):
        if not len(part):
            continue
        mm = int(part[0, 1])
        if mm in views and views[mm].consistent:
            continue
        numbers = np.unique(part[:, 2])
        same = len(numbers) == 1 and len(np.unique(part[:, 1])) == 1 and not part[:, 3].any()
        rising = bool((part[1:, 5] >= part[:-1, 6]).all()) and int(part[0, 14]) == len(part)
        word = int(part[0, 2])
        views[mm] = SpaceView(mm, int(part[0, 0]) >> 32, word & 0xFFFFFFFF, word >> 32, same and rising, part)
    return list(views.values())


def find_place(cells: Cells, heads: Places, space: int, seq: int) -> int:
    """How many records stand before the first write section of ``space`` that is later than ``seq``."""
    kind = cells[heads, 1].astype(np.uint8)
    word = cells[heads, 3]
    later = (kind == KINDS["SECTION"]) | (kind == KINDS["LAST"])
    later &= word.astype(np.uint32) == space
    later &= (word >> np.uint64(32)) > seq
    found = np.flatnonzero(later)
    return int(found[0]) if len(found) else len(heads)


def snapshot_tables(views: list[SpaceView], indices: list[int], cloak: Cloak, *, introduce: bool) -> dict[str, Columns]:
    """The views as sections (state after, whole address space); ``introduce`` adds the task rows of new ones.

    ``indices``: place in the file of each view. Only consistent views may be given.
    """
    if not views:
        return {}
    first = np.array([view.rows[0] for view in views])
    rows = np.concatenate([view.rows for view in views])
    counts = np.array([len(view.rows) for view in views])
    many = len(views)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    common = _who(views, indices, first)
    sections: Columns = common | {
        "kind": np.full(many, KINDS["SECTION"]),
        "nr": np.full(many, NO_CALL),
        "acquired": first[:, 23],
        "map_count": first[:, 14],
        "total_vm": first[:, 15],
        "data_vm": first[:, 16],
        "stack_vm": first[:, 17],
        "locked_vm": first[:, 18],
        "brk": first[:, 19],
        "brk_before": first[:, 19],
        "def_flags": first[:, 20],
        "mm_flags": first[:, 21],
        "start_brk": first[:, 22],
        "after": (offsets, _rows(rows, cloak)),
        "after_cover": (
            np.arange(many + 1, dtype=np.int32),
            {
                "start": np.zeros(many, dtype=np.uint64),
                "end": np.full(many, ADDRESS_END, dtype=np.uint64),
                "flags": np.zeros(many, dtype=np.uint64),
                "rows": counts,
            },
        ),
    }
    tables = {"sections": sections}
    if introduce:
        tables["tasks"] = {
            **common,
            "index": common["index"] - np.uint64(1),
            "kind": np.full(many, KINDS["FORK"]),
            **{name: sections[name] for name in ("map_count", "total_vm", "data_vm", "stack_vm", "locked_vm", "brk")},
            "def_flags": first[:, 20],
        }
    return tables


def _rows(rows: Cells, cloak: Cloak) -> Columns:
    return {
        "start": rows[:, 5],
        "end": rows[:, 6],
        "flags": rows[:, 7],
        "pgoff": rows[:, 8],
        "bits": rows[:, 4],
        "object": cloak(rows[:, 9].copy()),
        "anon_vma": cloak(rows[:, 10].copy()),
        "file": cloak(rows[:, 11].copy()),
        "uffd": cloak(rows[:, 12].copy()),
        "policy": rows[:, 13],
    }


def _who(views: list[SpaceView], indices: list[int], first: npt.NDArray[Any]) -> Columns:
    zeros = np.zeros(len(views), dtype=np.uint64)
    return {
        "index": np.array(indices, dtype=np.uint64),
        "time": first[:, 23],
        "cpu": np.full(len(views), 65535),  # made by no CPU's records: outside the loss count
        "cpu_seq": zeros,
        "space": np.array([view.space for view in views], dtype=np.uint64),
        "seq": np.array([view.seq for view in views], dtype=np.uint64),
        "pid": first[:, 0] >> np.uint64(32),
        "tid": first[:, 0] & np.uint64(0xFFFFFFFF),
    }
