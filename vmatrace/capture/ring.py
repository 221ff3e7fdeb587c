"""Reads a BPF ring buffer in bulk: all whole records at once, as words of 64-byte cells.

Knows the ring's memory layout (kernel/bpf/ringbuf.c) and how heads are told from other cells; nothing of their
meaning. Cells are kept by column (*words*: 8 rows, a column per cell): one copy puts them so, and all later work is
on contiguous arrays.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from vmatrace.schema import CELL_BYTES, KINDS, MISC

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_BUSY = np.uint64(1 << 31)
_LENGTH = np.uint64((1 << 30) - 1)
_FILE = np.uint64(KINDS["FILE"])
FILE_CELLS = (MISC["FILE_BYTES"] + 8) // CELL_BYTES


def find_heads(words: Words) -> Places:
    """Positions of the cells that begin a record. File records carry text, so their bodies are taken out."""
    heads = np.flatnonzero((words[0].astype(np.uint8) & 1) == 0)
    files = heads[words[1][heads].astype(np.uint8) == KINDS["FILE"]]
    if not len(files):
        return heads
    is_head = np.zeros(words.shape[1], dtype=bool)
    is_head[heads] = True
    beyond = -1
    for place in files.tolist():
        if place < beyond or int(words[0, place] & _LENGTH) != MISC["FILE_BYTES"]:
            continue
        beyond = place + FILE_CELLS
        is_head[place + 1 : beyond] = False
    return np.flatnonzero(is_head)


class RingReader:
    """The consumer of one ring buffer of ``size`` bytes, given by its map's file descriptor.

    `fill` moves what is there into a buffer of ``room`` cells, `take` hands the buffer's content out.
    """

    def __init__(self, fd: int, size: int, room: int = 1 << 18) -> None:
        page = mmap.PAGESIZE
        self._mask = size - 1
        self._consumer_map = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._data_map = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumer = np.frombuffer(self._consumer_map, dtype=np.uint64, count=1)
        self._producer = np.frombuffer(self._data_map, dtype=np.uint64, count=1)
        self._data = np.frombuffer(self._data_map, dtype=np.uint64, offset=page)
        self._words = np.empty((8, room), dtype=np.uint64)
        self._heads: list[Places] = []
        self.filled = 0
        self.size = size

    def fill(self) -> int:
        """Move complete records into the buffer as far as it has room; return how many cells came."""
        begin, end = int(self._consumer[0]), int(self._producer[0])
        cells = min((end - begin) // CELL_BYTES, self._words.shape[1] - self.filled)
        if cells <= 0:
            return 0
        place = (begin & self._mask) // 8
        words = self._words[:, self.filled : self.filled + cells]
        words[:] = self._data[place : place + cells * 8].reshape(-1, 8).T
        heads = find_heads(words)
        busy = np.flatnonzero(words[0][heads] & _BUSY)
        if len(busy):
            heads, cells = heads[: busy[0]], int(heads[busy[0]])
        elif len(heads) and (end - begin) // CELL_BYTES > cells:  # the last record may be cut by the buffer's end
            heads, cells = heads[:-1], int(heads[-1])
        self._heads.append(heads + self.filled)
        self.filled += cells
        self._consumer[0] = begin + cells * CELL_BYTES
        return cells

    @property
    def room(self) -> int:
        """Cells the buffer can still take."""
        return int(self._words.shape[1]) - self.filled

    def take(self) -> tuple[Words, Places]:
        """The buffer's cells and record heads, valid until the next `fill`; the buffer is empty afterwards."""
        words = self._words[:, : self.filled]
        heads = np.concatenate(self._heads) if self._heads else np.empty(0, dtype=np.int64)
        self._heads = []
        self.filled = 0
        return words, heads

    def close(self) -> None:
        """Let go of the mappings."""
        del self._consumer, self._producer, self._data
        self._consumer_map.close()
        self._data_map.close()
