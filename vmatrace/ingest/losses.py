"""Proves losses: records of a CPU are numbered, so a number that never came is a record that is missing."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
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
# So many holes of a CPU before a section are looked at.
_NEAR: Final = 8
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
        # CPU, index and the number of earlier parts of sections.
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
        """Fill holes with the parts of sections: those first between which nothing else can lie."""
        pairs = []
        for cpu in {hole.cpu for hole in self._holes if self._spare}:
            holes = sorted((hole for hole in self._holes if hole.cpu == cpu), key=lambda hole: hole.hi)
            ends = [hole.hi for hole in holes]
            for place, (own, index, parts) in enumerate(self._spare):
                last = bisect_left(ends, index)
                for hole in holes[max(bisect_right(ends, index - _FAR), last - _NEAR) : last + 1]:
                    if hole.lo < index:
                        begin = index - 2 * parts  # where its first part left the kernel, if nothing came between
                        apart = (max(index - hole.hi, 0), abs(begin - hole.lo), own != cpu)
                        pairs.append((apart, place, hole))
        left = [parts for _, _, parts in self._spare]
        for _, place, hole in sorted(pairs, key=lambda pair: pair[:2]):
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
        missing, parts = np.diff(seq) - 1, parts[1:] - 1
        # A record takes two numbers of the index: here only the section's own parts left in between.
        own = (missing == parts) & (np.diff(index) == 2 * parts + 2)
        missing[own] = parts[own] = 0
        for at in np.flatnonzero(missing > 0).tolist():
            self._holes.append(_Hole(cpu, int(index[at]), int(index[at + 1]), int(missing[at])))
        self._spare += [(cpu, int(index[at + 1]), int(parts[at])) for at in np.flatnonzero(parts > 0).tolist()]
