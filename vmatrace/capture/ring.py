"""Reads a BPF ring buffer in bulk: all whole records at once, as 64-byte cells.

Knows the ring's memory layout (kernel/bpf/ringbuf.c) and how heads are told from other cells; nothing of their
meaning. *Cells* are an array of shape (n, 8): a row per cell, eight words each.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

from vmatrace.schema import CELL_BYTES, KINDS, MISC

Cells = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_BUSY = np.uint64(1 << 31)
_LENGTH = np.uint64((1 << 30) - 1)
_FILE = np.uint64(KINDS["FILE"])
FILE_CELLS = (MISC["FILE_BYTES"] + 8) // CELL_BYTES
LARGEST = 128
"""More cells than the largest record has (bpf/operations/space.c: 65 of a write section's part)."""


def find_heads(cells: Cells) -> Places:
    """Positions of the cells that begin a record. File records carry text, so their bodies are taken out."""
    return _heads_of(cells[:, 0].copy(), cells)


def _heads_of(tags: npt.NDArray[np.uint64], cells: Cells) -> Places:
    heads = np.flatnonzero((tags.astype(np.uint8) & 1) == 0)
    files = heads[cells[heads, 1].astype(np.uint8) == KINDS["FILE"]]
    if not len(files):
        return heads
    is_head = np.zeros(len(cells), dtype=bool)
    is_head[heads] = True
    beyond = -1
    for place in files.tolist():
        if place < beyond or int(tags[place] & _LENGTH) != MISC["FILE_BYTES"]:
            continue
        beyond = place + FILE_CELLS
        is_head[place + 1 : beyond] = False
    return np.flatnonzero(is_head)


class RingReader:
    """The consumer of one ring buffer of ``size`` bytes, given by its map's file descriptor.

    `take` shows what is there, in the ring's own memory, and `free` gives its room back to the kernel.
    """

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._mask = size - 1
        self._consumer_map = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._data_map = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumer = np.frombuffer(self._consumer_map, dtype=np.uint64, count=1)
        self._producer = np.frombuffer(self._data_map, dtype=np.uint64, count=1)
        self._cells = np.frombuffer(self._data_map, dtype=np.uint64, offset=page).reshape(-1, 8)
        self._taken = 0
        self.size = size

    @property
    def waiting(self) -> int:
        """Cells that are there, records still being written among them."""
        return (int(self._producer[0]) - int(self._consumer[0])) // CELL_BYTES

    def take(self, most: int | None = None) -> tuple[Cells, Places]:
        """Complete records, of ``most`` cells in all (but one record at least), and where each begins.

        The cells are the kernel's own, mapped twice so that they never wrap: valid until `free`.
        """
        there = self.waiting
        many = there if most is None else min(there, max(most, LARGEST))
        first = (int(self._consumer[0]) & self._mask) // CELL_BYTES
        cells = self._cells[first : first + many]
        tags = cells[:, 0].copy()  # once: a record that is finished meanwhile stays busy for us
        heads = _heads_of(tags, cells)
        busy = np.flatnonzero(tags[heads] & _BUSY)
        if len(busy):
            heads, many = heads[: busy[0]], int(heads[busy[0]])
        elif many < there:  # the last record may be cut
            heads, many = heads[:-1], int(heads[-1])
        self._taken = many
        return cells[:many], heads

    def free(self) -> int:
        """Let go of what `take` gave; return how many cells that were."""
        taken, self._taken = self._taken, 0
        self._consumer[0] = int(self._consumer[0]) + taken * CELL_BYTES
        return taken

    def close(self) -> None:
        """Let go of the mappings; where an error on its way up still holds cells, they go with it."""
        del self._consumer, self._producer, self._cells
        self._consumer_map.close()
        with contextlib.suppress(BufferError):
            self._data_map.close()
