"""Proves losses: records of a CPU are numbered, so a number that never came is a record that is missing."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmatrace.tracefile import Table

Array = npt.NDArray[Any]

_TABLES: Final = ("sections", "calls", "tasks", "faults", "files", "decisions")
# Records of a CPU may stand in the file by so many out of order.
_PENDING: Final = 256
# How many records later the last part of a section may leave the kernel.
_FAR: Final = 4096
_NO_CPU: Final = 65535
_NEVER: Final = 1 << 62


@dataclass(slots=True)
class _Hole:
    """Numbers of one CPU that no record between two others has."""

    cpu: int
    lo: int
    hi: int
    missing: int


class CpuNumbers:
    """Follows the numbers of each CPU's records through the batches of a trace; the first number is 1."""

    def __init__(self) -> None:
        self._pending: dict[int, Array] = {}
        self._holes: list[_Hole] = []
        # CPU, index, and how many numbers a section took that do not stand just before its own.
        self._spare: list[tuple[int, int, int]] = []

    def add(self, tables: Mapping[str, Table]) -> None:
        """Take the records of one batch."""
        parts = [tables[name] for name in _TABLES if name in tables and tables[name].rows]
        if not parts:
            return
        cpu = np.concatenate([table["cpu"] for table in parts])
        rows = np.empty((len(cpu), 3), np.int64)
        rows[:, 0] = np.concatenate([table["cpu_seq"] for table in parts])
        rows[:, 1] = np.concatenate([table["index"] for table in parts])
        rows[:, 2] = np.concatenate(
            [np.maximum(table["parts"], 1) if "parts" in table else np.ones(table.rows) for table in parts]
        )
        for number in np.unique(cpu).tolist():
            if number != _NO_CPU:  # looks at living address spaces have no number
                self._follow(number, rows[cpu == number], _PENDING)

    def gaps(self, last: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Intervals of ``index`` between two records of a CPU in which records are missing.

        ``last``: the last number of each CPU as the end mark has it. A section that came in several parts
        took a number for each: holes that they explain prove nothing.
        """
        for cpu, number in enumerate(last):
            if number:
                self._follow(cpu, np.array([[number + 1, _NEVER, 1]]), 1)
        for cpu in list(self._pending):
            self._follow(cpu, np.empty((0, 3), np.int64), 1)
        self._explain()
        return sorted((hole.lo, hole.hi) for hole in self._holes if hole.missing)

    def _explain(self) -> None:
        """Fill holes with the parts of sections, those first that stand nearest to each other."""
        pairs = []
        for cpu in {hole.cpu for hole in self._holes if self._spare}:
            holes = sorted((hole for hole in self._holes if hole.cpu == cpu), key=lambda hole: hole.hi)
            ends = [hole.hi for hole in holes]
            for place, (own, index, _) in enumerate(self._spare):
                at = bisect_right(ends, index - _FAR)
                while at < len(holes) and holes[at].lo < index:
                    pairs.append((abs(ends[at] - index), own != cpu, place, holes[at]))
                    at += 1
        left = [spare for _, _, spare in self._spare]
        for _, _, place, hole in sorted(pairs, key=lambda pair: pair[:3]):
            taken = min(hole.missing, left[place])
            hole.missing -= taken
            left[place] -= taken

    def _follow(self, cpu: int, rows: Array, keep: int) -> None:
        known = self._pending.get(cpu)
        rows = np.concatenate([np.array([[0, -1, 1]]) if known is None else known, rows])
        if bool((np.diff(rows[:, 0]) < 0).any()):
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
        done = max(len(rows) - keep, 0)
        seq, index, parts = rows[: done + 1].T
        self._pending[cpu] = rows[done:].copy()
        skipped = np.diff(seq) - 1
        missing = skipped - (parts[1:] - 1)
        for at in np.flatnonzero(missing > 0).tolist():
            self._holes.append(_Hole(cpu, int(index[at]), int(index[at + 1]), int(missing[at])))
        spare = parts[1:] - 1 - np.clip(skipped, 0, parts[1:] - 1)
        self._spare += [(cpu, int(index[at + 1]), int(spare[at])) for at in np.flatnonzero(spare > 0).tolist()]
