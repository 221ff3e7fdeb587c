"""Proves losses: records of a CPU are numbered, so a number that never came is a record that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmatrace.tracefile import Table

Array = npt.NDArray[Any]

_TABLES: Final = ("sections", "calls", "tasks", "faults", "files")
# Records of a CPU may stand in the file by so many out of order.
_PENDING: Final = 256
# How many records later the last part of a section may leave the kernel.
_FAR: Final = 4096
_NO_CPU: Final = 65535


class CpuNumbers:
    """Follows the numbers of each CPU's records through the batches of a trace."""

    def __init__(self) -> None:
        self._pending: dict[int, Array] = {}
        self._holes: list[tuple[int, int, int]] = []
        self._spare: list[tuple[int, int]] = []

    def add(self, tables: Mapping[str, Table]) -> None:
        """Take the records of one batch."""
        parts = [tables[name] for name in _TABLES if tables[name].rows]
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

    def gaps(self) -> list[tuple[int, int]]:
        """Intervals of ``index`` between two records of a CPU in which records are missing.

        A section that came in several parts took a number for each: a hole that they explain proves nothing.
        """
        for number in list(self._pending):
            self._follow(number, np.empty((0, 3), np.int64), 1)
        found = []
        for lo, hi, missing in sorted(self._holes):
            if missing > sum(spare for index, spare in self._spare if lo < index < hi + _FAR):
                found.append((lo, hi))
        return found

    def _follow(self, cpu: int, rows: Array, keep: int) -> None:
        known = self._pending.get(cpu)
        if known is not None:
            rows = np.concatenate([known, rows])
        if bool((np.diff(rows[:, 0]) < 0).any()):
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
        done = max(len(rows) - keep, 0)
        seq, index, parts = rows[: done + 1].T
        self._pending[cpu] = rows[done:].copy()
        skipped = np.diff(seq) - 1
        missing = skipped - (parts[1:] - 1)
        for at in np.flatnonzero(missing > 0).tolist():
            self._holes.append((int(index[at]), int(index[at + 1]), int(missing[at])))
        # Numbers taken by parts that were made on another CPU, or before another record of the same one.
        spare = parts[1:] - 1 - np.clip(skipped, 0, parts[1:] - 1)
        self._spare += [(int(index[at + 1]), int(spare[at])) for at in np.flatnonzero(spare > 0).tolist()]
