"""Builds runs of ring-buffer cells for tests, as the BPF programs would leave them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vmatrace.capture.ring import FILE_CELLS, Cells
from vmatrace.schema import CELL_BYTES, CELLS, KINDS, MISC, ROW_BITS

Cell = list[int]
BUSY = 1 << 31
BEFORE, AFTER = CELLS["CELL_BEFORE"], CELLS["CELL_AFTER"]


def cells_of(*records: Sequence[Cell]) -> Cells:
    """The records one after the other."""
    cells = [cell for record in records for cell in record]
    return np.array(cells, dtype=np.uint64).reshape(-1, 8)


def head(kind: str, cells: int, *, seq: int = 0, space: int = 1, cpu: int = 0, cpu_seq: int = 1, **more: int) -> Cell:
    """A head cell of a record of so many cells in all; ``flags`` and ``part`` as a section has them."""
    length = cells * CELL_BYTES - 8
    word1 = KINDS[kind] | more.get("flags", 0) << 8 | more.get("op_class", 0) << 16
    word1 |= more.get("nr", 0) << 32 | more.get("part", 0) << 48
    who = 77 << 32 | 78
    return [
        length | more.get("busy", 0),
        word1,
        1000,
        space | seq << 32,
        who,
        cpu | cpu_seq << 16,
        more.get("word6", 0),
        more.get("word7", 0),
    ]


def row(role: int, start: int, end: int, bits: int = 0, **more: int) -> Cell:
    """A VMA cell."""
    return [
        role | bits << 32,
        start,
        end,
        more.get("flags", 0x73),
        more.get("pgoff", 5),
        more.get("object", 0xFFFF888001000040),
        more.get("anon_vma", 0),
        more.get("file", 0),
    ]


def extra(role: int, uffd: int = 0, policy: int = 0, name: bytes = b"") -> Cell:
    """The cell behind a VMA cell with ROW_EXTRA."""
    text = np.frombuffer(name.ljust(40, b"\0"), dtype=np.uint64).tolist()
    return [CELLS["CELL_EXTRA"] | role << 8, uffd, policy, *text]


def cover(role: int, start: int, end: int, rows: int, *values: int, flags: int = 0) -> Cell:
    """The cell that closes a walk."""
    words = [*values, 0, 0, 0, 0, 0][:5]
    return [CELLS["CELL_COVER"] | role << 8 | flags << 16 | rows << 32, start, end, *words]


def evidence(*events: tuple[int, int, int, int]) -> Cell:
    """One or two of (what, object, start, end)."""
    first, second = events[0], (events[1:] or ((0, 0, 0, 0),))[0]
    return [CELLS["CELL_EVIDENCE"] | first[0] << 8 | second[0] << 16, *first[1:], *second[1:], 0]


def section(*body: Cell, kind: str = "SECTION", **more: int) -> list[Cell]:
    """A whole write section, or one part of it."""
    return [head(kind, 1 + len(body), **more), *body]


def call(result: int = 0, args: Sequence[int] = (0,) * 6, **more: int) -> list[Cell]:
    """A system call that returned."""
    return [head("CALL", 2, word6=result % 2**64, **more), [CELLS["CELL_ARGS"], *args, 0]]


def file(
    path: bytes, *, pointer: int = 0xFFFF888002000000, bits: int = 0, fs_magic: int = 0, **more: int
) -> list[Cell]:
    """A file's description; ``path``: its names, leaf first, each ended by NUL, or any other bytes."""
    first = head("FILE", FILE_CELLS, word7=fs_magic, **more)
    first[1] |= len(path) << 32
    first[3] = pointer
    body = (CELLS["CELL_ARGS"] | bits << 8).to_bytes(8, "little") + path
    body = body.ljust((FILE_CELLS - 1) * CELL_BYTES, b"\0")
    assert first[0] & (1 << 30) - 1 == MISC["FILE_BYTES"]
    return [first, *np.frombuffer(body, dtype=np.uint64).reshape(-1, 8).tolist()]


EXTRA = ROW_BITS["ROW_EXTRA"]
PARTIAL = MISC["SECTION_PARTIAL"]
