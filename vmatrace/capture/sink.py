"""Where a recording's records go: decoded and written while there is room, then closed with an end mark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vmatrace import tracefile
from vmatrace.capture.decode import Cloak, Columns, Decoder
from vmatrace.capture.ring import Cells, Places, find_heads
from vmatrace.errors import CannotTrace, UsageError, VmatraceError
from vmatrace.schema import CELL_BYTES

FREE_RESERVE = 64 << 20
"""Bytes left free on the disk, or a twentieth of it if that is less."""

# What an empty batch takes, and an end mark without its lists; twice each is held back for the end.
_BATCH_BYTES = 12 << 10


class Sink:
    """The trace file of one recording and the decoder in front of it.

    ``state``: "writing"; "full" when the next piece would not fit (what is there is whole, and the end mark
    fits still); "broken" when a write failed. ``trouble`` says what went wrong.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Any], *, force: bool, max_size: int | None, spaces: int
    ) -> None:
        self.path = path
        self.cloak = Cloak()
        self.decoder = Decoder(self.cloak)
        self.state: Literal["writing", "full", "broken"] = "writing"
        self.reason = ""
        self.trouble: list[VmatraceError] = []
        self._max_size = max_size
        self._held_back = 2 * _BATCH_BYTES + 8 * spaces
        self._first_unwritten: dict[int, int] = {}
        self.writer = tracefile.TraceWriter(path, header, force=force)
        room, why = self._room()
        if room <= 0:
            self.discard()
            if max_size is not None and "size" in why:
                raise UsageError(f"--max-size {max_size}: the header alone needs more", "give at least 1M")
            raise CannotTrace(f"cannot write {path}: {why}", "free some space, or write elsewhere with -o")

    @property
    def records(self) -> int:
        """Records written so far."""
        return self.decoder.records

    def discard(self) -> None:
        """Nothing was recorded: leave no file behind (a device or pipe stays)."""
        self.writer.close()
        if self.path.is_file():
            self.path.unlink()

    def write_records(self, cells: Cells, heads: Places, until: int | None = None) -> None:
        """Decode and write; where room is short, by pieces, so that the last one fits. The rest is dropped.

        ``until``: the recording ended at that time (ns), and what was made later is none of it.
        """
        if until is not None:
            cells, heads = self._without_later(cells, heads, until)
        at = 0
        while at < len(heads) and self.state == "writing":
            room, why = self._room()
            many = max(0, room) // CELL_BYTES  # a cell takes less in the file than in the ring
            end = len(heads)
            if len(cells) - heads[at] > many:
                end = int(np.searchsorted(heads, heads[at] + many, side="right")) - 1
            if end <= at:
                self._stop(why)
                break
            first = int(heads[at])
            last = int(heads[end]) if end < len(heads) else len(cells)
            self.write(self.decoder.decode(cells[first:last], heads[at:end] - first))
            at = end
        self._pass_over(cells[heads[at:], 5])

    def _without_later(self, cells: Cells, heads: Places, until: int) -> tuple[Cells, Places]:
        late = cells[heads, 2] > until
        if not late.any():
            return cells, heads
        self._pass_over(cells[heads[late], 5])
        owner = np.zeros(len(cells), dtype=np.int64)
        owner[heads] = 1
        kept = cells[~late[np.cumsum(owner) - 1]]
        return kept, find_heads(kept)

    def _pass_over(self, words: npt.NDArray[np.uint64]) -> None:
        """Records that are not written: each CPU's count ends before the first of them. ``words``: CPU and count."""
        for word in words.tolist():
            self._first_unwritten.setdefault(word & 0xFFFF, word >> 16 & 0xFFFFFFFF)

    def write(self, tables: Mapping[str, Columns], size: int = 0) -> None:
        """Write tables that are ready, of ``size`` bytes at most."""
        if self.state != "writing" or not tables:
            return
        room, why = self._room()
        if room < size:
            self._stop(why)
            return
        try:
            self.writer.write(tables)
        except VmatraceError as error:
            self.state = "broken"
            self.reason = "the trace could not be written"
            self.trouble.append(error)

    def finish(self, end: dict[str, Any], made: list[int]) -> None:
        """Write the end mark and close. ``made``: records of each CPU, those dropped are taken off."""
        end["cpu_seq"] = [self._first_unwritten.get(cpu, last + 1) - 1 for cpu, last in enumerate(made)]
        try:
            if self.state == "broken":
                self.writer.close()
            else:
                self.writer.finish(end)
        except VmatraceError as error:
            self.trouble.append(error)

    def _room(self) -> tuple[int, str]:
        """Bytes that records may still take in the file, and what stops it when they are used up."""
        room, why = 1 << 62, ""
        if self._max_size is not None:
            room, why = self._max_size - self.writer.bytes_written, "the trace reached --max-size"
        disk = self.writer.disk()
        if disk and (free := disk[0] - min(FREE_RESERVE, disk[1] // 20)) < room:
            room, why = free, "the disk is nearly full"
        return room - self._held_back, why

    def _stop(self, why: str) -> None:
        self.state = "full"
        self.reason = why
        hint = (
            "free some space, or write elsewhere with -o"
            if "disk" in why
            else "what was written stays readable"
        )
        self.trouble.append(VmatraceError(f"{self.path}: {why}", hint))
